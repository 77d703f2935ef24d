//! Netcheck with sockets: for the daemon, which lends it the tunnel's port, and for the command,
//! which has a port of its own.
//!
//! The owner waits until the one descriptor is readable or [`NetcheckDriver::deadline`] has passed,
//! calls [`NetcheckDriver::handle`], and takes [`NetcheckDriver::next_event`] until there is none.
//! What it gets on the tunnel's port as STUN goes in by [`NetcheckDriver::datagram`].

mod connections;
mod portal;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use millrace_path::Instant;
use millrace_path::netcheck::{
    Depth, Input, Netcheck, Output, PortMapping, Report, Server, Setup, Socket,
};
use rustix::event::PollFlags;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use self::connections::Connections;
use self::portal::Portals;
use crate::limits::NETCHECK_TURN_MAX;
use crate::relay_client::RelayConfig;

/// Longer ones are no STUN answers.
const DATAGRAM_MAX: usize = 1500;

/// Whom to ask and what for.
#[derive(Clone, Debug)]
pub struct NetcheckSetup {
    pub servers: Vec<NetcheckServer>,
    /// Addresses of this host, without those of tunnels.
    pub addresses: Vec<IpAddr>,
    /// The tunnel's port.
    pub port: u16,
    /// Name of the home relay.
    pub home: Option<String>,
    pub port_mapping: PortMapping,
    pub depth: Depth,
    /// Whom the tunnel's port wrote to lately, beside the servers.
    pub written_to: Vec<SocketAddr>,
}

/// A relay or a STUN server.
#[derive(Clone, Debug)]
pub struct NetcheckServer {
    /// A relay's URL, or host:port.
    pub name: String,
    /// How it is reached, if it is a relay.
    pub relay: Option<RelayConfig>,
    /// Its STUN service.
    pub stun: Vec<SocketAddr>,
}

/// What the owner must do or may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetcheckEvent {
    /// Send from the tunnel's port.
    Send {
        to: SocketAddr,
        datagram: Vec<u8>,
    },
    /// The tunnel's port is seen so from there.
    Mapped {
        by: SocketAddr,
        mapped: SocketAddr,
    },
    Done(Box<Report>),
}

#[derive(Debug)]
pub struct NetcheckDriver {
    core: Netcheck,
    /// Holds all descriptors below.
    epoll: OwnedFd,
    /// Of one check, by purpose and whether it is IPv4.
    sockets: BTreeMap<(Socket, bool), UdpSocket>,
    connections: Connections,
    portals: Portals,
    relays: BTreeMap<String, RelayConfig>,
    events: VecDeque<NetcheckEvent>,
    deadline: Option<Instant>,
}

