//! The AVX-512 back-end: sixteen ChaCha20 blocks at a time, and Poly1305 of eight blocks at a time
//! with 52-bit multipliers (IFMA).

mod chacha;
mod poly;

use crate::TAG_LEN;
use crate::wide::{Block, Engine, LANES_MAX, Lanes, TEXTS_MAX, Texts};

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
            && is_x86_feature_detected!("avx512vbmi2");
        has.then_some(Self(()))
    }
}

impl Engine for Avx512 {
    const LANES: usize = chacha::LANES;

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
