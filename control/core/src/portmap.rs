//! A port through the router in front of us, by PCP, NAT-PMP or UPnP: found, kept, made again after
//! a reboot of the router, and given back.
//!
//! ```text
//!  Network ──► Seeking ──► Requesting ──► Holding ──► Closing ──► Closed
//!                │ nobody      │ denied      │  ▲ renewed
//!                ▼             ▼             └──┘
//!               Resting ◄──────┘
//! ```
//! All protocols are asked at once; the best that answers is used, and the others are known for
//! netcheck. One mapper is for one family: IPv4 behind a NAT, or IPv6 behind a firewall (PCP alone).
//!
//! Answers count only from the router's own address; of HTTP nothing but the router is spoken to.

mod epoch;
mod hear;
mod keep;
pub mod nat_pmp;
pub mod pcp;
mod seek;
mod status;
pub mod upnp;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::time::Duration;

use rand::RngCore;

use self::epoch::Epoch;
use self::pcp::Nonce;
pub use self::status::{Answered, Failure, Protocol, Refused, Status};
use self::upnp::{Said, Upnp};
use crate::candidate;
use crate::limits::{
    MAPPING_LIFETIME_MAX, MAPPING_LIFETIME_MIN, PORTMAP_CLOSE_TIME, PORTMAP_GAPS,
    PORTMAP_GATHER_TIME, PORTMAP_PROBE_TIME, PORTMAP_REST_MAX, PORTMAP_REST_MIN,
    REBOOT_CHECK_INTERVAL, REBOOT_REMAP_INTERVAL, RENEWAL_INTERVAL_MIN, RENEWAL_JITTER_PERCENT,
};
use crate::time::Instant;

/// Where a router hears NAT-PMP and PCP.
pub const SERVER_PORT: u16 = 5351;

/// What does not change while the process lives.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The tunnel's port here.
    pub internal_port: u16,
    /// What routers are asked for: [`crate::limits::MAPPING_LIFETIME`].
    pub lifetime: Duration,
    /// Random. Kept over restarts it also lets the next process renew what this one left.
    pub nonce: Nonce,
}

/// The router of one family, as the kernel's default route names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Router {
    pub address: IpAddr,
    /// Our address towards it, from which everything is sent; of the same family.
    pub own: IpAddr,
    /// The interface, without which a link-local address means nothing.
    pub ifindex: u32,
}

