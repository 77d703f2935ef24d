//! The search for paths: pings to every candidate, in rounds, on both sides at once, within budgets.

use std::collections::VecDeque;

use super::{Context, Peer};
use crate::disco::{self, Message};
use crate::introduce::{self, Introduction};
use crate::limits::{
    INTRODUCE_INTERVAL_MAX, PATHS_MAX, RTT_GOOD_ENOUGH, SEARCH_AGAIN, SEARCH_GAPS,
    SEARCH_INTERVAL_MIN, SEARCH_JITTER_PERCENT, UPGRADE_INTERVAL,
};
use crate::output::{Route, Transmit};
use crate::path::{Pair, Path};
use crate::time::Instant;

/// How far the search for paths is.
#[derive(Default)]
pub(super) struct Search {
    /// Rounds of pings that went out in this search.
    pub(super) rounds: usize,
    pub(super) next_at: Option<Instant>,
    pub(super) started_at: Option<Instant>,
    /// Searches in a row that found nothing.
    pub(super) fruitless: usize,
    /// Ask the peer to ping us as well: not where it just asked us.
    pub(super) announce: bool,
    /// Pings of this round that wait for their budget.
    pub(super) queue: VecDeque<Pair>,
    /// The peer has its place among those that wait for the budget of all.
    pub(super) waits: bool,
}

impl Peer {
    /// Pings every candidate soon, and again a few times. `announce`: the peer shall do the same;
    /// never in answer to its own announcement, or the two would not stop.
    pub(super) fn start_search(&mut self, now: Instant, announce: bool) {
        let search = &mut self.search;
        let allowed_at = search.started_at.map_or(now, |at| at + SEARCH_INTERVAL_MIN);
        if allowed_at > now && search.rounds > 0 {
            // What is new since then goes out soon; the rounds go on as they were.
            search.announce |= announce;
            search.next_at = search.next_at.map(|at| at.min(now + SEARCH_GAPS[0]));
            return;
        }
        search.announce = announce;
        search.rounds = 0;
        search.next_at = Some(allowed_at.max(now));
    }

    pub(super) fn search_round(&mut self, context: &mut Context<'_>) {
        let now = context.now;
        if self.disco.is_none() {
            self.search.next_at = None;
            return;
        }
        if self.search.rounds == 0 {
            self.search.started_at = Some(now);
        }
        let watched = self.watched(context);
        let pairs = self.pairs(context);
        // What the peer does not name any more need not be asked: a list that changes faster than
        // the budget bears must not grow the queue.
        self.search.queue.retain(|pair| pairs.contains(pair));
        for pair in pairs {
            let known = watched.iter().any(|(watched, _)| *watched == pair);
            if !known && !self.search.queue.contains(&pair) {
                self.search.queue.push_back(pair);
            }
        }
        // Again later in the search: the relay may lose a message, too.
        if self.search.announce && matches!(self.search.rounds, 0 | 3) {
            self.call(context);
        }
        self.search.rounds += 1;
        let found = matches!(self.route, Route::Direct { .. }) && self.settle_at.is_none();
        self.search.next_at = match SEARCH_GAPS.get(self.search.rounds - 1) {
            Some(gap) if !found => Some(now + *gap),
            _ => self.next_search(context),
        };
    }

    /// The search is over: when is the next one?
    pub(super) fn next_search(&mut self, context: &mut Context<'_>) -> Option<Instant> {
        let now = context.now;
        self.search.rounds = 0;
        self.search.announce = true;
        if !self.is_active(now) {
            return None;
        }
        let Route::Direct { pair, .. } = self.route else {
            let at = self.search.fruitless.min(SEARCH_AGAIN.len() - 1);
            self.search.fruitless += 1;
            let [chance] = context.random();
            let jitter = SEARCH_AGAIN[at] * SEARCH_JITTER_PERCENT / 100 * u32::from(chance) / 255;
            return Some(now + SEARCH_AGAIN[at] + jitter);
        };
        self.search.fruitless = 0;
        let rtt = self.paths.get(&pair).and_then(Path::rtt);
        Some(now + UPGRADE_INTERVAL).filter(|_| rtt.is_none_or(|rtt| rtt > RTT_GOOD_ENOUGH))
    }

