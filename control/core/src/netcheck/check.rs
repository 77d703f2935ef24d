//! One check while it runs: its questions, and what was learned so far.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use rand::RngCore;

use super::lifetime::Lifetimes;
use super::probe::{Outcome, Plan, Probe, Purpose};
use super::{Counters, Depth, Output, PortMapping, Reason, Refused, Setup, Socket, TcpReport};
use crate::limits::{
    HAIRPIN_GAP, HAIRPIN_TRIES, LIFETIME_MAX, NEAREST_RELAYS, NETCHECK_TIME, RELAY_BY_TCP_AFTER,
    STUN_TIME,
};
use crate::stun::{self, Ask, StunError};
use crate::time::Instant;
use crate::transaction::TransactionId;

/// Relays that are asked for a captive portal.
const PORTAL_RELAYS_MAX: usize = 3;

#[derive(Debug)]
pub(super) struct Check {
    pub(super) setup: Setup,
    pub(super) started: Instant,
    pub(super) probes: Vec<Probe>,
    /// Per server: what came of its connection.
    pub(super) tcp: Vec<Tcp>,
    pub(super) portals: Vec<Portal>,
    pub(super) hairpin: Hairpin,
    pub(super) lifetimes: Lifetimes,
    /// Per family, the server that shows what the NAT does, with its other address.
    pub(super) shows: [Option<(SocketAddr, SocketAddr)>; 2],
    /// Relays by TCP and portals were asked for, or need not be.
    fallback_done: bool,
    /// Datagrams not sent yet.
    events: VecDeque<Output>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tcp {
    NotTried,
    Waiting,
    Done(TcpReport),
}

#[derive(Clone, Debug)]
pub(super) struct Portal {
    relay: String,
    /// None while nobody said anything.
    pub(super) answer: Option<Option<bool>>,
}

/// Two sockets that write to each other by their addresses outside.
#[derive(Clone, Debug, Default)]
pub(super) struct Hairpin {
    /// Outside addresses of the tunnel's and the other socket, once both are known.
    between: Option<[SocketAddr; 2]>,
    sent: Vec<TransactionId>,
    next: Option<Instant>,
    pub(super) result: Option<bool>,
}

impl Check {
    pub(super) fn new(
        now: Instant,
        setup: Setup,
        only: Option<Vec<bool>>,
        again: bool,
        refused: &mut Counters,
    ) -> Self {
        let mut probes = Vec::new();
        for (index, server) in setup.servers.iter().enumerate() {
            if only.as_ref().is_some_and(|only| !only[index]) {
                continue;
            }
            let plan = match (&setup.home, again) {
                (Some(home), _) if only.is_some() && *home == server.name => Plan::HOME,
                (_, true) => Plan::AGAIN,
                (_, false) => Plan::FIRST,
            };
            for ipv4 in [true, false] {
                let Some(to) = server.stun.iter().find(|a| a.is_ipv4() == ipv4) else { continue };
                if may_ask(*to, &setup) {
                    let purpose = Purpose::Server { index };
                    let probe = Probe::new(purpose, mapping_socket(setup.depth), *to, now);
                    probes.push(probe.with_plan(plan));
                } else {
                    refused.count(Refused::AddressUnusable);
                }
            }
        }
        Self {
            tcp: vec![Tcp::NotTried; setup.servers.len()],
            portals: Vec::new(),
            hairpin: Hairpin::default(),
            lifetimes: Lifetimes::default(),
            shows: [None; 2],
            fallback_done: false,
            events: VecDeque::new(),
            started: now,
            probes,
            setup,
        }
    }

    pub(super) fn depth(&self) -> Depth {
        self.setup.depth
    }

    pub(super) fn set_port_mapping(&mut self, port_mapping: PortMapping) {
        self.setup.port_mapping = port_mapping;
    }

    /// Some filter on the tunnel's port is open now.
    pub(super) fn wrote(&mut self, to: SocketAddr) {
        if self.depth().is_kinds() && !self.setup.written_to.contains(&to) {
            self.setup.written_to.push(to);
        }
    }

