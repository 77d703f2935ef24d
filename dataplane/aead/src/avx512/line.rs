//! The blocks of long texts in a line, one text after the other, of which each pass through
//! ChaCha20's rounds takes the next thirty-two. Whole blocks are worked on in their places. Where a
//! text ends with a part of a block, that has a place of its own for the time.
//!
//! A lane's text is found by counting the texts that end before that lane. What is known of the text
//! is then looked up in registers, for all lanes at once.
//!
//! Constant time: what has which place depends on lengths alone.

use std::arch::x86_64::*;
use std::cell::UnsafeCell;
use std::hint::black_box;

use crate::wide::{BLOCK_LEN, Block, Item, SORTED_MAX};

use super::chacha::{self, Fixed, LANES, SET, State};
use super::long;

/// Addresses that a register holds, of as many texts.
const ADDRESSES: usize = 8;
/// Texts that can have blocks in a pass.
const TEXTS_PER_PASS: usize = LANES.div_ceil(long::LEN_MIN / BLOCK_LEN) + 1;
const _: () = assert!(TEXTS_PER_PASS <= ADDRESSES);
/// All texts, and what is looked up behind the last one: zeros, for lanes that work for nobody.
const TEXTS: usize = SORTED_MAX + SET;

/// What is known of the texts, in the order of the line, and the pass that is under way. Lanes are
/// counted over all passes.
pub(super) struct Line<const KEY_WORDS: usize> {
    /// Where each text would begin if its first block were in lane 0, as exposed addresses.
    bases: [u64; TEXTS],
    /// The lane of the first block.
    starts: [u32; TEXTS],
    /// The lane behind that of the last block.
    ends: [u32; TEXTS],
    /// State words 14 and 15.
    counters: [[u32; TEXTS]; 2],
    /// State words 4 to 11, if texts have different keys.
    keys: [[u32; TEXTS]; KEY_WORDS],
    /// How many there are, and which of all is the first in the line.
    count: usize,
    first: usize,

    /// The first lane of the pass, and its text.
    lane: u32,
    text: usize,
    /// The text of its last lane that works for somebody.
    last: usize,
    /// The first lane behind the pass, and its text.
    next_lane: u32,
    next_text: usize,
    /// The text of each lane, counted from that of the first one.
    owners: [__m512i; 2],
    /// Where the blocks are, as exposed addresses.
    places: Places,
    /// For the last blocks of texts that end in the pass with a part of one.
    parts: [Place; TEXTS_PER_PASS],
    /// For lanes that work for nobody.
    nobody: Place,
}

/// Aligned, because it is written a register at a time.
#[repr(align(64))]
struct Places([usize; LANES]);
const _: () = assert!(size_of::<Places>() == size_of::<[__m512i; LANES / ADDRESSES]>());

/// Room for a block that is written by its address while the line is borrowed.
#[repr(align(64))]
struct Place(UnsafeCell<Block>);

impl Place {
    const fn empty() -> Self {
        Self(UnsafeCell::new([0; BLOCK_LEN]))
    }

    #[inline]
    fn exposed(&self) -> usize {
        self.0.get().expose_provenance()
    }
}

impl<const KEY_WORDS: usize> Line<KEY_WORDS> {
    #[target_feature(enable = "avx512f")]
    pub(super) fn new() -> Self {
        Self {
            bases: [0; TEXTS],
            starts: [0; TEXTS],
            ends: [0; TEXTS],
            counters: [[0; TEXTS]; 2],
            keys: [[0; TEXTS]; KEY_WORDS],
            count: 0,
            first: 0,
            lane: 0,
            text: 0,
            last: 0,
            next_lane: 0,
            next_text: 0,
            owners: [_mm512_setzero_si512(); 2],
            places: Places([0; LANES]),
            parts: [const { Place::empty() }; TEXTS_PER_PASS],
            nobody: Place::empty(),
        }
    }

