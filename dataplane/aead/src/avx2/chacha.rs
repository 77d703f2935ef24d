//! ChaCha20 (RFC 8439 section 2.3), eight blocks at a time: register `i` holds word `i` of all
//! eight states.
//!
//! Constant time: there is no branch and no index that depends on a key, a nonce or a text; lengths
//! and the place of a lane are public.

use std::arch::x86_64::*;
use std::hint::black_box;

use crate::wide::{BLOCK_LEN, Block, CONSTANTS, Lanes, Texts};

/// Blocks at a time.
pub(super) const LANES: usize = 8;
/// Bytes of as many blocks.
const STRIP_LEN: usize = LANES * BLOCK_LEN;

/// Writes the keystream of [`LANES`] lanes, from the lane `from`; of lanes that do not exist, any.
#[target_feature(enable = "avx2")]
pub(super) fn keystream(texts: &Texts<'_, '_>, lanes: &Lanes, from: usize, to: &mut [Block]) {
    if let Some(to) = to.first_chunk_mut() {
        blocks(&state(texts, lanes, from), to);
    }
}

/// Adds blocks of keystream to the texts of as many lanes, from the lane `from`.
#[target_feature(enable = "avx2")]
pub(super) fn add_blocks(texts: &mut Texts<'_, '_>, lanes: &Lanes, from: usize, blocks: &[Block]) {
    for (lane, block) in (from..lanes.len()).zip(blocks) {
        add(lanes.rest_of_text(texts, lane), block);
    }
}

/// Adds the keystream of the block counters from 1 to the whole strips that a text begins with.
#[target_feature(enable = "avx2")]
pub(super) fn apply_strips(key: &[u32; 8], counter: u64, text: &mut [u8], room: &mut [Block]) {
    let (strips, _) = text.as_chunks_mut::<STRIP_LEN>();
    let Some(room) = room.first_chunk_mut() else { return };
    let mut state = [_mm256_setzero_si256(); 16];
    for (to, &word) in state.iter_mut().zip(CONSTANTS.iter().chain(key)) {
        *to = _mm256_set1_epi32(word as i32);
    }
    state[12] = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8);
    state[14] = _mm256_set1_epi32(counter as i32);
    state[15] = _mm256_set1_epi32((counter >> 32) as i32);
    for strip in strips {
        blocks(&state, room);
        let (texts, _) = strip.as_chunks_mut::<BLOCK_LEN>();
        for (text, block) in texts.iter_mut().zip(&*room) {
            add(text, block);
        }
        state[12] = _mm256_add_epi32(state[12], _mm256_set1_epi32(LANES as i32));
    }
}

/// The states before the first round.
#[inline]
#[target_feature(enable = "avx2")]
fn state(texts: &Texts<'_, '_>, lanes: &Lanes, from: usize) -> [__m256i; 16] {
    let mut state = [_mm256_setzero_si256(); 16];
    for (to, &word) in state.iter_mut().zip(&CONSTANTS) {
        *to = _mm256_set1_epi32(word as i32);
    }
    match texts.common_key() {
        Some(key) => {
            for (to, &word) in state[4..12].iter_mut().zip(key) {
                *to = _mm256_set1_epi32(word as i32);
            }
        }
        None => {
            for (to, words) in state[4..12].iter_mut().zip(&lanes.keys::<LANES>(texts, from)) {
                *to = load_words(words);
            }
        }
    }
    let [block, low, high] = lanes.words::<LANES>(from);
    state[12] = load_words(block);
    state[14] = load_words(low);
    state[15] = load_words(high);
    state
}

/// Quarter rounds side by side. A macro: the registers' numbers must be constants.
macro_rules! quarter_rounds {
    ($v:ident, $by_16:ident, $by_8:ident, $([$a:literal $b:literal $c:literal $d:literal])*) => {
        $(
            $v[$a] = _mm256_add_epi32($v[$a], $v[$b]);
            $v[$d] = _mm256_shuffle_epi8(_mm256_xor_si256($v[$d], $v[$a]), $by_16);
        )*
        $(
            $v[$c] = _mm256_add_epi32($v[$c], $v[$d]);
            $v[$b] = rotate::<12, 20>(_mm256_xor_si256($v[$b], $v[$c]));
        )*
        $(
            $v[$a] = _mm256_add_epi32($v[$a], $v[$b]);
            $v[$d] = _mm256_shuffle_epi8(_mm256_xor_si256($v[$d], $v[$a]), $by_8);
        )*
        $(
            $v[$c] = _mm256_add_epi32($v[$c], $v[$d]);
            $v[$b] = rotate::<7, 25>(_mm256_xor_si256($v[$b], $v[$c]));
        )*
    };
}

