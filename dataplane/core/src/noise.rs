//! The Noise handshake IKpsk2 (WireGuard paper, section 5.4). Each stage is a type that the next
//! message consumes: nothing can be sent or read twice, or out of order.
//!
//! The cost of a message from a stranger with a good `mac1` is one Diffie-Hellman; static-static
//! results are computed when a peer is configured.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::{Arc, LazyLock};

use snow::params::NoiseParams;
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use crate::message::{INITIATION_BODY_LEN, RESPONSE_BODY_LEN};
use crate::peer::PublicKey;
use crate::resolver::{Resolver, scrub_stack};
use crate::secret::Secret;
use crate::timestamp::Tai64n;

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Where IKpsk2 mixes the preshared key in.
const PSK_PLACE: usize = 2;

/// Our own static key pair.
pub(crate) struct Identity {
    pub(crate) private: Secret,
    pub(crate) public: PublicKey,
}

impl Identity {
    pub(crate) fn new(private: Secret) -> Self {
        let public = private.public_key();
        Self { private, public }
    }
}

/// Who may shake hands: the static-static secret of each configured peer. A peer whose key is a
/// point of low order has none, and so is a stranger.
#[derive(Clone, Default)]
pub(crate) struct KnownPeers(BTreeMap<PublicKey, Secret>);

impl KnownPeers {
    /// A point of low order stays a stranger.
    pub(crate) fn insert(&mut self, identity: &Identity, peer: PublicKey) {
        self.0.extend(identity.private.diffie_hellman(&peer).map(|shared| (peer, shared)));
    }

    pub(crate) fn remove(&mut self, peer: &PublicKey) {
        self.0.remove(peer);
    }

    pub(crate) fn get(&self, peer: &PublicKey) -> Option<&Secret> {
        self.0.get(peer)
    }
}

/// The two keys of a session, ours first.
pub(crate) struct TransportKeys {
    pub(crate) send: Zeroizing<[u8; 32]>,
    pub(crate) receive: Zeroizing<[u8; 32]>,
}

/// Why an initiation was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The static key is not in [`KnownPeers`].
    UnknownPeer,
    /// Something did not verify.
    Invalid,
}

/// We sent an initiation and wait for its response.
pub(crate) struct InitiationSent(Engine);

impl InitiationSent {
    /// None if `peer` is unknown.
    pub(crate) fn start(
        identity: &Arc<Identity>,
        known: &KnownPeers,
        peer: &PublicKey,
        timestamp: Tai64n,
        ephemeral: Secret,
    ) -> Option<(Self, [u8; INITIATION_BODY_LEN])> {
        let only = KnownPeers(BTreeMap::from([(*peer, known.get(peer)?.clone())]));
        let mut engine = Engine::new(identity, Arc::new(only), ephemeral, Some(peer))?;
        let mut body = [0; INITIATION_BODY_LEN];
        let len = engine.0.write_message(&timestamp.0, &mut body).ok()?;
        scrub_stack();
        (len == body.len()).then_some((Self(engine), body))
    }

    /// The session's keys; or the same stage again if the response does not verify, so that
    /// forged ones cannot end a handshake.
    pub(crate) fn finish(
        mut self,
        body: &[u8; RESPONSE_BODY_LEN],
        preshared: &Secret,
    ) -> Result<TransportKeys, Self> {
        let engine = &mut self.0.0;
        let read = engine
            .set_psk(PSK_PLACE, preshared.expose())
            .and_then(|()| engine.read_message(body, &mut []));
        let keys = read.is_ok().then(|| self.0.keys(true));
        scrub_stack();
        keys.ok_or(self)
    }
}

/// We read an initiation that verified, from a peer that we know.
pub(crate) struct InitiationReceived {
    engine: Engine,
    pub(crate) peer: PublicKey,
    pub(crate) timestamp: Tai64n,
}

