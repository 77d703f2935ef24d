//! What the network around this host lets through, asked from the tunnel's own socket.
//!
//! Its driver owes it: a socket for each [`Socket`] and address family that it sends from, opened
//! when first needed and closed after [`Output::Done`] (the tunnel's own stays); connections to
//! relays; names resolved.
//!
//! A check sends a bounded number of small datagrams to the configured servers, to other addresses
//! that these servers name for themselves, and, only if it was told to, to our own addresses
//! outside, each time from another socket than the one at that address: firewalls take a datagram
//! from an address to itself for an attack.

mod check;
mod document;
mod lifetime;
mod outcome;
mod probe;
mod report;
mod verdict;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rand::RngCore;

pub use self::report::{Family, MappingLifetime, PortMapping, Report, ServerReport, TcpReport};
pub use self::verdict::{Prospect, Verdict};
use crate::limits::{FULL_CHECK_INTERVAL, NEAREST_RELAYS, NETCHECK_SERVERS_MAX};
use crate::netcheck::check::Check;
pub(crate) use crate::netcheck::check::is_believable;
use crate::time::Instant;

/// From which socket something goes, or on which it came. Each but the tunnel's has a port of its
/// own that nothing else uses while a check runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Socket {
    Tunnel,
    /// Talks to one server only, so that its filter is open for nobody else.
    Filtering,
    /// The other end of the hairpin.
    Neighbour,
    /// Each keeps a mapping for another time.
    Lifetime(u8),
    /// Asks on their behalf.
    Asker,
}

/// A relay or a STUN server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// As configured, each once: a relay's URL, or host:port.
    pub name: String,
    pub is_relay: bool,
    /// Its STUN service; the first of each family is asked.
    pub stun: Vec<SocketAddr>,
}

/// What one check is about.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    pub servers: Vec<Server>,
    /// Addresses of this host.
    pub addresses: Vec<IpAddr>,
    /// The tunnel's port inside.
    pub port: u16,
    /// Name of the home relay: asked also when only the nearest are.
    pub home: Option<String>,
    pub port_mapping: PortMapping,
    pub depth: Depth,
    /// Whom the tunnel's port wrote to lately, beside the servers: a NAT lets them in as if it
    /// filtered nothing. For [`Depth::Kinds`]; other checks filter on a port that is new.
    pub written_to: Vec<SocketAddr>,
}

/// How much is found out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Depth {
    /// The nearest relays and the home; all of [`Self::Full`] if the last full check is too old or
    /// found no way out by UDP. What it cannot see is taken from there.
    #[default]
    Nearest,
    /// All servers, and how the NAT maps and filters.
    Full,
    /// Only how the NAT maps and what it filters, on the tunnel's own port as it is in use: that one
    /// writes to none but the servers, and [`Socket::Asker`], which has this port inside, to where
    /// they say that they are too.
    Kinds { asker_port: u16 },
    /// Also every relay by TCP, whether the NAT hairpins, and how long it keeps a mapping: this
    /// long is waited at most.
    Diagnosis { hairpin: bool, lifetime: Option<Duration> },
}

impl Depth {
    fn is_kinds(self) -> bool {
        matches!(self, Self::Kinds { .. })
    }
}

/// What happened.
#[derive(Debug)]
pub enum Input<'i> {
    /// Begin; a check that runs ends without a report.
    Start(Setup),
    /// Something that the demultiplexer took for STUN.
    Datagram { socket: Socket, from: SocketAddr, bytes: &'i [u8] },
    /// A datagram could not leave: there is no way there from here.
    Unsendable { socket: Socket, to: SocketAddr },
    /// The tunnel's port wrote to somebody else than the check has it write to.
    Wrote(SocketAddr),
    /// What came of [`Output::Connect`].
    Connected { relay: &'i str, report: TcpReport },
    /// What came of [`Output::LookForPortal`]: whether somebody else answered; none: nobody did.
    Portal { relay: &'i str, captive: Option<bool> },
    /// The router answered, or will not any more.
    PortMapping(PortMapping),
    /// The instant of the last [`Output::Timeout`] is here.
    Timeout,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Transmit {
        socket: Socket,
        to: SocketAddr,
        datagram: Vec<u8>,
    },
    /// Connect to this relay as the tunnel would, and say how long it took.
    Connect {
        relay: String,
    },
    /// Ask this relay for `/generate_204` in the clear, with a challenge.
    LookForPortal {
        relay: String,
    },
    /// The tunnel's socket is seen from here at this address.
    Mapped {
        by: SocketAddr,
        mapped: SocketAddr,
    },
    Done(Box<Report>),
    /// Call `handle` with [`Input::Timeout`] at this instant, for this reason.
    Timeout(Instant, Reason),
}

/// What a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Ask, or ask again.
    Ask,
    /// No answer is an answer now.
    Silence,
    /// Try relays by TCP.
    RelaysByTcp,
    /// Send to ourselves, or stop listening for it.
    Hairpin,
    /// Report what is known.
    Report,
}

/// Why something that arrived was not used. Each is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Refused {
    /// No STUN answer, or a damaged one.
    Malformed,
    /// Nothing of ours: foreign, forged, or of an earlier check.
    Unasked,
    /// From somebody else than who was asked.
    WrongSource,
    /// On another socket than the one that asked.
    WrongSocket,
    /// Once more what was known.
    Duplicate,
    /// The server answered with an error.
    ServerError,
    /// A server named an address that is not to be asked.
    AddressUnusable,
    /// A word about a relay that nobody asked about.
    RelayUnasked,
}

