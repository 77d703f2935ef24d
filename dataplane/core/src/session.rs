//! A session's two keys, split by direction, and the table that finds the receiving one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::{ArcSwapOption, Guard};
use crossbeam::utils::CachePadded;
use millrace_aead::{OpeningKey, SealingKey};

use crate::limits::{
    REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES, REKEY_AFTER_TIME,
    REKEY_AFTER_TIME_YIELDING,
};
use crate::peer::Peer;
use crate::replay::ReplayWindow;
use crate::time::Instant;

/// The sending half of a session. Shared by all workers; the counter is the only thing that moves.
pub struct TxSession {
    /// The peer's index, written into each data message.
    pub receiver_index: u32,
    /// Our index of the same session.
    pub local_index: u32,
    pub key: SealingKey,
    next_counter: CachePadded<AtomicU64>,
    pub born: Instant,
    /// We started the handshake, so rekeying by age is our duty.
    pub initiator: bool,
    /// The peer has a session of its own that is as good, and should rekey before us.
    yields: AtomicBool,
}

impl TxSession {
    pub fn new(
        receiver_index: u32,
        local_index: u32,
        key: SealingKey,
        born: Instant,
        initiator: bool,
    ) -> Self {
        let next_counter = CachePadded::new(AtomicU64::new(0));
        let yields = AtomicBool::new(false);
        Self { receiver_index, local_index, key, next_counter, born, initiator, yields }
    }

    /// Reserves `count` consecutive counters and returns the first, or none past the limit. A
    /// counter is never handed out twice: the addition is atomic and the limit is checked before
    /// it, with 2^13 counters of slack for workers that pass the check together.
    pub fn reserve(&self, count: u64) -> Option<u64> {
        if self.next_counter.load(Ordering::Relaxed) >= REJECT_AFTER_MESSAGES - count {
            return None;
        }
        Some(self.next_counter.fetch_add(count, Ordering::Relaxed))
    }

    /// Messages sent so far.
    pub fn sent(&self) -> u64 {
        self.next_counter.load(Ordering::Relaxed)
    }

    /// May still be used for sending at `now`.
    pub fn usable(&self, now: Instant) -> bool {
        now.since(self.born) < REJECT_AFTER_TIME
    }

    /// A new session should follow: by age if we initiated this one, by count in any case.
    pub fn is_worn(&self, now: Instant) -> bool {
        let age = now.since(self.born);
        let old = self.initiator
            && age >= REKEY_AFTER_TIME
            && (age >= REKEY_AFTER_TIME_YIELDING || !self.yields.load(Ordering::Relaxed));
        old || self.sent() >= REKEY_AFTER_MESSAGES
    }

    /// Leaves rekeying by age to the peer for a while.
    pub fn yield_rekey(&self) {
        self.yields.store(true, Ordering::Relaxed);
    }

    /// For tests of the message limits only.
    pub fn skip_to(&self, counter: u64) {
        self.next_counter.store(counter, Ordering::Relaxed);
    }
}

/// The receiving half of a session, found by the index that we chose.
pub struct RxSession {
    pub local_index: u32,
    pub peer: Arc<Peer>,
    pub key: OpeningKey,
    /// Locked once per batch and session. Steering sends a session to one worker, so the lock is
    /// free in practice; correctness does not depend on steering.
    pub replay: Mutex<ReplayWindow>,
    pub born: Instant,
    pub initiator: bool,
    /// A packet under this key arrived: the responder may now send with it.
    pub confirmed: AtomicBool,
}

impl RxSession {
    pub fn usable(&self, now: Instant) -> bool {
        now.since(self.born) < REJECT_AFTER_TIME
    }
}

/// Receiver index → session. The low bits of an index are its place, the high bits are random.
pub struct SessionTable {
    places: Box<[ArcSwapOption<RxSession>]>,
}

impl SessionTable {
    /// `capacity` is rounded up to a power of two.
    pub fn new(capacity: usize) -> Self {
        let places = (0..capacity.next_power_of_two()).map(|_| ArcSwapOption::empty()).collect();
        Self { places }
    }

    pub fn capacity(&self) -> usize {
        self.places.len()
    }

    /// Where the session of `index` stands, whether or not there is one.
    pub fn place_of(&self, index: u32) -> u32 {
        index & (self.places.len() - 1) as u32
    }

    fn place(&self, index: u32) -> &ArcSwapOption<RxSession> {
        &self.places[self.place_of(index) as usize]
    }

    /// The session of `index`, if it is exactly that one. Cheap; call once per run of packets.
    pub fn get(&self, index: u32) -> Option<Guard<Option<Arc<RxSession>>>> {
        let guard = self.place(index).load();
        guard.as_ref().is_some_and(|session| session.local_index == index).then_some(guard)
    }

    /// Whether an index with the same place is in use; such an index must not be chosen.
    pub fn is_taken(&self, index: u32) -> bool {
        self.place(index).load().is_some()
    }

    pub fn insert(&self, session: Arc<RxSession>) {
        self.place(session.local_index).store(Some(session));
    }

    /// Removes the session of `index`; a different session in the same place stays.
    pub fn remove(&self, index: u32) {
        if self.get(index).is_some() {
            self.place(index).store(None);
        }
    }
}
