//! What a netcheck found out.

use std::net::SocketAddr;
use std::time::Duration;

use crate::nat::{Filtering, Mapping};

/// All of it. `None` always means that it is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// From the first datagram to the report.
    pub took: Duration,
    /// Some STUN server answered.
    pub udp: bool,
    pub ipv4: Family,
    pub ipv6: Family,
    /// IPv4: whether the NAT shows different addresses or ports to different servers.
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// The same in the terms of RFC 4787, as far as it could be seen.
    pub mapping: Option<Mapping>,
    /// IPv4: from where the NAT or firewall lets datagrams in.
    pub filtering: Option<Filtering>,
    /// IPv6: from where the firewall lets datagrams in.
    pub filtering_ipv6: Option<Filtering>,
    /// Two sockets of ours reach each other by their addresses outside.
    pub hairpin: Option<bool>,
    /// IPv4: the port outside is the one inside.
    pub port_preserved: Option<bool>,
    pub mapping_lifetime: Option<MappingLifetime>,
    pub port_mapping: PortMapping,
    /// Somebody between answers in the relays' place.
    pub captive_portal: Option<bool>,
    /// In the order of the configuration.
    pub servers: Vec<ServerReport>,
}

/// What one address family is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Family {
    /// The host has an address of it that is not local.
    pub in_host: bool,
    /// Where the tunnel's socket is seen from outside; none: nobody answered.
    pub global: Option<SocketAddr>,
}

/// How long a mapping lives without traffic, after a datagram each way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingLifetime {
    /// It was still there after this silence; zero if the first look came too late.
    pub at_least: Duration,
    /// It was gone after this silence; none if it outlived every look.
    pub less_than: Option<Duration>,
}

/// Which port-mapping protocols the router speaks, and what came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortMapping {
    pub upnp: Option<bool>,
    pub nat_pmp: Option<bool>,
    pub pcp: Option<bool>,
    /// Where a port that it opened is reached from the internet; none also where there is another
    /// NAT outside.
    pub mapped: Option<SocketAddr>,
}

/// One relay or STUN server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerReport {
    /// As configured.
    pub name: String,
    pub is_relay: bool,
    /// Round trips of STUN; none: no answer.
    pub ipv4: Option<Duration>,
    pub ipv6: Option<Duration>,
    /// What came of a connection to a relay, if one was tried.
    pub tcp: Option<TcpReport>,
}

/// A connection to a relay, as the driver made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TcpReport {
    /// Time of the TCP handshake, and of everything until the relay could be spoken to.
    Connected { connect: Duration, ready: Duration },
    /// What was seen, in words.
    Failed(String),
}

impl Report {
    /// The relay that answers soonest, and how soon; none to which connections fail.
    pub fn nearest_relay(&self) -> Option<(&str, Duration)> {
        let relays = self.relays().filter(|relay| relay.is_usable());
        let latency = |relay: &ServerReport| relay.latency();
        relays
            .filter_map(|relay| Some((relay.name.as_str(), latency(relay)?)))
            .min_by_key(|(_, latency)| *latency)
    }

    pub fn relays(&self) -> impl Iterator<Item = &ServerReport> {
        self.servers.iter().filter(|server| server.is_relay)
    }
}

impl ServerReport {
    /// The better round trip of STUN, or else that of TCP's handshake.
    pub fn latency(&self) -> Option<Duration> {
        self.by_udp().or(match self.tcp {
            Some(TcpReport::Connected { connect, .. }) => Some(connect),
            _ => None,
        })
    }

    /// It answers, and nothing says that a connection to it fails.
    pub fn is_usable(&self) -> bool {
        match &self.tcp {
            Some(TcpReport::Connected { .. }) => true,
            Some(TcpReport::Failed(_)) => false,
            None => self.by_udp().is_some(),
        }
    }

    pub fn by_udp(&self) -> Option<Duration> {
        self.ipv4.into_iter().chain(self.ipv6).min()
    }
}
