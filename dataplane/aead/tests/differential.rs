//! Every back-end against `ring`: the same bytes, the same verdicts.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{backends, text};
use millrace_aead::{
    Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN, open_batch, seal_batch,
};
use proptest::prelude::*;

/// Room behind every packet, which must stay as it is.
const BEHIND: usize = 64;
/// What stands there, and before the packet.
const AROUND: u8 = 0xee;

#[derive(Clone, Debug)]
struct Packet {
    /// Which of the batch's keys, modulo their number.
    key: usize,
    counter: u64,
    /// Where it begins in its buffer.
    offset: usize,
    len: usize,
    /// Of its text.
    seed: u64,
}

#[derive(Clone, Debug)]
struct Batch {
    keys: Vec<[u8; 32]>,
    packets: Vec<Packet>,
}

impl Batch {
    /// Packets of these lengths and offsets, with `keys` different keys.
    fn new(keys: usize, packets: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let packet = |(nth, (len, offset)): (usize, _)| Packet {
            key: nth,
            counter: nth as u64 * 0x0f0f_0f0f_0f0f,
            offset,
            len,
            seed: nth as u64,
        };
        Self {
            keys: (0..keys).map(|nth| [nth as u8; 32]).collect(),
            packets: packets.into_iter().enumerate().map(packet).collect(),
        }
    }

    fn plain(&self) -> Vec<Vec<u8>> {
        let buffers = self.packets.iter().map(|packet| {
            let mut buffer = vec![AROUND; packet.offset + packet.len + TAG_LEN + BEHIND];
            buffer[packet.offset..][..packet.len].copy_from_slice(&text(packet.len, packet.seed));
            buffer
        });
        buffers.collect()
    }

