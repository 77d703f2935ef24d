//! A token bucket: so many at once, so many per second.

use std::time::Duration;

use crate::time::Instant;

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// What a [`Budget`] allows.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    pub burst: u32,
    pub per_second: u32,
}

/// Full at first.
#[derive(Clone, Debug)]
pub struct Budget {
    rate: Rate,
    /// Nanoseconds' worth of refill; one token is `cost` of it.
    level: u64,
    filled_at: Instant,
}

impl Budget {
    pub fn new(rate: Rate, now: Instant) -> Self {
        let mut budget = Self { rate, level: 0, filled_at: now };
        budget.level = budget.capacity();
        budget
    }

    /// Whether there is a token.
    pub fn is_ready(&mut self, now: Instant) -> bool {
        let passed = u64::try_from(now.since(self.filled_at).as_nanos()).unwrap_or(u64::MAX);
        self.level = self.level.saturating_add(passed).min(self.capacity());
        self.filled_at = self.filled_at.max(now);
        self.level >= self.cost()
    }

    /// Takes one token if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let ready = self.is_ready(now);
        if ready {
            self.level -= self.cost();
        }
        ready
    }

    /// When there is a token, as far as the last question knows.
    pub fn ready_at(&self) -> Instant {
        self.filled_at + Duration::from_nanos(self.cost().saturating_sub(self.level))
    }

    fn cost(&self) -> u64 {
        NANOS_PER_SECOND / u64::from(self.rate.per_second.max(1))
    }

    fn capacity(&self) -> u64 {
        self.cost() * u64::from(self.rate.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let start = Instant::from_nanos(5);
        let mut budget = Budget::new(Rate { burst: 3, per_second: 10 }, start);
        let taken = |budget: &mut Budget, now| (0..100).filter(|_| budget.take(now)).count();
        assert_eq!(taken(&mut budget, start), 3);
        assert_eq!(budget.ready_at(), start + Duration::from_millis(100));
        assert_eq!(taken(&mut budget, start + Duration::from_millis(99)), 0);
        assert_eq!(taken(&mut budget, start + Duration::from_millis(200)), 2);
        assert_eq!(taken(&mut budget, start + Duration::from_secs(3600)), 3);
        // A clock that goes back gives nothing away.
        assert_eq!(taken(&mut budget, start), 0);
    }
}
