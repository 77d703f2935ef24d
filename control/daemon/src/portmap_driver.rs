//! Opens the tunnel's port on the router: sockets and time for [`PortMapper`].
//!
//! How the owner uses it, one driver for each family:
//!
//! 1. `PortmapDriver::new(Config { internal_port, lifetime: MAPPING_LIFETIME, nonce })`; a nonce that
//!    is kept over restarts lets a new process renew what the one before left.
//! 2. `set_router(now, Some(Router { address, own, ifindex }))` at the start and after every change of
//!    the network, also one that changed nothing here; `None` where there is no default route.
//! 3. In the event loop: wait for `interest()` and `deadline()`, call `handle(now)`, then take
//!    `next_event()` until there is none. `Mapped` is a candidate (kind `PortMapped`), and one of our
//!    own addresses that must not be probed; `Lost` takes both away; `Answered` is for netcheck.
//! 4. `suspect(now)` when STUN sees another address or direct paths die.
//! 5. At the end `finish()`: gives the port back, in a second at most.
//!
//! Nothing here waits or fails for good: what goes wrong is logged once, counted, and tried again.

mod http;

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use millrace_path::Instant;
use millrace_path::portmap::{
    Answered, Config, Event, Input, Output, PortMapper, Router, Transmit,
};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, Socket, Type};

use self::http::{Http, Progress};
use crate::clock;
use crate::limits::{PORTMAP_DATAGRAM_LEN_MAX, TURN_MAX};

/// Routers of routers hear searches too, as UPnP asks.
const SEARCH_HOPS: u32 = 2;

/// The mapper with its sockets.
#[derive(Debug)]
pub struct PortmapDriver {
    mapper: PortMapper,
    /// Holds whatever descriptors there are.
    epoll: OwnedFd,
    router: Option<Router>,
    socket: Option<UdpSocket>,
    http: Option<Http>,
    deadline: Option<Instant>,
    events: VecDeque<Event>,
    send_failures: u64,
    connect_failures: u64,
}

impl PortmapDriver {
    pub fn new(config: Config) -> io::Result<Self> {
        Ok(Self {
            mapper: PortMapper::new(config),
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            router: None,
            socket: None,
            http: None,
            deadline: None,
            events: VecDeque::new(),
            send_failures: 0,
            connect_failures: 0,
        })
    }

    /// Which router there is now. The same one again means that something changed around it.
    pub fn set_router(&mut self, now: Instant, router: Option<Router>) {
        if router != self.router || self.socket.is_none() {
            self.socket = None;
            self.router = None;
            if let Some(router) = router {
                match self.open(router) {
                    Ok(socket) => (self.socket, self.router) = (Some(socket), Some(router)),
                    Err(error) => tracing::warn!(
                        own = %router.own,
                        %error,
                        "no socket towards the router: its port mapping is not used"
                    ),
                }
            }
        }
        self.input(now, Input::Network(self.router));
    }

    /// Something looks as if the mapping were gone.
    pub fn suspect(&mut self, now: Instant) {
        self.input(now, Input::Suspicion);
    }

