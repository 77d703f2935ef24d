//! UDP probes whose every byte is checked.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    ops::RangeInclusive,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{Error, Marker, Namespace, Result};

/// How long one echo is waited for before it counts as lost. A machine may stand still for seconds.
const ECHO_LIMIT: Duration = Duration::from_secs(6);

/// A stream that has stopped is over when nothing came for so long.
const SILENCE: Duration = Duration::from_secs(2);

/// How often one length is tried: the first packet above the path MTU only teaches it to the host.
const ECHO_TRIES: u32 = 6;

/// How often a blocked thread looks whether it shall end.
const STOP_POLL: Duration = Duration::from_millis(20);

/// Room for what comes while a busy machine lets a probe wait: a loss is then the tunnel's. The
/// system's default holds about ninety datagrams.
const RECEIVE_BUFFER_LEN: libc::c_int = 16 << 20;

/// A thread that sends every datagram back to where it came from.
#[derive(Debug)]
pub struct Echo {
    address: SocketAddr,
    thread: Worker<()>,
}

impl Echo {
    /// Echoes at `address` in `namespace`; port 0 picks one.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let socket = bind(namespace, address)?;
        let address = socket.local_addr().map_err(Error::system("ask for the echo's port"))?;
        let thread = Worker::start(move |stop| {
            let mut buffer = vec![0; 65_536];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                    // A full queue is a loss, which the other end counts.
                    let _ = socket.send_to(&buffer[..len], from);
                }
            }
        });
        Ok(Self { address, thread })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it.
    pub fn stop(self) {
        self.thread.finish();
    }
}

/// The outcome of [`every_length`].
#[derive(Clone, Debug, Default)]
pub struct Lengths {
    /// Lengths that came back right.
    pub passed: u32,
    /// Lengths that needed more than one try, with the number of tries.
    pub retried: Vec<(usize, u32)>,
    /// Lengths that never came back.
    pub lost: Vec<usize>,
}

/// Sends one datagram of each payload length from `from` to an [`Echo`] at `to`, and compares what
/// comes back byte for byte. IPv4 datagrams may be fragmented on the way.
pub fn every_length(
    from: &Namespace,
    to: SocketAddr,
    lengths: RangeInclusive<usize>,
    marker: Marker,
) -> Result<Lengths> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let any = any.parse().map_err(|_| Error::Unexpected("no address".into()))?;
    let socket = bind(from, any)?;
    socket.connect(to).map_err(Error::system(format!("connect to {to}")))?;
    socket.set_read_timeout(Some(ECHO_LIMIT)).map_err(Error::system("set a time limit"))?;
    let mut outcome = Lengths::default();
    for len in lengths {
        let mut bytes = payload(len, marker);
        avoid_zero_checksum(&socket, &mut bytes)?;
        match echo(&socket, &bytes)? {
            Some(1) => outcome.passed += 1,
            Some(tries) => {
                outcome.passed += 1;
                outcome.retried.push((len, tries));
            }
            None => outcome.lost.push(len),
        }
    }
    Ok(outcome)
}

/// A stream of numbered datagrams in one direction, for loss, order and gaps.
#[derive(Debug)]
pub struct Sequence {
    sender: Worker<u64>,
    receiver: Worker<SequenceReport>,
}

/// What happened to a numbered stream.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct SequenceReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Different ones received.
    pub received: u64,
    /// Sent, but never received.
    pub lost: u64,
    /// Received more than once.
    pub duplicated: u64,
    /// Received after one with a higher number.
    pub reordered: u64,
    /// Received with a wrong content.
    pub damaged: u64,
    /// Longest time without a new datagram, in milliseconds.
    pub longest_gap_ms: u64,
}

impl Sequence {
    /// Sends a datagram of `len` bytes (16 at least) every `interval` from `from` to `address` in `to`.
    pub fn start(
        from: &Namespace,
        to: &Namespace,
        address: SocketAddr,
        interval: Duration,
        len: usize,
        marker: Marker,
    ) -> Result<Self> {
        let receiver = bind(to, address)?;
        let address = receiver.local_addr().map_err(Error::system("ask for the probe's port"))?;
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let any = any.parse().map_err(|_| Error::Unexpected("no address".into()))?;
        let sender = bind(from, any)?;
        let receiver = Worker::start(move |stop| receive(&receiver, marker, stop));
        let sender = Worker::start(move |stop| send(&sender, address, interval, len, marker, stop));
        Ok(Self { sender, receiver })
    }

    /// Stops sending, gives the last datagrams a moment, and reports.
    pub fn finish(self) -> SequenceReport {
        let sent = self.sender.finish();
        let mut report = self.receiver.finish();
        report.sent = sent;
        report.lost = sent.saturating_sub(report.received);
        report
    }
}

