//! Ctrl-C as an ordinary error, so that destructors run and the lab is removed.

use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM end waits with [`crate::Error::Interrupted`]; a second one kills.
pub fn install() {
    extern "C" fn note(signal: libc::c_int) {
        REQUESTED.store(true, Ordering::Relaxed);
        // SAFETY: signal(2) is async-signal-safe; the default action lets a second Ctrl-C kill.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let handler = note as extern "C" fn(libc::c_int) as libc::sighandler_t;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic and calls signal(2).
        unsafe { libc::signal(signal, handler) };
    }
}

/// Whether the user asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
