//! The only place that reads a clock.

use std::time::Duration;

use millrace_wg::Instant;
use rustix::time::{ClockId, clock_gettime};

/// Monotonic time that also counts while the machine sleeps: keys age then, too.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    Instant::from_nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Time since the Unix epoch, for handshake timestamps and for people.
pub fn wall() -> Duration {
    let time = clock_gettime(ClockId::Realtime);
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec as u32)
}
