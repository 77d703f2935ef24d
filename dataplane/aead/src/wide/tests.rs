//! Poly1305 of every engine under one-time keys that no packet could be made to have: the vectors
//! of RFC 8439 section A.3, values next to the prime, and limbs as large as they get.
//!
//! Engines make tags of whole packets, with the padding and the length of RFC 8439 section 2.8, so
//! the vectors' own tags prove the oracle, and the oracle says what their texts give as packets.

use std::io::{Write, stderr};

use poly1305::Poly1305;
use poly1305::universal_hash::{KeyInit, UniversalHash};

use super::*;
#[cfg(target_arch = "x86_64")]
use crate::{
    avx2::Avx2,
    avx512::{Avx512, LONG_LEN_MIN, tag_alone},
};

type OneTimeKey = [u8; 32];
type Tag = [u8; TAG_LEN];

/// Texts side by side: alone, few, one chain of lanes, one and a text, and a full group.
const COUNTS: [usize; 6] = [1, 2, 4, 8, 9, TEXTS_MAX];

/// The largest r, clamped as it is.
const R_MAX: [u8; 16] =
    [255, 255, 255, 15, 252, 255, 255, 15, 252, 255, 255, 15, 252, 255, 255, 15];

fn one_time_key(r: [u8; 16], s: [u8; 16]) -> OneTimeKey {
    let mut key = [0; 32];
    key[..16].copy_from_slice(&r);
    key[16..].copy_from_slice(&s);
    key
}

fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits.chars().filter_map(|c| Some(c.to_digit(16)? as u8)).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// By RustCrypto.
fn expected(key: &OneTimeKey, text: &[u8]) -> Tag {
    let mut poly = Poly1305::new(key.into());
    poly.update_padded(text);
    let mut lengths = [0; 16];
    lengths[8..].copy_from_slice(&(text.len() as u64).to_le_bytes());
    poly.update_padded(&lengths);
    poly.finalize().into()
}

fn tags_of(engine: impl Engine, packets: &mut [(OneTimeKey, Vec<u8>)]) -> Vec<Tag> {
    // What is behind the one-time key in its block must not matter.
    let mut keys = [[0x99; BLOCK_LEN]; LANES_MAX];
    let mut tags = [[0; TAG_LEN]; TEXTS_MAX];
    let items = packets.iter_mut().zip(&mut keys).zip(&mut tags);
    let mut items: ArrayVec<Item<'_>, TEXTS_MAX> = items
        .map(|(((key, text), block), tag)| {
            block[..32].copy_from_slice(key);
            Item { key: &[0; 8], counter: 0, text, tag, verified: None }
        })
        .collect();
    let texts = Texts::new(&mut items);
    engine.tags(&keys, &texts)[..texts.len()].to_vec()
}

/// Long texts in pairs, by rounds or alone: their tags.
#[cfg(target_arch = "x86_64")]
fn tags_in_pairs(
    engine: Avx512,
    packets: &mut [(OneTimeKey, Vec<u8>)],
    in_rounds: bool,
) -> Vec<Tag> {
    let mut tags = vec![[0; TAG_LEN]; packets.len()];
    let mut keys = vec![[0x99; BLOCK_LEN]; packets.len()];
    let mut items: Vec<Item<'_>> = packets
        .iter_mut()
        .zip(&mut keys)
        .zip(&mut tags)
        .map(|(((key, text), block), tag)| {
            block[..32].copy_from_slice(key);
            Item { key: &[0; 8], counter: 0, text, tag, verified: None }
        })
        .collect();
    engine.tags_in_pairs(&mut items, &keys, in_rounds);
    tags
}

/// Compares the tags of a group, by every engine that runs here.
fn check(mut packets: Vec<(OneTimeKey, Vec<u8>)>, what: &str) {
    let expected: Vec<Tag> = packets.iter().map(|(key, text)| expected(key, text)).collect();
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(engine) = Avx2::detect() {
            assert_eq!(tags_of(engine, &mut packets), expected, "avx2, {what}");
        }
        if let Some(engine) = Avx512::detect() {
            assert_eq!(tags_of(engine, &mut packets), expected, "avx512, {what}");
            let alone = packets.iter().map(|(key, text)| tag_alone(key, text)).collect::<Vec<_>>();
            assert_eq!(alone, expected, "one text alone, {what}");
            let in_pairs = packets.len() / 2 * 2;
            let shortest = packets.iter().map(|(_, text)| text.len()).min();
            if in_pairs > 0 && shortest.is_some_and(|len| len >= LONG_LEN_MIN) {
                for in_rounds in [true, false] {
                    let tags = tags_in_pairs(engine, &mut packets[..in_pairs], in_rounds);
                    assert_eq!(tags, expected[..in_pairs], "pairs, in rounds {in_rounds}, {what}");
                }
            }
        }
    }
}

/// As [`check`], at every place of groups whose other texts have other keys and lengths.
fn check_at_all_places(key: OneTimeKey, text: &[u8], what: &str) {
    for count in COUNTS {
        for place in 0..count {
            let mut packets: Vec<(OneTimeKey, Vec<u8>)> = (0..count)
                .map(|nth| ([nth as u8 * 3 + 1; 32], vec![nth as u8; text.len() + nth % 4 * 7]))
                .collect();
            packets[place] = (key, text.to_vec());
            check(packets, &format!("{what}, place {place} of {count}"));
        }
    }
}

#[test]
fn engines_that_are_tested_here() {
    let mut line = "engines tested:".to_owned();
    #[cfg(target_arch = "x86_64")]
    for (name, here) in [("avx2", Avx2::detect().is_some()), ("avx512", Avx512::detect().is_some())]
    {
        line += if here { " " } else { " NOT " };
        line += name;
    }
    stderr().write_all((line + "\n").as_bytes()).unwrap();
}

