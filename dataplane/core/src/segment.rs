//! One packet from the TUN device becomes one or more finished inner packets: completes the
//! checksum that the kernel left open, and cuts TCP (TSO) and UDP (USO) super-packets.
//!
//! Each inner packet is written once, straight to where it will be sealed; its payload is read
//! once, for copy and checksum together.

use crate::checksum::{self, Sum};
use crate::ip::{PROTOCOL_TCP, PROTOCOL_UDP, V4_HEADER_LEN, V6_HEADER_LEN};
use crate::vnet::VnetHdr;

/// What to make of a packet, after everything that its vnet header claims was checked.
pub struct Plan<'a> {
    /// The whole IP packet, without anything after its stated length.
    packet: &'a [u8],
    work: Work,
}

impl<'a> Plan<'a> {
    /// None = the vnet header contradicts the packet. `hdr_len` is a hint and is not looked at.
    pub fn new(vnet: VnetHdr, packet: &'a [u8]) -> Option<Self> {
        let transport = match vnet.gso_type & !VnetHdr::GSO_ECN {
            VnetHdr::GSO_NONE => return Self::whole(vnet, packet),
            VnetHdr::GSO_TCPV4 => Transport::new(packet, 4, PROTOCOL_TCP)?,
            VnetHdr::GSO_TCPV6 => Transport::new(packet, 6, PROTOCOL_TCP)?,
            VnetHdr::GSO_UDP_L4 => Transport::new(packet, packet[0] >> 4, PROTOCOL_UDP)?,
            _ => return None,
        };
        let open = vnet.flags & VnetHdr::F_NEEDS_CSUM != 0;
        let agrees = usize::from(vnet.csum_start) == transport.at
            && usize::from(vnet.csum_offset) == transport.checksum_offset();
        if vnet.gso_size == 0 || open && !agrees {
            return None;
        }
        let work = Work::Cut(Cut::new(packet, transport, usize::from(vnet.gso_size)));
        Some(Self { packet, work })
    }

    fn whole(vnet: VnetHdr, packet: &'a [u8]) -> Option<Self> {
        if vnet.flags & VnetHdr::F_NEEDS_CSUM == 0 {
            return Some(Self { packet, work: Work::Copy });
        }
        let (start, offset) = (usize::from(vnet.csum_start), usize::from(vnet.csum_offset));
        let field = start + offset;
        // A checksum of the IP header's own bytes, or one that straddles words, is nonsense.
        let sound = start >= V4_HEADER_LEN && offset.is_multiple_of(2) && field + 2 <= packet.len();
        sound.then_some(Self { packet, work: Work::Complete { start, field } })
    }

    /// How many inner packets there will be; at least one.
    pub fn count(&self) -> usize {
        match &self.work {
            Work::Copy | Work::Complete { .. } => 1,
            Work::Cut(cut) => {
                (self.packet.len() - cut.payload_at).div_ceil(cut.payload_len_max).max(1)
            }
        }
    }

    /// Length of inner packet `index` < [`Self::count`].
    pub fn len(&self, index: usize) -> usize {
        match &self.work {
            Work::Copy | Work::Complete { .. } => self.packet.len(),
            Work::Cut(cut) => cut.payload_at + cut.payload(self.packet, index).len(),
        }
    }

    /// Writes inner packet `index` to `to`, which has exactly [`Self::len`] bytes.
    pub fn write(&self, index: usize, to: &mut [u8]) {
        match &self.work {
            Work::Copy => to.copy_from_slice(self.packet),
            &Work::Complete { start, field } => {
                to[..start].copy_from_slice(&self.packet[..start]);
                let sum = checksum::copy_and_sum(&self.packet[start..], &mut to[start..]);
                put(to, field, checksum::finish_nonzero(sum));
            }
            Work::Cut(cut) => cut.write(self.packet, index, index + 1 == self.count(), to),
        }
    }
}

enum Work {
    Copy,
    /// The sum from `start` to the end goes to `field`, which holds the pseudo header's sum.
    Complete {
        start: usize,
        field: usize,
    },
    Cut(Cut),
}

/// Where the transport header of a super-packet stands.
#[derive(Clone, Copy)]
struct Transport {
    protocol: u8,
    at: usize,
    len: usize,
}

impl Transport {
    fn new(packet: &[u8], version: u8, protocol: u8) -> Option<Self> {
        if packet[0] >> 4 != version {
            return None;
        }
        let at = match version {
            4 => v4_payload(packet, protocol)?,
            _ => v6_payload(packet, protocol)?,
        };
        let header = packet.get(at..)?;
        let len = match protocol {
            PROTOCOL_TCP => usize::from(*header.get(12)? >> 4) * 4,
            _ => UDP_HEADER_LEN,
        };
        let least = if protocol == PROTOCOL_TCP { TCP_HEADER_LEN } else { UDP_HEADER_LEN };
        (len >= least && len <= header.len()).then_some(Self { protocol, at, len })
    }

    fn checksum_offset(self) -> usize {
        if self.protocol == PROTOCOL_TCP { TCP_CHECKSUM } else { UDP_CHECKSUM }
    }
}

/// A super-packet, with the sums of everything that is the same in each of its segments.
struct Cut {
    transport: Transport,
    payload_at: usize,
    payload_len_max: usize,
    ip_sum: Sum,
    transport_sum: Sum,
}

