//! One TCP connection to whichever address of a host answers first (RFC 8305, Happy Eyeballs).

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use millrace_path::Instant;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use super::failure::RelayFailure;
use crate::limits;

/// Attempts at the addresses of one host.
#[derive(Debug)]
pub struct Dial {
    waiting: VecDeque<SocketAddr>,
    running: Vec<(Socket, SocketAddr)>,
    mark: Option<u32>,
    next_at: Instant,
    last: Option<RelayFailure>,
    /// The mark could not be set: it has not the right to.
    pub unmarked: bool,
}

/// Where it stands.
#[derive(Debug)]
pub enum Dialled {
    NotYet,
    Connected(TcpStream, SocketAddr),
    Failed(RelayFailure),
}

impl Dial {
    pub fn new(addresses: &[IpAddr], port: u16, mark: Option<u32>, now: Instant) -> Self {
        let waiting = interleaved(addresses).map(|ip| SocketAddr::new(ip, port)).collect();
        Self { waiting, running: Vec::new(), mark, next_at: now, last: None, unmarked: false }
    }

    /// Looks at the attempts, and begins those that are due. Sockets that are to be waited for are
    /// in `epoll`.
    pub fn poll(&mut self, now: Instant, epoll: &OwnedFd) -> Dialled {
        let mut index = 0;
        while let Some((socket, address)) = self.running.get(index) {
            let address = *address;
            match outcome(socket) {
                Ok(false) => index += 1,
                Ok(true) => {
                    let (socket, _) = self.running.swap_remove(index);
                    return Dialled::Connected(socket.into(), address);
                }
                Err(error) => {
                    self.running.swap_remove(index);
                    self.failed(address, error, now);
                }
            }
        }
        while self.next_at <= now
            && let Some(address) = self.waiting.pop_front()
        {
            self.next_at = now + limits::RELAY_ATTEMPT_GAP;
            match self.begin(address, epoll) {
                Ok(socket) => self.running.push((socket, address)),
                Err(error) => self.failed(address, error, now),
            }
        }
        match self.last.take() {
            Some(last) if self.running.is_empty() && self.waiting.is_empty() => {
                Dialled::Failed(last)
            }
            last => {
                self.last = last;
                Dialled::NotYet
            }
        }
    }

    /// When the next attempt is due.
    pub fn deadline(&self) -> Option<Instant> {
        (!self.waiting.is_empty()).then_some(self.next_at)
    }

    /// The next address need not wait for one that is refused.
    fn failed(&mut self, address: SocketAddr, error: io::Error, now: Instant) {
        self.last = Some(RelayFailure::Connect { address, error });
        self.next_at = now;
    }

    fn begin(&mut self, address: SocketAddr, epoll: &OwnedFd) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_mss(limits::RELAY_SEGMENT_LEN)?;
        socket.set_tcp_user_timeout(Some(limits::RELAY_UNACKNOWLEDGED_LIMIT))?;
        socket.set_tcp_notsent_lowat(limits::RELAY_UNSENT_MAX)?;
        let interval = Duration::from_secs(limits::RELAY_KEEPALIVE_INTERVAL_S);
        let keepalive = TcpKeepalive::new().with_time(interval).with_interval(interval);
        socket.set_tcp_keepalive(&keepalive)?;
        if let Some(mark) = self.mark {
            match socket.set_mark(mark) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    self.unmarked = true;
                }
                other => other?,
            }
        }
        match socket.connect(&address.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => {
                return Err(error);
            }
            _ => {}
        }
        epoll::add(epoll, &socket, EventData::new_u64(0), EventFlags::OUT)?;
        Ok(socket)
    }
}

/// True once connected.
fn outcome(socket: &Socket) -> io::Result<bool> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

/// The addresses in their order of preference, families in turn.
fn interleaved(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
    let first_is_v6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (first, second): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses.iter().partition(|address| address.is_ipv6() == first_is_v6);
    let longest = first.len().max(second.len());
    let in_turn =
        (0..longest).flat_map(move |at| [first.get(at).copied(), second.get(at).copied()]);
    in_turn.flatten().take(limits::RELAY_ADDRESSES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_tried_in_turn_beginning_with_the_preferred() {
        let all: Vec<IpAddr> = ["::1", "::2", "::3", "10.0.0.1", "10.0.0.2"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let order: Vec<String> = interleaved(&all).map(|ip| ip.to_string()).collect();
        assert_eq!(order, ["::1", "10.0.0.1", "::2", "10.0.0.2", "::3"]);
        let many = vec![all[3]; 100];
        assert_eq!(interleaved(&many).count(), limits::RELAY_ADDRESSES_MAX);
    }
}
