//! An AF_XDP socket on one queue of one device: receive and transmit rings over a share of the
//! port's packet memory (kernel documentation, "AF_XDP").
//!
//! All of it is safe to use: frames are handed out only while they are ours, descriptors of the
//! kernel are checked before they are used, and a frame that is dropped goes back by itself.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant as Clock};

use arrayvec::ArrayVec;
use millrace_wg::Instant;
use millrace_wg::limits::BATCH_PACKETS;

use super::ring::{Consumer, Producer};
use super::umem::{FrameCounts, Frames, Part, Umem};
use super::xsk_ledger::{Ledger, Statistics};

/// Entries of the receive ring: packets that wait while the worker is busy elsewhere.
pub const RX_RING: u32 = 2048;
/// Twice the receive ring, so that the device never runs dry while a full ring waits for us.
const FILL_RING: u32 = 2 * RX_RING;
const TX_RING: u32 = 1024;
/// Every sent frame must find room here, or the kernel stops sending.
const COMPLETION_RING: u32 = TX_RING;
/// Frames of one queue: what the device may hold, what is being sent, one batch in our hands.
pub const QUEUE_FRAMES: u32 = 4096;
/// Frames that are lent at most; the others are for sending.
const LENT_MAX: u32 = QUEUE_FRAMES - TX_RING - BATCH_PACKETS as u32;
/// A queue stays busy for a moment after its last socket was closed.
const REBIND_TIMEOUT: Duration = Duration::from_secs(2);
const REBIND_PAUSE: Duration = Duration::from_millis(20);
/// One system call of the copy mode moves 32 packets, so a full ring needs so many calls.
const KICKS_MAX: u32 = TX_RING / 32 + 1;
/// Frames that were not completed for so long mean that this queue does not send. Shorter than the
/// kernel's own watchdog (5 s), longer than an overloaded host keeps a virtual CPU waiting: one of
/// 1 s took working cards for broken ones.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(3);
/// Frames that were not completed for so long: the device may have lost the call that woke it.
const NUDGE_TIMEOUT: Duration = Duration::from_millis(100);

/// How packets come between the device and our memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The device reads and writes our memory itself.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

/// Where a socket is bound.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub ifindex: u32,
    pub queue: u32,
    pub mode: Mode,
}

/// Why a socket cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device is down, gone, or has no XDP program any more.
    Down { errno: i32 },
    /// Frames were given to the device and it did not complete them in [`STALL_TIMEOUT`].
    Stalled { outstanding: u32 },
}

