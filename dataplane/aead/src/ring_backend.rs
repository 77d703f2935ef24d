//! The portable back-end: `ring`, one packet after the other. It is what all others are compared
//! with.

use std::mem::{self, ManuallyDrop};
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};

use crate::{KEY_LEN, TAG_LEN};

/// A key as `ring` keeps it. Wiped when dropped.
pub(crate) struct RingKey(ManuallyDrop<LessSafeKey>);

impl RingKey {
    pub(crate) fn new(key: &[u8; KEY_LEN]) -> Self {
        match UnboundKey::new(&CHACHA20_POLY1305, key) {
            Ok(unbound) => Self(ManuallyDrop::new(LessSafeKey::new(unbound))),
            Err(_) => unreachable!("a ChaCha20-Poly1305 key has KEY_LEN bytes"),
        }
    }

    /// Seals `packet` (plaintext, then room for the tag) in place. See [`crate::SealJob`].
    pub(crate) fn seal(&self, counter: u64, packet: &mut [u8]) {
        let Some((text, room)) = packet.split_last_chunk_mut::<TAG_LEN>() else { return };
        // ring refuses only texts beyond 2^38 bytes; a slice that long cannot be a packet.
        if let Ok(tag) = self.0.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text) {
            room.copy_from_slice(tag.as_ref());
        }
    }

    /// Opens `packet` (ciphertext, then tag) in place; false if it is not authentic, and then
    /// `packet` is zeroed.
    pub(crate) fn open(&self, counter: u64, packet: &mut [u8]) -> bool {
        let Some((text, tag)) = packet.split_last_chunk_mut::<TAG_LEN>() else { return false };
        let (nonce, tag) = (nonce(counter), Tag::from(*tag));
        let ok = self.0.open_in_place_separate_tag(nonce, Aad::empty(), tag, text, 0..).is_ok();
        if !ok {
            packet.fill(0);
        }
        ok
    }
}

impl Drop for RingKey {
    fn drop(&mut self) {
        const { assert!(!mem::needs_drop::<LessSafeKey>(), "it owns nothing but its bytes") };
        let place: *mut LessSafeKey = &raw mut *self.0;
        // SAFETY: `place` is ours alone and is never read again: `ManuallyDrop` does not drop it.
        // Volatile, byte by byte, so that the compiler keeps writes to what is about to go away.
        unsafe {
            for at in 0..size_of::<LessSafeKey>() {
                ptr::write_volatile(place.cast::<u8>().add(at), 0);
            }
        }
        compiler_fence(Ordering::SeqCst);
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}
