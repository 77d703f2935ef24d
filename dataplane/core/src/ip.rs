//! What the packet path reads of an inner IP header. Lengths are checked once, here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const V4_HEADER_LEN: usize = 20;
pub const V6_HEADER_LEN: usize = 40;

pub const PROTOCOL_TCP: u8 = 6;
pub const PROTOCOL_UDP: u8 = 17;

/// A packet whose header is whole and whose stated length fits into what arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpPacket {
    /// Header and content, as the header states; what follows is padding.
    pub len: usize,
    pub source: IpAddr,
    pub destination: IpAddr,
}

/// What a whole UDP packet, or the first of several, carries behind its UDP header. `packet` is
/// an [`IpPacket`], cut to its length; behind extension headers none is looked for.
pub fn udp_payload(packet: &[u8]) -> Option<&[u8]> {
    let header_len = match packet {
        [first, ..] if first >> 4 == 6 => {
            (packet.get(6) == Some(&PROTOCOL_UDP)).then_some(V6_HEADER_LEN)
        }
        [first, _, _, _, _, _, flags, offset, _, PROTOCOL_UDP, ..] => {
            let is_first = (flags & 0x1f, *offset) == (0, 0);
            is_first.then_some(usize::from(first & 0xf) * 4)
        }
        _ => None,
    }?;
    packet.get(header_len + 8..)
}

/// Whether a router may cut the packet: IPv4 without DF. `packet` is an [`IpPacket`].
pub fn may_be_cut(packet: &[u8]) -> bool {
    matches!(packet, [first, _, _, _, _, _, flags, ..] if first >> 4 == 4 && flags & 0x40 == 0)
}

/// Why bytes are no [`IpPacket`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Neither IPv4 nor IPv6.
    Version,
    /// Shorter than a header, or than what the header states.
    Length,
}

impl IpPacket {
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        match bytes.first().map(|first| first >> 4) {
            Some(4) => Self::parse_v4(bytes),
            Some(6) => Self::parse_v6(bytes),
            _ => Err(Malformed::Version),
        }
    }

    fn parse_v4(bytes: &[u8]) -> Result<Self, Malformed> {
        let header: &[u8; V4_HEADER_LEN] = bytes.first_chunk().ok_or(Malformed::Length)?;
        let header_len = usize::from(header[0] & 0xf) * 4;
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header_len < V4_HEADER_LEN || len < header_len || len > bytes.len() {
            return Err(Malformed::Length);
        }
        let address = |at: usize| -> IpAddr {
            Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]).into()
        };
        Ok(Self { len, source: address(12), destination: address(16) })
    }

    fn parse_v6(bytes: &[u8]) -> Result<Self, Malformed> {
        let header: &[u8; V6_HEADER_LEN] = bytes.first_chunk().ok_or(Malformed::Length)?;
        let len = V6_HEADER_LEN + usize::from(u16::from_be_bytes([header[4], header[5]]));
        if len > bytes.len() {
            return Err(Malformed::Length);
        }
        let address = |at: usize| -> IpAddr {
            let mut octets = [0; 16];
            octets.copy_from_slice(&header[at..at + 16]);
            Ipv6Addr::from(octets).into()
        };
        Ok(Self { len, source: address(8), destination: address(24) })
    }
}
