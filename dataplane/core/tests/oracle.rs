//! Our device against boringtun's in-memory tunnel: labels, key schedule, message layout and
//! cookies are right because somebody else's agree.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use common::{A, Datagram, World, endpoint, inner_packet, millis, secs};
use millrace_wg::device::PeerChange;
use millrace_wg::limits::UNDER_LOAD_QUEUE;
use millrace_wg::secret::Secret;
use millrace_wg::{Drop, PublicKey};

/// boringtun behind an address of the world.
struct Oracle {
    tunnel: Tunn,
    address: SocketAddr,
    /// Entries of Eve's record that it has read.
    read: usize,
    inner: Vec<Vec<u8>>,
    /// The first bytes of what it sent.
    sent_kinds: Vec<u8>,
}

impl Oracle {
    /// A world of our device and boringtun; `handshakes_max`: a second, before it wants cookies.
    fn meet(preshared: Option<[u8; 32]>, handshakes_max: u64) -> (World, Self) {
        let mut world = World::empty(7, 1);
        let private = Secret::generate_private_key(&mut world.rng);
        let public = x25519::PublicKey::from(private.public_key().0);
        let address: SocketAddr = "192.0.2.99:51820".parse().unwrap();
        let tunnel = Tunn::new(
            x25519::StaticSecret::from(*private.expose()),
            x25519::PublicKey::from(world.nodes[A].public.0),
            preshared,
            None,
            1,
            Some(Arc::new(RateLimiter::new(&public, handshakes_max))),
        );
        let change = PeerChange {
            preshared_key: preshared.map(Secret::new),
            endpoint: Some(endpoint(address)),
            add_allowed_ips: vec!["0.0.0.0/0".parse().unwrap()],
            ..PeerChange::default()
        };
        let clock = world.clock(A);
        world.nodes[A].device.set_peer(clock, PublicKey(public.to_bytes()), change).unwrap();
        world.drain(A);
        let (inner, sent_kinds) = (Vec::new(), Vec::new());
        (world, Self { tunnel, address, read: 0, inner, sent_kinds })
    }

    /// Carries everything between the two until both are silent.
    fn exchange(&mut self, world: &mut World) {
        while self.read < world.eve.len() {
            let datagram = world.eve[self.read].clone();
            self.read += 1;
            self.take(world, &datagram.bytes);
        }
    }

    fn take(&mut self, world: &mut World, datagram: &[u8]) {
        let mut room = vec![0; 4096];
        let from = Some(world.nodes[A].address.ip());
        let mut result = self.tunnel.decapsulate(from, datagram, &mut room);
        loop {
            match result {
                TunnResult::WriteToNetwork(bytes) => {
                    let bytes = bytes.to_vec();
                    self.put(world, bytes);
                    let from = None;
                    result = self.tunnel.decapsulate(from, &[], &mut room);
                }
                TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                    return self.inner.push(packet.to_vec());
                }
                TunnResult::Done => return,
                TunnResult::Err(error) => panic!("boringtun refused: {error:?}"),
            }
        }
    }

    /// boringtun sends an inner packet, or an initiation for it.
    fn send(&mut self, world: &mut World, packet: &[u8]) {
        let mut room = vec![0; 4096];
        let TunnResult::WriteToNetwork(bytes) = self.tunnel.encapsulate(packet, &mut room) else {
            panic!("boringtun sends nothing");
        };
        let bytes = bytes.to_vec();
        self.put(world, bytes);
    }

    fn put(&mut self, world: &mut World, bytes: Vec<u8>) {
        self.sent_kinds.push(bytes[0]);
        let (at, to) = (world.now, world.nodes[A].address);
        let source = self.address;
        world.inject(&Datagram { at, from: usize::MAX, source, to, bytes, tos: 0 });
    }

    /// Every padding, both directions.
    fn check_data(&mut self, world: &mut World) {
        for len in 20..120 {
            let (out, back) = (inner_packet(A, 1, len), inner_packet(1, A, len));
            world.send_packet(A, &out);
            self.exchange(world);
            assert_eq!(self.inner.pop().as_ref(), Some(&out));
            self.send(world, &back);
            assert_eq!(world.nodes[A].inner.pop().as_ref(), Some(&back));
        }
    }
}

const PRESHARED: [Option<[u8; 32]>; 2] = [None, Some([0x5a; 32])];

#[test]
fn we_are_the_initiator() {
    for preshared in PRESHARED {
        let (mut world, mut oracle) = Oracle::meet(preshared, 100);
        let packet = inner_packet(A, 1, 100);
        world.send_packet(A, &packet);
        oracle.exchange(&mut world);
        assert_eq!(oracle.inner.pop(), Some(packet), "the staged packet confirmed the key");
        oracle.check_data(&mut world);
        assert_eq!(world.sent(A, 1, 0).len(), 1);
    }
}

