//! Keys, prepared once for every back-end.

use std::slice;

use zeroize::Zeroizing;

use crate::ring_backend::RingKey;
use crate::{KEY_LEN, OpenJob, SealJob, open_batch, seal_batch};

/// What both directions hold. Wiped when dropped.
pub(crate) struct Key {
    pub(crate) ring: RingKey,
    /// Little-endian words, as ChaCha20's state has them. Vector back-ends are all that wants them.
    #[cfg(target_arch = "x86_64")]
    pub(crate) words: Zeroizing<[u32; 8]>,
}

/// A key prepared once for sealing.
pub struct SealingKey(pub(crate) Key);

/// A key prepared once for opening.
pub struct OpeningKey(pub(crate) Key);

impl SealingKey {
    pub fn new(key: [u8; KEY_LEN]) -> Self {
        Self(Key::new(key))
    }

    /// Seals one `packet` in place. See [`crate::SealJob`].
    pub fn seal(&self, counter: u64, packet: &mut [u8]) {
        seal_batch(&mut [SealJob { key: self, counter, packet }]);
    }
}

impl OpeningKey {
    pub fn new(key: [u8; KEY_LEN]) -> Self {
        Self(Key::new(key))
    }

    /// Opens one `packet` in place; false if it is not authentic. See [`crate::OpenJob`].
    pub fn open(&self, counter: u64, packet: &mut [u8]) -> bool {
        let mut job = OpenJob { key: self, counter, packet, verified: false };
        open_batch(slice::from_mut(&mut job));
        job.verified
    }
}

impl Key {
    fn new(key: [u8; KEY_LEN]) -> Self {
        let key = Zeroizing::new(key);
        Self {
            ring: RingKey::new(&key),
            #[cfg(target_arch = "x86_64")]
            words: Zeroizing::new(words(&key)),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn words(key: &[u8; KEY_LEN]) -> [u32; 8] {
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(key.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}
