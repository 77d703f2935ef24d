//! Poly1305 (RFC 8439 section 2.5) of four texts at a time, each in a lane of its own, in five limbs
//! of 26 bits.
//!
//! Constant time: there is no branch and no index that depends on a key or on a text; the final
//! subtraction of the prime is a masked selection.

use std::arch::x86_64::*;

use crate::TAG_LEN;
use crate::wide::{Block, LANES_MAX, TEXTS_MAX, Texts};

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
pub(super) fn tags(keys: &[Block; LANES_MAX], texts: &Texts<'_, '_>) -> [[u8; TAG_LEN]; TEXTS_MAX] {
    let mut tags = [[0; TAG_LEN]; TEXTS_MAX];
    let mut from = 0;
    while from < texts.len() {
        across(keys, texts, from, &mut tags);
        from += CHAINS * LANES;
    }
    tags
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
fn across(
    keys: &[Block; LANES_MAX],
    texts: &Texts<'_, '_>,
    from: usize,
    tags: &mut [[u8; TAG_LEN]],
) {
    let mut chains = [Chain::new(keys, texts, from), Chain::new(keys, texts, from + LANES)];
    let count = (texts.len() - from).min(CHAINS * LANES);
    let lens = || texts.lens().skip(from).take(count);
    let shortest = lens().fold(usize::MAX, usize::min);
    let longest = lens().fold(0, usize::max);
    for row in 0..shortest / ROW_LEN {
        let pieces = [chains[0].row(row), chains[1].row(row)];
        for nth in 0..PIECES_PER_ROW {
            for (chain, pieces) in chains.iter_mut().zip(&pieces) {
                chain.values = chain.with(pieces[nth]);
            }
        }
    }
    for row in shortest / ROW_LEN..longest.div_ceil(ROW_LEN) {
        for chain in &mut chains {
            chain.add_part(row, longest);
        }
    }
    for (chain, tags) in chains.iter().zip(tags[from..].chunks_mut(LANES)) {
        tags.copy_from_slice(&chain.tags());
    }
}

/// Four texts, each in a lane of its own.
struct Chain<'t> {
    texts: [&'t [u8]; LANES],
    lens: __m256i,
    by: Multiplier,
    pads: Piece,
    values: Value,
}

impl<'t> Chain<'t> {
    /// The texts from the text `from` on, and their one-time keys.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(keys: &[Block; LANES_MAX], texts: &'t Texts<'_, '_>, from: usize) -> Self {
        let zero = _mm256_setzero_si256();
        let mut of_lanes: [&[u8]; LANES] = [&[]; LANES];
        let mut lens = [0; LANES];
        let mut rows = [zero; LANES];
        for lane in 0..LANES {
            of_lanes[lane] = texts.get(from + lane);
            lens[lane] = of_lanes[lane].len() as u64;
            let (half, _) = keys[from + lane].as_chunks::<ROW_LEN>();
            rows[lane] = load_row(&half[0]);
        }
        let [r, pads] = transpose(rows);
        Self {
            texts: of_lanes,
            lens: load_words(&lens),
            by: Multiplier::new(limbs(clamped(r))),
            pads,
            values: [zero; 5],
        }
    }

    /// 32 bytes that every text has.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn row(&self, row: usize) -> [Piece; PIECES_PER_ROW] {
        let mut rows = [_mm256_setzero_si256(); LANES];
        for (register, text) in rows.iter_mut().zip(&self.texts) {
            if let Some(row) = text.as_chunks().0.get(row) {
                *register = load_row(row);
            }
        }
        transpose(rows)
    }

    /// Adds up to 32 bytes of texts of which `longest` is the length of the longest. A lane stays as
    /// it is when its text is over.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn add_part(&mut self, row: usize, longest: usize) {
        let mut rows = [_mm256_setzero_si256(); LANES];
        for (register, text) in rows.iter_mut().zip(&self.texts) {
            *register = load_part(text.get(row * ROW_LEN..).unwrap_or(&[]));
        }
        for (nth, piece) in transpose(rows).into_iter().enumerate() {
            let at = row * ROW_LEN + nth * PIECE_LEN;
            if at >= longest {
                break;
            }
            let goes_on = _mm256_cmpgt_epi64(self.lens, _mm256_set1_epi64x(at as i64));
            let next = self.with(piece);
            for (value, next) in self.values.iter_mut().zip(next) {
                *value = _mm256_blendv_epi8(*value, next, goes_on);
            }
        }
    }

    /// The values, one block further.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn with(&self, piece: Piece) -> Value {
        add_multiply(self.values, limbs_of_block(piece), &self.by)
    }

    /// The tags of all lanes, after the block of the length.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn tags(&self) -> [[u8; TAG_LEN]; LANES] {
        let [low, high] = tag(self.with([_mm256_setzero_si256(), self.lens]), self.pads);
        let (low, high) = (words(low), words(high));
        let mut tags = [[0; TAG_LEN]; LANES];
        for (lane, tag) in tags.iter_mut().enumerate() {
            *tag = (u128::from(high[lane]) << 64 | u128::from(low[lane])).to_le_bytes();
        }
        tags
    }
}

