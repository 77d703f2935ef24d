//! A cable that delays, loses, doubles, reorders and damages frames: the kernel here has no netem.
//!
//! It stands between a host and its router, in a namespace of its own: a thread for each way takes
//! every frame from one end and sends it, later or never, at the other.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{Error, Namespace, Result, marker::random_bytes};

/// Longest frame with its Ethernet header. The ends are told not to bundle, so 1,514 would do.
const FRAME_LEN_MAX: usize = 2048;

/// Length of the Ethernet header.
const ETHERNET_LEN: usize = 14;

/// Longest wait before a thread looks whether it shall end.
const POLL_MAX: Duration = Duration::from_millis(20);

/// What a cable does to the frames of one way. Chances are per mille.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Impairment {
    /// How long each frame is under way.
    pub delay: Duration,
    /// A random part on top, of which this is the most. Frames overtake each other by it.
    pub jitter: Duration,
    /// Frames that vanish.
    pub loss: u16,
    /// Frames at which a burst begins, in which all vanish.
    pub burst: u16,
    /// Length of a burst, in frames.
    pub burst_len: u16,
    /// Frames that arrive twice.
    pub duplicate: u16,
    /// UDP datagrams in which one byte is wrong. The checksum is taken out, so that they are delivered.
    pub damage: u16,
}

/// A running cable.
#[derive(Debug)]
pub struct Wire {
    /// Where its ends `host` and `router` are.
    namespace: Namespace,
    ways: [Way; 2],
}

/// One way.
#[derive(Debug)]
struct Way {
    impairment: Arc<Mutex<Impairment>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// Begins to carry frames between the interfaces `host` and `router` of `namespace`.
    pub(super) fn start(namespace: Namespace) -> Result<Self> {
        // The kernel itself must not speak on the cable.
        namespace.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
        let way = |from: &str, to: &str| {
            let [from, to] = [packet_socket(&namespace, from)?, packet_socket(&namespace, to)?];
            Ok::<_, Error>(Way::start(from, to, u64::from_ne_bytes(random_bytes()?)))
        };
        let ways = [way("host", "router")?, way("router", "host")?];
        Ok(Self { namespace, ways })
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// What happens from now on to frames from the host, and to those to it.
    pub fn set(&self, from_host: Impairment, to_host: Impairment) {
        for (way, impairment) in self.ways.iter().zip([from_host, to_host]) {
            *way.impairment.lock().unwrap_or_else(PoisonError::into_inner) = impairment;
        }
    }
}

impl Way {
    fn start(from: OwnedFd, to: OwnedFd, seed: u64) -> Self {
        let impairment = Arc::default();
        let stop = Arc::default();
        let (shared, end) = (Arc::clone(&impairment), Arc::clone(&stop));
        let mut carrier = Carrier { from, to, impairment: shared, seed, burst_left: 0 };
        let thread = Some(thread::spawn(move || carrier.run(&end)));
        Self { impairment, stop, thread }
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A carrier that has panicked has said so.
            let _ = thread.join();
        }
    }
}

/// The state of one way's thread.
struct Carrier {
    from: OwnedFd,
    to: OwnedFd,
    impairment: Arc<Mutex<Impairment>>,
    seed: u64,
    burst_left: u16,
}

/// A frame under way, by due time and order of arrival.
type UnderWay = Reverse<(Instant, u64, Vec<u8>)>;

impl Carrier {
    fn run(&mut self, end: &AtomicBool) {
        let mut under_way = BinaryHeap::<UnderWay>::new();
        let mut count = 0;
        let mut buffer = [0; FRAME_LEN_MAX];
        while !end.load(Ordering::Relaxed) {
            let next = under_way.peek().map(|Reverse((due, ..))| *due);
            let wait = next.map_or(POLL_MAX, |due| due.saturating_duration_since(Instant::now()));
            wait_readable(&self.from, wait.min(POLL_MAX));
            while let Some(len) = receive(&self.from, &mut buffer) {
                for (due, frame) in self.fate(&buffer[..len]) {
                    count += 1;
                    under_way.push(Reverse((due, count, frame)));
                }
            }
            while under_way.peek().is_some_and(|Reverse((due, ..))| *due <= Instant::now()) {
                if let Some(Reverse((_, _, frame))) = under_way.pop() {
                    send(&self.to, &frame);
                }
            }
        }
    }

