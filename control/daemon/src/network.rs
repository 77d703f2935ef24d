//! What this host has of interfaces, addresses and default routes, and what of it is a way to
//! peers.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};

use millrace_host::route_socket::RouteSocket;
use millrace_path::candidate::{Candidate, CandidateKind};
use millrace_path::path::UplinkId;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType,
};

use crate::limits::UPLINKS_MAX;

/// An interface that is up and has a carrier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    /// A tunnel, ours or another's: its addresses are no way for a tunnel.
    pub is_tunnel: bool,
}

/// One of this host's addresses that others can reach, perhaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    pub ifindex: u32,
    pub ip: IpAddr,
    pub prefix_len: u8,
    /// RFC 8981: changes every day; fine for a path, not worth telling if there is another.
    pub is_temporary: bool,
}

/// A default route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DefaultRoute {
    pub ipv6: bool,
    /// The smaller is the kernel's choice.
    pub metric: u32,
    pub ifindex: u32,
    pub gateway: Option<IpAddr>,
}

/// One look at the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    pub links: BTreeMap<u32, Link>,
    pub addresses: Vec<Address>,
    /// The kernel's choice of each family first.
    pub defaults: Vec<DefaultRoute>,
}

/// One of our ways out: a family and where from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    pub ipv6: bool,
    /// Interface to send on; 0: what the kernel's routes say.
    pub ifindex: u32,
}

impl Network {
    /// Asks the kernel. Addresses and routes of interfaces that are down do not appear.
    pub fn look() -> io::Result<Self> {
        let socket = RouteSocket::new()?;
        let mut this = Self::default();
        socket.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                this.links.extend(read_link(&link));
            }
        })?;
        socket.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |answer| {
            if let RouteNetlinkMessage::NewAddress(address) = answer {
                this.addresses.extend(read_address(&address));
            }
        })?;
        socket.dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()), |answer| {
            if let RouteNetlinkMessage::NewRoute(route) = answer {
                this.defaults.extend(read_default(&route));
            }
        })?;
        let Self { links, addresses, defaults } = &mut this;
        addresses.retain(|address| links.contains_key(&address.ifindex));
        defaults.retain(|route| links.get(&route.ifindex).is_some_and(|link| !link.is_tunnel));
        addresses.sort_unstable();
        defaults.sort_unstable();
        Ok(this)
    }

    /// Our ways out, by their [`UplinkId`]: the kernel's choice for each family that has any
    /// address, then each further interface with a default route of its own.
    pub fn ways(&self) -> Vec<(UplinkId, Way)> {
        let mut ways = Vec::new();
        for ipv6 in [false, true] {
            let routes = self.defaults.iter().filter(|route| route.ipv6 == ipv6);
            if self.usable().any(|address| address.ip.is_ipv6() == ipv6) {
                ways.push((UplinkId(u16::from(ipv6)), Way { ipv6, ifindex: 0 }));
            }
            let mut seen = Vec::new();
            for route in routes {
                if !seen.contains(&route.ifindex) {
                    seen.push(route.ifindex);
                }
            }
            ways.extend(seen.into_iter().skip(1).map(|ifindex| {
                // Stable over looks, so that a path keeps its name.
                (
                    UplinkId(2 + (2 * (ifindex % 30_000) + u32::from(ipv6)) as u16),
                    Way { ipv6, ifindex },
                )
            }));
        }
        ways.truncate(UPLINKS_MAX);
        ways
    }

    /// What peers are told of our interfaces. Of several IPv6 addresses of one prefix the one that
    /// stays.
    pub fn candidates(&self, port: u16) -> Vec<Candidate> {
        let usable: Vec<&Address> = self.usable().collect();
        let lasting = |address: &&&Address| {
            !address.is_temporary
                || !usable.iter().any(|other| {
                    !other.is_temporary && other.ip.is_ipv6() && other.ifindex == address.ifindex
                })
        };
        let kind = CandidateKind::Interface;
        let candidate =
            |address: &&Address| Candidate { kind, address: SocketAddr::new(address.ip, port) };
        usable.iter().filter(lasting).map(candidate).collect()
    }

    /// The router of the kernel's choice, with the address that we have towards it.
    pub fn gateway(&self, ipv6: bool) -> Option<(DefaultRoute, IpAddr)> {
        let route = *self.defaults.iter().find(|route| route.ipv6 == ipv6)?;
        let own = self
            .addresses
            .iter()
            .find(|address| address.ifindex == route.ifindex && address.ip.is_ipv6() == ipv6)?;
        Some((route, own.ip))
    }

    /// Whether what was measured before still means something.
    pub fn is_major_change(&self, before: &Self) -> bool {
        self.defaults != before.defaults || self.ways() != before.ways()
    }

    /// Addresses that are not inside a tunnel.
    fn usable(&self) -> impl Iterator<Item = &Address> {
        self.addresses
            .iter()
            .filter(|address| self.links.get(&address.ifindex).is_some_and(|link| !link.is_tunnel))
    }
}

