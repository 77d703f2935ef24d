//! The nftables rules of a router. NAT chains see only the first packet of a flow, and all run at one
//! place, so a mapping of our own needs three steps: translate by the table, let the kernel choose
//! where the table has nothing, and learn afterwards what it chose.

use std::net::Ipv4Addr;

use super::RouterOptions;

/// What a router does with IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nat {
    /// It routes: hosts have public addresses.
    None,
    /// It routes, and lets in only what answers something from inside.
    Firewall,
    /// Its address outside is its first host's alone, all ports, unfiltered: a cloud's public address.
    OneToOne,
    /// The kernel's masquerading and nothing else, as most Linux routers.
    Linux,
    /// Behaviour by RFC 4787.
    Translate {
        /// Section 4.1.
        mapping: Mapping,
        /// Section 5.
        filtering: Filtering,
    },
}

/// Which port outside an inside socket gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The same for all destinations; the inside port's number where it is free.
    EndpointIndependent,
    /// The same for all destinations, of random number.
    EndpointIndependentRandom,
    /// One for each destination address.
    AddressDependent,
    /// A random one for each destination address and port: a symmetric NAT.
    AddressAndPortDependent,
    /// The next one for each destination address and port.
    Sequential,
}

/// Who may write to a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    /// Everybody.
    EndpointIndependent,
    /// Addresses that the inside socket has written to, from any port.
    AddressDependent,
    /// Addresses and ports that the inside socket has written to.
    AddressAndPortDependent,
}

/// Whether hosts inside reach each other's mappings (RFC 4787 section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hairpin {
    /// They do not.
    Off,
    /// They do, and see each other's mapping as the source, as the RFC wants it.
    External,
    /// They do, and see each other's inside address; with a filter by address that helps nobody.
    Internal,
}

/// What becomes of packets to the router itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// They vanish.
    Drop,
    /// They are answered by an ICMP error.
    Reject,
    /// They reach the router's own sockets. The kernel then remembers a flow for a probe that came
    /// too early, and gives the inside socket another port when it answers.
    Accept,
}

/// What a router lets through at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Everything.
    Open,
    /// No UDP but DNS: it vanishes.
    NoUdp,
    /// No UDP but DNS: it is refused by an ICMP error.
    RejectUdp,
    /// Only TCP to port 443.
    OnlyTcp443,
    /// Nothing: a proxy on the router is the only way out.
    Nothing,
    /// No ICMP errors: packets that are too long vanish.
    NoIcmpErrors,
    /// No IPv4: it vanishes, while addresses and routes look well.
    NoIpv4,
}

/// What a router does with IPv6, which it never translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv6 {
    /// There is none.
    None,
    /// It routes.
    Open,
    /// It lets in only what answers something from inside (RFC 6092).
    Firewall,
}

/// A mark on flows that came in by a mapping of ours, and so are subject to its filtering.
const BY_MAPPING: &str = "0x71";

/// Ports of a sequential NAT: the first, and how many before it starts again.
const SEQUENTIAL: (u16, u16) = (40_000, 1_000);

/// All tables of a router; they replace those that are there.
pub(super) fn ruleset(options: &RouterOptions, wan: Ipv4Addr, lan: [u8; 3]) -> String {
    let sections = [
        "table ip lab_nat\ndelete table ip lab_nat\ntable ip lab_nat {\n".into(),
        memory(options),
        inbound(options, wan, lan),
        own_input(options, wan),
        routed(options),
        outbound(options, wan, lan),
        learned(options),
        "}\n".into(),
        policy(options),
    ];
    sections.concat()
}

/// The NAT's own tables, and whom each inside socket has written to: noted before any translation,
/// because it counts even where the packet dies later.
fn memory(options: &RouterOptions) -> String {
    let Nat::Translate { .. } = options.nat else { return String::new() };
    let flags = format!("flags dynamic,timeout; timeout {}s; size 65536;", options.timeout_s);
    format!(
        "map port_of {{ typeof ip saddr . udp sport : udp dport; {flags} }}
        map socket_of {{ typeof udp dport : ip daddr . udp dport; {flags} }}
        set used {{ typeof udp sport; {flags} }}
        set address_seen {{ typeof ip saddr . udp sport . ip daddr; {flags} }}
        set endpoint_seen {{ typeof ip saddr . udp sport . ip daddr . udp dport; {flags} }}
        chain note {{ type filter hook prerouting priority -290;
            iifname \"lan\" meta l4proto udp update @address_seen {{ ip saddr . udp sport . ip daddr }}
            iifname \"lan\" meta l4proto udp update @endpoint_seen {{ ip saddr . udp sport . ip daddr . udp dport }}
        }}\n"
    )
}

