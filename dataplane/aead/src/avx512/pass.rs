//! What a pass through ChaCha20's rounds works on: the next thirty-two blocks of texts, one text
//! after the other. Whole blocks are worked on in their places. Where a text ends with a part of a
//! block, that has a place of its own for the time.
//!
//! Constant time: what has which place depends on lengths and packet counters alone.

use std::arch::x86_64::*;
use std::hint::black_box;

use arrayvec::ArrayVec;

use crate::wide::{BLOCK_LEN, Block, Item};

use super::chacha::{self, Fixed, LANES, SET, State};
use super::long;

/// Texts that can end in a pass.
const ENDING_MAX: usize = LANES.div_ceil(long::LEN_MIN / BLOCK_LEN) + 1;
/// More than can end in the two passes that are under way.
const ENDS: usize = 16;
const _: () = assert!(ENDS >= 2 * ENDING_MAX);

/// Room for the last blocks of texts that end with a part of one, in turn.
pub(super) struct Ends([Block; ENDS]);

impl Ends {
    pub(super) fn new() -> Self {
        Self([[0; BLOCK_LEN]; ENDS])
    }

    pub(super) fn wipe(&mut self) {
        self.0.fill([0; BLOCK_LEN]);
        black_box(self);
    }
}

/// The next block that no pass has.
pub(super) struct Cursor {
    text: usize,
    block: usize,
    /// Texts that have blocks left.
    left: usize,
}

impl Cursor {
    /// From the text `first` on, over the last one back to the first one, `count` texts in all.
    pub(super) fn new(first: usize, count: usize) -> Self {
        Self { text: first, block: 0, left: count }
    }
}

/// The blocks of a pass. Lanes behind the last block work for nobody.
pub(super) struct Pass {
    len: usize,
    first_text: usize,
    last_text: usize,
    /// State words 12, 14 and 15 of both sets.
    words: [[__m512i; 3]; 2],
    /// State words 0 to 11, if texts have different keys.
    fixed: [Fixed; 2],
    places: Places,
    /// Texts that end here with a part of a block.
    ending: ArrayVec<Ending, ENDING_MAX>,
    nobody: Block,
}

struct Ending {
    text: usize,
    lane: usize,
    /// Where the block is, among [`Ends`].
    end: usize,
}

/// Addresses of blocks, exposed: registers compute them. Aligned, because they are written a register
/// at a time.
#[repr(align(64))]
struct Places([usize; LANES]);
const _: () = assert!(size_of::<Places>() == size_of::<[__m512i; LANES / 8]>());

impl Pass {
    #[target_feature(enable = "avx512f")]
    pub(super) fn new() -> Self {
        let zero = _mm512_setzero_si512();
        Self {
            len: 0,
            first_text: 0,
            last_text: 0,
            words: [[zero; 3]; 2],
            fixed: [chacha::fixed_words_of(&[0; 8]); 2],
            places: Places([0; LANES]),
            ending: ArrayVec::new(),
            nobody: [0; BLOCK_LEN],
        }
    }

