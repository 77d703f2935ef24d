//! What the kernel counted on our AF_XDP sockets. It forgets when a socket is closed; the ledger
//! remembers, so that `status` shows sums since the start.

use std::io;
use std::ops::AddAssign;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::xsk::get_option;

/// What the kernel counted on a socket since it was made (XDP_STATISTICS), and what closing it cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Received frames that found no free frame of ours, or were too long for one.
    pub rx_dropped: u64,
    /// Frames of the fill ring that the kernel refused.
    pub rx_invalid: u64,
    /// Frames of the transmit ring that the kernel refused: packets that were not sent.
    pub tx_invalid: u64,
    /// Dropped because we did not empty the receive ring in time.
    pub rx_ring_full: u64,
    /// Times the device looked for a frame to receive into and found none.
    pub fill_ring_empty: u64,
    /// Times the device looked for a frame to send and found none: no fault.
    pub tx_ring_empty: u64,
    /// Received frames that waited in the receive ring when the socket was closed.
    pub rx_abandoned: u64,
}

impl Statistics {
    pub(super) fn read(socket: &OwnedFd) -> io::Result<Self> {
        let seen: libc::xdp_statistics = get_option(socket, libc::XDP_STATISTICS)?;
        Ok(Self {
            rx_dropped: seen.rx_dropped,
            rx_invalid: seen.rx_invalid_descs,
            tx_invalid: seen.tx_invalid_descs,
            rx_ring_full: seen.rx_ring_full,
            fill_ring_empty: seen.rx_fill_ring_empty_descs,
            tx_ring_empty: seen.tx_ring_empty_descs,
            rx_abandoned: 0,
        })
    }
}

/// The sockets that are open, and the sum over those that were closed.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    open: Vec<Arc<OwnedFd>>,
    closed: Statistics,
}

impl Ledger {
    /// Sums over all sockets since the start. Asks the kernel once a socket.
    pub fn sum(&self) -> io::Result<Statistics> {
        let entries = self.lock();
        let mut sum = entries.closed;
        for socket in &entries.open {
            sum += Statistics::read(socket)?;
        }
        Ok(sum)
    }

    pub(super) fn open(&self, socket: &Arc<OwnedFd>) {
        self.lock().open.push(Arc::clone(socket));
    }

    /// Keeps a socket's last numbers, and lets go of it. `waiting`: received frames that nobody
    /// will look at any more. Nothing for a socket that is not open here.
    pub(super) fn close(&self, socket: &Arc<OwnedFd>, waiting: u32) {
        let mut entries = self.lock();
        let Some(at) = entries.open.iter().position(|open| Arc::ptr_eq(open, socket)) else {
            return;
        };
        // Asking an AF_XDP socket fails only for want of an AF_XDP socket.
        entries.closed += Statistics::read(socket).unwrap_or_default();
        entries.closed.rx_abandoned += u64::from(waiting);
        entries.open.swap_remove(at);
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // What it holds is whole after every statement, so a panic elsewhere did not break it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AddAssign for Statistics {
    fn add_assign(&mut self, other: Self) {
        // Without `..`: a field that is missing here is an error.
        let Self {
            rx_dropped,
            rx_invalid,
            tx_invalid,
            rx_ring_full,
            fill_ring_empty,
            tx_ring_empty,
            rx_abandoned,
        } = other;
        self.rx_dropped += rx_dropped;
        self.rx_invalid += rx_invalid;
        self.tx_invalid += tx_invalid;
        self.rx_ring_full += rx_ring_full;
        self.fill_ring_empty += fill_ring_empty;
        self.tx_ring_empty += tx_ring_empty;
        self.rx_abandoned += rx_abandoned;
    }
}
