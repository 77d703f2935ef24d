//! The portable back-end: `ring`, one packet after the other.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};
use zeroize::Zeroize;

use crate::{KEY_LEN, TAG_LEN};

/// A key prepared once for sealing.
pub struct SealingKey(LessSafeKey);

/// A key prepared once for opening.
pub struct OpeningKey(LessSafeKey);

impl SealingKey {
    pub fn new(key: [u8; KEY_LEN]) -> Self {
        Self(prepare(key))
    }

    /// Seals `packet` (plaintext, then room for the tag) in place. See [`crate::SealJob`].
    pub fn seal(&self, counter: u64, packet: &mut [u8]) {
        let Some(text_len) = packet.len().checked_sub(TAG_LEN) else { return };
        let (text, room) = packet.split_at_mut(text_len);
        // ring refuses only texts beyond 2^38 bytes; a slice that long cannot be a packet.
        if let Ok(tag) = self.0.seal_in_place_separate_tag(nonce(counter), Aad::empty(), text) {
            room.copy_from_slice(tag.as_ref());
        }
    }
}

impl OpeningKey {
    pub fn new(key: [u8; KEY_LEN]) -> Self {
        Self(prepare(key))
    }

    /// Opens `packet` (ciphertext, then tag) in place; false if it is not authentic, and then
    /// `packet` is zeroed.
    pub fn open(&self, counter: u64, packet: &mut [u8]) -> bool {
        let Some(text_len) = packet.len().checked_sub(TAG_LEN) else { return false };
        let (text, tag) = packet.split_at_mut(text_len);
        let Ok(tag) = Tag::try_from(&*tag) else { return false };
        let nonce = nonce(counter);
        let ok = self.0.open_in_place_separate_tag(nonce, Aad::empty(), tag, text, 0..).is_ok();
        if !ok {
            packet.fill(0);
        }
        ok
    }
}

fn prepare(mut key: [u8; KEY_LEN]) -> LessSafeKey {
    let prepared = UnboundKey::new(&CHACHA20_POLY1305, &key);
    key.zeroize();
    match prepared {
        Ok(unbound) => LessSafeKey::new(unbound),
        Err(_) => unreachable!("a ChaCha20-Poly1305 key has KEY_LEN bytes"),
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}
