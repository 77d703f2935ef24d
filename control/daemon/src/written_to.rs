//! Whom the tunnel's port wrote to: the filters of a NAT or firewall are open for these.

use std::collections::HashMap;
use std::net::SocketAddr;

use millrace_path::Instant;

use crate::limits::{FILTER_OPEN_TIME_MAX, WRITTEN_TO_MAX};

/// What control sent; the data plane's own packets go to where control pings, too, and to
/// configured endpoints.
#[derive(Debug, Default)]
pub struct WrittenTo {
    at: HashMap<SocketAddr, Instant>,
    /// When there was no room for one more.
    full_at: Option<Instant>,
}

impl WrittenTo {
    pub fn note(&mut self, now: Instant, to: SocketAddr) {
        if self.at.len() >= WRITTEN_TO_MAX && !self.at.contains_key(&to) {
            self.at.retain(|_, at| is_fresh(now, *at));
            if self.at.len() >= WRITTEN_TO_MAX {
                self.full_at = Some(now);
                return;
            }
        }
        self.at.insert(to, now);
    }

    /// All whose answers a filter may still let in; none: they were too many to remember.
    pub fn lately(&self, now: Instant) -> Option<Vec<SocketAddr>> {
        if self.full_at.is_some_and(|at| is_fresh(now, at)) {
            return None;
        }
        let fresh = self.at.iter().filter(|(_, at)| is_fresh(now, **at));
        Some(fresh.map(|(to, _)| *to).collect())
    }
}

fn is_fresh(now: Instant, at: Instant) -> bool {
    now.since(at) < FILTER_OPEN_TIME_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_forgotten_for_want_of_room_is_not_taken_for_never_written_to() {
        let mut this = WrittenTo::default();
        let at = |seconds: u64| Instant::from_nanos(seconds * 1_000_000_000);
        let address = |number: usize| SocketAddr::from(([192, 0, 2, 1], number as u16));
        for number in 0..WRITTEN_TO_MAX {
            this.note(at(1), address(number));
        }
        assert_eq!(this.lately(at(2)).map(|all| all.len()), Some(WRITTEN_TO_MAX));
        this.note(at(2), address(0));
        assert!(this.lately(at(2)).is_some(), "it is known");
        this.note(at(3), address(WRITTEN_TO_MAX));
        assert_eq!(this.lately(at(3)), None);
        let later = at(3) + FILTER_OPEN_TIME_MAX;
        assert_eq!(this.lately(later), Some(Vec::new()));
        this.note(later, address(WRITTEN_TO_MAX));
        assert_eq!(this.lately(later), Some(vec![address(WRITTEN_TO_MAX)]));
    }
}
