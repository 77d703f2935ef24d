//! What the data plane's OBSERVED tells of each peer's traffic: whether there is any, and whether
//! what was sent is answered.

use millrace_ebpf::abi::Observed;
use millrace_path::time::Instant;

/// Bytes of a WireGuard message without data.
const KEEPALIVE_LEN: u64 = 32;

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
    /// Data was sent: more than a keepalive.
    pub sent: bool,
    /// Something was received; or the data plane is another, and nothing was.
    pub received: bool,
    /// Since then data was sent and nothing authenticated came.
    pub unanswered_since: Option<Instant>,
}

impl Traffic {
    /// Takes in the peer's line as it is now.
    pub fn look(&mut self, line: &Observed) -> Change {
        let sent_bytes = line.sent_bytes.saturating_sub(self.last.sent_bytes);
        let received = line.received_ns != self.last.received_ns;
        let active = line.sent_bytes != self.last.sent_bytes || received;
        self.last = *line;
        let unanswered_since =
            (line.unanswered_ns > 0).then(|| Instant::from_nanos(line.unanswered_ns));
        Change { active, sent: sent_bytes > KEEPALIVE_LEN, received, unanswered_since }
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
        (line.sent_bytes, line.unanswered_ns) = (48, 7);
        let unanswered_since = Some(Instant::from_nanos(7));
        let sent = Change { active: true, sent: true, received: false, unanswered_since };
        assert_eq!(traffic.look(&line), sent);
        assert_eq!(traffic.look(&line), Change { active: false, sent: false, ..sent });
        (line.received_ns, line.unanswered_ns) = (9, 0);
        let received = Change { active: true, received: true, ..Change::default() };
        assert_eq!(traffic.look(&line), received);
        line.sent_bytes += KEEPALIVE_LEN;
        assert_eq!(traffic.look(&line), Change { active: true, ..Change::default() });
    }
}
