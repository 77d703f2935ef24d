//! An Ethernet frame with a UDP datagram in it: reading received ones, writing ours.
//! Pure; nothing of a received frame is believed before it was checked against its length.
//!
//! Checksums of received frames are not looked at: on virtual links they are often unfinished, and
//! the message inside is authenticated.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use millrace_wg::Endpoint;
use millrace_wg::checksum;

const ETHERNET_LEN: usize = 14;
const VLAN_LEN: usize = 4;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const UDP_LEN: usize = 8;
const TYPE_VLAN: u16 = 0x8100;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
const PROTOCOL_UDP: u8 = 17;
/// Hops that our packets may take, as the kernel's default.
const TTL: u8 = 64;

/// What a received frame carries.
#[derive(Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    pub source: Endpoint,
    /// The two ECN bits of the outer header.
    pub ecn: u8,
    /// The UDP payload, without what Ethernet pads.
    pub payload: &'a mut [u8],
}

/// Reads a frame that came in on `ifindex`. None if it is no whole, unfragmented UDP datagram over
/// IPv4 without options or IPv6 without extension headers, behind at most one 802.1Q tag.
pub fn parse(frame: &mut [u8], ifindex: u32) -> Option<Datagram<'_>> {
    let (mut ether_type, mut at) = (word(frame, 12)?, ETHERNET_LEN);
    let mut ifindex = ifindex;
    if ether_type == TYPE_VLAN {
        ether_type = word(frame, 16)?;
        at += VLAN_LEN;
        // The packet belongs to a VLAN device whose index we do not know.
        ifindex = 0;
    }
    let (_, packet) = frame.split_at_mut_checked(at)?;
    match ether_type {
        TYPE_IPV4 => parse_ipv4(packet, ifindex),
        TYPE_IPV6 => parse_ipv6(packet, ifindex),
        _ => None,
    }
}

fn parse_ipv4(packet: &mut [u8], ifindex: u32) -> Option<Datagram<'_>> {
    let (header, rest) = packet.split_first_chunk_mut::<IPV4_LEN>()?;
    // Any fragment, first ones too: the flag "more" or an offset.
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    if header[0] != 0x45 || header[9] != PROTOCOL_UDP || is_fragment {
        return None;
    }
    let len = usize::from(u16::from_be_bytes([header[2], header[3]])).checked_sub(IPV4_LEN)?;
    let address =
        |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    let (remote, local) = (address(12), address(16));
    let ecn = header[1] & 3;
    let (port, payload) = parse_udp(rest.get_mut(..len)?)?;
    let remote = SocketAddrV4::new(remote, port).into();
    Some(Datagram { source: Endpoint { remote, local: Some(local.into()), ifindex }, ecn, payload })
}

fn parse_ipv6(packet: &mut [u8], ifindex: u32) -> Option<Datagram<'_>> {
    let (header, rest) = packet.split_first_chunk_mut::<IPV6_LEN>()?;
    if header[0] >> 4 != 6 || header[6] != PROTOCOL_UDP {
        return None;
    }
    let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let (source, destination) = (header[8..24].first_chunk()?, header[24..40].first_chunk()?);
    let (remote, local) = (Ipv6Addr::from(*source), Ipv6Addr::from(*destination));
    let ecn = header[1] >> 4 & 3;
    let (port, payload) = parse_udp(rest.get_mut(..len)?)?;
    // As a socket reports it: the zone is a fact of link-local addresses only.
    let zone = if remote.is_unicast_link_local() { ifindex } else { 0 };
    let remote = SocketAddrV6::new(remote, port, 0, zone).into();
    Some(Datagram { source: Endpoint { remote, local: Some(local.into()), ifindex }, ecn, payload })
}

/// The source port and the payload.
fn parse_udp(segment: &mut [u8]) -> Option<(u16, &mut [u8])> {
    let (header, rest) = segment.split_first_chunk_mut::<UDP_LEN>()?;
    let len = usize::from(u16::from_be_bytes([header[4], header[5]])).checked_sub(UDP_LEN)?;
    let port = u16::from_be_bytes([header[0], header[1]]);
    Some((port, rest.get_mut(..len)?))
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The headers of all datagrams to one endpoint: copied before each payload, then completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    bytes: [u8; ETHERNET_LEN + IPV6_LEN + UDP_LEN],
    len: usize,
    /// The checksum of what does not change: the IPv4 header, or the IPv6 and UDP pseudo header
    /// with the ports.
    sum: checksum::Sum,
}

