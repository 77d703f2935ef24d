//! A 32-byte secret: printed as nothing, compared in constant time, wiped when dropped.

use std::fmt;

use curve25519_dalek::montgomery::MontgomeryPoint;
use rand::RngCore;
use salsa20::cipher::consts::U10;
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

    /// HSalsa20(X25519(this private key, `public`), 0): what NaCl calls the precomputed key of two
    /// parties. None as for [`Self::diffie_hellman`].
    pub fn box_key(&self, public: &PublicKey) -> Option<Secret> {
        let shared = self.diffie_hellman(public)?;
        let mut key = salsa20::hsalsa::<U10>(shared.expose().into(), &[0; 16].into());
        let secret = Self::new(key.into());
        key.as_mut_slice().zeroize();
        Some(secret)
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
    fn a_box_key_opens_what_nacl_sealed() {
        use crypto_box::aead::Aead;
        use crypto_secretbox::{KeyInit, XSalsa20Poly1305};
        for seed in 1..20_u8 {
            let (own, other) = (Secret::new([seed; 32]), Secret::new([seed ^ 0x5a; 32]));
            let theirs = crypto_box::SecretKey::from(*other.expose());
            let sealed = crypto_box::SalsaBox::new(&own.public_key().0.into(), &theirs)
                .encrypt(&[7; 24].into(), &b"introduce"[..])
                .unwrap();
            let key = own.box_key(&other.public_key()).unwrap();
            let opened = XSalsa20Poly1305::new(key.expose().into())
                .decrypt(&[7; 24].into(), &sealed[..])
                .unwrap();
            assert_eq!(opened, b"introduce");
            assert_eq!(other.box_key(&own.public_key()), Some(key.clone()));
            assert_ne!(Some(key), own.diffie_hellman(&other.public_key()));
        }
        for low_order in [[0; 32], ONE] {
            assert_eq!(Secret::new([9; 32]).box_key(&PublicKey(low_order)), None);
        }
    }

    /// Of order 4; zero is of order 2.
    const ONE: [u8; 32] = {
        let mut one = [0; 32];
        one[0] = 1;
        one
    };

    #[test]
    fn a_secret_prints_nothing_of_itself() {
        assert_eq!(format!("{:?}", Secret::new([0xab; 32])), "Secret(..)");
    }
}
