//! Which path the tunnel takes: the first that works, a clearly better one, another when it dies.

use super::{Context, Peer};
use crate::limits::{SETTLE_TIME, SWITCH_INTERVAL_MIN};
use crate::output::{Event, Route, Why};
use crate::path::{Pair, Path};

impl Peer {
    /// After an answer: begin with the first path that works, change to a clearly better one.
    pub(super) fn choose(&mut self, context: &mut Context<'_>) {
        let working = self.working(context);
        let Some(best) = working.iter().min_by_key(|(pair, quality)| (quality.cost(), *pair))
        else {
            return;
        };
        let Route::Direct { pair: used, frame_len } = self.route else {
            self.settle_at = Some(context.now + SETTLE_TIME);
            self.use_path(context, best.0, Why::Proven);
            return;
        };
        let proven =
            self.paths.get(&used).and_then(Path::proven_len).filter(|len| *len != frame_len);
        if proven.is_some() {
            self.use_path(context, used, Why::FrameLen);
        }
        let current = working.iter().find(|(pair, _)| *pair == used);
        let settled =
            self.settle_at.is_none() && context.now.since(self.switched_at) >= SWITCH_INTERVAL_MIN;
        if settled && current.is_some_and(|current| best.1.is_clearly_better_than(&current.1)) {
            self.use_path(context, best.0, Why::Better);
        }
    }

    /// Once, soon after the first path worked: the best of those that answered, by however little.
    pub(super) fn settle(&mut self, context: &mut Context<'_>) {
        let Route::Direct { pair: used, .. } = self.route else { return };
        let working = self.working(context);
        // The one in use wins a tie.
        let best = working.iter().min_by_key(|(pair, quality)| (quality.cost(), *pair != used));
        if let Some((pair, _)) = best
            && *pair != used
        {
            self.use_path(context, *pair, Why::Better);
        }
    }

    /// The path in use is none any more: the best other one that answered since, else the relay; and
    /// search.
    pub(super) fn leave(&mut self, context: &mut Context<'_>, why: Why) {
        let mut silent_since = None;
        if let Route::Direct { pair, .. } = self.route
            && let Some(path) = self.paths.get_mut(&pair)
        {
            silent_since = path.unanswered_since().filter(|_| why == Why::Dead);
            path.died(context.now);
            self.fallen_from = Some(pair).filter(|_| why == Why::Dead);
        }
        self.settle_at = None;
        let mut working = self.working(context);
        working.retain(|(pair, _)| self.paths[pair].pong_at > silent_since);
        match working.iter().min_by_key(|(pair, quality)| (quality.cost(), *pair)) {
            Some((pair, _)) => self.use_path(context, *pair, why),
            None => self.set_route(context, Route::Relay, why),
        }
        self.search.fruitless = 0;
        self.start_search(context.now, true);
    }

    pub(super) fn use_path(&mut self, context: &mut Context<'_>, pair: Pair, why: Why) {
        let Some(frame_len) = self.paths.get(&pair).and_then(Path::proven_len) else { return };
        self.set_route(context, Route::Direct { pair, frame_len }, why);
    }

    pub(super) fn set_route(&mut self, context: &mut Context<'_>, route: Route, why: Why) {
        if self.route != route {
            self.route = route;
            self.switched_at = context.now;
            context.event(Event::Route { peer: self.key, route, why });
        }
    }
}
