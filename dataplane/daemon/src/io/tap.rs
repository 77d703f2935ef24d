//! Hears disco that the host's own firewall drops: packet sockets see what comes in before the
//! firewall's INPUT chain does, as a packet capture sees it. Control answers by the UDP socket, and
//! with that the firewall knows the flow and lets in the rest.
//!
//! The sockets stay in this process: whoever has one may also send any frame, which control, without
//! any capability, must not. It is told what came ([`millrace_ebpf::link::Heard`]).

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use millrace_ebpf::link::{HEARD_LEN_MAX, Heard};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::io::udp::kernel_drops;

/// Bytes of IP and UDP headers that may stand before a frame: IPv4 with all options, and UDP.
const HEADERS_LEN_MAX: usize = 60 + UDP_LEN;
const UDP_LEN: usize = 8;
/// Some hundred short frames, as the kernel counts them.
const BUFFER_LEN: usize = 128 << 10;

/// One socket a family. It receives nothing before [`Tap::listen`].
#[derive(Debug)]
pub struct Tap {
    v4: Socket,
    v6: Socket,
    port: u16,
}

impl Tap {
    /// Needs CAP_NET_RAW, once.
    pub fn open(port: u16) -> io::Result<Self> {
        let socket = |filter: &[SockFilter]| {
            // Of no protocol: nothing comes before the filter is in place.
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(0)))?;
            socket.set_nonblocking(true)?;
            socket.set_recv_buffer_size(BUFFER_LEN)?;
            socket.attach_filter(filter)?;
            Ok::<_, io::Error>(socket)
        };
        Ok(Self { v4: socket(&filter_v4(port))?, v6: socket(&filter_v6(port))?, port })
    }

    /// From now on frames wait here.
    pub fn listen(&self) -> io::Result<()> {
        bind(&self.v4, libc::ETH_P_IP)?;
        bind(&self.v6, libc::ETH_P_IPV6)
    }

    /// The next one; None if nothing waits. What the filter let in by mistake is left out.
    pub fn receive(&self) -> Option<Heard> {
        let mut buffer = [0; HEADERS_LEN_MAX + HEARD_LEN_MAX];
        for (socket, parse) in [(&self.v4, parse_v4 as Parse), (&self.v6, parse_v6)] {
            while let Some((ifindex, len)) = receive(socket, &mut buffer) {
                let heard = parse(&buffer[..len], ifindex);
                if let Some(heard) = heard.filter(|heard| heard.to.port() == self.port) {
                    return Some(heard);
                }
            }
        }
        None
    }

    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.v4.as_fd(), self.v6.as_fd()].into_iter()
    }

    /// Frames that the kernel dropped because the buffer was full.
    pub fn kernel_drops(&self) -> u64 {
        self.fds().map(|fd| kernel_drops(fd).unwrap_or(0)).sum()
    }
}

type Parse = fn(&[u8], u32) -> Option<Heard>;

/// On every interface, incoming packets of one protocol.
fn bind(socket: &Socket, protocol: libc::c_int) -> io::Result<()> {
    // SAFETY: all zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (protocol as u16).to_be();
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is a whole `sockaddr_ll` that outlives the call, and its size is given.
    let done = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Interface and length of what came; a packet that is longer than the buffer is cut.
fn receive(socket: &Socket, buffer: &mut [u8]) -> Option<(u32, usize)> {
    let mut from = MaybeUninit::<libc::sockaddr_ll>::zeroed();
    let mut from_len = size_of_val(&from) as libc::socklen_t;
    // SAFETY: the kernel writes at most the given lengths into the buffer and the address.
    let len = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
            from.as_mut_ptr().cast(),
            &raw mut from_len,
        )
    };
    // SAFETY: it was zeroed, and any bytes are a `sockaddr_ll`.
    let from = unsafe { from.assume_init() };
    Some((from.sll_ifindex as u32, usize::try_from(len).ok()?))
}

