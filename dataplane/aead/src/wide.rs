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

use crate::{BLOCK_LEN, TAG_LEN};

/// Texts of a group: as many as sixteen lanes of one-time keys, or twice eight lanes of Poly1305.
pub(crate) const TEXTS_MAX: usize = 16;
/// Longer packets do not exist; `ring` takes them.
pub(crate) const TEXT_LEN_MAX: usize = 65_536;
/// Packets that are sorted by length together. A data plane's batch is as long.
const SORTED_MAX: usize = 64;
/// The most that a back-end has.
const LANES_MAX: usize = 32;
/// A one-time key and less than a strip of every text, whose last block may be a part of one.
const GROUP_LANES_MAX: usize = TEXTS_MAX * (1 + LANES_MAX);

/// "expand 32-byte k" (RFC 8439 section 2.3).
pub(crate) const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// One vector instruction set.
pub(crate) trait Engine: Copy {
    /// ChaCha20 blocks at a time, at most 32.
    const LANES: usize;

    /// Writes the keystream of [`Self::LANES`] lanes, from the lane `from`.
    fn keystream(self, texts: &Texts<'_>, lanes: &Lanes, from: usize, to: &mut [[u8; BLOCK_LEN]]);

    /// Adds blocks of keystream to the texts of as many lanes, from the lane `from`.
    fn add_blocks(
        self,
        texts: &mut Texts<'_>,
        lanes: &Lanes,
        from: usize,
        blocks: &[[u8; BLOCK_LEN]],
    );

    /// Adds the keystream of [`Self::LANES`] lanes, from the lane `from`, to their texts.
    fn apply(self, texts: &mut Texts<'_>, lanes: &Lanes, from: usize);

    /// Adds the keystream to the whole strips that `text` begins with.
    fn apply_strips(self, key: &[u32; 8], counter: u64, text: &mut [u8]);

    /// The tag of every text, which is ciphertext.
    fn tags(self, keys: &KeyBlocks, texts: &Texts<'_>) -> [[u8; TAG_LEN]; TEXTS_MAX];
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

/// Seals or opens packets, in any number. Texts have at most [`TEXT_LEN_MAX`] bytes.
pub(crate) fn work<'a, E: Engine>(engine: E, items: impl Iterator<Item = Item<'a>>) {
    let mut sorted: ArrayVec<Item<'a>, SORTED_MAX> = ArrayVec::new();
    let mut items = items.fuse();
    ROOM.with_borrow_mut(|room| {
        loop {
            sorted.extend(items.by_ref().take(SORTED_MAX));
            if sorted.is_empty() {
                break;
            }
            // Texts of a group share their lanes' time, so they should be of one length.
            if !sorted.is_sorted_by_key(|item| item.text.len()) {
                sorted.sort_unstable_by_key(|item| item.text.len());
            }
            for group in sorted.chunks_mut(TEXTS_MAX) {
                room.work_on_group(engine, group);
            }
            sorted.clear();
        }
        wipe(&mut room.keys.0);
        wipe(&mut room.blocks);
    });
}

thread_local! {
    /// Clearing it for every batch would cost as much as a packet.
    static ROOM: RefCell<Room> = const { RefCell::new(Room::new()) };
}

/// What work on a group needs room for. No secret stays in it between batches.
struct Room {
    lanes: Lanes,
    keys: KeyBlocks,
    /// The keystream of the lanes with one-time keys.
    blocks: [[u8; BLOCK_LEN]; LANES_MAX],
}

impl Room {
    const fn new() -> Self {
        Self { lanes: Lanes::new(), keys: KeyBlocks::new(), blocks: [[0; BLOCK_LEN]; LANES_MAX] }
    }

    fn work_on_group<E: Engine>(&mut self, engine: E, group: &mut [Item<'_>]) {
        let Self { lanes, keys, blocks } = self;
        let mut texts = Texts::default();
        let mut tags: ArrayVec<&mut [u8; TAG_LEN], TEXTS_MAX> = ArrayVec::new();
        let mut verdicts: ArrayVec<&mut bool, TEXTS_MAX> = ArrayVec::new();
        for item in group {
            texts.push(item.key, item.counter, item.text);
            tags.push(item.tag);
            verdicts.extend(item.verified.as_deref_mut());
        }
        lanes.fill::<E>(&texts);
        // 1. The one-time keys. Text blocks that share their lanes wait.
        let mut from = 0;
        while from < texts.len() {
            engine.keystream(&texts, lanes, from, blocks);
            let left = texts.len() - from;
            for (key, block) in keys.0[from..].iter_mut().zip(&*blocks).take(left.min(E::LANES)) {
                *key = *block;
            }
            from += E::LANES;
        }
        // 2. Opening: nothing is decrypted before its tag is known to be right or wrong.
        let opens = !verdicts.is_empty();
        if opens {
            let expected = engine.tags(keys, &texts);
            for ((tag, expected), verdict) in tags.iter().zip(&expected).zip(&mut verdicts) {
                **verdict = is_equal(tag, expected);
            }
        }
        // 3. The texts.
        let count = texts.len();
        engine.add_blocks(&mut texts, lanes, count, &blocks[count - (from - E::LANES)..E::LANES]);
        for nth in 0..texts.len() {
            let (key, counter) = (texts.keys[nth], texts.counters[nth]);
            if texts.texts[nth].len() >= E::LANES * BLOCK_LEN {
                engine.apply_strips(key, counter, texts.texts[nth]);
            }
        }
        while from < lanes.len() {
            engine.apply(&mut texts, lanes, from);
            from += E::LANES;
        }
        // 4. Sealing: the tags of what is ciphertext now. Opening: what is not authentic goes.
        if opens {
            for (nth, _) in verdicts.iter().enumerate().filter(|(_, verdict)| !***verdict) {
                texts.texts[nth].fill(0);
                tags[nth].fill(0);
            }
        } else {
            for (tag, value) in tags.iter_mut().zip(engine.tags(keys, &texts)) {
                **tag = value;
            }
        }
    }
}

/// The texts of a group with what encrypts them.
#[derive(Default)]
pub(crate) struct Texts<'a> {
    keys: ArrayVec<&'a [u32; 8], TEXTS_MAX>,
    counters: ArrayVec<u64, TEXTS_MAX>,
    texts: ArrayVec<&'a mut [u8], TEXTS_MAX>,
}

impl<'a> Texts<'a> {
    fn push(&mut self, key: &'a [u32; 8], counter: u64, text: &'a mut [u8]) {
        self.keys.push(key);
        self.counters.push(counter);
        self.texts.push(text);
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.texts.len()
    }

    /// The key, if all texts have the same. (They are compared by place: no key is looked at.)
    #[inline]
    pub(crate) fn common_key(&self) -> Option<&'a [u32; 8]> {
        let first = *self.keys.first()?;
        self.keys.iter().all(|key| std::ptr::eq(*key, first)).then_some(first)
    }

    /// The text `nth`; of one that does not exist, an empty one.
    #[inline]
    pub(crate) fn get(&self, nth: usize) -> &[u8] {
        self.texts.get(nth).map_or(&[], |text| &**text)
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
    fn fill<E: Engine>(&mut self, texts: &Texts<'_>) {
        self.len = 0;
        for (owner, &counter) in texts.counters.iter().enumerate() {
            self.push(owner, 0, 1, counter);
        }
        for (owner, (text, &counter)) in texts.texts.iter().zip(&texts.counters).enumerate() {
            let in_strips = text.len() / (E::LANES * BLOCK_LEN) * E::LANES;
            let count = text.len().div_ceil(BLOCK_LEN) - in_strips;
            // The first block of a text has the counter 1.
            self.push(owner, in_strips as u32 + 1, count, counter);
        }
    }

    #[inline]
    fn push(&mut self, owner: usize, first_block: u32, count: usize, counter: u64) {
        let range = self.len..self.len + count;
        let lanes = self.owners[range.clone()]
            .iter_mut()
            .zip(&mut self.blocks[range.clone()])
            .zip(&mut self.lows[range.clone()])
            .zip(&mut self.highs[range.clone()])
            .zip(first_block..);
        for ((((to_owner, block), low), high), nth_block) in lanes {
            *to_owner = owner as u8;
            *block = nth_block;
            *low = counter as u32;
            *high = (counter >> 32) as u32;
        }
        self.len = range.end;
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// State words 4 to 11 of `N` lanes: the keys of their texts, word by word.
    #[inline]
    pub(crate) fn keys<const N: usize>(&self, texts: &Texts<'_>, from: usize) -> [[u32; N]; 8] {
        let mut words = [[0; N]; 8];
        for nth in 0..N {
            // A lane that does not exist may name a text of an earlier group: then any key does.
            let Some(key) = texts.keys.get(self.owner(from + nth)) else { continue };
            for (words, word) in words.iter_mut().zip(*key) {
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

    /// The part of a text that belongs to `lane` and to those behind it, up to the end of the text or
    /// to `count` lanes; and how many lanes these are, at least one.
    #[inline]
    pub(crate) fn run<'t>(
        &self,
        texts: &'t mut Texts<'_>,
        lane: usize,
        count: usize,
    ) -> (&'t mut [u8], usize) {
        let at = (self.blocks[lane] as usize - 1) * BLOCK_LEN;
        let text = &mut texts.texts[self.owner(lane)][at..];
        let len = text.len().min(count * BLOCK_LEN);
        (&mut text[..len], len.div_ceil(BLOCK_LEN).max(1))
    }
}

/// The block of each text that begins with its one-time key.
#[repr(align(64))]
pub(crate) struct KeyBlocks([[u8; BLOCK_LEN]; TEXTS_MAX]);

impl KeyBlocks {
    const fn new() -> Self {
        Self([[0; BLOCK_LEN]; TEXTS_MAX])
    }

    #[inline]
    pub(crate) fn block(&self, nth: usize) -> &[u8; BLOCK_LEN] {
        &self.0[nth]
    }
}

/// Without a branch: a comparison that ends early would tell how much of a forged tag is right.
fn is_equal(a: &[u8; TAG_LEN], b: &[u8; TAG_LEN]) -> bool {
    black_box(u128::from_ne_bytes(*a) ^ u128::from_ne_bytes(*b)) == 0
}

/// Whole registers at a time: byte by byte would cost as much as a packet.
fn wipe(blocks: &mut [[u8; BLOCK_LEN]]) {
    blocks.fill([0; BLOCK_LEN]);
    // The compiler must not know that nobody reads this.
    black_box(blocks);
}

#[cfg(test)]
mod tests;
