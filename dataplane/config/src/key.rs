//! Curve25519 keys as operators handle them: 44 characters of base64 in files, 64 of hex in UAPI.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use curve25519_dalek::MontgomeryPoint;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

const LEN: usize = 32;

/// A public key, 32 bytes; also a peer's name for `wg`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; LEN]);

/// A private or preshared key: wiped when dropped, never printed by accident.
#[derive(Clone)]
pub struct SecretKey(Zeroizing<[u8; LEN]>);

/// Why a text is no key. Never repeats the text: it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("{0} characters where a key has 44 (32 bytes in base64)")]
    Base64Length(usize),
    #[error("44 characters that are not canonical base64")]
    Base64Content,
    #[error("{0} characters where a key has 64 hexadecimal digits")]
    HexLength(usize),
    #[error("64 characters that are not all hexadecimal digits")]
    HexContent,
}

impl PublicKey {
    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        Ok(Self(*decode_base64(text)?))
    }

    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        Ok(Self(*decode_hex(text)?))
    }

    pub fn to_base64(self) -> String {
        STANDARD.encode(self.0)
    }

    pub fn to_hex(self) -> String {
        encode_hex(&self.0)
    }

    pub fn is_zero(&self) -> bool {
        self.0 == [0; LEN]
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_base64())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_base64())
    }
}

impl SecretKey {
    pub fn new(bytes: Zeroizing<[u8; LEN]>) -> Self {
        Self(bytes)
    }

    /// A private key from 32 random bytes, clamped as RFC 7748 section 5 asks, as `wg genkey` does.
    pub fn clamped(mut bytes: Zeroizing<[u8; LEN]>) -> Self {
        bytes[0] &= 248;
        bytes[31] = (bytes[31] & 127) | 64;
        Self(bytes)
    }

    pub fn from_base64(text: &str) -> Result<Self, KeyError> {
        Ok(Self(decode_base64(text)?))
    }

    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        Ok(Self(decode_hex(text)?))
    }

    /// For a key file or the UAPI socket only.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(*self.0))
    }

    /// For the UAPI socket only.
    pub fn to_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(encode_hex(&self.0))
    }

    pub fn bytes(&self) -> &[u8; LEN] {
        &self.0
    }

    /// An all-zero key means "no key" wherever WireGuard writes one.
    pub fn is_zero(&self) -> bool {
        self.0.ct_eq(&[0; LEN]).into()
    }

    /// The public half, X25519 with the base point.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(MontgomeryPoint::mul_base_clamped(*self.0).to_bytes())
    }
}

impl PartialEq for SecretKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&*other.0).into()
    }
}

impl Eq for SecretKey {}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(hidden)")
    }
}

fn decode_base64(text: &str) -> Result<Zeroizing<[u8; LEN]>, KeyError> {
    if text.len() != 44 {
        return Err(KeyError::Base64Length(text.chars().count()));
    }
    // The decoder's estimate is 33 bytes for 44 characters.
    let mut bytes = Zeroizing::new([0; LEN + 1]);
    match STANDARD.decode_slice(text, bytes.as_mut_slice()) {
        Ok(LEN) => {
            let mut key = Zeroizing::new([0; LEN]);
            key.copy_from_slice(&bytes[..LEN]);
            Ok(key)
        }
        _ => Err(KeyError::Base64Content),
    }
}

fn decode_hex(text: &str) -> Result<Zeroizing<[u8; LEN]>, KeyError> {
    if text.len() != 2 * LEN {
        return Err(KeyError::HexLength(text.chars().count()));
    }
    let mut key = Zeroizing::new([0; LEN]);
    for (byte, pair) in key.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16).ok_or(KeyError::HexContent);
        *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
    }
    Ok(key)
}

fn encode_hex(bytes: &[u8; LEN]) -> String {
    let mut text = String::with_capacity(2 * LEN);
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(digit.into(), 16));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 7748 section 6.1, Alice's pair.
    #[test]
    fn public_key_is_x25519_of_the_base_point() {
        let alice = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a";
        assert_eq!(
            SecretKey::from_hex(alice).unwrap().public_key().to_hex(),
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
        );
    }

    #[test]
    fn errors_name_the_defect_and_not_the_text() {
        assert_eq!(PublicKey::from_base64("abc"), Err(KeyError::Base64Length(3)));
        let bad = "A".repeat(44);
        assert_eq!(PublicKey::from_base64(&bad), Err(KeyError::Base64Content));
        assert_eq!(PublicKey::from_hex("0g"), Err(KeyError::HexLength(2)));
        assert_eq!(PublicKey::from_hex(&"g".repeat(64)), Err(KeyError::HexContent));
        assert_eq!(format!("{:?}", SecretKey::new(Zeroizing::new([7; 32]))), "SecretKey(hidden)");
    }

    proptest! {
        #[test]
        fn base64_and_hex_round_trip(bytes: [u8; 32]) {
            let key = PublicKey(bytes);
            prop_assert_eq!(PublicKey::from_base64(&key.to_base64()), Ok(key));
            prop_assert_eq!(PublicKey::from_hex(&key.to_hex()), Ok(key));
            let secret = SecretKey::new(Zeroizing::new(bytes));
            prop_assert_eq!(SecretKey::from_base64(&secret.to_base64()), Ok(secret.clone()));
            prop_assert_eq!(SecretKey::from_hex(&secret.to_hex()), Ok(secret));
        }

        #[test]
        fn any_text_is_judged_without_panic(text: String) {
            prop_assert!(text.len() == 44 || PublicKey::from_base64(&text).is_err());
            prop_assert!(text.len() == 64 || PublicKey::from_hex(&text).is_err());
        }
    }
}
