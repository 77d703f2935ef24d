//! Poly1305 (RFC 8439 section 2.5) in eight lanes of three limbs of 44, 44 and 42 bits, multiplied
//! with IFMA, which gives the low and the high 52 bits of a product.
//!
//! Two ways: eight texts at a time, each lane one text (Horner's rule in every lane, nothing to
//! prepare); or one text at a time, its blocks in turn to eight lanes, which needs the powers of r
//! up to the eighth. The choice depends on lengths alone.
//!
//! Constant time: there is no branch and no index that depends on a key or on a text; the final
//! subtraction of the prime is a masked selection.

use std::arch::x86_64::*;

use crate::TAG_LEN;
use crate::wide::{BLOCK_LEN, Block, LANES_MAX, TEXTS_MAX, Texts};

const LANES: usize = 8;
/// Bytes of a Poly1305 block.
const PIECE_LEN: usize = 16;
const PIECES_PER_ROW: usize = BLOCK_LEN / PIECE_LEN;
/// Blocks that are multiplied with powers of r before a carry: more powers would not fit registers.
const POWERS: usize = 2;

const LIMB: i64 = (1 << 44) - 1;
const TOP_LIMB: i64 = (1 << 42) - 1;

/// Tags of all `texts`, each followed by its padding and length (RFC 8439 section 2.8, without
/// associated data).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512ifma,avx512vbmi2")]
pub(super) fn tags(keys: &[Block; LANES_MAX], texts: &Texts<'_, '_>) -> [[u8; TAG_LEN]; TEXTS_MAX] {
    let mut tags = [[0; TAG_LEN]; TEXTS_MAX];
    let chain = |from| Chain::new(keys, texts, from);
    if !across_is_cheaper(texts) {
        for (nth, tag) in tags.iter_mut().enumerate().take(texts.len()) {
            *tag = within(&keys[nth], texts.get(nth));
        }
    } else if texts.len() <= LANES {
        across([chain(0)], texts, &mut tags);
    } else {
        across([chain(0), chain(LANES)], texts, &mut tags);
    }
    tags
}

/// Blocks of a text: its own, the last one padded, and that of its length.
fn pieces(len: usize) -> usize {
    len.div_ceil(PIECE_LEN) + 1
}

/// In steps of eight blocks, as measured on Zen 4: one chain waits for its own products; two
/// hide each other's waiting; preparing the powers of r costs as much as some steps.
fn across_is_cheaper(texts: &Texts<'_, '_>) -> bool {
    const ONE_CHAIN: usize = 36;
    const TWO_CHAINS: usize = 46;
    const WITHIN_STEP: usize = 33;
    const WITHIN_FIXED: usize = 270;
    let step = if texts.len() > LANES { TWO_CHAINS } else { ONE_CHAIN };
    let across = pieces(texts.longest()) * step;
    let within = WITHIN_FIXED * texts.len();
    // Short texts need no sum.
    across < within
        || across
            < within
                + texts.lens().map(|len| WITHIN_STEP * pieces(len).div_ceil(LANES)).sum::<usize>()
}

/// A value in each lane: limbs of 44, 44 and 42 bits, or a little more before a carry.
type Value = [__m512i; 3];

/// The low and the high half of a block of 16 bytes in each lane.
type Piece = [__m512i; 2];

/// A multiplier in each lane.
#[derive(Clone, Copy)]
struct Multiplier {
    limbs: Value,
    /// Limbs 1 and 2 by 20: what passes 2^132 comes back by 2^132 = 20 modulo 2^130 - 5.
    folded: [__m512i; 2],
}

impl Multiplier {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(limbs: Value) -> Self {
        let folded = [limbs[1], limbs[2]].map(|limb| {
            let by_four = _mm512_slli_epi64::<2>(limb);
            _mm512_add_epi64(by_four, _mm512_slli_epi64::<4>(limb))
        });
        Self { limbs, folded }
    }
}

