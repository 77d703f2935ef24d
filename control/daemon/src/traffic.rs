//! What the data plane's OBSERVED tells of each peer's traffic: whether there is any, and whether
//! what was sent is answered.

use millrace_ebpf::abi::Observed;
use millrace_path::time::Instant;

/// One peer, as it was at the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    last: Observed,
    looked_at: Instant,
    unanswered_since: Option<Instant>,
}

/// What happened since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Something was sent or received.
    pub active: bool,
    /// Something was received.
    pub received: bool,
    /// Since then data was sent and nothing authenticated came.
    pub unanswered_since: Option<Instant>,
}

impl Traffic {
    /// Takes in the peer's line as it is at `now`.
    pub fn look(&mut self, now: Instant, line: &Observed) -> Change {
        let sent = line.sent_bytes != self.last.sent_bytes;
        let received = line.received_ns > self.last.received_ns;
        if received {
            self.unanswered_since = None;
        }
        // Sent after the last that came: by now nothing answered it.
        if sent && line.sent_ns > line.received_ns && self.unanswered_since.is_none() {
            self.unanswered_since = Some(self.looked_at.max(Instant::from_nanos(line.received_ns)));
        }
        self.last = *line;
        self.looked_at = now;
        Change { active: sent || received, received, unanswered_since: self.unanswered_since }
    }

    /// The line of the last look.
    pub fn line(&self) -> &Observed {
        &self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos(seconds * SECOND_NS)
    }

    fn line(sent: (u64, u64), received_s: u64) -> Observed {
        Observed {
            sent_ns: sent.0 * SECOND_NS,
            sent_bytes: sent.1,
            received_ns: received_s * SECOND_NS,
            ..Observed::default()
        }
    }

    #[test]
    fn silence_counts_from_the_first_data_that_nothing_answered() {
        let mut traffic = Traffic::default();
        assert_eq!(traffic.look(at(1), &line((0, 0), 0)), Change::default());
        assert!(traffic.look(at(2), &line((2, 10), 2)).active);
        let quiet = Change { active: true, received: false, unanswered_since: Some(at(2)) };
        assert_eq!(traffic.look(at(3), &line((3, 20), 2)), quiet);
        assert_eq!(traffic.look(at(4), &line((4, 30), 2)), quiet);
        let idle = Change { active: false, received: false, unanswered_since: Some(at(2)) };
        assert_eq!(traffic.look(at(9), &line((4, 30), 2)), idle);
        assert_eq!(traffic.look(at(10), &line((4, 30), 10)).unanswered_since, None);
    }
}