/// Errors of making a socket: what was seen, what to do.
#[derive(Debug, thiserror::Error)]
pub enum XskError {
    #[error(
        "{action} was not permitted ({source}); it needs CAP_NET_RAW: start as root, or give the \
         unit this capability"
    )]
    NotPermitted { action: &'static str, source: io::Error },
    #[error(
        "{action} did not get {bytes} bytes of locked memory ({source}); give CAP_IPC_LOCK, or \
         raise LimitMEMLOCK of the unit (`ulimit -l` in a shell)"
    )]
    NoMemory { action: &'static str, bytes: u64, source: io::Error },
    #[error("the driver does not offer {mode:?} mode on queue {queue} ({source})")]
    Unsupported { mode: Mode, queue: u32, source: io::Error },
    #[error("queue {queue} is in use by another AF_XDP socket; stop that program ({source})")]
    Busy { queue: u32, source: io::Error },
    #[error("the kernel bound queue {queue} in copy mode although zero-copy was asked for")]
    NotZeroCopy { queue: u32 },
    #[error("{action} failed: {source}")]
    Other { action: &'static str, source: io::Error },
}

/// One bound socket with its rings and frames. One thread at a time uses it.
#[derive(Debug)]
pub struct Xsk {
    place: Place,
    rx: Consumer<libc::xdp_desc>,
    tx: Producer<libc::xdp_desc>,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    frames: Frames,
    held: ArrayVec<Part, BATCH_PACKETS>,
    /// Descriptors from the kernel that were of no frame of ours; each costs that frame.
    refused: u64,
    /// When frames were last completed, or when the first of the outstanding ones was sent.
    progress: Instant,
    ledger: Arc<Ledger>,
    /// Dropped last, after the rings are unmapped.
    socket: Arc<OwnedFd>,
}

impl Xsk {
    /// Makes a socket, fills its fill ring, then binds it: some drivers take their first frames
    /// while they are bound. `index` is the queue's number among the sockets of this memory;
    /// all but the first of them name the first as `share`.
    ///
    /// Blocks up to two seconds while the kernel still cleans up an older socket of this queue.
    ///
    /// # Safety
    /// No two sockets of one UMEM have the same `index`.
    unsafe fn bind(
        umem: &Arc<Umem>,
        ledger: &Arc<Ledger>,
        index: u32,
        share: Option<&Self>,
        place: Place,
    ) -> Result<Self, XskError> {
        let socket = Arc::new(socket()?);
        if share.is_none() {
            let registration = umem.registration();
            set_option(&socket, libc::XDP_UMEM_REG, &registration).map_err(|source| {
                memory_error("registering packet memory", registration.len, source)
            })?;
        }
        for (option, size) in [
            (libc::XDP_UMEM_FILL_RING, FILL_RING),
            (libc::XDP_UMEM_COMPLETION_RING, COMPLETION_RING),
            (libc::XDP_RX_RING, RX_RING),
            (libc::XDP_TX_RING, TX_RING),
        ] {
            set_option(&socket, option, &size)
                .map_err(|source| memory_error("making a ring", u64::from(size) * 16, source))?;
        }
        let map = |source| memory_error("mapping a ring", u64::from(RX_RING) * 16, source);
        let at: libc::xdp_mmap_offsets =
            get_option(&socket, libc::XDP_MMAP_OFFSETS).map_err(other("reading ring offsets"))?;
        let fd = socket.as_fd();
        let fill_page = libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t;
        let completion_page = libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t;
        let mut xsk = Self {
            place,
            rx: Consumer::new(fd, libc::XDP_PGOFF_RX_RING, at.rx, RX_RING).map_err(map)?,
            tx: Producer::new(fd, libc::XDP_PGOFF_TX_RING, at.tx, TX_RING).map_err(map)?,
            fill: Producer::new(fd, fill_page, at.fr, FILL_RING).map_err(map)?,
            completion: Consumer::new(fd, completion_page, at.cr, COMPLETION_RING).map_err(map)?,
            // SAFETY: shares of different indices are disjoint; the caller vouches for the index.
            frames: unsafe { Frames::new(Arc::clone(umem), index * QUEUE_FRAMES, QUEUE_FRAMES) },
            held: ArrayVec::new(),
            refused: 0,
            progress: Instant::from_nanos(1),
            ledger: Arc::clone(ledger),
            socket,
        };
        xsk.refill();
        xsk.bind_socket(share)?;
        xsk.confirm_mode()?;
        ledger.open(&xsk.socket);
        Ok(xsk)
    }

    fn bind_socket(&self, share: Option<&Self>) -> Result<(), XskError> {
        let Place { ifindex, queue, mode } = self.place;
        let mode_flag = match mode {
            Mode::ZeroCopy => libc::XDP_ZEROCOPY,
            Mode::Copy => libc::XDP_COPY,
        };
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            // A socket that shares memory inherits the mode; naming one again is refused.
            sxdp_flags: match share {
                Some(_) => libc::XDP_SHARED_UMEM,
                None => mode_flag | libc::XDP_USE_NEED_WAKEUP,
            },
            sxdp_ifindex: ifindex,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: share.map_or(0, |first| first.socket.as_raw_fd() as u32),
        };
        let deadline = Clock::now() + REBIND_TIMEOUT;
        loop {
            // SAFETY: the address is a whole sockaddr_xdp that outlives the call, with its length.
            let bound = unsafe {
                libc::bind(
                    self.socket.as_raw_fd(),
                    (&raw const address).cast(),
                    size_of_val(&address) as libc::socklen_t,
                )
            };
            if bound == 0 {
                return Ok(());
            }
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::EBUSY) if Clock::now() < deadline => {
                    thread::sleep(REBIND_PAUSE);
                    continue;
                }
                Some(libc::EBUSY) => XskError::Busy { queue, source },
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOENT) => {
                    XskError::Unsupported { mode, queue, source }
                }
                Some(libc::ENOBUFS | libc::ENOMEM) => {
                    memory_error("binding", self.frames.counts().total().into(), source)
                }
                Some(libc::EPERM | libc::EACCES) => {
                    XskError::NotPermitted { action: "binding an AF_XDP socket", source }
                }
                _ => XskError::Other { action: "binding an AF_XDP socket", source },
            });
        }
    }

    /// Zero-copy counts only when the kernel says so.
    fn confirm_mode(&self) -> Result<(), XskError> {
        let options: u32 = get_option(&self.socket, libc::XDP_OPTIONS)
            .map_err(other("asking for the mode of an AF_XDP socket"))?;
        let zero_copy = options & libc::XDP_OPTIONS_ZEROCOPY != 0;
        match self.place.mode {
            Mode::ZeroCopy if !zero_copy => Err(XskError::NotZeroCopy { queue: self.place.queue }),
            _ => Ok(()),
        }
    }

    pub fn place(&self) -> Place {
        self.place
    }

    /// Takes what has arrived, at most a batch. Empty if nothing has.
    pub fn receive(&mut self) -> Batch<'_> {
        let count = self.rx.available().min(BATCH_PACKETS as u32);
        for _ in 0..count {
            let descriptor = self.rx.pop();
            match self.frames.hold(descriptor.addr, descriptor.len) {
                Some(part) => self.held.push(part),
                None => self.refused += 1,
            }
        }
        if count > 0 {
            self.rx.release();
        }
        Batch { xsk: self }
    }

    /// Gives the device frames to receive into, and wakes it if it sleeps for want of them.
    fn refill(&mut self) {
        let counts = self.frames.counts();
        let count = self.fill.room().min(LENT_MAX - counts.lent.min(LENT_MAX)).min(counts.free);
        for _ in 0..count {
            let Some(address) = self.frames.lend() else { break };
            self.fill.push(address);
        }
        if count > 0 {
            self.fill.publish();
        }
    }

    /// Wakes the device if its fill ring ran dry. Cheap; call after a batch and before sleeping.
    pub fn wake_receiver(&self) {
        if self.fill.needs_wakeup() {
            // SAFETY: without a buffer recvfrom writes nothing; it only runs the driver's receive
            // half. Its result says nothing that the rings do not say.
            unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    std::ptr::null_mut(),
                    0,
                    libc::MSG_DONTWAIT,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                );
            }
        }
    }

    /// Frames that can be sent now. Collects what the device has completed first.
    pub fn send_room(&mut self, now: Instant) -> u32 {
        self.reap(now);
        let counts = self.frames.counts();
        (TX_RING - counts.sent.min(TX_RING)).min(self.tx.room()).min(counts.free)
    }

    /// Puts a frame of `len` bytes, which `write` fills, into the transmit ring; the device sees it
    /// at the next [`Self::flush`]. False if there is no room: see [`Self::send_room`].
    pub fn send(&mut self, len: usize, now: Instant, write: impl FnOnce(&mut [u8])) -> bool {
        let counts = self.frames.counts();
        if self.tx.room() == 0 || counts.sent >= TX_RING {
            return false;
        }
        let Ok(len) = u32::try_from(len) else { return false };
        let Some(part) = self.frames.take_to_send(len) else { return false };
        write(self.frames.bytes_mut(&part));
        if counts.sent == 0 {
            self.progress = now;
        }
        self.tx.push(self.frames.send(part));
        true
    }

    /// Shows the device what was put into the transmit ring, and wakes it if it sleeps.
    pub fn flush(&mut self, now: Instant) -> Result<(), Fault> {
        self.tx.publish();
        for _ in 0..KICKS_MAX {
            if self.tx.waiting() == 0 || !self.tx.needs_wakeup() {
                break;
            }
            if !self.kick()? {
                break;
            }
            // Completions that we do not collect are what stops the kernel.
            self.reap(now);
            if self.place.mode == Mode::ZeroCopy {
                break;
            }
        }
        Ok(())
    }

    /// Runs the driver's transmit half; false if it can do nothing more now.
    fn kick(&self) -> Result<bool, Fault> {
        // SAFETY: without a buffer sendto reads nothing.
        let kicked = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                std::ptr::null(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null(),
                0,
            )
        };
        if kicked >= 0 {
            return Ok(true);
        }
        match io::Error::last_os_error().raw_os_error().unwrap_or(0) {
            // It moved some and wants another call, or its completion ring is full.
            libc::EAGAIN | libc::EINTR => Ok(true),
            libc::EBUSY | libc::ENOBUFS => Ok(false),
            errno => Err(Fault::Down { errno }),
        }
    }

    /// Collects completed frames and, while some are outstanding, keeps the device awake and
    /// watches that it gets on. Call once a turn while [`Self::outstanding`] is not 0.
    pub fn watch(&mut self, now: Instant) -> Result<(), Fault> {
        self.reap(now);
        let outstanding = self.outstanding();
        if outstanding == 0 {
            return Ok(());
        }
        if now.since(self.progress) >= STALL_TIMEOUT {
            return Err(Fault::Stalled { outstanding });
        }
        if now.since(self.progress) >= NUDGE_TIMEOUT {
            self.kick()?;
        }
        self.flush(now)
    }

    /// Frames given to the device and not yet completed.
    pub fn outstanding(&self) -> u32 {
        self.frames.counts().sent
    }

    fn reap(&mut self, now: Instant) {
        let count = self.completion.available();
        for _ in 0..count {
            let address = self.completion.pop();
            if !self.frames.complete(address) {
                self.refused += 1;
            }
        }
        if count > 0 {
            self.completion.release();
            self.progress = now;
        }
    }

    /// Copies of the frames that the device never completed, in the order in which they were sent:
    /// to be sent again another way. Some may have left; receivers drop what they saw.
    pub fn unsent(&self) -> Vec<Vec<u8>> {
        let mut seen = std::collections::HashSet::new();
        let mut frames: Vec<_> = self
            .tx
            .newest()
            .filter(|descriptor| seen.insert(descriptor.addr))
            .filter_map(|descriptor| self.frames.copy_sent(&descriptor))
            .collect();
        frames.reverse();
        frames
    }

    pub fn statistics(&self) -> io::Result<Statistics> {
        Statistics::read(&self.socket)
    }

    /// In whose hands the frames are, counted frame by frame.
    pub fn frame_counts(&self) -> FrameCounts {
        debug_assert_eq!(self.frames.counts(), self.frames.recount());
        self.frames.recount()
    }

    /// Descriptors of the kernel that could not be, since the last call; none, as long as the
    /// kernel is sound.
    pub fn take_refused(&mut self) -> u64 {
        mem::take(&mut self.refused)
    }
}

