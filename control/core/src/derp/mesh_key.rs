//! The secret by which the relays of one region know each other.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::KEY_LEN;

/// 32 bytes that all relays of a mesh share. Whoever knows it may speak for every client of them.
#[derive(Clone)]
pub struct MeshKey(Zeroizing<[u8; KEY_LEN]>);

impl MeshKey {
    /// Reads 64 hexadecimal digits, as `openssl rand -hex 32` prints them.
    pub fn from_hex(text: &str) -> Option<Self> {
        let text = text.as_bytes();
        if text.len() != 2 * KEY_LEN {
            return None;
        }
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            let digit = |at: usize| char::from(pair[at]).to_digit(16);
            *byte = (digit(0)? << 4 | digit(1)?) as u8;
        }
        Some(Self(bytes))
    }

    fn to_hex(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(2 * KEY_LEN));
        for byte in self.0.iter() {
            for digit in [byte >> 4, byte & 15] {
                text.extend(char::from_digit(digit.into(), 16));
            }
        }
        text
    }
}

/// In constant time: a stranger may try as many as it likes.
impl PartialEq for MeshKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for MeshKey {}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MeshKey(..)")
    }
}

impl Serialize for MeshKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

/// None for the empty text, which stands for no key too.
pub(super) fn optional<'d, D: Deserializer<'d>>(
    deserializer: D,
) -> Result<Option<MeshKey>, D::Error> {
    let text = Zeroizing::new(String::deserialize(deserializer)?);
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = || serde::de::Error::custom("a mesh key that is not 64 hexadecimal digits");
    MeshKey::from_hex(&text).ok_or_else(wrong).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_and_written_and_never_shown() {
        let text = "00112233445566778899aabbccddeeff".repeat(2);
        let key = MeshKey::from_hex(&text).unwrap();
        assert_eq!(*key.to_hex(), text);
        assert_eq!(format!("{key:?}"), "MeshKey(..)");
        assert_eq!(MeshKey::from_hex(&text.to_uppercase()), Some(key.clone()));
        assert_ne!(MeshKey::from_hex(&text.replace("ff", "fe")), Some(key));
        for wrong in ["", "00", &text[1..], &text.replace("ff", "fg"), &text.replace("ff", "é")] {
            assert_eq!(MeshKey::from_hex(wrong), None, "{wrong}");
        }
    }
}
