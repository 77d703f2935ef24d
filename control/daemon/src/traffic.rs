//! What the data plane's OBSERVED tells of each peer's traffic: whether there is any, and whether
//! what was sent is answered.

use millrace_ebpf::abi::Observed;
use millrace_path::time::Instant;

/// One peer, as it was at the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    last: Observed,
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
    /// Takes in the peer's line as it is now.
    pub fn look(&mut self, line: &Observed) -> Change {
        let sent = line.sent_bytes != self.last.sent_bytes;
        let received = line.received_ns > self.last.received_ns;
        self.last = *line;
        let unanswered_since =
            (line.unanswered_ns > 0).then(|| Instant::from_nanos(line.unanswered_ns));
        Change { active: sent || received, received, unanswered_since }
    }

    /// The line of the last look.
    pub fn line(&self) -> &Observed {
        &self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_changes_is_traffic() {
        let mut traffic = Traffic::default();
        let mut line = Observed::default();
        assert_eq!(traffic.look(&line), Change::default());
        (line.sent_bytes, line.unanswered_ns) = (10, 7);
        let unanswered_since = Some(Instant::from_nanos(7));
        let sent = Change { active: true, received: false, unanswered_since };
        assert_eq!(traffic.look(&line), sent);
        assert_eq!(traffic.look(&line), Change { active: false, ..sent });
        (line.received_ns, line.unanswered_ns) = (9, 0);
        let received = Change { active: true, received: true, unanswered_since: None };
        assert_eq!(traffic.look(&line), received);
    }
}
