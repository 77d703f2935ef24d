//! What the sender of a packet hears that goes nowhere: "host unreachable" where there is no peer,
//! or none whose address is known, as from the kernel's WireGuard (RFC 792; RFC 4443 section 3.1);
//! "too big" where the path to the peer carries only shorter ones (RFC 1191 section 4; RFC 4443
//! section 3.2).
//!
//! Only the message is made here. The kernel adds the IP header, because only it knows from which
//! of the host's addresses the sender expects to hear.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use arrayvec::ArrayVec;

use crate::checksum;
use crate::ip::{IpPacket, V4_HEADER_LEN, V6_HEADER_LEN};
use crate::limits::{ICMP_BURST, ICMP_PER_SECOND};
use crate::time::Instant;

/// An ICMPv4 error quotes as much as keeps it within 576 bytes (RFC 1812 section 4.3.2.3).
const V4_LEN_MAX: usize = 576 - V4_HEADER_LEN;
/// An ICMPv6 error as much as keeps it within the least MTU, 1280 (RFC 4443 section 2.4 c).
const V6_LEN_MAX: usize = 1280 - V6_HEADER_LEN;
const HEADER_LEN: usize = 8;

const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_ICMPV6: u8 = 58;
/// ICMPv4 messages that an error may answer: echo reply and request, timestamps.
const V4_QUERIES: [u8; 4] = [0, 8, 13, 14];

/// Why a packet goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    Unreachable,
    TooBig { mtu: u16 },
}

impl Trouble {
    /// The first eight bytes of the message; the checksum is zero.
    fn header(self, is_v4: bool) -> [u8; HEADER_LEN] {
        match (self, is_v4) {
            // Destination unreachable: host unreachable.
            (Self::Unreachable, true) => [3, 1, 0, 0, 0, 0, 0, 0],
            // Destination unreachable: address unreachable.
            (Self::Unreachable, false) => [1, 3, 0, 0, 0, 0, 0, 0],
            // Destination unreachable: fragmentation needed and DF set.
            (Self::TooBig { mtu }, true) => {
                let [high, low] = mtu.to_be_bytes();
                [3, 4, 0, 0, 0, 0, high, low]
            }
            // Packet too big.
            (Self::TooBig { mtu }, false) => {
                let [high, low] = mtu.to_be_bytes();
                [2, 0, 0, 0, 0, 0, high, low]
            }
        }
    }
}

/// An ICMP message without its IP header.
#[derive(Debug)]
pub struct IcmpError {
    /// Who is told.
    pub to: IpAddr,
    /// For ICMPv6 without the checksum, which covers addresses that the kernel chooses.
    pub message: ArrayVec<u8, V6_LEN_MAX>,
}

impl IcmpError {
    /// The answer to an inner packet, or none if it must not be answered (RFC 1122 section 3.2.2,
    /// RFC 4443 section 2.4 e): errors, all but a first fragment, and what came from or goes to
    /// more than one host.
    pub fn answer(packet: &[u8], trouble: Trouble) -> Option<Self> {
        let ip = IpPacket::parse(packet).ok()?;
        if !is_one_host(ip.source) || is_multicast(ip.destination) {
            return None;
        }
        let is_v4 = ip.source.is_ipv4();
        let len_max = if is_v4 { V4_LEN_MAX } else { V6_LEN_MAX };
        let may = if is_v4 { may_answer_v4(packet) } else { may_answer_v6(packet) };
        if !may {
            return None;
        }
        let mut message = ArrayVec::new();
        message.extend(trouble.header(is_v4));
        let quoted = &packet[..ip.len.min(len_max - HEADER_LEN)];
        message.try_extend_from_slice(quoted).ok()?;
        if is_v4 {
            let sum = checksum::finish(checksum::sum(&message));
            message[2..4].copy_from_slice(&sum);
        }
        Some(Self { to: ip.source, message })
    }
}

fn may_answer_v4(packet: &[u8]) -> bool {
    let header_len = usize::from(packet[0] & 0xf) * 4;
    let is_first_fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff == 0;
    let is_error = packet[9] == PROTOCOL_ICMP
        && packet.get(header_len).is_none_or(|kind| !V4_QUERIES.contains(kind));
    is_first_fragment && !is_error
}

/// Behind extension headers a message is not looked for: then there is no answer.
fn may_answer_v6(packet: &[u8]) -> bool {
    const EXTENSIONS: [u8; 6] = [0, 43, 44, 50, 51, 60];
    match packet[6] {
        // Errors are below 128.
        PROTOCOL_ICMPV6 => packet.get(V6_HEADER_LEN).is_some_and(|&kind| kind >= 128),
        next => !EXTENSIONS.contains(&next),
    }
}

fn is_one_host(address: IpAddr) -> bool {
    let is_broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !address.is_unspecified() && !address.is_loopback() && !is_multicast(address) && !is_broadcast
}

