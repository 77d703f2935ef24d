//! What is known of one peer, and what to do about it: search, prove, choose, watch, leave.

mod choice;
mod doubt;
mod probe;
mod question;
pub(crate) mod report;
mod search;
mod tunnel;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use rand::RngCore;

use crate::budget::Budget;
use crate::candidate::{Candidate, CandidateKind, CandidateList, OwnAddresses};
use crate::disco::Message;
use crate::introduce::{self, Freshness, Home, IntroduceError, Introduction};
use crate::limits::{
    ACTIVE_TIME, ALTERNATE_INTERVAL, ALTERNATES_MAX, DATA_SILENCE_MAX, FRESH_TIME,
    HEARTBEAT_INTERVAL, HEARTBEAT_INTERVAL_PAUSE, INTRODUCE_INTERVAL_MIN, KEEPALIVE_INTERVAL,
    NAT_NEWS_DELAY, PAUSE_TIME, PING_TIMEOUT, PINGS_REMEMBERED, PONGS_PER_PEER, PROBES_PER_PEER,
    SESSION_TIME, SIGNALS_PER_PEER, SUSPECT_INTERVAL,
};
use crate::nat::Nat;
use crate::output::{Event, Output, Reason, Refused, Route, Transmit, Why};
use crate::path::{FrameLens, Pair, Path, UplinkId};
use crate::score::Quality;
use crate::sealed::{BoxKey, PublicKey, SecretKey};
use crate::time::Instant;
use crate::transaction::TransactionId;
pub(crate) use doubt::{Moved, Places};
use probe::Ping;
use question::Question;
use search::Search;
use tunnel::Tunnel;

/// One of our ways out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub id: UplinkId,
    pub ipv6: bool,
}

/// How much is kept of one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub candidates: usize,
    pub paths: usize,
    /// Pings without an answer yet.
    pub pings: usize,
    /// Pings that wait for their budget.
    pub queued: usize,
}

/// An answer to a ping of ours.
pub(crate) struct Pong {
    pub(crate) transaction: TransactionId,
    /// Where the peer saw the ping come from.
    pub(crate) seen_as: SocketAddr,
    /// How long ago it last received a packet of the tunnel.
    pub(crate) received_age: Option<Duration>,
}

/// What is ours.
#[derive(Debug)]
pub(crate) struct Own {
    pub node_key: PublicKey,
    pub disco_secret: SecretKey,
    pub disco_key: PublicKey,
    pub home: Home,
    /// What peers are told.
    pub candidates: Vec<Candidate>,
    pub places: Places,
    pub addresses: OwnAddresses,
    pub uplinks: Vec<Uplink>,
    pub nat: Nat,
    /// Bytes of UDP payload of the tunnel's longest packet.
    pub frame_len: usize,
    /// The least that a path must carry.
    pub least_frame_len: usize,
    /// Nanoseconds since 1970 at [`Instant`] zero.
    pub wall_at_zero: u64,
}

impl Own {
    pub(crate) fn lens(&self) -> FrameLens {
        FrameLens { full: self.frame_len, least: self.least_frame_len }
    }

    /// Where a ping through a relay came from, as Tailscale writes it: an address that is none, and
    /// the region.
    fn relay_address(&self) -> SocketAddr {
        SocketAddr::from(([127, 3, 3, 40], self.home.region))
    }
}

/// What one call works with.
pub(crate) struct Context<'c> {
    pub(crate) now: Instant,
    pub(crate) own: &'c Own,
    pub(crate) random: &'c mut dyn RngCore,
    pub(crate) outputs: &'c mut VecDeque<Output>,
    /// Probes to all peers.
    pub(crate) probes: &'c mut Budget,
    /// Who waits for it.
    pub(crate) waiting: &'c mut VecDeque<PublicKey>,
}

