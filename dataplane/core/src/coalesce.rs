//! Inner packets to few TUN writes: receive offload in user space, within one turn of a worker.
//!
//! Packets of a TCP or UDP flow that follow each other exactly become one super-packet with a
//! vnet header, as the kernel's own GRO would make it: the kernel then handles them once. What is
//! merged was verified before, because the kernel trusts a super-packet's checksums: merging would
//! launder corruption otherwise. Payloads are not copied: a write is a list of slices.
//!
//! Order within a flow is never changed, and nothing is held from one turn to the next.

use std::io::IoSlice;

use arrayvec::ArrayVec;

use crate::checksum;
use crate::ip::{PROTOCOL_TCP, PROTOCOL_UDP, V4_HEADER_LEN, V6_HEADER_LEN};
use crate::limits::{COALESCE_FLOWS, COALESCE_PACKETS, COALESCED_MAX};
use crate::segment::{
    TCP_ACK, TCP_CHECKSUM, TCP_ECE, TCP_FIN, TCP_HEADER_LEN, TCP_PSH, UDP_CHECKSUM, UDP_HEADER_LEN,
};
use crate::vnet::VnetHdr;

/// Which super-packets the TUN device takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoalesceOptions {
    pub tcp: bool,
    pub udp: bool,
}

/// Merges within each call of [`Coalescer::write`]. One per worker.
pub struct Coalescer {
    /// Flows that may still grow. Empty between calls.
    flows: ArrayVec<Flow, COALESCE_FLOWS>,
    /// For each packet of a flow but its last: the place of the flow's next packet.
    next: [u8; COALESCE_PACKETS],
}

impl Default for Coalescer {
    fn default() -> Self {
        Self::new()
    }
}

impl Coalescer {
    pub fn new() -> Self {
        Self { flows: ArrayVec::new(), next: [0; COALESCE_PACKETS] }
    }

