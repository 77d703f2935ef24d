//! Many long texts: most of them (48 of 64) go in pairs through the integer half of the CPU, which
//! works on their Poly1305 inside of the rounds that encrypt other blocks (`woven`); the rest goes
//! side by side through vector lanes (`poly`), because the integer half alone is too slow for all.
//!
//! Constant time: what is worked on when depends on lengths, and on which keys lie where.

use std::arch::x86_64::*;
use std::hint::black_box;

use crate::wide::{BLOCK_LEN, Block, Item, LANES_MAX, SORTED_MAX, Texts, common_key};

use super::chacha::{self, Fixed, LANES, SET, State};
use super::line::Line;
use super::pairs::{Pairs, Runs};
use super::poly;

/// Bytes that a text has to have.
pub(super) const LEN_MIN: usize = 512;
/// Texts that make it pay, as measured on Zen 4: fewer leave lanes of Poly1305 empty.
const COUNT_MIN: usize = 24;
/// Texts of this length pay in smaller numbers.
const LONGER_LEN_MIN: usize = 1024;
const LONGER_COUNT_MIN: usize = 16;

/// Texts in vector lanes, which hide each other's waiting; half of them, if there are few.
const IN_LANES: usize = 16;

/// How many texts, of those that are sorted by length, are worked on here: those at the end, or none.
pub(super) fn count(items: &[Item<'_>]) -> usize {
    // Short packets should not pay for this.
    if items.last().is_none_or(|longest| longest.text.len() < LEN_MIN) {
        return 0;
    }
    let at_least = |len| items.len() - items.partition_point(|item| item.text.len() < len);
    match (at_least(LEN_MIN), at_least(LONGER_LEN_MIN)) {
        (long, _) if long >= COUNT_MIN => long,
        (_, longer) if longer >= LONGER_COUNT_MIN => longer,
        _ => 0,
    }
}

/// Seals or opens as many texts as [`count`] says.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512ifma,avx512vbmi2,avx512vpopcntdq,bmi2")]
pub(super) fn work(items: &mut [Item<'_>]) {
    // A batch for one peer has one key, and everything is a little cheaper then.
    match common_key(items) {
        Some(key) => work_with::<0>(items, key),
        None => work_with::<8>(items, &[0; 8]),
    }
}

/// With one `key` for all texts, or else with the texts' own keys.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512ifma,avx512vbmi2,avx512vpopcntdq,bmi2")]
fn work_with<const KEY_WORDS: usize>(items: &mut [Item<'_>], key: &[u32; 8]) {
    let opens = items.first().is_some_and(|item| item.verified.is_some());
    let in_lanes = if items.len() < 2 * IN_LANES { IN_LANES / 2 } else { IN_LANES };
    let in_pairs = (items.len() - in_lanes).next_multiple_of(2);
    let mut fixed = chacha::fixed_words_of(key);

    // 1. The one-time keys, and room behind them for what vector lanes want to see.
    let mut keys = [[0; BLOCK_LEN]; SORTED_MAX + LANES_MAX];
    one_time_keys(items, (KEY_WORDS == 0).then_some(&fixed), &mut keys);

    // 2. Opening: what is in vector lanes is decrypted first, so it has to be verified now. Pairs
    //    are verified on the way.
    if opens {
        tags_in_lanes(items, in_pairs, &keys);
    }

    // 3. The texts, thirty-two blocks at a time; in their rounds what can be of pairs whose
    //    ciphertext is there. Sealing begins with the pairs, opening ends with them.
    let mut line = Line::<KEY_WORDS>::new();
    line.fill(if opens { in_pairs } else { 0 }, items);
    let mut pairs = Pairs::new(if opens { in_pairs / 2 } else { 0 });
    let mut runs = Runs::new();
    let mut of_lanes = [fixed; 2];
    while line.take(items) {
        if opens {
            let last = line.last_text();
            if last < in_pairs {
                pairs.finish(items, &keys, last / 2 + 1);
            }
            debug_assert!(
                (0..in_pairs).all(|nth| !line.is_in_pass(nth) || pairs.settled() > nth / 2)
            );
        }
        pairs.take(items, &keys, &mut runs);
        line.write_keys(&mut of_lanes);
        let states = line.states(if KEY_WORDS == 0 { [&fixed; 2] } else { of_lanes.each_ref() });
        // SAFETY: the runs are new, of texts that live and that nobody changes before. The line was
        // filled with these texts, each long enough, and has not moved since its pass was taken, so its
        // places are whole blocks of texts, or its own.
        unsafe { chacha::add_woven::<KEY_WORDS>(&states, &runs, line.places()) };
        let done = line.give_back(items);
        if !opens {
            pairs.set_ready(done.min(in_pairs) / 2);
        }
        pairs.settle(items, &keys);
    }
    pairs.finish(items, &keys, in_pairs / 2);

    // 4. Sealing: the tags of what is in vector lanes. Opening: what is not authentic goes.
    if opens {
        for item in items {
            item.wipe_if_forged();
        }
    } else {
        tags_in_lanes(items, in_pairs, &keys);
    }
    keys.fill([0; BLOCK_LEN]);
    fixed = chacha::fixed_words_of(&[0; 8]);
    of_lanes = [fixed; 2];
    black_box((&mut keys, &mut fixed, &mut of_lanes));
    line.wipe();
    pairs.wipe();
}

/// The blocks that one-time keys begin (RFC 8439 section 2.6).
#[target_feature(enable = "avx512f")]
fn one_time_keys(items: &[Item<'_>], common: Option<&Fixed>, keys: &mut [Block]) {
    let (keys, _) = keys.as_chunks_mut::<SET>();
    let (pairs, _) = keys.as_chunks_mut::<2>();
    for (items, [to_first, to_second]) in items.chunks(LANES).zip(pairs) {
        let mut counters = [[0; LANES]; 2];
        for (lane, item) in items.iter().enumerate() {
            counters[0][lane] = item.counter as u32;
            counters[1][lane] = (item.counter >> 32) as u32;
        }
        let own;
        let [first, second] = match common {
            Some(common) => [common; 2],
            None => {
                own = fixed_words_of_lanes(items);
                own.each_ref()
            }
        };
        let block = _mm512_setzero_si512();
        let (lows, highs) = (counters[0].as_chunks().0, counters[1].as_chunks().0);
        let words =
            |set: usize| [block, chacha::load_words(&lows[set]), chacha::load_words(&highs[set])];
        let (first, second) = (State::of(first, words(0)), State::of(second, words(1)));
        chacha::two_sets(&first, &second, to_first, to_second);
    }
}

/// State words 0 to 11 of a lane for each text.
#[target_feature(enable = "avx512f")]
fn fixed_words_of_lanes(items: &[Item<'_>]) -> [Fixed; 2] {
    let mut words = [[[0; SET]; 8]; 2];
    for (items, words) in items.chunks(SET).zip(&mut words) {
        for (lane, item) in items.iter().enumerate() {
            for (words, word) in words.iter_mut().zip(item.key) {
                words[lane] = *word;
            }
        }
    }
    [chacha::fixed_words_from(&words[0]), chacha::fixed_words_from(&words[1])]
}

/// The tags of the texts from the text `first` on, by vector lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512ifma,avx512vbmi2")]
fn tags_in_lanes(items: &mut [Item<'_>], first: usize, keys: &[Block]) {
    let (items, keys) = (&mut items[first..], keys[first..].first_chunk::<LANES_MAX>());
    let Some(keys) = keys else { return };
    let tags = poly::tags(keys, &Texts::new(items));
    for (item, tag) in items.iter_mut().zip(&tags) {
        item.settle(tag);
    }
}