fn is_multicast(address: IpAddr) -> bool {
    address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST)
}

/// Bounds the answers of one worker: [`ICMP_PER_SECOND`], at once [`ICMP_BURST`] at most.
#[derive(Debug, Default)]
pub struct IcmpLimit {
    /// When every answer so far is paid for.
    paid_at: Option<Instant>,
}

impl IcmpLimit {
    const COST: Duration = Duration::from_nanos(1_000_000_000 / ICMP_PER_SECOND);

    /// Takes one answer; false if there is none left now.
    pub fn allow(&mut self, now: Instant) -> bool {
        let from = self.paid_at.map_or(now, |at| at.max(now));
        if from.since(now) > Self::COST * (ICMP_BURST - 1) {
            return false;
        }
        self.paid_at = Some(from + Self::COST);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(packet: &[u8]) -> Option<IcmpError> {
        IcmpError::answer(packet, Trouble::Unreachable)
    }

    fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; V4_HEADER_LEN];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&((V4_HEADER_LEN + payload.len()) as u16).to_be_bytes());
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&[10, 1, 0, 2]);
        packet[16..20].copy_from_slice(&[10, 9, 0, 1]);
        packet.extend_from_slice(payload);
        packet
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; V6_HEADER_LEN];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        packet[6] = next;
        packet[8] = 0xfd;
        packet[23] = 2;
        packet[24] = 0xfd;
        packet[39] = 9;
        packet.extend_from_slice(payload);
        packet
    }

    #[test]
    fn an_answer_quotes_the_packet_and_verifies() {
        let packet = v4(17, &[7; 64]);
        let told = answer(&packet).unwrap();
        assert_eq!(told.to, IpAddr::from([10, 1, 0, 2]));
        assert_eq!(told.message[..2], [3, 1]);
        assert_eq!(told.message[4..8], [0; 4]);
        assert_eq!(told.message[8..], packet);
        assert!(checksum::verifies(checksum::sum(&told.message)));
        let packet = v6(6, &[7; 64]);
        let told = answer(&packet).unwrap();
        assert_eq!(told.message[..8], [1, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(told.message[8..], packet);
    }

    #[test]
    fn who_sends_too_long_packets_hears_how_long_they_may_be() {
        let trouble = Trouble::TooBig { mtu: 1376 };
        let message = |packet: &[u8]| IcmpError::answer(packet, trouble).unwrap().message;
        let answer = message(&v4(17, &[7; 1400]));
        assert_eq!((&answer[..2], &answer[4..8]), (&[3, 4][..], &[0, 0, 5, 96][..]));
        assert!(checksum::verifies(checksum::sum(&answer)));
        assert_eq!(message(&v6(17, &[7; 1400]))[..8], [2, 0, 0, 0, 0, 0, 5, 96]);
    }

    #[test]
    fn an_answer_stays_within_the_least_mtu() {
        assert_eq!(answer(&v4(17, &[7; 3000])).unwrap().message.len() + 20, 576);
        assert_eq!(answer(&v6(17, &[7; 3000])).unwrap().message.len() + 40, 1280);
    }

    #[test]
    fn errors_fragments_and_groups_are_not_answered() {
        let silent = |packet: &[u8]| answer(packet).is_none();
        assert!(!silent(&v4(1, &[8, 0])), "an echo request is");
        assert!(silent(&v4(1, &[3, 1])) && silent(&v4(1, &[11, 0])) && silent(&v4(1, &[])));
        assert!(!silent(&v6(58, &[128, 0])));
        assert!(silent(&v6(58, &[1, 3])) && silent(&v6(58, &[])) && silent(&v6(44, &[58, 0])));
        let changed = |at: usize, bytes: &[u8]| {
            let mut packet = v4(17, &[7; 64]);
            packet[at..at + bytes.len()].copy_from_slice(bytes);
            packet
        };
        assert!(silent(&changed(6, &[0, 1])), "a later fragment");
        assert!(!silent(&changed(6, &[0x20, 0])), "a first fragment is");
        for source in [[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 1], [255, 255, 255, 255]] {
            assert!(silent(&changed(12, &source)), "from {source:?}");
        }
        for destination in [[224, 0, 0, 1], [255, 255, 255, 255]] {
            assert!(silent(&changed(16, &destination)), "to {destination:?}");
        }
        assert!(silent(&[]) && silent(&[0x45]));
    }

    #[test]
    fn answers_are_limited() {
        let mut limit = IcmpLimit::default();
        let mut now = Instant::from_nanos(1);
        let mut allowed = |now| (0..1000).filter(|_| limit.allow(now)).count();
        assert_eq!(allowed(now), ICMP_BURST as usize);
        now = now + Duration::from_secs(1);
        assert_eq!(allowed(now), ICMP_BURST as usize, "a second pays for a whole burst");
        now = now + Duration::from_nanos(1_000_000_000 / ICMP_PER_SECOND);
        assert_eq!(allowed(now), 1);
    }
}
