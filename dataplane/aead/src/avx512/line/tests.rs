//! Every pass of many lines against a list of all their blocks.

use std::io::{Write, stderr};

use super::*;
use crate::TAG_LEN;
use crate::avx512::Avx512;

/// A block as a list has it.
struct Listed {
    text: usize,
    /// None if it is a part of a block.
    place: Option<usize>,
    is_last: bool,
}

#[target_feature(enable = "avx512f,avx512bw,avx512vpopcntdq")]
fn check(lens: &[usize], first: usize) {
    let key = [7; 8];
    let mut texts: Vec<Vec<u8>> = lens.iter().map(|len| vec![7; *len]).collect();
    let mut tags = vec![[0; TAG_LEN]; lens.len()];
    let mut items: Vec<Item<'_>> = texts
        .iter_mut()
        .zip(&mut tags)
        .map(|(text, tag)| Item { key: &key, counter: 0, text, tag, verified: None })
        .collect();
    let mut blocks = Vec::new();
    for text in (first..lens.len()).chain(0..first) {
        let at = items[text].text.as_ptr().addr();
        blocks.extend((0..lens[text]).step_by(BLOCK_LEN).map(|from| Listed {
            text,
            place: (from + BLOCK_LEN <= lens[text]).then_some(at + from),
            is_last: from + BLOCK_LEN >= lens[text],
        }));
    }
    let mut line = Line::<8>::new();
    line.fill(first, &mut items);
    let mut done = 0;
    for pass in blocks.chunks(LANES) {
        assert!(line.take(&items), "{lens:?}");
        let parts: Vec<usize> = line.parts.iter().map(Place::exposed).collect();
        let mut taken = Vec::new();
        for (lane, place) in line.places().into_iter().flatten().copied().enumerate() {
            match pass.get(lane) {
                Some(Listed { place: Some(whole), .. }) => assert_eq!(place, *whole, "{lens:?}"),
                Some(_) => {
                    assert!(parts.contains(&place) && !taken.contains(&place), "{lens:?}");
                    taken.push(place);
                }
                None => assert_eq!(place, line.nobody.exposed(), "lane {lane}, {lens:?}"),
            }
        }
        assert_eq!(line.last_text(), pass.last().unwrap().text, "{lens:?}");
        for text in 0..lens.len() {
            assert_eq!(line.is_in_pass(text), pass.iter().any(|block| block.text == text));
        }
        done += pass.iter().filter(|block| block.is_last).count();
        assert_eq!(line.give_back(&mut items), done);
    }
    assert!(!line.take(&items));
    *line.nobody.0.get_mut() = [1; BLOCK_LEN];
    line.wipe();
    assert!(line.keys.as_flattened().iter().all(|word| *word == 0));
    for place in line.parts.iter_mut().chain([&mut line.nobody]) {
        assert_eq!(*place.0.get_mut(), [0; BLOCK_LEN]);
    }
}

#[test]
fn lines_are_as_counted_one_by_one() {
    if Avx512::detect().is_none() {
        stderr().write_all(b"lines are not tested: this CPU lacks a part of AVX-512\n").unwrap();
        return;
    }
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) as usize % below
    };
    for _ in 0..2000 {
        let count = 1 + random(SORTED_MAX);
        let spread = [1, 64, 600, 3000, 65_025][random(5)];
        let base = long::LEN_MIN + BLOCK_LEN * random(20) * usize::from(spread < 5000);
        let mut lens: Vec<usize> = (0..count).map(|_| base + random(spread)).collect();
        if random(3) == 0 {
            for len in &mut lens {
                *len = len.next_multiple_of(BLOCK_LEN);
            }
        }
        let first = if random(2) == 0 { 0 } else { random(count) };
        // SAFETY: the CPU has what the back-end needs.
        unsafe { check(&lens, first) };
    }
}
