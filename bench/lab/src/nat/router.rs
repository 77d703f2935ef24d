//! One router: a WAN, a LAN with hosts, a NAT or firewall between, and what can happen to it.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use super::{
    Fault, Filtering, Hairpin, Host, Input, Ipv6, Mapping, Nat, Policy, Wire, faults, rules,
};
use crate::{
    Lab, Namespace, Result,
    lab::{link, settle},
    site::forward,
};

/// What a router does.
#[derive(Clone, Debug)]
pub struct RouterOptions {
    /// How it translates and filters IPv4.
    pub nat: Nat,
    /// Whether hosts behind it reach each other by the address outside.
    pub hairpin: Hairpin,
    /// What it does with packets from outside for itself.
    pub input: Input,
    /// What traffic it lets through at all.
    pub policy: Policy,
    /// How it treats IPv6.
    pub ipv6: Ipv6,
    /// Seconds that a UDP mapping lives after its last packet.
    pub timeout_s: u32,
    /// The first three bytes of the LAN's /24; `None` for 10.N.0, or 3.N.0 where it is not translated,
    /// with the router's number.
    pub lan: Option<[u8; 3]>,
}

impl Default for RouterOptions {
    /// A well-behaved home router: one port for all destinations, filtered by address and port.
    fn default() -> Self {
        Self {
            nat: Nat::EASY,
            hairpin: Hairpin::Off,
            input: Input::Drop,
            policy: Policy::Open,
            ipv6: Ipv6::None,
            timeout_s: 120,
            lan: None,
        }
    }
}

impl RouterOptions {
    /// The defaults with another NAT.
    pub fn nat(nat: Nat) -> Self {
        Self { nat, ..Self::default() }
    }
}

/// A running router.
#[derive(Debug)]
pub struct Router {
    namespace: Namespace,
    number: u8,
    options: RouterOptions,
    lan: [u8; 3],
    /// The core, where the router is connected to it.
    core: Option<Namespace>,
    wan: Mutex<Wan>,
    hosts: AtomicU8,
}

/// The outside address, which can change.
#[derive(Clone, Copy, Debug)]
struct Wan {
    address: Ipv4Addr,
    next_hop: Ipv4Addr,
    prefix_len: u8,
}

