//! The standard topology: two sites, each with a gateway, and a router as the internet.
//!
//! ```text
//!  host a ──lan── gateway a ──wan── router ──wan── gateway b ──lan── host b
//!  10.1.0.2  10.1.0.1 192.0.2.2   .1    .1  198.51.100.2 10.2.0.1  10.2.0.2
//! ```
//! IPv6 goes the same ways: 2001:db8:1::2 and 2001:db8:2::2 outside, random unique local prefixes
//! inside (random, so that a capture can be searched for them without false finds). The router
//! knows no inner address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{InnerPrefix, Lab, Namespace, Result, lab::link};

/// What may differ between sites.
#[derive(Clone, Debug)]
pub struct SiteOptions {
    /// MTU of the links between gateways and router, in bytes.
    pub wan_mtu: u32,
    /// MTU of the links between hosts and gateways, in bytes.
    pub lan_mtu: u32,
}

impl Default for SiteOptions {
    fn default() -> Self {
        Self { wan_mtu: 1500, lan_mtu: 1500 }
    }
}

/// The whole topology.
#[derive(Debug)]
pub struct Site {
    /// The left site.
    pub a: Side,
    /// The right site.
    pub b: Side,
    /// The internet: interfaces `wan-a` and `wan-b`.
    pub router: Namespace,
}

/// One site: a host and its gateway. The gateway's interfaces are `lan` and `wan`, the host's `lan`.
#[derive(Clone, Debug)]
pub struct Side {
    /// The LAN host.
    pub host: Namespace,
    /// The gateway.
    pub gateway: Namespace,
    /// The host's IPv4 address.
    pub host_v4: Ipv4Addr,
    /// The host's IPv6 address.
    pub host_v6: Ipv6Addr,
    /// The gateway's IPv4 address inside the tunnel.
    pub tunnel_v4: Ipv4Addr,
    /// The gateway's IPv6 address inside the tunnel.
    pub tunnel_v6: Ipv6Addr,
    /// The gateway's public IPv4 address.
    pub wan_v4: Ipv4Addr,
    /// The gateway's public IPv6 address.
    pub wan_v6: Ipv6Addr,
    /// The gateway's next hop, IPv4.
    pub router_v4: Ipv4Addr,
    /// The gateway's next hop, IPv6.
    pub router_v6: Ipv6Addr,
    gateway_lan_v4: Ipv4Addr,
    gateway_lan_v6: Ipv6Addr,
}

impl Site {
    /// Builds the topology; nothing runs in it yet.
    pub fn new(lab: &Lab, options: &SiteOptions) -> Result<Self> {
        let inside = InnerPrefix::random()?;
        let router = lab.namespace("router")?;
        let a = Side::new(lab, "a", 1, Ipv4Addr::new(192, 0, 2, 0), inside)?;
        let b = Side::new(lab, "b", 2, Ipv4Addr::new(198, 51, 100, 0), inside)?;
        for (side, wan) in [(&a, "wan-a"), (&b, "wan-b")] {
            link((&side.host, "lan"), (&side.gateway, "lan"))?;
            link((&side.gateway, "wan"), (&router, wan))?;
            side.address(options)?;
            router.ip([
                format!("link set {wan} mtu {}", options.wan_mtu),
                format!("addr add {}/24 dev {wan}", side.router_v4),
                format!("addr add {}/64 dev {wan} nodad", side.router_v6),
            ])?;
        }
        forward(&router)?;
        Ok(Self { a, b, router })
    }

    /// The inner addresses that must not be seen on the outside links.
    pub fn inner_addresses(&self) -> Vec<IpAddr> {
        [&self.a, &self.b].into_iter().flat_map(Side::inner_addresses).collect()
    }
}

impl Side {
    fn new(lab: &Lab, name: &str, number: u8, wan: Ipv4Addr, inside: InnerPrefix) -> Result<Self> {
        let [w, x, y, _] = wan.octets();
        let wan_v6 = |host| Ipv6Addr::new(0x2001, 0xdb8, number.into(), 0, 0, 0, 0, host);
        Ok(Self {
            host: lab.namespace(&format!("host {name}"))?,
            gateway: lab.namespace(&format!("gateway {name}"))?,
            host_v4: Ipv4Addr::new(10, number, 0, 2),
            host_v6: inside.address(number.into(), 2),
            tunnel_v4: Ipv4Addr::new(10, 77, 0, number),
            tunnel_v6: inside.address(77, number.into()),
            wan_v4: Ipv4Addr::new(w, x, y, 2),
            wan_v6: wan_v6(2),
            router_v4: Ipv4Addr::new(w, x, y, 1),
            router_v6: wan_v6(1),
            gateway_lan_v4: Ipv4Addr::new(10, number, 0, 1),
            gateway_lan_v6: inside.address(number.into(), 1),
        })
    }

    /// The prefixes that the other side reaches through this gateway.
    pub fn allowed_ips(&self) -> Vec<String> {
        let [a, b, c, _] = self.host_v4.octets();
        let [s0, s1, s2, s3, ..] = self.host_v6.segments();
        vec![
            format!("{a}.{b}.{c}.0/24"),
            format!("{}/32", self.tunnel_v4),
            format!("{}/64", Ipv6Addr::new(s0, s1, s2, s3, 0, 0, 0, 0)),
            format!("{}/128", self.tunnel_v6),
        ]
    }

    /// The addresses for the tunnel interface.
    pub fn tunnel_addresses(&self) -> Vec<String> {
        vec![format!("{}/24", self.tunnel_v4), format!("{}/64", self.tunnel_v6)]
    }

    fn inner_addresses(&self) -> Vec<IpAddr> {
        vec![
            self.host_v4.into(),
            self.host_v6.into(),
            self.tunnel_v4.into(),
            self.tunnel_v6.into(),
            self.gateway_lan_v4.into(),
            self.gateway_lan_v6.into(),
        ]
    }

    fn address(&self, options: &SiteOptions) -> Result<()> {
        self.host.ip([
            format!("link set lan mtu {}", options.lan_mtu),
            format!("addr add {}/24 dev lan", self.host_v4),
            format!("addr add {}/64 dev lan nodad", self.host_v6),
            format!("route add default via {}", self.gateway_lan_v4),
            format!("route add ::/0 via {}", self.gateway_lan_v6),
        ])?;
        self.gateway.ip([
            format!("link set lan mtu {}", options.lan_mtu),
            format!("link set wan mtu {}", options.wan_mtu),
            format!("addr add {}/24 dev lan", self.gateway_lan_v4),
            format!("addr add {}/64 dev lan nodad", self.gateway_lan_v6),
            format!("addr add {}/24 dev wan", self.wan_v4),
            format!("addr add {}/64 dev wan nodad", self.wan_v6),
            format!("route add default via {}", self.router_v4),
            format!("route add ::/0 via {}", self.router_v6),
        ])?;
        forward(&self.gateway)
    }
}

/// Lets a namespace forward both families.
pub fn forward(namespace: &Namespace) -> Result<()> {
    namespace.sysctl("net/ipv4/ip_forward", "1")?;
    namespace.sysctl("net/ipv6/conf/all/forwarding", "1")
}
