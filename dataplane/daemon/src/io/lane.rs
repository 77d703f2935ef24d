//! A worker's AF_XDP sockets, and the mailbox through which the port's thread gives and takes them.
//!
//! The port's thread never touches a socket that a worker has; it posts a new set, and the worker
//! drops the old one. What a worker sees going wrong it reports the same way back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_wg::Instant;
use millrace_wg::tx::Transmit;
use rustix::event::{EventfdFlags, eventfd};

use super::nexthop::NextHops;
use super::xsk::{Fault, Xsk};

/// A socket for a worker.
#[derive(Debug)]
pub struct LaneSocket {
    pub xsk: Xsk,
    /// Whether to send on it too: zero-copy, and a queue that the device had before XDP came.
    pub transmit: bool,
}

/// Between one worker and the port's thread.
#[derive(Debug)]
pub struct Mailbox {
    posted: Mutex<Option<Vec<LaneSocket>>>,
    is_posted: AtomicBool,
    /// Readable while something is posted: wakes the worker.
    wake_worker: OwnedFd,
    faults: Mutex<Vec<Fault>>,
    /// Wakes the port's thread; all workers share it.
    wake_port: Arc<OwnedFd>,
    /// Frames that came and went through the worker's sockets.
    frames: [AtomicU64; 2],
}

impl Mailbox {
    /// `wake_port`: an eventfd that becomes readable when a fault is reported or a lane changed.
    pub fn new(wake_port: Arc<OwnedFd>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            posted: Mutex::new(None),
            is_posted: AtomicBool::new(false),
            wake_worker: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            faults: Mutex::new(Vec::new()),
            wake_port,
            frames: Default::default(),
        }))
    }

    /// Gives the worker a new set of sockets, empty to take all away. The worker closes the old.
    pub fn post(&self, sockets: Vec<LaneSocket>) {
        // A set that the worker has not picked up is closed here, by being dropped.
        let _old = lock(&self.posted).replace(sockets);
        self.is_posted.store(true, Ordering::Release);
        signal(&self.wake_worker);
    }

    /// True once the worker has picked up what was posted, and so closed what it had before.
    pub fn is_settled(&self) -> bool {
        !self.is_posted.load(Ordering::Acquire)
    }

    /// Faults since the last call.
    pub fn take_faults(&self) -> Vec<Fault> {
        std::mem::take(&mut *lock(&self.faults))
    }

    /// Frames that were received and that were put into transmit rings, since the start.
    pub fn frames(&self) -> [u64; 2] {
        [&self.frames[0], &self.frames[1]].map(|frames| frames.load(Ordering::Relaxed))
    }

    /// The worker received so many frames.
    pub fn count_received(&self, frames: u64) {
        self.frames[0].fetch_add(frames, Ordering::Relaxed);
    }

    fn report(&self, fault: Fault) {
        lock(&self.faults).push(fault);
        signal(&self.wake_port);
    }
}

/// The worker's end: its sockets, if it has any.
pub struct Lane {
    mailbox: Arc<Mailbox>,
    hops: Arc<NextHops>,
    sockets: Vec<LaneSocket>,
    /// Number of the next IPv4 packet; routers may fragment them (RFC 6864).
    id: u16,
    /// Which socket receives first, so that no queue starves.
    turn: usize,
}

/// What became of a transmit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// All of it is in the ring.
    All,
    /// So many bytes of it; the ring is full.
    Full(usize),
    /// Not for this lane: no transmit ring, a next hop not known yet, another device, too long.
    Elsewhere,
}

impl Lane {
    pub fn new(mailbox: Arc<Mailbox>, hops: Arc<NextHops>) -> Self {
        Self { mailbox, hops, sockets: Vec::new(), id: 0, turn: 0 }
    }

    /// The port's thread posted something. Receive what is left, then [`Self::pick_up`].
    pub fn is_posted(&self) -> bool {
        !self.mailbox.is_settled()
    }

