//! UDP sockets of our port: many datagrams a call in both directions (UDP_GRO, UDP_SEGMENT), with
//! each packet's own address, interface and ECN bits.
//!
//! One dual-stack socket per owner; IPv4 peers appear as mapped addresses to the kernel and as
//! plain IPv4 to everybody else. On a host without IPv6 the socket is IPv4.

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use millrace_wg::{Drop, Endpoint};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::failure::{self, Failure};

/// Messages that one call receives at most.
pub const MESSAGES: usize = 32;
/// The same while they are long: opened and written before the level-2 cache forgets them.
const LONG_MESSAGES: usize = 4;
/// From this average on messages are long.
const LONG_MESSAGE_LEN: usize = 16_384;
/// Room for the largest run of datagrams, and some bytes so that buffers do not share cache sets.
const STRIDE: usize = 65_536 + 192;
/// Room for GRO size, packet information, TOS and dropped count.
const CONTROL_LEN: usize = 128;
/// Send and receive buffers: what a fast link brings while the worker is busy elsewhere.
const SOCKET_BUFFER_LEN: usize = 8 << 20;

/// How long the port may be another's when we start: tries, and the time between two.
const PORT_TRIES: u32 = 60;
const PORT_PAUSE: Duration = Duration::from_millis(50);

/// One socket of the port.
#[derive(Debug)]
pub struct UdpSocket {
    socket: Socket,
    v6: bool,
}

/// How a socket of the group is made.
#[derive(Clone, Copy, Debug)]
pub struct UdpOptions {
    /// 0 lets the kernel choose.
    pub port: u16,
    pub fwmark: u32,
}

impl UdpSocket {
    /// The first socket of the port. Another program of our user that also shares its port would
    /// let us in and take half of our packets, so a plain bind goes first. Control of a data plane
    /// that was killed has the port until it sees the end: hence some patience.
    pub fn bind_first(options: UdpOptions) -> Result<Self, Failure> {
        for left in (0..PORT_TRIES).rev() {
            match bind_alone(options.port) {
                Err(_) if left > 0 => thread::sleep(PORT_PAUSE),
                Err(error) => {
                    let doing = format!("binding UDP port {}", options.port);
                    return Err(failure::of_io(&doing, &error));
                }
                Ok(()) => break,
            }
        }
        Self::bind(options)
    }

