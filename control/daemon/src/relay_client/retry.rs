//! When to connect again: later and later, never all clients at once.

use std::time::Duration;

use millrace_path::Instant;
use rand::{Rng, RngCore};

use crate::limits;

/// Failures in a row of one relay.
#[derive(Clone, Debug, Default)]
pub struct Retry {
    failures: u32,
    /// The relay said that it restarts: no attempt before the first, soon ones until the second.
    restart: Option<(Instant, Instant)>,
}

impl Retry {
    /// The relay ends its connections and will be back.
    pub fn restarting(&mut self, now: Instant, reconnect_in: Duration, try_for: Duration) {
        let first = now + reconnect_in;
        self.restart = Some((first, first + try_for));
    }

    /// A connection lived for so long.
    pub fn worked(&mut self, lived: Duration) {
        if lived >= limits::RELAY_STABLE_TIME {
            self.forget();
        }
    }

    /// Nothing that was learnt holds any longer: the network is another.
    pub fn forget(&mut self) {
        *self = Self { restart: self.restart.take(), failures: 0 };
    }

    /// When to try again after a failure; a `lasting` one is of the kind that only an operator ends.
    pub fn next(&mut self, now: Instant, lasting: bool, random: &mut impl RngCore) -> Instant {
        let doubled = limits::RELAY_RETRY_MIN.saturating_mul(1 << self.failures.min(20));
        self.failures += 1;
        let mut longest =
            if lasting { limits::RELAY_RETRY_LASTING_MAX } else { limits::RELAY_RETRY_MAX };
        let mut first = now;
        match self.restart {
            Some((reconnect_at, until)) if now < until => {
                longest = limits::RELAY_RESTART_RETRY_MAX;
                first = now.max(reconnect_at);
            }
            _ => self.restart = None,
        }
        // Half of it is chance.
        let wait = doubled.min(longest);
        first + wait / 2 + (wait / 2).mul_f64(random.random())
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn attempts_come_later_and_later_up_to_a_limit() {
        let (start, mut random) = (Instant::default(), StdRng::seed_from_u64(1));
        for (lasting, limit) in
            [(false, limits::RELAY_RETRY_MAX), (true, limits::RELAY_RETRY_LASTING_MAX)]
        {
            let mut retry = Retry::default();
            let waits: Vec<Duration> =
                (0..40).map(|_| retry.next(start, lasting, &mut random).since(start)).collect();
            assert!(waits[0] <= limits::RELAY_RETRY_MIN);
            assert!(waits[39] <= limit && waits[39] >= limit / 2);
            retry.worked(limits::RELAY_STABLE_TIME);
            assert!(
                retry.next(start, lasting, &mut random).since(start) <= limits::RELAY_RETRY_MIN
            );
        }
    }

    #[test]
    fn a_relay_that_restarts_is_tried_soon_for_as_long_as_it_said() {
        let (start, mut random) = (Instant::default(), StdRng::seed_from_u64(1));
        let mut retry = Retry::default();
        retry.restarting(start, Duration::from_secs(2), Duration::from_secs(60));
        let mut now = start;
        for _ in 0..20 {
            let next = retry.next(now, false, &mut random);
            assert!(next >= start + Duration::from_secs(2));
            assert!(next.since(now) <= Duration::from_secs(3), "{:?}", next.since(now));
            now = next;
        }
        now = start + Duration::from_secs(62);
        assert!(retry.next(now, false, &mut random).since(now) > Duration::from_secs(4));
    }
}
