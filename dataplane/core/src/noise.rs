//! The Noise handshake IKpsk2 (WireGuard paper, section 5.4), driven by `snow`. Message bodies
//! only: indices and macs are [`crate::message`]'s and [`crate::cookie`]'s.
//!
//! snow gets three things from here that its own resolver lacks: randomness from an argument,
//! secrets that are wiped, and a refusal of the all-zero shared secret (a point of low order).
//! Each stage is a type that the next message consumes, or leaves untouched if it is forged.

use rand::RngCore;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, Error, HandshakeState};
use zeroize::Zeroizing;

use crate::message::{INITIATION_BODY_LEN, RESPONSE_BODY_LEN};
use crate::peer::PublicKey;
use crate::secret::Secret;
use crate::timestamp::Tai64n;

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// The preshared key goes in at the end of the second message.
const PSK_LOCATION: u8 = 2;

/// The two keys of a finished handshake.
pub(crate) struct SessionKeys {
    pub(crate) send: Zeroizing<[u8; 32]>,
    pub(crate) receive: Zeroizing<[u8; 32]>,
}

/// The initiator, between its initiation and the response.
pub(crate) struct AwaitingResponse(HandshakeState);

/// The responder, after an initiation that verified.
pub(crate) struct Initiated {
    state: HandshakeState,
    pub(crate) peer: PublicKey,
    pub(crate) timestamp: Tai64n,
}

/// First message. None for a peer key of low order.
pub(crate) fn initiate(
    own: &Secret,
    peer: &PublicKey,
    preshared: &Secret,
    timestamp: Tai64n,
    rng: &mut dyn RngCore,
) -> Option<(AwaitingResponse, [u8; INITIATION_BODY_LEN])> {
    let mut state = builder(rng)
        .and_then(|b| b.prologue(PROLOGUE))
        .and_then(|b| b.local_private_key(own.expose()))
        .and_then(|b| b.remote_public_key(&peer.0))
        .and_then(|b| b.psk(PSK_LOCATION, preshared.expose()))
        .and_then(Builder::build_initiator)
        .ok()?;
    let mut body = [0; INITIATION_BODY_LEN];
    let len = state.write_message(&timestamp.0, &mut body).ok()?;
    (len == INITIATION_BODY_LEN).then_some((AwaitingResponse(state), body))
}

impl AwaitingResponse {
    /// Second message. A response that does not verify changes nothing.
    pub(crate) fn finish(&mut self, body: &[u8; RESPONSE_BODY_LEN]) -> Option<SessionKeys> {
        let len = self.0.read_message(body, &mut []).ok()?;
        (len == 0).then(|| split(&mut self.0))
    }
}

impl Initiated {
    /// Reads the first message. The peer is who it claims; whether we know it, the caller says.
    pub(crate) fn read(
        own: &Secret,
        body: &[u8; INITIATION_BODY_LEN],
        rng: &mut dyn RngCore,
    ) -> Option<Self> {
        let mut state = builder(rng)
            .and_then(|b| b.prologue(PROLOGUE))
            .and_then(|b| b.local_private_key(own.expose()))
            .and_then(Builder::build_responder)
            .ok()?;
        let mut timestamp = [0; Tai64n::LEN];
        let len = state.read_message(body, &mut timestamp).ok()?;
        let peer = PublicKey(state.get_remote_static()?.try_into().ok()?);
        (len == Tai64n::LEN).then_some(Self { state, peer, timestamp: Tai64n(timestamp) })
    }

    /// Second message.
    pub(crate) fn respond(
        mut self,
        preshared: &Secret,
    ) -> Option<([u8; RESPONSE_BODY_LEN], SessionKeys)> {
        self.state.set_psk(PSK_LOCATION.into(), preshared.expose()).ok()?;
        let mut body = [0; RESPONSE_BODY_LEN];
        let len = self.state.write_message(&[], &mut body).ok()?;
        (len == RESPONSE_BODY_LEN).then(|| {
            // split gives the initiator's view.
            let SessionKeys { send, receive } = split(&mut self.state);
            (body, SessionKeys { send: receive, receive: send })
        })
    }
}

