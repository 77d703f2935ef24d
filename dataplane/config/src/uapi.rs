//! The text protocol of WireGuard's cross-platform configuration interface, as `wg` speaks it on
//! `/run/wireguard/NAME.sock`. Keys of ours begin with `mr_`; `wg` skips what it does not know.

use std::fmt::Write;
use std::net::SocketAddr;

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::config::parse_net;
use crate::key::{PublicKey, SecretKey};
use crate::limits;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Get,
    Set(SetRequest),
}

/// `set=1`: changes to the device, in the order in which they are applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetRequest {
    /// `Some(None)`: the device loses its key (all zero on the wire).
    pub private_key: Option<Option<SecretKey>>,
    pub listen_port: Option<u16>,
    /// 0 takes the mark away.
    pub fwmark: Option<u32>,
    /// Peers that are not named here go.
    pub replace_peers: bool,
    pub peers: Vec<PeerChange>,
}

/// Changes to one peer. `None` leaves a field as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerChange {
    pub public_key: PublicKey,
    pub remove: bool,
    /// Change the peer if it exists, but never add it.
    pub update_only: bool,
    /// `Some(None)`: the peer loses its preshared key (all zero on the wire).
    pub preshared_key: Option<Option<SecretKey>>,
    pub endpoint: Option<SocketAddr>,
    /// Seconds; 0 turns the persistent keepalive off.
    pub keepalive_seconds: Option<u16>,
    /// Prefixes that are not named here go.
    pub replace_allowed_ips: bool,
    pub allowed_ips: Vec<AllowedIpChange>,
}

/// `allowed_ip=NET` adds (and takes it from any other peer), `allowed_ip=-NET` removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowedIpChange {
    /// Without host bits.
    pub net: IpNet,
    pub remove: bool,
}

/// `get=1`: what the device is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    pub private_key: Option<SecretKey>,
    pub listen_port: u16,
    pub fwmark: u32,
    pub peers: Vec<PeerState>,
    /// Lines of ours: key without `mr_`, value without line breaks. A key may repeat.
    pub facts: Vec<(String, String)>,
}

/// One peer of [`DeviceState`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    pub public_key: PublicKey,
    pub preshared_key: Option<SecretKey>,
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: Vec<IpNet>,
    pub keepalive_seconds: u16,
    /// Wall clock of the last handshake: seconds and nanoseconds since the Unix epoch; 0: never.
    pub last_handshake: (u64, u32),
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub facts: Vec<(String, String)>,
}

impl PeerState {
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            allowed_ips: Vec::new(),
            keepalive_seconds: 0,
            last_handshake: (0, 0),
            rx_bytes: 0,
            tx_bytes: 0,
            facts: Vec::new(),
        }
    }
}

impl PeerChange {
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive_seconds: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// The numbers that answer a request (Linux errno).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Errno {
    Ok = 0,
    Permission = 1,
    Io = 5,
    NoMemory = 12,
    Invalid = 22,
    NotSupported = 95,
    AddressInUse = 98,
}

/// Why a text is no request; the answer is `errno=-22` and this goes to the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("UAPI line {line}: {key}: {defect}")]
pub struct UapiError {
    /// From 1.
    pub line: usize,
    /// The key, never the value: it may be a secret.
    pub key: String,
    pub defect: &'static str,
}

impl Request {
    /// Reads a request; a blank line or the end of the bytes closes it.
    pub fn parse(bytes: &[u8]) -> Result<Self, UapiError> {
        let mut lines = Lines::new(bytes);
        match lines.next().transpose()? {
            Some(first) if first.key == "get" && first.value == "1" => match lines.next() {
                None => Ok(Self::Get),
                Some(line) => Err(line?.wrong("nothing may follow get=1")),
            },
            Some(first) if first.key == "set" && first.value == "1" => {
                let mut change = SetRequest::default();
                for line in lines {
                    change.take(&line?)?;
                }
                Ok(Self::Set(change))
            }
            Some(first) => Err(first.wrong("a request begins with get=1 or set=1")),
            None => Err(UapiError { line: 1, key: String::new(), defect: "the request is empty" }),
        }
    }

