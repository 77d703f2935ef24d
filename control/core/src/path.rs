//! One path: a pair of one of our uplinks and one of a peer's addresses. What was asked on it, what
//! was answered, how long frames may be, whether it still lives.

use std::net::SocketAddr;
use std::time::Duration;

use arrayvec::ArrayVec;

use crate::limits::{
    COMEBACK_PAUSE, COMEBACK_PAUSE_MAX, DEATH_TIME_MIN, FRAME_LENS_SMALLER, FRESH_TIME,
    FULL_FRAME_AGAIN, FULL_FRAME_TRIES, FULL_FRAME_TRIES_AGAIN, HOLE_TIME_MAX, HOLE_TIME_MIN,
    PATIENCE_EXTRA, PATIENCE_MAX, PATIENCE_MIN, PINGS_LOST, PROOF_AGAIN, RECHECK_INTERVAL,
    RTT_SAMPLES, SUSPECT_INTERVAL,
};
use crate::score::Quality;
use crate::time::Instant;

/// One of our ways out: the daemon's number for a socket or a source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UplinkId(pub u16);

/// From where and to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub uplink: UplinkId,
    pub remote: SocketAddr,
}

/// Bytes of UDP payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLens {
    /// Of the tunnel's longest packet.
    pub full: usize,
    /// What a path must carry to be used. Less than `full` only where the data plane sends shorter
    /// packets on a path that is known to carry only those.
    pub least: usize,
}

/// How far the proof of frame lengths is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Proof {
    /// Full frames were sent this often, the last time then.
    Full { tries: u8, sent_at: Option<Instant> },
    /// Full frames do not pass; all smaller lengths were sent then, `tries` times.
    Smaller { tries: u8, sent_at: Option<Instant> },
    /// Whether what passed before still passes; and when to ask for full frames next.
    Recheck { tries: u8, sent_at: Option<Instant>, again_at: Option<Instant> },
    /// Nothing more to ask before this moment; never where full frames pass.
    Done { again_at: Option<Instant> },
    /// Nothing passed but short pings: perhaps the path died meanwhile. Again with the first pong
    /// after this moment.
    Failed { again_at: Instant },
}

/// State of one path. Everything is measured by our own pings: a pong to a ping of ours proves both
/// directions, whatever else arrives proves nothing.
#[derive(Clone, Debug)]
pub struct Path {
    pub pair: Pair,
    rtts: ArrayVec<Duration, RTT_SAMPLES>,
    pub pong_at: Option<Instant>,
    /// From where the peer saw our last ping come.
    pub seen_as: Option<SocketAddr>,
    pub ping_at: Option<Instant>,
    /// When the oldest pings were sent that no pong followed.
    unanswered: ArrayVec<Instant, { 4 * PINGS_LOST }>,
    /// Something else than pings said then that it may be dead. A pong to a later ping refutes that.
    doubted_at: Option<Instant>,
    /// Longest frame that was answered; 0: none, only short pings.
    proven_len: usize,
    proven_at: Option<Instant>,
    proof: Proof,
    /// Not used before: it comes and goes.
    paused_until: Option<Instant>,
    /// Data vanished here: neither used nor answered on before.
    hole_until: Option<Instant>,
    /// How often data vanished.
    holes: u32,
    /// How often it died, lately.
    deaths: u32,
    /// Pings of ours, and those that were answered.
    pub sent: u64,
    pub answered: u64,
    /// When the peer's own pings last came this way.
    pub asked_at: Option<Instant>,
}

impl Path {
    pub fn new(pair: Pair) -> Self {
        Self {
            pair,
            rtts: ArrayVec::new(),
            pong_at: None,
            seen_as: None,
            ping_at: None,
            unanswered: ArrayVec::new(),
            doubted_at: None,
            proven_len: 0,
            proven_at: None,
            proof: Proof::Full { tries: 0, sent_at: None },
            paused_until: None,
            hole_until: None,
            holes: 0,
            deaths: 0,
            sent: 0,
            answered: 0,
            asked_at: None,
        }
    }

    /// A short ping went out.
    pub fn pinged(&mut self, now: Instant) {
        self.ping_at = Some(now);
        // Once full, the oldest say enough.
        let _ = self.unanswered.try_push(now);
    }

