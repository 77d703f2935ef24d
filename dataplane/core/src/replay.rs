//! The replay window (RFC 6479 shape): which counters of a session were already accepted.

use crate::limits::REPLAY_WINDOW_BITS;

const WORDS: usize = REPLAY_WINDOW_BITS / 64;

/// A ring of bits, 8,192 wide, of which 8,128 are usable.
pub struct ReplayWindow {
    /// One more than the newest accepted counter; 0 = none accepted yet.
    next: u64,
    words: [u64; WORDS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }
}
