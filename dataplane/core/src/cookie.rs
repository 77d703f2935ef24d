//! `mac1`, `mac2` and cookies (WireGuard paper, sections 5.3 and 5.4.4 to 5.4.7): what a handshake
//! message must prove before any public-key work is done for it.

use std::net::{IpAddr, SocketAddr};

use blake2::digest::consts::U16;
use blake2::digest::{Digest, FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{Key, Tag, XChaCha20Poly1305, XNonce};
use rand::RngCore;
use subtle::ConstantTimeEq;
use zerocopy::IntoBytes;
use zeroize::Zeroizing;

use crate::limits::{COOKIE_SECRET_LIFETIME, COOKIE_TRUST_TIME};
use crate::message::{CookieReply, MAC_LEN, TYPE_COOKIE_REPLY};
use crate::peer::PublicKey;
use crate::secret::Secret;
use crate::time::Instant;

type Mac = [u8; MAC_LEN];

/// Checks what arrives for one public key, ours.
pub struct CookieChecker {
    keys: Keys,
    /// Makes every cookie of the next two minutes.
    secret: Option<(Secret, Instant)>,
}

/// What one peer needs to know to pass its [`CookieChecker`].
pub struct CookieJar {
    keys: Keys,
    cookie: Option<(Zeroizing<Mac>, Instant)>,
    /// The newest `mac1` that we sent: a cookie reply must be bound to it, and is taken once.
    sent_mac1: Option<Mac>,
}

/// Both keys come from a public key, so they are no secrets.
struct Keys {
    mac1: [u8; 32],
    cookie: [u8; 32],
}

impl CookieChecker {
    pub fn new(own: &PublicKey) -> Self {
        Self { keys: Keys::new(own), secret: None }
    }

    /// Whether the sender knew our public key.
    pub fn has_mac1(&self, message: &[u8]) -> bool {
        let Some((covered, mac1, _)) = split(message) else { return false };
        mac(&self.keys.mac1, &[covered]).ct_eq(mac1).into()
    }

    /// Whether the sender also received our cookie for its address and port.
    pub fn has_mac2(&self, now: Instant, message: &[u8], source: SocketAddr) -> bool {
        let Some((covered, mac1, mac2)) = split(message) else { return false };
        let Some((secret, born)) = &self.secret else { return false };
        if now.since(*born) >= COOKIE_SECRET_LIFETIME {
            return false;
        }
        mac(&*cookie(secret, source), &[covered, mac1]).ct_eq(mac2).into()
    }

    /// The answer to a `message` with `mac1` but without `mac2`; 64 bytes, less than was asked with.
    pub fn reply(
        &mut self,
        now: Instant,
        message: &[u8],
        sender_index: u32,
        source: SocketAddr,
        rng: &mut dyn RngCore,
    ) -> CookieReply {
        let expired = |born: &Instant| now.since(*born) >= COOKIE_SECRET_LIFETIME;
        if self.secret.as_ref().is_none_or(|(_, born)| expired(born)) {
            self.secret = None;
        }
        let (secret, _) = self.secret.get_or_insert_with(|| (Secret::random(rng), now));
        let mut reply = CookieReply {
            kind: TYPE_COOKIE_REPLY.into(),
            receiver_index: sender_index.into(),
            nonce: [0; 24],
            sealed: [0; 32],
        };
        rng.fill_bytes(&mut reply.nonce);
        let (text, room) = reply.sealed.split_at_mut(MAC_LEN);
        text.copy_from_slice(&*cookie(secret, source));
        let mac1 = split(message).map_or(&[][..], |(_, mac1, _)| mac1);
        let nonce = XNonce::from_slice(&reply.nonce);
        // The cipher refuses only texts beyond 256 GiB.
        if let Ok(tag) = self.keys.cipher().encrypt_in_place_detached(nonce, mac1, text) {
            room.copy_from_slice(&tag);
        }
        reply
    }
}

impl CookieJar {
    pub fn new(peer: &PublicKey) -> Self {
        Self { keys: Keys::new(peer), cookie: None, sent_mac1: None }
    }

    /// Writes both macs at the end of a message to the peer; `mac2` stays zero without a cookie.
    pub fn stamp(&mut self, now: Instant, message: &mut [u8]) {
        let Some(at) = message.len().checked_sub(2 * MAC_LEN) else { return };
        let (covered, macs) = message.split_at_mut(at);
        let (mac1, mac2) = macs.split_at_mut(MAC_LEN);
        let sent = mac(&self.keys.mac1, &[covered]);
        mac1.copy_from_slice(&sent);
        self.sent_mac1 = Some(sent);
        self.cookie.take_if(|(_, at)| now.since(*at) >= COOKIE_TRUST_TIME);
        match &self.cookie {
            Some((cookie, _)) => mac2.copy_from_slice(&mac(&**cookie, &[covered, mac1])),
            None => mac2.fill(0),
        }
    }

    /// Takes the cookie out of a reply; false if it answers nothing that we sent.
    pub fn accept(&mut self, now: Instant, reply: &CookieReply) -> bool {
        let Some(mac1) = &self.sent_mac1 else { return false };
        let (mut cookie, mut tag) = (Zeroizing::new([0; MAC_LEN]), [0; MAC_LEN]);
        cookie.copy_from_slice(&reply.sealed[..MAC_LEN]);
        tag.copy_from_slice(&reply.sealed[MAC_LEN..]);
        let nonce = XNonce::from_slice(&reply.nonce);
        let (cipher, tag) = (self.keys.cipher(), Tag::from(tag));
        if cipher.decrypt_in_place_detached(nonce, mac1, &mut *cookie, &tag).is_err() {
            return false;
        }
        self.cookie = Some((cookie, now));
        self.sent_mac1 = None;
        true
    }

    /// Forgets everything that depends on earlier messages.
    pub fn clear(&mut self) {
        self.cookie = None;
        self.sent_mac1 = None;
    }
}

impl Keys {
    fn new(public: &PublicKey) -> Self {
        let hash = |label: &[u8]| Blake2s256::new().chain(label).chain(public.0).finalize().into();
        Self { mac1: hash(b"mac1----"), cookie: hash(b"cookie--") }
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(Key::from_slice(&self.cookie))
    }
}

/// What the macs cover, `mac1`, `mac2`.
fn split(message: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (rest, mac2) = message.split_at_checked(message.len().checked_sub(MAC_LEN)?)?;
    let (covered, mac1) = rest.split_at_checked(rest.len().checked_sub(MAC_LEN)?)?;
    Some((covered, mac1, mac2))
}

/// The cookie of a source: bound to address and port, so that it is of no use to a neighbour
/// behind the same NAT.
fn cookie(secret: &Secret, source: SocketAddr) -> Zeroizing<Mac> {
    let port = source.port().to_be_bytes();
    Zeroizing::new(match source.ip().to_canonical() {
        IpAddr::V4(address) => mac(secret.expose(), &[&address.octets(), &port]),
        IpAddr::V6(address) => mac(secret.expose(), &[&address.octets(), &port]),
    })
}

/// Keyed BLAKE2s with 16 bytes of output (RFC 7693). Keys are 16 or 32 bytes.
fn mac(key: &[u8], parts: &[&[u8]]) -> Mac {
    let mut mac = [0; MAC_LEN];
    if let Ok(mut state) = Blake2sMac::<U16>::new_from_slice(key) {
        parts.iter().for_each(|part| state.update(part));
        state.finalize_into((&mut mac).into());
    }
    mac
}

/// The whole reply, ready to send.
impl From<CookieReply> for Vec<u8> {
    fn from(reply: CookieReply) -> Self {
        reply.as_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    const OWN: PublicKey = PublicKey([7; 32]);

    fn at(secs: u64) -> Instant {
        Instant::from_nanos(1_000_000_000 * (secs + 1))
    }

    fn source(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn with_cookie(checker: &mut CookieChecker, from: SocketAddr) -> (CookieJar, Vec<u8>) {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (mut jar, mut message) = (CookieJar::new(&OWN), vec![5; 148]);
        jar.stamp(at(0), &mut message);
        let reply = checker.reply(at(0), &message, 1, from, &mut rng);
        assert!(jar.accept(at(0), &reply));
        assert!(!jar.accept(at(0), &reply), "a reply is taken once");
        jar.stamp(at(1), &mut message);
        (jar, message)
    }

    #[test]
    fn mac1_needs_our_public_key_and_every_byte() {
        let checker = CookieChecker::new(&OWN);
        let mut message = [3; 92];
        CookieJar::new(&OWN).stamp(at(0), &mut message);
        assert!(checker.has_mac1(&message));
        assert_eq!(message[76..], [0; 16], "no mac2 without a cookie");
        for byte in 0..76 {
            let mut bad = message;
            bad[byte] ^= 1;
            assert!(!checker.has_mac1(&bad), "byte {byte}");
        }
        CookieJar::new(&PublicKey([8; 32])).stamp(at(0), &mut message);
        assert!(!checker.has_mac1(&message));
        assert!(!checker.has_mac1(&[0; 31]));
    }

    #[test]
    fn a_cookie_is_good_for_one_address_and_port() {
        for (good, bad) in [
            ("192.0.2.1:51820", ["192.0.2.1:51821", "192.0.2.2:51820"]),
            ("[2001:db8::1]:51820", ["[2001:db8::1]:1", "[2001:db8::2]:51820"]),
        ] {
            let mut checker = CookieChecker::new(&OWN);
            let (_, message) = with_cookie(&mut checker, source(good));
            assert!(checker.has_mac2(at(1), &message, source(good)));
            for bad in bad {
                assert!(!checker.has_mac2(at(1), &message, source(bad)), "{bad}");
            }
        }
    }

    #[test]
    fn a_cookie_is_trusted_115_s_and_its_secret_lives_120_s() {
        let mut checker = CookieChecker::new(&OWN);
        let from = source("192.0.2.1:1");
        let (mut jar, mut message) = with_cookie(&mut checker, from);
        jar.stamp(at(114), &mut message);
        assert!(checker.has_mac2(at(119), &message, from));
        assert!(!checker.has_mac2(at(120), &message, from));
        jar.stamp(at(115), &mut message);
        assert_eq!(message[132..], [0; 16]);
    }

    #[test]
    fn a_reply_to_another_message_is_refused() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut checker = CookieChecker::new(&OWN);
        let (mut jar, mut message) = (CookieJar::new(&OWN), vec![5; 148]);
        jar.stamp(at(0), &mut message);
        let other = vec![6; 148];
        let reply = checker.reply(at(0), &other, 1, source("192.0.2.1:1"), &mut rng);
        assert!(!jar.accept(at(0), &reply));
    }
}
