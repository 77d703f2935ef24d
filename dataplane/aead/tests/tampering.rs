//! A packet of which anything at all was changed is refused, leaves no plaintext behind, and does
//! not disturb its neighbours.

mod common;

use common::{backends, open_in_crowd, seal_in_crowd, text};
use millrace_aead::{Backend, OpenJob, OpeningKey};

const KEY: [u8; 32] = [0x42; 32];
const COUNTER: u64 = 0x0123_4567_89ab_cdef;
/// Of texts: below, at and above the blocks of Poly1305 and ChaCha20, and a full packet.
const LENS: [usize; 8] = [0, 1, 15, 16, 17, 64, 100, 1424];
/// A bad packet in the first, a middle and the last place; batches of one group and of two, and so
/// many that long texts are worked on in pairs, which the last one is not part of.
const CROWDS: [(usize, usize); 7] = [(1, 0), (3, 1), (9, 8), (18, 17), (32, 0), (33, 9), (40, 39)];

fn sealed(len: usize) -> Vec<u8> {
    seal_in_crowd(Backend::Ring, KEY, COUNTER, &text(len, 1), (1, 0))
}

fn assert_refused(backend: Backend, bad: &[u8], crowd: (usize, usize), what: &str) {
    let (verdict, left) = open_in_crowd(backend, KEY, COUNTER, bad, crowd);
    assert!(!verdict, "{backend} opens {} bytes in {crowd:?}: {what}", bad.len());
    assert!(left.iter().all(|&byte| byte == 0), "{backend} leaves something: {what}, {left:02x?}");
}

#[test]
fn any_single_bit_changed_is_refused() {
    for backend in backends() {
        for len in LENS {
            let good = sealed(len);
            for crowd in CROWDS {
                assert!(open_in_crowd(backend, KEY, COUNTER, &good, crowd).0, "{backend}, {len}");
            }
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                // Every bit once; in long packets the batches take turns.
                let crowds = if len > 100 { &CROWDS[bit % CROWDS.len()..][..1] } else { &CROWDS };
                for &crowd in crowds {
                    assert_refused(backend, &bad, crowd, &format!("bit {bit} of text {len}"));
                }
            }
        }
    }
}

#[test]
fn any_bit_of_key_and_counter_matters() {
    for backend in backends() {
        for len in [0, 17, 1424] {
            let good = sealed(len);
            for crowd in [(1, 0), (9, 8)] {
                for bit in 0..64 {
                    let other = COUNTER ^ 1 << bit;
                    let (verdict, left) = open_in_crowd(backend, KEY, other, &good, crowd);
                    assert!(!verdict && left.iter().all(|&byte| byte == 0), "{backend}, {bit}");
                }
                for bit in 0..256 {
                    let mut other = KEY;
                    other[bit / 8] ^= 1 << (bit % 8);
                    let (verdict, left) = open_in_crowd(backend, other, COUNTER, &good, crowd);
                    assert!(!verdict && left.iter().all(|&byte| byte == 0), "{backend}, {bit}");
                }
            }
        }
    }
}

#[test]
fn a_packet_cut_or_prolonged_is_refused() {
    for backend in backends() {
        let good = sealed(100);
        for len in 0..good.len() {
            // Below a tag's length there is nothing to verify, and the bytes stay as they are.
            let (verdict, left) = open_in_crowd(backend, KEY, COUNTER, &good[..len], (9, 4));
            assert!(!verdict, "{backend} opens the first {len} bytes");
            assert!(len < 16 || left.iter().all(|&byte| byte == 0), "{backend}, {len}");
        }
        // Poly1305 pads with zeros, so a text prolonged by zeros differs in its length alone.
        for more in 1..=64 {
            let mut longer = good[..100].to_vec();
            longer.resize(100 + more, 0);
            longer.extend_from_slice(&good[100..]);
            assert_refused(backend, &longer, (9, 4), &format!("{more} zeros more"));
        }
    }
}

#[test]
fn tags_of_other_packets_are_refused() {
    for backend in backends() {
        for count in [2, 8, 16, 33] {
            let mut packets: Vec<Vec<u8>> = (0..count)
                .map(|nth| seal_in_crowd(Backend::Ring, KEY, nth, &text(64, nth), (1, 0)))
                .collect();
            let tags: Vec<Vec<u8>> = packets.iter().map(|packet| packet[64..].to_vec()).collect();
            for (nth, packet) in packets.iter_mut().enumerate() {
                packet[64..].copy_from_slice(&tags[(nth + 1) % tags.len()]);
            }
            let key = OpeningKey::new(KEY);
            let mut jobs: Vec<_> = packets
                .iter_mut()
                .zip(0..)
                .map(|(packet, counter)| OpenJob { key: &key, counter, packet, verified: true })
                .collect();
            backend.open_batch(&mut jobs);
            for job in &jobs {
                assert!(!job.verified && job.packet.iter().all(|&byte| byte == 0), "{backend}");
            }
        }
    }
}
