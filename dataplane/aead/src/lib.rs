//! Batched ChaCha20-Poly1305 as WireGuard uses it (RFC 8439 section 2.8).
//!
//! The nonce is 32 zero bits followed by the 64-bit little-endian packet counter, and there is
//! no associated data (WireGuard paper, section 5.4.6). A batch is a slice of jobs, each with its
//! own key, counter and buffer, worked on in place; nothing is allocated.
//!
//! What this crate does not do: choose counters, remember them, or check for replays.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backend;
mod choice;
pub mod fuzz;
mod keys;
mod ring_backend;
#[cfg(target_arch = "x86_64")]
mod wide;

pub use backend::{Backend, UnknownBackend};
pub use choice::{Choice, ChoiceError, choice, choose};
pub use keys::{OpeningKey, SealingKey};

/// Bytes that sealing appends to a packet.
pub const TAG_LEN: usize = 16;

/// Bytes of a ChaCha20-Poly1305 key.
pub const KEY_LEN: usize = 32;

/// One packet to seal in place.
pub struct SealJob<'a> {
    pub key: &'a SealingKey,
    /// Packet counter. A counter used twice under one key breaks the cipher; the caller's session
    /// hands out each value once.
    pub counter: u64,
    /// Plaintext followed by [`TAG_LEN`] bytes of room, which receive the tag.
    pub packet: &'a mut [u8],
}

/// One packet to open in place.
pub struct OpenJob<'a> {
    pub key: &'a OpeningKey,
    /// Packet counter, as read from the packet's header.
    pub counter: u64,
    /// Ciphertext followed by its tag. Afterwards the plaintext, then the spent tag; if the
    /// packet does not verify, zeros.
    pub packet: &'a mut [u8],
    /// Set by [`open_batch`]: the packet is authentic and its plaintext stands in `packet`.
    pub verified: bool,
}

/// Seals every job. A `packet` shorter than [`TAG_LEN`] is left as it is.
pub fn seal_batch(jobs: &mut [SealJob<'_>]) {
    let bytes = jobs.iter().map(|job| job.packet.len()).sum();
    choice().backend(jobs.len(), bytes).seal_batch(jobs);
}

/// Opens every job and sets its `verified`. One bad packet does not disturb its neighbours.
pub fn open_batch(jobs: &mut [OpenJob<'_>]) {
    let bytes = jobs.iter().map(|job| job.packet.len()).sum();
    choice().backend(jobs.len(), bytes).open_batch(jobs);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 8439 section 2.8.2 uses associated data, which WireGuard never has, so the known answer
    /// is the empty WireGuard keepalive: the tag of an empty text is the one-time key's `s` half.
    #[test]
    fn an_empty_packet_is_its_tag() {
        let (seal, open) = (SealingKey::new([7; KEY_LEN]), OpeningKey::new([7; KEY_LEN]));
        let mut packet = [0; TAG_LEN];
        seal.seal(3, &mut packet);
        assert_ne!(packet, [0; TAG_LEN]);
        assert!(open.open(3, &mut packet));
    }

    #[test]
    fn a_packet_shorter_than_a_tag_is_refused() {
        let open = OpeningKey::new([7; KEY_LEN]);
        for len in 0..TAG_LEN {
            assert!(!open.open(0, &mut vec![0; len]));
        }
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_and_any_flipped_bit_is_refused(
            key in any::<[u8; KEY_LEN]>(),
            counter in any::<u64>(),
            text in proptest::collection::vec(any::<u8>(), 0..2000),
            flip in any::<prop::sample::Index>(),
        ) {
            let (seal, open) = (SealingKey::new(key), OpeningKey::new(key));
            let mut sealed = text.clone();
            sealed.extend_from_slice(&[0; TAG_LEN]);
            seal_batch(&mut [SealJob { key: &seal, counter, packet: &mut sealed }]);

            let mut bad = sealed.clone();
            let bit = flip.index(bad.len() * 8);
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut good = sealed;
            let mut jobs = [
                OpenJob { key: &open, counter, packet: &mut bad, verified: false },
                OpenJob { key: &open, counter, packet: &mut good, verified: false },
            ];
            open_batch(&mut jobs);
            prop_assert!(!jobs[0].verified);
            prop_assert!(jobs[1].verified);
            prop_assert_eq!(&good[..text.len()], &text[..]);
            prop_assert!(bad.iter().all(|&b| b == 0), "a refused packet leaves no plaintext");
        }
    }
}