impl Context<'_> {
    fn random<const LEN: usize>(&mut self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        self.random.fill_bytes(&mut bytes);
        bytes
    }

    fn transmit(&mut self, transmit: Transmit) {
        self.outputs.push_back(Output::Transmit(transmit));
    }

    fn event(&mut self, event: Event) {
        self.outputs.push_back(Output::Event(event));
    }
}

pub(crate) struct Peer {
    key: PublicKey,
    box_key: BoxKey,
    /// The peer's disco key and the key of it and ours, once introduced.
    disco: Option<(PublicKey, BoxKey)>,
    freshness: Freshness,
    candidates: CandidateList,
    paths: BTreeMap<Pair, Path>,
    pings: VecDeque<Ping>,
    pub(crate) route: Route,
    switched_at: Instant,
    settle_at: Option<Instant>,
    active_until: Option<Instant>,
    search: Search,
    introduce_at: Option<Instant>,
    signals: Budget,
    introduce_gap: Duration,
    probes: Budget,
    pongs: Budget,
    /// The peer has an introduction of this process: it answered one, or wrote to our disco key.
    heard: bool,
    /// What we have to say changed, or the peer was away: it did not confirm since that it has the
    /// news.
    changed: bool,
    /// The peer asked for our next introduction, and takes it as an answer.
    owes_answer: bool,
    /// Transactions of the peer's pings, the newest last.
    seen_pings: VecDeque<TransactionId>,
    questions: Vec<Question>,
    tunnel: Tunnel,
    /// The path in use does not answer, and that was told.
    suspected: bool,
    /// When the peer's control process last said anything by UDP.
    disco_at: Option<Instant>,
    home: Option<Home>,
    /// What its NAT does, if it said so.
    nat: Option<Nat>,
    /// The relay says that the peer is not there, and nothing came from its control process since.
    gone: bool,
    /// The path that died last, while nothing else was known.
    fallen_from: Option<Pair>,
}

impl Peer {
    /// `endpoint`: where the configuration says the peer is. Such a peer may be plain WireGuard and
    /// stays untouched until it introduces itself; others are at their relay from the first packet.
    pub(crate) fn new(
        key: PublicKey,
        box_key: BoxKey,
        endpoint: Option<SocketAddr>,
        in_use: Option<Pair>,
        context: &mut Context<'_>,
    ) -> Self {
        let now = context.now;
        let mut candidates = CandidateList::default();
        if let Some(address) = endpoint {
            candidates.insert(Candidate { kind: CandidateKind::Configured, address });
        }
        let mut peer = Self {
            key,
            box_key,
            disco: None,
            freshness: Freshness::default(),
            candidates,
            paths: BTreeMap::new(),
            pings: VecDeque::new(),
            route: Route::Unset,
            switched_at: now,
            settle_at: None,
            active_until: None,
            search: Search::default(),
            introduce_at: Some(now),
            signals: Budget::new(SIGNALS_PER_PEER, now),
            introduce_gap: INTRODUCE_INTERVAL_MIN,
            probes: Budget::new(PROBES_PER_PEER, now),
            pongs: Budget::new(PONGS_PER_PEER, now),
            heard: false,
            changed: false,
            owes_answer: false,
            seen_pings: VecDeque::new(),
            questions: Vec::new(),
            tunnel: Tunnel::default(),
            suspected: false,
            disco_at: None,
            home: None,
            nat: None,
            gone: false,
            fallen_from: None,
        };
        if let Some(pair) = in_use {
            // The data plane has it already: nothing to tell. Pings begin with the introduction.
            peer.route = Route::Direct { pair, frame_len: 0 };
            peer.paths.insert(pair, Path::new(pair));
        } else if endpoint.is_none() {
            peer.set_route(context, Route::Relay, Why::First);
        }
        peer
    }

    pub(crate) fn held(&self) -> Held {
        Held {
            candidates: self.candidates.iter().len(),
            paths: self.paths.len(),
            pings: self.pings.len(),
            queued: self.search.queue.len(),
        }
    }

    pub(crate) fn disco_key(&self) -> Option<PublicKey> {
        self.disco.as_ref().map(|(key, _)| *key)
    }

