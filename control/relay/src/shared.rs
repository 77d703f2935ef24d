//! What all threads of the relay see.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use millrace_path::sealed::{PublicKey, SecretKey};
use rustls::ServerConfig;

use crate::acme::Challenges;
use crate::addresses::Addresses;
use crate::mail::Mailbox;
use crate::mesh::Mesh;
use crate::metrics::Counters;
use crate::registry::{Place, Registry};

/// What a reload replaces.
#[derive(Debug)]
pub struct Live {
    /// None without `[https]`.
    pub tls: Option<Arc<ServerConfig>>,
    /// When its certificate ends.
    pub certificate_end: Option<SystemTime>,
    pub admission: Admission,
    pub rate: Option<Rate>,
}

/// Who may log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    Everybody,
    Keys(HashSet<PublicKey>),
}

impl Admission {
    pub fn admits(&self, key: &PublicKey) -> bool {
        match self {
            Self::Everybody => true,
            Self::Keys(keys) => keys.contains(key),
        }
    }
}

/// What one client may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub bytes_per_second: u64,
    pub burst_bytes: u64,
}

/// One worker, or the thread of one mate, as the others and the main thread see it.
#[derive(Debug)]
pub struct Desk {
    pub mailbox: Mailbox,
    pub counters: Counters,
    /// Grows while the worker takes turns.
    pub beat: AtomicU64,
    /// Mates on it that watch who comes and goes.
    pub watchers: AtomicUsize,
}

#[derive(Debug)]
pub struct Shared {
    pub secret: SecretKey,
    pub public: PublicKey,
    pub live: ArcSwap<Live>,
    pub registry: Registry,
    /// Those of the workers, behind them those of the mates.
    pub desks: Vec<Desk>,
    pub workers: usize,
    pub mesh: Option<Mesh>,
    /// One for each STUN socket.
    pub stun: Vec<Counters>,
    /// The counters of the thread that gets certificates, what it has to answer, and whether there
    /// is a new one.
    pub acme: Counters,
    pub challenges: Challenges,
    pub renewed: AtomicBool,
    pub connections: AtomicUsize,
    pub connections_max: usize,
    pub addresses: Addresses,
    pub reload_failed: AtomicBool,
    pub draining: AtomicBool,
    pub stopped: AtomicBool,
}

impl Shared {
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// The mesh and the mate whose client a key is.
    pub fn far(&self, key: &PublicKey) -> Option<Place> {
        let desk = self.mesh.as_ref()?.find(key)?;
        Some(Place { worker: desk, slot: 0, generation: 0 })
    }

    /// Makes every worker look at the two flags above.
    pub fn ring(&self) {
        for desk in &self.desks {
            desk.mailbox.ring();
        }
    }

    pub fn counters(&self) -> impl Iterator<Item = &Counters> {
        self.desks.iter().map(|desk| &desk.counters).chain(&self.stun).chain([&self.acme])
    }
}
