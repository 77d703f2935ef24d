//! Poly1305 (RFC 8439 section 2.5) of one text at a time, in two limbs of 64 bits and a small third,
//! for the integer half of the CPU: what `woven` does inside of ChaCha20's rounds, begins and ends
//! here.
//!
//! Constant time: additions, multiplications, shifts and a masked selection; what is done when
//! depends on lengths.

use std::hint::black_box;

use crate::TAG_LEN;
use crate::wide::Block;

/// Bytes of a Poly1305 block.
pub(super) const PIECE_LEN: usize = 16;

/// The sum and the multiplier of a text. Assembly reads and writes it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Mac {
    /// Limb 2 is below 8.
    sum: [u64; 3],
    /// Two limbs of r, clamped, and the upper one by 5/4 (it is a multiple of 4): 2^130 is 5.
    multiplier: [u64; 3],
}

impl Mac {
    pub(super) const NONE: Self = Self { sum: [0; 3], multiplier: [0; 3] };

    /// With the one-time key that begins `key`.
    pub(super) fn new(key: &Block) -> Self {
        let (words, _) = key.as_chunks();
        let low = u64::from_le_bytes(words[0]) & 0x0fff_fffc_0fff_ffff;
        let high = u64::from_le_bytes(words[1]) & 0x0fff_fffc_0fff_fffc;
        Self { sum: [0; 3], multiplier: [low, high, high + (high >> 2)] }
    }

    /// One block, as the assembly does it.
    #[inline]
    pub(super) fn add(&mut self, piece: &[u8; PIECE_LEN]) {
        let product = |a: u64, b: u64| u128::from(a) * u128::from(b);
        let [h0, h1, h2] = self.sum;
        let [r0, r1, s1] = self.multiplier;
        let below = u128::from(h1) << 64 | u128::from(h0);
        let (below, carry) = below.overflowing_add(u128::from_le_bytes(*piece));
        let (h0, h1, h2) = (below as u64, (below >> 64) as u64, h2 + 1 + u64::from(carry));
        // r's limbs are below 2^60 and s1 below 2^61, so nothing passes 2^128.
        let d0 = product(h0, r0) + product(h1, s1);
        let d1 = product(h0, r1) + product(h1, r0) + (d0 >> 64) + product(h2, s1);
        let d2 = (d1 >> 64) as u64 + h2 * r0;
        let below = d1 << 64 | u128::from(d0 as u64);
        let (below, carry) = below.overflowing_add(u128::from((d2 >> 2) * 5));
        self.sum = [below as u64, (below >> 64) as u64, (d2 & 3) + u64::from(carry)];
    }

    /// The tag, with the pad of the one-time key that begins `key`.
    pub(super) fn tag(&self, key: &Block) -> [u8; TAG_LEN] {
        let [h0, h1, h2] = self.sum;
        let below = u128::from(h1) << 64 | u128::from(h0);
        let (below, carry) = below.overflowing_add(u128::from((h2 >> 2) * 5));
        let above = (h2 & 3) + u64::from(carry);
        // h - p, if that is not negative: h + 5 - 2^130.
        let (reduced, carry) = below.overflowing_add(5);
        let fits = u128::from((above + u64::from(carry)) >> 2);
        // The compiler must not make this a branch.
        let fits = black_box(0_u128.wrapping_sub(fits));
        let value = below & !fits | reduced & fits;
        let (_, pads) = key.split_at(PIECE_LEN);
        let pad = pads.first_chunk().map_or(0, |pad| u128::from_le_bytes(*pad));
        value.wrapping_add(pad).to_le_bytes()
    }
}