impl Drop for Xsk {
    fn drop(&mut self) {
        self.ledger.close(&self.socket, self.rx.available());
    }
}

impl AsFd for Xsk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Binds `queues` of one device over one memory of `chunk_len` frames. All or none. What the kernel
/// counts on them goes to `ledger`.
pub fn bind_queues(
    ledger: &Arc<Ledger>,
    ifindex: u32,
    queues: u32,
    mode: Mode,
    chunk_len: u32,
) -> Result<Vec<Xsk>, XskError> {
    let frames = queues * QUEUE_FRAMES;
    let umem = Umem::new(frames, chunk_len).map_err(|source| {
        let bytes = u64::from(frames) * u64::from(chunk_len);
        memory_error("mapping packet memory", bytes, source)
    })?;
    let mut sockets: Vec<Xsk> = Vec::with_capacity(queues as usize);
    for queue in 0..queues {
        let place = Place { ifindex, queue, mode };
        // SAFETY: the memory is new here and each queue number comes once.
        let socket = unsafe { Xsk::bind(&umem, ledger, queue, sockets.first(), place) }?;
        sockets.push(socket);
    }
    Ok(sockets)
}

/// Received frames, ours until this is dropped; then they go back to the device.
#[derive(Debug)]
pub struct Batch<'x> {
    xsk: &'x mut Xsk,
}

