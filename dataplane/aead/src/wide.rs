//! What the vector back-ends share: batches are cut into groups, and the ChaCha20 blocks of a group
//! are handed out to lanes, so that short packets fill registers as well as long ones.
//!
//! A group is at most [`TEXTS_MAX`] texts. Its first lanes are the blocks that give each text its
//! one-time key for Poly1305 (RFC 8439 section 2.6). Long texts are worked on in strips, as many
//! blocks as there are lanes; what strips leave over of all texts shares the other lanes.
//!
//! Block counters cannot wrap: a text has at most [`TEXT_LEN_MAX`] bytes, which are 1,024 blocks.

use std::cell::RefCell;
use std::hint::black_box;

use arrayvec::ArrayVec;

use crate::backend::{open_by_ring, seal_by_ring};
use crate::{OpenJob, SealJob, TAG_LEN};

/// Bytes of a ChaCha20 block.
pub(crate) const BLOCK_LEN: usize = 64;
/// Texts of a group: as many as sixteen lanes of one-time keys, or twice eight lanes of Poly1305.
pub(crate) const TEXTS_MAX: usize = 16;
/// Longer packets do not exist; `ring` takes them.
pub(crate) const TEXT_LEN_MAX: usize = 65_536;
/// Packets that are sorted by length together. A data plane's batch is as long.
pub(crate) const SORTED_MAX: usize = 64;
/// The most that a back-end has.
pub(crate) const LANES_MAX: usize = 32;
/// Lanes that are handed out at once, of which some may be too many.
const LANES_AT_ONCE: usize = 4;
/// A one-time key and less than a strip of every text, whose last block may be a part of one.
const GROUP_LANES_MAX: usize = TEXTS_MAX * (1 + LANES_MAX) + LANES_AT_ONCE;

/// "expand 32-byte k" (RFC 8439 section 2.3).
pub(crate) const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// One vector instruction set.
pub(crate) trait Engine: Copy {
    /// ChaCha20 blocks at a time, at most 32.
    const LANES: usize;

    /// Works on the long texts, if there are many, in a way of the engine's own. They are sorted by
    /// length, at most [`SORTED_MAX`]. Returns the others.
    fn work_on_long<'i, 'a>(self, items: &'i mut [Item<'a>]) -> &'i mut [Item<'a>] {
        items
    }

    /// Writes the keystream of [`Self::LANES`] lanes, from the lane `from`; of lanes that do not
    /// exist, any or none.
    fn keystream(self, texts: &Texts<'_, '_>, lanes: &Lanes, from: usize, to: &mut [Block]);

    /// Adds blocks of keystream to the texts of as many lanes, from the lane `from`.
    fn add_blocks(self, texts: &mut Texts<'_, '_>, lanes: &Lanes, from: usize, blocks: &[Block]);

    /// Adds the keystream to the whole strips that `text` begins with. There is room in `blocks`
    /// for [`Self::LANES`] of its blocks.
    fn apply_strips(self, key: &[u32; 8], counter: u64, text: &mut [u8], blocks: &mut [Block]);

    /// The tag of every text, which is ciphertext. The texts' one-time keys begin the first blocks
    /// of `keys`.
    fn tags(self, keys: &[Block; LANES_MAX], texts: &Texts<'_, '_>) -> [[u8; TAG_LEN]; TEXTS_MAX];
}

/// A packet to work on.
pub(crate) struct Item<'a> {
    pub(crate) key: &'a [u32; 8],
    pub(crate) counter: u64,
    pub(crate) text: &'a mut [u8],
    pub(crate) tag: &'a mut [u8; TAG_LEN],
    /// Set when opening.
    pub(crate) verified: Option<&'a mut bool>,
}

