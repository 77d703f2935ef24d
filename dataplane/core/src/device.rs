//! The slow half: one WireGuard device. Handshakes, key rotation, timers and peers; no packet of
//! an established session passes here.
//!
//! Call one of `set_…`, `handle_…`; then take [`Device::poll_output`] until it is empty, and come
//! back at [`Device::poll_timeout`]. Outputs are to be carried out in their order.

mod handshake;
mod sessions;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use rand::RngCore;

use crate::Drop;
use crate::allowed_ips::AllowedIps;
use crate::cookie::CookieChecker;
use crate::drops::DropCounters;
use crate::known_peer::{KnownPeer, Timer};
use crate::limits::{REKEY_ATTEMPT_TIME, SESSIONS_PER_PEER};
use crate::message::{Message, NotMessage};
use crate::noise::{Identity, KnownPeers};
use crate::peer::{Endpoint, Paths, Peer, PeerSlot, PublicKey};
use crate::rate_limit::RateLimiter;
use crate::secret::Secret;
use crate::shared::{FastEvent, Shared, Tables};
use crate::time::{Clock, Instant};
use crate::timestamp::{Tai64n, Timestamps};
use crate::tx::TxBatch;

/// What a device is made with.
pub struct DeviceConfig {
    pub mtu: u16,
    /// The mark that an earlier run persisted (see [`Output::TimestampUsed`]).
    pub newest_timestamp: Option<Tai64n>,
    /// Where this half counts what it drops.
    pub drops: Arc<DropCounters>,
    /// Who decides on endpoints; none leaves it to roaming.
    pub paths: Option<Arc<dyn Paths>>,
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
    /// What leads to it.
    pub nets: &'a BTreeSet<IpNet>,
    /// As it was set, wherever the peer roamed to since.
    pub configured: Option<SocketAddr>,
    pub handshake_at_wall: Option<Duration>,
    /// The same moment as a monotonic time.
    pub handshake_at: Option<Instant>,
    pub staged: usize,
    pub has_session: bool,
    /// False where its key is a point of low order: the peer is there, as in the kernel, and no
    /// handshake with it can succeed.
    pub can_handshake: bool,
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
}

/// See the module's documentation.
pub struct Device {
    shared: Arc<Shared>,
    rng: Box<dyn RngCore + Send>,
    drops: Arc<DropCounters>,
    paths: Option<Arc<dyn Paths>>,
    own: Option<Own>,
    timestamps: Timestamps,
    limiter: RateLimiter,
    under_load_until: Option<Instant>,
    peers: Vec<Option<KnownPeer>>,
    /// The places of `peers` that are empty.
    vacant: BTreeSet<PeerSlot>,
    by_key: BTreeMap<PublicKey, PeerSlot>,
    /// Our unanswered initiations, by the place of their index in the session table.
    pending: BTreeMap<u32, PeerSlot>,
    allowed_ips: AllowedIps<Arc<Peer>>,
    mtu: u16,
    /// See [`Device::set_up`].
    is_up: bool,
    /// The tables that workers see are older than ours.
    tables_stale: bool,
    schedule: BTreeSet<(Instant, PeerSlot)>,
    outputs: VecDeque<Output>,
    /// Seals staged packets exactly as a worker would.
    batch: TxBatch,
}

struct Own {
    identity: Arc<Identity>,
    /// Whom we shake hands with. Shared with a handshake only while it runs.
    known: Arc<KnownPeers>,
    checker: CookieChecker,
}

/// Why there is no box key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoBoxKey {
    #[error("the device has no private key")]
    NoPrivateKey,
    #[error("the public key is a point of low order")]
    LowOrder,
}

/// Why a peer was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    #[error("the public key is our own: a peer needs the key of the other side")]
    OwnKey,
    #[error(
        "there are {limit} peers already, and the session table has room for no more: remove \
             some, or use a second interface"
    )]
    TooMany { limit: usize },
}

impl Device {
    pub fn new(config: DeviceConfig, shared: Arc<Shared>, rng: Box<dyn RngCore + Send>) -> Self {
        Self {
            shared,
            rng,
            drops: config.drops,
            paths: config.paths,
            own: None,
            timestamps: Timestamps::new(config.newest_timestamp),
            limiter: RateLimiter::default(),
            under_load_until: None,
            peers: Vec::new(),
            vacant: BTreeSet::new(),
            by_key: BTreeMap::new(),
            pending: BTreeMap::new(),
            allowed_ips: AllowedIps::default(),
            mtu: config.mtu,
            is_up: true,
            tables_stale: true,
            schedule: BTreeSet::new(),
            outputs: VecDeque::new(),
            batch: TxBatch::new(),
        }
    }

    // --- configuration ------------------------------------------------------------------------

