//! Disco, Tailscale's discovery messages, byte for byte (tailscale, disco/disco.go).
//!
//! On the wire: magic 6, the sender's disco key 32, nonce 24, box. In the box: type 1, version 1,
//! body. Bytes after a body that we know are a later version's and ignored; types that we do not
//! know are not errors.

use std::net::SocketAddr;

use crate::limits::{CANDIDATES_MAX, DATAGRAM_LEN_MAX};
use crate::sealed::{BoxKey, NONCE_LEN, PublicKey, TAG_LEN};
use crate::transaction::TransactionId;
use crate::wire_address::{self, ADDRESS_LEN};

/// What every message begins with.
pub const MAGIC: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
/// Bytes before the box's content: magic, key, nonce, tag.
pub const OVERHEAD: usize = MAGIC.len() + KEY_LEN + NONCE_LEN + TAG_LEN;
/// Bytes of a ping that names its sender's node key and carries no padding.
pub const PING_LEN: usize = OVERHEAD + 2 + TRANSACTION_LEN + KEY_LEN;
/// Bytes of a pong.
pub const PONG_LEN: usize = OVERHEAD + 2 + TRANSACTION_LEN + ADDRESS_LEN;

const KEY_LEN: usize = 32;
const TRANSACTION_LEN: usize = 12;
const VERSION: u8 = 0;

/// Message types.
mod kind {
    pub(super) const PING: u8 = 1;
    pub(super) const PONG: u8 = 2;
    pub(super) const CALL_ME_MAYBE: u8 = 3;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Asks for a pong on this path, and opens firewalls on the way.
    Ping {
        transaction: TransactionId,
        /// The sender's WireGuard key, as it says; very old clients do not.
        node_key: Option<PublicKey>,
        /// Zero bytes at the end: they prove that a datagram of this length passes.
        padding: usize,
    },
    Pong {
        transaction: TransactionId,
        /// Where the ping came from, as its receiver saw it.
        source: SocketAddr,
        /// How long ago the pong's sender last received an authenticated packet of the tunnel from
        /// the other, in ms; None if it does not know. Ours: Tailscale neither sends nor reads it.
        received_age_ms: Option<u32>,
    },
    /// Through the relay only: asks the receiver to ping all of these addresses now.
    CallMeMaybe { addresses: Vec<SocketAddr> },
    /// Peer relays and whatever is invented later: to be ignored.
    Unknown { kind: u8, version: u8 },
}

/// Why an opened message says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoError {
    #[error("the box was not sealed with the key of this sender and us")]
    Sealed,
    #[error("message type {kind} ends after {seen} bytes")]
    Short { kind: u8, seen: usize },
}

/// A message as it arrived, before any cryptography: whoever does not know `sender` stops here.
pub struct Envelope<'d> {
    pub sender: PublicKey,
    nonce: [u8; NONCE_LEN],
    sealed: &'d mut [u8],
}

impl<'d> Envelope<'d> {
    /// None if this is not disco.
    pub fn parse(datagram: &'d mut [u8]) -> Option<Self> {
        let (magic, rest) = datagram.split_first_chunk_mut()?;
        if *magic != MAGIC {
            return None;
        }
        let (sender, rest) = rest.split_first_chunk_mut()?;
        let (nonce, sealed) = rest.split_first_chunk_mut()?;
        Some(Self { sender: PublicKey(*sender), nonce: *nonce, sealed })
    }

    /// Opens the box with the key of `sender` and us.
    pub fn open(self, key: &BoxKey) -> Result<Message, DiscoError> {
        let content = key.open(&self.nonce, self.sealed).ok_or(DiscoError::Sealed)?;
        Message::parse(content)
    }
}

/// The datagram that carries `message` from `sender` (our disco key). `nonce` is random.
pub fn seal(message: &Message, sender: PublicKey, nonce: [u8; NONCE_LEN], key: &BoxKey) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(PING_LEN);
    datagram.extend(MAGIC);
    datagram.extend(sender.0);
    datagram.extend(nonce);
    let sealed_at = datagram.len();
    datagram.extend([0; TAG_LEN]);
    message.write(&mut datagram);
    key.seal(&nonce, &mut datagram[sealed_at..]);
    datagram
}

