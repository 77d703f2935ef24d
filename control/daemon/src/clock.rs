//! The two clocks of the process.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_path::time::Instant;
use rustix::time::{ClockId, Timespec, clock_gettime};

/// CLOCK_MONOTONIC, as in the data plane's tables.
pub fn now() -> Instant {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Monotonic);
    Instant::from_nanos(tv_sec as u64 * 1_000_000_000 + tv_nsec as u64)
}

/// Time since 1970; zero where the clock stands before that.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// How long poll(2) may wait for a deadline.
pub fn until(deadline: Instant) -> Timespec {
    let left = deadline.since(now());
    Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
}
