//! What the kernel says about interfaces, routes and neighbours of this namespace. Blocking, answered
//! by the kernel at once; never called by workers.

mod generic;

use std::io;
use std::net::IpAddr;

use millrace_host::route_socket::RouteSocket;
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage, LinkXdp};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

pub use self::generic::offers_zero_copy;

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mtu: u32,
    pub address: Option<[u8; 6]>,
    /// Set up by the administrator.
    pub is_up: bool,
    /// And the other end is there.
    pub has_carrier: bool,
    pub is_ethernet: bool,
    /// Number of the XDP program on it.
    pub xdp_program: Option<u32>,
}

/// How packets to an address leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub ifindex: u32,
    pub gateway: Option<IpAddr>,
    /// The address that the kernel would send from.
    pub source: Option<IpAddr>,
}

/// What the kernel knows about a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub address: [u8; 6],
    /// Known, but not heard of for a while: the kernel must be told that it is in use, because it
    /// does not see our packets.
    pub is_stale: bool,
}

/// Asks the questions.
#[derive(Debug)]
pub struct Netlink {
    socket: RouteSocket,
}

impl Netlink {
    pub fn new() -> io::Result<Self> {
        Ok(Self { socket: RouteSocket::new()? })
    }

    pub fn link_by_name(&self, name: &str) -> io::Result<Option<Link>> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.into()));
        self.link(request)
    }

    pub fn link_by_index(&self, index: u32) -> io::Result<Option<Link>> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        self.link(request)
    }

    /// The interface of the default route, IPv4's before IPv6's.
    pub fn default_link(&self) -> io::Result<Option<Link>> {
        // Nothing is sent there: addresses that only a default route leads to.
        for far in [IpAddr::from([192, 88, 99, 1]), IpAddr::from([0x2000, 0, 0, 0, 0, 0, 0, 1])] {
            if let Some(route) = self.route(far, None, 0)? {
                return self.link_by_index(route.ifindex);
            }
        }
        Ok(None)
    }

    /// Packets that an interface dropped instead of sending, since it was made; for a TUN device,
    /// those that its reader was too slow for. None if there is no such interface.
    pub fn dropped_sending(&self, name: &str) -> io::Result<Option<u64>> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.into()));
        let Some(link) = self.link_message(request)? else { return Ok(None) };
        let dropped = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(statistics) => Some(statistics.tx_dropped),
            _ => None,
        });
        dropped.map(Some).ok_or_else(|| io::Error::other("the kernel sent no statistics"))
    }

    fn link(&self, request: LinkMessage) -> io::Result<Option<Link>> {
        Ok(self.link_message(request)?.as_ref().map(read_link))
    }

    fn link_message(&self, request: LinkMessage) -> io::Result<Option<LinkMessage>> {
        match self.socket.ask(RouteNetlinkMessage::GetLink(request), 0) {
            Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(Some(link)),
            Ok(_) => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The route to `remote`, from `local` if one is given, for packets with `mark`. None if there
    /// is none, or if it does not leave this host.
    pub fn route(
        &self,
        remote: IpAddr,
        local: Option<IpAddr>,
        mark: u32,
    ) -> io::Result<Option<Route>> {
        let mut request = RouteMessage::default();
        let bits = if remote.is_ipv4() { 32 } else { 128 };
        request.header.address_family = family(remote);
        request.header.destination_prefix_length = bits;
        request.attributes.push(RouteAttribute::Destination(remote.into()));
        if let Some(local) = local {
            request.header.source_prefix_length = bits;
            request.attributes.push(RouteAttribute::Source(local.into()));
        }
        if mark != 0 {
            request.attributes.push(RouteAttribute::Mark(mark));
        }
        let answer = match self.socket.ask(RouteNetlinkMessage::GetRoute(request), 0) {
            Ok(Some(RouteNetlinkMessage::NewRoute(answer))) => answer,
            Ok(_) => return Ok(None),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL | libc::EACCES)
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if answer.header.kind != RouteType::Unicast {
            return Ok(None);
        }
        let mut route = Route { ifindex: 0, gateway: None, source: None };
        for attribute in answer.attributes {
            match attribute {
                RouteAttribute::Oif(index) => route.ifindex = index,
                RouteAttribute::Gateway(gateway) => route.gateway = address(&gateway),
                RouteAttribute::PrefSource(source) => route.source = address(&source),
                // A gateway of the other family: rare, and left to the kernel.
                RouteAttribute::Via(_) | RouteAttribute::Encap(_) => return Ok(None),
                _ => {}
            }
        }
        Ok((route.ifindex != 0).then_some(route))
    }

    /// None if the neighbour's hardware address is not known.
    pub fn neighbour(&self, ifindex: u32, ip: IpAddr) -> io::Result<Option<Neighbour>> {
        let request = neighbour_message(ifindex, ip);
        let answer = match self.socket.ask(RouteNetlinkMessage::GetNeighbour(request), 0) {
            Ok(Some(RouteNetlinkMessage::NewNeighbour(answer))) => answer,
            Ok(_) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        let is_stale = match answer.header.state {
            NeighbourState::Stale => true,
            NeighbourState::Reachable
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp => false,
            _ => return Ok(None),
        };
        Ok(answer.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLocalAddress(bytes) => {
                Some(Neighbour { address: bytes.as_slice().try_into().ok()?, is_stale })
            }
            _ => None,
        }))
    }

    /// Tells the kernel that a neighbour is in use: it asks for an unknown address and makes sure
    /// of a stale one. The answer comes as news.
    pub fn use_neighbour(&self, ifindex: u32, ip: IpAddr) -> io::Result<()> {
        let mut request = neighbour_message(ifindex, ip);
        request.header.flags = NeighbourFlags::Use;
        self.socket.change(RouteNetlinkMessage::NewNeighbour(request), NLM_F_CREATE)
    }

    /// Every address of this host, those of the interface `first` before the others.
    pub fn addresses(&self, first: u32) -> io::Result<Vec<IpAddr>> {
        let mut found = Vec::new();
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.socket.dump(request, |answer| {
            if let RouteNetlinkMessage::NewAddress(message) = answer {
                let is_first = message.header.index == first;
                found.extend(own_address(&message).map(|address| (!is_first, address)));
            }
        })?;
        found.sort_by_key(|&(is_other, _)| is_other);
        Ok(found.into_iter().map(|(_, address)| address).collect())
    }
}