impl Router {
    fn at(&self, port: u16) -> SocketAddr {
        match self.address {
            IpAddr::V4(ip) => SocketAddrV4::new(ip, port).into(),
            IpAddr::V6(ip) => {
                let scope = if ip.is_unicast_link_local() { self.ifindex } else { 0 };
                SocketAddrV6::new(ip, port, 0, scope).into()
            }
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Input<'i> {
    /// The network changed, or the process started: which router there is now.
    Network(Option<Router>),
    /// A datagram at the mapper's socket.
    Datagram { from: SocketAddr, bytes: &'i [u8] },
    /// Some of the answer to an HTTP exchange.
    HttpBytes { exchange: u32, bytes: &'i [u8] },
    /// Its connection ended, or could not be made.
    HttpEnd { exchange: u32 },
    /// Something looks as if the mapping were gone: STUN sees another address, paths died.
    Suspicion,
    /// The instant of the last [`Output::Timeout`] is here.
    Timeout,
    /// The process ends: give the port back. [`Event::Closed`] follows, within
    /// [`PORTMAP_CLOSE_TIME`].
    Shutdown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Transmit(Transmit),
    Event(Event),
    Timeout(Instant, Reason),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// From [`Router::own`], and the same port of ours always.
    Datagram { to: SocketAddr, bytes: Vec<u8> },
    /// Connect, write the request, and hand in what comes back.
    Http { exchange: u32, to: SocketAddrV4, request: Vec<u8> },
    /// Close that connection: all is read, or it took too long.
    HttpEnd { exchange: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// News of which protocols the router answers.
    Answered(Answered),
    /// Outside we are reached there from now on; replaces the one before.
    Mapped(Mapped),
    /// We are not any more.
    Lost { external: SocketAddr, why: Lost },
    /// A protocol answered, but no mapping came of it: for the log.
    Failed { protocol: Protocol, failure: Failure },
    /// Nothing is left to be done: after [`Input::Shutdown`].
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub protocol: Protocol,
    pub external: SocketAddr,
    /// `None`: until somebody deletes it.
    pub lifetime: Option<Duration>,
    /// The address is a private one: there is another NAT outside, and who is beyond it does not
    /// reach us there.
    pub behind_nat: bool,
}

/// Why a mapping is none any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Another router, or none.
    Network,
    /// The router did not renew it in time.
    Expired,
    /// The router said that it will not renew it.
    Denied,
}

/// What a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Ask again which protocols there are, or take what answered.
    Probe,
    /// A request is unanswered.
    Retry,
    Renewal,
    /// The mapping ends unless it is renewed.
    Expiry,
    /// Ask the router whether it was restarted.
    RebootCheck,
    /// Look again for a protocol after none worked.
    Rest,
    Http,
    Close,
}

/// Sans-IO: [`Self::handle`] what happened, then do what [`Self::poll_output`] says until it says
/// nothing more.
#[derive(Debug)]
pub struct PortMapper {
    config: Config,
    router: Option<Router>,
    stage: Stage,
    /// Asks for protocols until then; besides the stage, as a mapping by one does not end it.
    probe: Option<Probe>,
    /// As it was told: what was known stays so while it is asked again.
    answered: Answered,
    /// What this probe brought.
    answered_now: Answered,
    /// Protocols that answered, but not with a mapping, since the last probe.
    failed: [bool; Protocol::ALL.len()],
    mapping: Option<Mapping>,
    /// What is asked for: at first the tunnel's port, then what the router gave.
    port: u16,
    pcp_epoch: Epoch,
    nat_pmp_epoch: Epoch,
    /// NAT-PMP says address and port in two answers.
    nat_pmp_address: Option<Ipv4Addr>,
    upnp: Option<Upnp>,
    /// HTTP exchanges of conversations that are over.
    upnp_exchanges: u32,
    /// The router was asked whether it was restarted, and did not answer yet.
    checking: bool,
    remapped_at: Option<Instant>,
    rest: Duration,
    refused: [u64; Refused::ALL.len()],
    outputs: VecDeque<Output>,
    told: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No router, or nothing to do yet.
    Idle,
    /// Waiting for a protocol to answer.
    Seeking,
    /// `retry` is for datagrams; UPnP has its own.
    Requesting {
        protocol: Protocol,
        retry: Retry,
    },
    Holding {
        check_at: Instant,
    },
    Resting {
        until: Instant,
    },
    Closing {
        protocol: Protocol,
        retry: Retry,
        until: Instant,
    },
    Closed,
}

/// When a datagram is sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Retry {
    sent: usize,
    at: Instant,
}

impl Retry {
    /// One was sent just now.
    fn new(now: Instant) -> Self {
        Self { sent: 1, at: now + PORTMAP_GAPS[0] }
    }

    /// Another one was sent; `None`: there was enough time for an answer to the last of them.
    fn next(self, now: Instant) -> Option<Self> {
        let gap = PORTMAP_GAPS.get(self.sent)?;
        Some(Self { sent: self.sent + 1, at: now + *gap })
    }
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    started_at: Instant,
    retry: Retry,
    /// The less preferred protocols were let in.
    gathered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    protocol: Protocol,
    external: SocketAddr,
    expires_at: Option<Instant>,
    renew_at: Instant,
}

impl PortMapper {
    pub fn new(config: Config) -> Self {
        Self {
            config,
            router: None,
            stage: Stage::Idle,
            probe: None,
            answered: Answered::default(),
            answered_now: Answered::default(),
            failed: [false; 3],
            mapping: None,
            port: config.internal_port,
            pcp_epoch: Epoch::default(),
            nat_pmp_epoch: Epoch::default(),
            nat_pmp_address: None,
            upnp: None,
            upnp_exchanges: 0,
            checking: false,
            remapped_at: None,
            rest: PORTMAP_REST_MIN,
            refused: [0; Refused::ALL.len()],
            outputs: VecDeque::new(),
            told: false,
        }
    }

    pub fn handle<R: RngCore>(&mut self, now: Instant, input: Input<'_>, random: &mut R) {
        self.told = false;
        if self.stage == Stage::Closed {
            return;
        }
        let result = match input {
            Input::Network(router) => {
                self.network(now, router);
                Ok(())
            }
            Input::Datagram { from, bytes } => self.datagram(now, random, from, bytes),
            Input::HttpBytes { exchange, bytes } => match &mut self.upnp {
                Some(upnp) => upnp.http_bytes(now, random, exchange, bytes),
                None => Err(Refused::Unasked),
            },
            Input::HttpEnd { exchange } => match &mut self.upnp {
                Some(upnp) => upnp.http_end(now, random, exchange),
                None => Ok(()),
            },
            Input::Suspicion => {
                self.suspect(now);
                Ok(())
            }
            Input::Timeout => self.timeout(now, random),
            Input::Shutdown => {
                self.close(now);
                Ok(())
            }
        };
        if let Err(refused) = result {
            self.refused[refused as usize] += 1;
        }
        self.hear_upnp(now, random);
    }

    /// What to do next; after the last [`Output::Timeout`], nothing.
    pub fn poll_output(&mut self) -> Option<Output> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        if self.told {
            return None;
        }
        self.told = true;
        self.deadline().map(|(at, reason)| Output::Timeout(at, reason))
    }

    /// Which protocols the router answers.
    pub fn answered(&self) -> Answered {
        self.answered
    }

    /// Where we are reached outside.
    pub fn external(&self) -> Option<SocketAddr> {
        self.mapping.map(|mapping| mapping.external)
    }

    /// What was not used, by name and how often.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Refused::ALL.into_iter().map(|(refused, name)| (name, self.refused[refused as usize]))
    }
}

/// Whether an address can be one where we are reached.
fn is_usable(ip: IpAddr) -> bool {
    candidate::is_host_elsewhere(ip) && !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Whether the whole internet reaches an address, as far as the address tells.
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && b & 0xc0 == 64;
            let protocol_assignments = ip.octets()[..3] == [192, 0, 0];
            is_usable(ip.into())
                && !(ip.is_private() || ip.is_link_local() || shared || protocol_assignments)
        }
        IpAddr::V6(ip) => is_usable(ip.into()) && !ip.is_unique_local(),
    }
}