#[test]
fn we_are_the_responder() {
    for preshared in PRESHARED {
        let (mut world, mut oracle) = Oracle::meet(preshared, 100);
        let packet = inner_packet(1, A, 100);
        oracle.send(&mut world, &packet);
        assert_eq!(oracle.sent_kinds, [1]);
        oracle.exchange(&mut world);
        assert_eq!(world.sent(A, 2, 0).len(), 1);
        assert_eq!(world.nodes[A].inner.pop(), Some(packet));
        oracle.check_data(&mut world);
        assert!(world.sent(A, 1, 0).is_empty());
    }
}

#[test]
fn our_keepalive_is_one_to_boringtun_and_its_to_us() {
    let (mut world, mut oracle) = Oracle::meet(None, 100);
    let change = PeerChange { keepalive: Some(secs(20)), ..PeerChange::default() };
    let (clock, key) =
        (world.clock(A), world.nodes[A].device.peers().next().unwrap().peer.public_key);
    world.nodes[A].device.set_peer(clock, key, change).unwrap();
    world.drain(A);
    oracle.exchange(&mut world);
    let keepalive = world.last_sent(A, 4);
    assert_eq!(keepalive.bytes.len(), 32);
    assert!(oracle.inner.is_empty());
    oracle.send(&mut world, &[]);
    assert!(world.nodes[A].inner.is_empty());
    assert_eq!(world.drops(A, Drop::RxAuthFailed) + world.drops(A, Drop::RxInnerLength), 0);
    let peer = world.nodes[A].device.peers().next().unwrap();
    // Response and keepalive.
    assert_eq!(peer.peer.received.packets(), 2);
    assert_eq!(peer.peer.received.bytes(), 92 + 32);
}

#[test]
fn boringtun_gives_us_a_cookie_and_takes_our_mac2() {
    let (mut world, mut oracle) = Oracle::meet(None, 0);
    let packet = inner_packet(A, 1, 100);
    world.send_packet(A, &packet);
    oracle.exchange(&mut world);
    assert_eq!(oracle.sent_kinds, [3], "a cookie and nothing else");
    world.run_for(secs(6));
    oracle.exchange(&mut world);
    assert_eq!(oracle.sent_kinds[..2], [3, 2], "then a response");
    assert_eq!(oracle.inner.pop(), Some(packet));
}

#[test]
fn boringtun_takes_our_cookie_and_its_mac2_is_good() {
    let (mut world, mut oracle) = Oracle::meet(None, 100);
    world.nodes[A].waiting = UNDER_LOAD_QUEUE;
    let packet = inner_packet(1, A, 100);
    oracle.send(&mut world, &packet);
    assert_eq!(world.last_sent(A, 3).bytes.len(), 64);
    oracle.exchange(&mut world);
    world.run_for(millis(30));
    let mut room = vec![0; 4096];
    let again = oracle.tunnel.format_handshake_initiation(&mut room, true);
    let TunnResult::WriteToNetwork(bytes) = again else { panic!("no initiation") };
    assert_ne!(bytes[132..], [0; 16], "with mac2");
    let bytes = bytes.to_vec();
    oracle.put(&mut world, bytes);
    assert_eq!(world.sent(A, 2, 0).len(), 1, "our response");
    oracle.exchange(&mut world);
    assert_eq!(world.nodes[A].inner.pop(), Some(packet));
}

#[test]
fn a_wrong_preshared_key_ends_at_the_response() {
    let (mut world, mut oracle) = Oracle::meet(Some([1; 32]), 100);
    let key = world.nodes[A].device.peers().next().unwrap().peer.public_key;
    let change = PeerChange { preshared_key: Some(Secret::new([2; 32])), ..PeerChange::default() };
    let clock = world.clock(A);
    world.nodes[A].device.set_peer(clock, key, change).unwrap();
    world.send_packet(A, &inner_packet(A, 1, 100));
    oracle.exchange(&mut world);
    assert_eq!(world.drops(A, Drop::HsInvalid), 1);
    assert!(world.sent(A, 4, 0).is_empty(), "no data without a session");
    // The right key is set while the handshake is under way: the next try succeeds.
    let change = PeerChange { preshared_key: Some(Secret::new([1; 32])), ..PeerChange::default() };
    world.nodes[A].device.set_peer(clock, key, change).unwrap();
    world.run_for(secs(6));
    oracle.exchange(&mut world);
    assert_eq!(oracle.inner.len(), 1);
}
