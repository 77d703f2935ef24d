//! iperf3 between two namespaces.

use std::{net::IpAddr, path::Path, time::Duration};

use serde_json::Value;

use crate::{Daemon, Error, Namespace, Result};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Iperf {
    /// How long, in seconds.
    pub seconds: u32,
    /// Parallel streams.
    pub streams: u32,
    /// Whether the server sends.
    pub reverse: bool,
    /// UDP instead of TCP.
    pub udp: Option<Udp>,
    /// Bytes to move; ends the run before `seconds` do.
    pub bytes: Option<u64>,
}

/// Longest run, in seconds.
const CLIENT_LIMIT_S: &str = "180";

/// A UDP load.
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    /// Offered bits a second of all streams; 0 means as fast as it can.
    pub bits_per_second: u64,
    /// Payload of one datagram, in bytes.
    pub length: u32,
}

/// What was measured, at the receiver.
#[derive(Clone, Debug, serde::Serialize)]
pub struct IperfReport {
    /// Payload bits a second, received.
    pub bits_per_second: f64,
    /// Payload bytes received.
    pub bytes: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// TCP retransmissions at the sender.
    pub retransmits: u64,
    /// UDP datagrams sent.
    pub packets: u64,
    /// UDP datagrams that did not arrive.
    pub lost_packets: u64,
}

impl Default for Iperf {
    fn default() -> Self {
        Self { seconds: 3, streams: 1, reverse: false, udp: None, bytes: None }
    }
}

impl Iperf {
    /// Runs a server at `address` in `server` and a client in `client`; logs go to `directory`.
    pub fn run(
        &self,
        directory: &Path,
        server: &Namespace,
        address: impl Into<IpAddr>,
        client: &Namespace,
    ) -> Result<IperfReport> {
        let address: IpAddr = address.into();
        let shown = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let address = address.to_string();
        let mut command = server.command("iperf3");
        command.args(["-s", "-1", "--forceflush", "-B", &address]);
        let log = format!("iperf3-{address}");
        let mut daemon = Daemon::start(directory, &log, command)?;
        let bound = format!("ss -Hltn src {shown}");
        daemon.wait_for("iperf3 listens", Duration::from_secs(5), || {
            server.exec(&bound).ok().filter(|sockets| sockets.contains(":5201"))
        })?;
        // A number of bytes alone would never end where nothing gets through.
        let mut command = client.command("timeout");
        // Whoever kills us kills `timeout`, whose child would go on for ever without a server.
        command
            .args([CLIENT_LIMIT_S, "setpriv", "--pdeathsig", "KILL", "iperf3"])
            .args(self.arguments(&address));
        let output = client.output(&mut command, "")?;
        parse(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| {
            Error::Unexpected(format!(
                "`iperf3` in {} said: {}{}",
                client.name(),
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            ))
        })
    }

    fn arguments(&self, address: &str) -> Vec<String> {
        let mut words: Vec<String> =
            ["-J", "-c", address, "--connect-timeout", "5000", "-P"].map(String::from).into();
        words.push(self.streams.to_string());
        match self.bytes {
            Some(bytes) => words.extend(["-n".into(), bytes.to_string()]),
            None => words.extend(["-t".into(), self.seconds.to_string()]),
        }
        if self.reverse {
            words.push("-R".into());
        }
        if let Some(udp) = self.udp {
            words.extend(["-u".into(), "-l".into(), udp.length.to_string()]);
            words
                .extend(["-b".into(), (udp.bits_per_second / u64::from(self.streams)).to_string()]);
        }
        words
    }
}

/// iperf3's JSON: TCP has `sum_received` and `sum_sent`, UDP also `sum` with the losses.
fn parse(text: &str) -> Option<IperfReport> {
    let json: Value = serde_json::from_str(text).ok()?;
    let end = json.get("end")?;
    let received = end.get("sum_received").or_else(|| end.get("sum"))?;
    let udp = end.get("sum");
    let count = |sum: Option<&Value>, key: &str| {
        sum.and_then(|sum| sum.get(key)).and_then(Value::as_u64).unwrap_or_default()
    };
    let seconds = received.get("seconds")?.as_f64()?;
    let mut bytes = received.get("bytes")?.as_u64()?;
    let (packets, lost_packets) = (count(udp, "packets"), count(udp, "lost_packets"));
    if let Some(udp) = udp.filter(|_| packets > 0) {
        // For UDP `bytes` of the sum are those sent; what arrived is what was not lost.
        let sent = count(Some(udp), "bytes");
        bytes = (sent as f64 * (packets - lost_packets) as f64 / packets as f64) as u64;
    }
    Some(IperfReport {
        bits_per_second: bytes as f64 * 8.0 / seconds,
        bytes,
        seconds,
        retransmits: count(end.get("sum_sent"), "retransmits"),
        packets,
        lost_packets,
    })
}
