//! What is thrown away must be in `status`, by name and to the packet: what is malformed, and what
//! the kernel drops before we see it. For the latter each test stops the data plane (SIGSTOP), as an
//! overloaded machine does, and sends more than any buffer holds; then every packet sent is either
//! received or counted.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use common::{World, drop_count, fact, subject};
use millrace_lab::gateway::own_program;
use millrace_lab::{Gateway, Implementation, Side, TunnelOptions, wait_for};

const LIMIT: Duration = Duration::from_secs(15);
const PORT: u16 = 51820;

/// A data message of an index that nobody has.
fn stray() -> Vec<u8> {
    let mut payload = vec![0x5a; 96];
    payload[..8].copy_from_slice(&[4, 0, 0, 0, 1, 2, 3, 4]);
    payload
}

/// Sends `count` datagrams from one LAN host to the other, where nobody listens.
fn flood(from: &Side, to: &Side, count: u64) {
    let socket = from.host.run(|| UdpSocket::bind((IpAddr::from(from.host_v4), 0)).unwrap());
    for _ in 0..count {
        // An error is the ICMP answer to an earlier one; it was not sent then.
        while socket.send_to(&[7; 100], (to.host_v4, 9)).is_err() {}
    }
}

#[test]
fn each_malformed_datagram_is_counted_by_its_name() {
    let world = World::new([subject(), Implementation::WireguardGo], &TunnelOptions::default());
    let (a, address) = (&world.tunnel.a, world.site.a.wan_v4);
    let socket = world.site.router.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let message = |kind: u8, len: usize| {
        let mut bytes = vec![0x5a; len];
        bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
        bytes
    };
    let mut reserved = message(4, 96);
    reserved[3] = 1;
    let mut cases = vec![
        (vec![], "rx_truncated"),
        (vec![1], "rx_truncated"),
        (message(0, 100), "rx_unknown_type"),
        (message(5, 100), "rx_unknown_type"),
        (reserved, "rx_unknown_type"),
        (message(1, 148), "hs_mac1_invalid"),
        (message(2, 92), "hs_mac1_invalid"),
        (message(3, 64), "hs_unexpected"),
        (message(4, 32), "rx_unknown_index"),
        (stray(), "rx_unknown_index"),
    ];
    // Too short and too long for its type; data is whole blocks of 16 bytes.
    for (kind, len) in [(1, 147), (1, 149), (2, 91), (2, 93), (3, 63), (3, 65), (4, 16), (4, 31)] {
        cases.push((message(kind, len), "rx_truncated"));
    }
    // What the gateway sends on its own account counts elsewhere: a kernel that forwards IPv6 reports
    // into a new device that it is one of all routers (ff02::2), twice within a second.
    let counts = || {
        let lines = common::facts(a, "drop");
        lines.into_iter().filter(|line| !line.starts_with("tx_no_route ")).collect::<Vec<_>>()
    };
    let mut expected = counts();
    for (payload, name) in &cases {
        let count = drop_count(a, name);
        socket.send_to(payload, (address, PORT)).unwrap();
        let counted = || (drop_count(a, name) == count + 1).then_some(());
        let what = format!("{} bytes {:?} as {name}", payload.len(), payload.first());
        wait_for(what, LIMIT, counted).unwrap();
        // This reason, by one, and no other.
        let line = expected.iter_mut().find(|line| line.starts_with(&format!("{name} "))).unwrap();
        *line = format!("{name} {}", count + 1);
        assert_eq!(counts(), expected);
    }
    world.connect();
    world.finish();
}

#[test]
fn what_a_socket_had_no_room_for_is_counted() {
    let mut world = World::new([subject(), Implementation::WireguardGo], &TunnelOptions::default());
    let (address, router) = (world.site.a.wan_v4, world.site.router.clone());
    let sent = 40_000;
    world.tunnel.a.daemon().signal(libc::SIGSTOP);
    router.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..sent {
            socket.send_to(&stray(), (address, PORT)).unwrap();
        }
    });
    world.tunnel.a.daemon().signal(libc::SIGCONT);
    let gateway = &world.tunnel.a;
    let counts = || ["rx_socket_full", "rx_unknown_index"].map(|name| drop_count(gateway, name));
    let all = || (counts().iter().sum::<u64>() == sent).then_some(());
    wait_for("each packet to be received or counted", LIMIT, all)
        .unwrap_or_else(|error| panic!("{error}: {:?} of {sent}", counts()));
    assert!(counts().iter().all(|&count| count > 1000), "{:?}", counts());
    let [full, _] = counts();
    let text = status(gateway, "");
    let shown = |line: &str| {
        line.contains(&format!("{full}  rx_socket_full"))
            && line.ends_with("A UDP socket's receive buffer was full, or a checksum was wrong.")
    };
    assert!(text.lines().any(shown), "{text}");
    let json: serde_json::Value = serde_json::from_str(&status(gateway, "--json")).unwrap();
    let row = serde_json::json!({ "reason": "rx_socket_full", "packets": full });
    assert!(json["drops"].as_array().unwrap().contains(&row), "{json}");
}

