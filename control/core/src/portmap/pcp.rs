//! PCP (RFC 6887): ANNOUNCE, to hear whether a router is there and since when, and MAP, for a port
//! through a NAT (IPv4) or a firewall (IPv6).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::{Protocol, Refused, Status};

/// Bytes of the common header, and of a MAP request or answer.
pub const HEADER_LEN: usize = 24;
pub const MAP_LEN: usize = 60;
/// Bytes of the longest message (RFC 6887, section 7).
pub const LEN_MAX: usize = 1100;

const VERSION: u8 = 2;
const OPCODE_ANNOUNCE: u8 = 0;
const OPCODE_MAP: u8 = 1;
/// Set in the opcode of an answer.
const ANSWER: u8 = 0x80;
const UDP: u8 = 17;

/// What ties renewal and deletion to the request that made a mapping: whoever knows it may move the
/// mapping. Random, one for each mapping, the same as long as the mapping is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 12]);

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nonce(..)")
    }
}

/// Asks a router whether it is there.
pub fn announce(own: IpAddr) -> [u8; HEADER_LEN] {
    header(OPCODE_ANNOUNCE, own, 0)
}

/// What a MAP request says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// Our address, from which the request must come.
    pub own: IpAddr,
    pub nonce: Nonce,
    pub internal_port: u16,
    /// The address and port that we would like; unspecified and 0 for any.
    pub external: SocketAddr,
    /// 0 removes the mapping.
    pub lifetime_s: u32,
}

impl Map {
    pub fn to_bytes(self) -> [u8; MAP_LEN] {
        let mut request = [0; MAP_LEN];
        request[..HEADER_LEN].copy_from_slice(&header(OPCODE_MAP, self.own, self.lifetime_s));
        request[24..36].copy_from_slice(&self.nonce.0);
        request[36] = UDP;
        request[40..42].copy_from_slice(&self.internal_port.to_be_bytes());
        request[42..44].copy_from_slice(&self.external.port().to_be_bytes());
        request[44..60].copy_from_slice(&to_16_bytes(self.external.ip()));
        request
    }
}

/// What a router said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Seconds since it lost its state. Of a router that refused the version it means nothing.
    pub epoch_s: u32,
    /// Why it did not do what was asked.
    pub failed: Option<Status>,
    /// What mapping it speaks of; `None`: it answers an ANNOUNCE, or did not read the request.
    pub map: Option<Mapped>,
}

/// The mapping of an answer to a MAP request, made or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub nonce: Nonce,
    pub internal_port: u16,
    pub external: SocketAddr,
    /// Of a refused one: how long the refusal holds.
    pub lifetime: Duration,
}

/// Reads an answer.
pub fn parse(bytes: &[u8]) -> Result<Answer, Refused> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(Refused::Short)?;
    let [version, opcode, _, code, l0, l1, l2, l3, e0, e1, e2, e3, ..] = *header;
    if version != VERSION {
        return Err(Refused::Version);
    }
    if opcode & ANSWER == 0 {
        return Err(Refused::NotAnAnswer);
    }
    if bytes.len() > LEN_MAX || !bytes.len().is_multiple_of(4) {
        return Err(Refused::Length);
    }
    let failed = (code != 0).then_some(Status { protocol: Protocol::Pcp, code: code.into() });
    let epoch_s = u32::from_be_bytes([e0, e1, e2, e3]);
    let lifetime = Duration::from_secs(u32::from_be_bytes([l0, l1, l2, l3]).into());
    let map = match (opcode & !ANSWER, bytes.get(HEADER_LEN..MAP_LEN)) {
        (OPCODE_ANNOUNCE, _) => None,
        (OPCODE_MAP, Some(body)) => Some(read_map(body, lifetime)?),
        // A router that does not know the version or the opcode may answer with the header alone.
        (OPCODE_MAP, None) if failed.is_some() => None,
        (OPCODE_MAP, None) => return Err(Refused::Short),
        _ => return Err(Refused::Opcode),
    };
    Ok(Answer { epoch_s, failed, map })
}

