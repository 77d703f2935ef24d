//! Which of two working paths is better: by measured round trip, with a small gift for IPv6 and for
//! private networks, and with hysteresis so that equals do not take turns.

use std::net::IpAddr;
use std::time::Duration;

use crate::limits::{
    BONUS_IPV6_PERCENT, BONUS_PRIVATE_PERCENT, HYSTERESIS_MIN, HYSTERESIS_PERCENT,
};

/// What is known of a path that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quality {
    /// The best of the last round trips: queues come and go, distance stays.
    pub rtt: Duration,
    /// Between the best and the worst of them.
    pub spread: Duration,
    pub remote: IpAddr,
    /// Whether it carries full frames.
    pub full_frames: bool,
}

impl Quality {
    /// Lower is better. Smaller frames cost as much again: each full packet becomes two.
    pub fn cost(&self) -> Duration {
        let mut bonus = 0;
        match self.remote {
            IpAddr::V4(ip) if ip.is_private() || ip.is_link_local() => {
                bonus += BONUS_PRIVATE_PERCENT;
            }
            IpAddr::V4(_) => {}
            IpAddr::V6(ip) => {
                bonus += BONUS_IPV6_PERCENT;
                if ip.is_unique_local() {
                    bonus += BONUS_PRIVATE_PERCENT;
                }
            }
        }
        let cost = self.rtt * (100 - bonus) / 100;
        if self.full_frames { cost } else { 2 * cost }
    }

    /// Whether to leave `current`, which works, for this path. What is gained must be more than what
    /// chance does to either: where round trips vary, equals would take turns.
    pub fn is_clearly_better_than(&self, current: &Self) -> bool {
        let (ours, theirs) = (self.cost(), current.cost());
        let least_gain = HYSTERESIS_MIN.max(self.spread + current.spread);
        ours + least_gain < theirs && ours < theirs * (100 - HYSTERESIS_PERCENT) / 100
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quality(rtt_micros: u64, remote: &str) -> Quality {
        Quality {
            rtt: Duration::from_micros(rtt_micros),
            spread: Duration::ZERO,
            remote: remote.parse().unwrap(),
            full_frames: true,
        }
    }

    #[test]
    fn equal_paths_stay_and_faster_ones_win() {
        let slow = quality(20_000, "192.0.2.1");
        assert!(!quality(19_900, "192.0.2.2").is_clearly_better_than(&slow));
        assert!(quality(15_000, "192.0.2.2").is_clearly_better_than(&slow));
        // Half of next to nothing is nothing.
        let near = quality(300, "192.0.2.1");
        assert!(!quality(100, "192.0.2.2").is_clearly_better_than(&near));
    }

    #[test]
    fn ipv6_wins_between_equals_and_loses_where_it_is_clearly_slower() {
        let v4 = quality(20_000, "192.0.2.1");
        let v6 = quality(20_000, "2001:db8::1");
        assert!(v6.is_clearly_better_than(&v4));
        assert!(!v4.is_clearly_better_than(&v6));
        assert!(v4.is_clearly_better_than(&quality(24_000, "2001:db8::1")));
    }

    #[test]
    fn a_detour_is_not_worth_a_private_address_but_a_tie_is() {
        let public = quality(20_000, "192.0.2.1");
        assert!(quality(20_000, "10.0.0.1").is_clearly_better_than(&public));
        assert!(!quality(26_000, "10.0.0.1").is_clearly_better_than(&public));
        assert!(quality(20_000, "fd00::1").is_clearly_better_than(&quality(20_000, "10.0.0.1")));
    }

    #[test]
    fn a_path_without_full_frames_must_be_twice_as_fast() {
        let full = quality(20_000, "192.0.2.1");
        let small = Quality { full_frames: false, ..quality(12_000, "192.0.2.2") };
        assert!(!small.is_clearly_better_than(&full));
        let small = Quality { full_frames: false, ..quality(8_000, "192.0.2.2") };
        assert!(small.is_clearly_better_than(&full));
    }

    #[test]
    fn what_chance_may_take_back_is_no_gain() {
        let current = quality(30_000, "192.0.2.1");
        let varies = |spread_ms| Quality {
            spread: Duration::from_millis(spread_ms),
            ..quality(20_000, "192.0.2.2")
        };
        assert!(varies(9).is_clearly_better_than(&current));
        assert!(!varies(11).is_clearly_better_than(&current));
        let current = Quality { spread: Duration::from_millis(5), ..current };
        assert!(varies(4).is_clearly_better_than(&current));
        assert!(!varies(6).is_clearly_better_than(&current));
    }

    proptest! {
        #[test]
        fn no_two_paths_are_better_than_each_other(
            rtts: [u32; 2], spreads: [u32; 2], ips: [IpAddr; 2], full: [bool; 2]
        ) {
            let [one, other] = [0, 1].map(|at| Quality {
                rtt: Duration::from_micros(rtts[at].into()),
                spread: Duration::from_micros(spreads[at].into()),
                remote: ips[at],
                full_frames: full[at],
            });
            prop_assert!(!(one.is_clearly_better_than(&other) && other.is_clearly_better_than(&one)));
        }
    }
}