    /// How many bytes of `bytes` the first request takes with its closing blank line, if it is whole.
    pub fn length(bytes: &[u8]) -> Option<usize> {
        bytes.windows(2).position(|pair| pair == b"\n\n").map(|at| at + 2)
    }
}

impl SetRequest {
    fn take(&mut self, line: &Line<'_>) -> Result<(), UapiError> {
        if line.key == "public_key" {
            let key = PublicKey::from_hex(line.value).map_err(|_| line.wrong(KEY_SHAPE))?;
            if self.peers.len() >= limits::UAPI_REQUEST_PEERS_MAX {
                return Err(line.wrong("the request names too many peers"));
            }
            self.peers.push(PeerChange::new(key));
            return Ok(());
        }
        if let Some(peer) = self.peers.last_mut() {
            return peer.take(line);
        }
        match line.key {
            "private_key" => self.private_key = Some(line.secret()?),
            "listen_port" => self.listen_port = Some(line.number()?),
            "fwmark" => self.fwmark = Some(line.mark()?),
            "replace_peers" => self.replace_peers = line.truth()?,
            _ => return Err(line.wrong("unknown key of the device")),
        }
        Ok(())
    }

    /// The request as a client sends it, with its closing blank line.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::from("set=1\n"));
        if let Some(key) = &self.private_key {
            secret_line(&mut text, "private_key", key.as_ref());
        }
        if let Some(port) = self.listen_port {
            put(&mut text, "listen_port", port);
        }
        if let Some(mark) = self.fwmark {
            put(&mut text, "fwmark", mark);
        }
        if self.replace_peers {
            put(&mut text, "replace_peers", "true");
        }
        for peer in &self.peers {
            peer.write(&mut text);
        }
        text.push('\n');
        text
    }
}

impl PeerChange {
    fn take(&mut self, line: &Line<'_>) -> Result<(), UapiError> {
        match line.key {
            "remove" => self.remove = line.truth()?,
            "update_only" => self.update_only = line.truth()?,
            "preshared_key" => self.preshared_key = Some(line.secret()?),
            "endpoint" => self.endpoint = Some(line.endpoint()?),
            "persistent_keepalive_interval" => self.keepalive_seconds = Some(line.number()?),
            "replace_allowed_ips" => self.replace_allowed_ips = line.truth()?,
            "allowed_ip" => {
                let (remove, text) = match line.value.strip_prefix('-') {
                    Some(rest) => (true, rest),
                    None => (false, line.value.strip_prefix('+').unwrap_or(line.value)),
                };
                let net = parse_net(text).map_err(|defect| line.wrong(defect))?.trunc();
                self.allowed_ips.push(AllowedIpChange { net, remove });
            }
            "protocol_version" if line.value == "1" => {}
            "protocol_version" => return Err(line.wrong("only version 1 is spoken")),
            _ => return Err(line.wrong("unknown key of a peer")),
        }
        Ok(())
    }

    fn write(&self, text: &mut String) {
        put(text, "public_key", self.public_key.to_hex());
        for (key, set) in [
            ("remove", self.remove),
            ("update_only", self.update_only),
            ("replace_allowed_ips", self.replace_allowed_ips),
        ] {
            if set {
                put(text, key, "true");
            }
        }
        if let Some(key) = &self.preshared_key {
            secret_line(text, "preshared_key", key.as_ref());
        }
        if let Some(endpoint) = self.endpoint {
            put(text, "endpoint", endpoint);
        }
        if let Some(seconds) = self.keepalive_seconds {
            put(text, "persistent_keepalive_interval", seconds);
        }
        for change in &self.allowed_ips {
            let sign = if change.remove { "-" } else { "" };
            put(text, "allowed_ip", format_args!("{sign}{}", change.net));
        }
    }
}