    /// Lines all texts up, from the text `first` over the last one back to the first one: at most
    /// [`SORTED_MAX`], each of at least [`long::LEN_MIN`] bytes.
    pub(super) fn fill(&mut self, first: usize, items: &mut [Item<'_>]) {
        assert!(items.len() <= SORTED_MAX);
        (self.count, self.first) = (items.len(), first);
        let mut lane: u32 = 0;
        for nth in 0..items.len() {
            let item = &mut items[self.item(nth)];
            debug_assert!(item.text.len() >= long::LEN_MIN);
            let address = item.text.as_mut_ptr().expose_provenance() as u64;
            self.bases[nth] = address.wrapping_sub(u64::from(lane) * BLOCK_LEN as u64);
            self.starts[nth] = lane;
            lane += item.text.len().div_ceil(BLOCK_LEN) as u32;
            self.ends[nth] = lane;
            self.counters[0][nth] = item.counter as u32;
            self.counters[1][nth] = (item.counter >> 32) as u32;
            for (words, word) in self.keys.iter_mut().zip(item.key) {
                words[nth] = *word;
            }
        }
    }

    /// Which of all texts is the `nth` in the line.
    #[inline]
    fn item(&self, nth: usize) -> usize {
        let item = self.first + nth;
        if item < self.count { item } else { item - self.count }
    }

    /// Goes to the next pass, of the same texts as before. False if there is none.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vpopcntdq")]
    pub(super) fn take(&mut self, items: &[Item<'_>]) -> bool {
        if self.next_text == self.count {
            return false;
        }
        (self.lane, self.text) = (self.next_lane, self.next_text);
        self.next_lane += LANES as u32;
        // 1. The texts that end here, and a bit for the lane behind each; none behind the pass.
        let mut ends: u32 = 0;
        while self.next_text < self.count && self.ends[self.next_text] <= self.next_lane {
            ends |= 2 << (self.ends[self.next_text] - self.lane - 1);
            self.next_text += 1;
        }
        self.last = (self.text + ends.count_ones() as usize).min(self.count - 1);
        // 2. Whose the lanes are: bits up to each lane are counted.
        let lanes = [
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31),
        ];
        let ends = _mm512_set1_epi32(ends as i32);
        self.owners = lanes.map(|lanes| {
            let behind = _mm512_sllv_epi32(_mm512_set1_epi32(2), lanes);
            let up_to = _mm512_sub_epi32(behind, _mm512_set1_epi32(1));
            _mm512_popcnt_epi32(_mm512_and_si512(ends, up_to))
        });
        // 3. Where their blocks are.
        self.look_up_places();
        // 4. Where parts of blocks are, and who works for nobody.
        for text in self.text..self.next_text {
            let (_, part) = items[self.item(text)].text.as_chunks::<BLOCK_LEN>();
            if !part.is_empty() {
                let place = &mut self.parts[text - self.text];
                chacha::copy_part(place.0.get_mut(), part);
                self.places.0[(self.ends[text] - self.lane - 1) as usize] = place.exposed();
            }
        }
        if self.next_text == self.count {
            let len = (self.ends[self.count - 1] - self.lane) as usize;
            self.places.0[len..].fill(self.nobody.exposed());
        }
        true
    }

    /// The places of whole blocks.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn look_up_places(&mut self) {
        let bases = load_addresses(&self.bases, self.text);
        let [first, second] = self.owners;
        let owners = [
            _mm512_castsi512_si256(first),
            _mm512_extracti64x4_epi64::<1>(first),
            _mm512_castsi512_si256(second),
            _mm512_extracti64x4_epi64::<1>(second),
        ];
        let mut offsets = _mm512_add_epi64(
            _mm512_set1_epi64(i64::from(self.lane) * BLOCK_LEN as i64),
            _mm512_setr_epi64(0, 64, 128, 192, 256, 320, 384, 448),
        );
        let places = owners.map(|owners| {
            let bases = _mm512_permutexvar_epi64(_mm512_cvtepu32_epi64(owners), bases);
            let places = _mm512_add_epi64(bases, offsets);
            offsets = _mm512_add_epi64(offsets, _mm512_set1_epi64((ADDRESSES * BLOCK_LEN) as i64));
            places
        });
        // SAFETY: this is the array's size and alignment, and any bytes are addresses.
        unsafe { (&raw mut self.places).cast::<[__m512i; LANES / ADDRESSES]>().write(places) };
    }

