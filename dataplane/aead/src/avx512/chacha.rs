//! ChaCha20 (RFC 8439 section 2.3), thirty-two blocks at a time: register `i` holds word `i` of
//! sixteen states, so a quarter round is the same on every lane and nothing is shuffled between
//! rounds; two such sets take turns, so that no operation waits for the one before it, and fill all
//! thirty-two registers.
//!
//! Constant time: there is no branch and no index that depends on a key, a nonce or a text; lengths
//! and the place of a lane are public.

use std::arch::x86_64::*;
use std::ptr;

use crate::wide::{BLOCK_LEN, Block, CONSTANTS, Lanes, Texts};

use super::pairs::Runs;
use super::woven;

/// Blocks at a time.
pub(super) const LANES: usize = 2 * SET;
/// Blocks of one set of registers.
pub(super) const SET: usize = 16;
/// Double rounds of a block.
pub(super) const DOUBLE_ROUNDS: usize = 10;
/// Bytes of [`LANES`] blocks.
const STRIP_LEN: usize = LANES * BLOCK_LEN;

/// Writes the keystream of up to [`LANES`] lanes, from the lane `from`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn keystream(texts: &Texts<'_, '_>, lanes: &Lanes, from: usize, to: &mut [Block]) {
    let (to, _) = to.as_chunks_mut::<SET>();
    let first_fixed = fixed_words(texts, lanes, from);
    let first = State::new(&first_fixed, lanes, from);
    if let [to_first, to_second] = to
        && lanes.len() - from > SET
    {
        let from = from + SET;
        let own;
        let second_fixed = if texts.common_key().is_some() {
            &first_fixed
        } else {
            own = fixed_words(texts, lanes, from);
            &own
        };
        two_sets(&first, &State::new(second_fixed, lanes, from), to_first, to_second);
    } else {
        // Half of the work would be for nobody.
        one_set(&first, &mut to[0]);
    }
}

/// Adds blocks of keystream to the texts of as many lanes, from the lane `from`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn add_blocks(texts: &mut Texts<'_, '_>, lanes: &Lanes, from: usize, blocks: &[Block]) {
    let mut blocks = blocks.iter().zip(from..lanes.len());
    while let Some((block, lane)) = blocks.next() {
        let mut text = lanes.rest_of_text(texts, lane).chunks_mut(BLOCK_LEN);
        if let Some(text) = text.next() {
            add(text, block);
        }
        // Where a text ends the CPU foresees; computed, the next one would have to wait for it.
        for (text, (block, _)) in text.zip(&mut blocks) {
            add(text, block);
        }
    }
}

/// Adds the keystream of the block counters from 1 to the whole strips that a text begins with.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn apply_strips(key: &[u32; 8], counter: u64, text: &mut [u8], blocks: &mut [Block]) {
    let (strips, _) = text.as_chunks_mut::<STRIP_LEN>();
    let ([to_first, to_second], _) = blocks.as_chunks_mut::<SET>() else { return };
    let mut first = State {
        fixed: &fixed_words_of(key),
        block: _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
        counter: [counter, counter >> 32].map(|half| _mm512_set1_epi32(half as i32)),
    };
    let mut second = first;
    second.block = _mm512_add_epi32(second.block, _mm512_set1_epi32(SET as i32));
    for strip in strips {
        two_sets(&first, &second, to_first, to_second);
        let (texts, _) = strip.as_chunks_mut::<BLOCK_LEN>();
        for (text, block) in texts.iter_mut().zip(to_first.iter().chain(&*to_second)) {
            add(text, block);
        }
        for state in [&mut first, &mut second] {
            state.block = _mm512_add_epi32(state.block, _mm512_set1_epi32(LANES as i32));
        }
    }
}

/// State words 0 to 11: constants and key.
pub(super) type Fixed = [__m512i; 12];

/// Sixteen states before the first round.
#[derive(Clone, Copy)]
pub(super) struct State<'s> {
    fixed: &'s Fixed,
    /// Word 12.
    block: __m512i,
    /// Words 14 and 15.
    counter: [__m512i; 2],
}

impl<'s> State<'s> {
    /// With the state words 12, 14 and 15.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn of(fixed: &'s Fixed, [block, low, high]: [__m512i; 3]) -> Self {
        Self { fixed, block, counter: [low, high] }
    }

    /// Of the lanes from the lane `from` on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(fixed: &'s Fixed, lanes: &Lanes, from: usize) -> Self {
        let [block, low, high] = lanes.words(from);
        Self::of(fixed, [load_words(block), load_words(low), load_words(high)])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn words(&self) -> [__m512i; 16] {
        let mut words = [_mm512_setzero_si512(); 16];
        words[..12].copy_from_slice(self.fixed);
        words[12] = self.block;
        words[14..].copy_from_slice(&self.counter);
        words
    }
}

