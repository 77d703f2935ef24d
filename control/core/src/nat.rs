//! What the NAT or firewall in front of a host does, in the terms of RFC 4787.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// As far as it is known; a default one is nothing known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nat {
    /// IPv4.
    pub mapping: Option<Mapping>,
    /// IPv4.
    pub filtering: Option<Filtering>,
    /// IPv6, which nobody translates: what a firewall filters.
    pub filtering_ipv6: Option<Filtering>,
    /// IPv4: the port outside is the one inside.
    pub port_preserved: Option<bool>,
}

/// How the port outside depends on the destination (RFC 4787, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// There is no translation.
    None,
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
    /// It depends; on what, no server could show.
    Dependent,
}

/// From where datagrams are let in to a port that sent some (RFC 4787, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

impl Nat {
    /// Bytes of the form that peers are told.
    pub const WIRE_LEN: usize = 4;

    /// Whether each destination sees another address or port of ours, so that nobody is told a good
    /// one.
    pub fn is_hard(&self) -> Option<bool> {
        self.mapping.map(Mapping::is_hard)
    }

    /// Whether anybody may write to a port that we told, IPv4.
    pub fn is_open(&self) -> bool {
        self.filtering == Some(Filtering::EndpointIndependent) && self.is_hard() == Some(false)
    }

    /// A byte for each field, 0: not known.
    pub fn to_wire(self) -> [u8; Self::WIRE_LEN] {
        let place = |at: Option<usize>| at.map_or(0, |at| at as u8 + 1);
        let mapping = self.mapping.and_then(|known| position(&Mapping::ALL, known));
        let filtering =
            |known: Option<Filtering>| place(known.and_then(|f| position(&Filtering::ALL, f)));
        [
            place(mapping),
            filtering(self.filtering),
            filtering(self.filtering_ipv6),
            place(self.port_preserved.map(usize::from)),
        ]
    }

    /// A value that only a later reader knows is not known.
    pub fn from_wire(bytes: [u8; Self::WIRE_LEN]) -> Self {
        let [mapping, filtering, filtering_ipv6, preserved] =
            bytes.map(|byte| usize::from(byte).wrapping_sub(1));
        Self {
            mapping: Mapping::ALL.get(mapping).copied(),
            filtering: Filtering::ALL.get(filtering).copied(),
            filtering_ipv6: Filtering::ALL.get(filtering_ipv6).copied(),
            port_preserved: [false, true].get(preserved).copied(),
        }
    }
}

impl Mapping {
    /// The order is that of the wire.
    const ALL: [Self; 5] = [
        Self::None,
        Self::EndpointIndependent,
        Self::AddressDependent,
        Self::AddressAndPortDependent,
        Self::Dependent,
    ];

    /// The word in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::EndpointIndependent => "endpoint_independent",
            Self::AddressDependent => "address_dependent",
            Self::AddressAndPortDependent => "address_and_port_dependent",
            Self::Dependent => "dependent",
        }
    }

    pub fn is_hard(self) -> bool {
        !matches!(self, Self::None | Self::EndpointIndependent)
    }
}

impl Filtering {
    /// The order is that of the wire.
    const ALL: [Self; 3] =
        [Self::EndpointIndependent, Self::AddressDependent, Self::AddressAndPortDependent];

    /// The word in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::EndpointIndependent => "endpoint_independent",
            Self::AddressDependent => "address_dependent",
            Self::AddressAndPortDependent => "address_and_port_dependent",
        }
    }
}

/// Whether a port is seen differently from different addresses, of who answered and what it saw.
/// None unless servers at two addresses answered.
pub fn varies(seen: &[(SocketAddr, SocketAddr)]) -> Option<bool> {
    let addresses: BTreeSet<IpAddr> = seen.iter().map(|(from, _)| from.ip()).collect();
    if addresses.len() < 2 {
        return None;
    }
    let (first, mapped) = seen.first()?;
    // Another port of the same address says nothing about addresses.
    let others = seen.iter().filter(|(from, _)| from.ip() != first.ip());
    Some(others.into_iter().any(|(_, other)| other != mapped))
}

fn position<T: PartialEq>(all: &[T], wanted: T) -> Option<usize> {
    all.iter().position(|one| *one == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_peers_are_told_they_read_and_later_words_are_not_known() {
        let nat = Nat {
            mapping: Some(Mapping::Dependent),
            filtering: Some(Filtering::AddressDependent),
            filtering_ipv6: None,
            port_preserved: Some(false),
        };
        assert_eq!(nat.to_wire(), [5, 2, 0, 1]);
        for mapping in Mapping::ALL {
            for filtering in Filtering::ALL {
                let filtering_ipv6 = Some(filtering);
                let nat = Nat { mapping: Some(mapping), filtering_ipv6, ..nat };
                assert_eq!(Nat::from_wire(nat.to_wire()), nat);
            }
        }
        assert_eq!(Nat::from_wire([6, 4, 255, 3]), Nat::default());
        assert_eq!(Nat::default().to_wire(), [0; 4]);
    }

    #[test]
    fn only_two_addresses_show_whether_a_mapping_varies() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (first, again) = (at("192.0.2.1:3478"), at("192.0.2.1:3479"));
        let (second, mapped) = (at("192.0.2.2:3478"), at("198.51.100.1:7"));
        let moved = at("198.51.100.1:8");
        assert_eq!(varies(&[]), None);
        assert_eq!(varies(&[(first, mapped), (again, mapped)]), None);
        assert_eq!(varies(&[(first, mapped), (second, mapped)]), Some(false));
        assert_eq!(varies(&[(first, mapped), (again, moved), (second, mapped)]), Some(false));
        assert_eq!(varies(&[(first, mapped), (second, moved)]), Some(true));
    }
}
