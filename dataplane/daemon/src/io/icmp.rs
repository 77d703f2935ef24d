//! Raw sockets to tell a sender that its packet has no way through the tunnel.
//!
//! A raw socket and not the TUN device: the kernel then chooses the source address that the sender
//! expects, and does not take our own address on the tunnel for a forged one.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use millrace_wg::icmp::IcmpError;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Linux `icmp.h`: a set bit keeps messages of that type away from the socket.
const ICMP_FILTER: libc::c_int = 1;
/// Linux `icmpv6.h`, the same.
const ICMPV6_FILTER: libc::c_int = 1;

/// One socket a family, where the host has it and lets us.
#[derive(Debug)]
pub struct IcmpSender {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl IcmpSender {
    /// Needs CAP_NET_RAW, once. Without it nobody is told, and the packets are counted as always.
    pub fn open() -> Self {
        let made = |result: io::Result<Socket>, family: &str| {
            result
                .map_err(|error| {
                    tracing::warn!(family, %error, "senders of packets that go nowhere are not told");
                })
                .ok()
        };
        Self {
            v4: made(socket(Domain::IPV4, Protocol::ICMPV4), "IPv4"),
            v6: made(socket(Domain::IPV6, Protocol::ICMPV6), "IPv6"),
        }
    }

    /// Tells the sender; a host that cannot be told is not an error of ours.
    pub fn send(&self, answer: &IcmpError) {
        let socket = match answer.to {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        if let Some(socket) = socket {
            let to = SockAddr::from(SocketAddr::new(answer.to, 0));
            let _ = socket.send_to(&answer.message, &to);
        }
    }
}

/// A socket that never receives.
fn socket(domain: Domain, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_nonblocking(true)?;
    let (level, name, len) = if domain == Domain::IPV4 {
        (libc::SOL_RAW, ICMP_FILTER, 4)
    } else {
        (libc::SOL_ICMPV6, ICMPV6_FILTER, 32)
    };
    let refuse_all = [u32::MAX; 8];
    // SAFETY: the option is the first `len` bytes of an array that is at least as long and outlives
    // the call.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, refuse_all.as_ptr().cast(), len)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}