/// The sum of the products of values and multipliers. Bounds: limbs 0 and 1 of a value are below
/// 2^46, limb 2 is below 2^44, and there are at most [`POWERS`] products: their halves, of
/// 52 bits, add up to less than 2^55, so nothing is lost. Of the result, limb 0 is below 2^44, the
/// others are below 2^44 + 2^12 and 2^42 + 2^13.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn multiply<const COUNT: usize>(values: [Value; COUNT], by: [&Multiplier; COUNT]) -> Value {
    const { assert!(COUNT <= POWERS) };
    let mut low = [_mm512_setzero_si512(); 3];
    let mut high = low;
    for ([a0, a1, a2], by) in values.into_iter().zip(by) {
        let [r0, r1, r2] = by.limbs;
        let [s1, s2] = by.folded;
        let columns = [
            [(a0, r0), (a1, s2), (a2, s1)],
            [(a0, r1), (a1, r0), (a2, s2)],
            [(a0, r2), (a1, r1), (a2, r0)],
        ];
        for ((low, high), column) in low.iter_mut().zip(&mut high).zip(columns) {
            for (a, r) in column {
                *low = _mm512_madd52lo_epu64(*low, a, r);
                *high = _mm512_madd52hi_epu64(*high, a, r);
            }
        }
    }
    // A high half begins at bit 52: 8 above the next limb, 10 above bit 130 behind the last one.
    let limb1 = _mm512_add_epi64(low[1], _mm512_slli_epi64::<8>(high[0]));
    let limb2 = _mm512_add_epi64(low[2], _mm512_slli_epi64::<8>(high[1]));
    let over = _mm512_add_epi64(_mm512_srli_epi64::<42>(limb2), _mm512_slli_epi64::<10>(high[2]));
    let limb0 = _mm512_madd52lo_epu64(low[0], over, _mm512_set1_epi64(5));
    let mask = _mm512_set1_epi64(LIMB);
    [
        _mm512_and_si512(limb0, mask),
        _mm512_add_epi64(_mm512_and_si512(limb1, mask), _mm512_srli_epi64::<44>(limb0)),
        _mm512_add_epi64(
            _mm512_and_si512(limb2, _mm512_set1_epi64(TOP_LIMB)),
            _mm512_srli_epi64::<44>(limb1),
        ),
    ]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sum(a: Value, b: Value) -> Value {
    [_mm512_add_epi64(a[0], b[0]), _mm512_add_epi64(a[1], b[1]), _mm512_add_epi64(a[2], b[2])]
}

/// Limbs of a block of 16 bytes in each lane. `above` is bit 128, as a multiple of it.
#[inline]
#[target_feature(enable = "avx512f,avx512vbmi2")]
fn limbs([low, high]: Piece, above: __m512i) -> Value {
    let mask = _mm512_set1_epi64(LIMB);
    [
        _mm512_and_si512(low, mask),
        _mm512_and_si512(_mm512_shrdi_epi64::<44>(low, high), mask),
        _mm512_shrdi_epi64::<24>(high, above),
    ]
}