fn read_link(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        address: None,
        is_up: flags.contains(LinkFlags::Up),
        has_carrier: flags.contains(LinkFlags::LowerUp),
        is_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        xdp_program: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Xdp(facts) => {
                link.xdp_program = facts.iter().find_map(|fact| match fact {
                    LinkXdp::ProgId(id) => Some(*id),
                    _ => None,
                });
            }
            LinkAttribute::Address(bytes) => link.address = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    link
}

/// Ours, where the message also names the other end's.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
        message.attributes.iter().find_map(wanted)
    };
    find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    })
    .or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

fn neighbour_message(ifindex: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = ifindex;
    message.attributes.push(NeighbourAttribute::Destination(ip.into()));
    message
}

/// Of an address, as rtnetlink counts them.
pub fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use millrace_host::monitor::{Monitor, News};

    use super::*;
    use millrace_lab::{Lab, lab};

    #[test]
    fn links_routes_and_neighbours_are_read() {
        let lab = Lab::new().unwrap();
        let (a, b) = (lab.namespace("a").unwrap(), lab.namespace("b").unwrap());
        lab::link((&a, "veth0"), (&b, "veth1")).unwrap();
        a.ip([
            "addr add 192.0.2.1/24 dev veth0",
            "addr add 2001:db8::1/64 dev veth0",
            "route add 198.51.100.0/24 via 192.0.2.2",
            "neigh add 192.0.2.2 lladdr 02:00:00:00:00:07 dev veth0 nud stale",
        ])
        .unwrap();
        b.ip(["addr add 192.0.2.3/24 dev veth1"]).unwrap();
        a.run(|| {
            let netlink = Netlink::new().unwrap();
            let monitor = Monitor::new().unwrap();
            monitor.follow_paths(true).unwrap();
            let link = netlink.link_by_name("veth0").unwrap().unwrap();
            assert_eq!((link.mtu, link.is_up, link.is_ethernet), (1500, true, true));
            assert_eq!(netlink.link_by_index(link.index).unwrap().unwrap().name, "veth0");
            assert_eq!(netlink.link_by_name("veth9").unwrap(), None);
            let ask = |text: &str| netlink.route(text.parse().unwrap(), None, 0).unwrap();
            let route = ask("198.51.100.7").unwrap();
            assert_eq!(route.gateway, Some("192.0.2.2".parse().unwrap()));
            assert_eq!(route.source, Some("192.0.2.1".parse().unwrap()));
            assert_eq!(route.ifindex, link.index);
            let route = ask("2001:db8::9").unwrap();
            assert_eq!((route.gateway, route.ifindex), (None, link.index));
            assert_eq!(ask("203.0.113.1"), None, "no route");
            assert_eq!(ask("192.0.2.1"), None, "our own address");
            let addresses = netlink.addresses(link.index).unwrap();
            let expected: [IpAddr; 2] =
                ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
            assert!(addresses.starts_with(&expected), "{addresses:?}");
            assert!(addresses.contains(&[127, 0, 0, 1].into()), "{addresses:?}");
            let known = netlink.neighbour(link.index, "192.0.2.2".parse().unwrap()).unwrap();
            assert_eq!(known, Some(Neighbour { address: [2, 0, 0, 0, 0, 7], is_stale: true }));
            // An unknown neighbour is asked for, and the answer is news.
            let other: IpAddr = "192.0.2.3".parse().unwrap();
            assert_eq!(netlink.neighbour(link.index, other).unwrap(), None);
            netlink.use_neighbour(link.index, other).unwrap();
            millrace_lab::wait_for("the neighbour", std::time::Duration::from_secs(5), || {
                netlink.neighbour(link.index, other).unwrap()
            })
            .unwrap();
            let news = monitor.take();
            assert!(news.paths, "{news:?}");
            monitor.follow_paths(false).unwrap();
            a.ip(["route add 203.0.113.0/24 via 192.0.2.2", "neigh del 192.0.2.2 dev veth0"])
                .unwrap();
            assert_eq!(monitor.take(), News::default(), "not asked for");
            a.ip(["link set veth0 mtu 1400"]).unwrap();
            assert!(monitor.take().links);
            assert_eq!(offers_zero_copy(link.index), Some(false), "veth has none");
        });
    }
}
