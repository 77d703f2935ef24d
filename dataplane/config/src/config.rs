//! What an operator wants, after reading and before anything was touched.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;

use crate::discovery::Discovery;
use crate::key::{PublicKey, SecretKey};
use crate::problem::{Problem, Problems};

/// A whole configuration: valid by itself, though the host may still refuse it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub interface: Interface,
    pub dataplane: Dataplane,
    pub offload: Offload,
    pub discovery: Discovery,
    pub peers: Vec<Peer>,
    /// What the reader understood but will not do, for the operator to know (wg0.conf only).
    pub notes: Vec<String>,
}

/// `[interface]`: the tunnel as the host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Name of the TUN device, 1 to 15 bytes.
    pub name: String,
    /// None: the device starts without a key and answers nobody until `wg set` gives it one.
    pub private_key: Option<KeySource>,
    /// 0: the kernel chooses.
    pub listen_port: u16,
    /// Addresses of the TUN device with their prefix length.
    pub address: Vec<IpNet>,
    /// Inner MTU in bytes; none: 1420, which fits an outer path of 1500 bytes.
    pub mtu: Option<u16>,
    /// `SO_MARK` of the outer socket; 0: none.
    pub fwmark: u32,
    pub routes: Routes,
}

/// Where a secret is. TOML names files only; wg0.conf has keys in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    File(PathBuf),
    Inline(SecretKey),
}

/// Whether routes to the peers' allowed-ips are installed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Routes {
    #[default]
    Auto,
    Off,
}

/// `[dataplane]`: how packets move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dataplane {
    pub receive: Receive,
    pub transmit: Transmit,
    pub aead: Aead,
    /// Network devices whose queues XDP may take; empty: the device of the default route.
    pub device: Vec<String>,
    pub workers: Workers,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Receive {
    #[default]
    Auto,
    XdpZerocopy,
    XdpCopy,
    Socket,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transmit {
    #[default]
    Auto,
    XdpZerocopy,
    Gso,
}

/// Who encrypts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aead {
    /// Whatever is fastest here, as measured at the start.
    #[default]
    Auto,
    Ring,
    Avx2,
    Avx512,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Workers {
    /// As many as the machine and the device's queues make sense of.
    #[default]
    Auto,
    /// One worker on each of these cores, at least one.
    Cores(Vec<usize>),
}

/// `[offload]`: switches for an operator whose kernel or device has a bug. True: probe and use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    pub udp_gso: bool,
    pub udp_gro: bool,
    pub tun_tso: bool,
    pub tun_uso: bool,
    pub coalesce_tcp: bool,
    pub coalesce_udp: bool,
}

impl Default for Offload {
    fn default() -> Self {
        Self {
            udp_gso: true,
            udp_gro: true,
            tun_tso: true,
            tun_uso: true,
            coalesce_tcp: true,
            coalesce_udp: true,
        }
    }
}

/// One `[[peer]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: Option<String>,
    pub public_key: PublicKey,
    pub preshared_key: Option<KeySource>,
    /// Without host bits. No prefix stands at two peers.
    pub allowed_ips: Vec<IpNet>,
    pub endpoint: Option<EndpointName>,
    /// Persistent keepalive in seconds; 0: off.
    pub keepalive_seconds: u16,
}

impl Peer {
    /// The peer's name, or the start of its key.
    pub fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.public_key.to_base64()[..8].to_owned())
    }
}

/// Where a peer is, as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointName {
    Address(SocketAddr),
    /// A host name to be looked up, and a port.
    Name(String, u16),
}

