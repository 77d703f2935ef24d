//! A 32-byte secret: printed as nothing, compared in constant time, wiped when dropped.

use std::fmt;

use curve25519_dalek::montgomery::MontgomeryPoint;
use rand::RngCore;
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::peer::PublicKey;

/// A Curve25519 private key or a preshared key.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret([u8; Self::LEN]);

impl Secret {
    pub const LEN: usize = 32;
    /// The preshared key of a peer that has none (WireGuard paper, section 5.2).
    pub const ZERO: Self = Self([0; Self::LEN]);

    pub fn new(mut bytes: [u8; Self::LEN]) -> Self {
        let secret = Self(bytes);
        bytes.zeroize();
        secret
    }

    pub fn random(rng: &mut dyn RngCore) -> Self {
        let mut secret = Self::ZERO;
        rng.fill_bytes(&mut secret.0);
        secret
    }

    /// A random private key, already in the form that `wg genkey` prints (RFC 7748, section 5).
    pub fn generate_private_key(rng: &mut dyn RngCore) -> Self {
        let mut secret = Self::random(rng);
        secret.0[0] &= 248;
        secret.0[31] = (secret.0[31] & 127) | 64;
        secret
    }

    /// The bytes themselves. Every use is a place to check for leaks.
    pub fn expose(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// The public key of this private key.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(MontgomeryPoint::mul_base_clamped(self.0).to_bytes())
    }

    /// X25519 with this private key; none where the result is zero, which means that `public` is
    /// a point of low order and the secret would be known to everybody (RFC 7748, section 6.1).
    pub fn diffie_hellman(&self, public: &PublicKey) -> Option<Secret> {
        let point = MontgomeryPoint(public.0).mul_clamped(self.0);
        let shared = Self::new(point.to_bytes());
        (!shared.is_zero()).then_some(shared)
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748, section 5.2: the first iteration, where scalar and point are both 9.
    #[test]
    fn nine_times_nine_is_the_answer_of_the_rfc() {
        let mut nine = [0; 32];
        nine[0] = 9;
        let answer = [
            0x42, 0x2c, 0x8e, 0x7a, 0x62, 0x27, 0xd7, 0xbc, 0xa1, 0x35, 0x0b, 0x3e, 0x2b, 0xb7,
            0x27, 0x9f, 0x78, 0x97, 0xb8, 0x7b, 0xb6, 0x85, 0x4b, 0x78, 0x3c, 0x60, 0xe8, 0x03,
            0x11, 0xae, 0x30, 0x79,
        ];
        let secret = Secret::new(nine);
        assert_eq!(secret.public_key().0, answer);
        assert_eq!(secret.diffie_hellman(&PublicKey(nine)), Some(Secret::new(answer)));
    }

    #[test]
    fn a_secret_prints_nothing_of_itself() {
        assert_eq!(format!("{:?}", Secret::new([0xab; 32])), "Secret(..)");
    }
}
