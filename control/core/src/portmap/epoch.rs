//! Whether a router has lost its state: it says how long it has had it, and our clock says how long
//! that should be by now.

use crate::time::Instant;

/// The last word of a router, and when it came.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Epoch(Option<(u32, Instant)>);

impl Epoch {
    /// Takes the router's word; true if it lost its state since the last one (RFC 6887, section 8.5,
    /// which is stricter than RFC 6886, section 3.6, and holds for its routers as well).
    pub(super) fn restarted(&mut self, now: Instant, epoch_s: u32) -> bool {
        let before = self.0.replace((epoch_s, now));
        let Some((epoch_before_s, then)) = before else { return false };
        let (seen, before) = (u64::from(epoch_s), u64::from(epoch_before_s));
        // One second back is the order in which answers arrived.
        if seen + 1 < before {
            return true;
        }
        let theirs = seen.saturating_sub(before);
        let ours = now.since(then).as_secs();
        // Clocks may differ by a sixteenth, and seconds are rounded.
        ours + 2 < theirs - theirs / 16 || theirs + 2 < ours - ours / 16
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_router_restarted_when_its_clock_does_not_fit_ours() {
        let start = Instant::default();
        // Seconds of theirs before, of ours passed, of theirs now.
        let cases = [
            (100, 50, 150, false),
            (100, 50, 148, false),
            (100, 50, 153, false),
            (100, 0, 99, false),
            (100, 0, 98, true),
            // It went up, but not by what it should have: restarted in between.
            (100, 1000, 900, true),
            (100, 1000, 1040, false),
            // Up by more than time passed.
            (100, 50, 200, true),
            (u32::MAX, 10, 0, true),
        ];
        for (before, passed, after, restarted) in cases {
            let mut epoch = Epoch::default();
            assert!(!epoch.restarted(start, before));
            let now = start + Duration::from_secs(passed);
            assert_eq!(epoch.restarted(now, after), restarted, "{before} {passed} {after}");
            assert!(!epoch.restarted(now, after), "once");
        }
    }
}