#[test]
fn vectors_of_the_rfc() {
    const TEXT: &[u8] =
        b"Any submission to the IETF intended by the Contributor for publication as \
        all or part of an IETF Internet-Draft or RFC and any statement made within the context of \
        an IETF activity is considered an \"IETF Contribution\". Such statements include oral \
        statements in IETF sessions, as well as written and electronic communications made at any \
        time or place, which are addressed to";
    let text = |digits: &str| hex(digits);
    let small = |low: u64, high: u64| {
        one_time_key((u128::from(high) << 64 | u128::from(low)).to_le_bytes(), [0; 16])
    };
    let mut s_max = small(2, 0);
    s_max[16..].fill(255);
    let key = |digits: &str| OneTimeKey::try_from(hex(digits)).unwrap();
    let vectors = [
        (
            "2.5.2",
            key("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b"),
            b"Cryptographic Forum Research Group".to_vec(),
            "a8061dc1305136c6c22b8baf0c0127a9",
        ),
        ("A.3 #1", [0; 32], vec![0; 64], "00000000000000000000000000000000"),
        (
            "A.3 #2",
            key("0000000000000000000000000000000036e5f6b5c5e06070f0efca96227a863e"),
            TEXT.to_vec(),
            "36e5f6b5c5e06070f0efca96227a863e",
        ),
        (
            "A.3 #3",
            key("36e5f6b5c5e06070f0efca96227a863e00000000000000000000000000000000"),
            TEXT.to_vec(),
            "f3477e7cd95417af89a6b8794c310cf0",
        ),
        (
            "A.3 #4",
            key("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0"),
            b"'Twas brillig, and the slithy toves\nDid gyre and gimble in the wabe:\n\
              All mimsy were the borogoves,\nAnd the mome raths outgrabe."
                .to_vec(),
            "4541669a7eaaee61e708dc7cbcc5eb62",
        ),
        ("A.3 #5", small(2, 0), vec![255; 16], "03000000000000000000000000000000"),
        (
            "A.3 #6",
            s_max,
            text("02000000000000000000000000000000"),
            "03000000000000000000000000000000",
        ),
        (
            "A.3 #7",
            small(1, 0),
            text(
                "ffffffffffffffffffffffffffffffff f0ffffffffffffffffffffffffffffff
                 11000000000000000000000000000000",
            ),
            "05000000000000000000000000000000",
        ),
        (
            "A.3 #8",
            small(1, 0),
            text(
                "ffffffffffffffffffffffffffffffff fbfefefefefefefefefefefefefefefe
                 01010101010101010101010101010101",
            ),
            "00000000000000000000000000000000",
        ),
        (
            "A.3 #9",
            small(2, 0),
            text("fdffffffffffffffffffffffffffffff"),
            "faffffffffffffffffffffffffffffff",
        ),
        (
            "A.3 #10",
            small(1, 4),
            text(
                "e33594d7505e43b90000000000000000 3394d7505e4379cd0100000000000000
                 00000000000000000000000000000000 01000000000000000000000000000000",
            ),
            "14000000000000005500000000000000",
        ),
        (
            "A.3 #11",
            small(1, 4),
            text(
                "e33594d7505e43b90000000000000000 3394d7505e4379cd0100000000000000
                 00000000000000000000000000000000",
            ),
            "13000000000000000000000000000000",
        ),
    ];
    for (name, key, text, tag) in vectors {
        let by_oracle = Poly1305::new(&key.into()).compute_unpadded(&text);
        assert_eq!(by_oracle.as_slice(), hex(tag), "the oracle, {name}");
        check_at_all_places(key, &text, name);
    }
}

/// With r = 1 the polynomial is the sum of the blocks, so it can be made any number around
/// 2^130 - 5, where the last subtraction happens or does not.
#[test]
fn values_next_to_the_prime() {
    for from_prime in -40..=40_i128 {
        // Two blocks and that of the length, 2^128 each: what is missing from 2^130 is one 2^128.
        let sum = (from_prime - 5).cast_unsigned().wrapping_sub(32 << 64);
        for first in [0, 1, u128::MAX / 3, sum, u128::MAX] {
            let second = sum.wrapping_sub(first);
            if first.checked_add(second).is_none() {
                // That sum is 2^128 more.
                continue;
            }
            let text = [first.to_le_bytes(), second.to_le_bytes()].concat();
            for s in [0, 1, u128::MAX] {
                let key = one_time_key(1_u128.to_le_bytes(), s.to_le_bytes());
                let value = if from_prime < 0 { from_prime - 5 } else { from_prime };
                let tag = value.cast_unsigned().wrapping_add(s);
                assert_eq!(expected(&key, &text), tag.to_le_bytes(), "{from_prime}");
                check_at_all_places(key, &text, &format!("2^130 - 5 + {from_prime}, s {s}"));
            }
        }
    }
}

#[test]
fn limbs_as_large_as_they_get() {
    let rs =
        [R_MAX, [255; 16], [0; 16], 4_u128.to_le_bytes(), (0xfff_fffc_u128 << 96).to_le_bytes()];
    for len in (0..=130).chain([255, 256, 257]).chain(512..=592).chain([
        1408,
        1424,
        4095,
        65_535,
        TEXT_LEN_MAX,
    ]) {
        for count in COUNTS {
            for byte in [0, 255, 0xfb] {
                let packets = (0..count)
                    .map(|nth| (one_time_key(rs[nth % rs.len()], [byte; 16]), vec![byte; len]))
                    .collect();
                check(packets, &format!("{count} texts of {len} bytes {byte}"));
            }
        }
    }
}