impl Message {
    /// A ping whose datagram has `len` bytes, at least [`PING_LEN`].
    pub fn ping_of_len(transaction: TransactionId, node_key: PublicKey, len: usize) -> Self {
        let padding = len.min(DATAGRAM_LEN_MAX).saturating_sub(PING_LEN);
        Self::Ping { transaction, node_key: Some(node_key), padding }
    }

    pub(crate) fn parse(content: &[u8]) -> Result<Self, DiscoError> {
        let Some(([kind, version], body)) = content.split_first_chunk() else {
            return Err(DiscoError::Short { kind: 0, seen: content.len() });
        };
        let (kind, version) = (*kind, *version);
        let parsed = match kind {
            kind::PING => Self::parse_ping(body),
            kind::PONG => Self::parse_pong(version, body),
            // Its list has no length of its own: of another version it may be anything.
            kind::CALL_ME_MAYBE if version == VERSION => Some(Self::parse_call_me_maybe(body)),
            _ => Some(Self::Unknown { kind, version }),
        };
        parsed.ok_or(DiscoError::Short { kind, seen: content.len() })
    }

    fn parse_ping(body: &[u8]) -> Option<Self> {
        let (transaction, rest) = body.split_first_chunk()?;
        let transaction = TransactionId(*transaction);
        // Zeros are padding, not a key.
        Some(match rest.split_first_chunk::<KEY_LEN>() {
            Some((key, padding)) if *key != [0; KEY_LEN] => {
                let node_key = Some(PublicKey(*key));
                Self::Ping { transaction, node_key, padding: padding.len() }
            }
            _ => Self::Ping { transaction, node_key: None, padding: rest.len() },
        })
    }

    fn parse_pong(version: u8, body: &[u8]) -> Option<Self> {
        let (transaction, rest) = body.split_first_chunk()?;
        let (source, rest) = rest.split_first_chunk()?;
        let source = wire_address::from_bytes(source);
        let age = rest.first_chunk().filter(|_| version == VERSION);
        let received_age_ms = age.map(|age| u32::from_be_bytes(*age));
        Some(Self::Pong { transaction: TransactionId(*transaction), source, received_age_ms })
    }

    fn parse_call_me_maybe(body: &[u8]) -> Self {
        let (chunks, rest) = body.as_chunks();
        // What is not a whole number of addresses is not a list of addresses.
        let addresses = if rest.is_empty() { chunks } else { &[] };
        let addresses = addresses.iter().take(CANDIDATES_MAX).map(wire_address::from_bytes);
        Self::CallMeMaybe { addresses: addresses.collect() }
    }