    /// A datagram that looks like STUN.
    pub(super) fn datagram(
        &mut self,
        now: Instant,
        socket: Socket,
        from: SocketAddr,
        bytes: &[u8],
        refused: &mut Counters,
    ) {
        if let Some(transaction) = stun::transaction_of_request(bytes) {
            if self.hairpin.sent.contains(&transaction) {
                self.hairpin.result = Some(true);
                self.hairpin.next = None;
            } else {
                refused.count(Refused::Unasked);
            }
            return;
        }
        let (transaction, answer) = match stun::parse_response(bytes) {
            Ok(response) => (response.transaction, Some(response)),
            Err(StunError::Refused { .. }) => match stun::transaction_of_error(bytes) {
                Some(transaction) => (transaction, None),
                None => return refused.count(Refused::Malformed),
            },
            Err(_) => return refused.count(Refused::Malformed),
        };
        let asked = self.probes.iter_mut().enumerate().find_map(|(index, probe)| {
            let at = probe.asked_at(transaction)?;
            Some((index, probe, at))
        });
        let Some((index, probe, asked_at)) = asked else {
            return refused.count(Refused::Unasked);
        };
        let outcome = match answer {
            _ if probe.outcome.is_some() => return refused.count(Refused::Duplicate),
            _ if probe.heard_on != socket => return refused.count(Refused::WrongSocket),
            // It answers as if nothing special had been asked for.
            _ if from != probe.from && from == probe.to => {
                refused.count(Refused::WrongSource);
                Outcome::Unable
            }
            // An error about an answer from elsewhere comes from where it was asked.
            _ if from != probe.from => return refused.count(Refused::WrongSource),
            None => {
                refused.count(Refused::ServerError);
                Outcome::Unable
            }
            Some(response) => Outcome::Answered {
                mapped: response.mapped,
                other: response.other,
                rtt: now.since(asked_at),
            },
        };
        self.settle(now, index, outcome, refused);
    }

    /// Nobody will answer what did not leave: a host without IPv6 need not wait for it.
    pub(super) fn unsendable(
        &mut self,
        now: Instant,
        socket: Socket,
        to: SocketAddr,
        refused: &mut Counters,
    ) {
        for index in 0..self.probes.len() {
            let Some(probe) = self.probes.get(index) else { return };
            if probe.outcome.is_none() && (probe.socket, probe.to) == (socket, to) {
                self.settle(now, index, Outcome::Unable, refused);
            }
        }
    }

    /// Whether this relay was asked for.
    pub(super) fn connected(&mut self, relay: &str, report: TcpReport) -> bool {
        let index = self.setup.servers.iter().position(|server| server.name == relay);
        let tcp = index.and_then(|index| self.tcp.get_mut(index));
        let Some(tcp) = tcp.filter(|tcp| **tcp == Tcp::Waiting) else { return false };
        *tcp = Tcp::Done(report);
        true
    }

    /// Whether this relay was asked for.
    pub(super) fn portal(&mut self, relay: &str, captive: Option<bool>) -> bool {
        let open = |portal: &&mut Portal| portal.relay == relay && portal.answer.is_none();
        let Some(portal) = self.portals.iter_mut().find(open) else { return false };
        portal.answer = Some(captive);
        true
    }

    /// Does what is due.
    pub(super) fn advance(
        &mut self,
        now: Instant,
        random: &mut impl RngCore,
        outputs: &mut VecDeque<Output>,
        refused: &mut Counters,
    ) {
        if !self.fallback_done && (self.is_diagnosis() || now >= self.fallback_at()) {
            self.fall_back();
        }
        let mut index = 0;
        // Probes that end may add others behind.
        while index < self.probes.len() {
            match self.probes[index].deadline() {
                Some((at, Reason::Silence)) if at <= now => {
                    self.settle(now, index, Outcome::Silent, refused);
                }
                Some((at, _)) if at <= now => {
                    let transaction = random_transaction(random);
                    let probe = &mut self.probes[index];
                    probe.sent(transaction, now);
                    let datagram = stun::request(probe.ask, transaction).to_vec();
                    let (socket, to) = (probe.socket, probe.to);
                    outputs.push_back(Output::Transmit { socket, to, datagram });
                }
                _ => {}
            }
            index += 1;
        }
        self.advance_hairpin(now, random, outputs);
        outputs.extend(self.events.drain(..));
    }