    /// A ping that was sent then, with a frame of `len` bytes, was answered.
    pub fn ponged(&mut self, now: Instant, sent_at: Instant, len: usize, full_len: usize) {
        self.pong_at = Some(now);
        self.answered += 1;
        if self.is_silent() {
            // Long frames that were lost with all others say nothing about their length.
            match &mut self.proof {
                Proof::Full { tries, .. }
                | Proof::Smaller { tries, .. }
                | Proof::Recheck { tries, .. } => *tries = 0,
                Proof::Done { .. } | Proof::Failed { .. } => {}
            }
        }
        self.unanswered.retain(|at| *at > sent_at);
        self.doubted_at.take_if(|doubted_at| *doubted_at <= sent_at);
        if len < FRAME_LENS_SMALLER[FRAME_LENS_SMALLER.len() - 1] {
            if self.rtts.is_full() {
                self.rtts.remove(0);
            }
            self.rtts.push(now.since(sent_at));
            if matches!(self.proof, Proof::Failed { again_at } if again_at <= now) {
                self.proof = Proof::Full { tries: 0, sent_at: None };
            }
            return;
        }
        self.proven_len = self.proven_len.max(len);
        self.proven_at = Some(now);
        let again_at = (self.proven_len < full_len).then(|| now + FULL_FRAME_AGAIN);
        self.proof = match self.proof {
            // A late answer to something else.
            Proof::Full { .. } if len < full_len => self.proof,
            Proof::Recheck { again_at, .. } => Proof::Done { again_at },
            _ => Proof::Done { again_at },
        };
    }

    /// Longest frame that passes, once proven.
    pub fn proven_len(&self) -> Option<usize> {
        Some(self.proven_len).filter(|len| *len > 0)
    }

    /// What was measured, if the path may carry the tunnel now: answered lately, proven with frames
    /// long enough, not dead, no hole for data.
    /// `lens`: the tunnel's longest frame, and the least that a path must carry.
    pub fn quality(&self, now: Instant, lens: FrameLens) -> Option<Quality> {
        let fresh = self.pong_at.is_some_and(|at| now.since(at) < FRESH_TIME);
        if !fresh || self.is_avoided(now) || self.is_dead(now) || self.proven_len < lens.least {
            return None;
        }
        let rtt = *self.rtts.iter().min()?;
        let spread = *self.rtts.iter().max()? - rtt;
        let full_frames = self.proven_len >= lens.full;
        Some(Quality { rtt, spread, remote: self.pair.remote.ip(), full_frames })
    }