impl Cut {
    fn new(packet: &[u8], transport: Transport, payload_len_max: usize) -> Self {
        let payload_at = transport.at + transport.len;
        let (ip, header) = packet[..payload_at].split_at(transport.at);
        let v4 = ip[0] >> 4 == 4;
        let addresses = if v4 { &ip[12..20] } else { &ip[8..40] };
        // The gaps are the fields that change: length, id, checksum; sequence, flags, checksum.
        let ip_sum = match v4 {
            true => sums(&[&ip[..2], &ip[6..10], &ip[12..]]),
            false => 0,
        };
        let fixed = match transport.protocol {
            PROTOCOL_TCP => sums(&[&header[..4], &header[8..12], &header[14..16], &header[18..]]),
            _ => sums(&[&header[..4]]),
        };
        let transport_sum = fixed + checksum::pseudo_header(addresses, transport.protocol, 0);
        Self { transport, payload_at, payload_len_max, ip_sum, transport_sum }
    }

    fn payload<'a>(&self, packet: &'a [u8], index: usize) -> &'a [u8] {
        let payload = &packet[self.payload_at..];
        let from = (index * self.payload_len_max).min(payload.len());
        let to = (from + self.payload_len_max).min(payload.len());
        &payload[from..to]
    }

    fn write(&self, packet: &[u8], index: usize, last: bool, to: &mut [u8]) {
        let payload = self.payload(packet, index);
        let (headers, room) = to.split_at_mut(self.payload_at);
        headers.copy_from_slice(&packet[..self.payload_at]);
        let sum = checksum::copy_and_sum(payload, room) + self.transport_sum;
        let (ip, header) = headers.split_at_mut(self.transport.at);
        self.write_ip(index, self.transport.len + payload.len(), ip);
        match self.transport.protocol {
            PROTOCOL_TCP => self.write_tcp(index, last, payload.len(), sum, header),
            _ => self.write_udp(payload.len(), sum, header),
        }
    }

    fn write_ip(&self, index: usize, content_len: usize, ip: &mut [u8]) {
        if ip[0] >> 4 == 6 {
            let len = (ip.len() - V6_HEADER_LEN + content_len) as u16;
            put(ip, 4, len.to_be_bytes());
            return;
        }
        let len = (ip.len() + content_len) as u16;
        let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(index as u16);
        put(ip, 2, len.to_be_bytes());
        put(ip, 4, id.to_be_bytes());
        let sum = self.ip_sum + checksum::native(len) + checksum::native(id);
        put(ip, 10, checksum::finish(sum));
    }

    fn write_tcp(&self, index: usize, last: bool, payload_len: usize, sum: Sum, header: &mut [u8]) {
        let first_sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let sequence = first_sequence.wrapping_add((index * self.payload_len_max) as u32);
        header[4..8].copy_from_slice(&sequence.to_be_bytes());
        if !last {
            header[13] &= !(TCP_FIN | TCP_PSH);
        }
        if index > 0 {
            header[13] &= !TCP_CWR;
        }
        let changed = checksum::native((sequence >> 16) as u16)
            + checksum::native(sequence as u16)
            + checksum::native(u16::from_be_bytes([header[12], header[13]]))
            + checksum::native((header.len() + payload_len) as u16);
        put(header, TCP_CHECKSUM, checksum::finish(sum + changed));
    }

    fn write_udp(&self, payload_len: usize, sum: Sum, header: &mut [u8]) {
        let len = (UDP_HEADER_LEN + payload_len) as u16;
        put(header, 4, len.to_be_bytes());
        // Twice: once in the header, once in the pseudo header.
        let changed = 2 * checksum::native(len);
        put(header, UDP_CHECKSUM, checksum::finish_nonzero(sum + changed));
    }
}

/// Where the content of an unfragmented IPv4 packet of `protocol` begins.
fn v4_payload(packet: &[u8], protocol: u8) -> Option<usize> {
    let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
    let at = usize::from(packet[0] & 0xf) * 4;
    (!fragment && packet[9] == protocol).then_some(at)
}

/// Where the content of an IPv6 packet of `protocol` begins. Steps over hop-by-hop and destination
/// options only: a routing header changes the checksum's address, a fragment cannot be cut.
fn v6_payload(packet: &[u8], protocol: u8) -> Option<usize> {
    let (mut next, mut at) = (packet[6], V6_HEADER_LEN);
    for _ in 0..EXTENSION_HEADERS_MAX {
        match next {
            HOP_BY_HOP | DESTINATION_OPTIONS => {
                next = *packet.get(at)?;
                at += 8 + usize::from(*packet.get(at + 1)?) * 8;
            }
            _ => break,
        }
    }
    (next == protocol).then_some(at)
}

fn sums(parts: &[&[u8]]) -> Sum {
    parts.iter().map(|part| checksum::sum(part)).sum()
}

fn put(to: &mut [u8], at: usize, word: [u8; 2]) {
    to[at..at + 2].copy_from_slice(&word);
}

pub const TCP_HEADER_LEN: usize = 20;
pub const TCP_CHECKSUM: usize = 16;
pub const TCP_FIN: u8 = 0x01;
pub const TCP_PSH: u8 = 0x08;
pub const TCP_ACK: u8 = 0x10;
pub const TCP_ECE: u8 = 0x40;
pub const TCP_CWR: u8 = 0x80;
pub const UDP_HEADER_LEN: usize = 8;
pub const UDP_CHECKSUM: usize = 6;

const HOP_BY_HOP: u8 = 0;
const DESTINATION_OPTIONS: u8 = 60;
const EXTENSION_HEADERS_MAX: usize = 4;
