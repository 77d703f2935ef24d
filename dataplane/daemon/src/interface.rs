//! Addresses, MTU, state and routes of the TUN device. What the kernel says of others is
//! [`crate::io::netlink`]'s.
//!
//! Every change is "make it so": repeated, it changes nothing.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use millrace_config::Exit;
use millrace_host::route_socket::RouteSocket;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::failure::{self, Failure};
use crate::io::netlink::{Netlink, family};

/// One interface, found by its name once.
pub struct Interface {
    name: String,
    index: u32,
    socket: RouteSocket,
}

impl Interface {
    pub fn open(name: &str) -> Result<Self, Failure> {
        let failed = |e: io::Error| failure::of_io(&format!("asking for {name}"), &e);
        let found =
            Netlink::new().and_then(|netlink| netlink.link_by_name(name)).map_err(failed)?;
        let link = found.ok_or_else(|| gone(&format!("looking for {name}")))?;
        let socket = RouteSocket::for_parts().map_err(failed)?;
        Ok(Self { name: name.to_owned(), index: link.index, socket })
    }

    /// Before the interface is up for the first time: as the kernel's own WireGuard device, it has
    /// no link-local address and takes no part in multicast. Else the kernel would send router
    /// solicitations and group reports into the tunnel for ever. `ip link set NAME multicast on`
    /// brings multicast back. And no redirects: a hub forwards from peer to peer by this interface
    /// alone, and would tell each sender that it knows a shorter way, which there is not.
    pub fn silence(&self) -> Result<(), Failure> {
        // The kernel sends them if either of the two says so.
        for place in ["all", &self.name] {
            let path = format!("/proc/sys/net/ipv4/conf/{place}/send_redirects");
            if let Err(error) = fs::write(&path, "0") {
                tracing::warn!(%error, path, "peers that talk by this host may get ICMP redirects");
            }
        }
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.change_mask = LinkFlags::Multicast;
        self.request("multicast", RouteNetlinkMessage::SetLink(message), 0)?;
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let family = AfSpecUnspec::Inet6(vec![mode]);
        message.attributes.push(LinkAttribute::AfSpecUnspec(vec![family]));
        match self.socket.change(RouteNetlinkMessage::SetLink(message), 0) {
            // No IPv6 on this host, or not with so small an MTU: nothing to silence.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
            result => result.map_err(|error| self.failure("link-local addresses", &error)),
        }
    }

    pub fn index(&self) -> u32 {
        self.index
    }

