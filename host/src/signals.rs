//! The signals that an operator sends, behind a descriptor that can be polled beside others.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// What is asked for, in the order of importance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Stop,
    Reload,
}

/// Catches SIGHUP, SIGINT and SIGTERM from its start until it is dropped.
#[derive(Debug)]
pub struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
}

impl Signals {
    pub fn catch() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        write.set_nonblocking(true)?;
        let signals = [SIGHUP, SIGINT, SIGTERM];
        Ok(Self { delivery: SignalDelivery::with_pipe(read, write, SignalOnly, signals)? })
    }

    /// What came since the last call.
    pub fn take(&mut self) -> Option<Asked> {
        let asked = |signal| if signal == SIGHUP { Asked::Reload } else { Asked::Stop };
        self.delivery.pending().map(asked).min_by_key(|asked| *asked != Asked::Stop)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }
}
