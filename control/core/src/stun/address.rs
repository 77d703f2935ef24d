//! Addresses as STUN writes them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use arrayvec::ArrayVec;

use super::StunError;
use super::message::COOKIE;
use crate::transaction::TransactionId;

/// Bytes of the longest one, IPv6.
const LEN_MAX: usize = 20;

/// A MAPPED-ADDRESS: zero, family, port, address.
pub(super) fn address(value: &[u8]) -> Result<SocketAddr, StunError> {
    let ([_, family, port_0, port_1], ip) = value.split_first_chunk().ok_or(StunError::Address)?;
    let ip = match (family, ip.len()) {
        (1, 4) => <[u8; 4]>::try_from(ip).map(IpAddr::from),
        (2, 16) => <[u8; 16]>::try_from(ip).map(IpAddr::from),
        _ => return Err(StunError::Address),
    };
    let ip = ip.map_err(|_| StunError::Address)?.to_canonical();
    Ok(SocketAddr::new(ip, u16::from_be_bytes([*port_0, *port_1])))
}

/// An XOR-MAPPED-ADDRESS: as [`address`], port and address XORed with cookie and transaction.
pub(super) fn xored_address(
    value: &[u8],
    transaction: TransactionId,
) -> Result<SocketAddr, StunError> {
    let mut plain = ArrayVec::<u8, LEN_MAX>::try_from(value).map_err(|_| StunError::Address)?;
    xor_address(&mut plain, transaction);
    address(&plain)
}

/// XORs the port and the address of an address attribute, in place.
fn xor_address(value: &mut [u8], transaction: TransactionId) {
    let mask = COOKIE.into_iter().chain(transaction.0);
    let (head, ip) = value.split_at_mut(value.len().min(4));
    for (byte, mask) in head.iter_mut().skip(2).zip(COOKIE) {
        *byte ^= mask;
    }
    for (byte, mask) in ip.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

/// What [`xored_address`] reads.
pub(super) fn to_xored(address: SocketAddr, transaction: TransactionId) -> ArrayVec<u8, LEN_MAX> {
    let mut value = ArrayVec::new();
    let port = address.port().to_be_bytes();
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => {
            value.extend([0, 1, port[0], port[1]]);
            value.extend(Ipv4Addr::octets(&ip));
        }
        IpAddr::V6(ip) => {
            value.extend([0, 2, port[0], port[1]]);
            value.extend(Ipv6Addr::octets(&ip));
        }
    }
    xor_address(&mut value, transaction);
    value
}
