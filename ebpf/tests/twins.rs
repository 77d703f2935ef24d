//! The C rule, run by the kernel, and its Rust twin say the same of every input. Needs root.

mod common;

use aya::programs::Xdp;
use millrace_ebpf::class::{classify, classify_head};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// What C says.
fn c_class(program: &Xdp, head: [u8; 8], length: u32) -> u32 {
    let mut input = length.to_ne_bytes().to_vec();
    input.extend(head);
    // The kernel wants an Ethernet header's worth at least.
    input.extend([0; 8]);
    common::run(program, &input).0
}

fn assert_agree(program: &Xdp, head: [u8; 8], length: u32) {
    let rust = classify_head(head, length as usize) as u32;
    let c = c_class(program, head, length);
    // A payload shorter than the head has no head; the whole-payload form must say so too.
    assert_eq!(c, if length < 8 { 0 } else { rust }, "head {head:02x?} length {length}");
    let whole = common::payload(&head, length as usize);
    assert_eq!(c, classify(&whole) as u32, "whole payload, head {head:02x?} length {length}");
}

/// Heads that each protocol begins with.
fn known_heads() -> Vec<[u8; 8]> {
    let mut heads = vec![
        [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac, 1, 2],
        [0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42],
        [0x3f, 0xff, 0, 0, 0x21, 0x12, 0xa4, 0x42],
        [0, 0, 0x7a, 0x11, 0, 0, 1, 0],
        [0, 0, 0x7a, 0x12, 0, 0, 1, 0],
        [0x01, 0x80, 0x7a, 0x12, 0x21, 0x12, 0xa4, 0x42],
        [0; 8],
        [0xff; 8],
    ];
    for kind in 0..=5 {
        heads.push([kind, 0, 0, 0, 1, 2, 3, 4]);
        heads.push([kind, 0, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
    }
    heads
}

#[test]
fn twins_agree_on_every_single_bit_flip_of_every_protocol_at_every_boundary_length() {
    let ebpf = common::twin("twin_classify");
    let program = common::twin_program(&ebpf, "twin_classify");
    let around = |length: u32| [length - 1, length, length + 1];
    let lengths: Vec<u32> = [8, 20, 32, 62, 64, 92, 148].into_iter().flat_map(around).collect();
    let mut classes = std::collections::HashSet::new();
    for head in known_heads() {
        for length in lengths.iter().copied().chain([0, 1500, 65507]) {
            assert_agree(program, head, length);
            classes.insert(classify_head(head, length as usize) as u32);
        }
        for bit in 0..64 {
            let flipped = (u64::from_be_bytes(head) ^ 1 << bit).to_be_bytes();
            for length in [20, 62, 64, 92, 148] {
                assert_agree(program, flipped, length);
            }
        }
    }
    assert_eq!(classes.len(), 6, "the inputs must reach every class");
}

#[test]
fn twins_agree_on_random_inputs() {
    let ebpf = common::twin("twin_classify");
    let program = common::twin_program(&ebpf, "twin_classify");
    let heads = prop_oneof![
        any::<[u8; 8]>(),
        (0..6u8, any::<[u8; 4]>()).prop_map(|(kind, [a, b, c, d])| [kind, 0, 0, 0, a, b, c, d]),
        (any::<[u8; 4]>()).prop_map(|[a, b, c, d]| [a, b, c, d, 0x21, 0x12, 0xa4, 0x42]),
        (any::<[u8; 6]>()).prop_map(|[a, b, c, d, e, f]| [a, b, 0x7a, 0x10 | c & 3, d, e, f, 0]),
    ];
    let lengths = prop_oneof![0..200u32, 0..65508u32];
    TestRunner::new(Config { cases: 20_000, failure_persistence: None, ..Config::default() })
        .run(&(heads, lengths), |(head, length)| {
            assert_agree(program, head, length);
            Ok(())
        })
        .expect("the twins agree");
}
