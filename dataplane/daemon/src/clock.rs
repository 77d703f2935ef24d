//! The only place that reads a clock.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use millrace_wg::Instant;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// Monotonic time that also counts while the machine sleeps: keys age then, too.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    Instant::from_nanos(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// How much [`now`] is ahead of CLOCK_MONOTONIC, which stands still while the machine sleeps.
pub fn ahead_of_monotonic() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    let awake = Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec as u32);
    Duration::from_nanos(now().as_nanos()).saturating_sub(awake)
}

/// Time since the Unix epoch, for handshake timestamps and for people.
pub fn wall() -> Duration {
    let time = clock_gettime(ClockId::Realtime);
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec as u32)
}

/// Less is no suspend: two readings of two clocks are never of the same moment.
const SLEEP_MIN: Duration = Duration::from_millis(500);
/// 2106, for a timer that is not to fire.
const FAR: Timespec = Timespec { tv_sec: u32::MAX as i64, tv_nsec: 0 };

/// Tells when the machine was suspended, without a tick: the descriptor becomes readable when the
/// wall clock jumps, and a suspend is such a jump.
#[derive(Debug)]
pub struct SuspendWatch {
    timer: OwnedFd,
    /// How much longer the machine has been on than awake, at most.
    asleep: Duration,
}

impl SuspendWatch {
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        arm(&timer)?;
        Ok(Self { timer, asleep: asleep().1 })
    }

    /// Whether the machine slept since the last call. Makes the descriptor wait for the next jump.
    pub fn take(&mut self) -> bool {
        // Fails with ECANCELED after a jump; that it was read is what counts.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        // As it was armed before, with the same arguments.
        let _ = arm(&self.timer);
        self.note(asleep())
    }

    /// `least` and `most`: between what bounds the sleep of all time lies now.
    fn note(&mut self, (least, most): (Duration, Duration)) -> bool {
        let slept = least > self.asleep + SLEEP_MIN;
        self.asleep = most;
        slept
    }
}

impl AsFd for SuspendWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

fn arm(timer: &OwnedFd) -> io::Result<()> {
    let never = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: FAR };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    timerfd_settime(timer, flags, &never)?;
    Ok(())
}

/// Bounds of the time that the machine was suspended since it started. This thread may be stopped
/// between two readings for any time, so one clock is read on both sides of the other.
fn asleep() -> (Duration, Duration) {
    let read = |clock| {
        let time = clock_gettime(clock);
        Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec as u32)
    };
    let before = read(ClockId::Monotonic);
    let on = read(ClockId::Boottime);
    let after = read(ClockId::Monotonic);
    (on.saturating_sub(after), on.saturating_sub(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sleep_is_a_sleep() {
        let mut watch = SuspendWatch::new().unwrap();
        for _ in 0..1000 {
            assert!(!watch.take(), "this machine is awake");
        }
        let now = watch.asleep;
        let ms = Duration::from_millis;
        // Stopped for three seconds between the readings: the bounds are wide, nothing is proven.
        assert!(!watch.note((now.saturating_sub(ms(3000)), now)));
        assert!(!watch.note((now, now + ms(3000))));
        watch.asleep = now;
        assert!(watch.note((now + ms(2000), now + ms(2001))));
        assert!(!watch.note((now + ms(2000), now + ms(2001))), "said once");
    }
}
