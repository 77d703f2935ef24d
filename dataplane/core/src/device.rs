//! The slow half: one WireGuard device. Handshakes, key rotation, timers and peers; no packet of
//! an established session passes here.
//!
//! Call one of `set_…`, `handle_…`; then take [`Device::poll_output`] until it is empty, and come
//! back at [`Device::poll_timeout`]. Outputs are to be carried out in their order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use millrace_aead::{KEY_LEN, OpeningKey, SealJob, SealingKey, seal_batch};
use rand::{Rng, RngCore};
use zerocopy::IntoBytes;

use crate::Drop;
use crate::allowed_ips::AllowedIps;
use crate::cookie::CookieChecker;
use crate::data_header::DataHeader;
use crate::drops::DropCounters;
use crate::known_peer::{KnownPeer, Pending, Timer};
use crate::limits::{
    DATA_HEADER_LEN, INITIATION_INTERVAL_MIN, KEEPALIVE_LEN, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT,
    REKEY_TIMEOUT_JITTER_MAX, STAGED_PACKETS, UNDER_LOAD_QUEUE, UNDER_LOAD_STICKY, ZERO_KEYS_AFTER,
};
use crate::message::{
    CookieReply, Initiation, MAC_LEN, Message, NotMessage, Response, TYPE_INITIATION, TYPE_RESPONSE,
};
use crate::noise::{self, Initiated, SessionKeys};
use crate::peer::{Endpoint, Peer, PeerSlot, PublicKey};
use crate::rate_limit::RateLimiter;
use crate::replay::ReplayWindow;
use crate::secret::Secret;
use crate::session::{RxSession, TxSession};
use crate::shared::{FastEvent, Shared, Tables};
use crate::time::{Clock, Instant};
use crate::timestamp::{Tai64n, Timestamps};
use crate::tx::TxBatch;
use crate::vnet::VnetHdr;

/// TOS byte of handshakes: AF41, as the kernel's WireGuard sends them.
const HANDSHAKE_TOS: u8 = 0x88;

/// What a device is made with.
pub struct DeviceConfig {
    pub mtu: u16,
    /// The mark that an earlier run persisted (see [`Output::TimestampUsed`]).
    pub newest_timestamp: Option<Tai64n>,
    /// Where this half counts what it drops.
    pub drops: Arc<DropCounters>,
}

/// One change to one peer. `None` leaves a field as it is.
#[derive(Debug, Default)]
pub struct PeerChange {
    pub preshared_key: Option<Secret>,
    pub endpoint: Option<Endpoint>,
    /// Zero turns it off.
    pub keepalive: Option<Duration>,
    /// Prefixes that are not in `add_allowed_ips` go.
    pub replace_allowed_ips: bool,
    pub add_allowed_ips: Vec<IpNet>,
    pub remove_allowed_ips: Vec<IpNet>,
}

/// What is known of a peer, for status.
pub struct PeerView<'a> {
    pub peer: &'a Arc<Peer>,
    pub preshared_key: &'a Secret,
    pub keepalive: Option<Duration>,
    pub handshake_at_wall: Option<Duration>,
    pub staged: usize,
    pub has_session: bool,
}

/// What the caller must do.
#[derive(Debug)]
pub enum Output {
    /// Send a datagram. `tos` is the whole TOS byte or traffic class.
    Transmit {
        to: Endpoint,
        bytes: Vec<u8>,
        tos: u8,
    },
    /// A receiving session is in the table; steer its index before the following transmits.
    SessionUp {
        local_index: u32,
        peer: PeerSlot,
    },
    SessionDown {
        local_index: u32,
    },
    /// Persist before the following transmits: timestamps up to this one may be sent.
    TimestampUsed(Tai64n),
    /// No peer for this inner destination; its sender may be told.
    Unroutable {
        destination: IpAddr,
    },
}

