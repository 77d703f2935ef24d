//! Of what kind the NAT in front of the tunnel's port is, for those who ask why. A STUN server that
//! can answer from another address (RFC 5780) shows what is filtered; only one to which the port
//! did not write before does so truly, and who was let in is not asked again too soon.

use std::io;
use std::net::{IpAddr, SocketAddr};

use millrace_path::Instant;
use millrace_path::nat::{Filtering, Mapping, Nat};
use millrace_path::netcheck::{Depth, PortMapping, Report};

use super::Gateway;
use crate::counters::Count;
use crate::limits::{FILTER_OPEN_TIME_MAX, KINDS_INTERVAL, KINDS_INTERVAL_MIN, KINDS_SERVERS_MAX};
use crate::netcheck_driver::{NetcheckDriver, NetcheckEvent, NetcheckServer, NetcheckSetup};
use crate::udp::Source;
use crate::written_to::WrittenTo;

/// What was found out, and when to ask again.
pub struct Kinds {
    pub driver: NetcheckDriver,
    pub(super) written_to: WrittenTo,
    found: Option<Found>,
    next_at: Instant,
    started_at: Option<Instant>,
    /// The port wrote to all that a server could answer from, before the last check, IPv4.
    is_other_known: bool,
    /// The network changed while a check ran.
    void: bool,
}

#[derive(Clone, Copy, Debug)]
struct Found {
    /// Our address outside, IPv4, as it was then.
    outside: Option<IpAddr>,
    mapping: Option<Mapping>,
    filtering: Option<Filtering>,
    filtering_ipv6: Option<Filtering>,
}

impl Kinds {
    pub(super) fn new(now: Instant) -> io::Result<Self> {
        Ok(Self {
            driver: NetcheckDriver::new()?,
            written_to: WrittenTo::default(),
            found: None,
            next_at: now,
            started_at: None,
            is_other_known: false,
            void: false,
        })
    }

    /// What was found was of another network, or of another port.
    pub(super) fn forget(&mut self, now: Instant) {
        self.found = None;
        self.void = self.driver.is_running();
        self.again(now);
    }

    /// Something on the way is not as it was; what is known stays until more is.
    pub(super) fn again(&mut self, now: Instant) {
        let at = self.started_at.map_or(now, |at| now.max(at + KINDS_INTERVAL_MIN));
        self.next_at = self.next_at.min(at);
    }

    /// A datagram leaves by the tunnel's port.
    pub(super) fn wrote(&mut self, now: Instant, to: SocketAddr) {
        self.written_to.note(now, to);
        self.driver.wrote(now, to);
    }
}

impl Gateway {
    /// What is known of the NAT or firewall in front of the tunnel's port.
    pub fn nat(&self) -> Nat {
        let port = self.welcome.as_ref().map_or(0, |welcome| welcome.listen_port);
        let outside: Vec<_> = self.seen.addresses.iter().filter(|a| a.is_ipv4()).collect();
        let is_ours = |seen: &SocketAddr| {
            let mut own = self.network.addresses.iter();
            seen.port() == port && own.any(|own| own.ip == seen.ip())
        };
        let untranslated = !outside.is_empty() && outside.iter().all(|seen| is_ours(seen));
        let found = self.kinds.found;
        let mapping = found.and_then(|found| found.mapping);
        Nat {
            // What the port itself is seen to do comes before what another did.
            mapping: match self.seen.varies {
                _ if untranslated => Some(Mapping::None),
                Some(true) => Some(mapping.filter(|m| m.is_hard()).unwrap_or(Mapping::Dependent)),
                Some(false) => Some(Mapping::EndpointIndependent),
                None => mapping,
            },
            filtering: found.and_then(|found| found.filtering),
            filtering_ipv6: found.and_then(|found| found.filtering_ipv6),
            port_preserved: outside.first().map(|seen| seen.port() == port),
        }
    }