    pub fn bind(options: UdpOptions) -> Result<Self, Failure> {
        let doing = |what: &str| format!("{what} for UDP port {}", options.port);
        let (socket, v6) = match Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)) {
            Ok(socket) => (socket, true),
            Err(_) => {
                let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP));
                (socket.map_err(|e| failure::of_io(&doing("making a socket"), &e))?, false)
            }
        };
        let udp = Self { socket, v6 };
        udp.configure().map_err(|e| failure::of_io(&doing("setting up a socket"), &e))?;
        udp.set_mark(options.fwmark).map_err(|e| failure::of_io(&doing("setting fwmark"), &e))?;
        match udp.bind_to(v6, options.port) {
            // A kernel that makes IPv6 sockets but has no IPv6 address, not even "any".
            Err(error) if v6 && error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))
                    .map_err(|e| failure::of_io(&doing("making a socket"), &e))?;
                let udp = Self { socket, v6: false };
                udp.configure()
                    .and_then(|()| udp.set_mark(options.fwmark))
                    .and_then(|()| udp.bind_to(false, options.port))
                    .map_err(|e| failure::of_io(&doing("binding"), &e))?;
                Ok(udp)
            }
            Err(error) => Err(failure::of_io(&doing("binding"), &error)),
            Ok(()) => Ok(udp),
        }
    }

    fn bind_to(&self, v6: bool, port: u16) -> io::Result<()> {
        let any: IpAddr =
            if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        self.socket.bind(&SockAddr::from(SocketAddr::new(any, port)))
    }

    fn configure(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)?;
        self.socket.set_reuse_port(true)?;
        if self.v6 {
            self.socket.set_only_v6(false)?;
            self.set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
            self.set(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
            // As the kernel's WireGuard: routers and we may fragment what a link cannot carry.
            self.set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
        } else {
            self.set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
        }
        self.set(libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        self.set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
        // The forced forms need CAP_NET_ADMIN and pass the system's limit; the plain ones do not.
        let len = SOCKET_BUFFER_LEN as libc::c_int;
        if self.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, len).is_err() {
            self.socket.set_recv_buffer_size(SOCKET_BUFFER_LEN)?;
        }
        if self.set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, len).is_err() {
            self.socket.set_send_buffer_size(SOCKET_BUFFER_LEN)?;
        }
        Ok(())
    }

    /// Receives runs of datagrams, or one at a time.
    pub fn set_gro(&self, on: bool) -> io::Result<()> {
        self.set(libc::SOL_UDP, libc::UDP_GRO, on.into())
    }

    /// Marks what is sent from now on; 0 is no mark.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        if mark == 0 && self.socket.mark().unwrap_or(0) == 0 {
            return Ok(());
        }
        self.socket.set_mark(mark)
    }

    pub fn port(&self) -> io::Result<u16> {
        let address = self.socket.local_addr()?;
        Ok(address.as_socket().map_or(0, |address| address.port()))
    }

    /// Packets that the kernel dropped before we could receive them: no room in the buffer, or a
    /// wrong checksum. A run of datagrams may count as one.
    pub fn kernel_drops(&self) -> io::Result<u64> {
        kernel_drops(self.socket.as_fd())
    }

    /// Throws away what waits to be received, and says how many datagrams that were.
    pub fn discard_received(&self) -> usize {
        /// More than the buffer holds.
        const MESSAGES_MAX: usize = 1 << 20;
        let mut nothing = [MaybeUninit::uninit(); 1];
        let more = |_: &usize| self.socket.recv(&mut nothing).is_ok();
        (0..MESSAGES_MAX).take_while(more).count()
    }

    /// Whether IPv6 peers can be reached.
    pub fn is_v6(&self) -> bool {
        self.v6
    }

    fn set(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: the option value is one int that outlives the call, and its size is given.
        let done = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sends `bytes` to `to` as datagrams of `segment_len` bytes each (the last may be shorter).
    /// `tos` is the whole TOS byte or traffic class.
    pub fn send(&self, to: &Endpoint, tos: u8, bytes: &[u8], segment_len: usize) -> io::Result<()> {
        let remote = match to.remote {
            SocketAddr::V4(v4) if self.v6 => {
                SocketAddr::V6(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0))
            }
            other => other,
        };
        let remote = SockAddr::from(remote);
        let mut control = Control::new();
        if segment_len < bytes.len() {
            control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &(segment_len as u16).to_ne_bytes());
        }
        if tos != 0 {
            let value = i32::from(tos).to_ne_bytes();
            match to.remote {
                SocketAddr::V4(_) => control.push(libc::IPPROTO_IP, libc::IP_TOS, &value),
                SocketAddr::V6(_) => control.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &value),
            }
        }
        self.push_source(&mut control, to);
        let mut vector =
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: a msghdr of zero bytes is valid.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_name = remote.as_ptr().cast_mut().cast();
        message.msg_namelen = remote.len();
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        if control.len > 0 {
            message.msg_control = control.bytes.0.as_mut_ptr().cast();
            message.msg_controllen = control.len;
        }
        // SAFETY: all pointers in `message` are to values that outlive the call, with their
        // lengths; sendmsg writes to none of them.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Names the address that the answer leaves from, if the peer last used a certain one.
    fn push_source(&self, control: &mut Control, to: &Endpoint) {
        let Some(local) = to.local else { return };
        let link_local = matches!(to.remote, SocketAddr::V6(v6) if v6.ip().is_unicast_link_local());
        // The interface is only a fact where addresses are not unique; else routes decide.
        let ifindex = if link_local { to.ifindex } else { 0 };
        match local {
            IpAddr::V4(v4) if !self.v6 => {
                let mut bytes = [0; 12];
                bytes[..4].copy_from_slice(&ifindex.to_ne_bytes());
                bytes[4..8].copy_from_slice(&v4.octets());
                control.push(libc::IPPROTO_IP, libc::IP_PKTINFO, &bytes);
            }
            local => {
                let v6 = match local {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                let mut bytes = [0; 20];
                bytes[..16].copy_from_slice(&v6.octets());
                bytes[16..].copy_from_slice(&ifindex.to_ne_bytes());
                control.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &bytes);
            }
        }
    }
}