impl NetcheckDriver {
    /// Fails where the system has no more descriptors.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let (connections, portals) = (Connections::new()?, Portals::new()?);
        epoll::add(&epoll, &connections, EventData::new_u64(0), EventFlags::IN)?;
        epoll::add(&epoll, &portals, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self {
            core: Netcheck::default(),
            epoll,
            sockets: BTreeMap::new(),
            connections,
            portals,
            relays: BTreeMap::new(),
            events: VecDeque::new(),
            deadline: None,
        })
    }

    /// Begins; a check that runs ends without a report.
    pub fn start(&mut self, now: Instant, setup: NetcheckSetup) {
        self.close();
        let NetcheckSetup { servers, addresses, port, home, port_mapping, depth, written_to } =
            setup;
        let depth = match depth {
            Depth::Kinds { .. } => Depth::Kinds { asker_port: self.open_asker() },
            depth => depth,
        };
        let server = |server: NetcheckServer| {
            let is_relay = server.relay.is_some();
            if let Some(config) = server.relay {
                self.relays.insert(server.name.clone(), config);
            }
            Server { name: server.name, is_relay, stun: server.stun }
        };
        let servers = servers.into_iter().map(server).collect();
        let setup = Setup { servers, addresses, port, home, port_mapping, depth, written_to };
        self.input(now, Input::Start(setup));
    }

    pub fn is_running(&self) -> bool {
        self.core.is_running()
    }

    /// What arrived as STUN on the tunnel's port. `from` is canonical.
    pub fn datagram(&mut self, now: Instant, from: SocketAddr, bytes: &[u8]) {
        self.input(now, Input::Datagram { socket: Socket::Tunnel, from, bytes });
    }

    /// The tunnel's port wrote to somebody whom this driver did not name.
    pub fn wrote(&mut self, now: Instant, to: SocketAddr) {
        if self.is_running() {
            self.core.handle(now, Input::Wrote(to), &mut rand::rng());
        }
    }

    /// What the owner was to send there could not leave.
    pub fn unsendable(&mut self, now: Instant, to: SocketAddr) {
        self.input(now, Input::Unsendable { socket: Socket::Tunnel, to });
    }

    /// What is known of the router by now.
    pub fn port_mapping(&mut self, now: Instant, port_mapping: PortMapping) {
        self.input(now, Input::PortMapping(port_mapping));
    }

    /// What to wait for: the same descriptor for as long as the driver lives.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.epoll.as_fd(), PollFlags::IN)
    }

    /// When [`Self::handle`] must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline.into_iter().chain(self.connections.deadline()).min()
    }

    /// Does what is due. Then take [`Self::next_event`] until there is none.
    pub fn handle(&mut self, now: Instant) {
        self.connections.handle(now);
        while let Some((relay, report)) = self.connections.next() {
            self.input(now, Input::Connected { relay: &relay, report });
        }
        while let Some((relay, captive)) = self.portals.next() {
            self.input(now, Input::Portal { relay: &relay, captive });
        }
        self.receive(now);
        if self.deadline.is_some_and(|at| at <= now) {
            self.input(now, Input::Timeout);
        }
    }

    pub fn next_event(&mut self) -> Option<NetcheckEvent> {
        self.events.pop_front()
    }

    /// How often each refusal of an answer happened, since the start.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.core.refused()
    }

    fn input(&mut self, now: Instant, input: Input<'_>) {
        self.core.handle(now, input, &mut rand::rng());
        self.deadline = None;
        let mut unsendable = Vec::new();
        while let Some(output) = self.core.poll_output() {
            match output {
                Output::Transmit { socket: Socket::Tunnel, to, datagram } => {
                    self.events.push_back(NetcheckEvent::Send { to, datagram });
                }
                Output::Transmit { socket, to, datagram } => {
                    if let Err(error) = self.send(socket, to, &datagram) {
                        tracing::debug!(%to, %error, "netcheck");
                        unsendable.push((socket, to));
                    }
                }
                Output::Connect { relay } => {
                    if let Some(config) = self.relays.get(&relay) {
                        self.connections.begin(now, relay, config.clone());
                    }
                }
                Output::LookForPortal { relay } => {
                    if let Some(config) = self.relays.get(&relay) {
                        self.portals.look(relay, config.url.clone());
                    }
                }
                Output::Mapped { by, mapped } => {
                    self.events.push_back(NetcheckEvent::Mapped { by, mapped });
                }
                Output::Done(report) => {
                    self.events.push_back(NetcheckEvent::Done(report));
                    self.close();
                }
                Output::Timeout(at, _) => self.deadline = Some(at),
            }
        }
        for (socket, to) in unsendable {
            self.input(now, Input::Unsendable { socket, to });
        }
    }

    /// The port of what asks on the tunnel's behalf, IPv4; 0: there is none.
    fn open_asker(&mut self) -> u16 {
        let port = self.open(Socket::Asker, true).and_then(|socket| socket.local_addr());
        port.map_or(0, |address| address.port())
    }

    fn send(&mut self, socket: Socket, to: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        match self.open(socket, to.is_ipv4())?.send_to(datagram, to) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// The socket for a purpose and family, from its first use on.
    fn open(&mut self, socket: Socket, ipv4: bool) -> io::Result<&UdpSocket> {
        let entry = match self.sockets.entry((socket, ipv4)) {
            Entry::Occupied(known) => return Ok(known.into_mut()),
            Entry::Vacant(entry) => entry,
        };
        let any: IpAddr =
            if ipv4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let new = UdpSocket::bind((any, 0))?;
        new.set_nonblocking(true)?;
        epoll::add(&self.epoll, &new, EventData::new_u64(0), EventFlags::IN)?;
        Ok(entry.insert(new))
    }

    fn receive(&mut self, now: Instant) {
        let mut buffer = [0; DATAGRAM_MAX];
        let mut arrived = Vec::new();
        for ((socket, _), fd) in &self.sockets {
            for _ in 0..NETCHECK_TURN_MAX {
                match fd.recv_from(&mut buffer) {
                    Ok((len, from)) => arrived.push((*socket, from, buffer[..len].to_vec())),
                    Err(_) => break,
                }
            }
        }
        for (socket, from, bytes) in arrived {
            self.input(now, Input::Datagram { socket, from, bytes: &bytes });
        }
    }

    /// Ends what one check had open. Threads end by themselves; what they say is refused.
    fn close(&mut self) {
        self.sockets.clear();
        self.connections.clear();
        self.relays.clear();
        self.deadline = None;
    }
}

impl AsFd for NetcheckDriver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