/// See the module's documentation.
pub struct Device {
    shared: Arc<Shared>,
    rng: Box<dyn RngCore + Send>,
    drops: Arc<DropCounters>,
    own: Option<Own>,
    timestamps: Timestamps,
    limiter: RateLimiter,
    under_load_until: Option<Instant>,
    peers: Vec<Option<KnownPeer>>,
    by_key: BTreeMap<PublicKey, PeerSlot>,
    /// Index of our unanswered initiations.
    pending: BTreeMap<u32, PeerSlot>,
    allowed_ips: AllowedIps<Arc<Peer>>,
    mtu: u16,
    /// The tables that workers see are older than ours.
    tables_stale: bool,
    schedule: BTreeSet<(Instant, PeerSlot)>,
    outputs: VecDeque<Output>,
    /// Seals staged packets exactly as a worker would.
    batch: TxBatch,
}

struct Own {
    private: Secret,
    public: PublicKey,
    checker: CookieChecker,
}

impl Device {
    pub fn new(config: DeviceConfig, shared: Arc<Shared>, rng: Box<dyn RngCore + Send>) -> Self {
        Self {
            shared,
            rng,
            drops: config.drops,
            own: None,
            timestamps: Timestamps::new(config.newest_timestamp),
            limiter: RateLimiter::default(),
            under_load_until: None,
            peers: Vec::new(),
            by_key: BTreeMap::new(),
            pending: BTreeMap::new(),
            allowed_ips: AllowedIps::default(),
            mtu: config.mtu,
            tables_stale: true,
            schedule: BTreeSet::new(),
            outputs: VecDeque::new(),
            batch: TxBatch::new(),
        }
    }

    // --- configuration ------------------------------------------------------------------------

    /// A new identity: every session and handshake ends, and a peer with our own key goes.
    pub fn set_private_key(&mut self, clock: Clock, key: Option<Secret>) {
        if self.own.as_ref().map(|own| &own.private) == key.as_ref() {
            return;
        }
        self.own = key.map(|private| {
            let public = private.public_key();
            Own { checker: CookieChecker::new(&public), private, public }
        });
        if let Some(public) = self.public_key() {
            self.remove_peer(clock, &public);
        }
        for slot in self.slots() {
            self.wipe(slot);
            if let Some(peer) = self.peer_mut(slot) {
                peer.jar.clear();
                peer.initiation_sent_at = None;
                (peer.trying_since, peer.retry_at) = (None, None);
            }
            self.reschedule(clock.now, slot);
        }
    }

    pub fn private_key(&self) -> Option<&Secret> {
        self.own.as_ref().map(|own| &own.private)
    }

    pub fn public_key(&self) -> Option<PublicKey> {
        self.own.as_ref().map(|own| own.public)
    }

    /// Adds the peer or changes it; sessions live on. False, and nothing done, for our own key.
    pub fn set_peer(&mut self, clock: Clock, key: PublicKey, change: PeerChange) -> bool {
        if self.public_key() == Some(key) {
            return false;
        }
        let slot = self.by_key.get(&key).copied().unwrap_or_else(|| self.add_peer(key));
        self.change_allowed_ips(slot, &change);
        let Some(peer) = self.peer_mut(slot) else { return false };
        if let Some(preshared) = change.preshared_key {
            peer.preshared = preshared;
        }
        if let Some(endpoint) = change.endpoint {
            let current = peer.shared.endpoint.load().as_deref().copied();
            // The same remote again must not forget the source that it is reached from.
            if current.map(|current| current.remote) != Some(endpoint.remote) {
                peer.shared.roam(endpoint);
            }
        }
        let before = peer.keepalive;
        if let Some(interval) = change.keepalive {
            peer.keepalive = (!interval.is_zero()).then_some(interval);
            peer.keepalive_from = Some(clock.now);
        }
        if peer.keepalive.is_some() && before.is_none() {
            self.send_keepalive(clock, slot);
        }
        self.reschedule(clock.now, slot);
        true
    }