    /// Gives every packet of `inner` to `emit`, alone or merged with others: a vnet header, and
    /// the slices that make one packet. The header of a merged packet is changed in place.
    pub fn write<'a>(
        &mut self,
        options: CoalesceOptions,
        inner: &mut [&'a mut [u8]],
        emit: &mut dyn FnMut(VnetHdr, &[IoSlice<'_>]),
    ) {
        for inner in inner.chunks_mut(COALESCE_PACKETS) {
            for place in 0..inner.len() {
                match Class::of(inner[place], options) {
                    Class::Unrelated => emit_alone(inner[place], emit),
                    Class::Unclear => {
                        self.flush_all(inner, emit);
                        emit_alone(inner[place], emit);
                    }
                    Class::Flow(key, None) => {
                        self.flush(&key, inner, emit);
                        emit_alone(inner[place], emit);
                    }
                    Class::Flow(key, Some(segment)) => {
                        self.add(key, segment, place, inner, emit);
                    }
                }
            }
            self.flush_all(inner, emit);
        }
    }

    fn add(
        &mut self,
        key: Key,
        segment: Segment,
        place: usize,
        inner: &mut [&mut [u8]],
        emit: &mut dyn FnMut(VnetHdr, &[IoSlice<'_>]),
    ) {
        if let Some(at) = self.flows.iter().position(|flow| flow.key == key) {
            let flow = &mut self.flows[at];
            if flow.takes(&segment, inner, place) {
                self.next[flow.last] = place as u8;
                flow.append(&segment, place);
                if segment.closes || segment.payload_len < flow.head.payload_len {
                    self.flush(&key, inner, emit);
                }
                return;
            }
            self.flush(&key, inner, emit);
        }
        if segment.closes {
            return emit_alone(inner[place], emit);
        }
        if self.flows.is_full() {
            let oldest = self.flows[0].key;
            self.flush(&oldest, inner, emit);
        }
        self.flows.push(Flow::new(key, segment, place, inner[place]));
    }

    fn flush(
        &mut self,
        key: &Key,
        inner: &mut [&mut [u8]],
        emit: &mut dyn FnMut(VnetHdr, &[IoSlice<'_>]),
    ) {
        if let Some(at) = self.flows.iter().position(|flow| flow.key == *key) {
            let flow = self.flows.remove(at);
            flow.emit(&self.next, inner, emit);
        }
    }

    fn flush_all(
        &mut self,
        inner: &mut [&mut [u8]],
        emit: &mut dyn FnMut(VnetHdr, &[IoSlice<'_>]),
    ) {
        for flow in self.flows.drain(..) {
            flow.emit(&self.next, inner, emit);
        }
    }
}

/// What order a packet must keep.
enum Class {
    /// No TCP and no UDP: may overtake both.
    Unrelated,
    /// A fragment, options, a cut header: the flow cannot be told, so nothing may be overtaken.
    Unclear,
    /// Of a flow; mergeable if there is a segment.
    Flow(Key, Option<Segment>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    source: u128,
    destination: u128,
    ports: [u8; 4],
    v6: bool,
    protocol: u8,
}

/// A packet that may be merged.
#[derive(Clone, Copy)]
struct Segment {
    transport_at: usize,
    header_len: usize,
    payload_len: usize,
    /// Nothing may follow it in a super-packet: TCP says "push" or "finished".
    closes: bool,
}

impl Class {
    fn of(packet: &[u8], options: CoalesceOptions) -> Self {
        let (protocol, transport_at, source, destination) = match packet {
            [0x45, ..] if packet.len() >= V4_HEADER_LEN => {
                let protocol = packet[9];
                let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
                if fragment {
                    return Self::Unclear;
                }
                let address = |at| u128::from(u32_at(packet, at));
                (protocol, V4_HEADER_LEN, address(12), address(16))
            }
            [first, ..] if first >> 4 == 6 && packet.len() >= V6_HEADER_LEN => {
                let address = |at: usize| {
                    let half = |at| u128::from(u64_at(packet, at));
                    half(at) << 64 | half(at + 8)
                };
                (packet[6], V6_HEADER_LEN, address(8), address(24))
            }
            _ => return Self::Unclear,
        };
        let v6 = transport_at == V6_HEADER_LEN;
        let transport = &packet[transport_at..];
        let least = match protocol {
            PROTOCOL_TCP => TCP_HEADER_LEN,
            PROTOCOL_UDP => UDP_HEADER_LEN,
            _ if v6 && EXTENSION_HEADERS.contains(&protocol) => return Self::Unclear,
            _ => return Self::Unrelated,
        };
        if transport.len() < least {
            return Self::Unclear;
        }
        let ports = [transport[0], transport[1], transport[2], transport[3]];
        let segment = match protocol {
            PROTOCOL_TCP if options.tcp => tcp_segment(packet, transport_at),
            PROTOCOL_UDP if options.udp => udp_segment(packet, transport_at),
            _ => None,
        };
        let whole = stated_len(packet) == packet.len();
        Self::Flow(Key { source, destination, ports, v6, protocol }, segment.filter(|_| whole))
    }
}

fn tcp_segment(packet: &[u8], transport_at: usize) -> Option<Segment> {
    let header = &packet[transport_at..];
    let header_len = usize::from(header[12] >> 4) * 4;
    let payload_len = header.len().checked_sub(header_len)?;
    let flags = header[13];
    let plain = flags & !(TCP_PSH | TCP_FIN | TCP_ECE) == TCP_ACK;
    (header_len >= TCP_HEADER_LEN && payload_len > 0 && plain).then_some(Segment {
        transport_at,
        header_len: transport_at + header_len,
        payload_len,
        closes: flags & (TCP_PSH | TCP_FIN) != 0,
    })
}

fn udp_segment(packet: &[u8], transport_at: usize) -> Option<Segment> {
    let header = &packet[transport_at..];
    let payload_len = header.len() - UDP_HEADER_LEN;
    let whole = usize::from(u16_at(header, 4)) == header.len();
    let checked = u16_at(header, UDP_CHECKSUM) != 0;
    let tunnel = [0, 2].iter().any(|&at| TUNNEL_PORTS.contains(&u16_at(header, at)));
    (payload_len > 0 && whole && checked && !tunnel).then_some(Segment {
        transport_at,
        header_len: transport_at + UDP_HEADER_LEN,
        payload_len,
        closes: false,
    })
}

/// Packets of one flow that follow each other exactly.
struct Flow {
    key: Key,
    /// The first packet, whose payload length is that of all but the last.
    head: Segment,
    head_verified: bool,
    first: usize,
    last: usize,
    packets: usize,
    /// Of the super-packet, headers included.
    len: usize,
    /// Where TCP's next payload must begin.
    next_sequence: u32,
    /// By how much the IPv4 id grows from packet to packet: 0 or 1, known from the second on.
    id_step: Option<u16>,
}

impl Flow {
    fn new(key: Key, head: Segment, first: usize, packet: &[u8]) -> Self {
        let next_sequence = match key.protocol {
            PROTOCOL_TCP => u32_at(packet, head.transport_at + 4),
            _ => 0,
        };
        Self {
            key,
            head,
            head_verified: false,
            first,
            last: first,
            packets: 1,
            len: packet.len(),
            next_sequence: next_sequence.wrapping_add(head.payload_len as u32),
            id_step: None,
        }
    }

    /// Whether the packet at `place` continues this flow: the rules of the kernel's GRO. Learns
    /// the id step, and verifies both sides of the first merge.
    fn takes(&mut self, segment: &Segment, inner: &[&mut [u8]], place: usize) -> bool {
        let (head, packet) = (&*inner[self.first], &*inner[place]);
        let fits = self.packets < COALESCED_MAX
            && segment.header_len == self.head.header_len
            && segment.payload_len <= self.head.payload_len
            && self.len + segment.payload_len <= usize::from(u16::MAX);
        if !fits || !self.same_ip(head, packet) {
            return false;
        }
        if self.key.protocol == PROTOCOL_TCP && !self.continues_tcp(head, packet) {
            return false;
        }
        self.head_verified = self.head_verified || verifies(head, &self.head, self.key.protocol);
        self.head_verified && verifies(packet, segment, self.key.protocol)
    }

    fn same_ip(&mut self, head: &[u8], packet: &[u8]) -> bool {
        if self.key.v6 {
            // Version, traffic class, flow label; hop limit.
            return head[..4] == packet[..4] && head[7] == packet[7];
        }
        // TOS, flags, TTL.
        if head[1] != packet[1] || head[6..9] != packet[6..9] {
            return false;
        }
        let apart = u16_at(packet, 4).wrapping_sub(u16_at(head, 4));
        let dont_fragment = head[6] & 0x40 != 0;
        let step = match self.id_step {
            Some(step) => step,
            None if dont_fragment && apart == 0 => 0,
            None => 1,
        };
        self.id_step = Some(step);
        apart == step.wrapping_mul(self.packets as u16)
    }

    fn continues_tcp(&self, head: &[u8], packet: &[u8]) -> bool {
        let end = self.head.header_len;
        let (head, packet) =
            (&head[self.head.transport_at..end], &packet[self.head.transport_at..end]);
        u32_at(packet, 4) == self.next_sequence
            // Acknowledgement, header length.
            && head[8..13] == packet[8..13]
            && (head[13] ^ packet[13]) & !(TCP_FIN | TCP_PSH) == 0
            // Window; options.
            && head[14..16] == packet[14..16]
            && head[18..] == packet[18..]
    }

    fn append(&mut self, segment: &Segment, place: usize) {
        self.last = place;
        self.packets += 1;
        self.len += segment.payload_len;
        self.next_sequence = self.next_sequence.wrapping_add(segment.payload_len as u32);
    }

    fn emit(
        &self,
        next: &[u8; COALESCE_PACKETS],
        inner: &mut [&mut [u8]],
        emit: &mut dyn FnMut(VnetHdr, &[IoSlice<'_>]),
    ) {
        if self.packets == 1 {
            return emit_alone(inner[self.first], emit);
        }
        let last_flags = match self.key.protocol {
            PROTOCOL_TCP => inner[self.last][self.head.transport_at + 13] & (TCP_FIN | TCP_PSH),
            // A UDP packet may be too short to have that byte.
            _ => 0,
        };
        let vnet = self.write_headers(inner[self.first], last_flags);
        let mut slices: ArrayVec<IoSlice<'_>, COALESCED_MAX> = ArrayVec::new();
        slices.push(IoSlice::new(inner[self.first]));
        let mut place = self.first;
        while place != self.last && !slices.is_full() {
            place = usize::from(next[place]);
            slices.push(IoSlice::new(&inner[place][self.head.header_len..]));
        }
        emit(vnet, &slices);
    }

    /// Makes the first packet's headers those of the super-packet: lengths, last flags, the IP
    /// checksum, and the pseudo header's sum for the kernel to complete.
    fn write_headers(&self, packet: &mut [u8], last_flags: u8) -> VnetHdr {
        let at = self.head.transport_at;
        let transport_len = self.len - at;
        if self.key.v6 {
            packet[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
        } else {
            packet[2..4].copy_from_slice(&(self.len as u16).to_be_bytes());
            packet[10..12].fill(0);
            let checksum = checksum::finish(checksum::sum(&packet[..at]));
            packet[10..12].copy_from_slice(&checksum);
        }
        let sum = checksum::pseudo_header(addresses(packet), self.key.protocol, transport_len);
        let (gso_type, csum_offset) = match (self.key.protocol, self.key.v6) {
            (PROTOCOL_TCP, false) => (VnetHdr::GSO_TCPV4, TCP_CHECKSUM),
            (PROTOCOL_TCP, true) => (VnetHdr::GSO_TCPV6, TCP_CHECKSUM),
            _ => (VnetHdr::GSO_UDP_L4, UDP_CHECKSUM),
        };
        let transport = &mut packet[at..];
        if self.key.protocol == PROTOCOL_TCP {
            transport[13] |= last_flags;
        } else {
            transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
        }
        transport[csum_offset..csum_offset + 2].copy_from_slice(&checksum::fold(sum));
        VnetHdr {
            flags: VnetHdr::F_NEEDS_CSUM,
            gso_type,
            hdr_len: self.head.header_len as u16,
            gso_size: self.head.payload_len as u16,
            csum_start: at as u16,
            csum_offset: csum_offset as u16,
        }
    }
}

fn emit_alone(packet: &[u8], emit: &mut dyn FnMut(VnetHdr, &[IoSlice<'_>])) {
    emit(VnetHdr::default(), &[IoSlice::new(packet)]);
}

/// Whether all of a packet's checksums hold.
fn verifies(packet: &[u8], segment: &Segment, protocol: u8) -> bool {
    let (ip, transport) = packet.split_at(segment.transport_at);
    let pseudo = checksum::pseudo_header(addresses(packet), protocol, transport.len());
    let v6 = ip.len() == V6_HEADER_LEN;
    (v6 || checksum::verifies(checksum::sum(ip)))
        && checksum::verifies(checksum::sum(transport) + pseudo)
}

fn addresses(packet: &[u8]) -> &[u8] {
    if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] }
}

fn stated_len(packet: &[u8]) -> usize {
    match packet[0] >> 4 {
        4 => usize::from(u16_at(packet, 2)),
        _ => V6_HEADER_LEN + usize::from(u16_at(packet, 4)),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

/// Geneve, VXLAN, and VXLAN as Linux first had it: merging tunnels' packets breaks what is inside
/// on some kernels.
const TUNNEL_PORTS: [u16; 3] = [6081, 4789, 8472];

/// Hop-by-hop, routing, fragment, destination options.
const EXTENSION_HEADERS: [u8; 4] = [0, 43, 44, 60];