impl Item<'_> {
    /// With the tag that the ciphertext should have: sealing writes it, opening compares.
    #[inline(always)]
    pub(crate) fn settle(&mut self, tag: &[u8; TAG_LEN]) {
        match &mut self.verified {
            Some(verdict) => **verdict = is_equal(self.tag, tag),
            None => *self.tag = *tag,
        }
    }

    /// Opening: what is not authentic leaves nothing behind.
    pub(crate) fn wipe_if_forged(&mut self) {
        if self.verified.as_deref() == Some(&false) {
            self.text.fill(0);
            self.tag.fill(0);
        }
    }
}

/// As [`crate::seal_batch`], by `engine`.
pub(crate) fn seal_batch(engine: impl Engine, jobs: &mut [SealJob<'_>]) {
    let items = jobs.iter_mut().filter_map(|job| {
        if job.packet.len() > TEXT_LEN_MAX + TAG_LEN {
            seal_by_ring(job);
            return None;
        }
        let (text, tag) = job.packet.split_last_chunk_mut()?;
        Some(Item { key: &job.key.0.words, counter: job.counter, text, tag, verified: None })
    });
    work(engine, items);
}

/// As [`crate::open_batch`], by `engine`.
pub(crate) fn open_batch(engine: impl Engine, jobs: &mut [OpenJob<'_>]) {
    let items = jobs.iter_mut().filter_map(|job| {
        job.verified = false;
        if job.packet.len() > TEXT_LEN_MAX + TAG_LEN {
            open_by_ring(job);
            return None;
        }
        let (text, tag) = job.packet.split_last_chunk_mut()?;
        let verified = Some(&mut job.verified);
        Some(Item { key: &job.key.0.words, counter: job.counter, text, tag, verified })
    });
    work(engine, items);
}

/// Seals or opens packets, in any number. Texts have at most [`TEXT_LEN_MAX`] bytes.
fn work<'a, E: Engine>(engine: E, items: impl Iterator<Item = Item<'a>>) {
    let mut sorted: ArrayVec<Item<'a>, SORTED_MAX> = ArrayVec::new();
    ROOM.with_borrow_mut(|room| {
        for item in items {
            sorted.push(item);
            if sorted.is_full() {
                room.work_on(engine, &mut sorted);
                sorted.clear();
            }
        }
        room.work_on(engine, &mut sorted);
        room.wipe();
    });
}

thread_local! {
    /// Clearing it for every batch would cost as much as a packet.
    static ROOM: RefCell<Room> = const { RefCell::new(Room::new()) };
}

/// What work on a group needs room for. No secret stays in it between batches.
struct Room {
    lanes: Lanes,
    /// The keystream of the first lanes, which begins with the blocks that give one-time keys.
    first: Blocks,
    /// The keystream of the others, in turn.
    blocks: Blocks,
    /// Whether anything was written to `blocks`.
    has_blocks: bool,
}

/// A block of keystream.
pub(crate) type Block = [u8; BLOCK_LEN];

/// Aligned, so that none lies across two cache lines.
#[repr(align(64))]
struct Blocks([Block; LANES_MAX]);

impl Room {
    const fn new() -> Self {
        Self {
            lanes: Lanes::new(),
            first: Blocks([[0; BLOCK_LEN]; LANES_MAX]),
            blocks: Blocks([[0; BLOCK_LEN]; LANES_MAX]),
            has_blocks: false,
        }
    }

    /// In groups.
    fn work_on<E: Engine>(&mut self, engine: E, items: &mut [Item<'_>]) {
        // Texts of a group share their lanes' time, so they should be of one length.
        if !items.is_sorted_by_key(|item| item.text.len()) {
            items.sort_unstable_by_key(|item| item.text.len());
        }
        for group in engine.work_on_long(items).chunks_mut(TEXTS_MAX) {
            self.work_on_group(engine, &mut Texts::new(group));
        }
    }

    fn work_on_group<E: Engine>(&mut self, engine: E, texts: &mut Texts<'_, '_>) {
        let Self { lanes, first: Blocks(first), blocks: Blocks(blocks), has_blocks } = self;
        lanes.fill::<E>(texts);
        // 1. The one-time keys. Text blocks that share their lanes wait.
        let mut from = 0;
        while from < texts.len() {
            engine.keystream(texts, lanes, from, &mut first[from..from + E::LANES]);
            from += E::LANES;
        }
        // 2. Opening: nothing is decrypted before its tag is known to be right or wrong.
        let opens = texts.items.first().is_some_and(|item| item.verified.is_some());
        if opens {
            let expected = engine.tags(first, texts);
            for (item, expected) in texts.items.iter_mut().zip(&expected) {
                item.settle(expected);
            }
        }
        // 3. The texts.
        let count = texts.len();
        engine.add_blocks(texts, lanes, count, &first[count..from]);
        for item in &mut *texts.items {
            if item.text.len() >= E::LANES * BLOCK_LEN {
                engine.apply_strips(item.key, item.counter, item.text, blocks);
                *has_blocks = true;
            }
        }
        while from < lanes.len() {
            engine.keystream(texts, lanes, from, blocks);
            engine.add_blocks(texts, lanes, from, &blocks[..E::LANES]);
            *has_blocks = true;
            from += E::LANES;
        }
        // 4. Sealing: the tags of what is ciphertext now. Opening: what is not authentic goes.
        if opens {
            for item in &mut *texts.items {
                item.wipe_if_forged();
            }
        } else {
            let tags = engine.tags(first, texts);
            for (item, tag) in texts.items.iter_mut().zip(&tags) {
                item.settle(tag);
            }
        }
    }

    fn wipe(&mut self) {
        wipe(&mut self.first.0);
        if std::mem::take(&mut self.has_blocks) {
            wipe(&mut self.blocks.0);
        }
    }
}

/// The texts of a group with what encrypts them.
pub(crate) struct Texts<'g, 'a> {
    items: &'g mut [Item<'a>],
    common_key: Option<&'a [u32; 8]>,
}

impl<'g, 'a> Texts<'g, 'a> {
    /// Of at most [`TEXTS_MAX`] items.
    pub(crate) fn new(items: &'g mut [Item<'a>]) -> Self {
        let common_key = common_key(items);
        Self { items, common_key }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    #[inline]
    pub(crate) fn common_key(&self) -> Option<&'a [u32; 8]> {
        self.common_key
    }

    pub(crate) fn lens(&self) -> impl Iterator<Item = usize> {
        self.items.iter().map(|item| item.text.len())
    }

    /// The length of the shortest text.
    pub(crate) fn shortest(&self) -> usize {
        self.lens().fold(usize::MAX, usize::min)
    }

    /// The length of the longest text.
    pub(crate) fn longest(&self) -> usize {
        self.lens().fold(0, usize::max)
    }

    /// The text `nth`; of one that does not exist, an empty one.
    #[inline]
    pub(crate) fn get(&self, nth: usize) -> &[u8] {
        self.items.get(nth).map_or(&[], |item| &*item.text)
    }
}