/// Binds the port without sharing it, and gives it up again. What the port is not to blame for is no
/// error: a host without IPv6, for one.
fn bind_alone(port: u16) -> io::Result<()> {
    if port == 0 {
        return Ok(());
    }
    for (domain, ip) in [
        (Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        (Domain::IPV6, Ipv6Addr::UNSPECIFIED.into()),
    ] {
        let bound = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).and_then(|socket| {
            if domain == Domain::IPV6 {
                socket.set_only_v6(true)?;
            }
            socket.bind(&SockAddr::from(SocketAddr::new(ip, port)))
        });
        match bound {
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// What the kernel dropped at a socket because its buffer was full.
pub(super) fn kernel_drops(socket: BorrowedFd<'_>) -> io::Result<u64> {
    /// `SK_MEMINFO_VARS` numbers of `linux/sock_diag.h`, the last of which is the drops.
    const NUMBERS: usize = 9;
    let mut numbers = [0_u32; NUMBERS];
    let mut len = size_of_val(&numbers) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into the array, and any bytes are numbers.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            numbers.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(numbers[NUMBERS - 1].into()) }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether a send may have failed because our address of the endpoint is gone. Which error the
/// kernel gives depends on the routes that are left; without the source it is tried once more.
pub fn blames_source(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH)
    )
}

/// cmsghdr needs the alignment of a size_t.
#[repr(align(8))]
struct Aligned([u8; CONTROL_LEN]);

/// Control messages to send, in the layout of cmsg(3).
struct Control {
    bytes: Aligned,
    len: usize,
}

const CMSG_HEADER_LEN: usize = size_of::<libc::cmsghdr>();

const fn cmsg_align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}

impl Control {
    fn new() -> Self {
        Self { bytes: Aligned([0; CONTROL_LEN]), len: 0 }
    }

    fn push(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        let len = CMSG_HEADER_LEN + data.len();
        let Some(room) = self.bytes.0.get_mut(self.len..self.len + cmsg_align(len)) else {
            debug_assert!(false, "CONTROL_LEN holds every message that we send");
            return;
        };
        room[..8].copy_from_slice(&len.to_ne_bytes());
        room[8..12].copy_from_slice(&level.to_ne_bytes());
        room[12..16].copy_from_slice(&kind.to_ne_bytes());
        room[CMSG_HEADER_LEN..len].copy_from_slice(data);
        self.len += cmsg_align(len);
    }
}

/// Buffers for one receive call, allocated once.
pub struct Receiver {
    buffers: Box<[u8]>,
    controls: Box<[Aligned]>,
    names: Box<[SockAddrStorage]>,
    headers: Box<[libc::mmsghdr]>,
    vectors: Box<[libc::iovec]>,
    /// Messages that the next call takes.
    appetite: usize,
}

// SAFETY: the pointers in `headers` and `vectors` point into the other boxes of the same value,
// whose addresses do not change when the value moves to another thread.
unsafe impl Send for Receiver {}

/// One received message: a datagram, or a run of datagrams of equal length.
pub struct Received<'a> {
    pub bytes: &'a mut [u8],
    /// Length of each datagram but the last; 0 if the kernel reported a length that cannot be.
    pub segment_len: usize,
    pub source: Endpoint,
    pub ecn: u8,
}

impl Received<'_> {
    /// Why there is no datagram in it to look at; none if there is one.
    pub fn defect(&self) -> Option<Drop> {
        match (self.segment_len, self.bytes.is_empty()) {
            (_, true) => Some(Drop::RxTruncated),
            (0, false) => Some(Drop::RxGroInvalid),
            _ => None,
        }
    }
}

impl Default for Receiver {
    fn default() -> Self {
        Self::new()
    }
}

impl Receiver {
    pub fn new() -> Self {
        // SAFETY: both are plain data for which zero bytes are valid.
        let (header, vector): (libc::mmsghdr, libc::iovec) = unsafe { mem::zeroed() };
        Self {
            buffers: vec![0; MESSAGES * STRIDE].into_boxed_slice(),
            controls: (0..MESSAGES).map(|_| Aligned([0; CONTROL_LEN])).collect(),
            names: (0..MESSAGES).map(|_| SockAddrStorage::zeroed()).collect(),
            headers: vec![header; MESSAGES].into_boxed_slice(),
            vectors: vec![vector; MESSAGES].into_boxed_slice(),
            appetite: MESSAGES,
        }
    }