/// What a router's WAN is plugged into.
pub(super) enum Upstream<'a> {
    Core(&'a Namespace),
    Router(&'a Router),
}

impl Router {
    pub(super) fn new(
        lab: &Lab,
        name: &str,
        number: u8,
        options: RouterOptions,
        upstream: Upstream<'_>,
    ) -> Result<Self> {
        let namespace = lab.namespace(name)?;
        forward(&namespace)?;
        let (core, wan) = match upstream {
            Upstream::Core(core) => {
                link((core, &format!("w{number}")), (&namespace, "wan"))?;
                (Some(core.clone()), core_wan(number, 0))
            }
            Upstream::Router(outer) => {
                let (host, port) = outer.next_port();
                link((outer.namespace(), &port), (&namespace, "wan"))?;
                outer.namespace.ip([format!("link set {port} master lan")])?;
                let wan = Wan {
                    address: outer.lan_v4(100 + host),
                    next_hop: outer.lan_v4(1),
                    prefix_len: 24,
                };
                (None, wan)
            }
        };
        let public = matches!(options.nat, Nat::None | Nat::Firewall);
        let lan = options.lan.unwrap_or([if public { 3 } else { 10 }, number, 0]);
        let hosts = AtomicU8::new(0);
        let router = Self { namespace, number, options, lan, core, wan: Mutex::new(wan), hosts };
        router.address(wan)?;
        router.apply(wan)?;
        Ok(router)
    }

    /// Where it lives: interfaces `wan`, and the bridge `lan`.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Unique among the routers of an internet.
    pub(super) fn number(&self) -> u8 {
        self.number
    }

    /// Its own address outside.
    pub fn wan_v4(&self) -> Ipv4Addr {
        self.wan().address
    }

    /// An address of the LAN; host 1 is the router.
    pub fn lan_v4(&self, host: u8) -> Ipv4Addr {
        let [a, b, c] = self.lan;
        Ipv4Addr::new(a, b, c, host)
    }

    /// An address of the LAN, `None` without IPv6.
    pub fn lan_v6(&self, host: u8) -> Option<Ipv6Addr> {
        let address = Ipv6Addr::new(0x2001, 0xdb8, self.number.into(), 0, 0, 0, 0, host.into());
        (self.options.ipv6 != Ipv6::None).then_some(address)
    }

    /// A new host on the LAN.
    pub fn host(&self, lab: &Lab, name: &str) -> Result<Host> {
        let mut host = Host::new(lab, name)?;
        host.connect_with(self, true)?;
        Ok(host)
    }

    /// A new host on the LAN that has no IPv4 address.
    pub fn host_v6_only(&self, lab: &Lab, name: &str) -> Result<Host> {
        let mut host = Host::new(lab, name)?;
        host.connect_with(self, false)?;
        Ok(host)
    }

    /// A new host on the LAN at the end of a cable that can be impaired.
    pub fn host_on_wire(&self, lab: &Lab, name: &str) -> Result<(Host, Wire)> {
        let mut host = Host::new(lab, name)?;
        let wire = host.connect_by_wire(lab, self)?;
        Ok((host, wire))
    }

    /// Sends all UDP from outside to `port` on to a host: what people set up by hand.
    pub fn forward_port(&self, port: u16, to: Ipv4Addr) -> Result<()> {
        let address = self.wan_v4();
        let rule = format!(
            "table ip lab_forward {{
                chain pre {{ type nat hook prerouting priority -101;
                    iifname \"wan\" ip daddr {address} udp dport {port} dnat to {to}:{port}
                }}
            }}\n"
        );
        self.nft(&rule)
    }

    /// As after a power cycle: no mapping is left, neither the kernel's nor the NAT's own.
    pub fn reboot(&self) -> Result<()> {
        // Else a packet that passes in between teaches what was just forgotten.
        const DEAF: &str = "table inet lab_off {
            chain cut { type filter hook prerouting priority -400; policy drop; }
        }\n";
        self.nft(DEAF)?;
        self.apply(self.wan())?;
        self.forget_flows()?;
        self.nft("delete table inet lab_off\n")
    }

    /// Another address from the provider: the old one and all mappings are gone. Only for routers at
    /// the core.
    pub fn change_address(&self) -> Result<Ipv4Addr> {
        let old = self.wan();
        let [_, generation, ..] = old.address.octets();
        let new = core_wan(self.number, generation + 1);
        let (number, core) = (self.number, self.core.as_ref());
        if let Some(core) = core {
            core.ip([
                format!("addr add {}/{} dev w{number}", new.next_hop, new.prefix_len),
                format!("addr del {}/{} dev w{number}", old.next_hop, old.prefix_len),
            ])?;
        }
        self.namespace.ip([
            format!("addr add {}/{} dev wan", new.address, new.prefix_len),
            format!("addr del {}/{} dev wan", old.address, old.prefix_len),
            format!("route replace default via {}", new.next_hop),
        ])?;
        *self.lock_wan() = new;
        self.apply(new)?;
        self.forget_flows()?;
        Ok(new.address)
    }

    /// What is wrong with the traffic through it from now on, in place of what was; `&[]` heals it.
    pub fn set_faults(&self, faults: &[Fault]) -> Result<()> {
        self.nft(&faults::ruleset(faults))
    }

    /// Another MTU of the link outside, in bytes: longer packets are cut up where that is allowed, else
    /// answered by an ICMP error, if the policy lets errors pass. Only for routers at the core.
    pub fn set_wan_mtu(&self, mtu: u16) -> Result<()> {
        let number = self.number;
        if let Some(core) = &self.core {
            core.ip([format!("link set w{number} mtu {mtu}")])?;
        }
        self.namespace.ip([format!("link set wan mtu {mtu}")])
    }

    /// Cuts or restores the cable outside.
    pub fn set_wan(&self, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.namespace.ip([format!("link set wan {state}")])?;
        if up {
            settle(&self.namespace, "wan")?;
            self.routes(self.wan())?;
        }
        Ok(())
    }

    /// The number and the name of the LAN's next port.
    pub(super) fn next_port(&self) -> (u8, String) {
        let number = self.hosts.fetch_add(1, Ordering::Relaxed) + 1;
        (number, format!("h{number}"))
    }

    fn address(&self, wan: Wan) -> Result<()> {
        let number = self.number;
        if let Some(core) = &self.core {
            core.ip([format!("addr add {}/{} dev w{number}", wan.next_hop, wan.prefix_len)])?;
        }
        self.namespace.ip([
            format!("addr add {}/{} dev wan", wan.address, wan.prefix_len),
            "link add lan type bridge stp_state 0 forward_delay 0".into(),
            format!("addr add {}/24 dev lan", self.lan_v4(1)),
            "link set lan up".into(),
        ])?;
        if let (Some(core), Nat::None | Nat::Firewall) = (&self.core, self.options.nat) {
            core.ip([format!("route add {}/24 via {}", self.lan_v4(0), wan.address)])?;
        }
        if let (Some(core), Some(lan)) = (&self.core, self.lan_v6(1)) {
            core.ip([
                format!("addr add 2001:db8:ff:{number}::1/64 dev w{number} nodad"),
                format!("route add 2001:db8:{number}::/48 via 2001:db8:ff:{number}::2"),
            ])?;
            self.namespace.ip([format!("addr add {lan}/64 dev lan nodad")])?;
        }
        self.routes(wan)
    }

    /// What the kernel forgets when the WAN goes down.
    fn routes(&self, wan: Wan) -> Result<()> {
        let number = self.number;
        let mut lines = vec![format!("route replace default via {}", wan.next_hop)];
        if self.core.is_some() && self.options.ipv6 != Ipv6::None {
            lines.push(format!("addr replace 2001:db8:ff:{number}::2/64 dev wan nodad"));
            lines.push(format!("route replace ::/0 via 2001:db8:ff:{number}::1"));
        }
        self.namespace.ip(lines)
    }

    /// Loads the rules with all their tables empty.
    fn apply(&self, wan: Wan) -> Result<()> {
        self.nft(&rules::ruleset(&self.options, wan.address, self.lan))?;
        // A bridge must not send its frames through the router's rules a second time. The file is
        // there only where the kernel can do that.
        for family in ["iptables", "ip6tables"] {
            let key = format!("net/bridge/bridge-nf-call-{family}");
            if std::path::Path::new("/proc/sys").join(&key).exists() {
                self.namespace.sysctl(&key, "0")?;
            }
        }
        let seconds = self.options.timeout_s.to_string();
        for key in ["nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"] {
            self.namespace.sysctl(&format!("net/netfilter/{key}"), &seconds)?;
        }
        Ok(())
    }

    fn forget_flows(&self) -> Result<()> {
        self.namespace.exec("conntrack -F").map(drop)
    }

    pub(super) fn nft(&self, rules: &str) -> Result<()> {
        self.namespace.exec_with_input("nft -f -", rules).map(drop)
    }

    fn wan(&self) -> Wan {
        *self.lock_wan()
    }

    fn lock_wan(&self) -> MutexGuard<'_, Wan> {
        self.wan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of a router at the core; its `generation` counts the provider's changes.
fn core_wan(number: u8, generation: u8) -> Wan {
    let address = |host| Ipv4Addr::new(2, generation, number, host);
    Wan { address: address(2), next_hop: address(1), prefix_len: 30 }
}

impl Nat {
    /// What most home routers do.
    pub const EASY: Self = Self::Translate {
        mapping: Mapping::EndpointIndependent,
        filtering: Filtering::AddressAndPortDependent,
    };
    /// Another random port for each destination: what cannot be punched through.
    pub const HARD: Self = Self::Translate {
        mapping: Mapping::AddressAndPortDependent,
        filtering: Filtering::AddressAndPortDependent,
    };
    /// One port for all destinations, and whoever writes to it gets through.
    pub const FULL_CONE: Self = Self::Translate {
        mapping: Mapping::EndpointIndependent,
        filtering: Filtering::EndpointIndependent,
    };
    /// One port for all destinations; hosts that were written to get through from any of their ports.
    pub const RESTRICTED_CONE: Self = Self::Translate {
        mapping: Mapping::EndpointIndependent,
        filtering: Filtering::AddressDependent,
    };
}