    pub(super) fn deadline(&self) -> (Instant, Reason) {
        let probes = self.probes.iter().filter_map(Probe::deadline);
        let hairpin = self.hairpin.next.map(|at| (at, Reason::Hairpin));
        let fallback = (!self.fallback_done).then(|| (self.fallback_at(), Reason::RelaysByTcp));
        let end = (self.end(), Reason::Report);
        probes.chain(hairpin).chain(fallback).min().map_or(end, |next| next.min(end))
    }

    pub(super) fn is_done(&self, now: Instant) -> bool {
        if now >= self.end() {
            return true;
        }
        let enough = self.depth() == Depth::Nearest && self.servers_answered() >= NEAREST_RELAYS;
        let open = self.probes.iter().any(|probe| probe.outcome.is_none());
        let tcp = self.tcp.contains(&Tcp::Waiting);
        let portal = self.portals.iter().any(|portal| portal.answer.is_none());
        let fallback = !self.fallback_done && !self.relays_to_try().is_empty();
        enough || !(open || tcp || portal || fallback || self.hairpin.next.is_some())
    }

    /// Answers that the tunnel's own socket got, of one family: who answered, and our address.
    pub(super) fn seen(&self, ipv4: bool) -> Vec<(SocketAddr, SocketAddr)> {
        let socket = mapping_socket(self.depth());
        let ours = self.probes.iter().filter(|probe| probe.socket == socket);
        let answers = ours.filter_map(|probe| Some((probe.from, probe.mapped()?)));
        answers.filter(|(from, _)| from.is_ipv4() == ipv4).collect()
    }

    pub(super) fn outcome_of(&self, purpose: Purpose, ipv4: bool) -> Option<Outcome> {
        let mut probes = self.probes.iter();
        let probe = probes.find(|p| p.purpose == purpose && p.to.is_ipv4() == ipv4)?;
        probe.outcome
    }

    pub(super) fn is_ours(&self, outside: SocketAddr) -> bool {
        let port = match self.depth() {
            Depth::Kinds { asker_port } => asker_port,
            _ => self.setup.port,
        };
        outside.port() == port && self.setup.addresses.contains(&outside.ip())
    }

    fn is_diagnosis(&self) -> bool {
        matches!(self.depth(), Depth::Diagnosis { .. })
    }

    fn servers_answered(&self) -> usize {
        let answered = |index: &usize| {
            let of = Purpose::Server { index: *index };
            self.probes.iter().any(|probe| probe.purpose == of && probe.mapped().is_some())
        };
        (0..self.setup.servers.len()).filter(answered).count()
    }

    fn fallback_at(&self) -> Instant {
        self.started + RELAY_BY_TCP_AFTER
    }

    fn end(&self) -> Instant {
        let Depth::Diagnosis { lifetime: Some(longest), .. } = self.depth() else {
            return self.started + NETCHECK_TIME;
        };
        if self.lifetimes.is_over() {
            return self.started + NETCHECK_TIME;
        }
        self.started + longest.min(LIFETIME_MAX) + STUN_TIME + NETCHECK_TIME
    }

    /// Relays that TCP has something to say about: all in a diagnosis, else those without STUN.
    fn relays_to_try(&self) -> Vec<usize> {
        let asked = |index: usize| {
            let of = Purpose::Server { index };
            let mut probes = self.probes.iter().filter(|probe| probe.purpose == of).peekable();
            let left_out = probes.peek().is_none() && self.depth() == Depth::Nearest;
            !left_out && (self.is_diagnosis() || probes.all(|probe| probe.mapped().is_none()))
        };
        let relays = self.setup.servers.iter().enumerate().filter(|(_, server)| server.is_relay);
        relays.map(|(index, _)| index).filter(|index| asked(*index)).collect()
    }

