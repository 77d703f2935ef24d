//! The socket on the tunnel's own port that the data plane lends us: short datagrams, each from a
//! chosen address and interface.

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage,
    recvmsg, sendmsg, setsockopt,
};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};

/// Room for the longest datagram and one byte, so that none is cut unseen.
const BUFFER_LEN: usize = 65_536;

/// Dual-stack, or IPv4 on a host without IPv6. Never waits.
#[derive(Debug)]
pub struct UdpSocket {
    fd: OwnedFd,
    v6: bool,
    /// What the socket was last set to.
    dont_fragment: Cell<Option<bool>>,
    buffer: Box<[u8]>,
}

/// From where and on which interface a datagram leaves; unspecified and 0: the kernel's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Source {
    pub ip: Option<IpAddr>,
    pub ifindex: u32,
}

/// What arrived.
#[derive(Debug)]
pub struct Datagram<'b> {
    /// Canonical.
    pub from: SocketAddr,
    /// Our address that it was sent to, and where it came in.
    pub to: Source,
    pub bytes: &'b mut [u8],
}

impl UdpSocket {
    /// Takes the data plane's socket.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let domain = rustix::net::sockopt::socket_domain(&fd)?;
        let v6 = domain == rustix::net::AddressFamily::INET6;
        if v6 {
            setsockopt(&fd, Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&fd, Ipv4PacketInfo, &true)?;
        }
        let (dont_fragment, buffer) = (Cell::new(None), vec![0; BUFFER_LEN].into());
        Ok(Self { fd, v6, dont_fragment, buffer })
    }

    /// Sends one datagram. `dont_fragment`: it proves that a frame of its length passes.
    pub fn send(
        &self,
        to: SocketAddr,
        source: Source,
        bytes: &[u8],
        dont_fragment: bool,
    ) -> io::Result<()> {
        self.set_dont_fragment(dont_fragment)?;
        let wants_source = source.ip.is_some() || source.ifindex != 0;
        let iov = [IoSlice::new(bytes)];
        let fd = self.fd.as_raw_fd();
        let sent = if self.v6 {
            let to = match to {
                SocketAddr::V4(v4) => SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0),
                SocketAddr::V6(v6) => v6,
            };
            let any = if to.ip().to_ipv4_mapped().is_some() {
                std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped()
            } else {
                Ipv6Addr::UNSPECIFIED
            };
            let ip = match source.ip {
                Some(IpAddr::V4(v4)) => v4.to_ipv6_mapped(),
                Some(IpAddr::V6(v6)) => v6,
                None => any,
            };
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
                ipi6_ifindex: source.ifindex,
            };
            let info = [ControlMessage::Ipv6PacketInfo(&info)];
            let info = if wants_source { &info[..] } else { &[] };
            sendmsg(fd, &iov, info, MsgFlags::empty(), Some(&SockaddrIn6::from(to)))
        } else {
            let SocketAddr::V4(to) = to else {
                return Err(io::Error::from(Errno::EAFNOSUPPORT));
            };
            let ip = match source.ip {
                Some(IpAddr::V4(v4)) => v4.octets(),
                _ => [0; 4],
            };
            let info = libc::in_pktinfo {
                ipi_ifindex: source.ifindex as libc::c_int,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(ip) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let info = [ControlMessage::Ipv4PacketInfo(&info)];
            let info = if wants_source { &info[..] } else { &[] };
            sendmsg(fd, &iov, info, MsgFlags::empty(), Some(&SockaddrIn::from(to)))
        };
        Ok(sent.map(drop)?)
    }

    /// None if nothing waits. An error is an ICMP answer to an earlier send: a hint only.
    pub fn receive(&mut self) -> io::Result<Option<Datagram<'_>>> {
        let mut space = nix::cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
        let mut iov = [IoSliceMut::new(&mut self.buffer)];
        let fd = self.fd.as_raw_fd();
        let received =
            recvmsg::<SockaddrStorage>(fd, &mut iov, Some(&mut space), MsgFlags::empty());
        let received = match received {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut to = Source::default();
        for message in received.cmsgs()? {
            match message {
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    let ip = IpAddr::from(info.ipi6_addr.s6_addr).to_canonical();
                    to = Source { ip: Some(ip), ifindex: info.ipi6_ifindex };
                }
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    let ip = IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes());
                    to = Source { ip: Some(ip), ifindex: info.ipi_ifindex as u32 };
                }
                _ => {}
            }
        }
        let from = received.address.as_ref().and_then(|address| match address {
            address if address.as_sockaddr_in().is_some() => {
                address.as_sockaddr_in().map(|&v4| SocketAddr::V4(v4.into()))
            }
            address => address.as_sockaddr_in6().map(|&v6| SocketAddr::V6(v6.into())),
        });
        let len = received.bytes;
        let Some(from) = from else { return Ok(None) };
        // The zone of a link-local address is kept: it is part of where the answer goes.
        let from = match from {
            SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_none() => from,
            _ => SocketAddr::new(from.ip().to_canonical(), from.port()),
        };
        Ok(Some(Datagram { from, to, bytes: &mut self.buffer[..len] }))
    }

    /// Proofs must not be cut on the way, nor by ourselves; everything else may.
    fn set_dont_fragment(&self, on: bool) -> io::Result<()> {
        if self.dont_fragment.get() == Some(on) {
            return Ok(());
        }
        // PROBE, because what the kernel believes of the path is what is to be found out.
        let (v4, v6) = if on {
            (Ipv4PathMtuDiscovery::PROBE, Ipv6PathMtuDiscovery::PROBE)
        } else {
            (Ipv4PathMtuDiscovery::DONT, Ipv6PathMtuDiscovery::DONT)
        };
        set_ip_mtu_discover(&self.fd, v4)?;
        if self.v6 {
            set_ipv6_mtu_discover(&self.fd, v6)?;
        }
        self.dont_fragment.set(Some(on));
        Ok(())
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
