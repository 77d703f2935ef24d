//! Poly1305 (RFC 8439 section 2.5) of four texts at a time, each in a lane of its own, in five limbs
//! of 26 bits.
//!
//! Constant time: there is no branch and no index that depends on a key or on a text; the final
//! subtraction of the prime is a masked selection.

use std::arch::x86_64::*;
use std::hint::black_box;

use crate::TAG_LEN;
use crate::wide::{KeyBlocks, TEXTS_MAX, Texts};

const LANES: usize = 4;
/// Texts that are worked on side by side, so that no product waits for the one before it.
const CHAINS: usize = 2;
/// Bytes of a Poly1305 block.
const PIECE_LEN: usize = 16;
/// Bytes that are read of each text at once.
const ROW_LEN: usize = 32;
const PIECES_PER_ROW: usize = ROW_LEN / PIECE_LEN;
const LIMB: i64 = (1 << 26) - 1;

/// Tags of all `texts`, each followed by its padding and length (RFC 8439 section 2.8, without
/// associated data).
#[target_feature(enable = "avx2")]
pub(super) fn tags(keys: &KeyBlocks, texts: &Texts<'_>) -> [[u8; TAG_LEN]; TEXTS_MAX] {
    let mut tags = [[0; TAG_LEN]; TEXTS_MAX];
    let mut from = 0;
    while from < texts.len() {
        across(keys, texts, from, &mut tags);
        from += CHAINS * LANES;
    }
    tags
}

/// Blocks of a text: its own, the last one padded, and that of its length.
fn pieces(len: usize) -> usize {
    len.div_ceil(PIECE_LEN) + 1
}

/// Five limbs in each lane, of 26 bits or a little more.
type Value = [__m256i; 5];

/// The low and the high half of a block of 16 bytes in each lane.
type Piece = [__m256i; 2];

/// A multiplier in each lane: its limbs, and limbs 1 to 4 by five, because 2^130 = 5.
#[derive(Clone, Copy)]
struct Multiplier {
    limbs: Value,
    folded: [__m256i; 4],
}

impl Multiplier {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(limbs: Value) -> Self {
        let mut folded = [limbs[0]; 4];
        for (folded, limb) in folded.iter_mut().zip(&limbs[1..]) {
            *folded = _mm256_add_epi64(*limb, _mm256_slli_epi64::<2>(*limb));
        }
        Self { limbs, folded }
    }
}

/// `(value + plus) * by`. Bounds: limbs of `value` are below 2^27, of `plus` below 2^26, of `by`
/// below 2^26 and folded below 2^29, so that the sum of five products is below 2^60.
#[inline]
#[target_feature(enable = "avx2")]
fn add_multiply(value: Value, plus: Value, by: &Multiplier) -> Value {
    let [r0, r1, r2, r3, r4] = by.limbs;
    let [s1, s2, s3, s4] = by.folded;
    let mut a = value;
    for (a, plus) in a.iter_mut().zip(plus) {
        *a = _mm256_add_epi64(*a, plus);
    }
    let rows = [
        [r0, s4, s3, s2, s1],
        [r1, r0, s4, s3, s2],
        [r2, r1, r0, s4, s3],
        [r3, r2, r1, r0, s4],
        [r4, r3, r2, r1, r0],
    ];
    let mut d = value;
    for (d, row) in d.iter_mut().zip(rows) {
        let mut sum = _mm256_mul_epu32(a[0], row[0]);
        for (a, r) in a[1..].iter().zip(&row[1..]) {
            sum = _mm256_add_epi64(sum, _mm256_mul_epu32(*a, *r));
        }
        *d = sum;
    }
    carry(d)
}

/// Two carries at a time, from limbs 0 and 3.
#[inline]
#[target_feature(enable = "avx2")]
fn carry([mut d0, mut d1, mut d2, mut d3, mut d4]: Value) -> Value {
    let mask = _mm256_set1_epi64x(LIMB);
    d1 = _mm256_add_epi64(d1, _mm256_srli_epi64::<26>(d0));
    d4 = _mm256_add_epi64(d4, _mm256_srli_epi64::<26>(d3));
    d0 = _mm256_and_si256(d0, mask);
    d3 = _mm256_and_si256(d3, mask);
    let over = _mm256_srli_epi64::<26>(d4);
    d2 = _mm256_add_epi64(d2, _mm256_srli_epi64::<26>(d1));
    d0 = _mm256_add_epi64(d0, _mm256_add_epi64(over, _mm256_slli_epi64::<2>(over)));
    d1 = _mm256_and_si256(d1, mask);
    d4 = _mm256_and_si256(d4, mask);
    d3 = _mm256_add_epi64(d3, _mm256_srli_epi64::<26>(d2));
    d1 = _mm256_add_epi64(d1, _mm256_srli_epi64::<26>(d0));
    d2 = _mm256_and_si256(d2, mask);
    d0 = _mm256_and_si256(d0, mask);
    d4 = _mm256_add_epi64(d4, _mm256_srli_epi64::<26>(d3));
    d3 = _mm256_and_si256(d3, mask);
    [d0, d1, d2, d3, d4]
}

