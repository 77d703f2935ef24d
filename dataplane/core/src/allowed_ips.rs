//! Longest-prefix match from inner address to peer, IPv4 and IPv6 ("cryptokey routing",
//! WireGuard paper section 2). A prefix belongs to one value; inserting it again moves it.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Filled by configuration, read by every packet.
#[derive(Clone)]
pub struct AllowedIps<V> {
    v4: PrefixMap<Ipv4Net, V>,
    v6: PrefixMap<Ipv6Net, V>,
}

impl<V> Default for AllowedIps<V> {
    fn default() -> Self {
        Self { v4: PrefixMap::new(), v6: PrefixMap::new() }
    }
}

impl<V> AllowedIps<V> {
    /// Gives `net` (host bits are ignored) to `value`; returns the value that had it before.
    pub fn insert(&mut self, net: IpNet, value: V) -> Option<V> {
        match net {
            IpNet::V4(net) => self.v4.insert(net.trunc(), value),
            IpNet::V6(net) => self.v6.insert(net.trunc(), value),
        }
    }

    /// Takes exactly `net` out; longer and shorter prefixes stay.
    pub fn remove(&mut self, net: IpNet) -> Option<V> {
        match net {
            IpNet::V4(net) => self.v4.remove(&net.trunc()),
            IpNet::V6(net) => self.v6.remove(&net.trunc()),
        }
    }

    /// The value of the longest prefix that covers `address`.
    pub fn lookup(&self, address: IpAddr) -> Option<&V> {
        match address {
            IpAddr::V4(address) => Some(self.v4.get_lpm(&Ipv4Net::from(address))?.1),
            IpAddr::V6(address) => Some(self.v6.get_lpm(&Ipv6Net::from(address))?.1),
        }
    }

    /// Every prefix with its value, IPv4 first, in the order of the addresses.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, &V)> {
        let v4 = self.v4.iter().map(|(&net, value)| (net.into(), value));
        v4.chain(self.v6.iter().map(|(&net, value)| (net.into(), value)))
    }

    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
