//! Every back-end against `ring`: the same bytes, the same verdicts.

use millrace_aead::{Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN};
use proptest::prelude::*;

/// A batch: keys, and of each packet the key's place, the counter, its offset in its buffer and the
/// text.
#[derive(Clone, Debug)]
struct Batch {
    keys: Vec<[u8; 32]>,
    packets: Vec<(prop::sample::Index, u64, usize, Vec<u8>)>,
}

fn text(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed) ^ (at >> 8) as u8).collect()
}

fn lens() -> impl Strategy<Value = usize> {
    prop_oneof![
        8 => 0..200_usize,
        4 => 0..2000_usize,
        2 => prop::sample::select(vec![
            0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 1408, 1420, 1424, 2047,
            2048, 2049,
        ]),
        1 => 0..=65_535_usize,
    ]
}

fn batches() -> impl Strategy<Value = Batch> {
    let keys = prop_oneof![3 => 1..2_usize, 1 => 2..6_usize];
    let count = prop_oneof![1..=3_usize, 4..=20_usize, 60..=70_usize, 1..=256_usize];
    let packet = || {
        (any::<prop::sample::Index>(), any::<u64>(), 0..64_usize, lens(), any::<u8>())
            .prop_map(|(key, counter, offset, len, seed)| (key, counter, offset, text(len, seed)))
    };
    let equal = (count.clone(), packet()).prop_map(|(count, packet)| vec![packet; count]);
    let mixed = count.prop_flat_map(move |count| prop::collection::vec(packet(), count));
    (
        keys.prop_flat_map(|n| prop::collection::vec(any::<[u8; 32]>(), n)),
        prop_oneof![1 => equal, 2 => mixed],
    )
        .prop_map(|(keys, packets)| Batch { keys, packets })
}

fn seal(backend: Backend, batch: &Batch) -> Vec<Vec<u8>> {
    let keys: Vec<SealingKey> = batch.keys.iter().map(|key| SealingKey::new(*key)).collect();
    let mut buffers: Vec<Vec<u8>> = batch
        .packets
        .iter()
        .map(|(_, _, offset, text)| {
            [vec![0xee; *offset], text.clone(), vec![0; TAG_LEN + 64]].concat()
        })
        .collect();
    let mut jobs: Vec<SealJob<'_>> = buffers
        .iter_mut()
        .zip(&batch.packets)
        .map(|(buffer, (key, counter, offset, text))| SealJob {
            key: key.get(&keys),
            counter: *counter,
            packet: &mut buffer[*offset..*offset + text.len() + TAG_LEN],
        })
        .collect();
    backend.seal_batch(&mut jobs);
    buffers
}

/// The verdicts, and the buffers afterwards.
fn open(backend: Backend, batch: &Batch, sealed: &[Vec<u8>]) -> (Vec<bool>, Vec<Vec<u8>>) {
    let keys: Vec<OpeningKey> = batch.keys.iter().map(|key| OpeningKey::new(*key)).collect();
    let mut buffers = sealed.to_vec();
    let mut jobs: Vec<OpenJob<'_>> = buffers
        .iter_mut()
        .zip(&batch.packets)
        .map(|(buffer, (key, counter, offset, text))| OpenJob {
            key: key.get(&keys),
            counter: *counter,
            packet: &mut buffer[*offset..*offset + text.len() + TAG_LEN],
            verified: true,
        })
        .collect();
    backend.open_batch(&mut jobs);
    let verdicts = jobs.iter().map(|job| job.verified).collect();
    (verdicts, buffers)
}

fn others() -> impl Iterator<Item = Backend> {
    Backend::ALL.into_iter().filter(|backend| *backend != Backend::Ring && backend.is_available())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn all_seal_and_open_as_ring_does(
        batch in batches(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..4),
    ) {
        let sealed = seal(Backend::Ring, &batch);
        let mut damaged = sealed.clone();
        for (packet, bit) in damage {
            let nth = packet.index(batch.packets.len());
            let (_, _, offset, text) = &batch.packets[nth];
            let bit = bit.index((text.len() + TAG_LEN) * 8);
            damaged[nth][offset + bit / 8] ^= 1 << (bit % 8);
        }
        let opened = open(Backend::Ring, &batch, &damaged);
        for backend in others() {
            let seen = seal(backend, &batch);
            for (nth, (seen, expected)) in seen.iter().zip(&sealed).enumerate() {
                prop_assert!(seen == expected, "{backend} seals packet {nth} differently");
            }
            prop_assert!(open(backend, &batch, &damaged) == opened, "{backend} opens differently");
        }
    }
}