/// From the IPv4 header on. Its checksum is looked at, as nobody has; the frame has its own seal.
fn parse_v4(packet: &[u8], ifindex: u32) -> Option<Heard> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    let (header, rest) = packet.split_at_checked(header_len).filter(|_| header_len >= 20)?;
    let (words, _) = header.as_chunks();
    let sum: u32 = words.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let is_whole = (sum & 0xffff) + (sum >> 16) == 0xffff;
    let [source, target] = [12, 16].map(|at| header[at..at + 4].first_chunk::<4>());
    let (ports, frame) = parse_udp(rest)?;
    let (from, to) = (IpAddr::from(*source?), IpAddr::from(*target?));
    is_whole.then(|| Heard {
        from: SocketAddr::new(from, ports.0),
        to: SocketAddr::new(to, ports.1),
        ifindex,
        frame: frame.to_vec(),
    })
}

/// From the IPv6 header on, which UDP follows.
fn parse_v6(packet: &[u8], ifindex: u32) -> Option<Heard> {
    let (header, rest) = packet.split_first_chunk::<40>()?;
    let [source, target] = [8, 24].map(|at| header[at..at + 16].first_chunk::<16>());
    let (ports, frame) = parse_udp(rest)?;
    let address = |ip: &[u8; 16], port| {
        let ip = std::net::Ipv6Addr::from(*ip);
        let zone = if ip.is_unicast_link_local() { ifindex } else { 0 };
        // A mapped address is none on the wire.
        ip.to_ipv4_mapped().is_none().then(|| SocketAddrV6::new(ip, port, 0, zone).into())
    };
    let (from, to) = (address(source?, ports.0)?, address(target?, ports.1)?);
    Some(Heard { from, to, ifindex, frame: frame.to_vec() })
}

/// Source and target port, and the payload without what a short Ethernet frame is filled up with.
fn parse_udp(datagram: &[u8]) -> Option<((u16, u16), &[u8])> {
    let (header, _) = datagram.split_first_chunk::<UDP_LEN>()?;
    let [a, b, c, d, e, f, ..] = *header;
    let frame = datagram.get(UDP_LEN..usize::from(u16::from_be_bytes([e, f])))?;
    let fits = (1..=HEARD_LEN_MAX).contains(&frame.len());
    fits.then_some(((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])), frame))
}

/// `enum` of `linux/filter.h`, as far as it is needed here.
mod bpf {
    pub(super) const LOAD_LEN: u16 = 0x80;
    pub(super) const LOAD_WORD: u16 = 0x20;
    pub(super) const LOAD_HALF: u16 = 0x28;
    pub(super) const LOAD_BYTE: u16 = 0x30;
    pub(super) const LOAD_WORD_AT_X: u16 = 0x40;
    pub(super) const LOAD_HALF_AT_X: u16 = 0x48;
    /// X = 4 * (byte & 15).
    pub(super) const LOAD_X_HEADER: u16 = 0xb1;
    pub(super) const IF_EQUAL: u16 = 0x15;
    pub(super) const IF_ABOVE: u16 = 0x25;
    pub(super) const IF_ANY_BIT: u16 = 0x45;
    pub(super) const RETURN: u16 = 0x06;
    /// `SKF_AD_OFF + SKF_AD_PKTTYPE`: 0 is "for this host".
    pub(super) const PACKET_TYPE: u32 = -0x1000_i32 as u32 + 4;
}

/// One step of a filter.
enum Step {
    Load(u16, u32),
    /// The packet is ours only if the accumulator is this.
    Only(u32),
    /// Not if the comparison holds.
    Not(u16, u32),
}

const UDP: u32 = 17;
/// The two halves of disco's magic.
const MAGIC: (u32, u32) = (0x5453_f09f, 0x92ac);

fn filter_v4(port: u16) -> Vec<SockFilter> {
    use Step::{Load, Not, Only};
    filter(&[
        // Most packets of a busy gateway end here.
        Load(bpf::LOAD_LEN, 0),
        Not(bpf::IF_ABOVE, (HEADERS_LEN_MAX + HEARD_LEN_MAX) as u32),
        Load(bpf::LOAD_BYTE, 9),
        Only(UDP),
        Load(bpf::LOAD_WORD, bpf::PACKET_TYPE),
        Only(0),
        // More fragments, or not the first.
        Load(bpf::LOAD_HALF, 6),
        Not(bpf::IF_ANY_BIT, 0x3fff),
        Load(bpf::LOAD_X_HEADER, 0),
        Load(bpf::LOAD_HALF_AT_X, 2),
        Only(port.into()),
        Load(bpf::LOAD_WORD_AT_X, 8),
        Only(MAGIC.0),
        Load(bpf::LOAD_HALF_AT_X, 12),
        Only(MAGIC.1),
    ])
}