    /// The text of the last block of the pass.
    #[inline]
    pub(super) fn last_text(&self) -> usize {
        self.item(self.last)
    }

    /// Whether a text has blocks in the pass.
    pub(super) fn is_in_pass(&self, text: usize) -> bool {
        let nth = (0..self.count).find(|nth| self.item(*nth) == text);
        nth.is_some_and(|nth| self.starts[nth] < self.next_lane && self.ends[nth] > self.lane)
    }

    /// Where the blocks of both sets are, as exposed addresses: of whole blocks of texts, as long as
    /// these are where they were when the line was filled, or of places in the line.
    #[inline]
    pub(super) fn places(&self) -> [&[usize; SET]; 2] {
        let (places, _) = self.places.0.as_chunks();
        [&places[0], &places[1]]
    }

    /// Writes state words 4 to 11 of both sets, of texts that have different keys.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn write_keys(&self, [first, second]: &mut [Fixed; 2]) {
        for (keys, (first, second)) in
            self.keys.iter().zip(first[4..].iter_mut().zip(&mut second[4..]))
        {
            [*first, *second] = self.look_up(keys);
        }
    }

    /// The states of both sets, with their words 0 to 11.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn states<'s>(&self, fixed: [&'s Fixed; 2]) -> [State<'s>; 2] {
        // The first block of a text has the number 1.
        let lanes = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
        let first = _mm512_add_epi32(lanes, _mm512_set1_epi32(self.lane as i32));
        let lanes = [first, _mm512_add_epi32(first, _mm512_set1_epi32(SET as i32))];
        let starts = self.look_up(&self.starts);
        let [lows, highs] = self.counters.each_ref().map(|words| self.look_up(words));
        [0, 1].map(|set| {
            let blocks = _mm512_sub_epi32(lanes[set], starts[set]);
            State::of(fixed[set], [blocks, lows[set], highs[set]])
        })
    }

    /// For each lane of both sets, what is known of its text.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn look_up(&self, words: &[u32; TEXTS]) -> [__m512i; 2] {
        let (words, _) = words[self.text..][..SET].as_chunks();
        let words = chacha::load_words(&words[0]);
        self.owners.map(|owners| _mm512_permutexvar_epi32(owners, words))
    }

    /// Ends the pass, whose blocks are worked on: writes parts of them back to where they came from.
    /// Returns how many texts at the front of the line have all their blocks back.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn give_back(&mut self, items: &mut [Item<'_>]) -> usize {
        for text in self.text..self.next_text {
            let (_, part) = items[self.item(text)].text.as_chunks_mut::<BLOCK_LEN>();
            if !part.is_empty() {
                let place = &mut self.parts[text - self.text];
                chacha::copy_to_part(part, place.0.get_mut());
            }
        }
        self.next_text
    }

    /// Keys, parts of texts, and keystream that nobody used.
    pub(super) fn wipe(&mut self) {
        self.keys = [[0; TEXTS]; KEY_WORDS];
        self.parts = [const { Place::empty() }; TEXTS_PER_PASS];
        self.nobody = Place::empty();
        black_box(self);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_addresses(addresses: &[u64; TEXTS], from: usize) -> __m512i {
    let addresses = &addresses[from..][..ADDRESSES];
    // SAFETY: the slice has the 64 bytes that are read, at any alignment.
    unsafe { _mm512_loadu_si512(addresses.as_ptr().cast()) }
}

#[cfg(test)]
mod tests;
