//! Token buckets on a clock of milliseconds.

/// Fills at a rate up to a burst. May go into debt: what was read cannot be unread, and who took too
/// much waits longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    per_second: u64,
    burst: u64,
    /// In thousandths, so that a millisecond of a slow rate is not lost.
    level: i64,
    filled_ms: u64,
}

impl Bucket {
    /// A full bucket.
    pub fn new(per_second: u64, burst: u64, now_ms: u64) -> Self {
        Self { per_second, burst, level: thousandths(burst), filled_ms: now_ms }
    }

    /// Takes `amount` and returns for how many milliseconds nothing more may be taken; 0 while
    /// there is no debt.
    pub fn take(&mut self, amount: u64, now_ms: u64) -> u64 {
        self.fill(now_ms);
        self.level = self.level.saturating_sub(thousandths(amount));
        if self.level >= 0 {
            return 0;
        }
        self.level.unsigned_abs().div_ceil(self.per_second.max(1))
    }

    /// Takes one if there is one.
    pub fn take_one(&mut self, now_ms: u64) -> bool {
        self.fill(now_ms);
        let there = self.level >= 1000;
        if there {
            self.level -= 1000;
        }
        there
    }

    fn fill(&mut self, now_ms: u64) {
        let passed = now_ms.saturating_sub(self.filled_ms);
        self.filled_ms = self.filled_ms.max(now_ms);
        let gained = i64::try_from(passed.saturating_mul(self.per_second)).unwrap_or(i64::MAX);
        self.level = self.level.saturating_add(gained).min(thousandths(self.burst));
    }
}

fn thousandths(amount: u64) -> i64 {
    i64::try_from(amount.saturating_mul(1000)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debt_is_waited_for() {
        let mut bucket = Bucket::new(1000, 5000, 0);
        assert_eq!(bucket.take(5000, 0), 0);
        assert_eq!(bucket.take(500, 0), 500);
        assert_eq!(bucket.take(0, 500), 0);
        assert_eq!(bucket.take(1, 500), 1);
    }

    #[test]
    fn a_burst_then_one_a_second() {
        let mut bucket = Bucket::new(1, 3, 0);
        let taken = (0..10).filter(|_| bucket.take_one(0)).count();
        assert_eq!(taken, 3);
        assert!(!bucket.take_one(999));
        assert!(bucket.take_one(1000));
        assert!(!bucket.take_one(1000));
    }

    #[test]
    fn no_number_overflows() {
        let mut bucket = Bucket::new(u64::MAX, u64::MAX, 0);
        bucket.take(u64::MAX, u64::MAX);
        bucket.take(u64::MAX, 0);
    }
}