/// For each byte of a word where it comes from when the word is rotated left by 16 and by 8 bits.
const BY_16: u32 = 0x0100_0302;
const BY_8: u32 = 0x0201_0003;

/// The places of bytes for all words. The compiler must not know them: else it moves the rotation
/// before the xor, where it takes two shuffles, or makes two shuffles of 16-bit words of it.
#[inline]
#[target_feature(enable = "avx2")]
fn byte_places(of_first_word: u32) -> __m256i {
    let places = _mm_add_epi32(
        _mm_set1_epi32(of_first_word as i32),
        _mm_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0c0c_0c0c),
    );
    black_box(_mm256_broadcastsi128_si256(places))
}

#[inline]
#[target_feature(enable = "avx2")]
fn rotate<const LEFT: i32, const RIGHT: i32>(words: __m256i) -> __m256i {
    _mm256_or_si256(_mm256_slli_epi32::<LEFT>(words), _mm256_srli_epi32::<RIGHT>(words))
}

/// Twenty rounds, the final addition, and the transposition into whole blocks.
#[inline]
#[target_feature(enable = "avx2")]
fn blocks(state: &[__m256i; 16], to: &mut [Block; LANES]) {
    let (by_16, by_8) = (byte_places(BY_16), byte_places(BY_8));
    let mut v = *state;
    for _ in 0..10 {
        quarter_rounds!(v, by_16, by_8, [0 4 8 12] [1 5 9 13] [2 6 10 14] [3 7 11 15]);
        quarter_rounds!(v, by_16, by_8, [0 5 10 15] [1 6 11 12] [2 7 8 13] [3 4 9 14]);
    }
    for (word, before) in v.iter_mut().zip(state) {
        *word = _mm256_add_epi32(*word, *before);
    }
    for (half, v) in v.as_chunks::<8>().0.iter().enumerate() {
        // Eight words of eight blocks: 4 × 4 words inside of each half of a register, then halves.
        let mut quarters = [[v[0]; 4]; 2];
        for (w, quarter) in quarters.iter_mut().enumerate() {
            let at = 4 * w;
            let low = _mm256_unpacklo_epi32(v[at], v[at + 1]);
            let high = _mm256_unpackhi_epi32(v[at], v[at + 1]);
            let next_low = _mm256_unpacklo_epi32(v[at + 2], v[at + 3]);
            let next_high = _mm256_unpackhi_epi32(v[at + 2], v[at + 3]);
            *quarter = [
                _mm256_unpacklo_epi64(low, next_low),
                _mm256_unpackhi_epi64(low, next_low),
                _mm256_unpacklo_epi64(high, next_high),
                _mm256_unpackhi_epi64(high, next_high),
            ];
        }
        for j in 0..4 {
            let (a, b) = (quarters[0][j], quarters[1][j]);
            store(&mut to[j], half, _mm256_permute2x128_si256::<0x20>(a, b));
            store(&mut to[4 + j], half, _mm256_permute2x128_si256::<0x31>(a, b));
        }
    }
}

/// To the first 64 bytes of a text, or to all if it has fewer.
#[inline]
#[target_feature(enable = "avx2")]
fn add(text: &mut [u8], block: &Block) {
    if let Some(whole) = text.first_chunk_mut() {
        for half in 0..2 {
            let sum = _mm256_xor_si256(load(whole, half), load(block, half));
            store(whole, half, sum);
        }
    } else {
        for (byte, key) in text.iter_mut().zip(block) {
            *byte ^= key;
        }
    }
}

/// 32 bytes of a block: its first or its second half.
#[inline]
#[target_feature(enable = "avx2")]
fn load(from: &Block, half: usize) -> __m256i {
    let from = from.as_chunks::<32>().0[half].as_ptr();
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_si256(from.cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut Block, half: usize, bytes: __m256i) {
    let to = to.as_chunks_mut::<32>().0[half].as_mut_ptr();
    // SAFETY: the array has the 32 bytes that are written, at any alignment.
    unsafe { _mm256_storeu_si256(to.cast(), bytes) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_words(words: &[u32; LANES]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read, at any alignment.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}
