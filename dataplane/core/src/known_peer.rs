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

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use crate::cookie::CookieJar;
use crate::limits::{DEAD_PEER_TIMEOUT, KEEPALIVE_TIMEOUT};
use crate::noise::AwaitingResponse;
use crate::peer::Peer;
use crate::secret::Secret;
use crate::session::TxSession;
use crate::time::Instant;
use crate::timestamp::Tai64n;

pub(crate) struct KnownPeer {
    pub(crate) shared: Arc<Peer>,
    pub(crate) preshared: Secret,
    pub(crate) keepalive: Option<Duration>,
    pub(crate) jar: CookieJar,
    /// Newest timestamp that we accepted from it.
    pub(crate) newest_timestamp: Option<Tai64n>,
    pub(crate) initiation_accepted_at: Option<Instant>,
    pub(crate) pending: Option<Pending>,
    /// When the first initiation of a series of tries was sent.
    pub(crate) trying_since: Option<Instant>,
    pub(crate) retry_at: Option<Instant>,
    pub(crate) initiation_sent_at: Option<Instant>,
    pub(crate) sessions: Slots,
    pub(crate) zero_at: Option<Instant>,
    /// Inner packets that wait for a session.
    pub(crate) staged: VecDeque<Box<[u8]>>,
    /// Wall clock of the newest finished handshake, since the Unix epoch.
    pub(crate) handshake_at_wall: Option<Duration>,
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
    pub(crate) state: AwaitingResponse,
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
            jar,
            newest_timestamp: None,
            initiation_accepted_at: None,
            pending: None,
            trying_since: None,
            retry_at: None,
            initiation_sent_at: None,
            sessions: Slots::default(),
            zero_at: None,
            staged: VecDeque::new(),
            handshake_at_wall: None,
            keepalive_from: None,
            jitter: Duration::ZERO,
            scheduled_at: None,
        }
    }

    /// The earliest deadline. Also settles who watches the peer: while workers are active we look
    /// at it at least every ten seconds, and an idle peer is left alone until its next packet.
    pub(crate) fn next_deadline(&self, now: Instant) -> Option<(Instant, Timer)> {
        let activity = &self.shared.activity;
        if self.active_deadline().is_none() {
            activity.watched.store(false, Ordering::SeqCst);
            // A worker that noted activity before it saw "not watched" is seen by what follows.
            fence(Ordering::SeqCst);
        }
        let mut next = self.active_deadline();
        if next.is_some() {
            activity.watched.store(true, Ordering::SeqCst);
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

    /// The handshake of a session is finished and proven: no more tries.
    pub(crate) fn handshake_done(&mut self, wall: Duration) {
        self.trying_since = None;
        self.retry_at = None;
        self.handshake_at_wall = Some(wall);
        self.shared.activity.handshake_wanted.store(false, Ordering::Relaxed);
    }

    /// Forgets the address that answers leave from: the kernel chooses anew.
    pub(crate) fn forget_source(&self) {
        if let Some(endpoint) = self.shared.endpoint.load().as_deref().copied() {
            self.shared.roam(crate::peer::Endpoint { local: None, ifindex: 0, ..endpoint });
        }
    }
}

impl Slots {
    /// Local indices of all three.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> {
        [&self.previous, &self.current, &self.next]
            .into_iter()
            .flatten()
            .map(|session| session.local_index)
    }
}

fn earlier(a: Option<(Instant, Timer)>, b: Option<(Instant, Timer)>) -> Option<(Instant, Timer)> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.0 < a.0 { b } else { a }),
        (a, b) => a.or(b),
    }
}