/// Translation of what comes to a mapping.
fn inbound(options: &RouterOptions, wan: Ipv4Addr, [a, b, c]: [u8; 3]) -> String {
    let mut rules = String::new();
    let by_mapping = format!(
        "ip daddr {wan} udp dport @used ct mark set {BY_MAPPING} dnat ip to udp dport map @socket_of\n"
    );
    match options.nat {
        Nat::OneToOne => {
            rules += &format!("iifname \"wan\" ip daddr {wan} dnat to {a}.{b}.{c}.11\n")
        }
        Nat::Translate { mapping, filtering } if mapping.is_endpoint_independent() => {
            // With this filtering, connection tracking alone lets in all that may come.
            if filtering != Filtering::AddressAndPortDependent {
                rules += &format!("iifname \"wan\" {by_mapping}");
            }
            if options.hairpin != Hairpin::Off {
                rules += &format!("iifname \"lan\" {by_mapping}");
            }
        }
        _ => {}
    }
    format!("chain pre {{ type nat hook prerouting priority dstnat;\n{rules}}}\n")
}

/// The router answers nobody on a mapped port.
fn own_input(options: &RouterOptions, wan: Ipv4Addr) -> String {
    let rules = match options.input {
        Input::Drop => format!(
            "iifname \"wan\" meta l4proto {{ tcp, udp }} drop
            iifname \"lan\" ip daddr {wan} meta l4proto udp drop\n"
        ),
        Input::Reject => "iifname \"wan\" meta l4proto { tcp, udp } reject\n".into(),
        Input::Accept => String::new(),
    };
    format!(
        "chain own {{ type filter hook input priority 0;
            ct state established,related accept
        {rules}}}\n"
    )
}

/// What passes between LAN and WAN. Port forwards made by hand or by a protocol are open; mappings of
/// the NAT's own are filtered after translation.
fn routed(options: &RouterOptions) -> String {
    let rules = match options.nat {
        Nat::None => "",
        _ => {
            "iifname \"wan\" ct state established,related accept
            iifname \"wan\" ct status dnat accept
            iifname \"wan\" drop\n"
        }
    };
    format!("chain routed {{ type filter hook forward priority 0;\n{rules}}}\n")
}

/// Translation of what goes out.
fn outbound(options: &RouterOptions, wan: Ipv4Addr, [a, b, c]: [u8; 3]) -> String {
    let udp = "oifname \"wan\" meta l4proto udp";
    let by_mapping = format!("snat ip to {wan} : ip saddr . udp sport map @port_of\n");
    let mut rules = match options.nat {
        Nat::Translate { mapping: Mapping::EndpointIndependent, .. } => format!(
            // A port that another socket holds must not be shared.
            "{udp} {by_mapping}{udp} udp sport @used masquerade random\n{udp} masquerade\n"
        ),
        Nat::Translate { mapping: Mapping::EndpointIndependentRandom, .. } => {
            format!("{udp} {by_mapping}{udp} masquerade fully-random\n")
        }
        Nat::Translate { mapping: Mapping::AddressDependent, .. } => format!(
            "{udp} snat ip to {wan} : jhash ip saddr . udp sport . ip daddr mod 60000 seed 0x5eed offset 2048\n"
        ),
        Nat::Translate { mapping: Mapping::AddressAndPortDependent, .. } => {
            format!("{udp} masquerade fully-random\n")
        }
        Nat::Translate { mapping: Mapping::Sequential, .. } => {
            let (first, count) = SEQUENTIAL;
            // A map, because a number from numgen would be taken with its bytes swapped.
            let ports: Vec<_> = (0..count).map(|n| format!("{n} : {}", first + n)).collect();
            format!(
                "{udp} snat ip to {wan} : numgen inc mod {count} map {{ {} }}\n",
                ports.join(", ")
            )
        }
        Nat::None | Nat::Firewall | Nat::OneToOne | Nat::Linux => String::new(),
    };
    if let (Nat::Translate { mapping, .. }, Hairpin::External) = (options.nat, options.hairpin)
        && mapping.is_endpoint_independent()
    {
        rules += &format!(
            "oifname \"lan\" ip saddr {a}.{b}.{c}.0/24 ct status dnat meta l4proto udp {by_mapping}"
        );
    }
    if !matches!(options.nat, Nat::None | Nat::Firewall) {
        rules += "oifname \"wan\" masquerade\n";
    }
    format!("chain post {{ type nat hook postrouting priority srcnat;\n{rules}}}\n")
}