/// Eight texts (or sixteen), each in a lane of its own. Lanes without a text compute the tag of an
/// empty one, which nobody looks at.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512ifma,avx512vbmi2")]
fn across<const CHAINS: usize>(
    mut chains: [Chain<'_>; CHAINS],
    texts: &Texts<'_, '_>,
    tags: &mut [[u8; TAG_LEN]; TEXTS_MAX],
) {
    let (shortest, longest) = (texts.shortest(), texts.longest());
    for row in 0..shortest / BLOCK_LEN {
        let mut blocks = [[[_mm512_setzero_si512(); 3]; PIECES_PER_ROW]; CHAINS];
        for (blocks, chain) in blocks.iter_mut().zip(&chains) {
            *blocks = chain.row(row);
        }
        for pair in 0..PIECES_PER_ROW / POWERS {
            for (blocks, chain) in blocks.iter().zip(&mut chains) {
                chain.add(blocks.as_chunks().0[pair]);
            }
        }
    }
    for row in shortest / BLOCK_LEN..longest.div_ceil(BLOCK_LEN) {
        for chain in &mut chains {
            chain.add_part(row, longest);
        }
    }
    for (chain, tags) in chains.iter().zip(tags.as_chunks_mut().0) {
        *tags = chain.tags();
    }
}

/// Eight texts, each in a lane of its own.
struct Chain<'t> {
    texts: [&'t [u8]; LANES],
    lens: __m512i,
    /// Of r, from the first on.
    powers: [Multiplier; POWERS],
    pads: Piece,
    values: Value,
}

impl<'t> Chain<'t> {
    /// The texts from the text `from` on, and their one-time keys.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    fn new(keys: &[Block; LANES_MAX], texts: &'t Texts<'_, '_>, from: usize) -> Self {
        let zero = _mm512_setzero_si512();
        let mut of_lanes: [&[u8]; LANES] = [&[]; LANES];
        let mut lens = [0; LANES];
        for lane in 0..LANES {
            of_lanes[lane] = texts.get(from + lane);
            lens[lane] = of_lanes[lane].len() as u64;
        }
        let mut rows = [zero; LANES];
        for (row, key) in rows.iter_mut().zip(&keys[from..]) {
            *row = load_row(key);
        }
        let [r, pads, ..] = transpose(rows);
        let r = Multiplier::new(clamped(r));
        Self {
            texts: of_lanes,
            lens: load_words(&lens),
            powers: [r, Multiplier::new(multiply([r.limbs], [&r]))],
            pads,
            values: [zero; 3],
        }
    }

    /// 64 bytes that every text has.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vbmi2")]
    fn row(&self, row: usize) -> [Value; PIECES_PER_ROW] {
        let mut rows = [_mm512_setzero_si512(); LANES];
        for (register, text) in rows.iter_mut().zip(&self.texts) {
            if let Some(row) = text.as_chunks().0.get(row) {
                *register = load_row(row);
            }
        }
        let mut blocks = [[_mm512_setzero_si512(); 3]; PIECES_PER_ROW];
        for (block, piece) in blocks.iter_mut().zip(transpose(rows)) {
            *block = limbs(piece, _mm512_set1_epi64(1));
        }
        blocks
    }

    /// Adds two blocks.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn add(&mut self, [first, second]: [Value; POWERS]) {
        let [r, squared] = &self.powers;
        // The one last that waits for the pair before.
        self.values = multiply([second, sum(self.values, first)], [r, squared]);
    }

    /// Adds up to 64 bytes of texts of which `longest` is the length of the longest. A lane stays as
    /// it is when its text is over.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512ifma,avx512vbmi2")]
    fn add_part(&mut self, row: usize, longest: usize) {
        let mut rows = [_mm512_setzero_si512(); LANES];
        for (register, text) in rows.iter_mut().zip(&self.texts) {
            *register = load_part(text.get(row * BLOCK_LEN..).unwrap_or(&[]));
        }
        for (nth, piece) in transpose(rows).into_iter().enumerate() {
            let at = row * BLOCK_LEN + nth * PIECE_LEN;
            if at >= longest {
                break;
            }
            let goes_on = _mm512_cmpgt_epi64_mask(self.lens, _mm512_set1_epi64(at as i64));
            let next = self.with(piece);
            for (value, next) in self.values.iter_mut().zip(next) {
                *value = _mm512_mask_mov_epi64(*value, goes_on, next);
            }
        }
    }

    /// The values, one block further.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    fn with(&self, piece: Piece) -> Value {
        let next = sum(self.values, limbs(piece, _mm512_set1_epi64(1)));
        multiply([next], [&self.powers[0]])
    }

    /// The tags of all lanes, after the block of the length.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma,avx512vbmi2")]
    fn tags(&self) -> [[u8; TAG_LEN]; LANES] {
        let lens = [_mm512_setzero_si512(), self.lens];
        let [low, high] = tag(self.with(lens), self.pads);
        let (first, second) = (
            _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
            _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15),
        );
        let mut tags = [[0; TAG_LEN]; LANES];
        let (rows, _) = tags.as_flattened_mut().as_chunks_mut::<BLOCK_LEN>();
        for (row, order) in rows.iter_mut().zip([first, second]) {
            store_row(row, _mm512_permutex2var_epi64(low, order, high));
        }
        tags
    }
}

/// Up to 64 bytes of a text, and zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load_part(rest: &[u8]) -> __m512i {
    if let Some(whole) = rest.first_chunk() {
        return load_row(whole);
    }
    if rest.is_empty() {
        // Its address may be none: a load from there, masked out as it is, takes 100 ns.
        return _mm512_setzero_si512();
    }
    let mask = !(u64::MAX << rest.len());
    // SAFETY: bytes beyond the slice's length are masked out.
    unsafe { _mm512_maskz_loadu_epi8(mask, rest.as_ptr().cast()) }
}

