//! A second attempt for tests that a sound product can fail: when two random ports are the same, or
//! a busy machine keeps a daemon from its deadline.

use std::{
    any::Any,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use crate::capture::LEAK;

/// Runs `case`, which makes all that it tests, and once more if it panics: what is broken fails twice.
/// A case that ends with a leak gets no second chance.
pub fn second_chance<T>(case: impl Fn() -> T) -> T {
    once_more(case, tell_second_attempt)
}

fn once_more<T>(case: impl Fn() -> T, tell: impl Fn(&str)) -> T {
    catch_unwind(AssertUnwindSafe(&case)).unwrap_or_else(|panic| {
        if said(&*panic).contains(LEAK) {
            resume_unwind(panic);
        }
        tell(said(&*panic));
        case()
    })
}

/// Says past the test harness, which hides what a test that passes prints, why there is a second
/// attempt: `scripts/test` counts these.
pub fn tell_second_attempt(why: &str) {
    let _ = writeln!(io::stderr(), "second attempt, after: {}", why.replace('\n', " "));
}

/// The message of a panic.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_fails_once_passes_and_what_fails_twice_or_leaks_does_not() {
        let attempts = |failures: u32, message: &str| {
            let count = Cell::new(0);
            let passed = catch_unwind(AssertUnwindSafe(|| {
                let case = || {
                    count.set(count.get() + 1);
                    assert!(count.get() > failures, "{message}");
                };
                once_more(case, |_| ());
            }));
            (count.get(), passed.is_ok())
        };
        assert_eq!(attempts(0, ""), (1, true));
        assert_eq!(attempts(1, "late"), (2, true));
        assert_eq!(attempts(2, "late"), (2, false));
        assert_eq!(attempts(1, &format!("2 of 3 packets outside {LEAK}")), (1, false));
    }
}