/// The transport keys, the initiator's sending key first.
fn split(state: &mut HandshakeState) -> SessionKeys {
    let (send, receive) = state.dangerously_get_raw_split();
    SessionKeys { send: Zeroizing::new(send), receive: Zeroizing::new(receive) }
}

fn builder<'a>(rng: &mut dyn RngCore) -> Result<Builder<'a>, Error> {
    let resolver = Resolver { ephemeral: Secret::random(rng) };
    Ok(Builder::with_resolver(PATTERN.parse()?, Box::new(resolver)))
}

/// Primitives of one handshake.
struct Resolver {
    /// The only randomness that a handshake needs.
    ephemeral: Secret,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Ephemeral(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        let x25519 = X25519 { private: Secret::ZERO, public: [0; 32] };
        matches!(choice, DHChoice::Curve25519).then(|| Box::new(x25519) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

/// Gives its 32 bytes once; a second request is an error, never a repetition.
struct Ephemeral(Option<Secret>);

impl Random for Ephemeral {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        let secret = self.0.take().filter(|_| dest.len() == Secret::LEN).ok_or(Error::Rng)?;
        dest.copy_from_slice(secret.expose());
        Ok(())
    }
}

/// Curve25519 that wipes its private key and refuses a result of zero.
struct X25519 {
    private: Secret,
    public: [u8; 32],
}

impl X25519 {
    fn take(&mut self, private: Secret) {
        self.public = private.public_key().0;
        self.private = private;
    }
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        32
    }

    fn priv_len(&self) -> usize {
        Secret::LEN
    }

    fn set(&mut self, privkey: &[u8]) {
        // snow has checked the length against `priv_len`.
        if let Ok(bytes) = privkey.try_into() {
            self.take(Secret::new(bytes));
        }
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut bytes = Zeroizing::new([0; Secret::LEN]);
        rng.try_fill_bytes(&mut *bytes)?;
        self.take(Secret::new(*bytes));
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        self.private.expose()
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let public = pubkey.get(..32).and_then(|bytes| bytes.try_into().ok()).ok_or(Error::Dh)?;
        let shared = self.private.diffie_hellman(&PublicKey(public)).ok_or(Error::Dh)?;
        out.get_mut(..Secret::LEN).ok_or(Error::Dh)?.copy_from_slice(shared.expose());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use std::time::Duration;

    #[test]
    fn both_ends_get_the_same_keys_and_a_forged_response_changes_nothing() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (a, b) =
            (Secret::generate_private_key(&mut rng), Secret::generate_private_key(&mut rng));
        let psk = Secret::random(&mut rng);
        let timestamp = Tai64n::from_unix(Duration::from_secs(1));
        let (mut waiting, first) =
            initiate(&a, &b.public_key(), &psk, timestamp, &mut rng).unwrap();
        let initiated = Initiated::read(&b, &first, &mut rng).unwrap();
        assert_eq!((initiated.peer, initiated.timestamp), (a.public_key(), timestamp));
        let (second, theirs) = initiated.respond(&psk).unwrap();
        for byte in 0..second.len() {
            let mut forged = second;
            forged[byte] ^= 1;
            assert!(waiting.finish(&forged).is_none(), "byte {byte}");
        }
        let ours = waiting.finish(&second).unwrap();
        assert_eq!((&*ours.send, &*ours.receive), (&*theirs.receive, &*theirs.send));
        assert_ne!(ours.send, ours.receive);
    }

    #[test]
    fn a_wrong_preshared_key_or_a_low_order_peer_ends_the_handshake() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let (a, b) =
            (Secret::generate_private_key(&mut rng), Secret::generate_private_key(&mut rng));
        let timestamp = Tai64n::from_unix(Duration::from_secs(1));
        let (mut waiting, first) =
            initiate(&a, &b.public_key(), &Secret::ZERO, timestamp, &mut rng).unwrap();
        let initiated = Initiated::read(&b, &first, &mut rng).unwrap();
        let (second, _) = initiated.respond(&Secret::random(&mut rng)).unwrap();
        assert!(waiting.finish(&second).is_none());
        assert!(initiate(&a, &PublicKey([0; 32]), &Secret::ZERO, timestamp, &mut rng).is_none());
    }
}