impl InitiationReceived {
    pub(crate) fn read(
        identity: &Arc<Identity>,
        known: &Arc<KnownPeers>,
        body: &[u8; INITIATION_BODY_LEN],
        ephemeral: Secret,
    ) -> Result<Self, Refused> {
        let mut engine =
            Engine::new(identity, known.clone(), ephemeral, None).ok_or(Refused::Invalid)?;
        let mut timestamp = [0; Tai64n::LEN];
        let read = engine.0.read_message(body, &mut timestamp);
        scrub_stack();
        let peer = engine.0.get_remote_static().and_then(|key| key.first_chunk()).copied();
        let peer = PublicKey(peer.ok_or(Refused::Invalid)?);
        if known.get(&peer).is_none() {
            return Err(Refused::UnknownPeer);
        }
        match read {
            Ok(Tai64n::LEN) => Ok(Self { engine, peer, timestamp: Tai64n(timestamp) }),
            _ => Err(Refused::Invalid),
        }
    }

    /// The response and the session's keys; none if the initiator's ephemeral is of low order.
    pub(crate) fn respond(
        mut self,
        preshared: &Secret,
    ) -> Option<([u8; RESPONSE_BODY_LEN], TransportKeys)> {
        let engine = &mut self.engine.0;
        let mut body = [0; RESPONSE_BODY_LEN];
        let written = engine
            .set_psk(PSK_PLACE, preshared.expose())
            .and_then(|()| engine.write_message(&[], &mut body));
        let keys = written.is_ok().then(|| self.engine.keys(false));
        scrub_stack();
        Some((body, keys?))
    }
}

/// `snow`'s state in a box of its own, overwritten before the box is given back.
struct Engine(Box<HandshakeState>);

impl Engine {
    /// An initiator if `remote` is given, else a responder.
    fn new(
        identity: &Arc<Identity>,
        known: Arc<KnownPeers>,
        ephemeral: Secret,
        remote: Option<&PublicKey>,
    ) -> Option<Self> {
        state(identity, known, ephemeral, remote).map(Box::new).map(Self)
    }

    fn keys(&mut self, initiator: bool) -> TransportKeys {
        let (first, second) = self.0.dangerously_get_raw_split();
        let (first, second) = (Zeroizing::new(first), Zeroizing::new(second));
        // The initiator sends with the first key of the split.
        let (send, receive) = if initiator { (first, second) } else { (second, first) };
        TransportKeys { send, receive }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        static NOBODY: LazyLock<Arc<Identity>> = LazyLock::new(|| {
            Arc::new(Identity { private: Secret::ZERO, public: PublicKey([0; 32]) })
        });
        // The chaining key and the preshared key stand in the state itself and have no wiping of
        // their own; black_box keeps the overwriting from being optimised out.
        if let Some(blank) = state(&NOBODY, Arc::default(), Secret::ZERO, None) {
            *self.0 = blank;
        }
        black_box(&*self.0);
    }
}

