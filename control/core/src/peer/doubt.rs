//! Signs that the path in use may be dead, other than pings: they make one unanswered ping enough.

use std::net::SocketAddr;

use super::{Context, Peer};
use crate::candidate::{Candidate, CandidateKind};
use crate::limits::{PATHS_MAX, TALK_INTERVAL_MAX};
use crate::output::{Event, Route, Why};
use crate::path::{Pair, Path};
use crate::time::Instant;

/// Where STUN servers see us, of each family, while all of them see us at one place.
#[derive(Debug, Default)]
pub(crate) struct Places {
    ipv4: Option<SocketAddr>,
    ipv6: Option<SocketAddr>,
}

/// Places that servers do not see us at any more, of each family: the NAT may have forgotten them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    ipv4: Option<SocketAddr>,
    ipv6: Option<SocketAddr>,
}

impl Places {
    /// Takes in what is seen now. Several places say nothing: either some servers have not answered
    /// since the move, or the NAT has one for each destination.
    pub(crate) fn take(&mut self, candidates: &[Candidate]) -> Moved {
        let seen = candidates.iter().filter(|seen| seen.kind == CandidateKind::Reflexive);
        let seen = seen.map(|candidate| candidate.address);
        let (ipv6, ipv4): (Vec<_>, Vec<_>) = seen.partition(SocketAddr::is_ipv6);
        let take = |place: &mut Option<SocketAddr>, seen: &[SocketAddr]| match *seen {
            [only] => place.replace(only).filter(|before| *before != only),
            _ => None,
        };
        Moved { ipv4: take(&mut self.ipv4, &ipv4), ipv6: take(&mut self.ipv6, &ipv6) }
    }
}

impl Moved {
    fn place(self, pair: Pair) -> Option<SocketAddr> {
        if pair.remote.is_ipv6() { self.ipv6 } else { self.ipv4 }
    }
}

impl Peer {
    /// Our side may have lost its place: on paths on which the peer sees us there, too. Others do not
    /// lead through that NAT.
    pub(super) fn doubt_moved(&mut self, now: Instant, moved: Moved) {
        let lost = |path: &Path| path.seen_as.is_some() && path.seen_as == moved.place(path.pair);
        let paths = self.paths.values_mut().filter(|path| lost(path));
        paths.for_each(|path| path.doubt(now));
    }

    /// The peer's side may have lost its place.
    pub(super) fn doubt_used(&mut self, now: Instant) {
        if let Some(path) = self.used().and_then(|pair| self.paths.get_mut(&pair)) {
            path.doubt(now);
        }
    }

    /// The same, because its packets come from there now.
    pub(super) fn doubt_for(&mut self, context: &mut Context<'_>, from: SocketAddr) {
        let Some(used) = self.used().filter(|pair| pair.remote != from) else { return };
        if context.own.addresses.check(from).is_err() {
            return;
        }
        self.doubt_used(context.now);
        let mut uplinks = context.own.uplinks.iter();
        let uplink = if from.is_ipv6() == used.remote.is_ipv6() {
            Some(used.uplink)
        } else {
            uplinks.find(|uplink| uplink.ipv6 == from.is_ipv6()).map(|uplink| uplink.id)
        };
        let Some(uplink) = uplink else { return };
        if !self.candidates.contains(from) {
            self.candidates.insert_peer_reflexive(from);
        }
        self.probe_soon(context, Pair { uplink, remote: from });
    }

    /// A peer whose control process is away answers no pings, and nobody keeps a firewall open for
    /// paths that only pings took: from where its packets come is the way to it.
    pub(super) fn follow_packets(&mut self, context: &mut Context<'_>) {
        let now = context.now;
        let Some(used) = self.used().filter(|_| self.gone) else { return };
        let is_dead = self.paths.get(&used).is_some_and(|path| path.is_dead(now));
        let Some((from, at)) = self.tunnel.received_directly.filter(|_| is_dead) else { return };
        if from == used.remote || now.since(at) >= TALK_INTERVAL_MAX {
            return;
        }
        let known = self.paths.values().find(|path| {
            path.pair.remote == from && path.proven_len().is_some() && !path.is_avoided(now)
        });
        if let Some(pair) = known.map(|path| path.pair) {
            self.use_path(context, pair, Why::PeerGone);
        }
    }

    /// Pings there before all others.
    pub(super) fn probe_soon(&mut self, context: &mut Context<'_>, pair: Pair) {
        if !self.search.queue.contains(&pair) {
            self.search.queue.truncate(PATHS_MAX - 1);
            self.search.queue.push_front(pair);
            self.drain(context);
        }
    }

    /// Says once of each suspicion that the path in use does not answer.
    pub(super) fn tell_suspicion(&mut self, context: &mut Context<'_>) {
        let path = self.used().and_then(|pair| self.paths.get(&pair));
        let suspect_at = path.and_then(Path::suspect_at);
        let suspected = suspect_at.is_some_and(|at| at <= context.now);
        if suspected && !self.suspected {
            context.event(Event::Suspected { peer: self.key });
        }
        self.suspected = suspected;
    }

    /// The path in use.
    pub(super) fn used(&self) -> Option<Pair> {
        match self.route {
            Route::Direct { pair, .. } => Some(pair),
            Route::Unset | Route::Relay => None,
        }
    }
}