/// Of the lanes from the lane `from` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn fixed_words(texts: &Texts<'_, '_>, lanes: &Lanes, from: usize) -> Fixed {
    if let Some(key) = texts.common_key() {
        return fixed_words_of(key);
    }
    fixed_words_from(&lanes.keys(texts, from))
}

/// Of one key for all lanes.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn fixed_words_of(key: &[u32; 8]) -> Fixed {
    let mut fixed = [_mm512_setzero_si512(); 12];
    for (to, &word) in fixed.iter_mut().zip(CONSTANTS.iter().chain(key)) {
        *to = _mm512_set1_epi32(word as i32);
    }
    fixed
}

/// Of a key in each lane, word by word.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn fixed_words_from(keys: &[[u32; SET]; 8]) -> Fixed {
    let mut fixed = fixed_words_of(&[0; 8]);
    for (to, words) in fixed[4..].iter_mut().zip(keys) {
        *to = load_words(words);
    }
    fixed
}

/// Quarter rounds side by side, on every set in turn. A macro: the registers' numbers must be
/// constants.
macro_rules! quarter_rounds {
    ($v:tt, $([$a:literal $b:literal $c:literal $d:literal])*) => {
        $(quarter_rounds!(@half $v, $a $b $d 16);)*
        $(quarter_rounds!(@half $v, $c $d $b 12);)*
        $(quarter_rounds!(@half $v, $a $b $d 8);)*
        $(quarter_rounds!(@half $v, $c $d $b 7);)*
    };
    (@half [$($v:ident)*], $a:literal $b:literal $d:literal $bits:literal) => {
        $(
            $v[$a] = _mm512_add_epi32($v[$a], $v[$b]);
            $v[$d] = _mm512_rol_epi32::<$bits>(_mm512_xor_si512($v[$d], $v[$a]));
        )*
    };
}

/// Twenty rounds, the final addition, and the transposition into whole blocks.
#[target_feature(enable = "avx512f")]
fn one_set(state: &State<'_>, to: &mut [Block; SET]) {
    let mut v = state.words();
    for _ in 0..DOUBLE_ROUNDS {
        quarter_rounds!([v], [0 4 8 12] [1 5 9 13] [2 6 10 14] [3 7 11 15]);
        quarter_rounds!([v], [0 5 10 15] [1 6 11 12] [2 7 8 13] [3 4 9 14]);
    }
    finish(v, state, to);
}

/// As [`one_set`], for two sets in four fifths of the time.
#[target_feature(enable = "avx512f")]
pub(super) fn two_sets(
    first: &State<'_>,
    second: &State<'_>,
    to_first: &mut [Block; SET],
    to_second: &mut [Block; SET],
) {
    let (mut v, mut w) = (first.words(), second.words());
    for _ in 0..DOUBLE_ROUNDS {
        quarter_rounds!([v w], [0 4 8 12] [1 5 9 13] [2 6 10 14] [3 7 11 15]);
        quarter_rounds!([v w], [0 5 10 15] [1 6 11 12] [2 7 8 13] [3 4 9 14]);
    }
    finish(v, first, to_first);
    finish(w, second, to_second);
}