fn state(
    identity: &Arc<Identity>,
    known: Arc<KnownPeers>,
    ephemeral: Secret,
    remote: Option<&PublicKey>,
) -> Option<HandshakeState> {
    static PARAMS: LazyLock<Option<NoiseParams>> = LazyLock::new(|| PATTERN.parse().ok());
    let is_responder = remote.is_none();
    let resolver = Resolver { identity: identity.clone(), known, is_responder, ephemeral };
    let builder = Builder::with_resolver(PARAMS.clone()?, Box::new(resolver))
        .prologue(PROLOGUE)
        .and_then(|builder| builder.local_private_key(identity.private.expose()))
        .ok()?;
    match remote {
        Some(remote) => builder.remote_public_key(&remote.0).and_then(Builder::build_initiator),
        None => builder.build_responder(),
    }
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use std::time::Duration;

    struct Sides {
        rng: ChaCha8Rng,
        a: Arc<Identity>,
        b: Arc<Identity>,
        known_to_a: KnownPeers,
        known_to_b: Arc<KnownPeers>,
    }

    fn sides(seed: u64) -> Sides {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut identity = || Arc::new(Identity::new(Secret::generate_private_key(&mut rng)));
        let (a, b) = (identity(), identity());
        let (mut known_to_a, mut known_to_b) = (KnownPeers::default(), KnownPeers::default());
        known_to_a.insert(&a, b.public);
        known_to_b.insert(&b, a.public);
        Sides { rng, a, b, known_to_a, known_to_b: Arc::new(known_to_b) }
    }

    fn timestamp() -> Tai64n {
        Tai64n::from_unix(Duration::from_secs(1))
    }

    impl Sides {
        fn start(&mut self) -> (InitiationSent, [u8; INITIATION_BODY_LEN]) {
            let ephemeral = Secret::random(&mut self.rng);
            let known = &self.known_to_a;
            InitiationSent::start(&self.a, known, &self.b.public, timestamp(), ephemeral).unwrap()
        }

        fn read(
            &mut self,
            body: &[u8; INITIATION_BODY_LEN],
        ) -> Result<InitiationReceived, Refused> {
            let ephemeral = Secret::random(&mut self.rng);
            InitiationReceived::read(&self.b, &self.known_to_b, body, ephemeral)
        }
    }

    #[test]
    fn both_ends_get_the_same_keys_and_a_forged_response_changes_nothing() {
        let mut sides = sides(1);
        let psk = Secret::random(&mut sides.rng);
        let (mut sent, first) = sides.start();
        let received = sides.read(&first).unwrap();
        assert_eq!((received.peer, received.timestamp), (sides.a.public, timestamp()));
        let (second, theirs) = received.respond(&psk).unwrap();
        for byte in 0..second.len() {
            let mut forged = second;
            forged[byte] ^= 1;
            sent = sent.finish(&forged, &psk).err().unwrap();
        }
        sent = sent.finish(&second, &Secret::ZERO).err().expect("a wrong preshared key");
        let ours = sent.finish(&second, &psk).ok().unwrap();
        assert_eq!((&*ours.send, &*ours.receive), (&*theirs.receive, &*theirs.send));
        assert_ne!(ours.send, ours.receive);
    }

    #[test]
    fn any_flipped_bit_of_an_initiation_is_refused() {
        let mut sides = sides(2);
        let (_, first) = sides.start();
        for byte in 0..first.len() {
            let mut forged = first;
            forged[byte] ^= 0x40;
            assert_eq!(sides.read(&forged).err(), Some(Refused::Invalid), "byte {byte}");
        }
        assert!(sides.read(&first).is_ok());
    }

    #[test]
    fn a_stranger_is_told_apart_from_a_forger() {
        let mut sides = sides(3);
        sides.known_to_b = Arc::default();
        let (_, first) = sides.start();
        assert_eq!(sides.read(&first).err(), Some(Refused::UnknownPeer));
    }

    /// The seven points of low order in their canonical and non-canonical forms, as the Linux
    /// self-test has them; "order 8" twice, and p-1, p, p+1.
    fn low_order_points() -> Vec<PublicKey> {
        let edge = |first: u8| {
            let mut point = [0xff; 32];
            (point[0], point[31]) = (first, 0x7f);
            PublicKey(point)
        };
        let mut one = [0; 32];
        one[0] = 1;
        let order_8 = |words: [u64; 4]| {
            let mut point = [0; 32];
            point.chunks_mut(8).zip(words).for_each(|(to, word)| {
                to.copy_from_slice(&word.to_be_bytes());
            });
            PublicKey(point)
        };
        vec![
            PublicKey([0; 32]),
            PublicKey(one),
            order_8([
                0xe0eb7a7c3b41b8ae,
                0x1656e3faf19fc46a,
                0xda098deb9c32b1fd,
                0x866205165f49b800,
            ]),
            order_8([
                0x5f9c95bca3508c24,
                0xb1d0b1559c83ef5b,
                0x04445cc4581c8e86,
                0xd8224eddd09f1157,
            ]),
            edge(0xec),
            edge(0xed),
            edge(0xee),
        ]
    }

    #[test]
    fn a_point_of_low_order_never_shakes_hands() {
        let mut sides = sides(4);
        for point in low_order_points() {
            assert!(sides.a.private.diffie_hellman(&point).is_none(), "{point:?}");
            sides.known_to_a.insert(&sides.a, point);
            let ephemeral = Secret::random(&mut sides.rng);
            let known = &sides.known_to_a;
            let start = InitiationSent::start(&sides.a, known, &point, timestamp(), ephemeral);
            assert!(start.is_none(), "{point:?}");
        }
        // As an ephemeral key in either message.
        for point in low_order_points() {
            let (sent, mut first) = sides.start();
            let (mut second, _) = sides.read(&first).unwrap().respond(&Secret::ZERO).unwrap();
            first[..32].copy_from_slice(&point.0);
            assert_eq!(sides.read(&first).err(), Some(Refused::Invalid), "{point:?}");
            second[..32].copy_from_slice(&point.0);
            assert!(sent.finish(&second, &Secret::ZERO).is_err(), "{point:?}");
        }
    }
}
