//! The name of a certificate, or of the public key in it.

use std::fmt;

const LEN: usize = 32;

/// SHA-256 of a certificate or of its public key (SubjectPublicKeyInfo, RFC 7469 section 2.4), both
/// in DER.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; LEN]);

impl Fingerprint {
    /// Reads `sha256:` and 64 hex digits, in pairs with a colon between as openssl prints them or
    /// without; the error says what was expected.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const SHAPE: &str = "sha256: and 64 hex digits, of the certificate or of its public key";
        let hex = text.strip_prefix("sha256:").ok_or(SHAPE)?;
        let apart = if hex.contains(':') { 3 } else { 2 };
        if hex.len() != LEN * apart - (apart - 2) {
            return Err(SHAPE);
        }
        let mut bytes = [0; LEN];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(apart)) {
            let digit = |digit: u8| char::from(digit).to_digit(16).ok_or(SHAPE);
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
            if pair.get(2).is_some_and(|between| *between != b':') {
                return Err(SHAPE);
            }
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_and_written() {
        let text = format!("sha256:{}", "0f".repeat(LEN));
        let read = Fingerprint::parse(&text).unwrap();
        assert_eq!(read.to_string(), text);
        let printed_by_openssl = format!("sha256:{}0F", "0F:".repeat(LEN - 1));
        assert_eq!(Fingerprint::parse(&printed_by_openssl), Ok(read));
        for bad in [
            "",
            "sha256:",
            "0f",
            &text[..70],
            &text.replace("0f", "zz"),
            &text.replace("0f", "+f"),
            &printed_by_openssl.replace("F:0", "F:\u{e9}"),
            &printed_by_openssl.replace("F:0", "F.0"),
            &printed_by_openssl.replacen("F:0", "F.0", 1),
            &format!("sha256:{}\u{e9}", "0".repeat(62)),
            &format!("sha256-raw:{}", "0f".repeat(LEN)),
        ] {
            assert!(Fingerprint::parse(bad).is_err(), "{bad}");
        }
    }
}