/// As [`two_sets`], with `runs` woven in; adds the blocks to those at `places`. `CALLER` does nothing
/// but make an instance for each caller, which the compiler then inlines; what needs target features
/// cannot be `inline(always)`.
///
/// # Safety
///
/// As for [`woven::double_rounds`], and the places are exposed addresses of blocks that can be read
/// and written.
#[inline]
#[target_feature(enable = "avx512f,bmi2")]
pub(super) unsafe fn add_woven<const CALLER: usize>(
    [first, second]: &[State<'_>; 2],
    runs: &Runs,
    places: [&[usize; SET]; 2],
) {
    let (mut v, mut w) = (first.words(), second.words());
    // SAFETY: the caller says so.
    unsafe { woven::double_rounds(&mut v, &mut w, &runs.runs) };
    for _ in runs.parts..DOUBLE_ROUNDS {
        quarter_rounds!([v w], [0 4 8 12] [1 5 9 13] [2 6 10 14] [3 7 11 15]);
        quarter_rounds!([v w], [0 5 10 15] [1 6 11 12] [2 7 8 13] [3 4 9 14]);
    }
    // SAFETY: the caller says so.
    unsafe {
        add_at(places[0], blocks(v, first));
        add_at(places[1], blocks(w, second));
    }
}

/// # Safety
///
/// The places are exposed addresses of blocks that can be read and written.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_at(places: &[usize; SET], blocks: [__m512i; SET]) {
    for (place, block) in places.iter().zip(blocks) {
        let place = ptr::with_exposed_provenance_mut(*place);
        // SAFETY: the caller says so; the alignment does not matter.
        unsafe { _mm512_storeu_si512(place, _mm512_xor_si512(_mm512_loadu_si512(place), block)) };
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn finish(v: [__m512i; 16], state: &State<'_>, to: &mut [Block; SET]) {
    for (to, block) in to.iter_mut().zip(blocks(v, state)) {
        store(to, block);
    }
}

/// The final addition, and the transposition into whole blocks.
#[inline]
#[target_feature(enable = "avx512f")]
fn blocks(mut v: [__m512i; 16], state: &State<'_>) -> [__m512i; SET] {
    for (word, before) in v.iter_mut().zip(state.words()) {
        *word = _mm512_add_epi32(*word, before);
    }
    transpose(v)
}

/// From word `i` of every block in register `i` to block `i` in register `i`: first 4 × 4 words
/// inside of each quarter of a register, then 4 × 4 quarters.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(v: [__m512i; 16]) -> [__m512i; SET] {
    // quarters[w][j], quarter q: words 4w to 4w + 3 of the block 4q + j.
    let mut quarters = [[v[0]; 4]; 4];
    for w in 0..4 {
        let low = _mm512_unpacklo_epi32(v[4 * w], v[4 * w + 1]);
        let high = _mm512_unpackhi_epi32(v[4 * w], v[4 * w + 1]);
        let next_low = _mm512_unpacklo_epi32(v[4 * w + 2], v[4 * w + 3]);
        let next_high = _mm512_unpackhi_epi32(v[4 * w + 2], v[4 * w + 3]);
        quarters[w] = [
            _mm512_unpacklo_epi64(low, next_low),
            _mm512_unpackhi_epi64(low, next_low),
            _mm512_unpacklo_epi64(high, next_high),
            _mm512_unpackhi_epi64(high, next_high),
        ];
    }
    let mut blocks = v;
    for j in 0..4 {
        let [a, b, c, d] = [quarters[0][j], quarters[1][j], quarters[2][j], quarters[3][j]];
        let first = _mm512_shuffle_i32x4::<0x44>(a, b);
        let second = _mm512_shuffle_i32x4::<0xee>(a, b);
        let third = _mm512_shuffle_i32x4::<0x44>(c, d);
        let fourth = _mm512_shuffle_i32x4::<0xee>(c, d);
        blocks[j] = _mm512_shuffle_i32x4::<0x88>(first, third);
        blocks[4 + j] = _mm512_shuffle_i32x4::<0xdd>(first, third);
        blocks[8 + j] = _mm512_shuffle_i32x4::<0x88>(second, fourth);
        blocks[12 + j] = _mm512_shuffle_i32x4::<0xdd>(second, fourth);
    }
    blocks
}

/// To the first 64 bytes of a text, or to all if it has fewer.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add(text: &mut [u8], block: &Block) {
    let block = load(block);
    if let Some(whole) = text.first_chunk_mut() {
        store(whole, _mm512_xor_si512(load(whole), block));
    } else if !text.is_empty() {
        let mask = !(u64::MAX << text.len());
        // SAFETY: bytes beyond the slice's length are masked out, in the load and in the store.
        unsafe {
            let before = _mm512_maskz_loadu_epi8(mask, text.as_ptr().cast());
            let after = _mm512_xor_si512(before, block);
            _mm512_mask_storeu_epi8(text.as_mut_ptr().cast(), mask, after);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &Block) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read, at any alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut Block, block: __m512i) {
    // SAFETY: the array has the 64 bytes that are written, at any alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), block) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_words(words: &[u32; SET]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read, at any alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// To the bytes of a part of a block, which has at least one; the others become zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn copy_part(to: &mut Block, part: &[u8]) {
    let mask = !(u64::MAX << part.len());
    // SAFETY: bytes beyond the slice's length are masked out.
    store(to, unsafe { _mm512_maskz_loadu_epi8(mask, part.as_ptr().cast()) });
}

/// To a part of a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn copy_to_part(part: &mut [u8], from: &Block) {
    let mask = !(u64::MAX << part.len());
    // SAFETY: bytes beyond the slice's length are masked out.
    unsafe { _mm512_mask_storeu_epi8(part.as_mut_ptr().cast(), mask, load(from)) };
}
