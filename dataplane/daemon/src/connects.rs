//! Handshakes that control asks for after the data plane was started anew. Control is not trusted
//! with our processor: a rate bounds what it can make us do, and what it asked is counted.

use std::fmt;
use std::time::Duration;

use millrace_wg::Instant;

/// Handshakes of one second: some 200 µs of processor each, so 4 % of a core. An honest control asks
/// for half of it.
const CONNECTS_PER_SECOND: u32 = 200;
const SECOND: Duration = Duration::from_secs(1);

/// How often control asked, and what is left of this second's handshakes.
#[derive(Debug, Default)]
pub struct Connects {
    second_from: Option<Instant>,
    in_second: u32,
    started: u64,
    /// There was a session, or a handshake under way.
    needless: u64,
    /// Over the rate.
    refused: u64,
}

impl Connects {
    /// Runs `connect`, which says whether it started a handshake, if the rate allows.
    pub fn ask(&mut self, now: Instant, connect: impl FnOnce() -> bool) {
        if self.second_from.is_none_or(|from| now.since(from) >= SECOND) {
            (self.second_from, self.in_second) = (Some(now), 0);
        }
        if self.in_second == CONNECTS_PER_SECOND {
            self.refused += 1;
        } else if connect() {
            self.in_second += 1;
            self.started += 1;
        } else {
            self.needless += 1;
        }
    }
}

/// For `status`: started, needless, refused.
impl fmt::Display for Connects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.started, self.needless, self.refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_so_many_handshakes_and_needless_questions_cost_none() {
        let mut connects = Connects::default();
        let at = |ms| Instant::from_nanos(1) + Duration::from_millis(ms);
        (0..10).for_each(|_| connects.ask(at(0), || false));
        (0..1_000).for_each(|_| connects.ask(at(999), || true));
        assert_eq!(connects.to_string(), "200 10 800");
        connects.ask(at(1_000), || true);
        assert_eq!(connects.to_string(), "201 10 800");
    }
}