    /// True if there was such a peer.
    pub fn remove_peer(&mut self, clock: Clock, key: &PublicKey) -> bool {
        let Some(slot) = self.by_key.remove(key) else { return false };
        self.wipe(slot);
        self.allowed_ips.retain(|_, peer| peer.slot != slot);
        self.tables_stale = true;
        if let Some(peer) = self.peer_mut(slot) {
            peer.shared.gone.store(true, Ordering::Relaxed);
            (peer.retry_at, peer.keepalive, peer.zero_at) = (None, None, None);
            peer.shared.activity.unanswered_since.clear();
            peer.shared.activity.unacknowledged_since.clear();
        }
        self.reschedule(clock.now, slot);
        self.peers[slot.0 as usize] = None;
        true
    }

    pub fn has_peer(&self, key: &PublicKey) -> bool {
        self.by_key.contains_key(key)
    }

    pub fn set_mtu(&mut self, mtu: u16) {
        self.tables_stale |= mtu != self.mtu;
        self.mtu = mtu;
    }

    /// Every peer, in the order in which they were added.
    pub fn peers(&self) -> impl Iterator<Item = PeerView<'_>> {
        self.peers.iter().flatten().map(|known| PeerView {
            peer: &known.shared,
            preshared_key: &known.preshared,
            keepalive: known.keepalive,
            handshake_at_wall: known.handshake_at_wall,
            staged: known.staged.len(),
            has_session: known.shared.tx_session.load().is_some(),
        })
    }

    /// Every prefix with the peer that it leads to.
    pub fn allowed_ips(&self) -> impl Iterator<Item = (IpNet, PeerSlot)> {
        self.allowed_ips.iter().map(|(net, peer)| (net, peer.slot))
    }

    /// Forgets every session, as for an interface that goes down or a machine that slept.
    pub fn wipe_all(&mut self, clock: Clock) {
        for slot in self.slots() {
            self.wipe(slot);
            self.reschedule(clock.now, slot);
        }
    }

    // --- input --------------------------------------------------------------------------------

    /// A handshake message. `waiting`: how many more wait behind it.
    pub fn handle_datagram(
        &mut self,
        clock: Clock,
        source: Endpoint,
        datagram: &[u8],
        waiting: usize,
    ) {
        let done = match Message::parse(datagram) {
            Ok(Message::Initiation(message)) => {
                let sender = message.sender_index.get();
                self.admit(clock, source, datagram, sender, waiting)
                    .and_then(|()| self.accept_initiation(clock, source, message))
            }
            Ok(Message::Response(message)) => {
                let sender = message.sender_index.get();
                self.admit(clock, source, datagram, sender, waiting)
                    .and_then(|()| self.accept_response(clock, source, message))
            }
            Ok(Message::CookieReply(message)) => self.accept_cookie(clock, message),
            // A worker's business; on our socket only if nothing steers it.
            Ok(Message::Data) => Err(Drop::RxUnknownIndex),
            Err(NotMessage::Length) => Err(Drop::RxTruncated),
            Err(NotMessage::Type) => Err(Drop::RxUnknownType),
        };
        if let Err(reason) = done {
            self.drops.add(reason, 1);
        }
    }

    /// What a worker noticed.
    pub fn handle_event(&mut self, clock: Clock, event: FastEvent) {
        match event {
            FastEvent::Activity(slot) => self.reschedule(clock.now, slot),
            FastEvent::Confirmed { peer, local_index } => self.confirm(clock, peer, local_index),
            FastEvent::HandshakeWanted(slot) => self.start_handshake(clock, slot, false),
            FastEvent::Roamed(_) => {}
            FastEvent::Stage { peer, packet } => self.stage(clock, peer, packet),
            FastEvent::Unroutable { destination } => {
                self.outputs.push_back(Output::Unroutable { destination });
            }
        }
    }

    /// Does everything whose time has come.
    pub fn handle_timeout(&mut self, clock: Clock) {
        while let Some(&(at, slot)) = self.schedule.first() {
            if at > clock.now {
                break;
            }
            self.schedule.remove(&(at, slot));
            let Some(peer) = self.peer_mut(slot) else { continue };
            peer.scheduled_at = None;
            match peer.next_deadline(clock.now) {
                Some((due, timer)) if due <= clock.now => self.fire(clock, slot, timer),
                _ => {}
            }
            self.reschedule(clock.now, slot);
        }
    }

    // --- output -------------------------------------------------------------------------------

    /// The next thing to do, until there is none.
    pub fn poll_output(&mut self) -> Option<Output> {
        if self.tables_stale {
            self.tables_stale = false;
            let tables = Tables { allowed_ips: self.allowed_ips.clone(), mtu: self.mtu };
            self.shared.tables.store(Arc::new(tables));
        }
        self.outputs.pop_front()
    }

    /// The next deadline and what it is about; none: only input can make anything happen.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let &(at, slot) = self.schedule.first()?;
        let timer = self.peer(slot).and_then(|peer| peer.next_deadline(at));
        Some((at, timer.map_or("a peer is looked at", |(_, timer)| timer.reason())))
    }

    // --- handshakes ---------------------------------------------------------------------------

    /// The gate before any public-key work: macs, and under load a cookie and a rate.
    fn admit(
        &mut self,
        clock: Clock,
        source: Endpoint,
        datagram: &[u8],
        sender_index: u32,
        waiting: usize,
    ) -> Result<(), Drop> {
        if waiting >= UNDER_LOAD_QUEUE {
            self.under_load_until = Some(clock.now + UNDER_LOAD_STICKY);
        }
        let Some(own) = &mut self.own else { return Err(Drop::HsMac1Invalid) };
        if !own.checker.has_mac1(datagram) {
            return Err(Drop::HsMac1Invalid);
        }
        if self.under_load_until.is_none_or(|until| until <= clock.now) {
            return Ok(());
        }
        if !own.checker.has_mac2(clock.now, datagram, source.remote) {
            let rng = &mut *self.rng;
            let reply = own.checker.reply(clock.now, datagram, sender_index, source.remote, rng);
            let bytes = reply.as_bytes().to_vec();
            self.outputs.push_back(Output::Transmit { to: source, bytes, tos: HANDSHAKE_TOS });
            return Err(Drop::HsMac2Needed);
        }
        if self.limiter.allow(clock.now, source.remote.ip()) {
            Ok(())
        } else {
            Err(Drop::HsRateLimited)
        }
    }

    /// We are the responder: a session that waits for its first packet.
    fn accept_initiation(
        &mut self,
        clock: Clock,
        source: Endpoint,
        message: &Initiation,
    ) -> Result<(), Drop> {
        let Some(own) = &self.own else { return Err(Drop::HsInvalid) };
        let initiated =
            Initiated::read(&own.private, &message.body, &mut *self.rng).ok_or(Drop::HsInvalid)?;
        let slot = *self.by_key.get(&initiated.peer).ok_or(Drop::HsUnknownPeer)?;
        let local_index = self.free_index();
        let Some(peer) = self.peer_mut(slot) else { return Err(Drop::HsUnknownPeer) };
        if peer.newest_timestamp.is_some_and(|newest| initiated.timestamp <= newest) {
            return Err(Drop::HsReplayed);
        }
        let too_soon = |at: Instant| clock.now.since(at) < INITIATION_INTERVAL_MIN;
        if peer.initiation_accepted_at.is_some_and(too_soon) {
            return Err(Drop::HsFlood);
        }
        peer.newest_timestamp = Some(initiated.timestamp);
        peer.initiation_accepted_at = Some(clock.now);
        let (body, keys) = initiated.respond(&peer.preshared).ok_or(Drop::HsInvalid)?;
        let mut response = Response {
            kind: TYPE_RESPONSE.into(),
            sender_index: local_index.into(),
            receiver_index: message.sender_index,
            body,
            mac1: [0; MAC_LEN],
            mac2: [0; MAC_LEN],
        };
        peer.jar.stamp(clock.now, response.as_mut_bytes());
        peer.shared.roam(source);
        // Handshakes count as traffic, as in the kernel.
        peer.shared.received.add(1, size_of::<Initiation>() as u64);
        peer.shared.sent.add(1, size_of::<Response>() as u64);
        peer.zero_at = Some(clock.now + ZERO_KEYS_AFTER);
        let activity = &peer.shared.activity;
        activity.authenticated_at.set(clock.now);
        activity.unanswered_since.clear();
        let remote_index = message.sender_index.get();
        let session = self.publish(clock.now, slot, local_index, remote_index, &keys, false);
        if let Some(peer) = self.peer_mut(slot) {
            let replaced = peer.sessions.next.replace(session);
            self.retire(replaced);
        }
        let bytes = response.as_bytes().to_vec();
        self.outputs.push_back(Output::Transmit { to: source, bytes, tos: HANDSHAKE_TOS });
        self.reschedule(clock.now, slot);
        Ok(())
    }

    /// We are the initiator: the session may send at once.
    fn accept_response(
        &mut self,
        clock: Clock,
        source: Endpoint,
        message: &Response,
    ) -> Result<(), Drop> {
        let local_index = message.receiver_index.get();
        let slot = *self.pending.get(&local_index).ok_or(Drop::HsUnexpected)?;
        let Some(peer) = self.peer_mut(slot) else { return Err(Drop::HsUnexpected) };
        let pending = peer.pending.as_mut().filter(|p| p.local_index == local_index);
        let keys = pending
            .ok_or(Drop::HsUnexpected)?
            .state
            .finish(&message.body)
            .ok_or(Drop::HsInvalid)?;
        peer.pending = None;
        peer.shared.roam(source);
        peer.shared.received.add(1, size_of::<Response>() as u64);
        peer.handshake_done(clock.wall);
        peer.zero_at = Some(clock.now + ZERO_KEYS_AFTER);
        let activity = &peer.shared.activity;
        activity.authenticated_at.set(clock.now);
        activity.received_at.set(clock.now);
        activity.unanswered_since.clear();
        self.pending.remove(&local_index);
        let remote_index = message.sender_index.get();
        let session = self.publish(clock.now, slot, local_index, remote_index, &keys, true);
        let Some(peer) = self.peer_mut(slot) else { return Err(Drop::HsUnexpected) };
        // Linux noise.c, add_new_keypair: a "next" that nobody confirmed moves to "previous".
        let slots = &mut peer.sessions;
        let (current, next) = (slots.current.replace(session), slots.next.take());
        let kept = if next.is_some() { next } else { current.clone() };
        let dropped =
            if kept.as_ref().map(|s| s.local_index) == current.as_ref().map(|s| s.local_index) {
                None
            } else {
                current
            };
        let previous = std::mem::replace(&mut slots.previous, kept);
        self.retire(dropped);
        self.retire(previous);
        self.use_current(clock, slot);
        Ok(())
    }

    fn accept_cookie(&mut self, clock: Clock, message: &CookieReply) -> Result<(), Drop> {
        let index = message.receiver_index.get();
        let slot = self.pending.get(&index).copied().or_else(|| {
            // A response of ours may also be answered by a cookie.
            self.shared.sessions.get(index).and_then(|s| s.as_deref().map(|s| s.peer.slot))
        });
        let peer = slot.and_then(|slot| self.peer_mut(slot)).ok_or(Drop::HsUnexpected)?;
        if peer.jar.accept(clock.now, message) { Ok(()) } else { Err(Drop::HsUnexpected) }
    }

    /// The first packet under the responder's key came: it may send now.
    fn confirm(&mut self, clock: Clock, slot: PeerSlot, local_index: u32) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let slots = &mut peer.sessions;
        if slots.next.as_ref().map(|next| next.local_index) != Some(local_index) {
            return;
        }
        let current = std::mem::replace(&mut slots.current, slots.next.take());
        let previous = std::mem::replace(&mut slots.previous, current);
        peer.handshake_done(clock.wall);
        self.retire(previous);
        self.use_current(clock, slot);
    }

    /// Sends an initiation, if the peer can have one now. `retry`: one of a series.
    fn start_handshake(&mut self, clock: Clock, slot: PeerSlot, retry: bool) {
        let Self { own, rng, timestamps, .. } = self;
        let Some(peer) = self.peers.get_mut(slot.0 as usize).and_then(Option::as_mut) else {
            return;
        };
        let endpoint = peer.shared.endpoint.load().as_deref().copied();
        let (Some(own), Some(to)) = (own, endpoint) else {
            // Nothing to try with: whoever wants one must ask again.
            peer.shared.activity.handshake_wanted.store(false, Ordering::Relaxed);
            return;
        };
        if !retry {
            peer.trying_since = None;
        }
        if let Some(sent_at) = peer.initiation_sent_at
            && clock.now.since(sent_at) < REKEY_TIMEOUT
        {
            if peer.retry_at.is_none() {
                peer.retry_at = Some(sent_at + REKEY_TIMEOUT);
            }
            self.reschedule(clock.now, slot);
            return;
        }
        let (timestamp, lease) = timestamps.next(clock);
        let key = peer.shared.public_key;
        let first = noise::initiate(&own.private, &key, &peer.preshared, timestamp, &mut **rng);
        let Some((state, body)) = first else {
            // A key of low order: no handshake with it is ever safe.
            self.give_up(clock, slot);
            return;
        };
        peer.jitter = rng.random_range(Duration::ZERO..=REKEY_TIMEOUT_JITTER_MAX);
        peer.initiation_sent_at = Some(clock.now);
        peer.trying_since.get_or_insert(clock.now);
        peer.retry_at = Some(clock.now + REKEY_TIMEOUT + peer.jitter);
        peer.shared.activity.authenticated_at.set(clock.now);
        if let Some(old) = peer.pending.take() {
            self.pending.remove(&old.local_index);
        }
        let local_index = self.free_index();
        let mut message = Initiation {
            kind: TYPE_INITIATION.into(),
            sender_index: local_index.into(),
            body,
            mac1: [0; MAC_LEN],
            mac2: [0; MAC_LEN],
        };
        self.pending.insert(local_index, slot);
        if let Some(peer) = self.peer_mut(slot) {
            peer.jar.stamp(clock.now, message.as_mut_bytes());
            peer.shared.sent.add(1, size_of::<Initiation>() as u64);
            peer.pending = Some(Pending { local_index, state });
        }
        self.outputs.extend(lease.map(Output::TimestampUsed));
        let bytes = message.as_bytes().to_vec();
        self.outputs.push_back(Output::Transmit { to, bytes, tos: HANDSHAKE_TOS });
        self.reschedule(clock.now, slot);
    }

    /// The tries of a handshake ended without success.
    fn give_up(&mut self, clock: Clock, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let lost = peer.staged.len() as u64;
        peer.staged.clear();
        (peer.retry_at, peer.trying_since) = (None, None);
        peer.zero_at.get_or_insert(clock.now + ZERO_KEYS_AFTER);
        peer.shared.activity.handshake_wanted.store(false, Ordering::Relaxed);
        let pending = peer.pending.take();
        if let Some(pending) = pending {
            self.pending.remove(&pending.local_index);
        }
        self.drops.add(Drop::TxNoSession, lost);
        self.reschedule(clock.now, slot);
    }

    // --- sessions -----------------------------------------------------------------------------

    /// Makes both halves of a session; the receiving one is in the table when this returns.
    fn publish(
        &mut self,
        now: Instant,
        slot: PeerSlot,
        local_index: u32,
        remote_index: u32,
        keys: &SessionKeys,
        initiator: bool,
    ) -> Arc<TxSession> {
        let key = |bytes: &[u8; KEY_LEN]| *bytes;
        if let Some(peer) = self.peer(slot) {
            self.shared.sessions.insert(Arc::new(RxSession {
                local_index,
                peer: Arc::clone(&peer.shared),
                key: OpeningKey::new(key(&keys.receive)),
                replay: Mutex::new(ReplayWindow::default()),
                born: now,
                initiator,
                confirmed: AtomicBool::new(initiator),
            }));
        }
        self.outputs.push_back(Output::SessionUp { local_index, peer: slot });
        let sealing = SealingKey::new(key(&keys.send));
        Arc::new(TxSession::new(remote_index, local_index, sealing, now, initiator))
    }

    /// The current session sends from now on; what waited for it goes first.
    fn use_current(&mut self, clock: Clock, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let current = peer.sessions.current.clone();
        peer.shared.tx_session.store(current.clone());
        let staged = std::mem::take(&mut peer.staged);
        let initiator = current.is_some_and(|session| session.initiator);
        if staged.is_empty() && initiator {
            // The responder may not send before it hears something under this key.
            self.send_keepalive(clock, slot);
        }
        self.send_staged(clock, staged);
        self.reschedule(clock.now, slot);
    }

    fn retire(&mut self, session: Option<Arc<TxSession>>) {
        if let Some(session) = session {
            self.shared.sessions.remove(session.local_index);
            self.outputs.push_back(Output::SessionDown { local_index: session.local_index });
        }
    }

    /// Ends every session and handshake of a peer. The keys wipe themselves.
    fn wipe(&mut self, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        peer.shared.tx_session.store(None);
        let sessions = std::mem::take(&mut peer.sessions);
        peer.zero_at = None;
        peer.shared.activity.handshake_wanted.store(false, Ordering::Relaxed);
        let pending = peer.pending.take();
        if let Some(pending) = pending {
            self.pending.remove(&pending.local_index);
        }
        for local_index in sessions.indices() {
            self.shared.sessions.remove(local_index);
            self.outputs.push_back(Output::SessionDown { local_index });
        }
    }

    /// A random index whose place in the table, and whose value among handshakes, is free.
    fn free_index(&mut self) -> u32 {
        loop {
            let index = self.rng.next_u32();
            if !self.shared.sessions.is_taken(index) && !self.pending.contains_key(&index) {
                return index;
            }
        }
    }

    // --- packets of our own -------------------------------------------------------------------

    fn stage(&mut self, clock: Clock, slot: PeerSlot, packet: Box<[u8]>) {
        let Some(peer) = self.peer_mut(slot) else { return };
        if peer.shared.tx_session.load().as_deref().is_some_and(|s| s.usable(clock.now)) {
            // A session came while the packet was on its way to us.
            return self.send_staged(clock, VecDeque::from([packet]));
        }
        let full = peer.staged.len() >= STAGED_PACKETS;
        if full {
            peer.staged.pop_front();
        }
        peer.staged.push_back(packet);
        let waiting = peer.retry_at.is_some();
        self.drops.add(Drop::TxNoSession, full.into());
        if !waiting {
            self.start_handshake(clock, slot, false);
        }
    }

    /// Seals and sends inner packets as a worker does.
    fn send_staged(&mut self, clock: Clock, packets: VecDeque<Box<[u8]>>) {
        if packets.is_empty() {
            return;
        }
        let Self { batch, outputs, drops, shared, .. } = self;
        let tables = shared.tables.load();
        // Events that this gives rise to are about what we are just doing.
        let mut ignore = |_: FastEvent| {};
        for packet in packets {
            batch.push(&tables, VnetHdr::default(), &packet, 0, drops, &mut ignore);
            batch.seal(clock.now, drops, &mut ignore);
            outputs.extend(batch.transmits().map(|transmit| Output::Transmit {
                to: transmit.endpoint,
                bytes: transmit.bytes.to_vec(),
                tos: transmit.ecn,
            }));
            batch.clear();
        }
    }

    /// An empty data message; without a session, a handshake instead.
    fn send_keepalive(&mut self, clock: Clock, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let endpoint = peer.shared.endpoint.load().as_deref().copied();
        let session = peer.shared.tx_session.load_full().filter(|s| s.usable(clock.now));
        let reserved = session.as_ref().and_then(|session| session.reserve(1));
        let (Some(to), Some(session), Some(counter)) = (endpoint, session, reserved) else {
            return self.start_handshake(clock, slot, false);
        };
        let mut bytes = vec![0; KEEPALIVE_LEN];
        let header = DataHeader { receiver_index: session.receiver_index, counter };
        let (head, packet) = bytes.split_at_mut(DATA_HEADER_LEN);
        head.copy_from_slice(&header.to_bytes());
        seal_batch(&mut [SealJob { key: &session.key, counter, packet }]);
        let activity = &peer.shared.activity;
        activity.authenticated_at.set(clock.now);
        activity.sent_at.set(clock.now);
        activity.unacknowledged_since.clear();
        peer.shared.sent.add(1, KEEPALIVE_LEN as u64);
        self.outputs.push_back(Output::Transmit { to, bytes, tos: 0 });
    }

    // --- timers -------------------------------------------------------------------------------

    fn fire(&mut self, clock: Clock, slot: PeerSlot, timer: Timer) {
        let Some(peer) = self.peer_mut(slot) else { return };
        match timer {
            Timer::DeadPeer => {
                peer.shared.activity.unanswered_since.clear();
                peer.forget_source();
                self.start_handshake(clock, slot, false);
            }
            Timer::PassiveKeepalive => {
                peer.shared.activity.unacknowledged_since.clear();
                self.send_keepalive(clock, slot);
            }
            Timer::PersistentKeepalive => {
                peer.keepalive_from = Some(clock.now);
                self.send_keepalive(clock, slot);
            }
            Timer::Retry => {
                let tried_for = peer.trying_since.map(|since| clock.now.since(since));
                if tried_for.is_some_and(|tried_for| tried_for >= REKEY_ATTEMPT_TIME) {
                    return self.give_up(clock, slot);
                }
                peer.retry_at = None;
                peer.forget_source();
                self.start_handshake(clock, slot, true);
            }
            Timer::Watch => {}
            Timer::ZeroKeys => self.wipe(slot),
        }
    }

    /// Enters the peer's next deadline into the schedule.
    fn reschedule(&mut self, now: Instant, slot: PeerSlot) {
        let Some(peer) = self.peers.get_mut(slot.0 as usize).and_then(Option::as_mut) else {
            return;
        };
        let next = peer.next_deadline(now).map(|(at, _)| at);
        if peer.scheduled_at == next {
            return;
        }
        if let Some(old) = peer.scheduled_at.take() {
            self.schedule.remove(&(old, slot));
        }
        peer.scheduled_at = next;
        self.schedule.extend(next.map(|at| (at, slot)));
    }

    // --- peers --------------------------------------------------------------------------------

    fn add_peer(&mut self, key: PublicKey) -> PeerSlot {
        let free = self.peers.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            self.peers.push(None);
            self.peers.len() - 1
        });
        let slot = PeerSlot(place as u32);
        self.peers[place] = Some(KnownPeer::new(Arc::new(Peer::new(slot, key, None))));
        self.by_key.insert(key, slot);
        slot
    }

    fn change_allowed_ips(&mut self, slot: PeerSlot, change: &PeerChange) {
        let Some(shared) = self.peer(slot).map(|peer| Arc::clone(&peer.shared)) else { return };
        if change.replace_allowed_ips {
            self.allowed_ips.retain(|_, peer| peer.slot != slot);
            self.tables_stale = true;
        }
        for &net in &change.add_allowed_ips {
            self.allowed_ips.insert(net, Arc::clone(&shared));
            self.tables_stale = true;
        }
        for &net in &change.remove_allowed_ips {
            if let Some(owner) = self.allowed_ips.remove(net)
                && owner.slot != slot
            {
                // Another peer's: it stays.
                self.allowed_ips.insert(net, owner);
            }
            self.tables_stale = true;
        }
    }

    fn slots(&self) -> Vec<PeerSlot> {
        self.by_key.values().copied().collect()
    }

    fn peer(&self, slot: PeerSlot) -> Option<&KnownPeer> {
        self.peers.get(slot.0 as usize)?.as_ref()
    }

    fn peer_mut(&mut self, slot: PeerSlot) -> Option<&mut KnownPeer> {
        self.peers.get_mut(slot.0 as usize)?.as_mut()
    }
}
