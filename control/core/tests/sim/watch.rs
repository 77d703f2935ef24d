//! What must hold in every world at every moment, whatever happens in it.

use std::time::Duration;

use millrace_path::Instant;
use millrace_path::limits::{
    CANDIDATES_MAX, PATHS_MAX, PINGS_OUTSTANDING_MAX, PONGS_PER_PEER, PROBES_IN_ALL,
    PROBES_PER_PEER, SIGNALS_PER_PEER,
};

/// Heartbeats of a path in use, suspicion's at worst, those of alternates, and proofs: datagrams a
/// second to one peer beside searches and answers.
const WATCHING_PER_SECOND: u64 = 40;
/// Timeouts a second for one peer: as many, and as much again.
const TIMEOUTS_PER_SECOND: u64 = 2 * WATCHING_PER_SECOND;

/// What one gateway did in the running second.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    second: u64,
    timeouts: u64,
    datagrams: u64,
    pub timeouts_in_all: u64,
    pub timeouts_worst: u64,
    pub datagrams_worst: u64,
}

impl Watch {
    fn roll(&mut self, now: Instant) {
        let second = now.as_nanos() / 1_000_000_000;
        if second != self.second {
            self.second = second;
            self.timeouts = 0;
            self.datagrams = 0;
        }
    }

    /// The finder asked to be woken; it must not do so without end.
    pub fn timeout(&mut self, now: Instant, peers: usize) {
        self.roll(now);
        self.timeouts += 1;
        self.timeouts_in_all += 1;
        self.timeouts_worst = self.timeouts_worst.max(self.timeouts);
        let allowed = 20 + TIMEOUTS_PER_SECOND * peers as u64;
        assert!(self.timeouts <= allowed, "{} timeouts in a second", self.timeouts);
    }

    /// The finder sent a datagram to any peer.
    pub fn datagram(&mut self, now: Instant, peers: usize) {
        self.roll(now);
        self.datagrams += 1;
        self.datagrams_worst = self.datagrams_worst.max(self.datagrams);
        let per_peer = u64::from(PONGS_PER_PEER.burst + PONGS_PER_PEER.per_second);
        let searches = u64::from(PROBES_IN_ALL.burst + PROBES_IN_ALL.per_second)
            .min(peers as u64 * u64::from(PROBES_PER_PEER.burst + PROBES_PER_PEER.per_second));
        let allowed = searches + (per_peer + WATCHING_PER_SECOND) * peers as u64;
        assert!(self.datagrams <= allowed, "{} datagrams in a second", self.datagrams);
    }
}

/// Messages to one peer through the relay, since the start or the last restart.
pub fn signals(sent: u64, since: Duration) {
    let allowed = u64::from(SIGNALS_PER_PEER.burst)
        + u64::from(SIGNALS_PER_PEER.per_second) * (since.as_secs() + 1);
    assert!(sent <= allowed, "{sent} messages through the relay in {since:?}");
}

/// What a finder keeps of one peer.
pub fn held(held: millrace_path::finder::Held) {
    assert!(held.candidates <= CANDIDATES_MAX, "{held:?}");
    assert!(held.paths <= PATHS_MAX, "{held:?}");
    assert!(held.pings <= PINGS_OUTSTANDING_MAX, "{held:?}");
    assert!(held.queued <= 2 * PATHS_MAX, "{held:?}");
}