#[inline]
#[target_feature(enable = "avx2")]
fn limbs([low, high]: Piece) -> Value {
    let mask = _mm256_set1_epi64x(LIMB);
    let middle = _mm256_or_si256(_mm256_srli_epi64::<52>(low), _mm256_slli_epi64::<12>(high));
    [
        _mm256_and_si256(low, mask),
        _mm256_and_si256(_mm256_srli_epi64::<26>(low), mask),
        _mm256_and_si256(middle, mask),
        _mm256_and_si256(_mm256_srli_epi64::<14>(high), mask),
        _mm256_srli_epi64::<40>(high),
    ]
}

/// Of a whole block: with bit 128.
#[inline]
#[target_feature(enable = "avx2")]
fn limbs_of_block(piece: Piece) -> Value {
    let mut limbs = limbs(piece);
    limbs[4] = _mm256_or_si256(limbs[4], _mm256_set1_epi64x(1 << 24));
    limbs
}

/// Twice four texts from the text `from` on. Lanes without a text compute the tag of an empty one,
/// which nobody looks at.
#[inline]
#[target_feature(enable = "avx2")]
fn across(keys: &KeyBlocks, texts: &Texts<'_>, from: usize, tags: &mut [[u8; TAG_LEN]; TEXTS_MAX]) {
    let zero = _mm256_setzero_si256();
    let mut text: [[&[u8]; LANES]; CHAINS] = [[&[]; LANES]; CHAINS];
    let mut len = [[0; LANES]; CHAINS];
    for (nth, (text, len)) in
        text.as_flattened_mut().iter_mut().zip(len.as_flattened_mut()).enumerate()
    {
        *text = texts.get(from + nth);
        *len = text.len() as u64;
    }
    let exist = &len.as_flattened()[..(texts.len() - from).min(CHAINS * LANES)];
    let longest = exist.iter().copied().max().unwrap_or(0) as usize;
    let shortest = exist.iter().copied().min().unwrap_or(0) as usize;
    let mut by = [Multiplier::new([zero; 5]); CHAINS];
    let mut pads = [[zero; 2]; CHAINS];
    for chain in 0..CHAINS {
        let mut rows = [zero; LANES];
        for (lane, row) in rows.iter_mut().enumerate() {
            let (half, _) = keys.block(from + chain * LANES + lane).as_chunks::<ROW_LEN>();
            *row = load_row(&half[0]);
        }
        let [r, s] = transpose(rows);
        by[chain] = Multiplier::new(limbs(clamped(r)));
        pads[chain] = s;
    }
    let mut values: [Value; CHAINS] = [[zero; 5]; CHAINS];
    // Rows that every text has.
    for row in 0..shortest / ROW_LEN {
        let mut pieces = [[[zero; 2]; CHAINS]; PIECES_PER_ROW];
        for chain in 0..CHAINS {
            let mut rows = [zero; LANES];
            for (register, text) in rows.iter_mut().zip(&text[chain]) {
                if let Some(row) = text.as_chunks().0.get(row) {
                    *register = load_row(row);
                }
            }
            for (pieces, piece) in pieces.iter_mut().zip(transpose(rows)) {
                pieces[chain] = piece;
            }
        }
        for pieces in pieces {
            for chain in 0..CHAINS {
                let plus = limbs_of_block(pieces[chain]);
                values[chain] = add_multiply(values[chain], plus, &by[chain]);
            }
        }
    }
    // The rest, and the block of the length; a lane stays as it is when its text is over.
    let mut counts = [zero; CHAINS];
    for chain in 0..CHAINS {
        counts[chain] = load_words(&len[chain].map(|len| pieces(len as usize) as u64));
    }
    for row in shortest / ROW_LEN..pieces(longest).div_ceil(PIECES_PER_ROW) {
        let mut pieces_of = [[[zero; 2]; PIECES_PER_ROW]; CHAINS];
        for chain in 0..CHAINS {
            let mut rows = [zero; LANES];
            for (register, text) in rows.iter_mut().zip(&text[chain]) {
                *register = load_row(&last_row(text, row));
            }
            pieces_of[chain] = transpose(rows);
        }
        let first = row * PIECES_PER_ROW;
        for nth in first..(first + PIECES_PER_ROW).min(pieces(longest)) {
            for chain in 0..CHAINS {
                let goes_on = _mm256_cmpgt_epi64(counts[chain], _mm256_set1_epi64x(nth as i64));
                let plus = limbs_of_block(pieces_of[chain][nth - first]);
                let next = add_multiply(values[chain], plus, &by[chain]);
                for (value, next) in values[chain].iter_mut().zip(next) {
                    *value = _mm256_blendv_epi8(*value, next, goes_on);
                }
            }
        }
    }
    for chain in 0..CHAINS {
        let value = values[chain].map(|limb| words(limb));
        let pad = pads[chain].map(|half| words(half));
        for lane in 0..LANES {
            tags[from + chain * LANES + lane] =
                tag(value.map(|limb| limb[lane]), pad.map(|half| half[lane]));
        }
    }
}

