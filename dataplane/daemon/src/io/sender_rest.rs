//! AF_XDP transmit on a device that stopped completing frames: it rests, and is tried again, after
//! each further stall later. Meanwhile packets go by socket.
//!
//! Trying again means binding the queues anew, which costs some drivers their carrier for a second;
//! so a device that always stalls is bothered once an hour.

use std::time::{Duration, Instant};

use super::xsk::STALL_TIMEOUT;

/// The rest after a first stall. Each one that follows is twice as long.
const FIRST_REST: Duration = Duration::from_secs(30);
/// A device that works for so long has made good its stalls.
const LONGEST_REST: Duration = Duration::from_secs(3600);

/// Whether AF_XDP transmit rests, and until when.
#[derive(Debug, Default)]
pub struct SenderRest {
    /// While it rests: why.
    reason: Option<String>,
    /// When the last rest ends or ended, and how long it is.
    last: Option<(Instant, Duration)>,
}

impl SenderRest {
    /// The device did not complete `outstanding` frames in time. Why, for `status`.
    pub fn begin(&mut self, outstanding: u32, now: Instant) -> &str {
        let rest = match self.last {
            Some((end, rest)) if now.saturating_duration_since(end) < LONGEST_REST => {
                (2 * rest).min(LONGEST_REST)
            }
            _ => FIRST_REST,
        };
        self.last = Some((now + rest, rest));
        self.reason.insert(format!(
            "the device did not complete {outstanding} frames within {} ms; sent by socket, and \
             by AF_XDP again after {} s or when the link was down",
            STALL_TIMEOUT.as_millis(),
            rest.as_secs()
        ))
    }

    /// Why it rests; none if it does not.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Ends the rest if it is time. True if it did.
    pub fn end_if_due(&mut self, now: Instant) -> bool {
        let is_due = self.reason.is_some() && self.last.is_some_and(|(end, _)| end <= now);
        if is_due {
            self.reason = None;
        }
        is_due
    }

    /// The link was down: nothing is held against the device any more.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stall_rests_longer_until_the_device_makes_good() {
        let mut rest = SenderRest::default();
        let mut now = Instant::now();
        for seconds in [30, 60, 120, 240, 480, 960, 1920, 3600, 3600] {
            assert_eq!(rest.reason(), None);
            let reason = rest.begin(7, now).to_owned();
            assert!(reason.contains("7 frames within 3000 ms"), "{reason}");
            assert!(reason.contains(&format!("after {seconds} s")), "{reason}");
            now += Duration::from_secs(seconds - 1);
            assert!(!rest.end_if_due(now));
            assert_eq!(rest.reason(), Some(reason.as_str()));
            now += Duration::from_secs(1);
            assert!(rest.end_if_due(now) && !rest.end_if_due(now), "once");
        }
        now += LONGEST_REST;
        assert!(rest.begin(1, now).contains("after 30 s"), "it has worked for an hour");
    }

    #[test]
    fn a_link_that_was_down_starts_anew() {
        let mut rest = SenderRest::default();
        let now = Instant::now();
        rest.begin(1, now);
        rest.begin(1, now);
        rest.forget();
        assert_eq!(rest.reason(), None);
        assert!(!rest.end_if_due(now + LONGEST_REST));
        assert!(rest.begin(1, now).contains("after 30 s"));
    }
}
