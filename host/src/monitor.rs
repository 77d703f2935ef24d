//! The kernel's news of interfaces and, where wanted, of routes, neighbours and addresses.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkFlags;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::route_socket::read;

/// Multicast groups of `linux/rtnetlink.h`.
const GROUP_LINK: u32 = 1;
const GROUP_NEIGHBOURS: u32 = 3;
/// Addresses and routes of both families.
const GROUPS_OF_ROUTES: [u32; 4] = [5, 7, 9, 11];

/// A socket for news.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
}

/// What kinds of news came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Addresses of this host changed.
    pub addresses: bool,
    /// An interface changed, came or went.
    pub links: bool,
    /// Routes, neighbours or addresses changed; links too.
    pub paths: bool,
}

impl Monitor {
    /// News of interfaces only.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        socket.add_membership(GROUP_LINK)?;
        Ok(Self { socket })
    }

    /// Also news of neighbours, addresses and routes, or no longer. On most hosts there are some
    /// every minute, so whoever does not need them should not be woken by them.
    pub fn follow_paths(&self, follow: bool) -> io::Result<()> {
        let groups = GROUPS_OF_ROUTES.iter().chain(&[GROUP_NEIGHBOURS]);
        groups.copied().try_for_each(|group| match follow {
            true => self.socket.add_membership(group),
            false => self.socket.drop_membership(group),
        })
    }

    /// Also news of addresses and routes, which are seldom; not of neighbours, which are not.
    pub fn follow_routes(&self) -> io::Result<()> {
        GROUPS_OF_ROUTES.iter().try_for_each(|&group| self.socket.add_membership(group))
    }

    /// Takes all news that wait; what they say of one interface: whether it was up, in order. An
    /// error: news were lost.
    pub fn take_states(&self, index: u32) -> io::Result<Vec<bool>> {
        let mut states = Vec::new();
        loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => states.extend(state(&bytes, index)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(states),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes all news that wait.
    pub fn take(&self) -> News {
        let mut news = News::default();
        loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => news.note(&bytes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return news,
                // News were lost: anything may have changed.
                Err(_) => return News::ALL,
            }
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the socket, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

impl News {
    pub const ALL: Self = Self { addresses: true, links: true, paths: true };

    /// Message types of `linux/rtnetlink.h`: links are 16 and 17, addresses 20 and 21; all concern
    /// paths.
    fn note(&mut self, bytes: &[u8]) {
        let kind = bytes.get(4..6).map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]));
        self.links |= matches!(kind, 16 | 17);
        self.addresses |= matches!(kind, 20 | 21);
        self.paths = true;
    }
}

/// What a message says of the interface `index`: up or not; none if it is of something else.
fn state(bytes: &[u8], index: u32) -> Option<bool> {
    match read(bytes).ok()?.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
        ) if link.header.index == index => Some(link.header.flags.contains(LinkFlags::Up)),
        _ => None,
    }
}