fn read_map(body: &[u8], lifetime: Duration) -> Result<Mapped, Refused> {
    let (nonce, rest) = body.split_first_chunk().ok_or(Refused::Short)?;
    let (ports, rest) = rest.split_first_chunk().ok_or(Refused::Short)?;
    let [protocol, _, _, _, i0, i1, x0, x1]: [u8; 8] = *ports;
    let address: [u8; 16] = *rest.first_chunk().ok_or(Refused::Short)?;
    if protocol != UDP {
        return Err(Refused::OtherMapping);
    }
    let external = IpAddr::from(address).to_canonical();
    Ok(Mapped {
        nonce: Nonce(*nonce),
        internal_port: u16::from_be_bytes([i0, i1]),
        external: SocketAddr::new(external, u16::from_be_bytes([x0, x1])),
        lifetime,
    })
}

fn header(opcode: u8, own: IpAddr, lifetime_s: u32) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[0] = VERSION;
    header[1] = opcode;
    header[4..8].copy_from_slice(&lifetime_s.to_be_bytes());
    header[8..24].copy_from_slice(&to_16_bytes(own));
    header
}

/// The unspecified address of a family, for "any".
pub fn any_of_family(own: IpAddr) -> IpAddr {
    match own {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// IPv4 as IPv4-mapped IPv6 (RFC 6887, section 5).
fn to_16_bytes(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answered(request: &[u8; MAP_LEN], code: u8, epoch_s: u32) -> [u8; MAP_LEN] {
        let mut bytes = *request;
        bytes[1] |= ANSWER;
        bytes[3] = code;
        bytes[8..12].copy_from_slice(&epoch_s.to_be_bytes());
        bytes
    }

    fn example() -> Map {
        Map {
            own: Ipv4Addr::new(192, 168, 1, 7).into(),
            nonce: Nonce([7; 12]),
            internal_port: 51820,
            external: "0.0.0.0:51821".parse().unwrap(),
            lifetime_s: 7200,
        }
    }

    #[test]
    fn requests_are_those_of_the_rfc() {
        let mut expected = vec![2, 1, 0, 0, 0, 0, 0x1c, 0x20];
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 168, 1, 7]);
        expected.extend([7; 12]);
        expected.extend([17, 0, 0, 0, 0xca, 0x6c, 0xca, 0x6d]);
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(example().to_bytes().to_vec(), expected);
        let announced = announce(example().own);
        assert_eq!(announced[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(announced[8..], expected[8..24]);
    }

    #[test]
    fn answers_are_read() {
        let request = example().to_bytes();
        let answer = parse(&answered(&request, 0, 9)).unwrap();
        assert_eq!((answer.epoch_s, answer.failed), (9, None));
        let map = answer.map.unwrap();
        assert_eq!(map.external, "0.0.0.0:51821".parse().unwrap());
        assert_eq!((map.nonce, map.internal_port), (Nonce([7; 12]), 51820));
        assert_eq!(map.lifetime, Duration::from_secs(7200));
        let refused = parse(&answered(&request, 2, 9)).unwrap();
        assert_eq!(refused.failed, Some(Status { protocol: Protocol::Pcp, code: 2 }));
        assert!(refused.map.is_some());
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let good = answered(&example().to_bytes(), 0, 9);
        assert_eq!(parse(&good[..23]), Err(Refused::Short));
        assert_eq!(parse(&good[..56]), Err(Refused::Short));
        assert_eq!(parse(&good[..59]), Err(Refused::Length));
        assert_eq!(parse(&[&good[..], &[0; 1100]].concat()), Err(Refused::Length));
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            parse(&bytes)
        };
        assert_eq!(with(0, 1), Err(Refused::Version));
        assert_eq!(with(1, 1), Err(Refused::NotAnAnswer));
        assert_eq!(with(1, 0x82), Err(Refused::Opcode));
        assert_eq!(with(36, 6), Err(Refused::OtherMapping));
    }

    proptest! {
        #[test]
        fn what_is_asked_is_what_an_echo_says(
            nonce: [u8; 12],
            internal_port: u16,
            port: u16,
            ip: IpAddr,
            lifetime_s: u32,
        ) {
            let external = SocketAddr::new(ip.to_canonical(), port);
            let nonce = Nonce(nonce);
            let map = Map { nonce, internal_port, external, lifetime_s, ..example() };
            let answer = parse(&answered(&map.to_bytes(), 0, 1)).unwrap();
            let lifetime = Duration::from_secs(lifetime_s.into());
            prop_assert_eq!(answer.map, Some(Mapped { nonce, internal_port, external, lifetime }));
        }
    }
}
