//! The Internet checksum (RFC 1071): a one's complement sum of 16-bit words.
//!
//! Sums are kept wide and unfolded in native byte order: the sum of swapped words is the swapped
//! sum (RFC 1071 section 2.B), so bytes are swapped never, only read and written natively.

use std::array;

/// An unfolded sum. Adding two is adding their texts, if the first text's length is even.
pub type Sum = u64;

/// The sum of `bytes`, as if it began at an even offset. A last odd byte is padded with zero.
pub fn sum(bytes: &[u8]) -> Sum {
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    let mut lanes = [0; LANES];
    for block in blocks {
        add_block(&mut lanes, block);
    }
    total(&lanes) + sum_rest(rest)
}

/// Copies `from` to the equally long `to` and returns the sum: one pass over memory.
pub fn copy_and_sum(from: &[u8], to: &mut [u8]) -> Sum {
    let (from_blocks, from_rest) = from.as_chunks::<BLOCK>();
    let (to_blocks, to_rest) = to.as_chunks_mut::<BLOCK>();
    let mut lanes = [0; LANES];
    for (from, to) in from_blocks.iter().zip(to_blocks) {
        *to = *from;
        add_block(&mut lanes, from);
    }
    to_rest.copy_from_slice(from_rest);
    total(&lanes) + sum_rest(from_rest)
}

/// The part of a TCP or UDP sum that the IP header gives: addresses, protocol, length.
pub fn pseudo_header(addresses: &[u8], protocol: u8, len: usize) -> Sum {
    // Both IP versions sum to the same form: one word of protocol, the length as two words.
    sum(addresses) + native(u16::from(protocol)) + native((len >> 16) as u16) + native(len as u16)
}

/// A big-endian word's share of a sum.
pub fn native(word: u16) -> Sum {
    Sum::from(word.to_be())
}

/// Folds to 16 bits, in native order: what stands in a field of a partial checksum.
pub fn fold(sum: Sum) -> [u8; 2] {
    let mut sum = (sum >> 32) + (sum & 0xffff_ffff);
    for _ in 0..3 {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (sum as u16).to_ne_bytes()
}

/// The finished checksum of a text whose checksum field counted as zero.
pub fn finish(sum: Sum) -> [u8; 2] {
    fold(sum).map(|byte| !byte)
}

/// As [`finish`], but never zero, which in UDP means "none" (RFC 768). The same value in TCP.
pub fn finish_nonzero(sum: Sum) -> [u8; 2] {
    match finish(sum) {
        [0, 0] => [0xff, 0xff],
        field => field,
    }
}

/// Whether a text with its checksum field in it verifies.
pub fn verifies(sum: Sum) -> bool {
    fold(sum) == [0xff, 0xff]
}

/// Updates a finished checksum for one changed word (RFC 1624 equation 3).
pub fn replace(field: &mut [u8; 2], old: [u8; 2], new: [u8; 2]) {
    let word = |bytes: [u8; 2]| Sum::from(u16::from_ne_bytes(bytes));
    let negated = |bytes: [u8; 2]| word(bytes.map(|byte| !byte));
    *field = finish(negated(*field) + negated(old) + word(new));
}

/// Four 32-bit words are one 128-bit register; two of them hide the latency of the addition.
const LANES: usize = 8;
const BLOCK: usize = 4 * LANES;

fn add_block(lanes: &mut [u64; LANES], block: &[u8; BLOCK]) {
    let (words, _) = block.as_chunks::<4>();
    let words: [u64; LANES] = array::from_fn(|i| u64::from(u32::from_ne_bytes(words[i])));
    for (lane, word) in lanes.iter_mut().zip(words) {
        *lane += word;
    }
}

fn total(lanes: &[u64; LANES]) -> Sum {
    lanes.iter().map(|lane| (lane >> 32) + (lane & 0xffff_ffff)).sum()
}

fn sum_rest(rest: &[u8]) -> Sum {
    let (words, odd) = rest.as_chunks::<2>();
    let even: Sum = words.iter().map(|&word| Sum::from(u16::from_ne_bytes(word))).sum();
    even + odd.first().map_or(0, |&byte| Sum::from(u16::from_ne_bytes([byte, 0])))
}