/// The bytes of a padded text from `row` on, with the block of its length if that falls here.
#[inline]
fn last_row(text: &[u8], row: usize) -> [u8; ROW_LEN] {
    let rest = text.get(row * ROW_LEN..).unwrap_or(&[]);
    if let Some(whole) = rest.first_chunk() {
        return *whole;
    }
    let mut bytes = [0; ROW_LEN];
    bytes[..rest.len()].copy_from_slice(rest);
    let place = pieces(text.len()) - 1;
    if place / PIECES_PER_ROW == row {
        let at = place % PIECES_PER_ROW * PIECE_LEN + 8;
        bytes[at..at + 8].copy_from_slice(&(text.len() as u64).to_le_bytes());
    }
    bytes
}

/// The bits of r cleared that must be (RFC 8439 section 2.5).
#[inline]
#[target_feature(enable = "avx2")]
fn clamped([low, high]: Piece) -> Piece {
    [
        _mm256_and_si256(low, _mm256_set1_epi64x(0x0fff_fffc_0fff_ffff)),
        _mm256_and_si256(high, _mm256_set1_epi64x(0x0fff_fffc_0fff_fffc)),
    ]
}

/// Reduces one lane's value fully and adds its pad.
fn tag(limbs: [u64; 5], pad: [u64; 2]) -> [u8; TAG_LEN] {
    let mask = LIMB as u64;
    let [mut h0, mut h1, mut h2, mut h3, mut h4] = limbs;
    // Twice around: after that every limb is as short as it should be.
    for _ in 0..2 {
        h1 += h0 >> 26;
        h2 += h1 >> 26;
        h3 += h2 >> 26;
        h4 += h3 >> 26;
        (h0, h1, h2, h3) = (h0 & mask, h1 & mask, h2 & mask, h3 & mask);
        h0 += 5 * (h4 >> 26);
        h4 &= mask;
    }
    h1 += h0 >> 26;
    h0 &= mask;
    // Modulo 2^130 now, in 128 and 2 bits; h - p is h + 5 - 2^130.
    let low = u128::from(h0) | u128::from(h1) << 26 | u128::from(h2) << 52 | u128::from(h3) << 78;
    let (value, carry) = low.overflowing_add(u128::from(h4) << 104);
    let top = (h4 >> 24) + u64::from(carry);
    let (reduced, carry) = value.overflowing_add(5);
    // All ones if h is p or more.
    let fits = 0_u128.wrapping_sub(u128::from((top + u64::from(carry)) >> 2));
    // The compiler must not see that it is one of two values, and branch.
    let fits = black_box(fits);
    let value = (reduced & fits) | (value & !fits);
    let pad = u128::from(pad[1]) << 64 | u128::from(pad[0]);
    value.wrapping_add(pad).to_le_bytes()
}

/// From a row of two blocks in each register to the low and high halves of block `i` of all rows.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose([a, b, c, d]: [__m256i; LANES]) -> [Piece; PIECES_PER_ROW] {
    // Low halves: blocks 0 of a and b, blocks 1 of a and b; and so on.
    let (low, next_low) = (_mm256_unpacklo_epi64(a, b), _mm256_unpacklo_epi64(c, d));
    let (high, next_high) = (_mm256_unpackhi_epi64(a, b), _mm256_unpackhi_epi64(c, d));
    [
        [
            _mm256_permute2x128_si256::<0x20>(low, next_low),
            _mm256_permute2x128_si256::<0x20>(high, next_high),
        ],
        [
            _mm256_permute2x128_si256::<0x31>(low, next_low),
            _mm256_permute2x128_si256::<0x31>(high, next_high),
        ],
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_row(bytes: &[u8; ROW_LEN]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_words(words: &[u64; LANES]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn words(register: __m256i) -> [u64; LANES] {
    let mut words = [0; LANES];
    // SAFETY: the array has the 32 bytes that are written, at any alignment.
    unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), register) };
    words
}