/// The hardware addresses of one hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hop {
    pub destination: [u8; 6],
    pub source: [u8; 6],
}

impl Template {
    /// Headers from `local` and `port` to `remote`. None if the two are of different families.
    pub fn new(hop: Hop, local: IpAddr, port: u16, remote: SocketAddr) -> Option<Self> {
        let mut bytes = [0; ETHERNET_LEN + IPV6_LEN + UDP_LEN];
        bytes[..6].copy_from_slice(&hop.destination);
        bytes[6..12].copy_from_slice(&hop.source);
        let ip = &mut bytes[ETHERNET_LEN..];
        let (ether_type, ip_len, sum) = match (local, remote.ip()) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                ip[0] = 0x45;
                (ip[8], ip[9]) = (TTL, PROTOCOL_UDP);
                ip[12..16].copy_from_slice(&local.octets());
                ip[16..20].copy_from_slice(&remote.octets());
                (TYPE_IPV4, IPV4_LEN, checksum::sum(&ip[..IPV4_LEN]))
            }
            (IpAddr::V6(local), IpAddr::V6(remote_ip)) => {
                ip[0] = 0x60;
                (ip[6], ip[7]) = (PROTOCOL_UDP, TTL);
                ip[8..24].copy_from_slice(&local.octets());
                ip[24..40].copy_from_slice(&remote_ip.octets());
                let ports = checksum::native(port) + checksum::native(remote.port());
                let sum = checksum::pseudo_header(&ip[8..40], PROTOCOL_UDP, 0) + ports;
                (TYPE_IPV6, IPV6_LEN, sum)
            }
            _ => return None,
        };
        let udp = &mut ip[ip_len..];
        udp[..2].copy_from_slice(&port.to_be_bytes());
        udp[2..4].copy_from_slice(&remote.port().to_be_bytes());
        bytes[12..14].copy_from_slice(&ether_type.to_be_bytes());
        Some(Self { bytes, len: ETHERNET_LEN + ip_len + UDP_LEN, sum })
    }

    /// Bytes of the headers, Ethernet's included.
    pub fn header_len(&self) -> usize {
        self.len
    }

    /// Bytes of the IP packet that carries `payload_len` bytes: what the MTU limits.
    pub fn packet_len(&self, payload_len: usize) -> usize {
        self.len - ETHERNET_LEN + payload_len
    }

    /// Writes a whole frame. `frame` is as long as the headers and `payload`, and the packet is at
    /// most 65,535 bytes. `id` numbers IPv4 packets, which routers may fragment.
    pub fn write(&self, frame: &mut [u8], tos: u8, id: u16, payload: &[u8]) {
        let (headers, room) = frame.split_at_mut(self.len);
        headers.copy_from_slice(&self.bytes[..self.len]);
        let (ip, udp) = headers[ETHERNET_LEN..].split_at_mut(self.len - ETHERNET_LEN - UDP_LEN);
        let udp_len = (UDP_LEN + payload.len()) as u16;
        udp[4..6].copy_from_slice(&udp_len.to_be_bytes());
        if ip.len() == IPV4_LEN {
            let total_len = (IPV4_LEN + UDP_LEN + payload.len()) as u16;
            ip[1] = tos;
            ip[2..4].copy_from_slice(&total_len.to_be_bytes());
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            let varying = [u16::from(tos), total_len, id].map(checksum::native);
            let sum = self.sum + varying.iter().sum::<checksum::Sum>();
            ip[10..12].copy_from_slice(&checksum::finish(sum));
            // UDP over IPv4 may go without a checksum (RFC 768); the message is authenticated.
            room.copy_from_slice(payload);
        } else {
            ip[0] |= tos >> 4;
            ip[1] = tos << 4;
            ip[4..6].copy_from_slice(&udp_len.to_be_bytes());
            // The length counts twice: in the pseudo header and in the UDP header.
            let lengths = 2 * checksum::native(udp_len);
            let sum = self.sum + lengths + checksum::copy_and_sum(payload, room);
            udp[6..8].copy_from_slice(&checksum::finish_nonzero(sum));
        }
    }
}

