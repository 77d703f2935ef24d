//! Addresses at which a peer may be reached: where each comes from, and which are never probed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::limits::{CANDIDATES_MAX, PEER_REFLEXIVE_MAX};

/// Where an address was learnt. The numbers are those of [`crate::introduce`].
///
/// The order is the order of probing: what most often works, and costs the least, first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum CandidateKind {
    /// Seen as the source of the peer's own ping: a NAT opened it for us just now.
    PeerReflexive = 6,
    /// The operator wrote it down.
    Configured = 4,
    /// A router opened it on request (NAT-PMP, PCP, UPnP).
    PortMapped = 3,
    /// An address of one of the peer's interfaces.
    Interface = 1,
    /// A STUN server saw the peer there.
    Reflexive = 2,
    /// The STUN server's address with the local port: right where a hard NAT keeps ports.
    ReflexiveLocalPort = 5,
    /// The peer did not say, or said what a later version knows.
    Other = 0,
}

impl CandidateKind {
    /// As [`crate::introduce`] writes it.
    pub fn to_wire(self) -> u8 {
        self as u8
    }

    /// Kinds that we do not know are still worth a probe.
    pub fn from_wire(number: u8) -> Self {
        use CandidateKind as K;
        let known = [
            K::PeerReflexive,
            K::Configured,
            K::PortMapped,
            K::Interface,
            K::Reflexive,
            K::ReflexiveLocalPort,
        ];
        known.into_iter().find(|kind| kind.to_wire() == number).unwrap_or(K::Other)
    }

    /// Position in the order of probing, 0 first.
    fn rank(self) -> u8 {
        use CandidateKind as K;
        match self {
            K::PeerReflexive => 0,
            K::Configured => 1,
            K::PortMapped => 2,
            K::Interface => 3,
            K::Reflexive => 4,
            K::ReflexiveLocalPort => 5,
            K::Other => 6,
        }
    }
}

/// One address and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Candidate {
    pub kind: CandidateKind,
    /// Canonical: an IPv4-mapped IPv6 address is written as IPv4.
    pub address: SocketAddr,
}

impl Candidate {
    /// Of one of ours: an address that is ours, unless it is a guess, which may be another's behind
    /// the same NAT.
    pub fn own_address(&self) -> Option<SocketAddr> {
        (self.kind != CandidateKind::ReflexiveLocalPort).then_some(self.address)
    }
}

/// Why an address is never sent anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NeverProbed {
    #[error("port 0, or an address that is no single host elsewhere")]
    NotAHost,
    #[error("a link-local IPv6 address means nothing without its interface")]
    LinkLocal,
    #[error("our own address and port: the packet would be a LAND attack's")]
    Own,
    #[error("an address inside the tunnel cannot carry the tunnel")]
    InTunnel,
}

/// What is ours, so that it is not probed as if it were a peer's.
#[derive(Clone, Debug, Default)]
pub struct OwnAddresses {
    /// Our sockets as we see them and as others do (interfaces, STUN, port maps), ports included.
    pub sockets: Vec<SocketAddr>,
    /// Prefixes routed into tunnels of ours: addresses and allowed IPs that are not default routes.
    pub tunnels: Vec<Prefix>,
}

/// Addresses with the same leading bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub address: IpAddr,
    /// 0 to 32 for IPv4, 0 to 128 for IPv6.
    pub length: u8,
}

impl Prefix {
    pub fn contains(&self, ip: IpAddr) -> bool {
        let length = u32::from(self.length);
        match (self.address, ip) {
            (IpAddr::V4(ours), IpAddr::V4(ip)) => {
                (ours.to_bits() ^ ip.to_bits()).leading_zeros() >= length.min(32)
            }
            (IpAddr::V6(ours), IpAddr::V6(ip)) => {
                (ours.to_bits() ^ ip.to_bits()).leading_zeros() >= length.min(128)
            }
            _ => false,
        }
    }
}

impl OwnAddresses {
    /// Whether a probe may go to `address`, whoever named it.
    pub fn check(&self, address: SocketAddr) -> Result<(), NeverProbed> {
        let ip = address.ip().to_canonical();
        if address.port() == 0 || !is_host_elsewhere(ip) {
            return Err(NeverProbed::NotAHost);
        }
        if matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
            return Err(NeverProbed::LinkLocal);
        }
        if self.sockets.contains(&SocketAddr::new(ip, address.port())) {
            return Err(NeverProbed::Own);
        }
        if self.tunnels.iter().any(|prefix| prefix.contains(ip)) {
            return Err(NeverProbed::InTunnel);
        }
        Ok(())
    }
}

/// Not loopback, unspecified, multicast, broadcast or reserved.
pub(crate) fn is_host_elsewhere(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            // 0/8 is "this network"; 240/4 is reserved and holds the broadcast address.
            let first = Ipv4Addr::octets(&ip)[0];
            first != 0 && first < 240 && !ip.is_loopback() && !ip.is_multicast()
        }
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast(),
    }
}

/// What a peer may be reached at: bounded, each address once, in the order of probing.
#[derive(Clone, Debug, Default)]
pub struct CandidateList(Vec<Candidate>);

impl CandidateList {
    /// Adds one. An address that is there keeps its better kind; of too many the worst goes, and
    /// that may be this one. True if the list has it now and had it not before.
    pub fn insert(&mut self, candidate: Candidate) -> bool {
        let ip = candidate.address.ip().to_canonical();
        let address = SocketAddr::new(ip, candidate.address.port());
        let mut kind = candidate.kind;
        let known = self.0.iter().position(|known| known.address == address);
        if let Some(at) = known {
            let before = self.0.remove(at).kind;
            kind = if before.rank() <= kind.rank() { before } else { kind };
        } else if self.0.len() == CANDIDATES_MAX {
            if self.0.last().is_none_or(|worst| worst.kind.rank() < kind.rank()) {
                return false;
            }
            self.0.pop();
        }
        let place = self.0.partition_point(|other| other.kind.rank() <= kind.rank());
        self.0.insert(place, Candidate { kind, address });
        known.is_none()
    }

