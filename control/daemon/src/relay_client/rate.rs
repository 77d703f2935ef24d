//! The rate that a relay announces, as a bucket of bytes.

use std::time::Duration;

use millrace_path::Instant;

use crate::limits;

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Full at first. May go into debt by one frame: what is urgent does not wait.
#[derive(Clone, Debug)]
pub struct Rate {
    bytes_per_second: u64,
    burst_bytes: u64,
    level: i64,
    filled_at: Instant,
}

impl Rate {
    /// None without a limit.
    pub fn new(bytes_per_second: u64, burst_bytes: u64, now: Instant) -> Option<Self> {
        let burst_bytes = burst_bytes.clamp(limits::RELAY_BURST_MIN, u64::MAX / 4);
        let level = i64::try_from(burst_bytes).unwrap_or(i64::MAX);
        (bytes_per_second > 0).then_some(Self {
            bytes_per_second,
            burst_bytes,
            level,
            filled_at: now,
        })
    }

    /// Bytes that may be sent now.
    pub fn available(&mut self, now: Instant) -> usize {
        let passed = now.since(self.filled_at).as_nanos();
        let gained = passed * u128::from(self.bytes_per_second) / NANOS_PER_SECOND;
        if gained > 0 {
            let full = i64::try_from(self.burst_bytes).unwrap_or(i64::MAX);
            let gained = i64::try_from(gained).unwrap_or(i64::MAX);
            self.level = self.level.saturating_add(gained).min(full);
            self.filled_at = self.filled_at.max(now);
        }
        usize::try_from(self.level).unwrap_or(0)
    }

    pub fn take(&mut self, bytes: usize) {
        self.level = self.level.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// When there is at least one byte again.
    pub fn ready_at(&self) -> Instant {
        let missing = u128::from(1_i64.saturating_sub(self.level).max(0).unsigned_abs());
        let nanos = (missing * NANOS_PER_SECOND).div_ceil(u128::from(self.bytes_per_second));
        self.filled_at + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_brings_the_rate_and_a_debt_is_waited_for() {
        let at = |ms: u64| Instant::from_nanos(ms * 1_000_000);
        assert!(Rate::new(0, 100, at(0)).is_none());
        let mut rate = Rate::new(1_000_000, 0, at(0)).unwrap();
        let burst = limits::RELAY_BURST_MIN as usize;
        assert_eq!(rate.available(at(0)), burst);
        rate.take(burst + 10_000);
        assert_eq!(rate.available(at(5)), 0);
        let ready = rate.ready_at();
        assert!(ready > at(10) && ready < at(11), "{ready:?}");
        assert!(rate.available(ready) >= 1);
        assert_eq!(rate.available(at(1_000_000)), burst);
    }

    #[test]
    fn no_number_overflows() {
        let mut rate = Rate::new(u64::MAX, u64::MAX, Instant::from_nanos(0)).unwrap();
        rate.take(usize::MAX);
        rate.available(Instant::from_nanos(u64::MAX));
        rate.take(usize::MAX);
        rate.take(usize::MAX);
        rate.ready_at();
    }
}
