//! What a worker's lane sends, received and checked by the kernel's own UDP: headers, checksums,
//! next hops, and what happens to frames that a device never completes. The lane sends in copy mode
//! here, which the product never does, because veth has no zero-copy: functional only.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant as Clock};

use millrace_dataplane::io::lane::{Lane, LaneSocket, Mailbox, Sent};
use millrace_dataplane::io::netlink::{Link, Netlink};
use millrace_dataplane::io::nexthop::{self, NextHops};
use millrace_dataplane::io::xsk::{Fault, Mode, STALL_TIMEOUT, bind_queues};
use millrace_lab::{Lab, Namespace, lab, wait_for};
use millrace_wg::tx::Transmit;
use millrace_wg::{Endpoint, Instant, Peer, PeerSlot, PublicKey};
use rustix::event::{EventfdFlags, eventfd};

const LIMIT: Duration = Duration::from_secs(10);
const PORT: u16 = 51820;

struct Bench {
    lane: Lane,
    mailbox: Arc<Mailbox>,
    hops: Arc<NextHops>,
    netlink: Netlink,
    link: Link,
    start: Clock,
    peer: Arc<Peer>,
    near: Namespace,
    far: Namespace,
    _lab: Lab,
}

impl Bench {
    fn new() -> Self {
        let lab = Lab::new().unwrap();
        let (near, far) = (lab.namespace("near").unwrap(), lab.namespace("far").unwrap());
        lab::link((&near, "veth0"), (&far, "veth1")).unwrap();
        near.ip(["addr add 192.0.2.1/24 dev veth0", "addr add 2001:db8::1/64 dev veth0 nodad"])
            .unwrap();
        far.ip([
            "addr add 192.0.2.2/24 dev veth1",
            "addr add 2001:db8::2/64 dev veth1 nodad",
            // Behind a router, as seen from the near side.
            "addr add 198.51.100.1/32 dev lo",
        ])
        .unwrap();
        near.ip(["route add 198.51.100.0/24 via 192.0.2.2"]).unwrap();
        let wake: Arc<OwnedFd> = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let mailbox = Mailbox::new(Arc::clone(&wake)).unwrap();
        let hops = NextHops::new(wake);
        let (netlink, link, mut sockets) = near.run(|| {
            let netlink = Netlink::new().unwrap();
            let link = netlink.link_by_name("veth0").unwrap().unwrap();
            let sockets = bind_queues(&Arc::default(), link.index, 1, Mode::Copy, 2048).unwrap();
            (netlink, link, sockets)
        });
        let xsk = sockets.pop().unwrap();
        mailbox.post(vec![LaneSocket { xsk, transmit: true }]);
        let mut lane = Lane::new(Arc::clone(&mailbox), Arc::clone(&hops));
        lane.pick_up(|_| unreachable!("there was no socket before"));
        assert!(mailbox.is_settled());
        let peer = Arc::new(Peer::new(PeerSlot(0), PublicKey([0; 32]), None));
        let start = Clock::now();
        Self { lane, mailbox, hops, netlink, link, start, peer, near, far, _lab: lab }
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(1 + self.start.elapsed().as_nanos() as u64)
    }

    fn receiver(&self, address: &str) -> UdpSocket {
        let address: SocketAddr = address.parse().unwrap();
        let socket = self.far.run(|| UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket
    }

    fn send(&mut self, to: SocketAddr, tos: u8, bytes: &[u8], segment_len: usize) -> Sent {
        let endpoint = Endpoint { remote: to, local: None, ifindex: 0 };
        let transmit = Transmit { peer: &self.peer, endpoint, ecn: tos, bytes, segment_len };
        let now = Instant::from_nanos(1 + self.start.elapsed().as_nanos() as u64);
        let sent = self.lane.send(&transmit, 0, now);
        self.lane.flush(now);
        sent
    }

    fn from(&self) -> nexthop::From<'_> {
        nexthop::From { link: &self.link, port: PORT, mark: 0 }
    }

    /// What the port's thread does, until the hop is known.
    fn resolve(&self, to: SocketAddr) {
        let endpoint = Endpoint { remote: to, local: None, ifindex: 0 };
        wait_for("the next hop", LIMIT, || {
            self.hops.answer(&self.netlink, self.from()).unwrap();
            self.hops.refresh(&self.netlink, self.from(), false).unwrap();
            self.hops.lookup(&endpoint)
        })
        .unwrap();
    }
}

#[test]
fn every_length_arrives_at_a_kernel_socket() {
    let mut bench = Bench::new();
    let addresses = [
        ("192.0.2.2:7", "192.0.2.1"),
        ("[2001:db8::2]:7", "2001:db8::1"),
        ("198.51.100.1:7", "192.0.2.1"),
    ];
    for (text, source) in addresses {
        let (to, receiver) = (text.parse().unwrap(), bench.receiver(text));
        assert_eq!(bench.send(to, 0, &[1], 1), Sent::Elsewhere, "the first packet only asks");
        bench.resolve(to);
        let header_len = if to.is_ipv4() { 28 } else { 48 };
        let mut room = [0; 2000];
        for len in 1..=1500 - header_len {
            let payload: Vec<u8> = (0..len).map(|at| (at * 31 + len) as u8).collect();
            assert_eq!(bench.send(to, 3, &payload, len), Sent::All);
            let (received, from) = receiver.recv_from(&mut room).unwrap();
            assert!(room[..received] == payload, "{len} bytes to {text}");
            assert_eq!(from, SocketAddr::new(source.parse::<IpAddr>().unwrap(), PORT));
        }
        let long = vec![0; 1501 - header_len];
        assert_eq!(bench.send(to, 0, &long, long.len()), Sent::Elsewhere, "over the MTU");
    }
    let no_route = "203.0.113.1:7".parse().unwrap();
    assert_eq!(bench.send(no_route, 0, &[1], 1), Sent::Elsewhere);
    bench.hops.answer(&bench.netlink, bench.from()).unwrap();
    assert_eq!(bench.send(no_route, 0, &[1], 1), Sent::Elsewhere, "known to be for the socket");
}

