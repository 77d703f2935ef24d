//! Proof that every thread of the data plane still takes turns, for systemd's watchdog.
//!
//! Only where a watchdog is asked for: each beat wakes every thread, and an idle gateway is not to
//! wake up otherwise.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

/// Beats within the time after which systemd gives us up: one or two may come late.
const BEATS: u32 = 4;

/// One thread's: it polls the descriptor among its others and answers when it is readable.
#[derive(Debug)]
pub struct Pulse {
    /// The thread, for the log.
    name: String,
    wake: OwnedFd,
    answered: AtomicBool,
}

impl Pulse {
    pub fn new(name: impl Into<String>) -> io::Result<Arc<Self>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Nobody was asked yet, so nobody is silent.
        Ok(Arc::new(Self { name: name.into(), wake, answered: AtomicBool::new(true) }))
    }

    fn ask(&self) {
        self.answered.store(false, Ordering::Relaxed);
        // Fails only when it was asked 2^64 times without an answer.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The thread is alive: it came here.
    pub fn answer(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        self.answered.store(true, Ordering::Relaxed);
    }
}

impl AsFd for Pulse {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Asks all threads at every beat, and at the next one whether all have answered.
#[derive(Debug)]
pub struct Watchdog {
    interval: Duration,
    next: Instant,
    pulses: Vec<Arc<Pulse>>,
}

impl Watchdog {
    /// `limit`: after so long without a sign of life systemd acts.
    pub fn new(limit: Duration, pulses: Vec<Arc<Pulse>>) -> Self {
        let interval = limit / BEATS;
        pulses.iter().for_each(|pulse| pulse.ask());
        Self { interval, next: Instant::now() + interval, pulses }
    }

    /// Until the next beat.
    pub fn left(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// When its time has come: whether every thread has answered since the last beat.
    pub fn beat(&mut self) -> bool {
        if !self.left().is_zero() {
            return false;
        }
        self.next = Instant::now() + self.interval;
        let mut all = true;
        for pulse in &self.pulses {
            if pulse.answered.load(Ordering::Relaxed) {
                pulse.ask();
            } else {
                all = false;
                tracing::error!("the thread {} does not answer the watchdog", pulse.name);
            }
        }
        all
    }
}