/// Where a frame that [`Template::write`] made goes, its TOS byte and its payload: to send it again
/// another way.
pub fn reread(frame: &mut [u8]) -> Option<(Endpoint, u8, &mut [u8])> {
    let ip = frame.get(ETHERNET_LEN..)?;
    let (tos, ip_len, destination) = match ip.first()? >> 4 {
        4 => (*ip.get(1)?, IPV4_LEN, IpAddr::from(*ip.get(16..)?.first_chunk::<4>()?)),
        6 => {
            let tos = (ip.first()? << 4) | (ip.get(1)? >> 4);
            (tos, IPV6_LEN, IpAddr::from(*ip.get(24..)?.first_chunk::<16>()?))
        }
        _ => return None,
    };
    let port = word(ip, ip_len + 2)?;
    let local = match ip_len {
        IPV4_LEN => IpAddr::from(*ip.get(12..)?.first_chunk::<4>()?),
        _ => IpAddr::from(*ip.get(8..)?.first_chunk::<16>()?),
    };
    let payload = frame.get_mut(ETHERNET_LEN + ip_len + UDP_LEN..)?;
    let remote = SocketAddr::new(destination, port);
    Some((Endpoint { remote, local: Some(local), ifindex: 0 }, tos, payload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOP: Hop = Hop { destination: [2, 0, 0, 0, 0, 1], source: [2, 0, 0, 0, 0, 2] };

    /// A datagram from 192.0.2.1:51820 to 192.0.2.2:51820 with the payload "abcd", ECN CE, padded
    /// to 60 bytes. Its UDP checksum is unfinished, as on virtual links.
    const IPV4: [u8; 60] = [
        0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0x02, 0x08, 0x00, //
        0x45, 0x8b, 0x00, 0x20, 0x12, 0x34, 0x40, 0x00, 0x40, 0x11, 0x63, 0xfb, 192, 0, 2, 1, 192,
        0, 2, 2, //
        0xca, 0x6c, 0xca, 0x6c, 0x00, 0x0c, 0xff, 0xff, b'a', b'b', b'c', b'd', //
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];

    fn with_tag(frame: &[u8]) -> Vec<u8> {
        [&frame[..12], &[0x81, 0x00, 0x00, 0x0a], &frame[12..]].concat()
    }

    fn written(local: &str, remote: &str, tos: u8, payload: &[u8]) -> Vec<u8> {
        let remote: SocketAddr = remote.parse().unwrap();
        let template = Template::new(HOP, local.parse().unwrap(), 51820, remote).unwrap();
        let mut frame = vec![0xa5; template.header_len() + payload.len()];
        template.write(&mut frame, tos, 7, payload);
        frame
    }

    #[test]
    fn ipv4_is_read_and_trimmed() {
        let mut frame = IPV4;
        let datagram = parse(&mut frame, 3).unwrap();
        assert_eq!(datagram.payload, b"abcd");
        assert_eq!(datagram.ecn, 3);
        let local = Some("192.0.2.2".parse().unwrap());
        let remote = "192.0.2.1:51820".parse().unwrap();
        assert_eq!(datagram.source, Endpoint { remote, local, ifindex: 3 });
    }

    #[test]
    fn one_tag_is_read() {
        let mut frame = with_tag(&IPV4);
        let datagram = parse(&mut frame, 3).unwrap();
        assert_eq!((&*datagram.payload, datagram.source.ifindex), (&b"abcd"[..], 0));
        assert_eq!(parse(&mut with_tag(&with_tag(&IPV4)), 3), None, "two tags");
    }

    #[test]
    fn contradictions_are_refused() {
        let broken = |at: usize, value: u8| {
            let mut frame = IPV4;
            frame[at] = value;
            parse(&mut frame, 3).is_none()
        };
        assert!(broken(12, 0x86), "another protocol");
        assert!(broken(14, 0x46), "IP options");
        assert!(broken(14, 0x65), "another version");
        assert!(broken(17, 47), "longer than the frame");
        assert!(broken(17, 31), "shorter than its UDP datagram");
        assert!(broken(17, 19), "shorter than its header");
        assert!(broken(20, 0x20), "a first fragment");
        assert!(broken(21, 1), "a later fragment");
        assert!(broken(23, 6), "TCP");
        assert!(broken(39, 13), "UDP longer than IP");
        assert!(broken(39, 7), "UDP shorter than its header");
        for len in 0..46 {
            assert_eq!(parse(&mut IPV4[..len].to_vec(), 3), None, "cut to {len} bytes");
        }
    }

    #[test]
    fn ipv6_is_read_with_its_zone() {
        let mut frame = written("2001:db8::2", "[2001:db8::1]:4500", 2, b"x");
        let datagram = parse(&mut frame, 3).unwrap();
        assert_eq!((&*datagram.payload, datagram.ecn), (&b"x"[..], 2));
        assert_eq!(datagram.source.remote, "[2001:db8::2]:51820".parse().unwrap());
        let mut frame = written("fe80::2", "[2001:db8::1]:4500", 0, b"x");
        let remote = parse(&mut frame, 3).unwrap().source.remote;
        assert_eq!(remote, SocketAddrV6::new("fe80::2".parse().unwrap(), 51820, 0, 3).into());
    }

    #[test]
    fn families_do_not_mix() {
        let remote = "[2001:db8::1]:1".parse().unwrap();
        assert_eq!(Template::new(HOP, "192.0.2.1".parse().unwrap(), 1, remote), None);
    }

    /// The checksum as RFC 1071 writes it, word by word.
    fn plain_sum(bytes: &[u8]) -> u16 {
        let words =
            bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut frame in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&mut frame, 1);
            let _ = reread(&mut frame);
        }

        #[test]
        fn nearly_right_bytes_are_survived(
            at in 12usize..60, value: u8, tagged: bool, cut in 0usize..=64, v6: bool,
        ) {
            let mut frame = if v6 { written("::1", "[::2]:1", 3, b"abcd") } else { IPV4.to_vec() };
            if tagged {
                frame = with_tag(&frame);
            }
            frame[at] = value;
            frame.truncate(cut.max(1));
            let len = frame.len();
            if let Some(datagram) = parse(&mut frame, 1) {
                prop_assert!(datagram.payload.len() + ETHERNET_LEN + IPV4_LEN + UDP_LEN <= len);
            }
        }

        #[test]
        fn what_is_written_is_read(
            tos: u8, v6: bool, payload in proptest::collection::vec(any::<u8>(), 0..1473),
        ) {
            let (local, remote) =
                if v6 { ("2001:db8::2", "[2001:db8::1]:9") } else { ("192.0.2.2", "192.0.2.1:9") };
            let mut frame = written(local, remote, tos, &payload);
            let ip = &frame[ETHERNET_LEN..];
            if v6 {
                let len = ((UDP_LEN + payload.len()) as u32).to_be_bytes();
                let pseudo = [&ip[8..40], &len, &[0, 0, 0, 17], &ip[40..]].concat();
                prop_assert_eq!(plain_sum(&pseudo), 0xffff);
            } else {
                prop_assert_eq!(plain_sum(&ip[..20]), 0xffff);
                prop_assert_eq!(&ip[26..28], &[0, 0]);
            }
            let datagram = parse(&mut frame, 1).unwrap();
            prop_assert_eq!(&*datagram.payload, &payload[..]);
            prop_assert_eq!(datagram.ecn, tos & 3);
            prop_assert_eq!(datagram.source.remote.port(), 51820);
            let (to, again, bytes) = reread(&mut frame).unwrap();
            prop_assert_eq!(to.remote, remote.parse().unwrap());
            prop_assert_eq!(to.local, Some(local.parse().unwrap()));
            prop_assert_eq!((again, &*bytes), (tos, &payload[..]));
        }
    }
}