    /// The buffers afterwards.
    fn sealed(&self, seal_batch: impl Fn(&mut [SealJob<'_>])) -> Vec<Vec<u8>> {
        let keys: Vec<SealingKey> = self.keys.iter().map(|key| SealingKey::new(*key)).collect();
        let mut buffers = self.plain();
        let mut jobs: Vec<SealJob<'_>> = buffers
            .iter_mut()
            .zip(&self.packets)
            .map(|(buffer, packet)| SealJob {
                key: &keys[packet.key % keys.len()],
                counter: packet.counter,
                packet: &mut buffer[packet.offset..][..packet.len + TAG_LEN],
            })
            .collect();
        seal_batch(&mut jobs);
        buffers
    }

    /// The verdicts, and the buffers afterwards.
    fn opened(
        &self,
        open_batch: impl Fn(&mut [OpenJob<'_>]),
        sealed: &[Vec<u8>],
    ) -> (Vec<bool>, Vec<Vec<u8>>) {
        let keys: Vec<OpeningKey> = self.keys.iter().map(|key| OpeningKey::new(*key)).collect();
        let mut buffers = sealed.to_vec();
        let mut jobs: Vec<OpenJob<'_>> = buffers
            .iter_mut()
            .zip(&self.packets)
            .map(|(buffer, packet)| OpenJob {
                key: &keys[packet.key % keys.len()],
                counter: packet.counter,
                packet: &mut buffer[packet.offset..][..packet.len + TAG_LEN],
                verified: true,
            })
            .collect();
        open_batch(&mut jobs);
        (jobs.iter().map(|job| job.verified).collect(), buffers)
    }

    /// Seals, damages (a packet and a bit of it each, modulo their numbers), and opens, by `ring` and
    /// by all others.
    fn check(&self, others: &[Backend], damages: &[(usize, usize)]) {
        let sealed = self.sealed(|jobs| Backend::Ring.seal_batch(jobs));
        let mut damaged = sealed.clone();
        for (packet, bit) in damages {
            let nth = packet % self.packets.len();
            let Packet { offset, len, .. } = self.packets[nth];
            let bit = bit % ((len + TAG_LEN) * 8);
            damaged[nth][offset + bit / 8] ^= 1 << (bit % 8);
        }
        let opened = self.opened(|jobs| Backend::Ring.open_batch(jobs), &damaged);
        for backend in others {
            self.assert_same(&sealed, &self.sealed(|jobs| backend.seal_batch(jobs)), backend);
            let (verdicts, buffers) = self.opened(|jobs| backend.open_batch(jobs), &damaged);
            assert_eq!(verdicts, opened.0, "the verdicts of {backend}");
            self.assert_same(&opened.1, &buffers, backend);
        }
    }

    fn assert_same(&self, expected: &[Vec<u8>], seen: &[Vec<u8>], backend: &Backend) {
        for ((expected, seen), packet) in expected.iter().zip(seen).zip(&self.packets) {
            assert!(expected == seen, "{backend} does something else with {packet:?}");
        }
    }
}

fn others() -> Vec<Backend> {
    backends().into_iter().filter(|backend| *backend != Backend::Ring).collect()
}

#[test]
fn every_alignment() {
    let others = others();
    for offset in 0..64 {
        for len in [0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 500, 512, 1024, 1424, 2048, 2100] {
            for count in [1, 3, 17] {
                // Neighbours at other alignments.
                let packets = (0..count).map(|nth| (len, (offset + nth * 5) % 64));
                Batch::new(1, packets).check(&others, &[]);
            }
        }
    }
}

#[test]
fn every_length_of_a_datagram_and_more() {
    let others = others();
    for len in (0..=1500).chain((1501..=4200).step_by(7)) {
        Batch::new(1, [(len, 0)]).check(&others, &[]);
        Batch::new(1, [(len, 0); 16]).check(&others, &[]);
        Batch::new(2, (len..len + 17).map(|len| (len, 0))).check(&others, &[]);
    }
}

#[test]
fn every_batch_size() {
    let others = others();
    for count in 0..=256 {
        for len in [0, 64, 1424] {
            Batch::new(1, (0..count).map(|_| (len, 0))).check(&others, &[]);
        }
        Batch::new(256, (0..count).map(|nth| ((nth * 389) % 1500, 0))).check(&others, &[]);
    }
}

/// Long texts in such numbers are worked on in pairs: of each length that ends otherwise, with
/// partners that are longer, and of each number.
#[test]
fn many_long_packets() {
    let others = others();
    for len in 512..=512 + 5 * 64 {
        Batch::new(1, [(len, len); 24]).check(&others, &[]);
        Batch::new(3, (len..len + 25).map(|len| (len, 0))).check(&others, &[]);
    }
    for count in 16..=66 {
        for (keys, len) in [(1, 1024), (2, 1420), (count, 1424), (1, 2100)] {
            let damages = [(0, count), (count / 2, 7), (count - 1, 8 * len)];
            Batch::new(keys, (0..count).map(|nth| (len, nth % 64))).check(&others, &damages);
        }
        Batch::new(2, (0..count).map(|nth| (400 + (nth * 389) % 9000, nth % 64)))
            .check(&others, &[]);
    }
}

/// With few texts in vector lanes the tags of pairs come late, and have to be waited for.
#[test]
fn pairs_that_are_late() {
    let others = others();
    for len in (512..=2100).step_by(16) {
        for count in [16, 23, 29, 31] {
            Batch::new(1, (0..count).map(|_| (len, 0))).check(&others, &[(count - 1, 8 * len)]);
        }
    }
}

#[test]
fn lengths_beyond_those_of_packets() {
    let others = others();
    let lens = [65_534, 65_535, 65_536, 65_537, 70_000, 131_072];
    for len in lens {
        Batch::new(1, [(len, 1)]).check(&others, &[]);
    }
    Batch::new(3, lens.into_iter().chain([0, 1, 64]).map(|len| (len, 3))).check(&others, &[]);
}

#[test]
fn slices_shorter_than_a_tag_are_left_alone_between_others() {
    let (seal, open) = (SealingKey::new([5; 32]), OpeningKey::new([5; 32]));
    for backend in backends() {
        let lens: Vec<usize> =
            (0..40).map(|nth| if nth % 3 == 0 { nth % 16 } else { 80 }).collect();
        let mut packets: Vec<Vec<u8>> = lens.iter().map(|len| vec![7; *len]).collect();
        let mut jobs: Vec<SealJob<'_>> = packets
            .iter_mut()
            .zip(0..)
            .map(|(packet, counter)| SealJob { key: &seal, counter, packet })
            .collect();
        backend.seal_batch(&mut jobs);
        let mut jobs: Vec<OpenJob<'_>> = packets
            .iter_mut()
            .zip(0..)
            .map(|(packet, counter)| OpenJob { key: &open, counter, packet, verified: true })
            .collect();
        backend.open_batch(&mut jobs);
        for job in &jobs {
            let is_packet = job.packet.len() >= TAG_LEN;
            assert_eq!(job.verified, is_packet, "{backend}, {} bytes", job.packet.len());
            let text = if is_packet { &job.packet[..64] } else { &*job.packet };
            assert!(text.iter().all(|&byte| byte == 7), "{backend}, {} bytes", job.packet.len());
        }
    }
}

fn lens() -> impl Strategy<Value = usize> {
    let edges = vec![
        0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 1408, 1420,
        1424, 2047, 2048, 2049, 65_535,
    ];
    prop_oneof![
        8 => 0..200_usize,
        4 => 0..2000_usize,
        2 => prop::sample::select(edges),
        1 => 0..=65_535_usize,
    ]
}

/// Any, and those whose halves are next to a carry.
fn counters() -> impl Strategy<Value = u64> {
    let edges = vec![0, 1, 0xffff_fffe, 0xffff_ffff, 0x1_0000_0000, u64::MAX - 1, u64::MAX];
    prop_oneof![3 => any::<u64>(), 1 => prop::sample::select(edges)]
}

fn batches() -> impl Strategy<Value = Batch> {
    let keys = prop_oneof![3 => Just(1), 1 => 2..6_usize, 1 => Just(256)];
    let count = prop_oneof![1..=3_usize, 4..=20_usize, 60..=70_usize, 1..=256_usize];
    let packet = || {
        (any::<usize>(), counters(), 0..64_usize, lens(), any::<u64>()).prop_map(
            |(key, counter, offset, len, seed)| Packet { key, counter, offset, len, seed },
        )
    };
    let equal = (count.clone(), packet()).prop_map(|(count, packet)| vec![packet; count]);
    let mixed = count.prop_flat_map(move |count| prop::collection::vec(packet(), count));
    (
        keys.prop_flat_map(|count| prop::collection::vec(any::<[u8; 32]>(), count)),
        prop_oneof![1 => equal, 2 => mixed],
    )
        .prop_map(|(keys, packets)| Batch { keys, packets })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_batch(
        batch in batches(),
        damages in prop::collection::vec(any::<(usize, usize)>(), 0..4),
    ) {
        // Not `others`, which would say so 400 times.
        let all = Backend::ALL.into_iter().filter(|backend| backend.is_available());
        batch.check(&all.collect::<Vec<_>>(), &damages);
    }

    /// By whatever this CPU was measured to do best.
    #[test]
    fn any_batch_by_choice(batch in batches()) {
        let sealed = batch.sealed(|jobs| Backend::Ring.seal_batch(jobs));
        prop_assert!(batch.sealed(seal_batch) == sealed);
        let (verdicts, opened) = batch.opened(open_batch, &sealed);
        prop_assert!(verdicts.iter().all(|verdict| *verdict));
        for ((opened, plain), packet) in opened.iter().zip(batch.plain()).zip(&batch.packets) {
            let end = packet.offset + packet.len;
            prop_assert_eq!(&opened[..end], &plain[..end]);
        }
    }
}
