//! NAT-PMP (RFC 6886): the two requests that we make and what a router says to them.
//!
//! An answer carries nothing that a stranger could not guess. What protects us is that answers count
//! only from the router's own address and port, and only while we wait for one.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::{Protocol, Refused, Status};

/// Bytes of the request for the external address, and of a map request.
pub const PROBE_LEN: usize = 2;
pub const MAP_LEN: usize = 12;

const VERSION: u8 = 0;
const OPCODE_ADDRESS: u8 = 0;
const OPCODE_MAP_UDP: u8 = 1;
/// Set in the opcode of an answer.
const ANSWER: u8 = 0x80;

/// Asks for the external address: the shortest question that every router answers.
pub fn probe() -> [u8; PROBE_LEN] {
    [VERSION, OPCODE_ADDRESS]
}

/// Asks for a mapping of a UDP port; a `lifetime_s` of 0 removes it.
pub fn map(internal_port: u16, external_port: u16, lifetime_s: u32) -> [u8; MAP_LEN] {
    let mut request = [0; MAP_LEN];
    request[1] = OPCODE_MAP_UDP;
    request[4..6].copy_from_slice(&internal_port.to_be_bytes());
    // RFC 6886, section 3.4: zero to delete.
    let external_port = if lifetime_s == 0 { 0 } else { external_port };
    request[6..8].copy_from_slice(&external_port.to_be_bytes());
    request[8..12].copy_from_slice(&lifetime_s.to_be_bytes());
    request
}

/// What a router said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Address {
        epoch_s: u32,
        address: Ipv4Addr,
    },
    Mapped {
        epoch_s: u32,
        internal_port: u16,
        external_port: u16,
        lifetime: Duration,
    },
    /// It does not do what was asked. The router is there all the same.
    Failed {
        map: bool,
        status: Status,
    },
}

/// Reads an answer. A PCP router that does not speak NAT-PMP answers in PCP: see [`super::pcp`].
pub fn parse(bytes: &[u8]) -> Result<Answer, Refused> {
    let Some((&[version, opcode, r0, r1], rest)) = bytes.split_first_chunk() else {
        return Err(Refused::Short);
    };
    if version != VERSION {
        return Err(Refused::Version);
    }
    if opcode & ANSWER == 0 {
        return Err(Refused::NotAnAnswer);
    }
    let map = match opcode & !ANSWER {
        OPCODE_ADDRESS => false,
        OPCODE_MAP_UDP => true,
        _ => return Err(Refused::Opcode),
    };
    let code = u16::from_be_bytes([r0, r1]);
    if code != 0 {
        return Ok(Answer::Failed { map, status: Status { protocol: Protocol::NatPmp, code } });
    }
    let (epoch, rest) = rest.split_first_chunk().ok_or(Refused::Short)?;
    let epoch_s = u32::from_be_bytes(*epoch);
    if !map {
        let octets: [u8; 4] = *rest.first_chunk().ok_or(Refused::Short)?;
        return Ok(Answer::Address { epoch_s, address: octets.into() });
    }
    let [i0, i1, e0, e1, lifetime @ ..]: [u8; 8] = *rest.first_chunk().ok_or(Refused::Short)?;
    Ok(Answer::Mapped {
        epoch_s,
        internal_port: u16::from_be_bytes([i0, i1]),
        external_port: u16::from_be_bytes([e0, e1]),
        lifetime: Duration::from_secs(u32::from_be_bytes(lifetime).into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_the_rfc() {
        assert_eq!(probe(), [0, 0]);
        let request = map(0x1234, 0x5678, 7200);
        assert_eq!(request, [0, 1, 0, 0, 0x12, 0x34, 0x56, 0x78, 0, 0, 0x1c, 0x20]);
        assert_eq!(map(0x1234, 0x5678, 0), [0, 1, 0, 0, 0x12, 0x34, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn answers_are_read() {
        let address = [0, 128, 0, 0, 0, 0, 1, 0, 192, 0, 2, 1];
        let expected = Answer::Address { epoch_s: 256, address: Ipv4Addr::new(192, 0, 2, 1) };
        assert_eq!(parse(&address), Ok(expected));
        let mapped = [0, 129, 0, 0, 0, 0, 0, 9, 0, 1, 0, 2, 0, 0, 0, 60];
        let expected = Answer::Mapped {
            epoch_s: 9,
            internal_port: 1,
            external_port: 2,
            lifetime: Duration::from_secs(60),
        };
        assert_eq!(parse(&mapped), Ok(expected));
        // Errors of old routers end after the result.
        let status = Status { protocol: Protocol::NatPmp, code: 2 };
        assert_eq!(parse(&[0, 129, 0, 2]), Ok(Answer::Failed { map: true, status }));
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        assert_eq!(parse(&[]), Err(Refused::Short));
        assert_eq!(parse(&[0, 128, 0]), Err(Refused::Short));
        assert_eq!(parse(&[0, 128, 0, 0, 0, 0, 0, 0, 1, 2, 3]), Err(Refused::Short));
        assert_eq!(parse(&[0, 129, 0, 0, 0, 0, 0, 9, 0, 1, 0, 2, 0, 0, 0]), Err(Refused::Short));
        assert_eq!(parse(&[2, 128, 0, 0]), Err(Refused::Version));
        assert_eq!(parse(&[0, 0, 0, 0]), Err(Refused::NotAnAnswer));
        assert_eq!(parse(&[0, 130, 0, 0]), Err(Refused::Opcode));
    }
}