    pub(crate) fn disco_box(&self) -> Option<&BoxKey> {
        self.disco.as_ref().map(|(_, key)| key)
    }

    /// The peer has our introduction: no need to repeat it.
    pub(crate) fn heard(&mut self) {
        self.gone = false;
        if !self.heard {
            self.heard = true;
            self.stop_introducing();
        }
    }

    fn stop_introducing(&mut self) {
        if !self.changed {
            self.introduce_at = None;
            self.introduce_gap = INTRODUCE_INTERVAL_MIN;
        }
    }

    /// The same, without a relay.
    pub(crate) fn heard_directly(&mut self, now: Instant) {
        self.disco_at = Some(now);
        self.heard();
    }

    /// The tunnel has packets for the peer, or had some from it.
    pub(crate) fn active(&mut self, context: &mut Context<'_>) {
        let was_idle = self.active_until.is_none_or(|until| until <= context.now);
        self.active_until = Some(context.now + ACTIVE_TIME);
        if was_idle {
            self.search.fruitless = 0;
            // Without traffic an introduction is not repeated, and that one may have been lost.
            if !self.heard {
                self.introduce_gap = INTRODUCE_INTERVAL_MIN;
                self.introduce_at = Some(context.now);
            }
            if self.disco.is_none() {
                return;
            }
            if !matches!(self.route, Route::Direct { .. }) {
                self.start_search(context.now, true);
            } else if self.search.next_at.is_none() {
                self.search.next_at = self.next_search(context);
            }
        }
    }

    /// The relay has no connection of the peer: without its control process the tunnel goes on
    /// where it was, if anywhere.
    pub(crate) fn gone(&mut self, context: &mut Context<'_>) {
        self.gone = true;
        if self.route == Route::Relay
            && let Some(pair) = self.fallen_from.filter(|pair| self.paths.contains_key(pair))
        {
            self.use_path(context, pair, Why::PeerGone);
            // Until it answers: it may be back soon, and wait at the same path as we do.
            self.changed = self.disco.is_some();
            self.introduce_gap = INTRODUCE_INTERVAL_MIN;
            self.introduce_at = Some(context.now + INTRODUCE_INTERVAL_MIN);
        }
    }

    /// A relay carries again: what it could not carry before is not waited for any longer.
    pub(crate) fn relay_up(&mut self, now: Instant) {
        if !self.heard || self.changed {
            self.introduce_gap = INTRODUCE_INTERVAL_MIN;
            self.answer_introduction(now);
        }
    }

    /// An introduction that the relay says is from this peer. True if its disco key is new;
    /// `is_taken` says whether a key is somebody else's.
    pub(crate) fn introduced(
        &mut self,
        context: &mut Context<'_>,
        packet: &mut [u8],
        is_taken: impl Fn(PublicKey) -> bool,
    ) -> Result<bool, IntroduceError> {
        let introduction = introduce::open(packet, self.key, &self.box_key)?;
        // Another's disco key would bring us that one's messages under this one's name.
        if is_taken(introduction.disco_key) {
            return Err(IntroduceError::Sender);
        }
        let wanted = match self.freshness.take(&introduction) {
            Ok(wanted) => wanted,
            Err(error) => {
                // A peer whose clock went back is heard once it answers this.
                self.answer_introduction(context.now);
                return Err(error);
            }
        };
        self.gone = false;
        let Introduction { disco_key, has_session, home, candidates, nat, .. } = introduction;
        self.nat = nat;
        let new = self.disco_key() != Some(disco_key);
        if new {
            let agreed = BoxKey::agree(&context.own.disco_secret, disco_key);
            self.disco = Some((disco_key, agreed.ok_or(IntroduceError::Malformed)?));
            // Another process: what the one before answered says little.
            self.pings.clear();
            self.paths.values_mut().for_each(Path::begin_anew);
            self.heard = false;
        }
        if new || self.home.as_ref() != Some(&home) {
            self.home = Some(home.clone());
            context.event(Event::Introduced { peer: self.key, home, has_session });
        }
        use CandidateKind::{Configured, PeerReflexive};
        let used = self.used().map(|pair| pair.remote);
        let was_named = self.candidates.iter().any(|known| {
            Some(known.address) == used && !matches!(known.kind, Configured | PeerReflexive)
        });
        // What the peer cannot know stays.
        self.candidates.retain(|known| matches!(known.kind, Configured | PeerReflexive));
        for candidate in candidates {
            self.candidates.insert(candidate);
        }
        // A new process does not know all of its addresses yet.
        if !new {
            if was_named && used.is_some_and(|used| !self.candidates.contains(used)) {
                self.doubt_used(context.now);
            }
            self.fallen_from.take_if(|pair| !self.candidates.contains(pair.remote));
        }
        if self.route == Route::Unset {
            self.set_route(context, Route::Relay, Why::Introduced);
        }
        if wanted {
            self.owes_answer = true;
            self.answer_introduction(context.now);
        } else {
            if std::mem::take(&mut self.changed) {
                self.stop_introducing();
            }
            self.heard();
        }
        self.start_search(context.now, false);
        Ok(new)
    }