    fn fall_back(&mut self) {
        self.fallback_done = true;
        let relays = self.relays_to_try();
        let portal = self.is_diagnosis() || self.servers_answered() == 0;
        for (place, index) in relays.into_iter().enumerate() {
            let relay = self.setup.servers[index].name.clone();
            self.tcp[index] = Tcp::Waiting;
            self.events.push_back(Output::Connect { relay: relay.clone() });
            if portal && place < PORTAL_RELAYS_MAX {
                self.portals.push(Portal { relay: relay.clone(), answer: None });
                self.events.push_back(Output::LookForPortal { relay });
            }
        }
    }

    /// A question ended: what follows from it.
    fn settle(&mut self, now: Instant, index: usize, outcome: Outcome, refused: &mut Counters) {
        let Some(probe) = self.probes.get_mut(index) else { return };
        probe.outcome = Some(outcome);
        let (purpose, from) = (probe.purpose, probe.from);
        match (purpose, outcome) {
            (Purpose::Server { .. }, Outcome::Answered { mapped, other, .. }) => {
                self.events.push_back(Output::Mapped { by: from, mapped });
                self.look_closer(now, from, mapped, other, refused);
            }
            (Purpose::FilterOpen, Outcome::Answered { .. }) => {
                let Some((server, other)) = self.shown_by(from) else { return };
                let purpose = Purpose::FilterAddressAndPort;
                let probe = Probe::new(purpose, filtering_socket(self.depth()), server, now);
                self.probes.push(probe.answered_from(Ask::OtherAddressAndPort, other));
            }
            (Purpose::FilterAddressAndPort, Outcome::Silent) => {
                let Some((server, other)) = self.shown_by(self.probes[index].to) else { return };
                let other_port = SocketAddr::new(server.ip(), other.port());
                let socket = filtering_socket(self.depth());
                let probe = Probe::new(Purpose::FilterPort, socket, server, now);
                self.probes.push(probe.answered_from(Ask::OtherPort, other_port));
            }
            (Purpose::Neighbour, Outcome::Answered { mapped, .. }) => {
                let seen = self.seen(true);
                let tunnel = seen.iter().find(|(by, _)| *by == from).map(|(_, mapped)| *mapped);
                let between = tunnel.map(|tunnel| [tunnel, mapped]);
                let between = between.filter(|between| is_hairpin(from, *between, &self.setup));
                if between.is_none() {
                    refused.count(Refused::AddressUnusable);
                }
                self.hairpin.between = between;
                self.hairpin.next = between.map(|_| now);
            }
            (Purpose::LifetimeOpen { step }, Outcome::Answered { mapped, .. }) => {
                self.probes.push(Lifetimes::ask(step, from, mapped, now));
            }
            (Purpose::LifetimeAsk { step }, outcome) => {
                let alive = match outcome {
                    Outcome::Answered { .. } => Some(true),
                    Outcome::Silent => Some(false),
                    Outcome::Unable => None,
                };
                self.lifetimes.note(step, alive);
                let is_moot = |probe: &Probe| {
                    matches!(probe.purpose, Purpose::LifetimeAsk { step } | Purpose::LifetimeOpen { step }
                        if self.lifetimes.is_moot(step))
                };
                self.probes.retain(|probe| probe.outcome.is_some() || !is_moot(probe));
            }
            _ => {}
        }
    }

    /// The first server of a family answered: it may show more, and we may ask ourselves.
    fn look_closer(
        &mut self,
        now: Instant,
        server: SocketAddr,
        mapped: SocketAddr,
        other: Option<SocketAddr>,
        refused: &mut Counters,
    ) {
        let (ipv4, depth) = (server.is_ipv4(), self.depth());
        if depth == Depth::Nearest {
            return;
        }
        if let Depth::Diagnosis { hairpin: true, .. } = self.depth() {
            let known = self.probes.iter().any(|probe| probe.purpose == Purpose::Neighbour);
            if ipv4 && !known && !self.is_ours(mapped) {
                self.probes.push(Probe::new(Purpose::Neighbour, Socket::Neighbour, server, now));
            }
        }
        let Some(other) = other.filter(|_| self.shows[usize::from(ipv4)].is_none()) else { return };
        if !is_believable(server, other) || !may_ask(other, &self.setup) {
            return refused.count(Refused::AddressUnusable);
        }
        self.shows[usize::from(ipv4)] = Some((server, other));
        let other_address = SocketAddr::new(other.ip(), server.port());
        let mut probe = |purpose, socket, to| {
            self.probes.push(Probe::new(purpose, socket, to, now));
        };
        probe(Purpose::OtherAddress, mapping_socket(depth), other_address);
        probe(Purpose::OtherAddressAndPort, mapping_socket(depth), other);
        probe(Purpose::FilterOpen, filtering_socket(depth), server);
        if let Depth::Diagnosis { lifetime: Some(longest), .. } = self.depth()
            && ipv4
            && !self.is_ours(mapped)
        {
            self.probes.extend(self.lifetimes.open(longest, server, now));
        }
    }

