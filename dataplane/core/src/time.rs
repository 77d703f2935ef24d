//! Monotonic time as an argument.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A point in monotonic time: nanoseconds since a start that the caller chose. Never 0 for a real
/// moment, so that 0 can mean "never" in [`AtomicInstant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// `nanos` since the caller's start; 0 is moved to 1.
    pub fn from_nanos(nanos: u64) -> Self {
        Self(nanos.max(1))
    }

    pub fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long ago `earlier` was; zero if it is later than `self`.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self::from_nanos(self.0.saturating_sub(nanos))
    }
}

/// The time of one call: monotonic for everything, wall only for handshake timestamps and status.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    pub now: Instant,
    /// Since the Unix epoch.
    pub wall: Duration,
}

/// A moment that workers write and the slow thread reads. Relaxed: each is a fact on its own.
#[derive(Debug, Default)]
pub struct AtomicInstant(AtomicU64);

impl AtomicInstant {
    pub fn get(&self) -> Option<Instant> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Instant(nanos)),
        }
    }

    pub fn set(&self, now: Instant) {
        self.0.store(now.0, Ordering::Relaxed);
    }

    pub fn clear(&self) {
        // A load first: the line stays shared while there is nothing to clear.
        if self.0.load(Ordering::Relaxed) != 0 {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    /// Sets the moment only where none is set. True if this call set it.
    pub fn set_if_clear(&self, now: Instant) -> bool {
        self.0.load(Ordering::Relaxed) == 0
            && self.0.compare_exchange(0, now.0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}
