//! The replay window (RFC 6479): which counters of a session were already accepted.
//!
//! A ring of words; the word that the newest counter stands in is the front. Moving forward
//! clears only the words that the front passes, so a move costs at most one pass over the ring,
//! and one step within a word costs nothing. Because the front word is partly ahead of the newest
//! counter, one word less than the ring is usable.

use crate::limits::{REJECT_AFTER_MESSAGES, REPLAY_WINDOW_BITS, REPLAY_WINDOW_USABLE};

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

impl ReplayWindow {
    /// Whether `counter` could be accepted. Changes nothing: a cheap question before decryption.
    pub fn may_accept(&self, counter: u64) -> bool {
        if counter >= REJECT_AFTER_MESSAGES {
            return false;
        }
        if counter >= self.next {
            return true;
        }
        let too_old = self.next - 1 - counter > REPLAY_WINDOW_USABLE;
        !too_old && self.words[word(counter)] & bit(counter) == 0
    }

    /// Accepts `counter` of a packet that verified; false if it is replayed or too old. Never call
    /// it for a packet that did not verify: it would let anyone move the window.
    pub fn accept(&mut self, counter: u64) -> bool {
        if !self.may_accept(counter) {
            return false;
        }
        if counter >= self.next {
            self.move_to(counter);
        }
        self.words[word(counter)] |= bit(counter);
        true
    }

    /// Whether `counter` is the newest that was accepted.
    pub fn is_newest(&self, counter: u64) -> bool {
        self.next == counter + 1
    }

    /// Makes `counter` the newest: clears the words between the old front and the new one.
    fn move_to(&mut self, counter: u64) {
        // The ring starts with its front at word 0, all clear, so "none accepted" needs no case.
        let front = self.next.saturating_sub(1) / 64;
        let passed = (counter / 64 - front).min(WORDS as u64);
        for step in 1..=passed {
            self.words[((front + step) % WORDS as u64) as usize] = 0;
        }
        self.next = counter + 1;
    }
}

fn word(counter: u64) -> usize {
    (counter / 64) as usize % WORDS
}

fn bit(counter: u64) -> u64 {
    1 << (counter % 64)
}