fn whole_tag(low: u64, high: u64) -> [u8; TAG_LEN] {
    (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
}

/// One text, its blocks in turn to eight lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512ifma,avx512vbmi2")]
fn within(key: &[u8; BLOCK_LEN], text: &[u8]) -> [u8; TAG_LEN] {
    const STEP_LEN: usize = LANES * PIECE_LEN;
    let one = _mm512_set1_epi64(1);
    let [r, pad, ..] = transpose([load_row(key); LANES]);
    let r = clamped(r);
    let [lanes, eighth] = powers(r);
    let sixteenth = Multiplier::new(multiply([eighth.limbs], [&eighth]));

    // The first step has as many blocks as the others leave over, at its end.
    let count = pieces(text.len());
    let in_first = (count - 1) % LANES + 1;
    let mut first = [0; STEP_LEN];
    let from = STEP_LEN - in_first * PIECE_LEN;
    let taken = text.len().min(STEP_LEN - from);
    first[from..from + taken].copy_from_slice(&text[..taken]);
    let len = (text.len() as u64).to_le_bytes();
    let is_only = count <= LANES;
    if is_only {
        first[STEP_LEN - 8..].copy_from_slice(&len);
    }
    let exist = _mm512_cmpge_epi64_mask(
        _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
        _mm512_set1_epi64((LANES - in_first) as i64),
    );
    let mut value = limbs(unpack(&first), _mm512_maskz_mov_epi64(exist, one));
    if !is_only {
        let (steps, rest) = text[taken..].as_chunks::<STEP_LEN>();
        let (pairs, single) = steps.as_chunks::<2>();
        for [even, odd] in pairs {
            let (even, odd) = (limbs(unpack(even), one), limbs(unpack(odd), one));
            value = sum(multiply([even, value], [&eighth, &sixteenth]), odd);
        }
        if let [step] = single {
            value = sum(multiply([value], [&eighth]), limbs(unpack(step), one));
        }
        let mut last = [0; STEP_LEN];
        last[..rest.len()].copy_from_slice(rest);
        last[STEP_LEN - 8..].copy_from_slice(&len);
        value = sum(multiply([value], [&eighth]), limbs(unpack(&last), one));
    }
    // Eight limbs below 2^45 add up to less than 2^48; the carry below takes more.
    let mut value = multiply([value], [&lanes]);
    for limb in &mut value {
        *limb = _mm512_set1_epi64(_mm512_reduce_add_epi64(*limb));
    }
    let [low, high] = tag(value, pad);
    whole_tag(words(low)[0], words(high)[0])
}

/// What each lane's block is multiplied with in the last step, and the eighth power for all lanes.
/// Lanes take the blocks 0, 4, 1, 5, 2, 6, 3, 7, as unpacking two registers gives them.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn powers(r: Value) -> [Multiplier; 2] {
    let squared = multiply([r], [&Multiplier::new(r)]);
    let (mut low, mut all) = (r, r);
    // Lanes: 2, 1, 2, 1, ...
    for (low, squared) in low.iter_mut().zip(squared) {
        *low = _mm512_mask_mov_epi64(*low, 0b0101_0101, squared);
    }
    // Lanes: 4, 3, 4, 3, ...
    let next = multiply([low], [&Multiplier::new(squared)]);
    let mut fourth = next;
    for limb in &mut fourth {
        *limb = _mm512_permutex_epi64::<0>(*limb);
    }
    // Lanes: 4, 3, 2, 1, 4, 3, 2, 1, and by the fourth power 8, 7, 6, 5, 8, 7, 6, 5.
    for (low, next) in low.iter_mut().zip(next) {
        *low = _mm512_mask_mov_epi64(*low, 0b0011_0011, next);
    }
    let high = multiply([low], [&Multiplier::new(fourth)]);
    let mut eighth = high;
    let order = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    for nth in 0..3 {
        all[nth] = _mm512_permutex2var_epi64(high[nth], order, low[nth]);
        eighth[nth] = _mm512_broadcastq_epi64(_mm512_castsi512_si128(high[nth]));
    }
    [Multiplier::new(all), Multiplier::new(eighth)]
}

/// Low and high halves of eight blocks of 16 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn unpack(bytes: &[u8; LANES * PIECE_LEN]) -> Piece {
    // SAFETY: the array has the twice 64 bytes that are read, at any alignment.
    let [first, second] = unsafe {
        let from = bytes.as_ptr();
        [_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(BLOCK_LEN).cast())]
    };
    [_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second)]
}

/// Limbs of r, with the bits cleared that must be (RFC 8439 section 2.5).
#[inline]
#[target_feature(enable = "avx512f,avx512vbmi2")]
fn clamped([low, high]: Piece) -> Value {
    let low = _mm512_and_si512(low, _mm512_set1_epi64(0x0fff_fffc_0fff_ffff));
    let high = _mm512_and_si512(high, _mm512_set1_epi64(0x0fff_fffc_0fff_fffc));
    limbs([low, high], _mm512_setzero_si512())
}

