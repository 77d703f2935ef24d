//! The timestamp of a handshake initiation: TAI64N as 12 bytes, compared, never parsed for what it
//! says (WireGuard paper, section 5.1). It must only ever grow, also across restarts and when the
//! wall clock steps back, and must not run away when the wall clock jumps far ahead.

use std::fmt;
use std::time::Duration;

use crate::limits::{
    TIMESTAMP_JUMP_MAX, TIMESTAMP_LEASE, TIMESTAMP_STEP_NANOS, TIMESTAMP_WALL_MAX,
};
use crate::time::{Clock, Instant};

/// Seconds, then nanoseconds, both big-endian, so that byte order is time order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tai64n(pub [u8; Self::LEN]);

impl Tai64n {
    pub const LEN: usize = 12;
    /// 1970-01-01 in TAI64: 2^62 seconds, and the ten by which TAI was ahead then.
    const EPOCH: u64 = (1 << 62) + 10;

    /// `since_epoch` rounded down to 2^24 ns, so that the clock's fine state does not leak.
    pub fn from_unix(since_epoch: Duration) -> Self {
        let nanos = since_epoch.subsec_nanos() / TIMESTAMP_STEP_NANOS * TIMESTAMP_STEP_NANOS;
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&(Self::EPOCH + since_epoch.as_secs()).to_be_bytes());
        bytes[8..].copy_from_slice(&nanos.to_be_bytes());
        Self(bytes)
    }

    /// Only for timestamps that this device made.
    fn to_unix(self) -> Duration {
        let (seconds, nanos) = self.0.split_at(8);
        let seconds = seconds.iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
        let nanos = nanos.iter().fold(0, |n, &byte| n << 8 | u32::from(byte));
        Duration::new(seconds.saturating_sub(Self::EPOCH), nanos.min(999_999_999))
    }
}

impl fmt::Debug for Tai64n {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tai64n(")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// Makes the timestamps of our own initiations.
pub(crate) struct Timestamps {
    /// The newest that may have been sent, as time since the Unix epoch.
    newest: Option<Duration>,
    /// When `newest` was the time; none until the first initiation after a start.
    newest_at: Option<Instant>,
    /// What the disk knows: timestamps up to here need no new write.
    lease_end: Option<Duration>,
}

impl Timestamps {
    /// `mark`: what the previous run had persisted.
    pub(crate) fn new(mark: Option<Tai64n>) -> Self {
        let newest = mark.map(Tai64n::to_unix);
        Self { newest, newest_at: None, lease_end: newest }
    }

    /// The next timestamp, and the mark to persist before it is sent, if the old one is used up.
    pub(crate) fn next(&mut self, clock: Clock) -> (Tai64n, Option<Tai64n>) {
        let wall = clock.wall.min(TIMESTAMP_WALL_MAX);
        let next = match self.newest {
            None => wall,
            Some(newest) => {
                let elapsed = clock.now.since(self.newest_at.unwrap_or(clock.now));
                // A peer that has seen a far future would refuse everything until then: a jump
                // that big is not followed. Nothing is lost, timestamps need only grow.
                let absurd = wall > newest + elapsed + TIMESTAMP_JUMP_MAX;
                let wall = if absurd { newest + elapsed } else { wall };
                wall.max(newest + Duration::from_nanos(TIMESTAMP_STEP_NANOS.into()))
            }
        };
        let mut timestamp = Tai64n::from_unix(next);
        if self.newest.is_some_and(|newest| timestamp <= Tai64n::from_unix(newest)) {
            // Rounding stopped short of the newest one: go to the next full second.
            timestamp = Tai64n::from_unix(Duration::from_secs(next.as_secs() + 1));
        }
        self.newest = Some(timestamp.to_unix());
        self.newest_at = Some(clock.now);
        let lease_used = self.lease_end.is_none_or(|end| timestamp.to_unix() >= end);
        let lease = lease_used.then(|| timestamp.to_unix() + TIMESTAMP_LEASE);
        self.lease_end = lease.or(self.lease_end);
        (timestamp, lease.map(Tai64n::from_unix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(now_secs: u64, wall: Duration) -> Clock {
        Clock { now: Instant::from_nanos(now_secs * 1_000_000_000), wall }
    }

    const T: Duration = Duration::from_secs(1_700_000_000);

    #[test]
    fn rounding_hides_everything_below_2_to_the_24_nanoseconds() {
        let a = Tai64n::from_unix(T + Duration::from_nanos(1));
        let b = Tai64n::from_unix(T + Duration::from_nanos((1 << 24) - 1));
        assert_eq!(a, b);
        assert!(b < Tai64n::from_unix(T + Duration::from_nanos(1 << 24)));
        assert_eq!(a.0[..8], ((1u64 << 62) + 10 + 1_700_000_000).to_be_bytes());
    }

    #[test]
    fn timestamps_grow_whatever_the_wall_clock_does() {
        let mut timestamps = Timestamps::new(None);
        let mut last = None;
        let walls = [T, T, T - Duration::from_secs(1000), Duration::ZERO, T * 3, T, Duration::MAX];
        for (step, wall) in walls.iter().cycle().take(2000).enumerate() {
            let (next, _) = timestamps.next(clock(step as u64, *wall));
            assert!(Some(next) > last, "step {step}: {next:?} after {last:?}");
            last = Some(next);
        }
    }

    #[test]
    fn a_restart_begins_above_everything_that_was_sent() {
        let mut first = Timestamps::new(None);
        let mut mark = None;
        let mut last = None;
        for step in 0..500 {
            let (next, lease) = first.next(clock(step, T + Duration::from_secs(step)));
            mark = lease.or(mark);
            assert!(mark >= Some(next), "persisted before sent");
            last = Some(next);
        }
        let mut second = Timestamps::new(mark);
        let (next, lease) = second.next(clock(1, T - Duration::from_secs(86400)));
        assert!(Some(next) > last);
        assert!(Some(next) > mark && lease > mark);
    }

    #[test]
    fn an_absurd_jump_ahead_is_not_followed() {
        let mut timestamps = Timestamps::new(Some(Tai64n::from_unix(T)));
        let (next, _) = timestamps.next(clock(1, T + Duration::from_secs(40 * 365 * 86400)));
        assert!(next < Tai64n::from_unix(T + Duration::from_secs(1)), "{next:?}");
        let (next, _) = timestamps.next(clock(101, T + Duration::from_secs(40 * 365 * 86400)));
        assert!(next > Tai64n::from_unix(T + Duration::from_secs(99)));
        assert!(next < Tai64n::from_unix(T + Duration::from_secs(102)));
        let (back, _) = timestamps.next(clock(200, T + Duration::from_secs(86400)));
        assert_eq!(back, Tai64n::from_unix(T + Duration::from_secs(86400)));
    }
}
