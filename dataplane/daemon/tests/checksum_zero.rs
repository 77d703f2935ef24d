//! A UDP checksum that computes to zero has to be sent as 0xffff (RFC 768, RFC 8200 8.1): an IPv6
//! receiver drops a zero. A host leaves the sum to the device, so completing it is the gateway's work.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::{
    io::ErrorKind,
    net::{Ipv6Addr, UdpSocket},
    time::Duration,
};

use common::{World, subject};
use millrace_lab::TunnelOptions;

#[test]
fn a_checksum_of_zero_arrives_over_ipv6() {
    let world = World::new([subject(); 2], &TunnelOptions::default());
    world.connect();
    let (a, b) = (&world.site.a, &world.site.b);
    for (from, to) in [(a, b), (b, a)] {
        let receiver = to.host.run(|| UdpSocket::bind((to.host_v6, 0))).unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let sender = from.host.run(|| UdpSocket::bind((from.host_v6, 0))).unwrap();
        let ports = [&sender, &receiver].map(|socket| socket.local_addr().unwrap().port());
        let zero = !sum(from.host_v6, to.host_v6, ports, 0);
        // The neighbours prove that the way is open, the middle one has the sum of zero.
        for word in [zero.wrapping_sub(1), zero, zero.wrapping_add(1)] {
            sender.send_to(&word.to_be_bytes(), (to.host_v6, ports[1])).unwrap();
            let mut buffer = [0; 4];
            match receiver.recv(&mut buffer) {
                Ok(len) => assert_eq!(buffer[..len], word.to_be_bytes()),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    panic!("lost the word {word:#06x}; {zero:#06x} makes the checksum zero");
                }
            }
        }
    }
    world.finish();
}

/// The ones' complement sum of the pseudo-header, the UDP header and one word of payload.
fn sum(from: Ipv6Addr, to: Ipv6Addr, ports: [u16; 2], word: u16) -> u16 {
    const LEN: u16 = 8 + 2;
    const UDP: u16 = 17;
    let words = from.segments().into_iter().chain(to.segments()).chain(ports);
    let sum: u32 = words.chain([LEN, UDP, LEN, word]).map(u32::from).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