impl Batch<'_> {
    pub fn len(&self) -> usize {
        self.xsk.held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.xsk.held.is_empty()
    }

    /// Each frame, from the first byte of its Ethernet header, in the order of arrival.
    pub fn frames(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.xsk.frames.bytes_of_many(&self.xsk.held)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if self.xsk.held.is_empty() {
            return;
        }
        // The last one first: the frame that was touched first is then used again last.
        while let Some(part) = self.xsk.held.pop() {
            self.xsk.frames.release(part);
        }
        self.xsk.refill();
        self.xsk.wake_receiver();
    }
}

fn socket() -> Result<OwnedFd, XskError> {
    // SAFETY: socket(2) takes integers.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        let (action, source) = ("making an AF_XDP socket", io::Error::last_os_error());
        return Err(match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => XskError::NotPermitted { action, source },
            _ => XskError::Other { action, source },
        });
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option<T: Copy>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value outlives the call and its size is given; the kernel only reads it.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads an option into plain data of integers; what the kernel leaves out stays zero.
pub(super) fn get_option<T: Plain>(socket: &OwnedFd, option: libc::c_int) -> io::Result<T> {
    // SAFETY: zero bytes are a valid value of plain integers.
    let mut value: T = unsafe { mem::zeroed() };
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into the value, and any bytes are valid in it.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Made of integers only, so that any bytes are a value.
pub(super) trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for libc::xdp_mmap_offsets {}
impl Plain for libc::xdp_statistics {}

fn memory_error(action: &'static str, bytes: u64, source: io::Error) -> XskError {
    match source.raw_os_error() {
        Some(libc::ENOBUFS | libc::ENOMEM | libc::EAGAIN) => {
            XskError::NoMemory { action, bytes, source }
        }
        Some(libc::EPERM | libc::EACCES) => XskError::NotPermitted { action, source },
        _ => XskError::Other { action, source },
    }
}

fn other(action: &'static str) -> impl FnOnce(io::Error) -> XskError {
    move |source| XskError::Other { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use caps::{CapSet, Capability};
    use millrace_lab::{Lab, lab};

    /// Binding without one capability, which is given up by a thread of its own.
    fn bind_without(capability: Capability) -> XskError {
        let lab = Lab::new().unwrap();
        let (a, b) = (lab.namespace("a").unwrap(), lab.namespace("b").unwrap());
        lab::link((&a, "veth0"), (&b, "veth1")).unwrap();
        a.run(|| {
            // SAFETY: a terminated string that outlives the call.
            let ifindex = unsafe { libc::if_nametoindex(c"veth0".as_ptr()) };
            caps::drop(None, CapSet::Effective, capability).unwrap();
            bind_queues(&Arc::default(), ifindex, 8, Mode::Copy, 4096).unwrap_err()
        })
    }

    #[test]
    fn too_little_locked_memory_names_its_cure() {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
        let wanted = u64::from(8 * QUEUE_FRAMES) * 4096;
        assert!(limit.current.is_some_and(|bytes| bytes < wanted), "this host limits nothing");
        let error = bind_without(Capability::CAP_IPC_LOCK);
        assert!(matches!(error, XskError::NoMemory { bytes, .. } if bytes == wanted), "{error}");
        assert!(error.to_string().contains("give CAP_IPC_LOCK, or raise LimitMEMLOCK"));
    }

    #[test]
    fn a_missing_capability_is_named() {
        let error = bind_without(Capability::CAP_NET_RAW);
        assert!(error.to_string().contains("it needs CAP_NET_RAW"), "{error}");
    }
}