impl DeviceState {
    /// The answer to `get=1`, with `errno=0` and its closing blank line.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::new());
        if let Some(key) = &self.private_key {
            secret_line(&mut text, "private_key", Some(key));
        }
        if self.listen_port != 0 {
            put(&mut text, "listen_port", self.listen_port);
        }
        if self.fwmark != 0 {
            put(&mut text, "fwmark", self.fwmark);
        }
        put_facts(&mut text, &self.facts);
        for peer in &self.peers {
            peer.write(&mut text);
        }
        text.push_str("errno=0\n\n");
        text
    }

    /// Reads an answer to `get=1`. Unknown keys are skipped, as every client must.
    pub fn parse(bytes: &[u8]) -> Result<Self, UapiError> {
        let mut state = Self::default();
        let mut answered = false;
        for line in Lines::new(bytes) {
            let line = line?;
            match line.key {
                "errno" if line.value == "0" => answered = true,
                "errno" => return Err(line.wrong("the device refused the request")),
                "public_key" => {
                    let key = PublicKey::from_hex(line.value).map_err(|_| line.wrong(KEY_SHAPE))?;
                    state.peers.push(PeerState::new(key));
                }
                _ => match state.peers.last_mut() {
                    Some(peer) => peer.take(&line)?,
                    None => state.take(&line)?,
                },
            }
        }
        if answered {
            return Ok(state);
        }
        Err(UapiError { line: 0, key: "errno".to_owned(), defect: "the answer has no end" })
    }

    fn take(&mut self, line: &Line<'_>) -> Result<(), UapiError> {
        match line.key {
            "private_key" => self.private_key = line.secret()?,
            "listen_port" => self.listen_port = line.number()?,
            "fwmark" => self.fwmark = line.mark()?,
            _ => line.fact(&mut self.facts),
        }
        Ok(())
    }
}

impl PeerState {
    fn write(&self, text: &mut String) {
        put(text, "public_key", self.public_key.to_hex());
        secret_line(text, "preshared_key", self.preshared_key.as_ref());
        put(text, "protocol_version", 1);
        if let Some(endpoint) = self.endpoint {
            put(text, "endpoint", endpoint);
        }
        put(text, "last_handshake_time_sec", self.last_handshake.0);
        put(text, "last_handshake_time_nsec", self.last_handshake.1);
        put(text, "tx_bytes", self.tx_bytes);
        put(text, "rx_bytes", self.rx_bytes);
        put(text, "persistent_keepalive_interval", self.keepalive_seconds);
        for net in &self.allowed_ips {
            put(text, "allowed_ip", net);
        }
        put_facts(text, &self.facts);
    }

    fn take(&mut self, line: &Line<'_>) -> Result<(), UapiError> {
        match line.key {
            "preshared_key" => self.preshared_key = line.secret()?,
            "endpoint" => self.endpoint = Some(line.endpoint()?),
            "last_handshake_time_sec" => self.last_handshake.0 = line.number()?,
            "last_handshake_time_nsec" => self.last_handshake.1 = line.number()?,
            "tx_bytes" => self.tx_bytes = line.number()?,
            "rx_bytes" => self.rx_bytes = line.number()?,
            "persistent_keepalive_interval" => self.keepalive_seconds = line.number()?,
            "allowed_ip" => {
                self.allowed_ips.push(parse_net(line.value).map_err(|defect| line.wrong(defect))?);
            }
            _ => line.fact(&mut self.facts),
        }
        Ok(())
    }
}

/// The answer to a request that is not a successful `get`. The number goes out negative: `wg` takes
/// it for what a kernel call returned.
pub fn errno_text(errno: Errno) -> String {
    format!("errno={}\n\n", -(errno as i32))
}

const KEY_SHAPE: &str = "a key has 64 hexadecimal digits";