/// Up to 32 bytes of a text, and zeros.
#[inline]
#[target_feature(enable = "avx2")]
fn load_part(rest: &[u8]) -> __m256i {
    if let Some(whole) = rest.first_chunk() {
        return load_row(whole);
    }
    let mut bytes = [0; ROW_LEN];
    bytes[..rest.len()].copy_from_slice(rest);
    load_row(&bytes)
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

/// Each limb's overflow added to the next; it also stays where it was.
#[inline]
#[target_feature(enable = "avx2")]
fn rippled(mut limbs: Value) -> Value {
    for nth in 1..limbs.len() {
        limbs[nth] = _mm256_add_epi64(limbs[nth], _mm256_srli_epi64::<26>(limbs[nth - 1]));
    }
    limbs
}

/// Reduces a value fully, adds `pad`, and returns the low and high half of each lane's tag.
#[inline]
#[target_feature(enable = "avx2")]
fn tag(value: Value, pad: Piece) -> Piece {
    let mask = _mm256_set1_epi64x(LIMB);
    let mut h = rippled(value);
    let over = _mm256_srli_epi64::<26>(h[4]);
    for limb in &mut h {
        *limb = _mm256_and_si256(*limb, mask);
    }
    // What came around is a few times five, so this leaves less than twice the prime.
    h[0] = _mm256_add_epi64(h[0], _mm256_add_epi64(over, _mm256_slli_epi64::<2>(over)));
    // h - p is h + 5 - 2^130, and not negative if that reaches bit 130.
    let mut g = h;
    g[0] = _mm256_add_epi64(g[0], _mm256_set1_epi64x(5));
    let (mut h, g) = (rippled(h), rippled(g));
    let fits = _mm256_cmpgt_epi64(g[4], mask);
    for (h, g) in h.iter_mut().zip(g) {
        *h = _mm256_and_si256(_mm256_blendv_epi8(*h, g, fits), mask);
    }
    // Modulo 2^128.
    let or = |a, b| _mm256_or_si256(a, b);
    let [h0, h1, h2, h3, h4] = h;
    let low = or(or(h0, _mm256_slli_epi64::<26>(h1)), _mm256_slli_epi64::<52>(h2));
    let high = or(
        or(_mm256_srli_epi64::<12>(h2), _mm256_slli_epi64::<14>(h3)),
        _mm256_slli_epi64::<40>(h4),
    );
    let low = _mm256_add_epi64(low, pad[0]);
    // Compared without a sign; a carry is all ones, which is -1.
    let sign = |x| _mm256_xor_si256(x, _mm256_set1_epi64x(i64::MIN));
    let carry = _mm256_cmpgt_epi64(sign(pad[0]), sign(low));
    [low, _mm256_sub_epi64(_mm256_add_epi64(high, pad[1]), carry)]
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