    /// What to wait for: the same descriptor for as long as the driver lives.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.epoll.as_fd(), PollFlags::IN)
    }

    /// When [`Self::handle`] must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Does what is due. Then take [`Self::next_event`] until there is none.
    pub fn handle(&mut self, now: Instant) {
        self.read_datagrams(now);
        self.drive_http(now);
        if self.deadline.is_some_and(|at| at <= now) {
            self.input(now, Input::Timeout);
        }
    }

    /// What happened, oldest first.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Which protocols the router answers.
    pub fn answered(&self) -> Answered {
        self.mapper.answered()
    }

    /// Where we are reached outside.
    pub fn external(&self) -> Option<SocketAddr> {
        self.mapper.external()
    }

    /// What was not used or not sent, by name and how often.
    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let ours = [
            ("portmap_send_failed", self.send_failures),
            ("portmap_connect_failed", self.connect_failures),
        ];
        self.mapper.refused().chain(ours)
    }

    /// Gives the port back, and waits for the router's word a second at most.
    pub fn finish(mut self) {
        self.input(clock::now(), Input::Shutdown);
        loop {
            if self.events.drain(..).any(|event| event == Event::Closed) {
                return;
            }
            let Some(deadline) = self.deadline else { return };
            let timeout = clock::until(deadline);
            let mut fds = [PollFd::new(&self.epoll, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "the router's port mapping was not given back");
                    return;
                }
            }
            self.handle(clock::now());
        }
    }

    fn input(&mut self, now: Instant, input: Input<'_>) {
        self.mapper.handle(now, input, &mut rand::rng());
        self.deadline = None;
        while let Some(output) = self.mapper.poll_output() {
            match output {
                Output::Event(event) => self.events.push_back(event),
                Output::Timeout(at, _) => self.deadline = Some(at),
                Output::Transmit(Transmit::Datagram { to, bytes }) => self.send(to, &bytes),
                Output::Transmit(Transmit::HttpEnd { exchange }) => {
                    self.http.take_if(|http| http.exchange() == exchange);
                }
                Output::Transmit(Transmit::Http { exchange, to, request }) => {
                    let Some(router) = self.router else { continue };
                    match Http::start(&self.epoll, exchange, router.own, to, request) {
                        Ok(http) => self.http = Some(http),
                        Err(error) => {
                            // The mapper's own deadline ends the exchange.
                            self.connect_failures += 1;
                            tracing::debug!(%to, %error, "the router's UPnP is not reached");
                        }
                    }
                }
            }
        }
    }

    fn read_datagrams(&mut self, now: Instant) {
        let mut buffer = [0; PORTMAP_DATAGRAM_LEN_MAX];
        for _ in 0..TURN_MAX {
            let Some(socket) = &self.socket else { return };
            match socket.recv_from(&mut buffer) {
                Ok((len, from)) => {
                    self.input(now, Input::Datagram { from, bytes: &buffer[..len] });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // An ICMP error of an earlier datagram: silence says the same.
                Err(_) => {}
            }
        }
    }

    fn drive_http(&mut self, now: Instant) {
        for _ in 0..TURN_MAX {
            let Some(http) = &mut self.http else { return };
            let exchange = http.exchange();
            let mut buffer = [0; PORTMAP_DATAGRAM_LEN_MAX];
            match http.drive(&self.epoll, &mut buffer) {
                Progress::Waits => return,
                Progress::Read(len) => {
                    self.input(now, Input::HttpBytes { exchange, bytes: &buffer[..len] });
                }
                Progress::Ended => {
                    self.http = None;
                    self.input(now, Input::HttpEnd { exchange });
                }
                Progress::Failed(error) => {
                    tracing::debug!(%error, "the router's UPnP broke off");
                    self.connect_failures += 1;
                    self.http = None;
                    self.input(now, Input::HttpEnd { exchange });
                }
            }
        }
    }

    fn send(&mut self, to: SocketAddr, bytes: &[u8]) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send_to(bytes, to) {
            self.send_failures += 1;
            tracing::debug!(%to, %error, "not sent");
        }
    }

    /// A socket that is bound to our address towards the router: PCP wants the address of its
    /// requests to be that of the mapping.
    fn open(&self, router: Router) -> io::Result<UdpSocket> {
        let domain = if router.own.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        let own: SocketAddr = match router.own {
            IpAddr::V4(own) => {
                socket.set_multicast_if_v4(&own)?;
                socket.set_multicast_ttl_v4(SEARCH_HOPS)?;
                (own, 0).into()
            }
            IpAddr::V6(own) => {
                let scope = if own.is_unicast_link_local() { router.ifindex } else { 0 };
                SocketAddrV6::new(own, 0, 0, scope).into()
            }
        };
        socket.bind(&own.into())?;
        let socket = UdpSocket::from(socket);
        epoll::add(&self.epoll, &socket, EventData::new_u64(0), EventFlags::IN)?;
        Ok(socket)
    }
}
