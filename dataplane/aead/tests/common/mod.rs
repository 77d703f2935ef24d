//! What these test programs share: the back-ends to test, and packets sealed and opened alone or
//! in the middle of a crowd.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(dead_code, reason = "no test program uses all of it")]

use std::io::{Write, stderr};

use millrace_aead::{Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN};

/// Batches of so many packets, with the place of the one that is looked at: each takes another way
/// through the back-ends (one set of lanes or two, texts one by one or side by side, full groups,
/// long texts in pairs and beside them).
pub(crate) const CROWDS: [(usize, usize); 8] =
    [(1, 0), (2, 1), (3, 0), (8, 7), (16, 4), (17, 16), (25, 24), (64, 40)];

/// Every back-end that runs here. Says which do not, past the capture of the test's output: nobody
/// should believe that they were tested.
pub(crate) fn backends() -> Vec<Backend> {
    let (here, missing): (Vec<_>, Vec<_>) =
        Backend::ALL.into_iter().partition(|backend| backend.is_available());
    let names = |list: &[Backend]| list.iter().map(|b| b.name()).collect::<Vec<_>>().join(", ");
    let mut line = format!("back-ends tested: {}", names(&here));
    if !missing.is_empty() {
        line += &format!("; NOT TESTED, this CPU lacks them: {}", names(&missing));
    }
    stderr().write_all((line + "\n").as_bytes()).unwrap();
    assert_eq!(here[0], Backend::Ring, "ring runs everywhere");
    #[cfg(target_arch = "x86_64")]
    {
        let has_avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512ifma")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vpopcntdq")
            && is_x86_feature_detected!("bmi2");
        assert!(!has_avx512 || missing.is_empty(), "this CPU runs all, but {}", names(&missing));
        let has_avx2 = is_x86_feature_detected!("avx2");
        assert_eq!(has_avx2, here.contains(&Backend::Avx2));
    }
    here
}

/// Text that does not repeat within a packet, another for each `seed`.
pub(crate) fn text(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    };
    (0..len).map(next).collect()
}

/// `text` and room for its tag.
pub(crate) fn with_room(text: &[u8]) -> Vec<u8> {
    [text, &[0; TAG_LEN]].concat()
}

/// What `text` is sealed to at a place in a batch whose other packets have other texts, about as
/// long, and partly other keys.
pub(crate) fn seal_in_crowd(
    backend: Backend,
    key: [u8; 32],
    counter: u64,
    text: &[u8],
    (count, place): (usize, usize),
) -> Vec<u8> {
    let keys = [SealingKey::new(key), SealingKey::new([0x77; 32])];
    let mut packets: Vec<Vec<u8>> =
        (0..count).map(|nth| self::text(text.len() + nth % 3 + TAG_LEN, nth as u64)).collect();
    packets[place] = with_room(text);
    let mut jobs: Vec<SealJob<'_>> = packets
        .iter_mut()
        .enumerate()
        .map(|(nth, packet)| SealJob {
            key: if nth == place { &keys[0] } else { &keys[nth % 2] },
            counter: if nth == place { counter } else { nth as u64 },
            packet,
        })
        .collect();
    backend.seal_batch(&mut jobs);
    packets.swap_remove(place)
}

/// The verdict on `sealed`, and what became of it, at a place in a batch whose other packets are
/// as long and authentic.
pub(crate) fn open_in_crowd(
    backend: Backend,
    key: [u8; 32],
    counter: u64,
    sealed: &[u8],
    (count, place): (usize, usize),
) -> (bool, Vec<u8>) {
    let len = sealed.len().saturating_sub(TAG_LEN);
    let plain: Vec<Vec<u8>> = (0..count).map(|nth| text(len, nth as u64)).collect();
    let (seal, neighbours) = (SealingKey::new([0x77; 32]), OpeningKey::new([0x77; 32]));
    let mut packets: Vec<Vec<u8>> = plain.iter().map(|text| with_room(text)).collect();
    let mut jobs: Vec<SealJob<'_>> = packets
        .iter_mut()
        .enumerate()
        .map(|(nth, packet)| SealJob { key: &seal, counter: nth as u64, packet })
        .collect();
    Backend::Ring.seal_batch(&mut jobs);
    packets[place] = sealed.to_vec();
    let wanted = OpeningKey::new(key);
    let mut jobs: Vec<OpenJob<'_>> = packets
        .iter_mut()
        .enumerate()
        .map(|(nth, packet)| OpenJob {
            key: if nth == place { &wanted } else { &neighbours },
            counter: if nth == place { counter } else { nth as u64 },
            packet,
            verified: nth % 2 == 0,
        })
        .collect();
    backend.open_batch(&mut jobs);
    let verdict = jobs[place].verified;
    for (nth, job) in jobs.iter().enumerate().filter(|(nth, _)| *nth != place) {
        assert!(job.verified, "{backend}: the neighbour {nth} of {count} is authentic");
        assert_eq!(job.packet[..len], plain[nth], "{backend}: the neighbour {nth} of {count}");
    }
    (verdict, packets.swap_remove(place))
}

/// Bytes from hexadecimal digits; white space is skipped.
pub(crate) fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        digits.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
    assert!(digits.len().is_multiple_of(2), "whole bytes");
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The counter of a nonce that has WireGuard's form.
pub(crate) fn counter(nonce: &[u8]) -> Option<u64> {
    let (zeros, counter) = nonce.split_first_chunk::<4>()?;
    (*zeros == [0; 4]).then_some(u64::from_le_bytes(counter.try_into().ok()?))
}
