//! What can be wrong with the traffic through a router, changed at run time.

use std::{fmt::Write, net::IpAddr};

/// One thing that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// UDP vanishes.
    CutUdp(Direction),
    /// TCP vanishes: open connections hang.
    CutTcp(Direction),
    /// Packets longer than this vanish without an ICMP message: bytes from the IP header on.
    DropLongerThan(u16),
    /// WireGuard's data longer than this vanishes; handshakes and everybody's probes pass.
    DropWireGuardDataLongerThan(u16),
    /// Everything to and from this address vanishes.
    Block(IpAddr),
    /// UDP to and from this address vanishes.
    BlockUdp(IpAddr),
    /// UDP is lost by chance in both directions: one in a thousand each.
    LosePermille(u16),
}

/// Which packets a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those to the WAN.
    Out,
    /// Those from the WAN.
    In,
    /// Those of both ways.
    Both,
}

/// The table of all faults that hold; an empty one for none.
pub(super) fn ruleset(faults: &[Fault]) -> String {
    let mut rules = String::new();
    for fault in faults {
        // Writing to a String cannot fail.
        let _ = write!(rules, "{}", rule(fault));
    }
    // After connection tracking, which so sees what dies here, as the far end's NAT would.
    format!(
        "table inet lab_faults\ndelete table inet lab_faults\n\
         table inet lab_faults {{\nchain routed {{ type filter hook forward priority -5;\n{rules}}}\n}}\n"
    )
}

fn rule(fault: &Fault) -> String {
    let address = |what: &str, address: &IpAddr| {
        let family = if address.is_ipv4() { "ip" } else { "ip6" };
        format!("{family} saddr {address} {what}drop\n{family} daddr {address} {what}drop\n")
    };
    match fault {
        Fault::CutUdp(direction) => format!("{} meta l4proto udp drop\n", direction.matches()),
        Fault::CutTcp(direction) => format!("{} meta l4proto tcp drop\n", direction.matches()),
        Fault::DropLongerThan(len) => format!("meta length > {len} drop\n"),
        Fault::DropWireGuardDataLongerThan(len) => {
            // Type 4 and three zeros, at the start of UDP's payload.
            format!("meta l4proto udp @th,64,32 0x04000000 meta length > {len} drop\n")
        }
        Fault::Block(of) => address("", of),
        Fault::BlockUdp(of) => address("meta l4proto udp ", of),
        Fault::LosePermille(chance) => {
            format!("meta l4proto udp numgen random mod 1000 < {chance} drop\n")
        }
    }
}

impl Direction {
    fn matches(self) -> &'static str {
        match self {
            Self::Out => "oifname \"wan\"",
            Self::In => "iifname \"wan\"",
            Self::Both => "",
        }
    }
}