    /// The best of the last round trips.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtts.iter().min().copied()
    }

    /// After how long a ping is overdue: three round trips, within bounds that make fail-over quick
    /// and do not take a long way for a dead one.
    pub fn patience(&self) -> Duration {
        let worst = self.rtts.iter().max().copied().unwrap_or(PATIENCE_MAX);
        let usual = (3 * worst).clamp(PATIENCE_MIN, PATIENCE_MAX);
        usual.max(worst + worst / 2 + PATIENCE_EXTRA)
    }

    /// When the oldest ping without answer becomes overdue.
    pub fn suspect_at(&self) -> Option<Instant> {
        Some(*self.unanswered.first()? + self.patience())
    }

    /// When, without another pong, the path is dead.
    pub fn dead_at(&self) -> Option<Instant> {
        if self.doubted_at.is_some() {
            return self.suspect_at();
        }
        let lost = *self.unanswered.get(PINGS_LOST - 1)? + self.patience();
        Some(lost.max(*self.unanswered.first()? + DEATH_TIME_MIN))
    }

    /// Something else than pings says that the path may be dead: it is asked at once, and one ping
    /// that is not answered will do.
    pub fn doubt(&mut self, now: Instant) {
        self.doubted_at.get_or_insert(now);
    }

    pub fn is_dead(&self, now: Instant) -> bool {
        self.dead_at().is_some_and(|at| at <= now)
    }

    /// The path died in use. It may come back at once the first time, then ever later: a path that
    /// comes and goes is worse than the relay.
    pub fn died(&mut self, now: Instant) {
        if self.deaths > 0 {
            let pause = COMEBACK_PAUSE * 2_u32.saturating_pow(self.deaths - 1);
            self.paused_until = Some(now + pause.min(COMEBACK_PAUSE_MAX));
        }
        self.deaths += 1;
    }

    /// Data vanished here, while pings were answered.
    pub fn swallowed(&mut self, now: Instant) {
        let time = HOLE_TIME_MIN * 2_u32.saturating_pow(self.holes);
        self.hole_until = Some(now + time.min(HOLE_TIME_MAX));
        self.holes += 1;
    }

    /// Not used now, whatever it answers.
    pub fn is_avoided(&self, now: Instant) -> bool {
        self.is_hole(now) || self.paused_until.is_some_and(|until| now < until)
    }

    /// Data vanished here lately.
    pub fn is_hole(&self, now: Instant) -> bool {
        self.hole_until.is_some_and(|until| now < until)
    }

    /// The peer is another process now: what the one before did not answer says nothing.
    pub fn begin_anew(&mut self) {
        self.unanswered.clear();
        self.doubted_at = None;
        self.hole_until = None;
        self.holes = 0;
    }

    /// When the oldest ping was sent that no pong followed.
    pub fn unanswered_since(&self) -> Option<Instant> {
        self.unanswered.first().copied()
    }

    /// When a short ping is due on a path that is watched: regularly, and faster once one is overdue.
    pub fn ping_due_at(&self, interval: Duration) -> Option<Instant> {
        let last = self.ping_at?;
        let regular = self.doubted_at.filter(|at| *at > last).unwrap_or(last + interval);
        // Not for ever, where a path is kept in spite of it.
        let suspected = self.suspect_at().filter(|_| !self.unanswered.is_full());
        let quick = suspected.map(|at| at.max(last + SUSPECT_INTERVAL));
        Some(quick.map_or(regular, |quick| quick.min(regular)))
    }

    /// Short pings are not answered, either: the last was sent when one was overdue.
    fn is_silent(&self) -> bool {
        self.suspect_at().is_some_and(|at| self.ping_at >= Some(at))
    }

    /// When the next long frames are to be sent, once the path has answered at all.
    pub fn proof_at(&self) -> Option<Instant> {
        let answered = self.pong_at.filter(|_| !self.is_silent())?;
        match self.proof {
            Proof::Full { sent_at, .. }
            | Proof::Smaller { sent_at, .. }
            | Proof::Recheck { sent_at, .. } => {
                Some(sent_at.map_or(answered, |at| at + self.patience()))
            }
            Proof::Done { again_at } => again_at,
            Proof::Failed { .. } => None,
        }
    }

    /// The lengths to send now, for which `proof_at` is over.
    pub fn next_proof(&mut self, now: Instant, full_len: usize) -> ArrayVec<usize, 4> {
        let mut lens = ArrayVec::new();
        let sent_at = Some(now);
        if let Proof::Recheck { tries: FULL_FRAME_TRIES_AGAIN.., .. } = self.proof {
            // What passed once does not any more: begin anew.
            self.proven_len = 0;
            self.proof = Proof::Full { tries: 0, sent_at: None };
        }
        self.proof = match self.proof {
            Proof::Recheck { tries, again_at, .. } => {
                lens.push(self.proven_len);
                Proof::Recheck { tries: tries + 1, sent_at, again_at }
            }
            Proof::Full { tries, .. } if tries < FULL_FRAME_TRIES => {
                lens.push(full_len);
                Proof::Full { tries: tries + 1, sent_at }
            }
            Proof::Full { .. } if self.proven_len > 0 => {
                Proof::Done { again_at: Some(now + FULL_FRAME_AGAIN) }
            }
            Proof::Smaller { tries: FULL_FRAME_TRIES.., .. } => {
                Proof::Failed { again_at: now + PROOF_AGAIN }
            }
            Proof::Full { .. } | Proof::Smaller { .. } => {
                let tries = if let Proof::Smaller { tries, .. } = self.proof { tries } else { 0 };
                lens.extend(FRAME_LENS_SMALLER.into_iter().filter(|len| *len < full_len));
                Proof::Smaller { tries: tries + 1, sent_at }
            }
            Proof::Done { .. } | Proof::Failed { .. } => {
                lens.push(full_len);
                Proof::Full { tries: 1, sent_at }
            }
        };
        lens
    }

    /// Asks again whether long frames pass, if the last answer is old: a route may change under a
    /// path, and short pings do not see that.
    pub fn recheck(&mut self, now: Instant) {
        if self.proven_at.is_some_and(|at| now.since(at) >= RECHECK_INTERVAL) {
            self.prove_again();
        }
    }

    /// The same, at once.
    pub fn prove_again(&mut self) {
        if let Proof::Done { again_at } = self.proof {
            self.proof = Proof::Recheck { tries: 0, sent_at: None, again_at };
        }
    }

    /// Which frames passed is as good as unknown: on another path of the same two they do not any
    /// more.
    pub fn unprove(&mut self) {
        self.proven_len = 0;
        self.proof = Proof::Full { tries: 0, sent_at: None };
    }

    /// Whether a long frame was answered after this.
    pub fn is_proven_since(&self, since: Instant) -> bool {
        self.proven_at.is_some_and(|at| at > since)
    }

    /// Short pings pass, and frames that the tunnel needs do not.
    pub fn proof_failed(&self, lens: FrameLens) -> bool {
        let is_over = !matches!(self.proof, Proof::Full { .. } | Proof::Recheck { .. });
        let too_short = self.proven_len > 0 && self.proven_len < lens.least;
        matches!(self.proof, Proof::Failed { .. }) || is_over && too_short
    }

    /// Everything measured is void: another network is under the same addresses.
    pub fn forget(&mut self) {
        *self = Self { deaths: self.deaths, ..Self::new(self.pair) };
    }
}
