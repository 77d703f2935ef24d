//! What the kernel says about interfaces, routes and neighbours of this namespace, and the news of
//! it. Blocking, answered by the kernel at once; never called by workers.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage, LinkXdp};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

/// Multicast groups of `linux/rtnetlink.h`.
const GROUP_LINK: u32 = 1;
/// Neighbours, addresses and routes of both families.
const GROUPS_OF_PATHS: [u32; 5] = [3, 5, 7, 9, 11];
const GENL_ID_CTRL: u16 = 16;
const GENL_HEADERS_LEN: usize = 20;
/// `NETDEV_XDP_ACT_XSK_ZEROCOPY` of `linux/netdev.h`.
const XDP_FEATURE_ZEROCOPY: u64 = 1 << 3;

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

/// A socket for questions.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self { socket })
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
        match self.ask(RouteNetlinkMessage::GetLink(request), 0) {
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
        let answer = match self.ask(RouteNetlinkMessage::GetRoute(request), 0) {
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
        let answer = match self.ask(RouteNetlinkMessage::GetNeighbour(request), 0) {
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
        self.ask(RouteNetlinkMessage::NewNeighbour(request), NLM_F_ACK | NLM_F_CREATE).map(drop)
    }

    /// Every address of this host, those of the interface `first` before the others.
    pub fn addresses(&self, first: u32) -> io::Result<Vec<IpAddr>> {
        let mut found = Vec::new();
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.send(request, NLM_F_DUMP)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let answer = read(rest)?;
                match answer.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                        let is_first = message.header.index == first;
                        found.extend(own_address(&message).map(|address| (!is_first, address)));
                    }
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::Done(_) => {
                        found.sort_by_key(|&(is_other, _)| is_other);
                        return Ok(found.into_iter().map(|(_, address)| address).collect());
                    }
                    _ => {}
                }
                // Each message is padded to four bytes, the last one perhaps not.
                let len = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(len..).unwrap_or_default();
            }
        }
    }

    /// One request, one answer.
    fn ask(
        &self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        self.send(request, flags)?;
        let (answer, _) = self.socket.recv_from_full()?;
        match read(&answer)?.payload {
            NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(None),
        }
    }

    fn send(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).map(drop)
    }
}

/// A socket for news.
#[derive(Debug)]
pub struct Monitor {
    socket: Socket,
}

/// What kinds of news came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Addresses of this host changed.
    pub addresses: bool,
    /// An interface changed, came or went.
    pub links: bool,
    /// Routes, neighbours or addresses changed; links too.
    pub paths: bool,
}

impl Monitor {
    /// News of interfaces only.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        socket.add_membership(GROUP_LINK)?;
        Ok(Self { socket })
    }

    /// Also news of neighbours, addresses and routes, or no longer. On most hosts there are some
    /// every minute, so whoever does not need them should not be woken by them.
    pub fn follow_paths(&self, follow: bool) -> io::Result<()> {
        GROUPS_OF_PATHS.iter().try_for_each(|&group| match follow {
            true => self.socket.add_membership(group),
            false => self.socket.drop_membership(group),
        })
    }

    /// Takes all news that wait; what they say of one interface: whether it was up, in order. An
    /// error: news were lost.
    pub fn take_states(&self, index: u32) -> io::Result<Vec<bool>> {
        let mut states = Vec::new();
        loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => states.extend(state(&bytes, index)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(states),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes all news that wait.
    pub fn take(&self) -> News {
        let mut news = News::default();
        loop {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => news.note(&bytes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return news,
                // News were lost: anything may have changed.
                Err(_) => return News::ALL,
            }
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the socket, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

impl News {
    pub const ALL: Self = Self { addresses: true, links: true, paths: true };

    /// Message types of `linux/rtnetlink.h`: links are 16 and 17, addresses 20 and 21; all concern
    /// paths.
    fn note(&mut self, bytes: &[u8]) {
        let kind = bytes.get(4..6).map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]));
        self.links |= matches!(kind, 16 | 17);
        self.addresses |= matches!(kind, 20 | 21);
        self.paths = true;
    }
}

/// What a message says of the interface `index`: up or not; none if it is of something else.
fn state(bytes: &[u8], index: u32) -> Option<bool> {
    match read(bytes).ok()?.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
        ) if link.header.index == index => Some(link.header.flags.contains(LinkFlags::Up)),
        _ => None,
    }
}

/// Whether the driver says that it can do AF_XDP zero-copy (netdev family of generic netlink, Linux
/// 6.3). Asking changes nothing; a yes is no promise. None: this kernel does not tell.
pub fn offers_zero_copy(ifindex: u32) -> Option<bool> {
    const GETFAMILY: u8 = 3;
    const FAMILY_NAME: u16 = 2;
    const FAMILY_ID: u16 = 1;
    const DEV_GET: u8 = 1;
    const IFINDEX: u16 = 1;
    const XDP_FEATURES: u16 = 3;
    let mut socket = Socket::new(NETLINK_GENERIC).ok()?;
    socket.bind_auto().ok()?;
    let answer = ask_generic(&socket, GENL_ID_CTRL, GETFAMILY, FAMILY_NAME, b"netdev\0")?;
    let family = u16::from_ne_bytes(*attribute(&answer, FAMILY_ID)?.first_chunk()?);
    let answer = ask_generic(&socket, family, DEV_GET, IFINDEX, &ifindex.to_ne_bytes())?;
    let features = u64::from_ne_bytes(*attribute(&answer, XDP_FEATURES)?.first_chunk()?);
    Some(features & XDP_FEATURE_ZEROCOPY != 0)
}

/// One request with one attribute; the answer's attributes.
fn ask_generic(
    socket: &Socket,
    family: u16,
    command: u8,
    attribute: u16,
    value: &[u8],
) -> Option<Vec<u8>> {
    let mut bytes = vec![0; GENL_HEADERS_LEN];
    bytes[4..6].copy_from_slice(&family.to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    (bytes[16], bytes[17]) = (command, 1);
    bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&attribute.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).ok()?;
    let (answer, _) = socket.recv_from_full().ok()?;
    let is_answer = answer.get(4..6)? == family.to_ne_bytes();
    is_answer.then(|| answer.get(GENL_HEADERS_LEN..).map(<[u8]>::to_vec))?
}

/// The value of the first attribute of `kind`.
fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let header = bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = bytes.get(4..len)?;
        if u16::from_ne_bytes([header[2], header[3]]) & 0x3fff == kind {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
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

fn read(bytes: &[u8]) -> io::Result<NetlinkMessage<RouteNetlinkMessage>> {
    NetlinkMessage::deserialize(bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

fn neighbour_message(ifindex: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = ifindex;
    message.attributes.push(NeighbourAttribute::Destination(ip.into()));
    message
}

fn family(ip: IpAddr) -> AddressFamily {
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