impl EndpointName {
    /// Reads `host:port`, with IPv6 addresses in brackets. The error says what was expected.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const SHAPE: &str = "\"host:port\", with an IPv6 address in brackets";
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 {
                Err("a port from 1 to 65535")
            } else {
                Ok(Self::Address(address))
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or(SHAPE)?;
        let port = match port.parse::<u16>() {
            Ok(port) if port > 0 && !text.contains('+') => port,
            _ => return Err("a port from 1 to 65535 after the last colon"),
        };
        if host.contains(':') || host.contains('[') {
            return Err(SHAPE);
        }
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
                && !label.starts_with('-')
        };
        let name = host.strip_suffix('.').unwrap_or(host);
        // Digits and dots alone are a mistyped address: a look-up of it would only hide the slip.
        let numeric = name.bytes().all(|c| c.is_ascii_digit() || c == b'.');
        if numeric || name.len() > 253 || !name.split('.').all(label) {
            return Err("a host name or an IP address before the last colon");
        }
        Ok(Self::Name(host.to_owned(), port))
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl Config {
    /// A configuration of nothing but an interface name, for tests and as the start of readers.
    pub fn named(name: &str) -> Self {
        Self {
            interface: Interface {
                name: name.to_owned(),
                private_key: None,
                listen_port: 0,
                address: Vec::new(),
                mtu: None,
                fwmark: 0,
                routes: Routes::Auto,
            },
            dataplane: Dataplane::default(),
            offload: Offload::default(),
            discovery: Discovery::default(),
            peers: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// A peer with the device's own key can never shake hands with it. Call once the private key
    /// was read.
    pub fn check_own_key(&self, own: &PublicKey) -> Result<(), Problems> {
        match self.peers.iter().position(|peer| peer.public_key == *own) {
            None => Ok(()),
            Some(index) => Err(Problems(vec![Problem {
                position: None,
                key: format!("peer[{}].public_key", index + 1),
                seen: format!("peer {} has the key of this device", self.peers[index].label()),
                expected: "the public key of the other side".to_owned(),
                cure: "take the key that `wg show` or `millrace pubkey` prints there".to_owned(),
            }])),
        }
    }

    /// Keys that differ from `running` and take effect only after a restart, in file order.
    pub fn restart_keys(&self, running: &Self) -> Vec<&'static str> {
        let (old, new) = (&running.interface, &self.interface);
        let (old_plane, new_plane) = (&running.dataplane, &self.dataplane);
        let (old_offload, new_offload) = (&running.offload, &self.offload);
        [
            ("interface.name", old.name != new.name),
            ("interface.listen_port", old.listen_port != new.listen_port),
            ("dataplane.receive", old_plane.receive != new_plane.receive),
            ("dataplane.transmit", old_plane.transmit != new_plane.transmit),
            ("dataplane.aead", old_plane.aead != new_plane.aead),
            ("dataplane.device", old_plane.device != new_plane.device),
            ("dataplane.workers", old_plane.workers != new_plane.workers),
            ("offload.udp_gso", old_offload.udp_gso != new_offload.udp_gso),
            ("offload.udp_gro", old_offload.udp_gro != new_offload.udp_gro),
            ("offload.tun_tso", old_offload.tun_tso != new_offload.tun_tso),
            ("offload.tun_uso", old_offload.tun_uso != new_offload.tun_uso),
            ("offload.coalesce_tcp", old_offload.coalesce_tcp != new_offload.coalesce_tcp),
            ("offload.coalesce_udp", old_offload.coalesce_udp != new_offload.coalesce_udp),
            (
                "discovery.past_firewall",
                running.discovery.past_firewall != self.discovery.past_firewall,
            ),
        ]
        .into_iter()
        .filter_map(|(key, changed)| changed.then_some(key))
        .collect()
    }
}

impl Config {
    /// The same with the values of `running` for every key of [`Self::restart_keys`]: what runs
    /// after a reload.
    pub fn keeping_restart_keys(&self, running: &Self) -> Self {
        let mut config = self.clone();
        config.interface.name.clone_from(&running.interface.name);
        config.interface.listen_port = running.interface.listen_port;
        config.dataplane = running.dataplane.clone();
        config.offload = running.offload;
        config.discovery.past_firewall = running.discovery.past_firewall;
        config
    }
}

/// An address with an optional prefix length; without one it is a single host.
pub(crate) fn parse_net(text: &str) -> Result<IpNet, &'static str> {
    if let Ok(net) = text.parse::<IpNet>() {
        return Ok(net);
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    let Some((address, length)) = text.split_once('/') else {
        return Err("an address like 10.2.0.0/16 or fd77::/64");
    };
    match (address.parse::<IpAddr>(), length.parse::<u32>()) {
        (Ok(IpAddr::V4(_)), _) => Err("a prefix length from 0 to 32 after the slash"),
        (Ok(IpAddr::V6(_)), _) => Err("a prefix length from 0 to 128 after the slash"),
        (Err(_), _) => Err("an IPv4 or IPv6 address before the slash"),
    }
}

/// Whether the kernel would take `name` for a device.
pub(crate) fn is_interface_name(name: &str) -> bool {
    (1..=crate::limits::INTERFACE_NAME_MAX).contains(&name.len())
        && name.bytes().all(|c| c.is_ascii_graphic() && c != b'/' && c != b':' && c != b'%')
        && name != "."
        && name != ".."
}
