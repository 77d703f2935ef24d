//! What the path finder knows of one peer, for those who ask why.

use std::time::Duration;

use super::Peer;
use crate::candidate::Candidate;
use crate::nat::Nat;
use crate::output::Route;
use crate::path::{FrameLens, Pair, Path};
use crate::sealed::PublicKey;
use crate::time::Instant;

/// A copy of what is known at one moment.
#[derive(Clone, Debug)]
pub struct Report {
    /// Of the process over there; none: it never introduced itself.
    pub disco_key: Option<PublicKey>,
    /// It has our introduction.
    pub heard: bool,
    pub route: Route,
    pub since: Instant,
    /// There was traffic lately, so that paths are searched for.
    pub active: bool,
    /// Searches in a row that found nothing.
    pub fruitless: usize,
    /// Where the peer says it is, and where it was seen.
    pub candidates: Vec<Candidate>,
    /// What the peer says of its NAT; none: it does not say, as older ones.
    pub nat: Option<Nat>,
    pub paths: Vec<PathReport>,
}

/// One pair of an uplink of ours and an address of the peer's.
#[derive(Clone, Copy, Debug)]
pub struct PathReport {
    pub pair: Pair,
    pub state: PathState,
    /// Pings of ours, and those of them that were answered.
    pub sent: u64,
    pub answered: u64,
    /// When the peer's own pings last came this way.
    pub asked_at: Option<Instant>,
    pub pong_at: Option<Instant>,
    /// The best of the last round trips.
    pub round_trip: Option<Duration>,
    /// Longest UDP payload that was answered.
    pub frame_len: Option<usize>,
}

/// What a path is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathState {
    /// It may carry the tunnel.
    Works,
    /// Short pings are answered and no long frame was, yet.
    Unproven,
    /// Short pings are answered and long frames are lost.
    LosesLongFrames,
    /// The peer's pings arrive here, ours are not answered: open in one direction.
    OneWay,
    /// It answered before.
    Silent,
    /// It never answered: filtered, or not there.
    NeverAnswered,
    /// It works and is not used for a while: it died too often, or data vanished there.
    Quarantined,
}

impl Peer {
    pub(crate) fn report(&self, now: Instant, lens: FrameLens) -> Report {
        Report {
            disco_key: self.disco_key(),
            heard: self.heard,
            route: self.route,
            since: self.switched_at,
            active: self.is_active(now),
            fruitless: self.search.fruitless,
            candidates: self.candidates.iter().copied().collect(),
            nat: self.nat,
            paths: self.paths.values().map(|path| path.report(now, lens)).collect(),
        }
    }
}

impl Path {
    fn report(&self, now: Instant, lens: FrameLens) -> PathReport {
        PathReport {
            pair: self.pair,
            state: self.state(now, lens),
            sent: self.sent,
            answered: self.answered,
            asked_at: self.asked_at,
            pong_at: self.pong_at,
            round_trip: self.rtt(),
            frame_len: self.proven_len(),
        }
    }

    fn state(&self, now: Instant, lens: FrameLens) -> PathState {
        let lately = |at: Instant| now.since(at) < crate::limits::FRESH_TIME;
        let asked_since = self.asked_at.is_some_and(|at| Some(at) > self.pong_at && lately(at));
        if self.is_avoided(now) {
            PathState::Quarantined
        } else if self.quality(now, lens).is_some() {
            PathState::Works
        } else if self.pong_at.is_some_and(lately) && !self.is_dead(now) {
            if self.proof_failed(lens) { PathState::LosesLongFrames } else { PathState::Unproven }
        } else if asked_since {
            PathState::OneWay
        } else if self.pong_at.is_some() {
            PathState::Silent
        } else {
            PathState::NeverAnswered
        }
    }
}