    /// A new identity: every session and handshake ends, and a peer with our own key goes.
    pub fn set_private_key(&mut self, clock: Clock, key: Option<Secret>) {
        if self.private_key() == key.as_ref() {
            return;
        }
        let identity = key.map(|private| Arc::new(Identity::new(private)));
        if let Some(identity) = &identity {
            self.remove_peer(clock, &identity.public);
        }
        self.own = identity.map(|identity| {
            let mut known = KnownPeers::default();
            self.by_key.keys().for_each(|peer| known.insert(&identity, *peer));
            let checker = CookieChecker::new(&identity.public);
            Own { identity, known: Arc::new(known), checker }
        });
        self.each_peer(clock.now, |device, slot| {
            device.wipe(slot);
            let Some(peer) = device.peer_mut(slot) else { return };
            peer.jar.clear();
            peer.forget_tries();
        });
    }

    pub fn private_key(&self) -> Option<&Secret> {
        self.own.as_ref().map(|own| &own.identity.private)
    }

    pub fn public_key(&self) -> Option<PublicKey> {
        self.own.as_ref().map(|own| own.identity.public)
    }

    /// HSalsa20(X25519(private key, `peer`), 0), the precomputed key of NaCl's `crypto_box`. It says
    /// nothing of the private key, nor of the Diffie-Hellman result, which stays here.
    pub fn box_key(&self, peer: &PublicKey) -> Result<Secret, NoBoxKey> {
        let private = self.private_key().ok_or(NoBoxKey::NoPrivateKey)?;
        private.box_key(peer).ok_or(NoBoxKey::LowOrder)
    }

    /// Adds the peer or changes it; sessions live on.
    pub fn set_peer(
        &mut self,
        clock: Clock,
        key: PublicKey,
        change: PeerChange,
    ) -> Result<(), PeerRefused> {
        let slot = match self.by_key.get(&key) {
            Some(slot) => *slot,
            None => self.add_peer(key)?,
        };
        self.change_allowed_ips(slot, &change);
        let Some(peer) = self.peer_mut(slot) else { return Ok(()) };
        if let Some(preshared) = change.preshared_key {
            peer.preshared = preshared;
        }
        let mut is_found = false;
        if let Some(endpoint) = change.endpoint {
            peer.configured = Some(endpoint.remote);
            let current = peer.shared.endpoint.load().as_deref().copied();
            // The same remote again must not forget the source that it is reached from.
            if current.map(|current| current.remote) != Some(endpoint.remote) {
                peer.shared.roam(endpoint);
                is_found = current.is_none();
            }
        }
        let before = peer.keepalive;
        if let Some(interval) = change.keepalive {
            peer.keepalive = (!interval.is_zero()).then_some(interval);
            peer.keepalive_from = Some(clock.now);
        }
        let waits = !peer.staged.is_empty();
        if peer.keepalive.is_some() && (before.is_none() || is_found) {
            self.send_keepalive(clock, slot);
        } else if waits && is_found {
            self.start_handshake(clock, slot, false);
        }
        self.reschedule(clock.now, slot);
        Ok(())
    }

    /// True if there was such a peer. Whatever waited for it, or was known of it, goes with it.
    pub fn remove_peer(&mut self, clock: Clock, key: &PublicKey) -> bool {
        let Some(slot) = self.by_key.remove(key) else { return false };
        self.wipe(slot);
        self.drop_staged(slot);
        self.take_all_nets(slot);
        if let Some(own) = &mut self.own {
            Arc::make_mut(&mut own.known).remove(key);
        }
        if let Some(peer) = self.peer_mut(slot) {
            peer.shared.gone.store(true, Ordering::Relaxed);
            peer.forget_tries();
            peer.keepalive = None;
        }
        self.reschedule(clock.now, slot);
        self.peers[slot.0 as usize] = None;
        self.vacant.insert(slot);
        true
    }

    pub fn has_peer(&self, key: &PublicKey) -> bool {
        self.by_key.contains_key(key)
    }

    /// Whether a handshake with a peer of this key is possible; see [`PeerView::can_handshake`].
    pub fn can_handshake(&self, key: &PublicKey) -> bool {
        self.own.as_ref().is_none_or(|own| own.known.get(key).is_some())
    }

    pub fn set_mtu(&mut self, mtu: u16) {
        self.tables_stale |= mtu != self.mtu;
        self.mtu = mtu;
    }