/// Which block of which text each lane computes. Lanes up to the next multiple of [`LANES_MAX`] may
/// be computed, too; nobody uses what they give.
pub(crate) struct Lanes {
    len: usize,
    owners: [u8; GROUP_LANES_MAX],
    /// Block counters.
    blocks: [u32; GROUP_LANES_MAX],
    /// Low and high half of the packet counters.
    lows: [u32; GROUP_LANES_MAX],
    highs: [u32; GROUP_LANES_MAX],
}

impl Lanes {
    const fn new() -> Self {
        Self {
            len: 0,
            owners: [0; GROUP_LANES_MAX],
            blocks: [0; GROUP_LANES_MAX],
            lows: [0; GROUP_LANES_MAX],
            highs: [0; GROUP_LANES_MAX],
        }
    }

    /// Hands out the blocks of `texts` to the lanes of `E`.
    fn fill<E: Engine>(&mut self, texts: &Texts<'_, '_>) {
        let own = self.owners.iter_mut().zip(&mut self.blocks);
        let halves = self.lows.iter_mut().zip(&mut self.highs);
        for (nth, (item, ((owner, block), (low, high)))) in
            texts.items.iter().zip(own.zip(halves)).enumerate()
        {
            (*owner, *block) = (nth as u8, 0);
            (*low, *high) = (item.counter as u32, (item.counter >> 32) as u32);
        }
        self.len = texts.len();
        for (owner, item) in texts.items.iter().enumerate() {
            let in_strips = item.text.len() / (E::LANES * BLOCK_LEN) * E::LANES;
            let count = item.text.len().div_ceil(BLOCK_LEN) - in_strips;
            // The first block of a text has the counter 1.
            self.push(owner, in_strips as u32 + 1, count, item.counter);
        }
    }