struct Line<'t> {
    number: usize,
    key: &'t str,
    value: &'t str,
}

impl Line<'_> {
    fn wrong(&self, defect: &'static str) -> UapiError {
        // The key is from outside: no more of it than a log line bears.
        let key = self.key.chars().filter(|c| c.is_ascii_graphic()).take(40).collect();
        UapiError { line: self.number, key, defect }
    }

    fn truth(&self) -> Result<bool, UapiError> {
        if self.value == "true" { Ok(true) } else { Err(self.wrong("the value can only be true")) }
    }

    fn number<T: std::str::FromStr>(&self) -> Result<T, UapiError> {
        let digits = self.value.bytes().all(|c| c.is_ascii_digit());
        let number = if digits { self.value.parse().ok() } else { None };
        number.ok_or_else(|| self.wrong("the value is no number of the right size"))
    }

    /// Decimal, or hexadecimal after `0x`.
    fn mark(&self) -> Result<u32, UapiError> {
        match self.value.strip_prefix("0x") {
            Some(hex) if !hex.starts_with('+') => {
                u32::from_str_radix(hex, 16).map_err(|_| self.wrong("no mark of 32 bits"))
            }
            _ => self.number(),
        }
    }

    /// All zero means "none".
    fn secret(&self) -> Result<Option<SecretKey>, UapiError> {
        let key = SecretKey::from_hex(self.value).map_err(|_| self.wrong(KEY_SHAPE))?;
        Ok(if key.is_zero() { None } else { Some(key) })
    }

    fn endpoint(&self) -> Result<SocketAddr, UapiError> {
        let address: Option<SocketAddr> = self.value.parse().ok();
        address
            .filter(|address| address.port() != 0)
            .ok_or_else(|| self.wrong("an endpoint is IP:port, with IPv6 in brackets"))
    }

    fn fact(&self, facts: &mut Vec<(String, String)>) {
        if let Some(key) = self.key.strip_prefix("mr_") {
            facts.push((key.to_owned(), self.value.to_owned()));
        }
    }
}

/// The lines of one message, up to a blank line or the end.
struct Lines<'t> {
    rest: &'t [u8],
    number: usize,
}

impl<'t> Lines<'t> {
    fn new(bytes: &'t [u8]) -> Self {
        Self { rest: bytes, number: 0 }
    }
}

impl<'t> Iterator for Lines<'t> {
    type Item = Result<Line<'t>, UapiError>;

    fn next(&mut self) -> Option<Self::Item> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').unwrap_or(self.rest.len());
        let (bytes, rest) = self.rest.split_at(end);
        if bytes.is_empty() {
            return None;
        }
        self.rest = rest.get(1..).unwrap_or_default();
        self.number += 1;
        let defect = |defect| UapiError { line: self.number, key: String::new(), defect };
        if bytes.len() > limits::UAPI_LINE_BYTES_MAX {
            return Some(Err(defect("the line is too long")));
        }
        let Ok(text) = std::str::from_utf8(bytes) else {
            return Some(Err(defect("the line is not UTF-8")));
        };
        let Some((key, value)) = text.split_once('=') else {
            return Some(Err(defect("the line has no '='")));
        };
        Some(Ok(Line { number: self.number, key, value }))
    }
}

fn put(text: &mut String, key: &str, value: impl std::fmt::Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{key}={value}");
}

fn secret_line(text: &mut String, key: &str, secret: Option<&SecretKey>) {
    match secret {
        Some(secret) => put(text, key, secret.to_hex().as_str()),
        None => put(text, key, "0".repeat(64)),
    }
}

fn put_facts(text: &mut String, facts: &[(String, String)]) {
    for (key, value) in facts {
        let value: String =
            value.chars().map(|c| if c.is_control() { ' ' } else { c }).take(1000).collect();
        put(text, &format!("mr_{key}"), value);
    }
}

#[cfg(test)]
mod tests;
