//! WireGuard keys as text, made by the stock `wg` tool.

use crate::{Error, Result, marker::random_bytes};
use std::{
    io::Write,
    process::{Command, Stdio},
};

/// A static key pair in base64.
#[derive(Clone, Debug)]
pub struct KeyPair {
    /// The private key.
    pub private: String,
    /// Its public key.
    pub public: String,
}

impl KeyPair {
    /// A new random pair.
    pub fn generate() -> Result<Self> {
        let private = base64(&random_bytes::<32>()?);
        let public = public_key(&private)?;
        Ok(Self { private, public })
    }
}

/// A random preshared key in base64; also good as the public key of a peer that does not exist.
pub fn random_key() -> Result<String> {
    Ok(base64(&random_bytes::<32>()?))
}

/// Standard base64 with padding.
pub fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = |group: &[u8]| {
        let word = group.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte))
            << (8 * (3 - group.len()));
        let digit = |i: usize| char::from(ALPHABET[(word >> (18 - 6 * i)) as usize & 63]);
        (0..4).map(|i| if i <= group.len() { digit(i) } else { '=' }).collect::<String>()
    };
    bytes.chunks(3).map(digits).collect()
}

fn public_key(private: &str) -> Result<String> {
    let failed = || Error::system("run `wg pubkey` (Debian package wireguard-tools)");
    let child =
        Command::new("wg").arg("pubkey").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.map_err(failed())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(private.as_bytes()).map_err(failed())?;
    }
    let output = child.wait_with_output().map_err(failed())?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().into())
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base64_has_the_digits_of_rfc_4648() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")];
        for (plain, text) in cases {
            assert_eq!(base64(plain.as_bytes()), text);
        }
    }
}
