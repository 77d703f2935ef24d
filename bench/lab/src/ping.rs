//! The stock `ping`, with a marker as its payload.

use std::net::IpAddr;

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

/// What came back.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u32,
    /// Answers received.
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
        command.args(["-n", "-q", "-W", "2", "-c", &self.count.to_string()]);
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
        parse(&text).ok_or_else(|| {
            let complaint = String::from_utf8_lossy(&output.stderr);
            Error::Unexpected(format!("`ping` in {} said: {text}{complaint}", from.name()))
        })
    }
}

impl PingReport {
    /// Whether every request was answered.
    pub fn complete(&self) -> bool {
        self.sent > 0 && self.sent == self.received
    }
}

fn parse(text: &str) -> Option<PingReport> {
    let summary = text.lines().find(|line| line.contains("packets transmitted"))?;
    let count = |word: &str| {
        let part = summary.split(", ").find(|part| part.contains(word))?;
        part.split_whitespace().next()?.parse().ok()
    };
    let times = text.lines().find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "));
    let times: Vec<f64> = times
        .map(|times| times.split(['/', ' ']).filter_map(|time| time.parse().ok()).collect())
        .unwrap_or_default();
    let time = |i: usize| times.get(i).copied().unwrap_or_default();
    Some(PingReport {
        sent: count("transmitted")?,
        received: count("received")?,
        rtt_min_ms: time(0),
        rtt_avg_ms: time(1),
        rtt_max_ms: time(2),
    })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn the_summary_of_iputils_is_understood() {
        let text = "--- 10.2.0.2 ping statistics ---\n\
            5 packets transmitted, 4 received, 20% packet loss, time 204ms\n\
            rtt min/avg/max/mdev = 0.270/0.301/0.350/0.028 ms\n";
        let report = parse(text).unwrap();
        assert_eq!((report.sent, report.received, report.rtt_avg_ms), (5, 4, 0.301));
        let silent = "5 packets transmitted, 0 received, +2 errors, 100% packet loss, time 4ms";
        assert_eq!(parse(silent).unwrap().received, 0);
        assert!(parse("ping: unknown host").is_none());
    }
}
