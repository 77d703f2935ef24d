//! The core and the servers that everybody reaches.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
};

use super::router::{Router, RouterOptions, Upstream};
use crate::{Error, Lab, Namespace, Result, lab::link, overlay, site::forward};

/// The server's two IPv4 addresses: what a NAT does for one says nothing about the other.
pub const SERVER_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(2, 255, 1, 10), Ipv4Addr::new(2, 255, 2, 10)];

/// The server's two IPv6 addresses.
pub const SERVER_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 0x10),
    Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 0x11),
];

/// The name of both first addresses of the server.
pub const RELAY_NAME: &str = "relay.lab.example";

/// Addresses that the internet does not route: a packet that missed its translation dies in the core.
const NOT_ROUTED: [&str; 4] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"];

/// A core router with a server behind it; [`Router`]s connect to it.
#[derive(Debug)]
pub struct Internet {
    /// The core: interface `server` and one `wN` for each router.
    pub core: Namespace,
    /// The server: interface `wan` with [`SERVER_V4`] and [`SERVER_V6`].
    pub server: Namespace,
    routers: AtomicU8,
}

impl Internet {
    /// The core and the server, no router yet.
    pub fn new(lab: &Lab) -> Result<Self> {
        let (core, server) = (lab.namespace("core")?, lab.namespace("server")?);
        forward(&core)?;
        link((&core, "server"), (&server, "wan"))?;
        let near = ["2.255.1.1/24", "2.255.2.1/24"].map(|a| format!("addr add {a} dev server"));
        core.ip(near)?;
        core.ip(["addr add 2001:db8:5::1/64 dev server nodad"])?;
        core.ip(NOT_ROUTED.map(|prefix| format!("route add blackhole {prefix}")))?;
        server.ip(SERVER_V4.map(|address| format!("addr add {address}/24 dev wan")))?;
        server.ip(SERVER_V6.map(|address| format!("addr add {address}/64 dev wan nodad")))?;
        server.ip(["route add default via 2.255.1.1", "route add ::/0 via 2001:db8:5::1"])?;
        let hosts = lab.directory().join("hosts");
        let [v4, v6] = [SERVER_V4[0].to_string(), SERVER_V6[0].to_string()];
        let names = format!("127.0.0.1 localhost\n{v4} {RELAY_NAME}\n{v6} {RELAY_NAME}\n");
        std::fs::write(hosts, names).map_err(Error::system("write the names of the internet"))?;
        Ok(Self { core, server, routers: AtomicU8::new(0) })
    }

    /// A new router at the core.
    pub fn router(&self, lab: &Lab, name: &str, options: RouterOptions) -> Result<Router> {
        let number = self.next();
        Router::new(lab, name, number, options, Upstream::Core(&self.core))
    }

    /// A new router whose WAN is a place on another router's LAN: double NAT, or a home behind a
    /// carrier's NAT.
    pub fn router_behind(
        &self,
        lab: &Lab,
        name: &str,
        options: RouterOptions,
        outer: &Router,
    ) -> Result<Router> {
        Router::new(lab, name, self.next(), options, Upstream::Router(outer))
    }

    /// Routers count from 1; the number is part of their addresses.
    fn next(&self) -> u8 {
        self.routers.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Makes the names of the lab's internet known to a program, by its own view of /etc/hosts.
pub fn names_for(lab: &Lab, command: &mut Command) -> Result<()> {
    overlay::apply(command, &lab.directory().join("hosts"), Path::new("/etc/hosts"))
}