#[test]
fn what_the_tun_device_had_no_room_for_is_counted() {
    let mut world = World::new([subject(), subject()], &TunnelOptions::default());
    world.connect();
    let before = received(&world);
    world.tunnel.a.daemon().signal(libc::SIGSTOP);
    let sent = 5000;
    flood(&world.site.a, &world.site.b, sent);
    world.tunnel.a.daemon().signal(libc::SIGCONT);
    let counts = || [received(&world) - before, drop_count(&world.tunnel.a, "tun_queue_full")];
    expect_sum(sent, || counts().iter().sum());
    assert!(counts().iter().all(|&count| count > 100), "{:?}", counts());
    world.finish();
}

/// Two devices of ours, A with AF_XDP.
fn world_with_rings() -> World {
    let toml = "[dataplane]\nreceive = \"xdp-copy\"\ndevice = [\"wan\"]\n".into();
    let options = TunnelOptions { toml, ..TunnelOptions::default() };
    let world = World::new([subject(), subject()], &options);
    let runs = || (fact(&world.tunnel.a, "receive")? == "xdp-copy").then_some(());
    wait_for("AF_XDP", LIMIT, runs).unwrap();
    world.connect();
    world
}

#[test]
fn what_an_af_xdp_ring_had_no_room_for_is_counted() {
    let mut world = world_with_rings();
    let before = frames(&world);
    world.tunnel.a.daemon().signal(libc::SIGSTOP);
    let sent = 8000;
    flood(&world.site.b, &world.site.a, sent);
    world.tunnel.a.daemon().signal(libc::SIGCONT);
    let sum = || {
        let at_b = drop_count(&world.tunnel.b, "tun_queue_full");
        let full = drop_count(&world.tunnel.a, "xdp_ring_full");
        assert!(full > 0 || frames(&world) < before + sent, "no ring holds so much");
        frames(&world) - before + full + drop_count(&world.tunnel.a, "xdp_redirect_failed") + at_b
    };
    expect_sum(sent, sum);
    world.finish();
}

#[test]
fn what_waits_in_a_ring_is_received_before_it_is_given_up() {
    let mut world = world_with_rings();
    let before = frames(&world);
    world.tunnel.a.daemon().signal(libc::SIGSTOP);
    let sent = 1500;
    flood(&world.site.b, &world.site.a, sent);
    let at_b = || drop_count(&world.tunnel.b, "tun_queue_full");
    let b_sent = || fact(&world.tunnel.b, "tx_packets").unwrap().parse::<u64>().unwrap();
    wait_for("B to send all", LIMIT, || (b_sent() + at_b() >= sent).then_some(())).unwrap();
    // When A wakes, the link is down, and its sockets are taken away while the ring is full.
    world.site.a.gateway.ip(["link set wan down"]).unwrap();
    world.tunnel.a.daemon().signal(libc::SIGCONT);
    let given_up = || (fact(&world.tunnel.a, "receive")? == "socket").then_some(());
    wait_for("the ring to be given up", LIMIT, given_up).unwrap();
    expect_sum(sent, || frames(&world) - before + at_b());
    assert_eq!(drop_count(&world.tunnel.a, "xdp_ring_closed"), 0);
}

/// Waits until the sum is what was sent, and some keepalives.
fn expect_sum(sent: u64, sum: impl Fn() -> u64) {
    wait_for("each packet to be received or counted", LIMIT, || (sum() >= sent).then_some(()))
        .unwrap_or_else(|error| panic!("{error}: {} of {sent}", sum()));
    assert!(sum() <= sent + 5, "{} of {sent}", sum());
}

/// Data messages that B has had.
fn received(world: &World) -> u64 {
    fact(&world.tunnel.b, "rx_packets").unwrap().parse().unwrap()
}

/// Frames that came to A through AF_XDP.
fn frames(world: &World) -> u64 {
    let text = fact(&world.tunnel.a, "xdp_frames").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// What `millrace status` says.
fn status(gateway: &Gateway, options: &str) -> String {
    let program = own_program("millrace").unwrap();
    let line = format!("{} status {} {options}", program.display(), gateway.interface());
    gateway.namespace().exec(&line).unwrap()
}