    /// Why it is not known what is filtered, and what would help; none: it is known.
    pub fn filtering_unknown(&self, now: Instant) -> Option<&'static str> {
        if self.nat().filtering.is_some() {
            return None;
        }
        Some(if self.seen.addresses.is_empty() {
            "no STUN server answers"
        } else if self.reflexive.showing(now).next().is_none() {
            "name a STUN server that has two addresses (RFC 5780, as coturn) in [discovery] stun"
        } else if self.kinds.found.is_none() {
            "it is being found out"
        } else if self.kinds.is_other_known {
            "the tunnel's port writes to the STUN server's other address, too: name it by one only"
        } else {
            "the STUN server's other address does not answer"
        })
    }

    pub(super) fn kinds_deadline(&self, now: Instant) -> Option<Instant> {
        let start = self.can_ask_for_kinds(now).then_some(self.kinds.next_at);
        start.into_iter().chain(self.kinds.driver.deadline()).min()
    }

    /// Asks if it is time, and lets the check work.
    pub(super) fn handle_kinds(&mut self, now: Instant) {
        if self.kinds.next_at <= now && self.can_ask_for_kinds(now) {
            self.start_kinds(now);
        }
        if self.kinds.driver.is_running() {
            self.kinds.driver.handle(now);
            self.carry_out_kinds(now);
        }
    }

    /// What arrived on the tunnel's port as STUN and is no answer to where we are seen.
    pub(super) fn stun_for_kinds(&mut self, now: Instant, from: SocketAddr, bytes: &[u8]) {
        self.kinds.driver.datagram(now, from, bytes);
        self.carry_out_kinds(now);
    }

    /// Our address outside is another one: so may be the NAT.
    pub(super) fn compare_kinds(&mut self, now: Instant) {
        let Some(outside) = self.kinds.found.and_then(|found| found.outside) else { return };
        let mut ipv4 = self.seen.addresses.iter().filter(|a| a.is_ipv4()).peekable();
        if ipv4.peek().is_some() && ipv4.all(|seen| seen.ip() != outside) {
            self.kinds.forget(now);
        }
    }

    fn can_ask_for_kinds(&self, now: Instant) -> bool {
        let can_send = self.plane.as_ref().is_some_and(|plane| plane.tools.is_some());
        let is_idle = can_send && !self.kinds.driver.is_running();
        is_idle && self.reflexive.showing(now).next().is_some()
    }

    fn start_kinds(&mut self, now: Instant) {
        self.kinds.next_at = now + KINDS_INTERVAL;
        let Some(mut written_to) = self.kinds.written_to.lately(now) else {
            self.kinds.next_at = now + FILTER_OPEN_TIME_MAX;
            return;
        };
        let of_peers = self.peers.values().flat_map(|peer| {
            let remote = peer.traffic.line().remote();
            peer.endpoint.into_iter().chain(remote)
        });
        written_to.extend(of_peers);
        written_to.extend(self.reflexive.servers());
        // Those whose other address is still a stranger to us show most.
        let mut showing: Vec<_> = self.reflexive.showing(now).collect();
        let is_known = |other: &SocketAddr| written_to.iter().any(|to| to.ip() == other.ip());
        showing.sort_by_key(|(_, other)| is_known(other));
        let mut is_other_known = false;
        for ipv4 in [false, true] {
            let best = showing.iter().find(|(server, _)| server.is_ipv4() == ipv4);
            is_other_known = best.is_some_and(|(_, other)| is_known(other));
            if !is_other_known {
                showing.retain(|(server, other)| server.is_ipv4() != ipv4 || !is_known(other));
            }
        }
        let server = |(server, _): &(SocketAddr, SocketAddr)| NetcheckServer {
            name: server.to_string(),
            relay: None,
            stun: vec![*server],
        };
        let is_tunnel = |ifindex| self.network.links.get(&ifindex).is_some_and(|l| l.is_tunnel);
        let own = self.network.addresses.iter().filter(|own| !is_tunnel(own.ifindex));
        let setup = NetcheckSetup {
            servers: showing.iter().take(KINDS_SERVERS_MAX).map(server).collect(),
            addresses: own.map(|own| own.ip).collect(),
            port: self.welcome.as_ref().map_or(0, |welcome| welcome.listen_port),
            home: None,
            port_mapping: PortMapping::default(),
            depth: Depth::Kinds { asker_port: 0 },
            written_to,
        };
        self.kinds.started_at = Some(now);
        (self.kinds.is_other_known, self.kinds.void) = (is_other_known, false);
        self.kinds.driver.start(now, setup);
    }

    fn carry_out_kinds(&mut self, now: Instant) {
        while let Some(event) = self.kinds.driver.next_event() {
            match event {
                NetcheckEvent::Send { to, datagram } => {
                    let sent = self.send_datagram(to, Source::default(), &datagram, false);
                    if let Err(error) = sent {
                        self.counters.add(Count::of_send_error(&error), 1);
                        self.kinds.driver.unsendable(now, to);
                    }
                }
                NetcheckEvent::Mapped { .. } => {}
                NetcheckEvent::Done(report) => self.take_kinds(now, &report),
            }
        }
    }

    fn take_kinds(&mut self, now: Instant, report: &Report) {
        if std::mem::take(&mut self.kinds.void) {
            return;
        }
        let outside = report.ipv4.global.map(|seen| seen.ip());
        // What asks for the tunnel may go another way out than the tunnel does.
        let same_way = self.seen.addresses.iter().any(|seen| Some(seen.ip()) == outside);
        let found = Found {
            outside: outside.filter(|_| same_way),
            mapping: report.mapping.filter(|_| same_way),
            filtering: report.filtering,
            filtering_ipv6: report.filtering_ipv6,
        };
        tracing::info!(mapping = ?found.mapping, filtering = ?found.filtering, "kind of NAT");
        if found.filtering.is_none() {
            self.kinds.next_at = now + FILTER_OPEN_TIME_MAX;
        }
        self.kinds.found = Some(found);
        self.tell_finder(now, false);
    }
}