    /// Bytes of the largest inner packet.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Every peer, in the order in which they were added.
    pub fn peers(&self) -> impl Iterator<Item = PeerView<'_>> {
        self.peers.iter().flatten().map(|known| PeerView {
            peer: &known.shared,
            preshared_key: &known.preshared,
            keepalive: known.keepalive,
            nets: &known.nets,
            configured: known.configured,
            handshake_at_wall: known.handshake_at_wall,
            handshake_at: known.handshake_at,
            staged: known.staged.len(),
            has_session: known.shared.tx_session.load().is_some(),
            can_handshake: self.can_handshake(&known.shared.public_key),
        })
    }

    /// Every prefix with the peer that it leads to.
    pub fn allowed_ips(&self) -> impl Iterator<Item = (IpNet, PeerSlot)> {
        self.allowed_ips.iter().map(|(net, peer)| (net, peer.slot))
    }

    /// What the operator did to the interface; a new device is up. Down, it forgets every session,
    /// and nothing starts or answers a handshake; up again, it calls the peers with a persistent
    /// keepalive (Linux `device.c`, `wg_stop` and `wg_open`).
    pub fn set_up(&mut self, clock: Clock, up: bool) {
        if self.is_up == up {
            return;
        }
        self.is_up = up;
        if !up {
            self.wipe_all(clock);
        }
        self.each_peer(clock.now, |device, slot| {
            let Some(peer) = device.peer_mut(slot) else { return };
            // Down, nothing may be due; up, the interval starts anew.
            peer.shared.activity.authenticated_at.clear();
            peer.keepalive_from = up.then_some(clock.now);
            if up && peer.keepalive.is_some() {
                device.send_keepalive(clock, slot);
            }
        });
    }

    /// Forgets every session, as for an interface that goes down or a machine that slept.
    pub fn wipe_all(&mut self, clock: Clock) {
        self.each_peer(clock.now, |device, slot| {
            device.wipe(slot);
            device.drop_staged(slot);
            if let Some(peer) = device.peer_mut(slot) {
                peer.forget_tries();
            }
        });
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
        if !self.is_up {
            return self.drops.add(Drop::InterfaceDown, 1);
        }
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
            FastEvent::HandshakeWanted(slot) if self.needs_handshake(clock.now, slot) => {
                self.start_handshake(clock, slot, false);
            }
            FastEvent::HandshakeWanted(slot) => {
                if let Some(peer) = self.peer(slot) {
                    peer.shared.activity.handshake_wanted.store(false, Ordering::Relaxed);
                }
            }
            FastEvent::Stage { peer, packet } => self.stage(clock, peer, packet),
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
            if let Some((due, timer)) = peer.next_deadline(clock.now)
                && due <= clock.now
            {
                self.fire(clock, slot, timer);
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
        let next = self.peer(slot).and_then(|peer| peer.next_deadline(at));
        let due = next.filter(|&(due, _)| due <= at);
        Some((at, due.map_or(Timer::Watch, |(_, timer)| timer).reason()))
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
        peer.settle_watch();
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

    fn add_peer(&mut self, key: PublicKey) -> Result<PeerSlot, PeerRefused> {
        if self.public_key() == Some(key) {
            return Err(PeerRefused::OwnKey);
        }
        let limit = self.shared.sessions.capacity() / SESSIONS_PER_PEER;
        if self.by_key.len() >= limit {
            return Err(PeerRefused::TooMany { limit });
        }
        let slot = self.vacant.pop_first().unwrap_or_else(|| {
            self.peers.push(None);
            PeerSlot(self.peers.len() as u32 - 1)
        });
        let peer = Peer::new(slot, key, None).with_paths(self.paths.clone());
        self.peers[slot.0 as usize] = Some(KnownPeer::new(Arc::new(peer)));
        self.by_key.insert(key, slot);
        if let Some(own) = &mut self.own {
            Arc::make_mut(&mut own.known).insert(&own.identity, key);
        }
        Ok(slot)
    }

    fn change_allowed_ips(&mut self, slot: PeerSlot, change: &PeerChange) {
        if change.replace_allowed_ips {
            self.take_all_nets(slot);
        }
        for net in &change.add_allowed_ips {
            let Some(peer) = self.peer_mut(slot) else { return };
            let (net, shared) = (net.trunc(), Arc::clone(&peer.shared));
            peer.nets.insert(net);
            let before = self.allowed_ips.insert(net, shared);
            if let Some(before) = before.filter(|before| before.slot != slot)
                && let Some(other) = self.peer_mut(before.slot)
            {
                other.nets.remove(&net);
            }
            self.tables_stale = true;
        }
        for net in &change.remove_allowed_ips {
            let net = net.trunc();
            // One that leads to another peer stays.
            if self.peer_mut(slot).is_some_and(|peer| peer.nets.remove(&net)) {
                self.allowed_ips.remove(net);
                self.tables_stale = true;
            }
        }
    }

    fn take_all_nets(&mut self, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        for net in std::mem::take(&mut peer.nets) {
            self.allowed_ips.remove(net);
            self.tables_stale = true;
        }
    }

    /// `work` for every peer, and then its deadline anew.
    fn each_peer(&mut self, now: Instant, mut work: impl FnMut(&mut Self, PeerSlot)) {
        let slots: Vec<PeerSlot> = self.by_key.values().copied().collect();
        for slot in slots {
            work(self, slot);
            self.reschedule(now, slot);
        }
    }

    fn peer(&self, slot: PeerSlot) -> Option<&KnownPeer> {
        self.peers.get(slot.0 as usize)?.as_ref()
    }

    fn peer_mut(&mut self, slot: PeerSlot) -> Option<&mut KnownPeer> {
        self.peers.get_mut(slot.0 as usize)?.as_mut()
    }
}
