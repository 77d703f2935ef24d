//! Waiting for a condition instead of sleeping and hoping.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{Error, Result, interrupt};

/// How often a condition is looked at: short against everything we wait for, long against its cost.
const POLL: Duration = Duration::from_millis(10);

/// Asks `condition` until it yields a value; an error after `limit`, or when interrupted.
pub fn wait_for<T>(
    what: impl Into<String>,
    limit: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if interrupt::requested() {
            return Err(Error::Interrupted);
        }
        if start.elapsed() >= limit {
            return Err(Error::Timeout { what: what.into(), waited: limit });
        }
        sleep(POLL);
    }
}