/// A thread with a flag that ends it.
#[derive(Debug)]
struct Worker<T> {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Worker<T> {
    fn start(work: impl FnOnce(&AtomicBool) -> T + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        Self { stop, thread: Some(thread::spawn(move || work(&flag))) }
    }
}

impl<T> Worker<T> {
    fn finish(mut self) -> T {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { unreachable!("finished only once") };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A socket in `namespace` that wakes up often and lets IPv4 routers fragment.
pub(crate) fn bind(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket> {
    let what = || format!("bind {address} in {}", namespace.name());
    let socket = namespace.run(|| UdpSocket::bind(address)).map_err(Error::system(what()))?;
    socket.set_read_timeout(Some(STOP_POLL)).map_err(Error::system(what()))?;
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER_LEN)
        .map_err(Error::system(what()))?;
    if address.is_ipv4() {
        set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
            .map_err(Error::system(what()))?;
    }
    Ok(socket)
}

fn set(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the descriptor is open, the value is a live c_int of the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The marker, varied by position so that shifted or swapped blocks show.
fn payload(len: usize, marker: Marker) -> Vec<u8> {
    let mut bytes = marker.fill(len);
    for (block, chunk) in bytes.chunks_mut(64).enumerate().skip(1) {
        chunk[0] = chunk[0].wrapping_add(block as u8);
    }
    bytes
}

/// Changes one bit where the UDP checksum over IPv6 would be zero: wireguard-go (2026-05) then sends
/// zero instead of 0xffff and the receiver drops it, one length in 65,536. Ours has a test for that.
fn avoid_zero_checksum(socket: &UdpSocket, bytes: &mut [u8]) -> Result<()> {
    let what = || Error::system("ask for a probe's addresses");
    let (SocketAddr::V6(near), SocketAddr::V6(far)) =
        (socket.local_addr().map_err(what())?, socket.peer_addr().map_err(what())?)
    else {
        return Ok(());
    };
    let len = bytes.len() as u64 + 8;
    let header = [near.port().into(), far.port().into(), len, len, libc::IPPROTO_UDP as u64];
    let addresses = [near.ip().segments(), far.ip().segments()].concat().into_iter().map(u64::from);
    let payload = bytes.chunks(2).map(|word| match word {
        [high, low] => u64::from(u16::from_be_bytes([*high, *low])),
        _ => u64::from(word[0]) << 8,
    });
    let sum: u64 = addresses.chain(header).chain(payload).sum();
    // A sum of ones' complement is 0xffff, whose complement is zero, when it divides so.
    if let (0, Some(last)) = (sum % 0xffff, bytes.last_mut()) {
        *last ^= 1;
    }
    Ok(())
}

/// The number of tries until the echo came, `None` if it never did.
fn echo(socket: &UdpSocket, bytes: &[u8]) -> Result<Option<u32>> {
    let mut buffer = vec![0; 65_536];
    for attempt in 1..=ECHO_TRIES {
        // The first packet that is too long for the path is refused with EMSGSIZE, at once or later.
        if let Err(error) = socket.send(bytes) {
            accept_too_long(error, bytes.len())?;
            continue;
        }
        let deadline = Instant::now() + ECHO_LIMIT;
        while Instant::now() < deadline {
            let len = match socket.recv(&mut buffer) {
                Ok(len) => len,
                // The time limit of the socket: the echo is lost.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    accept_too_long(error, bytes.len())?;
                    break;
                }
            };
            if len == bytes.len() {
                if buffer[..len] == *bytes {
                    return Ok(Some(attempt));
                }
                return Err(Error::Unexpected(format!("an echo of {len} bytes came back changed")));
            }
            // A late echo of a length that was sent twice.
        }
    }
    Ok(None)
}

/// The path MTU is learned by EMSGSIZE; every other refusal of the kernel is a finding.
fn accept_too_long(error: io::Error, len: usize) -> Result<()> {
    if error.raw_os_error() == Some(libc::EMSGSIZE) {
        return Ok(());
    }
    Err(Error::system(format!("echo {len} bytes"))(error))
}

/// Sends at a steady rate until told to stop; returns how many.
fn send(
    socket: &UdpSocket,
    to: SocketAddr,
    interval: Duration,
    len: usize,
    marker: Marker,
    stop: &AtomicBool,
) -> u64 {
    let mut bytes = payload(len.max(16), marker);
    let start = Instant::now();
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        bytes[..8].copy_from_slice(&u64::to_be_bytes(sent));
        if socket.send_to(&bytes, to).is_ok() {
            sent += 1;
        }
        let due = start + interval * u32::try_from(sent).unwrap_or(u32::MAX);
        thread::sleep(due.saturating_duration_since(Instant::now()).max(interval / 8));
    }
    sent
}

/// Receives until told to stop and nothing comes any more.
fn receive(socket: &UdpSocket, marker: Marker, stop: &AtomicBool) -> SequenceReport {
    let mut report = SequenceReport::default();
    let mut seen: Vec<bool> = Vec::new();
    let mut last = None;
    let mut silent_since = Instant::now();
    let mut buffer = vec![0; 65_536];
    loop {
        let Ok(len) = socket.recv(&mut buffer) else {
            if stop.load(Ordering::Relaxed) && silent_since.elapsed() > SILENCE {
                return report;
            }
            continue;
        };
        let gap = silent_since.elapsed().as_millis() as u64;
        silent_since = Instant::now();
        let Some((number, rest)) = buffer[..len].split_first_chunk::<8>() else { continue };
        let number = u64::from_be_bytes(*number);
        if payload(len, marker)[8..] != *rest || number > 1 << 32 {
            report.damaged += 1;
            continue;
        }
        let place = number as usize;
        seen.resize(seen.len().max(place + 1), false);
        if std::mem::replace(&mut seen[place], true) {
            report.duplicated += 1;
            continue;
        }
        report.received += 1;
        if last.is_some() {
            report.longest_gap_ms = report.longest_gap_ms.max(gap);
        }
        if last.is_some_and(|last| number < last) {
            report.reordered += 1;
        }
        last = last.max(Some(number));
    }
}
