//! A data plane that was started anew has no session, and its peers do not know: they send with what
//! it cannot open until WireGuard's own timers find out, 15 s later. So it is asked for a handshake
//! with each peer that may have a session, as soon as there is a way to it.
//!
//! Two sources say who may. If only the data plane died, we remember whom it had a handshake with
//! within a session's life. If we are new as well, the peer's introduction says it. Who has no
//! session is left alone: a handshake would wake it for nothing.

use std::cmp::Reverse;

use millrace_path::Instant;
use millrace_path::budget::Budget;
use millrace_path::limits::SESSION_TIME;
use millrace_path::output::Route;
use millrace_path::sealed::PublicKey;

use super::Gateway;
use crate::limits::{CONNECTS, CONNECTS_PAUSE};

/// Peers that may send with a session that our data plane has lost.
#[derive(Debug)]
pub(super) struct Connects {
    /// The one that talked last comes first: it is most likely to talk now. No more than peers.
    waiting: Vec<Lost>,
    budget: Budget,
    /// There is a way to one of them, and the rate or the link does not let it out now.
    again_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Lost {
    peer: PublicKey,
    /// After this its session is over anyway.
    until: Instant,
}

impl Connects {
    pub(super) fn new(now: Instant) -> Self {
        Self { waiting: Vec::new(), budget: Budget::new(CONNECTS, now), again_at: None }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.again_at
    }
}

impl Gateway {
    /// The data plane is gone, and its sessions with it.
    pub(super) fn sessions_lost(&mut self, now: Instant) {
        let mut lost: Vec<_> =
            self.peers.values().map(|peer| (peer.key, *peer.traffic.line())).collect();
        lost.sort_by_key(|(_, line)| Reverse(line.received_ns.max(line.sent_ns)));
        for (peer, line) in lost {
            let until = Instant::from_nanos(line.handshake_ns) + SESSION_TIME;
            if line.handshake_ns > 0 && until > now {
                self.may_have_session(peer, until);
            }
        }
    }

    /// It may send with a session that our data plane does not have, until then.
    pub(super) fn may_have_session(&mut self, peer: PublicKey, until: Instant) {
        let waiting = &mut self.connects.waiting;
        waiting.retain(|lost| lost.peer != peer);
        waiting.push(Lost { peer, until });
    }

    /// Asks for the handshakes to which there is a way now.
    pub(super) fn ask_for_handshakes(&mut self, now: Instant) {
        if self.connects.waiting.is_empty() || self.plane.is_none() {
            return;
        }
        self.connects.again_at = None;
        let mut waiting = std::mem::take(&mut self.connects.waiting);
        waiting.retain(|lost| lost.until > now && !self.is_asked_for(now, lost.peer));
        self.connects.waiting = waiting;
    }

    /// Whether nothing more is to be done for this one.
    fn is_asked_for(&mut self, now: Instant, peer: PublicKey) -> bool {
        let Some(plane) = &self.plane else { return false };
        let (Some(tools), Some(known)) = (&plane.tools, self.peers.get(&peer)) else {
            return false;
        };
        let has_way = match known.route {
            Route::Direct { .. } => true,
            Route::Relay => self.relays.reaches(known.home_url(), known.heard_at),
            Route::Unset => known.endpoint.is_some(),
        };
        if self.slots.get(&known.slot) != Some(&peer) || !has_way {
            return false;
        }
        if tools.observed.read(known.slot).is_some_and(|line| line.handshake_ns > 0) {
            return true;
        }
        let connects = &mut self.connects;
        let asked =
            connects.budget.take(now) && matches!(plane.link.connect_now(known.slot), Ok(true));
        if !asked {
            connects.again_at = Some(now + CONNECTS_PAUSE);
        }
        asked
    }
}