impl Refused {
    /// Each with its name in counters.
    pub const ALL: [(Self, &'static str); 8] = [
        (Self::Malformed, "malformed"),
        (Self::Unasked, "unasked"),
        (Self::WrongSource, "wrong_source"),
        (Self::WrongSocket, "wrong_socket"),
        (Self::Duplicate, "duplicate"),
        (Self::ServerError, "server_error"),
        (Self::AddressUnusable, "address_unusable"),
        (Self::RelayUnasked, "relay_unasked"),
    ];
}

/// Sans-IO: [`Self::handle`] what happened, then do what [`Self::poll_output`] says until it says
/// nothing more.
#[derive(Debug, Default)]
pub struct Netcheck {
    check: Option<Check>,
    outputs: VecDeque<Output>,
    /// The deadline was told since the last input.
    told: bool,
    full: Option<(Instant, Report)>,
    refused: Counters,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters([u64; Refused::ALL.len()]);

impl Counters {
    fn count(&mut self, refused: Refused) {
        self.0[refused as usize] += 1;
    }
}

impl Netcheck {
    pub fn handle(&mut self, now: Instant, input: Input<'_>, random: &mut impl RngCore) {
        self.told = false;
        match input {
            Input::Start(setup) => self.start(now, setup),
            Input::Datagram { socket, from, bytes } => match &mut self.check {
                Some(check) => check.datagram(now, socket, from, bytes, &mut self.refused),
                None => self.refused.count(Refused::Unasked),
            },
            Input::Unsendable { socket, to } => {
                if let Some(check) = &mut self.check {
                    check.unsendable(now, socket, to, &mut self.refused);
                }
            }
            Input::Wrote(to) => {
                if let Some(check) = &mut self.check {
                    check.wrote(to);
                }
                return;
            }
            Input::Connected { relay, report } => {
                let known = self.check.as_mut().is_some_and(|check| check.connected(relay, report));
                self.refuse_unless(known);
            }
            Input::Portal { relay, captive } => {
                let known = self.check.as_mut().is_some_and(|check| check.portal(relay, captive));
                self.refuse_unless(known);
            }
            Input::PortMapping(port_mapping) => {
                if let Some(check) = &mut self.check {
                    check.set_port_mapping(port_mapping);
                }
            }
            Input::Timeout => {}
        }
        let Some(check) = &mut self.check else { return };
        check.advance(now, random, &mut self.outputs, &mut self.refused);
        if check.is_done(now) {
            self.report(now);
        }
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        let (at, reason) = self.check.as_ref()?.deadline();
        let again = std::mem::replace(&mut self.told, true);
        (!again).then_some(Output::Timeout(at, reason))
    }

    pub fn is_running(&self) -> bool {
        self.check.is_some()
    }

    /// How often each refusal happened.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Refused::ALL.iter().map(|(refused, name)| (*name, self.refused.0[*refused as usize]))
    }

    fn start(&mut self, now: Instant, mut setup: Setup) {
        setup.servers.truncate(NETCHECK_SERVERS_MAX);
        let fresh = self.full.as_ref().filter(|(at, report)| {
            setup.depth == Depth::Nearest && report.udp && now.since(*at) < FULL_CHECK_INTERVAL
        });
        let nearest = fresh.map(|(_, report)| nearest(report, &setup));
        if setup.depth == Depth::Nearest && nearest.is_none() {
            setup.depth = Depth::Full;
        }
        let again = self.full.is_some();
        self.outputs.clear();
        self.check = Some(Check::new(now, setup, nearest, again, &mut self.refused));
    }

    fn report(&mut self, now: Instant) {
        let Some(check) = self.check.take() else { return };
        let mut report = check.report(now);
        match &mut self.full {
            Some((_, full)) if check.depth() == Depth::Nearest => report.take_over(full),
            full => *full = Some((now, report.clone())),
        }
        self.outputs.push_back(Output::Done(Box::new(report)));
    }

    fn refuse_unless(&mut self, known: bool) {
        if !known {
            self.refused.count(Refused::RelayUnasked);
        }
    }
}

/// Which servers to ask when only the nearest are asked: relays, the home, and so many more that
/// two addresses say where we are seen.
fn nearest(last: &Report, setup: &Setup) -> Vec<bool> {
    let latency = |name: &str| {
        let server = last.servers.iter().find(|server| server.name == name);
        server.and_then(ServerReport::by_udp).unwrap_or(Duration::MAX)
    };
    let mut order: Vec<usize> = (0..setup.servers.len()).collect();
    order.sort_by_key(|&index| {
        let server = &setup.servers[index];
        let home = setup.home.as_ref() == Some(&server.name);
        (!home, !server.is_relay, latency(&server.name))
    });
    let mut asked = vec![false; setup.servers.len()];
    let count = NEAREST_RELAYS + usize::from(setup.home.is_some());
    order.into_iter().take(count).for_each(|index| asked[index] = true);
    asked
}
