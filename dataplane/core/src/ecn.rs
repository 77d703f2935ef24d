//! Explicit congestion notification through the tunnel (RFC 6040, normal mode): copied out on the
//! way in, combined on the way out. DSCP never crosses: the outer one is 0, the inner one stays.

use crate::checksum;

/// The two bits, as they stand in the TOS byte or traffic class.
pub const NOT_ECT: u8 = 0;
pub const ECT_1: u8 = 1;
pub const ECT_0: u8 = 2;
pub const CE: u8 = 3;

/// The ECN bits of an IPv4 or IPv6 packet; the outer header carries the same.
pub fn of_packet(packet: &[u8]) -> u8 {
    match packet {
        [first, second, ..] if first >> 4 == 4 => second & 3,
        [_, second, ..] => second >> 4 & 3,
        _ => NOT_ECT,
    }
}

/// What the inner bits become (RFC 6040 figure 4); none = the packet must be dropped, because
/// the network says "congestion" and the sender would not hear it.
pub fn combine(inner: u8, outer: u8) -> Option<u8> {
    match (inner, outer) {
        (NOT_ECT, CE) => None,
        (ECT_0 | ECT_1, CE) => Some(CE),
        (ECT_0, ECT_1) => Some(ECT_1),
        (inner, _) => Some(inner),
    }
}

/// Combines `outer` into a packet with a whole IP header; false = drop it.
pub fn apply(packet: &mut [u8], outer: u8) -> bool {
    let inner = of_packet(packet);
    match combine(inner, outer & 3) {
        None => false,
        Some(combined) if combined == inner => true,
        Some(combined) => {
            set(packet, combined);
            true
        }
    }
}

fn set(packet: &mut [u8], ecn: u8) {
    if packet[0] >> 4 == 6 {
        packet[1] = packet[1] & 0xcf | ecn << 4;
        return;
    }
    let old = [packet[0], packet[1]];
    packet[1] = packet[1] & 0xfc | ecn;
    let new = [packet[0], packet[1]];
    if let Some(field) = packet.get_mut(10..12).and_then(|field| field.first_chunk_mut()) {
        checksum::replace(field, old, new);
    }
}