/// Reduces a value fully, adds `pad`, and returns the low and high half of each lane's tag.
#[inline]
#[target_feature(enable = "avx512f")]
fn tag([mut h0, mut h1, mut h2]: Value, pad: Piece) -> Piece {
    let mask = _mm512_set1_epi64(LIMB);
    let top_mask = _mm512_set1_epi64(TOP_LIMB);
    let by_five = |x| _mm512_add_epi64(x, _mm512_slli_epi64::<2>(x));
    h1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(h0));
    h0 = _mm512_and_si512(h0, mask);
    h2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(h1));
    h1 = _mm512_and_si512(h1, mask);
    h0 = _mm512_add_epi64(h0, by_five(_mm512_srli_epi64::<42>(h2)));
    h2 = _mm512_and_si512(h2, top_mask);
    // What came around is less than 2^9, so this leaves less than 2^130 + 2^9, which is below 2p.
    h1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(h0));
    h0 = _mm512_and_si512(h0, mask);
    h2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(h1));
    h1 = _mm512_and_si512(h1, mask);
    // h - p, if that is not negative: h + 5 - 2^130.
    let g0 = _mm512_add_epi64(h0, _mm512_set1_epi64(5));
    let g1 = _mm512_add_epi64(h1, _mm512_srli_epi64::<44>(g0));
    let g2 = _mm512_add_epi64(h2, _mm512_srli_epi64::<44>(g1));
    let g2 = _mm512_sub_epi64(g2, _mm512_set1_epi64(1 << 42));
    let fits = _mm512_cmpge_epi64_mask(g2, _mm512_setzero_si512());
    h0 = _mm512_mask_and_epi64(h0, fits, g0, mask);
    h1 = _mm512_mask_and_epi64(h1, fits, g1, mask);
    h2 = _mm512_mask_mov_epi64(h2, fits, g2);
    // Modulo 2^128.
    let low = _mm512_or_si512(h0, _mm512_slli_epi64::<44>(h1));
    let high = _mm512_or_si512(_mm512_srli_epi64::<20>(h1), _mm512_slli_epi64::<24>(h2));
    let low = _mm512_add_epi64(low, pad[0]);
    let carry = _mm512_cmplt_epu64_mask(low, pad[0]);
    let high = _mm512_add_epi64(high, pad[1]);
    [low, _mm512_mask_add_epi64(high, carry, high, _mm512_set1_epi64(1))]
}

/// From a row of four blocks in each register to the low and high halves of block `i` of all rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; LANES]) -> [Piece; PIECES_PER_ROW] {
    let mut halves = [[rows[0]; PIECES_PER_ROW]; 2];
    for (parity, half) in halves.iter_mut().enumerate() {
        let [a, b, c, d] = [rows[parity], rows[2 + parity], rows[4 + parity], rows[6 + parity]];
        let first = _mm512_shuffle_i64x2::<0x44>(a, b);
        let second = _mm512_shuffle_i64x2::<0xee>(a, b);
        let third = _mm512_shuffle_i64x2::<0x44>(c, d);
        let fourth = _mm512_shuffle_i64x2::<0xee>(c, d);
        *half = [
            _mm512_shuffle_i64x2::<0x88>(first, third),
            _mm512_shuffle_i64x2::<0xdd>(first, third),
            _mm512_shuffle_i64x2::<0x88>(second, fourth),
            _mm512_shuffle_i64x2::<0xdd>(second, fourth),
        ];
    }
    let [even, odd] = halves;
    let mut pieces = [[rows[0]; 2]; PIECES_PER_ROW];
    for (piece, (even, odd)) in pieces.iter_mut().zip(even.into_iter().zip(odd)) {
        *piece = [_mm512_unpacklo_epi64(even, odd), _mm512_unpackhi_epi64(even, odd)];
    }
    pieces
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_row(bytes: &[u8; BLOCK_LEN]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read, at any alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_words(words: &[u64; LANES]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read, at any alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_row(to: &mut [u8; BLOCK_LEN], row: __m512i) {
    // SAFETY: the array has the 64 bytes that are written, at any alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn words(register: __m512i) -> [u64; LANES] {
    let mut words = [0; LANES];
    // SAFETY: the array has the 64 bytes that are written, at any alignment.
    unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), register) };
    words
}
