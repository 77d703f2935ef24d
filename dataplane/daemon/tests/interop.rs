//! Our device with those that nobody here wrote, in namespaces:
//!
//! ```text
//!  host a ── gateway a ══ router ══ gateway b ── host b
//! ```
//! For each: both roles, PSK, IPv4 and IPv6 outside and inside, every length from 0 to 1500,
//! keepalive, roaming and restart of either side, and rekeying after two minutes under traffic.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use common::{CONNECT, World, subject};
use millrace_lab::{
    Gateway, Implementation, Namespace, Side, TunnelOptions,
    probe::{Sequence, SequenceReport},
    tunnel::{connect, endpoint},
    wait_for,
};

macro_rules! for_each_peer {
    ($($test:ident),+ $(,)?) => {
        mod wireguard_go { $(#[test] fn $test() { super::$test(super::Implementation::WireguardGo) })+ }
        mod boringtun { $(#[test] fn $test() { super::$test(super::Implementation::Boringtun) })+ }
        mod gotatun { $(#[test] fn $test() { super::$test(super::Implementation::Gotatun) })+ }
    };
}

for_each_peer!(
    every_length_over_ipv4,
    every_length_over_ipv6,
    no_preshared_key,
    keepalive_of_either_side,
    roaming_of_either_side,
    restart_of_either_side,
);

fn every_length_over_ipv4(peer: Implementation) {
    every_length(peer, false);
}

fn every_length_over_ipv6(peer: Implementation) {
    every_length(peer, true);
}

/// A is the initiator: B does not know where A is.
fn every_length(peer: Implementation, outer_v6: bool) {
    for pair in [[subject(), peer], [peer, subject()]] {
        let options =
            TunnelOptions { outer_v6, knows_endpoint: [true, false], ..TunnelOptions::default() };
        let world = World::new(pair, &options);
        world.connect();
        let (a, b) = (&world.site.a, &world.site.b);
        assert_eq!(world.tunnel.b.peer().unwrap().endpoint, Some(endpoint(a, outer_v6)));
        for inner_v6 in [false, true] {
            world.every_length(a, b, inner_v6);
            world.every_length(b, a, inner_v6);
        }
        world.finish();
    }
}

fn no_preshared_key(peer: Implementation) {
    let options = TunnelOptions { preshared_key: false, ..TunnelOptions::default() };
    let world = World::new([peer, subject()], &options);
    world.connect();
    world.ping(&world.site.b, &world.site.a, 5);
    world.finish();
}

/// The idle tunnel comes up by itself, and keepalives of the right length pass the router.
fn keepalive_of_either_side(peer: Implementation) {
    for pair in [[subject(), peer], [peer, subject()]] {
        let options = TunnelOptions {
            keepalive_s: [Some(1), None],
            knows_endpoint: [true, false],
            ..TunnelOptions::default()
        };
        let world = World::new(pair, &options);
        // 8 bytes of UDP header, 16 of WireGuard's, a tag of 16.
        let rules = format!(
            "table inet lab {{
               counter keepalives {{ }}
               chain routed {{
                 type filter hook forward priority 0
                 ip saddr {} udp length 40 counter name keepalives
               }}
             }}",
            world.site.a.wan_v4
        );
        world.site.router.exec_with_input("nft -f -", &rules).unwrap();
        wait_for("a handshake without traffic", CONNECT, || {
            (world.tunnel.b.peer().unwrap().last_handshake_s > 0).then_some(())
        })
        .unwrap();
        wait_for("four keepalives of one second", Duration::from_secs(8), || {
            let counter = world.site.router.exec("nft list counter inet lab keepalives").unwrap();
            let packets = counter.split("packets ").nth(1)?.split(' ').next()?.parse::<u32>();
            (packets.unwrap() >= 4).then_some(())
        })
        .unwrap();
        world.finish();
    }
}

fn roaming_of_either_side(peer: Implementation) {
    for pair in [[subject(), peer], [peer, subject()]] {
        let world = World::new(pair, &TunnelOptions { roams: true, ..TunnelOptions::default() });
        world.connect();
        let (a, b) = (&world.site.a, &world.site.b);
        move_and_check(a, b, &world.tunnel.b);
        world.ping(b, a, 5);
        move_and_check(b, a, &world.tunnel.a);
        world.ping(a, b, 5);
        world.finish();
    }
}

/// Gives the gateway of `moving` another address; as soon as it sends, the other side follows.
fn move_and_check(moving: &Side, other: &Side, other_device: &Gateway) {
    let [x, y, z, _] = moving.wan_v4.octets();
    let address = format!("{x}.{y}.{z}.99");
    moving
        .gateway
        .ip([
            format!("addr del {}/24 dev wan", moving.wan_v4),
            format!("addr add {address}/24 dev wan"),
            format!("route replace default via {}", moving.router_v4),
        ])
        .unwrap();
    connect(moving, other, CONNECT).unwrap();
    let seen = || other_device.peer().unwrap().endpoint.filter(|e| e.ip().to_string() == address);
    wait_for("the other side follows", Duration::from_secs(5), seen).unwrap();
}

fn restart_of_either_side(peer: Implementation) {
    let mut world = World::new([subject(), peer], &TunnelOptions::default());
    world.connect();
    // Who comes back has no session; its first packet makes one.
    world.tunnel.a.restart().unwrap();
    world.connect();
    world.ping_again(&world.site.b, &world.site.a);
    world.tunnel.b.restart().unwrap();
    connect(&world.site.b, &world.site.a, CONNECT).unwrap();
    world.ping_again(&world.site.a, &world.site.b);
    world.finish();
}

/// The one test that really waits: past REKEY_AFTER_TIME of 120 s under traffic in both directions,
/// with each peer, each side as the initiator, all at once.
#[test]
fn rekeying_after_two_minutes_loses_nothing() {
    let threads: Vec<_> = Implementation::PEERS
        .into_iter()
        .flat_map(|peer| [[subject(), peer], [peer, subject()]])
        .map(|pair| (pair, thread::spawn(move || rekey(pair))))
        .collect();
    let failed: Vec<_> = threads
        .into_iter()
        .filter_map(|(pair, thread)| {
            thread.join().is_err().then_some(pair.map(Implementation::name))
        })
        .collect();
    assert!(failed.is_empty(), "rekeying failed with {failed:?}");
}

fn rekey(pair: [Implementation; 2]) {
    let options = TunnelOptions { knows_endpoint: [true, false], ..TunnelOptions::default() };
    let world = World::new(pair, &options);
    world.connect();
    let first = world.tunnel.a.peer().unwrap().last_handshake_s;
    let (a, b) = (&world.site.a, &world.site.b);
    // A foreign peer has the system's small buffers, and loses there what comes while it is kept from
    // running for a second.
    let lost_by = |at: usize| {
        let gateway = &[a, b][at].gateway;
        if pair[at] == subject() { 0 } else { full_buffers(gateway).unwrap() }
    };
    let (ends, before) = ([1, 0], [0, 1].map(lost_by));
    let streams = [(a, b), (b, a)].map(|(from, to)| {
        let to_address = SocketAddr::new(IpAddr::from(to.host_v4), 7000);
        let every = Duration::from_millis(10);
        Sequence::start(&from.host, &to.host, to_address, every, 300, world.watch.marker()).unwrap()
    });
    let second = || (world.tunnel.a.peer().unwrap().last_handshake_s > first + 100).then_some(());
    wait_for("a second handshake", Duration::from_secs(140), second).unwrap();
    // Some traffic under the new keys.
    let (until, limit) = (Instant::now() + Duration::from_secs(3), Duration::from_secs(5));
    wait_for("traffic under the new keys", limit, || (Instant::now() > until).then_some(()))
        .unwrap();
    for (report, at) in streams.map(Sequence::finish).into_iter().zip(ends) {
        let SequenceReport { lost, reordered, duplicated, damaged, received, .. } = report;
        assert!(received > 10_000 / 2, "{pair:?}: {report:?}");
        let theirs = lost_by(at) - before[at];
        assert!(lost <= theirs, "{pair:?}: {report:?}; {theirs} lost to their full buffers");
        assert_eq!((reordered, duplicated, damaged), (0, 0, 0), "{pair:?}: {report:?}");
    }
    world.finish();
}

/// Datagrams that the kernel dropped in a namespace because a socket's buffer was full.
fn full_buffers(namespace: &Namespace) -> Option<u64> {
    let counters = namespace.exec("cat /proc/net/snmp").ok()?;
    let mut lines = counters.lines().filter(|line| line.starts_with("Udp:"));
    let place = lines.next()?.split_whitespace().position(|name| name == "RcvbufErrors")?;
    lines.next()?.split_whitespace().nth(place)?.parse().ok()
}
