//! The one form of an address that disco and introductions write: 16 bytes of IPv6 (IPv4 is
//! mapped), 2 bytes of port, big-endian.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

pub(crate) const ADDRESS_LEN: usize = 18;

pub(crate) fn to_bytes(address: SocketAddr) -> [u8; ADDRESS_LEN] {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; ADDRESS_LEN];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&address.port().to_be_bytes());
    bytes
}

/// Canonical: a mapped address becomes IPv4.
pub(crate) fn from_bytes(bytes: &[u8; ADDRESS_LEN]) -> SocketAddr {
    let [ip @ .., port_0, port_1] = *bytes;
    let ip = IpAddr::V6(Ipv6Addr::from(ip)).to_canonical();
    SocketAddr::new(ip, u16::from_be_bytes([port_0, port_1]))
}