fn filter_v6(port: u16) -> Vec<SockFilter> {
    use Step::{Load, Not, Only};
    filter(&[
        Load(bpf::LOAD_LEN, 0),
        Not(bpf::IF_ABOVE, (HEADERS_LEN_MAX + HEARD_LEN_MAX) as u32),
        // At once: no fragment, no option.
        Load(bpf::LOAD_BYTE, 6),
        Only(UDP),
        Load(bpf::LOAD_WORD, bpf::PACKET_TYPE),
        Only(0),
        Load(bpf::LOAD_HALF, 42),
        Only(port.into()),
        Load(bpf::LOAD_WORD, 48),
        Only(MAGIC.0),
        Load(bpf::LOAD_HALF, 52),
        Only(MAGIC.1),
    ])
}

/// The whole packet if every step agrees, else nothing. A load past the end is nothing, too.
fn filter(steps: &[Step]) -> Vec<SockFilter> {
    let refused = |at: usize| (steps.len() - at) as u8;
    let instruction = |(at, step): (usize, &Step)| match *step {
        Step::Load(code, k) => SockFilter::new(code, 0, 0, k),
        Step::Only(value) => SockFilter::new(bpf::IF_EQUAL, 0, refused(at), value),
        Step::Not(code, value) => SockFilter::new(code, refused(at), 0, value),
    };
    let end = [u32::MAX, 0].map(|len| SockFilter::new(bpf::RETURN, 0, 0, len));
    steps.iter().enumerate().map(instruction).chain(end).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An IPv4 packet of 20 + 8 bytes and a frame.
    fn packet_v4(frame: &[u8]) -> Vec<u8> {
        let mut packet =
            vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2];
        packet[2..4].copy_from_slice(&(28 + frame.len() as u16).to_be_bytes());
        let sum: u32 =
            packet.as_chunks::<2>().0.iter().map(|w| u32::from(u16::from_be_bytes(*w))).sum();
        let sum = !((sum & 0xffff) as u16 + (sum >> 16) as u16);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend([0x13, 0x88, 0xca, 0x6c]);
        packet.extend((8 + frame.len() as u16).to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(frame);
        packet
    }

    #[test]
    fn a_frame_is_taken_out_of_its_headers() {
        let packet = packet_v4(b"frame");
        let heard = parse_v4(&packet, 3).unwrap();
        assert_eq!(heard.from, "192.0.2.1:5000".parse().unwrap());
        assert_eq!(heard.to, "192.0.2.2:51820".parse().unwrap());
        assert_eq!((heard.ifindex, &*heard.frame), (3, &b"frame"[..]));
        // What fills up a short Ethernet frame is no part of it.
        let padded = [packet.as_slice(), &[0; 9]].concat();
        assert_eq!(parse_v4(&padded, 3), Some(heard));
        for at in 0..20 {
            let mut damaged = packet.clone();
            damaged[at] ^= 4;
            assert_eq!(parse_v4(&damaged, 3), None, "byte {at}");
        }
        for len in 0..packet.len() {
            assert_eq!(parse_v4(&packet[..len], 3), None, "{len} bytes");
        }
        let mut v6 = vec![0x60, 0, 0, 0, 0, 13, 17, 64];
        v6.extend("fe80::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
        v6.extend("2001:db8::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
        v6.extend(&packet[20..]);
        let heard = parse_v6(&v6, 3).unwrap();
        assert_eq!(heard.from, "[fe80::1%3]:5000".parse().unwrap());
        assert_eq!(heard.to, "[2001:db8::2]:51820".parse().unwrap());
        for len in 0..v6.len() {
            assert_eq!(parse_v6(&v6[..len], 3), None, "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_none(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            for parse in [parse_v4 as Parse, parse_v6] {
                let heard = parse(&bytes, 1);
                prop_assert!(heard.is_none_or(|heard| (1..=HEARD_LEN_MAX).contains(&heard.frame.len())));
            }
        }
    }
}