    /// Whom the server of a family can be besides, as far as it says.
    fn shown_by(&self, server: SocketAddr) -> Option<(SocketAddr, SocketAddr)> {
        self.shows[usize::from(server.is_ipv4())]
    }

    fn advance_hairpin(
        &mut self,
        now: Instant,
        random: &mut impl RngCore,
        outputs: &mut VecDeque<Output>,
    ) {
        let (Some([tunnel, neighbour]), Some(at)) = (self.hairpin.between, self.hairpin.next)
        else {
            return;
        };
        if now < at {
            return;
        }
        if self.hairpin.sent.len() >= 2 * HAIRPIN_TRIES {
            self.hairpin.next = None;
            self.hairpin.result = Some(false);
            return;
        }
        // Both ways, so that a filter is open whichever of the two comes first.
        for (socket, to) in [(Socket::Neighbour, tunnel), (Socket::Tunnel, neighbour)] {
            let transaction = random_transaction(random);
            self.hairpin.sent.push(transaction);
            let datagram = stun::binding_request(transaction).to_vec();
            outputs.push_back(Output::Transmit { socket, to, datagram });
        }
        let last = self.hairpin.sent.len() >= 2 * HAIRPIN_TRIES;
        let wait = if last { HAIRPIN_GAP * 4 } else { HAIRPIN_GAP };
        self.hairpin.next = Some(now + wait);
    }
}

/// Which socket writes to everybody, to see how the NAT maps.
fn mapping_socket(depth: Depth) -> Socket {
    if depth.is_kinds() { Socket::Asker } else { Socket::Tunnel }
}

/// Which socket writes to one server only, to see what the NAT filters.
fn filtering_socket(depth: Depth) -> Socket {
    if depth.is_kinds() { Socket::Tunnel } else { Socket::Filtering }
}

fn random_transaction(random: &mut impl RngCore) -> TransactionId {
    let mut transaction = [0; 12];
    random.fill_bytes(&mut transaction);
    TransactionId(transaction)
}

/// Whether a datagram to this address is one to somebody else, one somebody.
fn may_ask(to: SocketAddr, setup: &Setup) -> bool {
    let ip = to.ip();
    let nobody = ip.is_unspecified() || ip.is_multicast() || to.port() == 0;
    let everybody = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    let ourselves = to.port() == setup.port && setup.addresses.contains(&ip);
    !(nobody || everybody || ourselves)
}

/// Whether what a server says of its other address can be: another address and another port of the
/// same kind of network. A server on the internet must not send us into the networks around us.
pub(crate) fn is_believable(server: SocketAddr, other: SocketAddr) -> bool {
    server.is_ipv4() == other.is_ipv4()
        && server.ip() != other.ip()
        && server.port() != other.port()
        && (is_public(other.ip()) || !is_public(server.ip()))
}

/// Whether these two can be our addresses outside: of one NAT, of different sockets, and not in the
/// networks around us if a server on the internet says so.
fn is_hairpin(server: SocketAddr, between: [SocketAddr; 2], setup: &Setup) -> bool {
    let [tunnel, neighbour] = between;
    let can_be = |outside: SocketAddr| {
        may_ask(outside, setup) && (is_public(outside.ip()) || !is_public(server.ip()))
    };
    tunnel.ip() == neighbour.ip()
        && tunnel.port() != neighbour.port()
        && can_be(tunnel)
        && can_be(neighbour)
}

fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            !(ip.is_private() || ip.is_loopback() || ip.is_link_local() || shared)
        }
        IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local()),
    }
}