    /// In bytes, the largest packet that the kernel hands us.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), Failure> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.attributes.push(LinkAttribute::Mtu(mtu.into()));
        self.request("the MTU", RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Sets the MTU and brings the interface up.
    pub fn set_up(&self, mtu: u16) -> Result<(), Failure> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::Mtu(mtu.into()));
        // Short queues drop bursts that a worker would have taken a moment later.
        message.attributes.push(LinkAttribute::TxQueueLen(TX_QUEUE_LEN));
        self.request("bringing up", RouteNetlinkMessage::SetLink(message), 0)
    }

    pub fn add_address(&self, address: IpNet) -> Result<(), Failure> {
        let mut message = AddressMessage::default();
        message.header.family = family(address.addr());
        message.header.prefix_len = address.prefix_len();
        message.header.index = self.index;
        // A tunnel has no neighbours that could have the same address.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Local(address.addr()));
        message.attributes.push(AddressAttribute::Address(address.addr()));
        let message = RouteNetlinkMessage::NewAddress(message);
        self.request(&format!("the address {address}"), message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    pub fn remove_address(&self, address: IpNet) -> Result<(), Failure> {
        let mut message = AddressMessage::default();
        message.header.family = family(address.addr());
        message.header.prefix_len = address.prefix_len();
        message.header.index = self.index;
        message.attributes.push(AddressAttribute::Local(address.addr()));
        let message = RouteNetlinkMessage::DelAddress(message);
        self.remove(&format!("removing the address {address}"), message)
    }

    /// Adds what is missing of `nets`. A route of somebody else to the same prefix stays and is an
    /// error; one by this interface is as good as ours, whoever made it.
    pub fn add_routes(&self, nets: &[IpNet]) -> Result<(), Failure> {
        if nets.is_empty() {
            return Ok(());
        }
        let there = self.routes().map_err(|error| self.failure("asking for the routes", &error))?;
        nets.iter().filter(|net| !there.contains(&net.trunc())).try_for_each(|&net| {
            let message = RouteNetlinkMessage::NewRoute(self.route(net));
            match self.socket.change(message, NLM_F_CREATE | NLM_F_EXCL) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Err(taken(net)),
                result => result.map_err(|e| self.failure(&format!("the route to {net}"), &e)),
            }
        })
    }

    /// The prefixes that lead to this interface, by the main table.
    fn routes(&self) -> io::Result<HashSet<IpNet>> {
        let mut nets = HashSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            request.header.table = RouteHeader::RT_TABLE_MAIN;
            request.attributes.push(RouteAttribute::Oif(self.index));
            let asked = self.socket.dump(RouteNetlinkMessage::GetRoute(request), |answer| {
                if let RouteNetlinkMessage::NewRoute(route) = answer {
                    nets.extend(self.prefix(&route));
                }
            });
            match asked {
                // The kernel made no such table yet, or has no IPv6.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
                    ) => {}
                result => result?,
            }
        }
        Ok(nets)
    }

    /// The prefix of a route of the main table that leads here.
    fn prefix(&self, route: &RouteMessage) -> Option<IpNet> {
        let is_ours = route.attributes.contains(&RouteAttribute::Oif(self.index))
            && route.header.table == RouteHeader::RT_TABLE_MAIN;
        let address = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
            _ => None,
        })?;
        is_ours.then(|| IpNet::new(address, route.header.destination_prefix_length).ok())?
    }

    pub fn remove_route(&self, net: IpNet) -> Result<(), Failure> {
        let message = RouteNetlinkMessage::DelRoute(self.route(net));
        self.remove(&format!("removing the route to {net}"), message)
    }

    fn route(&self, net: IpNet) -> RouteMessage {
        let net = net.trunc();
        let mut message = RouteMessage::default();
        message.header.address_family = family(net.addr());
        message.header.destination_prefix_length = net.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        message.header.scope =
            if net.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
        let destination = match net.addr() {
            IpAddr::V4(v4) => RouteAddress::Inet(v4),
            IpAddr::V6(v6) => RouteAddress::Inet6(v6),
        };
        message.attributes.push(RouteAttribute::Destination(destination));
        message.attributes.push(RouteAttribute::Oif(self.index));
        message
    }

    /// What is gone already is as good as removed.
    fn remove(&self, what: &str, message: RouteNetlinkMessage) -> Result<(), Failure> {
        match self.socket.change(message, 0) {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EADDRNOTAVAIL)) =>
            {
                Ok(())
            }
            result => result.map_err(|error| self.failure(what, &error)),
        }
    }

    /// Sends one request and reads its acknowledgement.
    fn request(&self, what: &str, message: RouteNetlinkMessage, flags: u16) -> Result<(), Failure> {
        self.socket.change(message, flags).map_err(|error| self.failure(what, &error))
    }

    fn failure(&self, what: &str, error: &io::Error) -> Failure {
        let doing = format!("{what} on the interface {}", self.name);
        match error.raw_os_error() {
            Some(libc::ENODEV) => gone(&doing),
            Some(libc::EOPNOTSUPP | libc::EACCES) if what.contains(':') => Failure::new(
                Exit::NotSupported,
                format!("{doing}: {error}"),
                "IPv6 is off on this host: turn it on, or leave IPv6 out of the configuration",
            ),
            _ => failure::of_io(&doing, error),
        }
    }
}

fn gone(doing: &str) -> Failure {
    Failure::new(
        Exit::Error,
        format!("{doing}: the interface is gone"),
        "somebody removed it: start again, and remove it with `millrace down`",
    )
}

fn taken(net: IpNet) -> Failure {
    let family = if net.addr().is_ipv4() { "-4" } else { "-6" };
    Failure::new(
        Exit::Error,
        format!("there is a route to {net} already, which does not lead into the tunnel"),
        format!(
            "`ip {family} route show {net}` shows it: delete it, take the prefix out of \
             allowed_ips, or set routes = \"off\" and make the routes yourself"
        ),
    )
}

/// Packets that wait in the TUN device while a worker is busy.
const TX_QUEUE_LEN: u32 = 1000;