fn read_link(link: &LinkMessage) -> Option<(u32, Link)> {
    let flags = link.header.flags;
    let up = flags.contains(LinkFlags::Up | LinkFlags::LowerUp);
    if !up || flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut found = Link { name: String::new(), is_tunnel: flags.contains(LinkFlags::Pointopoint) };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::LinkInfo(infos) => {
                found.is_tunnel |= infos.iter().any(|info| {
                    matches!(info, LinkInfo::Kind(InfoKind::Tun | InfoKind::Wireguard))
                });
            }
            _ => {}
        }
    }
    Some((link.header.index, found))
}

fn read_address(message: &AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let dead = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    if flags.intersects(dead) || message.header.scope != AddressScope::Universe {
        return None;
    }
    Some(Address {
        ifindex: message.header.index,
        // Of a point-to-point link "address" is the other end.
        ip: local.or(address)?,
        prefix_len: message.header.prefix_len,
        is_temporary: message.header.flags.contains(AddressHeaderFlags::Secondary)
            && address.is_some_and(|ip| ip.is_ipv6()),
    })
}

fn read_default(route: &RouteMessage) -> Option<DefaultRoute> {
    let header = &route.header;
    let default = header.destination_prefix_length == 0
        && header.kind == RouteType::Unicast
        && header.table == RouteHeader::RT_TABLE_MAIN;
    if !default {
        return None;
    }
    let ipv6 = u8::from(header.address_family) == libc::AF_INET6 as u8;
    let mut found = DefaultRoute { ipv6, metric: 0, ifindex: 0, gateway: None };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => found.ifindex = *ifindex,
            RouteAttribute::Priority(metric) => found.metric = *metric,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => found.gateway = Some((*ip).into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => found.gateway = Some((*ip).into()),
            _ => {}
        }
    }
    (found.ifindex != 0).then_some(found)
}

#[cfg(test)]
mod tests {
    use millrace_lab::{Lab, lab};

    use super::*;

    #[test]
    fn the_host_is_seen_as_it_is() {
        let lab = Lab::new().unwrap();
        let (a, b) = (lab.namespace("a").unwrap(), lab.namespace("b").unwrap());
        lab::link((&a, "veth0"), (&b, "veth1")).unwrap();
        lab::link((&a, "veth2"), (&b, "veth3")).unwrap();
        a.ip([
            "addr add 192.0.2.1/24 dev veth0",
            "addr add 2001:db8::1/64 dev veth0 nodad",
            "addr add 198.51.100.1/24 dev veth2",
            "route add default via 192.0.2.2",
            "route add default via 198.51.100.2 metric 5",
            "tuntap add mode tun name tun0",
            "addr add 10.9.0.1/24 dev tun0",
            "link set tun0 up",
            "link add gone0 type veth peer name gone1",
            "addr add 203.0.113.1/24 dev gone0",
        ])
        .unwrap();
        let seen = a.run(Network::look).unwrap();
        let ips: Vec<String> =
            seen.candidates(7).iter().map(|candidate| candidate.address.to_string()).collect();
        assert_eq!(ips, ["192.0.2.1:7", "[2001:db8::1]:7", "198.51.100.1:7"], "{seen:?}");
        let ways: Vec<(bool, bool)> =
            seen.ways().iter().map(|(_, way)| (way.ipv6, way.ifindex == 0)).collect();
        assert_eq!(ways, [(false, true), (false, false), (true, true)], "{seen:?}");
        let (route, own) = seen.gateway(false).unwrap();
        assert_eq!(route.gateway, Some([192, 0, 2, 2].into()));
        assert_eq!(own, IpAddr::from([192, 0, 2, 1]));
        a.ip(["route del default via 192.0.2.2"]).unwrap();
        let after = a.run(Network::look).unwrap();
        assert!(after.is_major_change(&seen));
        assert_eq!(after.ways().len(), 2);
    }
}