    pub(crate) fn ping(
        &mut self,
        context: &mut Context<'_>,
        from: Pair,
        transaction: TransactionId,
    ) -> Result<(), Refused> {
        // The peer hears that data vanished here only by our silence: it may be its data.
        if self.paths.get(&from).is_some_and(|path| path.is_hole(context.now)) {
            return Err(Refused::PingIntoHole);
        }
        self.fresh_ping(context.now, transaction)?;
        context.own.addresses.check(from.remote).map_err(|_| Refused::NeverProbed)?;
        let received_age_ms = self.received_age_ms(context.now);
        let pong = Message::Pong { transaction, source: from.remote, received_age_ms };
        self.send(context, from, &pong, false);
        // The NAT on the peer's side is open to us right now: ask back at once.
        if !self.candidates.contains(from.remote) {
            self.candidates.insert_peer_reflexive(from.remote);
        }
        let pong_at = self.paths.get(&from).and_then(|path| path.pong_at);
        if pong_at.is_none_or(|at| context.now.since(at) >= FRESH_TIME) {
            let recently = self
                .paths
                .get(&from)
                .and_then(|path| path.ping_at)
                .is_some_and(|at| context.now.since(at) < SUSPECT_INTERVAL);
            if !recently {
                self.probe_soon(context, from);
            }
        }
        if let Some(path) = self.paths.get_mut(&from) {
            path.asked_at = Some(context.now);
        }
        Ok(())
    }

    /// Whether a ping is the first of its transaction and within what we answer.
    fn fresh_ping(&mut self, now: Instant, transaction: TransactionId) -> Result<(), Refused> {
        if self.seen_pings.contains(&transaction) {
            return Err(Refused::PingReplayed);
        }
        if !self.pongs.take(now) {
            return Err(Refused::PingOverBudget);
        }
        if self.seen_pings.len() == PINGS_REMEMBERED {
            self.seen_pings.pop_front();
        }
        self.seen_pings.push_back(transaction);
        Ok(())
    }

    pub(crate) fn pong(
        &mut self,
        context: &mut Context<'_>,
        from: Pair,
        Pong { transaction, seen_as, received_age }: Pong,
    ) -> Result<(), Refused> {
        let at = self.pings.iter().position(|ping| ping.transaction == transaction);
        let at = at.ok_or(Refused::PongUnmatched)?;
        if self.pings[at].pair != from {
            return Err(Refused::PongFromElsewhere);
        }
        let Some(ping) = self.pings.remove(at) else { return Err(Refused::PongUnmatched) };
        let Some(path) = self.paths.get_mut(&from) else { return Err(Refused::PongUnmatched) };
        if path.pong_at.is_none() {
            let peer = self.key;
            context.event(Event::SeenAt { peer, pair: from, address: seen_as });
        }
        path.seen_as = Some(seen_as);
        path.ponged(context.now, ping.sent_at, ping.len, context.own.frame_len);
        self.answered(context, transaction);
        self.choose(context);
        if let Some(age) = received_age {
            self.reported(context, from, ping.sent_at, age);
        }
        Ok(())
    }

