//! At which relay peers find us: the nearest, but not another one each time two are about equal.
//!
//! Every change costs each peer an introduction. So the home changes only if it is gone, or if
//! another one is nearer by 10 ms *and* takes no more than two thirds of the time, by the best
//! round trip of the last five minutes (Tailscale's rule, net/netcheck).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::limits::{
    HOME_AWAY, HOME_FRAME_FRESH, HOME_GAIN_MAX_PERCENT, HOME_GAIN_MIN, HOME_WINDOW,
};
use crate::time::Instant;

/// What happened.
#[derive(Clone, Debug)]
pub enum Input<'i> {
    /// Round trips of one netcheck, of those relays that answered.
    Latencies(BTreeMap<String, Duration>),
    /// The relays that may be chosen, in the order of the configuration; before this none is.
    Configured(Vec<String>),
    /// The home relay sent a frame.
    Heard { relay: &'i str },
    /// The connection to it failed, or it turned out deaf.
    Down { relay: &'i str },
    /// The connection to it stands.
    Up { relay: &'i str },
}

/// The home is another one now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    pub from: Option<String>,
    /// None: no relay is configured any more.
    pub to: Option<String>,
    pub why: Why,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There was none.
    First,
    /// It is clearly nearer.
    Nearer,
    /// The one before does not answer, or its connection failed.
    Gone,
    /// The one before is not configured any more.
    Removed,
}

/// Sans-IO: [`Self::handle`] what happened, and take the change if there is one. It has no
/// deadlines: nothing changes while nothing happens.
#[derive(Clone, Debug, Default)]
pub struct HomeRelay {
    configured: Vec<String>,
    home: Option<String>,
    heard_at: Option<Instant>,
    /// The newest last.
    reports: VecDeque<(Instant, BTreeMap<String, Duration>)>,
    down_since: BTreeMap<String, Instant>,
}

impl HomeRelay {
    pub fn home(&self) -> Option<&str> {
        self.home.as_deref()
    }

    /// The best round trip of the last five minutes.
    pub fn latency(&self, relay: &str) -> Option<Duration> {
        self.reports.iter().filter_map(|(_, report)| report.get(relay)).min().copied()
    }

    pub fn handle(&mut self, now: Instant, input: Input<'_>) -> Option<Moved> {
        self.down_since.retain(|_, since| now.since(*since) < HOME_AWAY);
        match input {
            Input::Latencies(mut report) => {
                report.retain(|relay, _| self.configured.contains(relay));
                self.reports.retain(|(at, _)| now.since(*at) < HOME_WINDOW);
                self.reports.push_back((now, report));
                self.after_report(now)
            }
            Input::Configured(relays) => {
                for (_, report) in &mut self.reports {
                    report.retain(|relay, _| relays.contains(relay));
                }
                self.configured = relays;
                match &self.home {
                    Some(home) if !self.configured.contains(home) => self.leave(Why::Removed),
                    Some(_) => None,
                    None => self.leave(Why::First),
                }
            }
            Input::Heard { relay } => {
                if self.home.as_deref() == Some(relay) {
                    self.heard_at = Some(now);
                }
                None
            }
            Input::Down { relay } => {
                self.down_since.insert(relay.to_owned(), now);
                if self.home.as_deref() == Some(relay) { self.leave(Why::Gone) } else { None }
            }
            Input::Up { relay } => {
                self.down_since.remove(relay);
                None
            }
        }
    }

    fn after_report(&mut self, now: Instant) -> Option<Moved> {
        let (_, newest) = self.reports.back()?;
        if newest.is_empty() {
            // Nothing was measured: a network that is down says nothing about one relay.
            return None;
        }
        let Some(home) = self.home.clone() else { return self.leave(Why::First) };
        let (best, best_latency) = self.best()?;
        if best == home {
            return None;
        }
        let current = newest.get(&home).copied();
        let heard = self.heard_at.is_some_and(|at| now.since(at) < HOME_FRAME_FRESH);
        let why = match current {
            Some(current) => {
                let limit = current * HOME_GAIN_MAX_PERCENT / 100;
                let small = current.saturating_sub(best_latency) < HOME_GAIN_MIN;
                if small || best_latency > limit {
                    return None;
                }
                Why::Nearer
            }
            // It lives, whatever STUN says.
            None if heard => return None,
            None => Why::Gone,
        };
        self.move_to(Some(best), why)
    }

    /// To the best that is left; without figures to the first that is not down.
    fn leave(&mut self, why: Why) -> Option<Moved> {
        let is_down = |relay: &&String| self.down_since.contains_key(*relay);
        let left = || self.configured.iter().filter(|relay| !is_down(relay));
        let best = self.best().map(|(relay, _)| relay).or_else(|| left().next().cloned());
        match best {
            // All are down: to stay is as good as anything.
            None if why == Why::Gone => None,
            best => self.move_to(best, why),
        }
    }

    fn move_to(&mut self, to: Option<String>, why: Why) -> Option<Moved> {
        if to == self.home {
            return None;
        }
        let from = std::mem::replace(&mut self.home, to.clone());
        self.heard_at = None;
        Some(Moved { from, to, why })
    }

    /// The nearest of those that are not down; among equals the first by name.
    fn best(&self) -> Option<(String, Duration)> {
        let up = self.configured.iter().filter(|relay| !self.down_since.contains_key(*relay));
        let known = up.filter_map(|relay| Some((relay, self.latency(relay)?)));
        known.min_by_key(|(_, latency)| *latency).map(|(relay, latency)| (relay.clone(), latency))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Instant = Instant::ZERO;

    fn at(seconds: u64) -> Instant {
        START + Duration::from_secs(seconds)
    }

    fn latencies(relays: &[(&str, u64)]) -> Input<'static> {
        let entry = |(relay, ms): &(&str, u64)| ((*relay).to_owned(), Duration::from_millis(*ms));
        Input::Latencies(relays.iter().map(entry).collect())
    }

    fn homed(relays: &[(&str, u64)]) -> HomeRelay {
        let mut home = HomeRelay::default();
        let configured = ["a", "b", "c"].map(str::to_owned).to_vec();
        home.handle(at(0), Input::Configured(configured));
        home.handle(at(0), latencies(relays));
        home
    }

    fn to(moved: Option<Moved>) -> Option<(String, Why)> {
        moved.map(|moved| (moved.to.unwrap(), moved.why))
    }

    #[test]
    fn there_is_a_home_before_anything_is_measured() {
        let mut home = HomeRelay::default();
        assert_eq!(home.handle(at(0), latencies(&[("a", 1)])), None);
        let moved = home.handle(at(0), Input::Configured(vec!["a".into(), "b".into()]));
        assert_eq!(to(moved), Some(("a".into(), Why::First)));
        assert_eq!(to(home.handle(at(1), latencies(&[("b", 5)]))), Some(("b".into(), Why::Gone)));
    }

    #[test]
    fn it_moves_only_for_ten_milliseconds_and_a_third() {
        for (current, other, moves) in [
            (100, 60, true),
            (100, 66, true),
            (100, 68, false),
            (14, 5, false),
            (15, 5, true),
            (1000, 700, false),
        ] {
            let mut home = homed(&[("a", current)]);
            let moved = home.handle(at(400), latencies(&[("a", current), ("b", other)]));
            assert_eq!(moved.is_some(), moves, "{current} ms against {other} ms");
            if let Some(moved) = moved {
                assert_eq!(moved.why, Why::Nearer);
            }
        }
    }

    #[test]
    fn a_worse_minute_of_the_home_is_no_reason_while_its_best_counts() {
        let mut home = homed(&[("a", 20), ("b", 30)]);
        assert_eq!(home.handle(at(30), latencies(&[("a", 200), ("b", 30)])), None);
        // Five minutes later the good figure is gone.
        let moved = home.handle(at(301), latencies(&[("a", 200), ("b", 30)]));
        assert_eq!(to(moved), Some(("b".into(), Why::Nearer)));
    }

    #[test]
    fn missing_figures_move_nobody_while_frames_come() {
        let mut home = homed(&[("a", 20), ("b", 30)]);
        home.handle(at(299), Input::Heard { relay: "a" });
        home.handle(at(299), Input::Heard { relay: "b" });
        assert_eq!(home.handle(at(301), latencies(&[("b", 1)])), None);
        assert_eq!(home.handle(at(306), latencies(&[])), None);
        assert_eq!(to(home.handle(at(308), latencies(&[("b", 1)]))), Some(("b".into(), Why::Gone)));
    }

    #[test]
    fn a_relay_that_is_down_is_left_at_once_and_not_taken_again_soon() {
        let mut home = homed(&[("a", 10), ("b", 50), ("c", 90)]);
        let moved = home.handle(at(1), Input::Down { relay: "a" });
        assert_eq!(to(moved), Some(("b".into(), Why::Gone)));
        // STUN still answers there.
        assert_eq!(home.handle(at(30), latencies(&[("a", 10), ("b", 50), ("c", 90)])), None);
        let moved = home.handle(at(40), Input::Down { relay: "b" });
        assert_eq!(to(moved), Some(("c".into(), Why::Gone)));
        assert_eq!(home.handle(at(41), Input::Down { relay: "c" }), None, "all are down");
        assert_eq!(home.home(), Some("c"));
        let moved = home.handle(at(62), latencies(&[("a", 10), ("c", 90)]));
        assert_eq!(to(moved), Some(("a".into(), Why::Nearer)));
    }

    #[test]
    fn a_relay_that_is_up_again_may_be_chosen_again() {
        let mut home = homed(&[("a", 10), ("b", 50)]);
        home.handle(at(1), Input::Down { relay: "a" });
        home.handle(at(5), Input::Up { relay: "a" });
        let moved = home.handle(at(6), latencies(&[("a", 10), ("b", 50)]));
        assert_eq!(to(moved), Some(("a".into(), Why::Nearer)));
    }

    #[test]
    fn a_relay_that_is_not_configured_is_no_home() {
        let mut home = homed(&[("a", 10), ("b", 50)]);
        let moved = home.handle(at(1), Input::Configured(vec!["b".into(), "c".into()]));
        assert_eq!(to(moved), Some(("b".into(), Why::Removed)));
        assert_eq!(home.handle(at(2), latencies(&[("a", 1), ("b", 50)])), None);
        let moved = home.handle(at(3), Input::Configured(Vec::new())).unwrap();
        assert_eq!((moved.to, moved.why), (None, Why::Removed));
    }

    proptest! {
        /// Two relays whose round trips vary by less than a third.
        #[test]
        fn noise_moves_nobody(noise in prop::collection::vec((60_u64..80, 60_u64..80), 1..100)) {
            let mut home = homed(&[("a", 70), ("b", 70)]);
            for (step, (a, b)) in noise.into_iter().enumerate() {
                let now = at(20 * (step as u64 + 1));
                prop_assert_eq!(home.handle(now, latencies(&[("a", a), ("b", b)])), None);
            }
        }
    }
}