/// After translation: learn what was chosen, and filter what came in by a mapping.
fn learned(options: &RouterOptions) -> String {
    let Nat::Translate { mapping, filtering } = options.nat else { return String::new() };
    let mut rules = String::new();
    if mapping.is_endpoint_independent() {
        let out = "oifname \"wan\" meta l4proto udp ct direction original update";
        let inside = "ct original ip saddr . ct original proto-src";
        rules += &format!("{out} @port_of {{ {inside} : udp sport }}\n");
        rules += &format!("{out} @socket_of {{ udp sport : {inside} }}\n");
        rules += &format!("{out} @used {{ udp sport }}\n");
    }
    let by_mapping =
        format!("oifname \"lan\" ct mark {BY_MAPPING} ct direction original meta l4proto udp");
    match filtering {
        Filtering::EndpointIndependent => {}
        Filtering::AddressDependent => {
            rules +=
                &format!("{by_mapping} ip daddr . udp dport . ip saddr != @address_seen drop\n");
        }
        Filtering::AddressAndPortDependent => {
            rules += &format!(
                "{by_mapping} ip daddr . udp dport . ip saddr . udp sport != @endpoint_seen drop\n"
            );
        }
    }
    format!("chain learned {{ type filter hook postrouting priority 110;\n{rules}}}\n")
}

/// The policy, and the IPv6 firewall.
fn policy(options: &RouterOptions) -> String {
    let udp = "iifname \"lan\" meta l4proto udp udp dport != 53";
    let errors = "meta l4proto icmp icmp type { destination-unreachable, time-exceeded } drop
        meta l4proto ipv6-icmp icmpv6 type { packet-too-big, destination-unreachable } drop\n";
    // The router's own errors leave by the output hook.
    let (routed, output) = match options.policy {
        Policy::Open => (String::new(), ""),
        Policy::NoUdp => (format!("{udp} drop\n"), ""),
        Policy::RejectUdp => (format!("{udp} reject with icmpx admin-prohibited\n"), ""),
        Policy::OnlyTcp443 => (
            "iifname \"lan\" tcp dport 443 accept
            iifname \"wan\" ct state established,related accept
            drop\n"
                .into(),
            "",
        ),
        Policy::Nothing => ("drop\n".into(), ""),
        Policy::NoIcmpErrors => (errors.into(), errors),
        Policy::NoIpv4 => ("meta nfproto ipv4 drop\n".into(), ""),
    };
    let v6 = match options.ipv6 {
        Ipv6::None | Ipv6::Open => "",
        Ipv6::Firewall => {
            "iifname \"wan\" ct state established,related accept
            iifname \"wan\" meta l4proto ipv6-icmp icmpv6 type { packet-too-big, time-exceeded, parameter-problem, destination-unreachable, echo-request } accept
            iifname \"wan\" drop\n"
        }
    };
    format!(
        "table inet lab_policy\ndelete table inet lab_policy
        table inet lab_policy {{
        chain routed {{ type filter hook forward priority -6;\n{routed}}}
        chain own {{ type filter hook output priority -6;\n{output}}}
        }}
        table ip6 lab_v6\ndelete table ip6 lab_v6
        table ip6 lab_v6 {{
        chain routed {{ type filter hook forward priority 0;\n{v6}}}
        }}\n"
    )
}

impl Mapping {
    fn is_endpoint_independent(self) -> bool {
        matches!(self, Self::EndpointIndependent | Self::EndpointIndependentRandom)
    }
}