    /// Adds an address that a ping came from. Of too many the oldest goes: whoever replays old pings
    /// from new addresses must not drive out what the peer itself named.
    pub fn insert_peer_reflexive(&mut self, address: SocketAddr) {
        let kind = CandidateKind::PeerReflexive;
        let of_kind = self.0.iter().take_while(|candidate| candidate.kind == kind).count();
        if of_kind >= PEER_REFLEXIVE_MAX && !self.contains(address) {
            self.0.remove(0);
        }
        self.insert(Candidate { kind, address });
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Candidate> {
        self.0.iter()
    }

    pub fn contains(&self, address: SocketAddr) -> bool {
        self.0.iter().any(|candidate| candidate.address == address)
    }

    /// Keeps those for which `keep` says so.
    pub fn retain(&mut self, keep: impl FnMut(&Candidate) -> bool) {
        self.0.retain(keep);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn candidate(kind: CandidateKind, address: &str) -> Candidate {
        Candidate { kind, address: address.parse().unwrap() }
    }

    #[test]
    fn what_is_no_host_elsewhere_is_never_probed() {
        let own = OwnAddresses {
            sockets: vec!["192.0.2.7:51820".parse().unwrap()],
            tunnels: vec![Prefix { address: "10.9.0.0".parse().unwrap(), length: 16 }],
        };
        let cases = [
            ("127.0.0.1:1", Err(NeverProbed::NotAHost)),
            ("[::1]:1", Err(NeverProbed::NotAHost)),
            ("[::ffff:127.0.0.1]:1", Err(NeverProbed::NotAHost)),
            ("0.0.0.0:1", Err(NeverProbed::NotAHost)),
            ("0.1.2.3:1", Err(NeverProbed::NotAHost)),
            ("[::]:1", Err(NeverProbed::NotAHost)),
            ("255.255.255.255:1", Err(NeverProbed::NotAHost)),
            ("240.0.0.1:1", Err(NeverProbed::NotAHost)),
            ("224.0.0.251:5353", Err(NeverProbed::NotAHost)),
            ("[ff02::1]:1", Err(NeverProbed::NotAHost)),
            ("192.0.2.1:0", Err(NeverProbed::NotAHost)),
            ("[fe80::1]:1", Err(NeverProbed::LinkLocal)),
            ("192.0.2.7:51820", Err(NeverProbed::Own)),
            ("[::ffff:192.0.2.7]:51820", Err(NeverProbed::Own)),
            // Another port of our address is another host behind the same NAT.
            ("192.0.2.7:51821", Ok(())),
            ("10.9.255.1:51820", Err(NeverProbed::InTunnel)),
            ("10.10.0.1:51820", Ok(())),
            ("100.64.0.1:51820", Ok(())),
            ("169.254.1.1:51820", Ok(())),
            ("[2001:db8::1]:51820", Ok(())),
            ("[fd00::1]:51820", Ok(())),
        ];
        for (address, expected) in cases {
            assert_eq!(own.check(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn an_address_is_kept_once_with_its_best_kind() {
        let mut list = CandidateList::default();
        assert!(list.insert(candidate(CandidateKind::Reflexive, "192.0.2.1:1")));
        assert!(!list.insert(candidate(CandidateKind::PortMapped, "[::ffff:192.0.2.1]:1")));
        assert!(!list.insert(candidate(CandidateKind::Other, "192.0.2.1:1")));
        let all: Vec<_> = list.iter().copied().collect();
        assert_eq!(all, [candidate(CandidateKind::PortMapped, "192.0.2.1:1")]);
    }

    #[test]
    fn numbers_on_the_wire_come_back() {
        for number in 0..=u8::MAX {
            let kind = CandidateKind::from_wire(number);
            assert!(kind.to_wire() == number || kind == CandidateKind::Other);
        }
        assert_eq!(CandidateKind::from_wire(3), CandidateKind::PortMapped);
    }

    #[test]
    fn addresses_that_pings_came_from_do_not_drive_out_the_others() {
        let mut list = CandidateList::default();
        list.insert(candidate(CandidateKind::Reflexive, "203.0.113.1:1"));
        for port in 1..1000 {
            list.insert_peer_reflexive(SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), port)));
        }
        assert_eq!(list.iter().len(), 1 + PEER_REFLEXIVE_MAX);
        assert!(list.contains("192.0.2.1:999".parse().unwrap()));
        assert!(list.contains("203.0.113.1:1".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn the_list_is_bounded_sorted_and_without_doubles(
            inserted in vec((0_u8..8, 1_u16..300), 0..400)
        ) {
            let mut list = CandidateList::default();
            for (kind, port) in inserted {
                let address = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), port));
                let kind = CandidateKind::from_wire(kind);
                let new = !list.contains(address);
                let inserted = list.insert(Candidate { kind, address });
                prop_assert_eq!(inserted, new && list.contains(address));
            }
            prop_assert!(list.iter().len() <= CANDIDATES_MAX);
            let ranks: Vec<_> = list.iter().map(|candidate| candidate.kind.rank()).collect();
            prop_assert!(ranks.is_sorted());
            let mut addresses: Vec<_> = list.iter().map(|candidate| candidate.address).collect();
            addresses.sort();
            addresses.dedup();
            prop_assert_eq!(addresses.len(), list.iter().len());
        }
    }
}