    /// The peer asks us to ping it there, now.
    pub(crate) fn called(&mut self, now: Instant, addresses: Vec<SocketAddr>) {
        for address in addresses {
            self.candidates.insert(Candidate { kind: CandidateKind::Other, address });
        }
        self.start_search(now, false);
    }

    /// What we know of our own NAT changed: the peer is told, and no path is the worse for it.
    pub(crate) fn own_nat_changed(&mut self, now: Instant) {
        self.freshness.outdated();
        self.changed = self.disco.is_some();
        let at = now + NAT_NEWS_DELAY;
        self.introduce_at = Some(self.introduce_at.map_or(at, |planned| planned.min(at)));
    }

    /// Our addresses, uplinks or home changed: tell the peer, and look at every path anew.
    pub(crate) fn own_changed(&mut self, context: &mut Context<'_>, major: bool, moved: Moved) {
        let uplinks = &context.own.uplinks;
        self.paths.retain(|pair, _| uplinks.iter().any(|uplink| uplink.id == pair.uplink));
        if major {
            self.paths.values_mut().for_each(Path::forget);
            self.pings.clear();
        }
        self.doubt_moved(context.now, moved);
        if let Route::Direct { pair, .. } = self.route
            && (major || !self.paths.contains_key(&pair))
        {
            self.leave(context, Why::Withdrawn);
        }
        self.search.queue.retain(|pair| uplinks.iter().any(|uplink| uplink.id == pair.uplink));
        self.introduce_gap = INTRODUCE_INTERVAL_MIN;
        self.freshness.outdated();
        // The relay may lose it, and pings of the peer do not say that it has it.
        self.changed = self.disco.is_some();
        self.answer_introduction(context.now);
        // The introduction asks the peer to search; so do we.
        if self.is_active(context.now) {
            self.start_search(context.now, false);
        }
    }

    /// Does everything that is due.
    pub(crate) fn tick(&mut self, context: &mut Context<'_>) {
        let now = context.now;
        if let Route::Direct { pair, .. } = self.route {
            let path = self.paths.get(&pair);
            if path.is_none_or(|path| path.is_dead(now) && !self.is_carrying(path, now)) {
                self.leave(context, Why::Dead);
            } else if path.is_some_and(|path| path.proof_failed(context.own.lens())) {
                // What is too narrow may stand before all paths.
                let others = self.paths.values_mut().filter(|path| path.pair != pair);
                others.for_each(Path::unprove);
                self.leave(context, Why::DataLost);
            }
        }
        self.follow_packets(context);
        if self.settle_at.is_some_and(|at| at <= now) {
            self.settle_at = None;
            self.settle(context);
        }
        self.heartbeats(context);
        self.tell_suspicion(context);
        self.prove_frames(context);
        if self.introduce_at.is_some_and(|at| at <= now) {
            self.introduce(context);
        }
        if self.search.next_at.is_some_and(|at| at <= now) {
            self.search_round(context);
        }
        self.drain(context);
        while self.pings.front().is_some_and(|ping| now.since(ping.sent_at) >= PING_TIMEOUT) {
            self.pings.pop_front();
        }
        self.forget_paths(now);
    }

