//! A host on a router's LAN: where a gateway runs.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Router, Wire};
use crate::{
    Error, Lab, Namespace, Result,
    lab::{link, settle},
};

/// One host. Its interfaces are `wan0`, and `wan1` where it has a second leg.
#[derive(Debug)]
pub struct Host {
    /// Where it lives.
    pub namespace: Namespace,
    legs: Vec<Leg>,
}

/// One connection to a router.
#[derive(Debug)]
struct Leg {
    address_v4: Option<Ipv4Addr>,
    address_v6: Option<Ipv6Addr>,
    next_hop_v4: Ipv4Addr,
    next_hop_v6: Ipv6Addr,
}

impl Host {
    /// A host without a connection.
    pub(super) fn new(lab: &Lab, name: &str) -> Result<Self> {
        Ok(Self { namespace: lab.namespace(name)?, legs: Vec::new() })
    }

    /// Plugs it into one more router's LAN. The first connection is preferred while it is there.
    pub fn connect(&mut self, router: &Router) -> Result<()> {
        self.connect_with(router, true)
    }

    /// As [`Self::connect`], with or without an IPv4 address.
    pub(super) fn connect_with(&mut self, router: &Router, v4: bool) -> Result<()> {
        let (number, port) = router.next_port();
        let interface = format!("wan{}", self.legs.len());
        link((&self.namespace, &interface), (router.namespace(), &port))?;
        router.namespace().ip([format!("link set {port} master lan")])?;
        segment_as_a_wire(&self.namespace, &interface)?;
        self.add_leg(router, number, v4)
    }

    /// As [`Self::connect`], by a cable of ours.
    pub(super) fn connect_by_wire(&mut self, lab: &Lab, router: &Router) -> Result<Wire> {
        let (number, port) = router.next_port();
        let interface = format!("wan{}", self.legs.len());
        let between = lab.namespace("wire")?;
        link((&self.namespace, &interface), (&between, "host"))?;
        link((&between, "router"), (router.namespace(), &port))?;
        router.namespace().ip([format!("link set {port} master lan")])?;
        for (namespace, interface) in [(&self.namespace, &interface), (router.namespace(), &port)] {
            segment_as_a_wire(namespace, interface)?;
            // A socket on the cable gets frames as they are, and so their checksums must be there.
            namespace.exec(&format!("ethtool -K {interface} tx off"))?;
        }
        let wire = Wire::start(between)?;
        self.add_leg(router, number, true)?;
        Ok(wire)
    }

    fn add_leg(&mut self, router: &Router, number: u8, v4: bool) -> Result<()> {
        let leg = self.legs.len();
        self.legs.push(Leg {
            address_v4: v4.then(|| router.lan_v4(10 + number)),
            address_v6: router.lan_v6(10 + number),
            next_hop_v4: router.lan_v4(1),
            next_hop_v6: router.lan_v6(1).unwrap_or(Ipv6Addr::UNSPECIFIED),
        });
        settle(router.namespace(), "lan")?;
        self.address(leg)
    }

    /// The IPv4 address of a connection.
    pub fn v4(&self, leg: usize) -> Result<Ipv4Addr> {
        let none = || Error::Unexpected(format!("{} has no IPv4", self.namespace.name()));
        self.legs.get(leg).and_then(|leg| leg.address_v4).ok_or_else(none)
    }

    /// The IPv6 address of a connection.
    pub fn v6(&self, leg: usize) -> Result<Ipv6Addr> {
        let none = || Error::Unexpected(format!("{} has no IPv6", self.namespace.name()));
        self.legs.get(leg).and_then(|leg| leg.address_v6).ok_or_else(none)
    }

    /// Pulls or plugs a connection, as an administrator or a flapping driver does: the kernel forgets
    /// its routes and IPv6 addresses, and they come back with it.
    pub fn set_link(&self, leg: usize, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.namespace.ip([format!("link set wan{leg} {state}")])?;
        if up { self.address(leg) } else { Ok(()) }
    }

    /// A firewall on the host itself that lets in only answers, as a default of many distributions.
    pub fn firewall(&self) -> Result<()> {
        const RULES: &str = "table inet lab_host {
            chain input { type filter hook input priority 0; policy drop;
                iifname \"lo\" accept
                ct state established,related accept
                meta l4proto { icmp, ipv6-icmp } accept
                iifname != \"wan*\" accept
            }
        }\n";
        self.namespace.exec_with_input("nft -f -", RULES).map(drop)
    }

    fn address(&self, leg: usize) -> Result<()> {
        settle(&self.namespace, &format!("wan{leg}"))?;
        let Leg { address_v4, address_v6, next_hop_v4, next_hop_v6 } = &self.legs[leg];
        let metric = 100 * (leg + 1);
        let mut lines = Vec::new();
        if let Some(address) = address_v4 {
            lines.push(format!("addr replace {address}/24 dev wan{leg}"));
            lines.push(format!(
                "route replace default via {next_hop_v4} dev wan{leg} metric {metric}"
            ));
        }
        if let Some(address) = address_v6 {
            lines.push(format!("addr replace {address}/64 dev wan{leg} nodad"));
            lines
                .push(format!("route replace ::/0 via {next_hop_v6} dev wan{leg} metric {metric}"));
        }
        self.namespace.ip(lines)
    }
}

/// Frames that leave have the length they would have on a wire: rules on lengths and captures see
/// what a network sees, not the kernel's bundles.
fn segment_as_a_wire(namespace: &Namespace, interface: &str) -> Result<()> {
    let line = format!("ethtool -K {interface} tso off gso off tx-udp-segmentation off");
    namespace.exec(&line).map(drop)
}
