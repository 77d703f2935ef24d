//! What only the slow half knows of a peer: its handshakes, its three sessions and its timers.
//!
//! Timers (WireGuard paper, section 6; Linux `timers.c`), each with the event that it counts from:
//!
//! | timer | counts from | does |
//! |---|---|---|
//! | retry | initiation sent, + 5 s and jitter | a new initiation; gives up after 90 s |
//! | dead peer | first data sent since anything was heard, + 15 s and jitter | a new handshake |
//! | passive keepalive | first data received since anything was sent, + 10 s | a keepalive |
//! | persistent keepalive | any authenticated packet, + the interval | a keepalive |
//! | zero keys | newest session, + 540 s | wipes every key of the peer |
//!
//! The middle three are derived from what workers note in [`crate::peer::Activity`].

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use ipnet::IpNet;

use crate::cookie::CookieJar;
use crate::limits::{DEAD_PEER_TIMEOUT, KEEPALIVE_TIMEOUT};
use crate::noise::InitiationSent;
use crate::peer::Peer;
use crate::secret::Secret;
use crate::session::TxSession;
use crate::time::{Clock, Instant};
use crate::timestamp::Tai64n;

pub(crate) struct KnownPeer {
    pub(crate) shared: Arc<Peer>,
    pub(crate) preshared: Secret,
    pub(crate) keepalive: Option<Duration>,
    /// Where the configuration says that it is, wherever it roamed to.
    pub(crate) configured: Option<SocketAddr>,
    /// What leads to it in the device's allowed-ips: found without a walk over those of all peers.
    pub(crate) nets: BTreeSet<IpNet>,
    pub(crate) jar: CookieJar,
    /// Newest timestamp that we accepted from it.
    pub(crate) newest_timestamp: Option<Tai64n>,
    pub(crate) initiation_accepted_at: Option<Instant>,
    pub(crate) pending: Option<Pending>,
    /// When the first initiation of a series of tries was sent.
    pub(crate) trying_since: Option<Instant>,
    pub(crate) retry_at: Option<Instant>,
    /// Initiation or response: the next initiation keeps five seconds' distance.
    pub(crate) handshake_sent_at: Option<Instant>,
    pub(crate) sessions: Slots,
    pub(crate) zero_at: Option<Instant>,
    /// Inner packets that wait for a session.
    pub(crate) staged: VecDeque<Box<[u8]>>,
    /// Wall clock of the newest finished handshake, since the Unix epoch.
    pub(crate) handshake_at_wall: Option<Duration>,
    /// The same moment as a monotonic time.
    pub(crate) handshake_at: Option<Instant>,
    /// Where the persistent keepalive counts from before there was any packet.
    pub(crate) keepalive_from: Option<Instant>,
    /// Added to the dead-peer timer; drawn anew with each initiation.
    pub(crate) jitter: Duration,
    /// What the schedule holds for this peer.
    pub(crate) scheduled_at: Option<Instant>,
}

/// An initiation without an answer yet.
pub(crate) struct Pending {
    pub(crate) local_index: u32,
    pub(crate) state: InitiationSent,
    pub(crate) sent_at: Instant,
}

/// Sessions by their place in the rotation (Linux `noise.c`).
#[derive(Default)]
pub(crate) struct Slots {
    /// Only opens what is still under way.
    pub(crate) previous: Option<Arc<TxSession>>,
    /// Sends and opens.
    pub(crate) current: Option<Arc<TxSession>>,
    /// We are its responder, and nothing came under it yet: it opens, but must not send.
    pub(crate) next: Option<Arc<TxSession>>,
    /// After crossing handshakes: we send with "current", the peer with "previous".
    pub(crate) split: bool,
}

impl Slots {
    /// Makes `session` the current one, and of the older two keeps the one that the peer was
    /// sending with. Returns the other.
    pub(crate) fn rotate(&mut self, session: Arc<TxSession>) -> Option<Arc<TxSession>> {
        let current = self.current.replace(session);
        if std::mem::take(&mut self.split) {
            return current;
        }
        std::mem::replace(&mut self.previous, current)
    }
}

/// What a peer's earliest deadline is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    DeadPeer,
    PassiveKeepalive,
    PersistentKeepalive,
    Retry,
    /// Nothing is due, but workers are active: look again, because an earlier deadline may arise.
    Watch,
    ZeroKeys,
}

impl Timer {
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::DeadPeer => "data was sent and nothing came back",
            Self::PassiveKeepalive => "data came and nothing was sent",
            Self::PersistentKeepalive => "persistent keepalive",
            Self::Retry => "a handshake without an answer",
            Self::Watch => "a peer is active",
            Self::ZeroKeys => "old keys are wiped",
        }
    }
}