    /// Takes what the port's thread posted, if it did. Frames that were not completed go to `resend`
    /// before their socket is closed.
    pub fn pick_up(&mut self, resend: impl FnMut(&mut [u8])) {
        drain(&self.mailbox.wake_worker);
        let Some(sockets) = lock(&self.mailbox.posted).take() else { return };
        // Closes the old ones first: their queues must be free for the new ones.
        self.close_all(resend);
        self.sockets = sockets;
        self.mailbox.is_posted.store(false, Ordering::Release);
        signal(&self.mailbox.wake_port);
    }

    /// Readable when [`Self::pick_up`] has something.
    pub fn mailbox_fd(&self) -> BorrowedFd<'_> {
        self.mailbox.wake_worker.as_fd()
    }

    /// The sockets to wait for.
    pub fn sockets(&self) -> impl Iterator<Item = &Xsk> {
        self.sockets.iter().map(|socket| &socket.xsk)
    }

    /// Every socket once, to receive from, another one first each time; and where to count.
    pub fn receivers(&mut self) -> (&Mailbox, impl Iterator<Item = &mut Xsk>) {
        self.turn = (self.turn + 1) % self.sockets.len().max(1);
        let first = self.turn.min(self.sockets.len());
        let (before, after) = self.sockets.split_at_mut(first);
        (&self.mailbox, after.iter_mut().chain(before).map(|socket| &mut socket.xsk))
    }

    /// Puts `transmit` into a ring, from byte `offset` on.
    pub fn send(&mut self, transmit: &Transmit<'_>, offset: usize, now: Instant) -> Sent {
        let Some(socket) = self.sockets.iter_mut().find(|socket| socket.transmit) else {
            return Sent::Elsewhere;
        };
        let Some(hop) = self.hops.lookup(&transmit.endpoint) else { return Sent::Elsewhere };
        if hop.template.packet_len(transmit.segment_len) > hop.mtu {
            return Sent::Elsewhere;
        }
        let (mut room, mut at) = (socket.xsk.send_room(now), offset);
        let room_before = room;
        for segment in transmit.bytes[offset..].chunks(transmit.segment_len) {
            let len = hop.template.header_len() + segment.len();
            let id = self.id;
            let write = |frame: &mut [u8]| hop.template.write(frame, transmit.ecn, id, segment);
            if room == 0 || !socket.xsk.send(len, now, write) {
                break;
            }
            self.id = self.id.wrapping_add(1);
            room -= 1;
            at += segment.len();
        }
        self.mailbox.frames[1].fetch_add(u64::from(room_before - room), Ordering::Relaxed);
        if at == transmit.bytes.len() { Sent::All } else { Sent::Full(at) }
    }

    /// Shows the device what [`Self::send`] put into rings. Call once a batch.
    pub fn flush(&mut self, now: Instant) {
        self.each_sender(|xsk| xsk.flush(now));
    }

    /// Collects completed frames and watches that the device gets on; true while some are
    /// outstanding. Then call again within some milliseconds.
    pub fn watch(&mut self, now: Instant) -> bool {
        self.each_sender(|xsk| xsk.watch(now));
        self.sockets.iter().any(|socket| socket.transmit && socket.xsk.outstanding() > 0)
    }

    /// Stops sending on a socket with a fault, and reports it once: the port's thread decides.
    /// Until it does, the UDP socket sends.
    fn each_sender(&mut self, mut work: impl FnMut(&mut Xsk) -> Result<(), Fault>) {
        for socket in self.sockets.iter_mut().filter(|socket| socket.transmit) {
            if let Err(fault) = work(&mut socket.xsk) {
                socket.transmit = false;
                self.mailbox.report(fault);
            }
        }
    }

    /// The error flag of a socket was seen while waiting: the device is gone. Gives the sockets up,
    /// since they would be ready for ever. Frames that were not completed go to `resend`.
    pub fn give_up(&mut self, resend: impl FnMut(&mut [u8])) {
        self.close_all(resend);
        self.mailbox.report(Fault::Down { errno: libc::ENETDOWN });
    }

    fn close_all(&mut self, mut resend: impl FnMut(&mut [u8])) {
        for old in self.sockets.drain(..) {
            old.xsk.unsent().iter_mut().for_each(|frame| resend(frame));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these hold is whole after every statement, so a panic elsewhere did not break it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes an eventfd readable. It can only fail by being readable 2^64 times already.
pub fn signal(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes an eventfd unreadable again.
pub fn drain(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}