    /// Takes the next blocks, with their keys unless there is but one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn fill<const ONE_KEY: bool>(
        &mut self,
        cursor: &mut Cursor,
        items: &mut [Item<'_>],
        Ends(ends): &mut Ends,
    ) {
        let mut words = [[_mm512_setzero_si512(); 3]; 2];
        let in_lanes = [
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31),
        ];
        let offsets = [
            _mm512_setr_epi64(0, 64, 128, 192, 256, 320, 384, 448),
            _mm512_setr_epi64(512, 576, 640, 704, 768, 832, 896, 960),
            _mm512_setr_epi64(1024, 1088, 1152, 1216, 1280, 1344, 1408, 1472),
            _mm512_setr_epi64(1536, 1600, 1664, 1728, 1792, 1856, 1920, 1984),
        ];
        let nobody = (&raw mut self.nobody).expose_provenance();
        let mut places = [_mm512_set1_epi64(nobody as i64); LANES / 8];
        let mut len = 0;
        let Cursor { mut text, mut block, mut left } = *cursor;
        self.ending.clear();
        self.first_text = text;
        while len < LANES && left > 0 {
            let item = &mut items[text];
            self.last_text = text;
            // All lanes from here on; those that are too many the next text takes back.
            let lanes = !0_u32 << len;
            // Lane 0, if it were of this text. The first block of a text has the number 1.
            let number = (block + 1).wrapping_sub(len) as i32;
            let place = item.text.as_mut_ptr().expose_provenance();
            let place = place.wrapping_add(block.wrapping_sub(len).wrapping_mul(BLOCK_LEN));
            let [low, high] = [item.counter as i32, (item.counter >> 32) as i32];
            let number = _mm512_set1_epi32(number);
            for (set, [numbers, lows, highs]) in words.iter_mut().enumerate() {
                let mask = (lanes >> (SET * set)) as u16;
                *numbers = _mm512_mask_add_epi32(*numbers, mask, number, in_lanes[set]);
                *lows = _mm512_mask_set1_epi32(*lows, mask, low);
                *highs = _mm512_mask_set1_epi32(*highs, mask, high);
                if !ONE_KEY {
                    for (to, word) in self.fixed[set][4..].iter_mut().zip(item.key) {
                        *to = _mm512_mask_set1_epi32(*to, mask, *word as i32);
                    }
                }
            }
            let place = _mm512_set1_epi64(place as i64);
            for (eight, places) in places.iter_mut().enumerate() {
                let mask = (lanes >> (8 * eight)) as u8;
                *places = _mm512_mask_add_epi64(*places, mask, place, offsets[eight]);
            }
            let blocks = item.text.len().div_ceil(BLOCK_LEN);
            let count = (blocks - block).min(LANES - len);
            len += count;
            block += count;
            if block == blocks {
                let (_, rest) = item.text.as_chunks::<BLOCK_LEN>();
                if !rest.is_empty() {
                    let end = left % ENDS;
                    chacha::copy_part(&mut ends[end], rest);
                    self.ending.push(Ending { text, lane: len - 1, end });
                }
                left -= 1;
                block = 0;
                text = if text + 1 == items.len() { 0 } else { text + 1 };
            }
        }
        self.len = len;
        *cursor = Cursor { text, block, left };
        self.words = words;
        // SAFETY: these are the array's size and alignment, and any bytes are addresses.
        unsafe { (&raw mut self.places).cast::<[__m512i; LANES / 8]>().write(places) };
        for &Ending { lane, end, .. } in &self.ending {
            self.places.0[lane] = (&raw mut ends[end]).expose_provenance();
        }
        for place in &mut self.places.0[self.len..] {
            *place = nobody;
        }
    }

    /// Blocks.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The text of the first block.
    #[inline]
    pub(super) fn first_text(&self) -> usize {
        self.first_text
    }

    /// The text of the last block.
    #[inline]
    pub(super) fn last_text(&self) -> usize {
        self.last_text
    }

    /// Where the blocks are, as exposed addresses: in their texts, if they are whole, or in `ends`.
    #[inline]
    pub(super) fn places(&self) -> &[usize; LANES] {
        &self.places.0
    }

    /// The states of both sets, with the state words 0 to 11 that all texts have in common, if any.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn states<'s>(&'s self, common: Option<&'s Fixed>) -> [State<'s>; 2] {
        let [first, second] = &self.fixed;
        [
            State::of(common.unwrap_or(first), self.words[0]),
            State::of(common.unwrap_or(second), self.words[1]),
        ]
    }

    /// Writes parts of blocks back to where they came from.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn give_back(&self, items: &mut [Item<'_>], Ends(ends): &Ends) {
        for &Ending { text, end, .. } in &self.ending {
            let (_, rest) = items[text].text.as_chunks_mut::<BLOCK_LEN>();
            chacha::copy_to_part(rest, &ends[end]);
        }
    }

    /// Keys, and keystream that nobody used.
    #[target_feature(enable = "avx512f")]
    pub(super) fn wipe(&mut self) {
        self.fixed = [chacha::fixed_words_of(&[0; 8]); 2];
        self.nobody = [0; BLOCK_LEN];
        black_box(self);
    }
}