    /// Hands out `count` blocks of a text.
    #[inline]
    fn push(&mut self, owner: usize, first_block: u32, count: usize, counter: u64) {
        let end = self.len + count;
        let mut block = first_block;
        // A fixed number at once is a store each; what is too much the next text writes over.
        for at in (self.len..end).step_by(LANES_AT_ONCE) {
            let lanes = at..at + LANES_AT_ONCE;
            self.owners[lanes.clone()].fill(owner as u8);
            self.blocks[lanes.clone()].copy_from_slice(&[block, block + 1, block + 2, block + 3]);
            self.lows[lanes.clone()].fill(counter as u32);
            self.highs[lanes].fill((counter >> 32) as u32);
            block += LANES_AT_ONCE as u32;
        }
        self.len = end;
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// State words 4 to 11 of `N` lanes: the keys of their texts, word by word.
    #[inline]
    pub(crate) fn keys<const N: usize>(&self, texts: &Texts<'_, '_>, from: usize) -> [[u32; N]; 8] {
        let mut words = [[0; N]; 8];
        for nth in 0..N {
            // A lane that does not exist may name a text of an earlier group: then any key does.
            let Some(item) = texts.items.get(self.owner(from + nth)) else { continue };
            for (words, word) in words.iter_mut().zip(item.key) {
                words[nth] = *word;
            }
        }
        words
    }

    /// Whose block the lane computes.
    #[inline]
    fn owner(&self, lane: usize) -> usize {
        self.owners[lane].into()
    }

    /// State words 12, 14 and 15 of `N` lanes; word 13 is zero in WireGuard's nonces.
    #[inline]
    pub(crate) fn words<const N: usize>(&self, from: usize) -> [&[u32; N]; 3] {
        [&self.blocks, &self.lows, &self.highs].map(|words| {
            let (words, _) = words[from..].as_chunks();
            &words[0]
        })
    }

    /// The part of a text that begins with the block of `lane`.
    #[inline]
    pub(crate) fn rest_of_text<'t>(
        &self,
        texts: &'t mut Texts<'_, '_>,
        lane: usize,
    ) -> &'t mut [u8] {
        let at = (self.blocks[lane] as usize - 1) * BLOCK_LEN;
        &mut texts.items[self.owner(lane)].text[at..]
    }
}

/// The key, if all texts have the same. (They are compared by place: no key is looked at.)
pub(crate) fn common_key<'a>(items: &[Item<'a>]) -> Option<&'a [u32; 8]> {
    let first = items.first()?.key;
    items.iter().all(|item| std::ptr::eq(item.key, first)).then_some(first)
}

/// Without a branch: a comparison that ends early would tell how much of a forged tag is right.
fn is_equal(a: &[u8; TAG_LEN], b: &[u8; TAG_LEN]) -> bool {
    black_box(u128::from_ne_bytes(*a) ^ u128::from_ne_bytes(*b)) == 0
}

/// Whole registers at a time: byte by byte would cost as much as a packet.
fn wipe(blocks: &mut [Block]) {
    blocks.fill([0; BLOCK_LEN]);
    // The compiler must not know that nobody reads this.
    black_box(blocks);
}

#[cfg(test)]
mod tests;
