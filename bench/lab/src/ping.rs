//! The stock `ping`, with a marker as its payload.

use std::{collections::HashSet, net::IpAddr};

use crate::{Error, Marker, Namespace, Result};

/// What to send.
#[derive(Clone, Debug)]
pub struct Ping {
    /// How many.
    pub count: u32,
    /// Time between two, in milliseconds.
    pub interval_ms: u32,
    /// Bytes of ICMP payload.
    pub size: u32,
    /// Whether routers may not fragment them.
    pub dont_fragment: bool,
    /// What the payload repeats.
    pub marker: Option<Marker>,
}

/// How long a machine may stand still before its silence is a loss, in seconds.
const PATIENCE_S: u32 = 5;

/// What came back.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct PingReport {
    /// Requests that count: as many as were asked for.
    pub count: u32,
    /// Requests sent: some more while one of those is late.
    pub sent: u32,
    /// How many of those that count were answered.
    pub received: u32,
    /// Smallest, mean and largest round-trip time, in milliseconds.
    pub rtt_min_ms: f64,
    /// Mean.
    pub rtt_avg_ms: f64,
    /// Largest.
    pub rtt_max_ms: f64,
}

impl Default for Ping {
    fn default() -> Self {
        Self { count: 5, interval_ms: 50, size: 56, dont_fragment: false, marker: None }
    }
}

impl Ping {
    /// Sends them from `from` to `target`; lost ones are in the report, not an error.
    pub fn run(&self, from: &Namespace, target: impl Into<IpAddr>) -> Result<PingReport> {
        let mut command = from.command("ping");
        command.args(["-n", "-c", &self.count.to_string()]);
        if self.count == 1 {
            command.args(["-W", "2"]);
        } else {
            // Without a deadline it waits for the last answer only twice as long as the longest of the
            // others took. (With one, an ICMP error ends it.)
            let deadline_s = PATIENCE_S + self.count * self.interval_ms / 1000;
            command.args(["-w", &deadline_s.to_string()]);
        }
        command.args(["-i", &format!("{:.3}", f64::from(self.interval_ms) / 1000.0)]);
        command.args(["-s", &self.size.to_string()]);
        if self.dont_fragment {
            command.args(["-M", "do"]);
        }
        if let Some(marker) = self.marker {
            command.args(["-p", &marker.hex()]);
        }
        let output = from.output(command.arg(target.into().to_string()), "")?;
        let text = String::from_utf8_lossy(&output.stdout);
        parse(self.count, &text).ok_or_else(|| {
            let complaint = String::from_utf8_lossy(&output.stderr);
            Error::Unexpected(format!("`ping` in {} said: {text}{complaint}", from.name()))
        })
    }
}

impl PingReport {
    /// Whether every request that counts was answered.
    pub fn complete(&self) -> bool {
        self.count > 0 && self.count == self.received
    }
}

fn parse(count: u32, text: &str) -> Option<PingReport> {
    let summary = text.lines().find(|line| line.contains("packets transmitted"))?;
    // 64 bytes from 10.2.0.2: icmp_seq=1 ttl=62 time=0.301 ms
    let right = |line: &&str| line.contains(" bytes from ") && !line.contains("(BAD CHECKSUM!)");
    let answers = text.lines().filter(right);
    let number = |line: &str| line.split_once("icmp_seq=")?.1.split(' ').next()?.parse().ok();
    let answered: HashSet<u32> = answers.filter_map(number).collect();
    let times = text.lines().find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "));
    let times: Vec<f64> = times
        .map(|times| times.split(['/', ' ']).filter_map(|time| time.parse().ok()).collect())
        .unwrap_or_default();
    let time = |i: usize| times.get(i).copied().unwrap_or_default();
    Some(PingReport {
        count,
        sent: summary.split(' ').next()?.parse().ok()?,
        received: (1..=count).filter(|number| answered.contains(number)).count() as u32,
        rtt_min_ms: time(0),
        rtt_avg_ms: time(1),
        rtt_max_ms: time(2),
    })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn what_iputils_says_is_understood() {
        let text = "PING 10.2.0.2 (10.2.0.2) 56(84) bytes of data.\n\
            64 bytes from 10.2.0.2: icmp_seq=1 ttl=62 time=0.270 ms\n\
            64 bytes from 10.2.0.2: icmp_seq=3 ttl=62 time=0.350 ms\n\
            64 bytes from 10.2.0.2: icmp_seq=3 ttl=62 time=0.360 ms (DUP!)\n\
            64 bytes from 10.2.0.2: icmp_seq=2 ttl=62 time=0.302 ms (BAD CHECKSUM!)\n\
            From 10.1.0.1 icmp_seq=2 Frag needed and DF set (mtu = 1299)\n\
            64 bytes from 10.2.0.2: icmp_seq=4 ttl=62 time=0.302 ms\n\n\
            --- 10.2.0.2 ping statistics ---\n\
            4 packets transmitted, 3 received, +1 duplicates, 25% packet loss, time 204ms\n\
            rtt min/avg/max/mdev = 0.270/0.301/0.350/0.028 ms\n";
        let report = parse(3, text).unwrap();
        assert_eq!((report.sent, report.received, report.rtt_avg_ms), (4, 2, 0.301));
        assert!(!report.complete(), "the second is missing, whatever came after it");
        let silent = "5 packets transmitted, 0 received, +2 errors, 100% packet loss, time 4ms";
        assert_eq!(parse(5, silent).unwrap().received, 0);
        assert!(parse(1, "ping: unknown host").is_none());
    }
}
