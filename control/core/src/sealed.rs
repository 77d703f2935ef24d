//! NaCl boxes (X25519, HSalsa20, XSalsa20-Poly1305): what disco, introductions and the opening of
//! a relay connection are sealed with.
//!
//! A [`BoxKey`] is what NaCl calls the precomputed key of two parties. For disco keys, which are
//! ours, it is computed here; for WireGuard keys the data plane computes it and hands it out,
//! because control never holds a private key. Both are 32 bytes of the same kind.

use std::fmt;

use crypto_secretbox::aead::{AeadInPlace, KeyInit};
use crypto_secretbox::{Key, Tag, XSalsa20Poly1305};
use curve25519_dalek::MontgomeryPoint;
use salsa20::cipher::consts::U10;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes of a nonce: it travels in clear before the box. Random; never used twice with one key.
pub const NONCE_LEN: usize = 24;
/// Bytes that a box is longer than its content; they stand first.
pub const TAG_LEN: usize = 16;

/// A Curve25519 public key: of a node (its WireGuard key) or of a process (its disco key).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "PublicKey({a:02x}{b:02x}{c:02x}{d:02x}..)")
    }
}

/// A Curve25519 private key that control may hold: a disco key or a relay's own.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct SecretKey([u8; 32]);

impl SecretKey {
    /// Takes 32 random bytes; they are clamped at use.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn public_key(&self) -> PublicKey {
        PublicKey(MontgomeryPoint::mul_base_clamped(self.0).to_bytes())
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// The key of every box between two parties, the same from both sides.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct BoxKey([u8; 32]);

impl BoxKey {
    /// Takes a key that the box-key agent computed.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// HSalsa20(X25519(own, theirs)). None if `theirs` is a point of low order: everybody could
    /// compute that key.
    pub fn agree(own: &SecretKey, theirs: PublicKey) -> Option<Self> {
        let point = Zeroizing::new(MontgomeryPoint(theirs.0).mul_clamped(own.0));
        if point.0 == [0; 32] {
            return None;
        }
        let mut key = salsa20::hsalsa::<U10>(&point.0.into(), &[0; 16].into());
        let agreed = Self(key.into());
        key.as_mut_slice().zeroize();
        Some(agreed)
    }

    /// Seals `buffer` in place: its first [`TAG_LEN`] bytes become the tag, the rest is content.
    /// Shorter buffers stay as they are.
    pub fn seal(&self, nonce: &[u8; NONCE_LEN], buffer: &mut [u8]) {
        let Some((tag_place, content)) = buffer.split_at_mut_checked(TAG_LEN) else { return };
        let cipher = XSalsa20Poly1305::new(Key::from_slice(&self.0));
        // Cannot fail: contents are far below the cipher's limit of 2^70 bytes.
        if let Ok(tag) = cipher.encrypt_in_place_detached(nonce.into(), &[], content) {
            tag_place.copy_from_slice(&tag);
        }
    }

    /// Opens a box (tag and content) in place and returns the content, or None where it was not
    /// sealed with this key and nonce; the buffer is then not to be read.
    pub fn open<'b>(&self, nonce: &[u8; NONCE_LEN], buffer: &'b mut [u8]) -> Option<&'b mut [u8]> {
        let (tag, content) = buffer.split_at_mut_checked(TAG_LEN)?;
        let cipher = XSalsa20Poly1305::new(Key::from_slice(&self.0));
        let tag = Tag::clone_from_slice(tag);
        cipher.decrypt_in_place_detached(nonce.into(), &[], content, &tag).ok()?;
        Some(content)
    }
}

impl fmt::Debug for BoxKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoxKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use crypto_box::SalsaBox;
    use crypto_box::aead::Aead;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn boxes_are_those_of_crypto_box(
            own: [u8; 32], theirs: [u8; 32], nonce: [u8; 24], content: Vec<u8>
        ) {
            let their_secret = SecretKey::from_bytes(theirs);
            let key = BoxKey::agree(&SecretKey::from_bytes(own), their_secret.public_key()).unwrap();
            let mut sealed = vec![0; TAG_LEN];
            sealed.extend(&content);
            key.seal(&nonce, &mut sealed);

            let oracle = SalsaBox::new(
                &crypto_box::SecretKey::from(own).public_key(),
                &crypto_box::SecretKey::from(theirs),
            );
            prop_assert_eq!(&oracle.encrypt(&nonce.into(), content.as_slice()).unwrap(), &sealed);
            prop_assert_eq!(key.open(&nonce, &mut sealed).unwrap(), content.as_slice());
        }

        #[test]
        fn a_changed_box_does_not_open(at in 0_usize..48, bit in 0_u8..8, key: [u8; 32]) {
            let mut sealed = [7; 48];
            BoxKey::from_bytes(key).seal(&[1; 24], &mut sealed);
            sealed[at] ^= 1 << bit;
            prop_assert!(BoxKey::from_bytes(key).open(&[1; 24], &mut sealed).is_none());
        }
    }

    /// The key `firstkey` of "Cryptography in NaCl" (Bernstein, 2009), section 5: Alice's private
    /// key and Bob's public one.
    #[test]
    fn the_agreed_key_is_that_of_the_nacl_paper() {
        let alice = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2,
            0x66, 0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5,
            0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let bob = [
            0xde, 0x9e, 0xdb, 0x7d, 0x7b, 0x7d, 0xc1, 0xb4, 0xd3, 0x5b, 0x61, 0xc2, 0xec, 0xe4,
            0x35, 0x37, 0x3f, 0x83, 0x43, 0xc8, 0x5b, 0x78, 0x67, 0x4d, 0xad, 0xfc, 0x7e, 0x14,
            0x6f, 0x88, 0x2b, 0x4f,
        ];
        let firstkey = [
            0x1b, 0x27, 0x55, 0x64, 0x73, 0xe9, 0x85, 0xd4, 0x62, 0xcd, 0x51, 0x19, 0x7a, 0x9a,
            0x46, 0xc7, 0x60, 0x09, 0x54, 0x9e, 0xac, 0x64, 0x74, 0xf2, 0x06, 0xc4, 0xee, 0x08,
            0x44, 0xf6, 0x83, 0x89,
        ];
        let key = BoxKey::agree(&SecretKey::from_bytes(alice), PublicKey(bob)).unwrap();
        assert_eq!(key.0, firstkey);
    }

    #[test]
    fn points_of_low_order_agree_on_nothing() {
        let own = SecretKey::from_bytes([3; 32]);
        assert!(BoxKey::agree(&own, PublicKey([0; 32])).is_none());
        let mut one = [0; 32];
        one[0] = 1;
        assert!(BoxKey::agree(&own, PublicKey(one)).is_none());
    }

    #[test]
    fn buffers_without_room_for_a_tag_do_not_open_and_secrets_do_not_print() {
        let key = BoxKey::from_bytes([9; 32]);
        for len in 0..TAG_LEN {
            assert!(key.open(&[0; 24], &mut vec![0; len]).is_none());
        }
        assert_eq!(
            format!("{key:?} {:?}", SecretKey::from_bytes([9; 32])),
            "BoxKey(..) SecretKey(..)"
        );
    }
}