    /// Receives what is there, at most `max` messages; 0 if nothing is.
    pub fn receive(&mut self, socket: &UdpSocket, max: usize) -> io::Result<usize> {
        let count = max.min(self.appetite);
        for (i, header) in self.headers.iter_mut().enumerate().take(count) {
            let buffer = &mut self.buffers[i * STRIDE..(i + 1) * STRIDE];
            self.vectors[i] =
                libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            // Every field anew: the kernel shortened them for the messages before.
            header.msg_hdr.msg_name = (&raw mut self.names[i]).cast();
            header.msg_hdr.msg_namelen = size_of::<SockAddrStorage>() as libc::socklen_t;
            header.msg_hdr.msg_iov = &raw mut self.vectors[i];
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = self.controls[i].0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL_LEN;
            header.msg_hdr.msg_flags = 0;
            header.msg_len = 0;
        }
        // SAFETY: `headers` holds `count` entries whose pointers and lengths were set just above
        // to buffers that we own mutably.
        let received = unsafe {
            libc::recvmmsg(
                socket.socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if received >= 0 {
            let received = received as usize;
            let len: usize = self.headers[..received].iter().map(|h| h.msg_len as usize).sum();
            let are_long = len >= received * LONG_MESSAGE_LEN;
            self.appetite = if are_long { LONG_MESSAGES } else { MESSAGES };
            return Ok(received);
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            error => Err(error),
        }
    }

    /// The messages of the last [`Self::receive`], which returned `count`.
    pub fn messages(&mut self, count: usize) -> impl Iterator<Item = Received<'_>> {
        let facts = self.headers.iter().zip(&*self.names).zip(&*self.controls);
        self.buffers.chunks_exact_mut(STRIDE).zip(facts).take(count).map(|(buffer, facts)| {
            let ((header, name), control) = facts;
            let len = (header.msg_len as usize).min(buffer.len());
            let control_len = header.msg_hdr.msg_controllen.min(CONTROL_LEN);
            received(&mut buffer[..len], name, &control.0[..control_len])
        })
    }
}

fn received<'a>(bytes: &'a mut [u8], name: &SockAddrStorage, control: &[u8]) -> Received<'a> {
    let (mut segment_len, mut ecn, mut local, mut ifindex) = (bytes.len(), 0, None, 0);
    for_each_control(control, |level, kind, data| match (level, kind) {
        (libc::SOL_UDP, libc::UDP_GRO) => {
            let reported = data.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
            segment_len = match usize::try_from(reported) {
                Ok(reported) if reported <= bytes.len() => reported,
                _ => 0,
            };
        }
        // One byte for IPv4, an int for IPv6; the ECN bits are in the first on a little-endian
        // machine, and in the last of four on a big-endian one.
        (libc::IPPROTO_IP, libc::IP_TOS) => ecn = data.first().map_or(0, |tos| tos & 3),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
            ecn = data.first_chunk().map_or(0, |b| (i32::from_ne_bytes(*b) & 3) as u8);
        }
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            if let Some(info) = data.first_chunk::<12>() {
                ifindex = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                // ipi_spec_dst: the address that an answer should leave from.
                local = Some(IpAddr::from([info[4], info[5], info[6], info[7]]));
            }
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            if let Some((address, index)) = data.split_first_chunk::<16>() {
                local = Some(Ipv6Addr::from(*address).to_canonical());
                ifindex = index.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b));
            }
        }
        _ => {}
    });
    let source = Endpoint { remote: canonical(name), local, ifindex };
    Received { bytes, segment_len, source, ecn }
}

/// The sender's address; an IPv4-mapped one as IPv4.
fn canonical(name: &SockAddrStorage) -> SocketAddr {
    // SAFETY: the storage is zeroed or was written by the kernel; its family says which address
    // it holds, and it is larger than each of them. A copy is read, whatever the alignment.
    let (family, v4, v6) = unsafe {
        let base: *const SockAddrStorage = name;
        (
            base.cast::<libc::sa_family_t>().read_unaligned(),
            base.cast::<MaybeUninit<libc::sockaddr_in>>().read_unaligned().assume_init(),
            base.cast::<MaybeUninit<libc::sockaddr_in6>>().read_unaligned().assume_init(),
        )
    };
    if i32::from(family) == libc::AF_INET {
        let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
        return SocketAddr::new(ip.into(), u16::from_be(v4.sin_port));
    }
    let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
    let port = u16::from_be(v6.sin6_port);
    match ip.to_ipv4_mapped() {
        Some(v4) => SocketAddr::new(v4.into(), port),
        None => SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into(),
    }
}

/// Walks control messages; one whose length cannot be ends the walk.
fn for_each_control(mut control: &[u8], mut each: impl FnMut(libc::c_int, libc::c_int, &[u8])) {
    while let Some(header) = control.first_chunk::<CMSG_HEADER_LEN>() {
        let len = usize::from_ne_bytes([
            header[0], header[1], header[2], header[3], header[4], header[5], header[6], header[7],
        ]);
        let word = |at: usize| {
            i32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let Some(data) = control.get(CMSG_HEADER_LEN..len) else { return };
        each(word(8), word(12), data);
        let Some(rest) = control.get(cmsg_align(len)..) else { return };
        control = rest;
    }
}
