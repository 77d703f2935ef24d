//! Poly1305 of texts in pairs, in parts that fit into double rounds of ChaCha20: which parts of
//! which pair are next, and what is before the first part and behind the last.
//!
//! `inline(always)`, because a call between two passes would take more than what it does.
//!
//! Constant time: what is done when depends on lengths alone.

use std::hint::black_box;

use arrayvec::ArrayVec;

use crate::wide::{BLOCK_LEN, Block, Item};

use super::chacha::DOUBLE_ROUNDS;
use super::long;
use super::mac::{Mac, PIECE_LEN};
use super::woven::{PART_LEN, Run};

/// Poly1305 blocks of a part.
const PIECES: usize = PART_LEN / PIECE_LEN;
/// Parts that a pair has at least, as texts are at least [`long::LEN_MIN`] long.
const PARTS_MIN: usize = (long::LEN_MIN / PIECE_LEN + 1) / PIECES;
/// Pairs that take part in one pass, the first and the last perhaps with one part each.
const SLOTS: usize = 4;
const _: () = assert!((SLOTS - 2) * PARTS_MIN + 2 > DOUBLE_ROUNDS);
/// Each pair has its parts in the texts, and the last one elsewhere.
const RUNS_MAX: usize = 2 * SLOTS;

/// The parts that go into a pass, at most [`DOUBLE_ROUNDS`].
pub(super) struct Runs {
    pub(super) runs: ArrayVec<Run, RUNS_MAX>,
    pub(super) parts: usize,
}

impl Runs {
    pub(super) fn new() -> Self {
        Self { runs: ArrayVec::new(), parts: 0 }
    }
}

/// A pair of texts whose sums are under way.
struct Slot {
    macs: [Mac; 2],
    /// Where the texts' parts begin, exposed. What is before is in the sums already.
    texts: [usize; 2],
    /// Parts of each text, with the last one.
    parts: usize,
    /// The end of each text as Poly1305 has it, padded and with its length, behind a gap.
    last: [[u8; PIECE_LEN + PART_LEN]; 2],
}

impl Slot {
    const NONE: Self = Self {
        macs: [Mac::NONE; 2],
        texts: [0; 2],
        parts: 0,
        last: [[0; PIECE_LEN + PART_LEN]; 2],
    };

    /// Sets up the pair `pair`: both texts get the same number of parts, the first pieces are what is
    /// too much.
    #[inline(always)]
    fn begin(&mut self, pair: usize, items: &[Item<'_>], keys: &[Block]) {
        let nth = 2 * pair;
        let texts = [&*items[nth].text, &*items[nth + 1].text];
        let pieces = [pieces(texts[0]), pieces(texts[1])];
        self.parts = pieces[0].min(pieces[1]) / PIECES;
        for both in 0..2 {
            let text = texts[both];
            let (begin, rest) = text.split_at((pieces[both] - self.parts * PIECES) * PIECE_LEN);
            let mut mac = Mac::new(&keys[nth + both]);
            for piece in begin.as_chunks().0 {
                mac.add(piece);
            }
            self.macs[both] = mac;
            self.texts[both] = exposed(rest);
            // The last block's worth of bytes, moved so far that their padding ends where the length
            // begins. What is before them in this block is not a part of it.
            let padding = text.len().next_multiple_of(PIECE_LEN) - text.len();
            let end: &[u8; BLOCK_LEN] = text.last_chunk().unwrap_or(&[0; BLOCK_LEN]);
            let last = &mut self.last[both];
            last[BLOCK_LEN..].copy_from_slice(&[0; 2 * PIECE_LEN]);
            last[PIECE_LEN - padding..][..BLOCK_LEN].copy_from_slice(end);
            last[BLOCK_LEN + PIECE_LEN + 8..].copy_from_slice(&(text.len() as u64).to_le_bytes());
        }
    }
}

/// Where bytes are that assembly reads.
#[inline(always)]
fn exposed(bytes: &[u8]) -> usize {
    bytes.as_ptr().expose_provenance()
}

/// The texts 0 and 1, 2 and 3, and so on.
pub(super) struct Pairs {
    /// How many are ciphertext.
    ready: usize,
    /// The pair whose parts are next, and how many of them are done.
    next: usize,
    done: usize,
    /// Pairs whose tags are written or compared.
    settled: usize,
    slots: [Slot; SLOTS],
}

impl Pairs {
    pub(super) fn new(ready: usize) -> Self {
        Self { ready, next: 0, done: 0, settled: 0, slots: [Slot::NONE; SLOTS] }
    }

    /// Says that the first `ready` pairs are ciphertext.
    #[inline]
    pub(super) fn set_ready(&mut self, ready: usize) {
        self.ready = ready;
    }

    /// How many have their tags written or compared.
    #[inline]
    pub(super) fn settled(&self) -> usize {
        self.settled
    }

    /// The parts that go into the next pass. The caller has to work on them before anything else is
    /// done here or with these texts.
    #[inline(always)]
    pub(super) fn take(&mut self, items: &[Item<'_>], keys: &[Block], runs: &mut Runs) {
        runs.runs.clear();
        let mut left = DOUBLE_ROUNDS;
        while left > 0 && self.next < self.ready {
            let slot = &mut self.slots[self.next % SLOTS];
            if self.done == 0 {
                slot.begin(self.next, items, keys);
            }
            let macs = (&raw mut slot.macs).expose_provenance();
            let in_texts = slot.parts - 1 - self.done;
            if in_texts > 0 {
                let count = in_texts.min(left);
                let at = self.done * PART_LEN;
                runs.runs.push(Run {
                    macs,
                    texts: [slot.texts[0] + at, slot.texts[1] + at],
                    double_rounds: count,
                });
                self.done += count;
                left -= count;
            }
            if self.done + 1 == slot.parts && left > 0 {
                let [first, second] = &slot.last;
                runs.runs.push(Run {
                    macs,
                    texts: [exposed(&first[PIECE_LEN..]), exposed(&second[PIECE_LEN..])],
                    double_rounds: 1,
                });
                left -= 1;
                (self.next, self.done) = (self.next + 1, 0);
            }
        }
        runs.parts = DOUBLE_ROUNDS - left;
    }

    /// Writes or compares the tags of pairs whose last part was taken and worked on.
    #[inline(always)]
    pub(super) fn settle(&mut self, items: &mut [Item<'_>], keys: &[Block]) {
        while self.settled < self.next {
            let nth = 2 * self.settled;
            let macs = &self.slots[self.settled % SLOTS].macs;
            for ((item, key), mac) in items[nth..].iter_mut().zip(&keys[nth..]).zip(macs) {
                item.settle(&mac.tag(key));
            }
            self.settled += 1;
        }
    }

    /// Works on the pairs before `end` that passes had no room for.
    #[cold]
    #[inline(never)]
    pub(super) fn finish(&mut self, items: &mut [Item<'_>], keys: &[Block], end: usize) {
        let mut runs = Runs::new();
        self.ready = self.ready.max(end);
        while self.next < end {
            self.take(items, keys, &mut runs);
            for run in &runs.runs {
                // SAFETY: the run was made just now.
                unsafe { run.work_alone() };
            }
            self.settle(items, keys);
        }
    }

    /// One-time keys are all that is secret here.
    pub(super) fn wipe(&mut self) {
        for slot in &mut self.slots {
            slot.macs = [Mac::NONE; 2];
        }
        black_box(self);
    }
}

/// Poly1305 blocks of a text, with that of its length.
#[inline(always)]
fn pieces(text: &[u8]) -> usize {
    text.len().div_ceil(PIECE_LEN) + 1
}