impl KnownPeer {
    pub(crate) fn new(shared: Arc<Peer>) -> Self {
        let jar = CookieJar::new(&shared.public_key);
        Self {
            shared,
            preshared: Secret::ZERO,
            keepalive: None,
            configured: None,
            nets: BTreeSet::new(),
            jar,
            newest_timestamp: None,
            initiation_accepted_at: None,
            pending: None,
            trying_since: None,
            retry_at: None,
            handshake_sent_at: None,
            sessions: Slots::default(),
            zero_at: None,
            staged: VecDeque::new(),
            handshake_at_wall: None,
            handshake_at: None,
            keepalive_from: None,
            jitter: Duration::ZERO,
            scheduled_at: None,
        }
    }

    /// Settles who watches the peer: while workers are active we look at it at least every ten
    /// seconds, and an idle peer is left alone until its next packet.
    pub(crate) fn settle_watch(&self) {
        let activity = &self.shared.activity;
        if self.active_deadline().is_none() {
            activity.watched.store(false, Ordering::SeqCst);
            // A worker that noted activity before it saw "not watched" is seen by what follows.
            fence(Ordering::SeqCst);
        }
        if self.active_deadline().is_some() {
            activity.watched.store(true, Ordering::SeqCst);
        }
    }

    /// The earliest deadline, as things stand.
    pub(crate) fn next_deadline(&self, now: Instant) -> Option<(Instant, Timer)> {
        let activity = &self.shared.activity;
        let mut next = self.active_deadline();
        if next.is_some() {
            next = earlier(next, Some((now + KEEPALIVE_TIMEOUT, Timer::Watch)));
        }
        let persistent = self.keepalive.and_then(|interval| {
            let from = activity.authenticated_at.get().max(self.keepalive_from)?;
            Some((from + interval, Timer::PersistentKeepalive))
        });
        next = earlier(next, persistent);
        next = earlier(next, self.retry_at.map(|at| (at, Timer::Retry)));
        earlier(next, self.zero_at.map(|at| (at, Timer::ZeroKeys)))
    }

    /// The earlier of the two timers that only traffic starts.
    fn active_deadline(&self) -> Option<(Instant, Timer)> {
        let activity = &self.shared.activity;
        let dead = activity
            .unanswered_since
            .get()
            .map(|since| (since + DEAD_PEER_TIMEOUT + self.jitter, Timer::DeadPeer));
        let passive = activity
            .unacknowledged_since
            .get()
            .map(|since| (since + KEEPALIVE_TIMEOUT, Timer::PassiveKeepalive));
        earlier(dead, passive)
    }

    /// An authenticated message of the slow thread's own went out.
    pub(crate) fn note_sent(&self, now: Instant, len: usize) {
        let activity = &self.shared.activity;
        activity.sent_at.set(now);
        activity.authenticated_at.set(now);
        activity.unacknowledged_since.clear();
        self.shared.sent.add(1, len as u64);
    }

    /// A handshake message of the peer verified.
    pub(crate) fn note_received(&self, now: Instant, len: usize) {
        let activity = &self.shared.activity;
        activity.received_at.set(now);
        activity.authenticated_at.set(now);
        activity.unanswered_since.clear();
        self.shared.received.add(1, len as u64);
    }

    /// The handshake of a session is finished and proven: no more tries.
    pub(crate) fn handshake_done(&mut self, clock: Clock) {
        self.stop_trying();
        self.handshake_at_wall = Some(clock.wall);
        self.handshake_at = Some(clock.now);
    }

    /// No more tries; workers may ask for new ones.
    pub(crate) fn stop_trying(&mut self) {
        (self.trying_since, self.retry_at) = (None, None);
        self.shared.activity.handshake_wanted.store(false, Ordering::Relaxed);
    }

    /// As if nothing had been sent or received yet: a handshake is possible at once.
    pub(crate) fn forget_tries(&mut self) {
        self.stop_trying();
        self.handshake_sent_at = None;
        self.shared.activity.unanswered_since.clear();
        self.shared.activity.unacknowledged_since.clear();
    }

    /// Forgets the address that answers leave from: the kernel chooses anew.
    pub(crate) fn forget_source(&self) {
        if let Some(endpoint) = self.shared.endpoint.load().as_deref().copied() {
            self.shared.roam(crate::peer::Endpoint { local: None, ifindex: 0, ..endpoint });
        }
    }
}

fn earlier(a: Option<(Instant, Timer)>, b: Option<(Instant, Timer)>) -> Option<(Instant, Timer)> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
        (a, b) => a.or(b),
    }
}
