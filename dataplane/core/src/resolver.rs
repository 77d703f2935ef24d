//! The primitives that `snow` works with. Its own default ones do not wipe keys, accept an
//! all-zero Diffie-Hellman result and read the operating system's randomness; these do not.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blake2::{Blake2s256, Digest};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{ChaCha20Poly1305, Key, KeyInit, Nonce, Tag};
use snow::Error;
use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};
use zeroize::{Zeroize, Zeroizing};

use crate::noise::{Identity, KnownPeers};
use crate::peer::PublicKey;
use crate::secret::Secret;

/// Everything that one handshake needs from outside.
pub(crate) struct Resolver {
    pub(crate) identity: Arc<Identity>,
    pub(crate) known: Arc<KnownPeers>,
    pub(crate) is_responder: bool,
    /// The only randomness of a handshake, drawn by the caller.
    pub(crate) ephemeral: Secret,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(OneDraw(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, _: &DHChoice) -> Option<Box<dyn Dh>> {
        Some(Box::new(X25519 {
            identity: self.identity.clone(),
            known: self.known.clone(),
            is_responder: self.is_responder,
            private: Secret::ZERO,
            public: [0; 32],
            is_static: false,
            first_done: AtomicBool::new(false),
        }))
    }

    fn resolve_hash(&self, _: &HashChoice) -> Option<Box<dyn Hash>> {
        Some(Box::<Blake2s>::default())
    }

    fn resolve_cipher(&self, _: &CipherChoice) -> Option<Box<dyn Cipher>> {
        Some(Box::new(ChaChaPoly(Secret::ZERO)))
    }
}

/// Hands out one ephemeral key and then fails, so that none is ever used twice.
struct OneDraw(Option<Secret>);

impl Random for OneDraw {
    fn try_fill_bytes(&mut self, room: &mut [u8]) -> Result<(), Error> {
        let secret = self.0.take().ok_or(Error::Rng)?;
        if room.len() != Secret::LEN {
            return Err(Error::Rng);
        }
        room.copy_from_slice(secret.expose());
        Ok(())
    }
}

/// Either our static key pair, whose results with configured peers are known beforehand, or the
/// ephemeral one.
struct X25519 {
    identity: Arc<Identity>,
    known: Arc<KnownPeers>,
    is_responder: bool,
    private: Secret,
    public: [u8; 32],
    is_static: bool,
    /// The static pair was used with something that is no configured peer. A responder does that
    /// once, with the initiator's ephemeral; the second time would be a stranger's static key.
    first_done: AtomicBool,
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        32
    }

    fn priv_len(&self) -> usize {
        32
    }

    /// Called for the static key only, which the identity holds with its public key.
    fn set(&mut self, _: &[u8]) {
        self.private = self.identity.private.clone();
        self.public = self.identity.public.0;
        self.is_static = true;
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut bytes = Zeroizing::new([0; 32]);
        rng.try_fill_bytes(&mut *bytes)?;
        self.private = Secret::new(*bytes);
        self.public = self.private.public_key().0;
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        self.private.expose()
    }

    fn dh(&self, public: &[u8], out: &mut [u8]) -> Result<(), Error> {
        let public = PublicKey(*public.first_chunk().ok_or(Error::Dh)?);
        let out = out.first_chunk_mut().ok_or(Error::Dh)?;
        if self.is_static {
            if let Some(shared) = self.known.get(&public) {
                *out = *shared.expose();
                return Ok(());
            }
            if self.is_responder && self.first_done.swap(true, Ordering::Relaxed) {
                return Err(Error::Dh);
            }
        }
        *out = *self.private.diffie_hellman(&public).ok_or(Error::Dh)?.expose();
        Ok(())
    }
}

struct ChaChaPoly(Secret);

impl ChaChaPoly {
    fn cipher(&self) -> ChaCha20Poly1305 {
        ChaCha20Poly1305::new(Key::from_slice(self.0.expose()))
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = Nonce::default();
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; 32]) {
        self.0 = Secret::new(*key);
    }

    fn encrypt(&self, counter: u64, ad: &[u8], text: &[u8], out: &mut [u8]) -> usize {
        let (sealed, room) = out.split_at_mut(text.len());
        sealed.copy_from_slice(text);
        // The cipher refuses only texts beyond 256 GiB.
        if let Ok(tag) = self.cipher().encrypt_in_place_detached(&nonce(counter), ad, sealed) {
            room[..tag.len()].copy_from_slice(&tag);
        }
        text.len() + Tag::default().len()
    }

    fn decrypt(
        &self,
        counter: u64,
        ad: &[u8],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let (text, tag) = sealed.split_last_chunk::<16>().ok_or(Error::Decrypt)?;
        let out = out.get_mut(..text.len()).ok_or(Error::Decrypt)?;
        out.copy_from_slice(text);
        self.cipher()
            .decrypt_in_place_detached(&nonce(counter), ad, out, &Tag::from(*tag))
            .map_err(|_| Error::Decrypt)?;
        Ok(text.len())
    }
}

#[derive(Default)]
struct Blake2s(Blake2s256);

impl Hash for Blake2s {
    fn name(&self) -> &'static str {
        "BLAKE2s"
    }

    fn block_len(&self) -> usize {
        64
    }

    fn hash_len(&self) -> usize {
        32
    }

    fn reset(&mut self) {
        self.0 = Blake2s256::new();
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        out[..32].copy_from_slice(&self.0.finalize_reset());
    }

    fn hmac(&mut self, key: &[u8], data: &[u8], out: &mut [u8]) {
        out[..32].copy_from_slice(&*hmac(key, data));
    }

    fn hkdf(
        &mut self,
        chaining_key: &[u8],
        input: &[u8],
        outputs: usize,
        out1: &mut [u8],
        out2: &mut [u8],
        out3: &mut [u8],
    ) {
        let key = hmac(chaining_key, input);
        let mut block = Zeroizing::new([0; 33]);
        block[0] = 1;
        let mut len = 1;
        for (nth, out) in [out1, out2, out3].into_iter().take(outputs).enumerate() {
            let output = hmac(&*key, &block[..len]);
            out[..32].copy_from_slice(&*output);
            block[..32].copy_from_slice(&*output);
            block[32] = nth as u8 + 2;
            len = 33;
        }
    }
}

impl Drop for Blake2s {
    fn drop(&mut self) {
        // The state has no wiping of its own; black_box keeps the store from being optimised out.
        self.0 = Blake2s256::new();
        black_box(&self.0);
    }
}

/// HMAC-BLAKE2s (RFC 2104) without copies that stay behind.
fn hmac(key: &[u8], data: &[u8]) -> Zeroizing<[u8; 32]> {
    let pad = |byte: u8| {
        let mut pad = Zeroizing::new([byte; 64]);
        pad.iter_mut().zip(key).for_each(|(pad, key)| *pad ^= key);
        pad
    };
    let hash = |pad: &[u8], data: &[u8]| {
        let mut state = Blake2s::default();
        state.input(pad);
        state.input(data);
        let mut out = Zeroizing::new([0; 32]);
        state.result(&mut *out);
        out
    };
    hash(&*pad(0x5c), &*hash(&*pad(0x36), data))
}

/// Overwrites what finished calls left below the caller on the stack: `snow` keeps its
/// intermediate keys in plain local arrays.
#[inline(never)]
pub(crate) fn scrub_stack() {
    let mut room = [0xffu8; 8192];
    black_box(&mut room);
    room.zeroize();
}