    /// When [`Self::tick`] has something to do next, and what.
    pub(crate) fn deadline(&self, context: &Context<'_>) -> Option<(Instant, Reason)> {
        let mut next: Option<(Instant, Reason)> = None;
        let mut at = |instant: Option<Instant>, reason| {
            let Some(instant) = instant else { return };
            next = Some(next.map_or((instant, reason), |soonest| soonest.min((instant, reason))));
        };
        at(self.settle_at, Reason::Settle);
        at(self.introduce_at, Reason::Introduce);
        at(self.search.next_at, Reason::Search);
        at(self.pings.front().map(|ping| ping.sent_at + PING_TIMEOUT), Reason::Expiry);
        if let Route::Direct { pair, .. } = self.route {
            at(self.paths.get(&pair).and_then(|path| self.death_at(path)), Reason::Death);
        }
        for (pair, interval) in self.watched(context) {
            let due = self.paths.get(&pair).and_then(|path| path.ping_due_at(interval));
            at(due, Reason::Heartbeat);
        }
        for path in self.paths.values() {
            at(path.proof_at(), Reason::FrameProof);
        }
        if !self.search.queue.is_empty() && !self.search.waits {
            at(Some(self.probes.ready_at()), Reason::Budget);
        }
        next
    }

    /// The tunnel's packets come this way although nobody answers our pings, nor pings us: the peer
    /// has no control process now, and no relay either. Or the relay said so.
    fn is_carrying(&self, path: &Path, now: Instant) -> bool {
        self.gone || self.carried_until(path).is_some_and(|until| now < until)
    }

    /// Until when the tunnel's packets say that the path lives, if they do.
    fn carried_until(&self, path: &Path) -> Option<Instant> {
        let (_, at) =
            self.tunnel.received_directly.filter(|(from, _)| *from == path.pair.remote)?;
        // What was on its way as the path or the process died says nothing.
        let suspect_at = path.suspect_at()?;
        let quiet = self.disco_at.is_none_or(|disco_at| disco_at < suspect_at);
        (quiet && at > suspect_at).then(|| at + DATA_SILENCE_MAX)
    }

    /// When the path in use is to be left.
    fn death_at(&self, path: &Path) -> Option<Instant> {
        let dead_at = path.dead_at().filter(|_| !self.gone)?;
        Some(self.carried_until(path).map_or(dead_at, |until| until.max(dead_at)))
    }

    /// Paths that are pinged as long as they work: the one in use, and with traffic the best others.
    fn watched(&self, context: &Context<'_>) -> Vec<(Pair, Duration)> {
        let active = self.is_active(context.now);
        let mut watched = Vec::with_capacity(1 + ALTERNATES_MAX);
        let Route::Direct { pair: used, .. } = self.route else { return watched };
        // Once nobody answers there, it is time to know whether others do.
        let suspected = self.paths.get(&used).and_then(Path::suspect_at);
        let suspected = suspected.is_some_and(|at| at <= context.now);
        let stand_by = if suspected { HEARTBEAT_INTERVAL } else { ALTERNATE_INTERVAL };
        let interval = match self.active_until {
            Some(until) if context.now + ACTIVE_TIME < until + PAUSE_TIME => HEARTBEAT_INTERVAL,
            _ if active => HEARTBEAT_INTERVAL_PAUSE,
            _ => KEEPALIVE_INTERVAL,
        };
        watched.push((used, interval));
        if active {
            let mut others = self.working(context);
            others.retain(|(pair, _)| *pair != used);
            others.sort_by_key(|(pair, quality)| (quality.cost(), *pair));
            let others = others.into_iter().take(ALTERNATES_MAX);
            watched.extend(others.map(|(pair, _)| (pair, stand_by)));
        }
        watched
    }

    /// Paths that may carry the tunnel now.
    fn working(&self, context: &Context<'_>) -> Vec<(Pair, Quality)> {
        let quality = |path: &Path| path.quality(context.now, context.own.lens());
        let with_quality = self.paths.values().map(|path| Some((path.pair, quality(path)?)));
        with_quality.flatten().collect()
    }

    /// The tunnel had packets within a session's life.
    fn may_have_session(&self, now: Instant) -> bool {
        self.active_until.is_some_and(|until| now < until + (SESSION_TIME - ACTIVE_TIME))
    }

    fn is_active(&self, now: Instant) -> bool {
        self.active_until.is_some_and(|until| now < until)
    }
}