    /// When and how often a frame arrives, and what it looks like then.
    fn fate(&mut self, frame: &[u8]) -> Vec<(Instant, Vec<u8>)> {
        let now = Instant::now();
        let is = *self.impairment.lock().unwrap_or_else(PoisonError::into_inner);
        // Address resolution is no subject of any test.
        if frame.get(12..14) == Some(&[0x08, 0x06]) {
            return vec![(now, frame.to_vec())];
        }
        // A burst ends with the order for bursts.
        if self.burst_left > 0 && is.burst > 0 {
            self.burst_left -= 1;
            return Vec::new();
        }
        if self.chance(is.burst) {
            self.burst_left = is.burst_len.saturating_sub(1);
            return Vec::new();
        }
        if self.chance(is.loss) {
            return Vec::new();
        }
        let copies = if self.chance(is.duplicate) { 2 } else { 1 };
        let mut arrivals = Vec::with_capacity(copies);
        for _ in 0..copies {
            let mut frame = frame.to_vec();
            if self.chance(is.damage) {
                let place = self.random();
                damage(&mut frame, place);
            }
            let part = self.random() % (is.jitter.as_nanos() as u64 + 1);
            arrivals.push((now + is.delay + Duration::from_nanos(part), frame));
        }
        arrivals
    }

    fn chance(&mut self, permille: u16) -> bool {
        permille > 0 && self.random() % 1000 < u64::from(permille)
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.seed;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

/// Changes one byte of an IPv4 datagram's payload and leaves it without a UDP checksum.
fn damage(frame: &mut [u8], place: u64) {
    const HEADERS_LEN: usize = ETHERNET_LEN + 20 + 8;
    const PROTOCOL: usize = ETHERNET_LEN + 9;
    const CHECKSUM: usize = ETHERNET_LEN + 20 + 6;
    let is_udp = frame.get(12..15) == Some(&[0x08, 0x00, 0x45])
        && frame.get(PROTOCOL) == Some(&(libc::IPPROTO_UDP as u8));
    if !is_udp || frame.len() <= HEADERS_LEN {
        return;
    }
    frame[CHECKSUM..CHECKSUM + 2].fill(0);
    let at = HEADERS_LEN + place as usize % (frame.len() - HEADERS_LEN);
    frame[at] ^= 0x10;
}

/// A socket that sees every frame that arrives at an interface, whoever it is for.
fn packet_socket(namespace: &Namespace, interface: &str) -> Result<OwnedFd> {
    let open = || -> io::Result<OwnedFd> {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: takes integers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, protocol.into()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = std::ffi::CString::new(interface)?;
        // SAFETY: the name is a live C string.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        // SAFETY: zero is a valid value for all its fields.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index;
        // SAFETY: the address is live and of the length given.
        let bound = unsafe {
            libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
        };
        if bound != 0 {
            return Err(io::Error::last_os_error());
        }
        let all = libc::packet_mreq {
            mr_ifindex: index,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        set(&socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &all)?;
        let one: libc::c_int = 1;
        set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &one)?;
        let room: libc::c_int = 8 << 20;
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &room)?;
        Ok(socket)
    };
    namespace.run(open).map_err(Error::system(format!("open a packet socket on {interface}")))
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let (pointer, len) = (std::ptr::from_ref(value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the descriptor is open; the value is live and of the length given.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer, len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn wait_readable(socket: &OwnedFd, limit: Duration) {
    let mut ready = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let limit = libc::timespec {
        tv_sec: limit.as_secs() as libc::time_t,
        tv_nsec: limit.subsec_nanos().into(),
    };
    // SAFETY: both pointers are to live locals; no signal mask is given. It may end early.
    unsafe { libc::ppoll(&mut ready, 1, &limit, std::ptr::null()) };
}

/// The length of the next frame, `None` when there is no more.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Option<usize> {
    // SAFETY: the buffer is live and of the length given.
    let len =
        unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(len).ok()
}

/// A frame that the other end has no room for is lost, as on a cable.
fn send(socket: &OwnedFd, frame: &[u8]) {
    // SAFETY: the frame is live and of the length given.
    unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
}