#[test]
fn a_run_is_cut_into_its_datagrams_in_order() {
    let mut bench = Bench::new();
    let (to, receiver) = ("192.0.2.2:7".parse().unwrap(), bench.receiver("192.0.2.2:7"));
    bench.send(to, 0, &[1], 1);
    bench.resolve(to);
    let bytes: Vec<u8> = (0..64 * 1000 - 300).map(|at| (at / 1000) as u8).collect();
    assert_eq!(bench.send(to, 0, &bytes, 1000), Sent::All);
    let mut room = [0; 2000];
    for number in 0..64 {
        let len = receiver.recv(&mut room).unwrap();
        assert_eq!(len, if number == 63 { 700 } else { 1000 });
        assert!(room[..len].iter().all(|&byte| byte == number));
    }
    wait_for("completions", LIMIT, || {
        let now = bench.now();
        (!bench.lane.watch(now)).then_some(())
    })
    .unwrap();
    assert_eq!(bench.mailbox.frames(), [0, 64]);
    assert_eq!(bench.mailbox.take_faults(), []);
}

#[test]
fn a_full_ring_says_how_far_it_came() {
    let mut bench = Bench::new();
    let to: SocketAddr = "192.0.2.2:7".parse().unwrap();
    bench.send(to, 0, &[1], 1);
    bench.resolve(to);
    let endpoint = Endpoint { remote: to, local: None, ifindex: 0 };
    let (bytes, peer) = (vec![7; 64 * 100], Arc::clone(&bench.peer));
    let transmit = Transmit { peer: &peer, endpoint, ecn: 0, bytes: &bytes, segment_len: 100 };
    // Never flushed, so nothing leaves the ring of 1,024.
    let now = bench.now();
    let sent: Vec<Sent> = (0..17).map(|_| bench.lane.send(&transmit, 0, now)).collect();
    assert!(sent[..16].iter().all(|sent| *sent == Sent::All));
    assert_eq!(sent[16], Sent::Full(0));
    bench.lane.flush(now);
    wait_for("room", LIMIT, || {
        let now = bench.now();
        bench.lane.watch(now);
        (bench.lane.send(&transmit, 6300, now) == Sent::All).then_some(())
    })
    .unwrap();
}

#[test]
fn frames_that_a_device_does_not_complete_are_sent_again_another_way() {
    let mut bench = Bench::new();
    let to: SocketAddr = "192.0.2.2:7".parse().unwrap();
    bench.send(to, 0, &[1], 1);
    bench.resolve(to);
    let endpoint = Endpoint { remote: to, local: None, ifindex: 0 };
    let now = bench.now();
    for number in 0..3 {
        let bytes = [number; 50];
        let transmit =
            Transmit { peer: &bench.peer, endpoint, ecn: 2, bytes: &bytes, segment_len: 50 };
        // Never flushed: as if the device did not take them.
        assert_eq!(bench.lane.send(&transmit, 0, now), Sent::All);
    }
    bench.lane.watch(now + STALL_TIMEOUT);
    assert_eq!(bench.mailbox.take_faults(), [Fault::Stalled { outstanding: 3 }]);
    assert_eq!(bench.send(to, 0, &[1], 1), Sent::Elsewhere, "by socket from now on");
    bench.lane.watch(now + 2 * STALL_TIMEOUT);
    assert_eq!(bench.mailbox.take_faults(), [], "said once");
    // The port's thread takes the socket back.
    bench.mailbox.post(Vec::new());
    let mut again = Vec::new();
    bench.lane.pick_up(|frame| {
        let (endpoint, tos, payload) = millrace_dataplane::io::frame::reread(frame).unwrap();
        assert_eq!((endpoint.remote, tos, payload.len()), (to, 2, 50));
        again.push(payload[0]);
    });
    assert_eq!(again, [0, 1, 2], "in order");
    assert_eq!(bench.lane.sockets().count(), 0);
}

#[test]
fn next_hops_follow_the_kernel_and_are_forgotten() {
    let mut bench = Bench::new();
    let to: SocketAddr = "198.51.100.1:7".parse().unwrap();
    let endpoint = Endpoint { remote: to, local: None, ifindex: 0 };
    bench.send(to, 0, &[1], 1);
    bench.resolve(to);
    let before = bench.hops.lookup(&endpoint).unwrap();
    // The router gets another hardware address.
    bench.near.ip(["neigh replace 192.0.2.2 lladdr 02:00:00:00:00:09 dev veth0"]).unwrap();
    bench.hops.refresh(&bench.netlink, bench.from(), false).unwrap();
    assert_ne!(bench.hops.lookup(&endpoint).unwrap().template, before.template);
    // The route goes.
    bench.near.ip(["route del 198.51.100.0/24"]).unwrap();
    bench.hops.refresh(&bench.netlink, bench.from(), false).unwrap();
    assert!(bench.hops.lookup(&endpoint).is_none());
    bench.near.ip(["route add 198.51.100.0/24 via 192.0.2.2"]).unwrap();
    bench.hops.refresh(&bench.netlink, bench.from(), false).unwrap();
    assert!(bench.hops.lookup(&endpoint).is_some());
    // Nobody uses it for two rounds.
    bench.hops.refresh(&bench.netlink, bench.from(), true).unwrap();
    bench.hops.refresh(&bench.netlink, bench.from(), true).unwrap();
    assert!(bench.hops.lookup(&endpoint).is_none(), "forgotten, and asked for again");
}