    fn write(&self, content: &mut Vec<u8>) {
        match self {
            Self::Ping { transaction, node_key, padding } => {
                content.extend([kind::PING, VERSION]);
                content.extend(transaction.0);
                content.extend(node_key.iter().flat_map(|key| key.0));
                content.resize(content.len() + padding.min(&DATAGRAM_LEN_MAX), 0);
            }
            Self::Pong { transaction, source, received_age_ms } => {
                content.extend([kind::PONG, VERSION]);
                content.extend(transaction.0);
                content.extend(wire_address::to_bytes(*source));
                content.extend(received_age_ms.iter().flat_map(|age| age.to_be_bytes()));
            }
            Self::CallMeMaybe { addresses } => {
                content.extend([kind::CALL_ME_MAYBE, VERSION]);
                let addresses = addresses.iter().take(CANDIDATES_MAX).copied();
                content.extend(addresses.flat_map(wire_address::to_bytes));
            }
            Self::Unknown { kind, version } => content.extend([*kind, *version]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::sealed::SecretKey;

    const TRANSACTION: TransactionId = TransactionId([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);

    fn bytes(hex: &str) -> Vec<u8> {
        hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
    }

    fn node_key() -> PublicKey {
        let mut key = [0; 32];
        (key[1], key[2], key[30], key[31]) = (1, 2, 30, 31);
        PublicKey(key)
    }

    /// The facts of tailscale's disco/disco_test.go: each message and its bytes.
    fn golden() -> Vec<(Message, Vec<u8>)> {
        let ping =
            |node_key, padding| Message::Ping { transaction: TRANSACTION, node_key, padding };
        let pong = |source: &str| Message::Pong {
            transaction: TRANSACTION,
            source: source.parse().unwrap(),
            received_age_ms: None,
        };
        let key = "00 01 02 00 00 00 00 00 00 00 00 00 00 00 00 00
                   00 00 00 00 00 00 00 00 00 00 00 00 00 00 1e 1f";
        let ping_bytes = "01 00 01 02 03 04 05 06 07 08 09 0a 0b 0c";
        let pong_bytes = "02 00 01 02 03 04 05 06 07 08 09 0a 0b 0c";
        let called = ["1.2.3.4:567", "[2001::3456]:789"].map(|address| address.parse().unwrap());
        vec![
            (ping(None, 0), bytes(ping_bytes)),
            (ping(Some(node_key()), 0), bytes(&format!("{ping_bytes} {key}"))),
            (ping(None, 3), bytes(&format!("{ping_bytes} 00 00 00"))),
            (ping(Some(node_key()), 3), bytes(&format!("{ping_bytes} {key} 00 00 00"))),
            (
                pong("2.3.4.5:1234"),
                bytes(&format!(
                    "{pong_bytes} 00 00 00 00 00 00 00 00 00 00 ff ff 02 03 04 05 04 d2"
                )),
            ),
            (
                pong("[fed0::12]:6666"),
                bytes(&format!(
                    "{pong_bytes} fe d0 00 00 00 00 00 00 00 00 00 00 00 00 00 12 1a 0a"
                )),
            ),
            (Message::CallMeMaybe { addresses: vec![] }, bytes("03 00")),
            (
                Message::CallMeMaybe { addresses: called.to_vec() },
                bytes(
                    "03 00 00 00 00 00 00 00 00 00 00 00 ff ff 01 02 03 04 02 37
                     20 01 00 00 00 00 00 00 00 00 00 00 00 00 34 56 03 15",
                ),
            ),
        ]
    }

    #[test]
    fn contents_are_those_of_tailscale() {
        for (message, content) in golden() {
            let mut written = Vec::new();
            message.write(&mut written);
            assert_eq!(written, content, "{message:?}");
            assert_eq!(Message::parse(&content), Ok(message));
        }
    }

    #[test]
    fn a_datagram_is_magic_key_nonce_and_the_box_of_crypto_box() {
        use crypto_box::aead::Aead;
        let (alice, bob) = ([1; 32], [2; 32]);
        let sender = SecretKey::from_bytes(alice).public_key();
        let receiver = SecretKey::from_bytes(bob).public_key();
        let key = BoxKey::agree(&SecretKey::from_bytes(alice), receiver).unwrap();
        let message = Message::ping_of_len(TRANSACTION, node_key(), 0);
        let datagram = seal(&message, sender, [7; NONCE_LEN], &key);

        assert_eq!(datagram.len(), PING_LEN);
        assert_eq!(PING_LEN, 124);
        let oracle = crypto_box::SalsaBox::new(&sender.0.into(), &bob.into());
        assert_eq!(datagram[..6], *b"TS\xf0\x9f\x92\xac");
        assert_eq!(datagram[6..38], sender.0);
        assert_eq!(datagram[38..62], [7; 24]);
        let content = oracle.decrypt(&[7; 24].into(), &datagram[62..]).unwrap();
        assert_eq!(content, golden()[1].1);
    }

    #[test]
    fn padded_pings_have_the_length_that_was_asked_for() {
        let key = BoxKey::from_bytes([3; 32]);
        for len in [PING_LEN, 1280, 1452, 8952] {
            let message = Message::ping_of_len(TRANSACTION, node_key(), len);
            assert_eq!(seal(&message, node_key(), [0; NONCE_LEN], &key).len(), len);
        }
    }

    #[test]
    fn what_later_versions_add_is_ignored() {
        for (message, mut content) in golden().into_iter().skip(4).take(2) {
            content.extend([1, 2, 3]);
            content[1] = 9;
            assert_eq!(Message::parse(&content), Ok(message));
        }
        let later = Message::parse(&[3, 1, 0, 0]);
        assert_eq!(later, Ok(Message::Unknown { kind: 3, version: 1 }));
        let relay = Message::parse(&[4; 74]);
        assert_eq!(relay, Ok(Message::Unknown { kind: 4, version: 4 }));
        let crooked = Message::parse(&[3, 0, 1]);
        assert_eq!(crooked, Ok(Message::CallMeMaybe { addresses: vec![] }));
    }

    #[test]
    fn cut_contents_are_refused() {
        for content in [&[][..], &[1], &[1, 0], &[2, 0, 1]] {
            assert!(matches!(Message::parse(content), Err(DiscoError::Short { .. })));
        }
        let (_, pong) = &golden()[4];
        for len in 2..pong.len() {
            let error = DiscoError::Short { kind: 2, seen: len };
            assert_eq!(Message::parse(&pong[..len]), Err(error));
        }
    }

    #[test]
    fn a_list_of_addresses_is_bounded_both_ways() {
        let addresses = vec!["192.0.2.1:1".parse().unwrap(); 2 * CANDIDATES_MAX];
        let mut content = vec![3, 0];
        content.extend(addresses.iter().copied().flat_map(wire_address::to_bytes));
        let parsed = Message::parse(&content).unwrap();
        let kept = addresses[..CANDIDATES_MAX].to_vec();
        assert_eq!(parsed, Message::CallMeMaybe { addresses: kept });
        let mut written = Vec::new();
        Message::CallMeMaybe { addresses }.write(&mut written);
        assert_eq!(written.len(), 2 + CANDIDATES_MAX * ADDRESS_LEN);
    }

    fn any_address() -> impl Strategy<Value = SocketAddr> {
        any::<(IpAddr, u16)>().prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port))
    }

    fn any_message() -> impl Strategy<Value = Message> {
        let transaction = || any::<[u8; 12]>().prop_map(TransactionId);
        prop_oneof![
            (transaction(), any::<[u8; 32]>(), 0_usize..2000).prop_map(
                |(transaction, key, padding)| {
                    let node_key = Some(PublicKey(key)).filter(|key| key.0 != [0; 32]);
                    Message::Ping { transaction, node_key, padding }
                }
            ),
            (transaction(), any_address(), any::<Option<u32>>()).prop_map(
                |(transaction, source, received_age_ms)| {
                    Message::Pong { transaction, source, received_age_ms }
                }
            ),
            vec(any_address(), 0..CANDIDATES_MAX)
                .prop_map(|addresses| Message::CallMeMaybe { addresses }),
            (4_u8.., any::<u8>()).prop_map(|(kind, version)| Message::Unknown { kind, version }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_to_the_same(message in any_message(), key: [u8; 32], nonce: [u8; 24]) {
            let mut datagram = seal(&message, node_key(), nonce, &BoxKey::from_bytes(key));
            let envelope = Envelope::parse(&mut datagram).unwrap();
            prop_assert_eq!(envelope.sender, node_key());
            prop_assert_eq!(envelope.open(&BoxKey::from_bytes(key)), Ok(message));
        }

        #[test]
        fn a_changed_or_cut_datagram_does_not_open(at in 38_usize..PONG_LEN, bit in 0_u8..8) {
            let message = &golden()[4].0;
            let key = BoxKey::from_bytes([5; 32]);
            let mut datagram = seal(message, node_key(), [6; NONCE_LEN], &key);
            let mut cut = datagram[..at].to_vec();
            let opened = Envelope::parse(&mut cut).map(|envelope| envelope.open(&key));
            prop_assert!(matches!(opened, None | Some(Err(DiscoError::Sealed))));
            datagram[at] ^= 1 << bit;
            let opened = Envelope::parse(&mut datagram).unwrap().open(&key);
            prop_assert_eq!(opened, Err(DiscoError::Sealed));
        }

        #[test]
        fn any_content_is_read_or_refused(content: Vec<u8>) {
            let _ = Message::parse(&content);
        }
    }
}
