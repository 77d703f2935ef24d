//! The AVX-512 back-end: thirty-two ChaCha20 blocks at a time, and Poly1305 of sixteen blocks at a
//! time with 52-bit multipliers (IFMA), or of two texts at a time beside ChaCha20 (BMI2).

mod chacha;
mod line;
mod long;
mod mac;
mod pairs;
mod poly;
mod woven;

use crate::TAG_LEN;
use crate::wide::{Block, Engine, Item, LANES_MAX, Lanes, TEXTS_MAX, Texts};

/// Proof that this CPU has everything that the functions below this module need.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// None if the CPU or the operating system lacks a part.
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512ifma")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vpopcntdq")
            && is_x86_feature_detected!("bmi2");
        has.then_some(Self(()))
    }
}

impl Engine for Avx512 {
    const LANES: usize = chacha::LANES;

    fn work_on_long<'i, 'a>(self, items: &'i mut [Item<'a>]) -> &'i mut [Item<'a>] {
        let (others, many) = items.split_at_mut(items.len() - long::count(items));
        if !many.is_empty() {
            // SAFETY: `self` exists only where the CPU has the features.
            unsafe { long::work(many) }
        }
        others
    }

    fn keystream(self, texts: &Texts<'_, '_>, lanes: &Lanes, from: usize, to: &mut [Block]) {
        // SAFETY: `self` exists only where the CPU has the features.
        unsafe { chacha::keystream(texts, lanes, from, to) }
    }

    fn add_blocks(self, texts: &mut Texts<'_, '_>, lanes: &Lanes, from: usize, blocks: &[Block]) {
        // SAFETY: as above.
        unsafe { chacha::add_blocks(texts, lanes, from, blocks) }
    }

    fn apply_strips(self, key: &[u32; 8], counter: u64, text: &mut [u8], blocks: &mut [Block]) {
        // SAFETY: as above.
        unsafe { chacha::apply_strips(key, counter, text, blocks) }
    }

    fn tags(self, keys: &[Block; LANES_MAX], texts: &Texts<'_, '_>) -> [[u8; TAG_LEN]; TEXTS_MAX] {
        // SAFETY: as above.
        unsafe { poly::tags(keys, texts) }
    }
}

/// For tests under one-time keys that no packet has.
#[cfg(test)]
pub(crate) const LONG_LEN_MIN: usize = long::LEN_MIN;

#[cfg(test)]
impl Avx512 {
    /// The tags of long texts, two and two of them, in rounds of ChaCha20 or alone.
    pub(crate) fn tags_in_pairs(self, items: &mut [Item<'_>], keys: &[Block], in_rounds: bool) {
        let count = items.len() / 2;
        let mut pairs = pairs::Pairs::new(count);
        let mut runs = pairs::Runs::new();
        if in_rounds {
            loop {
                pairs.take(items, keys, &mut runs);
                if runs.parts == 0 {
                    break;
                }
                // SAFETY: `self` exists only where the CPU has the features; the runs are new.
                unsafe { woven::double_rounds_of_nobody(&runs.runs) };
                pairs.settle(items, keys);
            }
        }
        pairs.finish(items, keys, count);
    }
}

/// The tag of one text, without pairs.
#[cfg(test)]
pub(crate) fn tag_alone(key: &[u8; 32], text: &[u8]) -> [u8; TAG_LEN] {
    let mut block = [0; crate::wide::BLOCK_LEN];
    block[..32].copy_from_slice(key);
    let mut mac = mac::Mac::new(&block);
    for piece in text.chunks(mac::PIECE_LEN) {
        let mut padded = [0; mac::PIECE_LEN];
        padded[..piece.len()].copy_from_slice(piece);
        mac.add(&padded);
    }
    mac.add(&(u128::from(text.len() as u64) << 64).to_le_bytes());
    mac.tag(&block)
}