    /// Every pair that may be probed, the most promising candidates first.
    pub(super) fn pairs(&self, context: &Context<'_>) -> Vec<Pair> {
        let own = context.own;
        let allowed = self.candidates.iter().map(|candidate| candidate.address);
        let allowed = allowed.filter(|address| own.addresses.check(*address).is_ok());
        let with_uplinks = allowed.flat_map(|remote| {
            let uplinks = own.uplinks.iter().filter(move |uplink| uplink.ipv6 == remote.is_ipv6());
            uplinks.map(move |uplink| Pair { uplink: uplink.id, remote })
        });
        with_uplinks.take(PATHS_MAX).collect()
    }

    /// Sends queued probes as far as the budgets allow.
    pub(super) fn drain(&mut self, context: &mut Context<'_>) {
        while !self.search.queue.is_empty() && !self.search.waits {
            if !self.probes.is_ready(context.now) {
                return;
            }
            if context.waiting.is_empty() && context.probes.is_ready(context.now) {
                self.probe(context);
            } else {
                self.search.waits = true;
                context.waiting.push_back(self.key);
            }
        }
    }

    /// The budget of all has something for this peer now.
    pub(crate) fn turn(&mut self, context: &mut Context<'_>) {
        self.search.waits = false;
        if self.probes.is_ready(context.now) && context.probes.is_ready(context.now) {
            self.probe(context);
        }
    }

    fn probe(&mut self, context: &mut Context<'_>) {
        let Some(pair) = self.search.queue.pop_front() else { return };
        self.probes.take(context.now);
        context.probes.take(context.now);
        self.send_ping(context, pair, disco::PING_LEN);
    }

    /// Asks the peer, through the relay, to ping us everywhere now.
    pub(super) fn call(&mut self, context: &mut Context<'_>) {
        if !self.signals.take(context.now) {
            return;
        }
        let addresses = context.own.candidates.iter().map(|candidate| candidate.address);
        let message = Message::CallMeMaybe { addresses: addresses.collect() };
        if let Some(packet) = self.sealed(context, &message) {
            context.transmit(Transmit::Relay { peer: self.key, packet });
        }
    }

    /// Introduces us soon, but not too often.
    pub(super) fn answer_introduction(&mut self, now: Instant) {
        let ready = self.signals.is_ready(now);
        let at = if ready { now } else { self.signals.ready_at() };
        self.introduce_at = Some(self.introduce_at.map_or(at, |planned| planned.min(at)));
    }

    pub(super) fn introduce(&mut self, context: &mut Context<'_>) {
        let now = context.now;
        if !self.signals.take(now) {
            self.introduce_at = Some(self.signals.ready_at());
            return;
        }
        let wall = context.own.wall_at_zero.saturating_add(now.as_nanos());
        // Who has something new to say wants an answer, and gets one to an introduction without.
        let is_question = self.changed && !std::mem::take(&mut self.owes_answer);
        let answers = if is_question { 0 } else { self.freshness.answers() };
        let introduction = Introduction {
            sender: context.own.node_key,
            number: self.freshness.next_number(wall),
            answers,
            disco_key: context.own.disco_key,
            has_session: self.may_have_session(now),
            home: context.own.home.clone(),
            candidates: context.own.candidates.clone(),
            nat: Some(context.own.nat),
        };
        let packet = introduce::seal(&introduction, context.random(), &self.box_key);
        context.transmit(Transmit::Relay { peer: self.key, packet });
        // Disco from the peer says that it has our key; until then it may have nothing.
        let again = (!self.heard || self.changed) && self.is_active(now);
        self.introduce_at = again.then(|| now + self.introduce_gap);
        self.introduce_gap = (2 * self.introduce_gap).min(INTRODUCE_INTERVAL_MAX);
    }
}
