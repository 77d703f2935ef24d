//! Who gets a datagram: segments of hosts and NATs around the Internet.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use millrace_path::Instant;

use super::nat::{Nat, Segment};

/// A gateway's socket: which gateway, which of its legs.
pub type Socket = (usize, usize);

#[derive(Default)]
pub struct Internet {
    pub nats: Vec<Nat>,
    hosts: BTreeMap<(Segment, SocketAddr), Socket>,
    /// Outsides of NATs.
    doors: BTreeMap<(Segment, IpAddr), usize>,
    servers: Vec<SocketAddr>,
    /// Datagrams whose source was their destination: a LAND attack's.
    pub land: u64,
}

/// Where a datagram came out.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// As the receiver sees it.
    pub source: SocketAddr,
    /// None: a server on the Internet.
    pub socket: Option<Socket>,
    /// It stayed in the segment where it was sent.
    pub near: bool,
}

/// Who has an address.
#[derive(Clone, Copy, Debug)]
struct Found {
    socket: Socket,
    segment: Segment,
    /// As the receiver sees it.
    source: SocketAddr,
}

impl Internet {
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, ..Self::default() }
    }

    pub fn add_nat(&mut self, nat: Nat) -> usize {
        self.doors.insert((nat.outer, nat.public_ip), self.nats.len());
        self.nats.push(nat);
        self.nats.len() - 1
    }

    /// The network behind this NAT64 has this IPv6 address, which it does not translate.
    pub fn add_ipv6_behind(&mut self, nat64: usize, ip: IpAddr) {
        self.doors.insert((self.nats[nat64].outer, ip), nat64);
    }

    pub fn renumber(&mut self, at: usize, ip: IpAddr) {
        let nat = &mut self.nats[at];
        self.doors.remove(&(nat.outer, nat.public_ip));
        self.doors.insert((nat.outer, ip), at);
        nat.public_ip = ip;
        nat.flush();
    }

    pub fn add_host(&mut self, segment: Segment, address: SocketAddr, socket: Socket) {
        assert!(self.hosts.insert((segment, address), socket).is_none(), "{address} is taken");
    }

    pub fn remove_host(&mut self, segment: Segment, address: SocketAddr) {
        self.hosts.remove(&(segment, address));
    }

    /// Carries a datagram outwards until its destination is found. None: dropped.
    pub fn carry(
        &mut self,
        now: Instant,
        from: SocketAddr,
        mut segment: Segment,
        mut to: SocketAddr,
    ) -> Option<Arrival> {
        let (start, mut source) = (segment, from);
        let mut came_through = None;
        if source == to {
            self.land += 1;
            return None;
        }
        loop {
            if let Some(found) = self.find(now, segment, to, source, came_through) {
                let near = segment == start && came_through.is_none();
                let near = near && found.is_some_and(|found| found.segment == start);
                return found.map(|found| Arrival {
                    source: found.source,
                    socket: Some(found.socket),
                    near,
                });
            }
            let Some(at) = segment else { break };
            if let Some(prefix) = self.nats[at].nat64 {
                let IpAddr::V6(ip) = to.ip() else { return None };
                let Some(ip) = prefix.extract(ip) else {
                    (came_through, segment) = (Some(at), self.nats[at].outer);
                    continue;
                };
                to.set_ip(ip.into());
            }
            if to.ip() == self.nats[at].public_ip && !self.nats[at].hairpin {
                return None;
            }
            source = self.nats[at].outbound(now, source, to);
            came_through = Some(at);
            segment = self.nats[at].outer;
        }
        let known = self.servers.contains(&to);
        known.then_some(Arrival { source, socket: None, near: false })
    }

    /// Carries a datagram of a server on the Internet inwards: to whom, and as whose it is seen.
    pub fn arrive(
        &mut self,
        now: Instant,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<(Socket, SocketAddr)> {
        self.find(now, None, to, from, None)?.map(|found| (found.socket, found.source))
    }

    /// Who has this address in this segment, behind however many NATs, and in which segment.
    /// `Some(None)`: the datagram was dropped; `None`: nobody, look further out.
    fn find(
        &mut self,
        now: Instant,
        mut segment: Segment,
        mut to: SocketAddr,
        mut from: SocketAddr,
        mut came_through: Option<usize>,
    ) -> Option<Option<Found>> {
        let mut entered = false;
        loop {
            if let Some(socket) = self.hosts.get(&(segment, to)) {
                return Some(Some(Found { socket: *socket, segment, source: from }));
            }
            let Some(at) = self.doors.get(&(segment, to.ip())).copied() else {
                return entered.then_some(None);
            };
            if came_through == Some(at) && !self.nats[at].hairpin {
                return Some(None);
            }
            let translates = to.is_ipv4() || self.nats[at].nat64.is_none();
            if translates {
                let Some(inside) = self.nats[at].inbound(now, to, from) else { return Some(None) };
                to = inside;
                if let (Some(prefix), IpAddr::V4(ip)) = (self.nats[at].nat64, from.ip()) {
                    from.set_ip(prefix.synthesise(ip).into());
                }
            }
            (segment, came_through, entered) = (Some(at), None, true);
        }
    }
}
