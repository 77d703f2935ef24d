//! From answers to what they mean.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::check::{Check, Tcp};
use super::probe::{Outcome, Purpose};
use super::{Family, Report, ServerReport, TcpReport};
use crate::nat::{self, Filtering, Mapping};
use crate::time::Instant;

impl Check {
    /// What is known now.
    pub(super) fn report(&self, now: Instant) -> Report {
        let ipv4 = self.answers_outside(true);
        let first = ipv4.first().map(|(_, mapped)| *mapped);
        // Another address of our own, as a host with two uplinks has it, is no translation.
        let untranslated = ipv4.iter().all(|(_, mapped)| self.is_ours(*mapped));
        let varies = nat::varies(&ipv4).map(|varies| varies && !untranslated);
        let in_host = |ipv4: bool| {
            let family = self.setup.addresses.iter().filter(move |ip| ip.is_ipv4() == ipv4);
            family.into_iter().any(|ip| is_more_than_local(*ip))
        };
        let family = |ipv4: bool| Family {
            in_host: in_host(ipv4),
            global: self.answers_outside(ipv4).first().map(|(_, mapped)| *mapped),
        };
        Report {
            took: now.since(self.started),
            udp: self.probes.iter().any(|probe| probe.mapped().is_some()),
            ipv4: family(true),
            ipv6: family(false),
            mapping_varies_by_dest_ip: varies,
            mapping: self.mapping(&ipv4, varies),
            filtering: self.filtering(true),
            filtering_ipv6: self.filtering(false),
            hairpin: self.hairpin.result,
            port_preserved: first.map(|mapped| mapped.port() == self.setup.port),
            mapping_lifetime: self.lifetimes.result(),
            port_mapping: self.setup.port_mapping,
            captive_portal: self.captive_portal(),
            servers: self.servers(now),
        }
    }

    /// Answers of one family; those of servers on our side of the NAT only if there are no others.
    fn answers_outside(&self, ipv4: bool) -> Vec<(SocketAddr, SocketAddr)> {
        let seen = self.seen(ipv4);
        let outside = seen.iter().filter(|(_, mapped)| !self.is_ours(*mapped)).copied();
        let outside: Vec<_> = outside.collect();
        if outside.is_empty() { seen } else { outside }
    }

    fn mapping(&self, seen: &[(SocketAddr, SocketAddr)], varies: Option<bool>) -> Option<Mapping> {
        let (_, first) = seen.first()?;
        if seen.iter().all(|(_, mapped)| self.is_ours(*mapped)) {
            return Some(Mapping::None);
        }
        let by = |address: SocketAddr| {
            seen.iter().find(|(from, _)| *from == address).map(|(_, mapped)| *mapped)
        };
        let trio = self.shows[1].and_then(|(server, other)| {
            let other_address = SocketAddr::new(other.ip(), server.port());
            Some([by(server)?, by(other_address)?, by(other)?])
        });
        let all_same = seen.iter().all(|(_, mapped)| mapped == first);
        match (trio, varies) {
            (Some([_, b, c]), _) if b != c => Some(Mapping::AddressAndPortDependent),
            (Some([a, b, _]), _) if a != b => Some(Mapping::AddressDependent),
            (_, Some(true)) => Some(Mapping::Dependent),
            (Some(_), _) | (None, Some(false)) if all_same => Some(Mapping::EndpointIndependent),
            // One address of a server with two ports, say.
            _ if !all_same => Some(Mapping::AddressAndPortDependent),
            _ => None,
        }
    }

    fn filtering(&self, ipv4: bool) -> Option<Filtering> {
        let outcome = |purpose| self.outcome_of(purpose, ipv4);
        let (server, other) = self.shows[usize::from(ipv4)]?;
        // Whom the port wrote to comes in through any filter.
        let written_to = &self.setup.written_to;
        let host_may_come = written_to.iter().any(|to| to.ip() == other.ip());
        let port_may_come = written_to.contains(&SocketAddr::new(server.ip(), other.port()));
        // Silence says something only of an address that is there.
        let other_is_there =
            matches!(outcome(Purpose::OtherAddressAndPort), Some(Outcome::Answered { .. }));
        match (outcome(Purpose::FilterAddressAndPort)?, outcome(Purpose::FilterPort)) {
            (Outcome::Answered { .. }, _) if host_may_come => None,
            (Outcome::Answered { .. }, _) => Some(Filtering::EndpointIndependent),
            _ if !other_is_there => None,
            (Outcome::Silent, Some(Outcome::Answered { .. })) if port_may_come => None,
            (Outcome::Silent, Some(Outcome::Answered { .. })) => Some(Filtering::AddressDependent),
            (Outcome::Silent, Some(Outcome::Silent)) => Some(Filtering::AddressAndPortDependent),
            _ => None,
        }
    }

    /// One true answer of a relay is proof that nobody is between.
    fn captive_portal(&self) -> Option<bool> {
        let answers = || self.portals.iter().filter_map(|portal| portal.answer.flatten());
        if answers().any(|captive| !captive) { Some(false) } else { answers().next() }
    }

    fn servers(&self, now: Instant) -> Vec<ServerReport> {
        let rtt = |index: usize, ipv4: bool| match self.outcome_of(Purpose::Server { index }, ipv4)
        {
            Some(Outcome::Answered { rtt, .. }) => Some(rtt),
            _ => None,
        };
        let report = |(index, tcp): (usize, &Tcp)| {
            let server = &self.setup.servers[index];
            ServerReport {
                name: server.name.clone(),
                is_relay: server.is_relay,
                ipv4: rtt(index, true),
                ipv6: rtt(index, false),
                tcp: match tcp {
                    Tcp::NotTried => None,
                    Tcp::Waiting => Some(no_answer(now.since(self.started))),
                    Tcp::Done(report) => Some(report.clone()),
                },
            }
        };
        self.tcp.iter().enumerate().map(report).collect()
    }
}

impl Report {
    /// What a check of the nearest servers did not look at, from the full one before it, while we
    /// are seen at the same address.
    pub(super) fn take_over(&mut self, full: &Self) {
        let ip = |report: &Self| report.ipv4.global.map(|mapped| mapped.ip());
        if ip(self) != ip(full) {
            return;
        }
        self.mapping_varies_by_dest_ip =
            self.mapping_varies_by_dest_ip.or(full.mapping_varies_by_dest_ip);
        if self.mapping.is_none() || self.mapping == Some(Mapping::Dependent) {
            self.mapping = full.mapping.or(self.mapping);
        }
        self.filtering = self.filtering.or(full.filtering);
        self.filtering_ipv6 = self.filtering_ipv6.or(full.filtering_ipv6);
        self.hairpin = self.hairpin.or(full.hairpin);
        self.mapping_lifetime = self.mapping_lifetime.or(full.mapping_lifetime);
        self.captive_portal = self.captive_portal.or(full.captive_portal);
    }
}

fn is_more_than_local(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(link_local || ip.is_loopback() || ip.is_unspecified())
}

fn no_answer(waited: Duration) -> TcpReport {
    TcpReport::Failed(format!("no answer within {:.1} s", waited.as_secs_f64()))
}
