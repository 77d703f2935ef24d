//! The behaviours that the Linux kernel's own WireGuard self-test (`netns.sh`) checks, in its
//! order, with our device on both sides. What other tests do already is not repeated here: every
//! length, roaming, restart, keepalive (interop.rs), reload and bad input (service.rs).
//!
//! ```text
//!  host a ── gateway a (millrace) ── router ── gateway b (millrace) ── host b
//! ```
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use common::{CONNECT, World, drop_count};
use millrace_lab::iperf::{Iperf, IperfReport};
use millrace_lab::keys::{KeyPair, random_key};
use millrace_lab::ping::Ping;
use millrace_lab::probe::Sequence;
use millrace_lab::tunnel::connect;
use millrace_lab::{
    Daemon, Gateway, GatewayOptions, Implementation, Lab, Namespace, Peer, Side, SiteOptions,
    TunnelOptions, wait_for,
};

const LIMIT: Duration = Duration::from_secs(10);

/// Between two initiations to one peer (WireGuard paper, section 6.1).
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);

/// What one run of iperf3 moves: bounded, so that the capture of the outside links misses nothing,
/// and several times what sockets hold.
const BYTES: u64 = 32 << 20;

fn world_with(options: &TunnelOptions) -> World {
    let world = World::new([Implementation::Millrace; 2], options);
    world.connect();
    world
}

fn world() -> World {
    world_with(&TunnelOptions::default())
}

fn wg(gateway: &Gateway, words: &str) -> String {
    let line = format!("wg {}", words.replace("IFACE", gateway.interface()));
    gateway.namespace().exec(&line).unwrap()
}

fn ip(gateway: &Gateway, words: &str) {
    gateway.namespace().ip([words.replace("IFACE", gateway.interface())]).unwrap();
}

/// Loads nftables rules; the closing brackets may stand on one line here.
fn nft(namespace: &Namespace, rules: &str) {
    namespace.exec_with_input("nft -f -", &rules.replace('}', "\n}\n")).unwrap();
}

/// Whether one ping is answered, with a short wait.
fn answers(from: &Side, to: &Side) -> bool {
    let line = format!("ping -c1 -W1 -n {}", to.host_v4);
    from.host.exec(&line).is_ok()
}

fn wait_for_answers(from: &Side, to: &Side, what: &str) {
    wait_for(what, CONNECT, || answers(from, to).then_some(())).unwrap();
}

fn tcp(world: &World, from: &Side, to: &Side, streams: u32) {
    let iperf = Iperf { streams, bytes: Some(BYTES), ..Iperf::default() };
    let report = iperf.run(world.lab.directory(), &to.host, to.host_v4, &from.host).unwrap();
    assert_moved(&report);
}

/// The receiver's count ends with the sender: what then is on its way is not in it.
fn assert_moved(report: &IperfReport) {
    assert!(report.bytes > BYTES / 4, "{report:?}");
}

#[test]
fn both_sides_count_the_same_bytes() {
    let world = world();
    let (a, b) = (&world.tunnel.a, &world.tunnel.b);
    // A handshake's messages are counted as well, so equality is all or nothing.
    let equal = || {
        let [a, b] = [a, b].map(|gateway| gateway.peer().unwrap());
        let equal = a.sent_bytes == b.received_bytes && b.sent_bytes == a.received_bytes;
        equal.then_some([a.sent_bytes, b.sent_bytes])
    };
    let before = wait_for("equal counters", LIMIT, equal).unwrap();
    let [v4, v6] = world.ping(&world.site.a, &world.site.b, 10);
    // Pings of 56 bytes: 84 and 104 bytes inside, padded, and 32 around.
    let pings = v4 * (96 + 32) + v6 * (112 + 32);
    // The last of them may still be on its way.
    let all = || equal().filter(|after| after[0] >= before[0] + pings);
    let after = wait_for("equal counters again", LIMIT, all).unwrap();
    assert_eq!([after[0] - before[0], after[1] - before[1]], [pings; 2]);
    world.finish();
}

#[test]
fn fifty_parallel_streams_over_either_family() {
    for outer_v6 in [false, true] {
        let world = world_with(&TunnelOptions { outer_v6, ..TunnelOptions::default() });
        let (a, b) = (&world.site.a, &world.site.b);
        fifty_streams(&world, a, b);
        fifty_streams(&world, b, a);
        world.finish();
    }
}

/// Fifty TCP connections at once, each to its orderly end, with every byte compared. (iperf3 counts
/// the sum only, so that a stream could stand still unseen.)
fn fifty_streams(world: &World, from: &Side, to: &Side) {
    let bytes = world.watch.marker().fill(1 << 20);
    let listener = to.host.run(|| TcpListener::bind((to.host_v4, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                let mut received = Vec::new();
                stream.read_to_end(&mut received).unwrap();
                assert!(received == bytes, "{} bytes came, changed", received.len());
            });
            scope.spawn(|| {
                from.host.run(|| {
                    let mut stream = TcpStream::connect_timeout(&address, LIMIT).unwrap();
                    stream.set_write_timeout(Some(LIMIT)).unwrap();
                    stream.write_all(&bytes).unwrap();
                });
            });
        }
    });
}

#[test]
fn a_huge_mtu_carries_huge_packets() {
    for outer_v6 in [false, true] {
        let site = SiteOptions { wan_mtu: 65_535, lan_mtu: 65_535 };
        let options = TunnelOptions { mtu: 65_455, outer_v6, ..TunnelOptions::default() };
        let world = World::on(&site, [Implementation::Millrace; 2], &options);
        world.connect();
        let (a, b) = (&world.site.a, &world.site.b);
        for size in [1400, 9000, 30_000, 65_400] {
            for to in [IpAddr::from(b.host_v4), b.host_v6.into()] {
                let marker = Some(world.watch.marker());
                let ping = Ping { count: 3, size, dont_fragment: true, marker, ..Ping::default() };
                let report = ping.run(&a.host, to).unwrap();
                assert!(report.complete(), "{size} bytes to {to}: {report:?}");
            }
        }
        tcp(&world, a, b, 1);
        tcp(&world, b, a, 4);
        world.finish();
    }
}

/// A route's MTU below the interface's: senders learn it, and what is sealed stays within it.
#[test]
fn a_route_mtu_is_kept() {
    let world = world();
    let (a, b) = (&world.site.a, &world.site.b);
    let prefix = "10.2.0.0/24";
    ip(&world.tunnel.a, &format!("route change {prefix} dev IFACE mtu 1299"));
    // Longer ones are refused by the gateway, which says the MTU.
    let line = format!("ping -c1 -W2 -M do -s 1272 {}", b.host_v4);
    let refused = a.host.exec(&line).unwrap_err().to_string();
    assert!(refused.contains("mtu = 1299") || refused.contains("mtu=1299"), "{refused}");
    for size in 1250..=1271 {
        a.host.exec(&format!("ping -c1 -W10 -M do -s {size} {}", b.host_v4)).unwrap();
    }
    tcp(&world, a, b, 2);
    world.finish();
}

#[test]
fn a_source_outside_the_allowed_ips_is_dropped_and_a_prefix_moves_at_once() {
    let world = world();
    let (a, b) = (&world.tunnel.a, &world.tunnel.b);
    world.site.a.host.ip(["addr add 10.1.7.7/32 dev lan"]).unwrap();
    world.site.a.gateway.ip(["route add 10.1.7.7/32 dev lan"]).unwrap();
    let before = drop_count(b, "rx_source_not_allowed");
    let line = format!("ping -c2 -i0.2 -W1 -I 10.1.7.7 {}", world.site.b.host_v4);
    assert!(world.site.a.host.exec(&line).is_err(), "answered from a foreign source");
    assert_eq!(drop_count(b, "rx_source_not_allowed") - before, 2);
    // The prefix of A's host goes to a stranger and comes back.
    let (key, stranger) = (b.peer().unwrap().public_key, random_key().unwrap());
    b.set(&format!("peer {stranger} allowed-ips 10.1.0.0/24")).unwrap();
    assert!(!answers(&world.site.a, &world.site.b), "the prefix is the stranger's now");
    assert!(drop_count(b, "rx_source_not_allowed") - before >= 3);
    let allowed = world.site.a.allowed_ips().join(",");
    b.set(&format!("peer {key} allowed-ips {allowed}")).unwrap();
    wait_for_answers(&world.site.a, &world.site.b, "the prefix to come back");
    assert_eq!(a.peers().unwrap().len(), 1);
    world.finish();
}

#[test]
fn a_new_private_key_ends_the_old_sessions_and_shakes_hands_at_once() {
    let world = world();
    let (a, b) = (&world.tunnel.a, &world.tunnel.b);
    let old = b.peer().unwrap();
    let pair = KeyPair::generate().unwrap();
    let set_key = |key: &str| {
        let line = format!("wg set {} private-key /dev/stdin", a.interface());
        a.namespace().exec_with_input(&line, key).unwrap();
    };
    set_key(&pair.private);
    assert!(!answers(&world.site.a, &world.site.b), "B does not know the new key");
    let unknown = drop_count(a, "rx_unknown_index");
    assert!(!answers(&world.site.b, &world.site.a), "A forgot the session that B still has");
    assert!(drop_count(a, "rx_unknown_index") > unknown);
    let psk = world.lab.directory().join("psk");
    fs::write(&psk, wg(a, "show IFACE preshared-keys").split_whitespace().nth(1).unwrap()).unwrap();
    b.set(&format!("peer {} remove", old.public_key)).unwrap();
    b.set(&format!(
        "peer {} preshared-key {} endpoint {} allowed-ips {}",
        pair.public,
        psk.display(),
        old.endpoint.unwrap(),
        old.allowed_ips.join(",")
    ))
    .unwrap();
    wait_for_answers(&world.site.b, &world.site.a, "a session with the new key");
    // A peer with our own key vanishes.
    let own = KeyPair::generate().unwrap();
    a.set(&format!("peer {} allowed-ips 10.9.0.0/16", own.public)).unwrap();
    assert_eq!(a.peers().unwrap().len(), 2);
    set_key(&own.private);
    assert_eq!(a.peers().unwrap().len(), 1);
    set_key(&pair.private);
    // B still has a session that A forgot, so it is A that must begin; and not five seconds after its
    // last try, as it would with the same key.
    let started = Instant::now();
    wait_for_answers(&world.site.a, &world.site.b, "a session after the key came back");
    assert!(started.elapsed() < REKEY_TIMEOUT, "{:?}", started.elapsed());
    world.finish();
}

/// A second tunnel whose outer packets go through the first.
#[test]
fn a_tunnel_in_a_tunnel() {
    let world = world();
    let sides = [&world.site.a, &world.site.b];
    let keys = [KeyPair::generate().unwrap(), KeyPair::generate().unwrap()];
    let inner: Vec<Gateway> = (0..2)
        .map(|i| {
            let far = sides[1 - i];
            let peer = Peer {
                public_key: keys[1 - i].public.clone(),
                endpoint: Some((far.tunnel_v4, 51_821).into()),
                allowed_ips: vec![format!("10.78.0.{}/32", 2 - i)],
                ..Peer::default()
            };
            let options = GatewayOptions {
                private_key: keys[i].private.clone(),
                listen_port: 51_821,
                addresses: vec![format!("10.78.0.{}/24", i + 1)],
                mtu: 1340,
                peers: vec![peer],
                ..GatewayOptions::default()
            };
            Gateway::start(&world.lab, &sides[i].gateway, options).unwrap()
        })
        .collect();
    wait_for("a ping through both", CONNECT, || {
        sides[0].gateway.exec("ping -c1 -W1 10.78.0.2").ok()
    })
    .unwrap();
    for (server, client, to) in [(1, 0, "10.78.0.2"), (0, 1, "10.78.0.1")] {
        let iperf = Iperf { bytes: Some(BYTES), ..Iperf::default() };
        let to: Ipv4Addr = to.parse().unwrap();
        let directory = world.lab.directory();
        let report =
            iperf.run(directory, &sides[server].gateway, to, &sides[client].gateway).unwrap();
        assert_moved(&report);
    }
    drop(inner);
    world.finish();
}

/// The peer's endpoint is routed into its own tunnel: nothing runs away, and it heals.
#[test]
fn a_routing_loop_does_not_run_away() {
    let mut world = world();
    let endpoint = world.site.b.wan_v4;
    let before = world.tunnel.a.peer().unwrap().sent_bytes;
    let allowed = format!("{},{endpoint}/32", world.site.b.allowed_ips().join(","));
    let key = world.tunnel.a.peer().unwrap().public_key;
    world.tunnel.a.set(&format!("peer {key} allowed-ips {allowed}")).unwrap();
    ip(&world.tunnel.a, &format!("route add {endpoint}/32 dev IFACE"));
    let cpu_before = world.tunnel.a.daemon().cpu_time();
    let line = format!("ping -c5 -i0.2 -W1 {}", world.site.b.host_v4);
    assert!(world.site.a.host.exec(&line).is_err(), "nothing can get through");
    let looped = Instant::now();
    // Time itself is the subject here: what circulates keeps circulating.
    thread::sleep(Duration::from_secs(2));
    let sent = world.tunnel.a.peer().unwrap().sent_bytes - before;
    let cpu = world.tunnel.a.daemon().cpu_time() - cpu_before;
    assert!(sent < 1_000_000, "{sent} bytes in {:?}", looped.elapsed());
    assert!(cpu < Duration::from_millis(500), "{cpu:?} of CPU time");
    ip(&world.tunnel.a, &format!("route del {endpoint}/32 dev IFACE"));
    wait_for_answers(&world.site.a, &world.site.b, "the tunnel to heal");
    world.finish();
}

/// A sits behind a NAT that forgets after two seconds: keepalives hold the way in open.
#[test]
fn keepalives_keep_a_nat_open() {
    let through = |keepalive: bool| {
        let options = TunnelOptions {
            keepalive_s: [keepalive.then_some(1), None],
            knows_endpoint: [true, false],
            ..TunnelOptions::default()
        };
        let world = World::new([Implementation::Millrace; 2], &options);
        let router = &world.site.router;
        let rules = format!(
            "table ip nat {{ chain post {{ type nat hook postrouting priority srcnat
               ip saddr {} oifname wan-b masquerade random; }} }}
             table ip filter {{ chain forward {{ type filter hook forward priority 0
               iifname wan-b ct state new drop; }} }}",
            world.site.a.wan_v4
        );
        nft(router, &rules);
        for timeout in ["timeout", "timeout_stream"] {
            router.sysctl(&format!("net/netfilter/nf_conntrack_udp_{timeout}"), "2").unwrap();
        }
        world.connect();
        // The NAT's memory is what is tested: it must have time to forget.
        thread::sleep(Duration::from_secs(5));
        assert_eq!(answers(&world.site.b, &world.site.a), keepalive, "keepalive: {keepalive}");
        world.finish();
    };
    thread::scope(|scope| {
        let without = scope.spawn(|| through(false));
        through(true);
        without.join().unwrap();
    });
}

#[test]
fn the_mark_is_on_what_leaves_and_changes_at_run_time() {
    let world = world();
    let (a, gateway) = (&world.tunnel.a, &world.site.a.gateway);
    nft(
        gateway,
        "table inet lab { chain out { type filter hook output priority 0
               udp sport 51820 meta mark 0x6d6c counter comment \"marked\"
               udp sport 51820 meta mark 0x77 counter comment \"other\"
               udp sport 51820 meta mark 0 counter comment \"plain\"; } }",
    );
    let counted = |comment: &str| -> u64 {
        let rules = gateway.exec("nft list chain inet lab out").unwrap();
        let line = rules.lines().find(|line| line.contains(comment)).unwrap();
        line.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    world.ping(&world.site.a, &world.site.b, 2);
    assert!(counted("plain") >= 4 && counted("marked") == 0);
    a.set("fwmark 0x6d6c").unwrap();
    let plain = counted("plain");
    for place in ["all", "wan"] {
        // Else the rule below would also judge where answers may come from.
        gateway.sysctl(&format!("net/ipv4/conf/{place}/rp_filter"), "0").unwrap();
    }
    // A rule that only the mark escapes, as for a default route into the tunnel.
    gateway
        .ip([
            "route add blackhole default table 77",
            "rule add to 198.51.100.2 lookup 77 pref 200",
            "rule add fwmark 0x6d6c lookup main pref 100",
        ])
        .unwrap();
    world.ping(&world.site.a, &world.site.b, 2);
    assert!(counted("marked") >= 4, "{}", counted("marked"));
    assert_eq!(counted("plain"), plain, "some packets left without the mark");
    a.set("fwmark 0x77").unwrap();
    assert!(!answers(&world.site.a, &world.site.b), "that mark does not escape");
    a.set("fwmark 0x6d6c").unwrap();
    wait_for_answers(&world.site.a, &world.site.b, "the first mark again");
    world.finish();
}

/// B's gateway has two addresses and answers from the one it was spoken to, until that is gone.
#[test]
fn the_source_sticks_to_the_address_spoken_to() {
    for (outer_v6, second) in [(false, "198.51.100.77"), (true, "2001:db8:2::77")] {
        let world = world_with(&TunnelOptions { outer_v6, ..TunnelOptions::default() });
        let (a, b) = (&world.tunnel.a, &world.site.b);
        let key = a.peer().unwrap().public_key;
        let first = a.peer().unwrap().endpoint.unwrap();
        let second = SocketAddr::new(second.parse().unwrap(), first.port());
        let address = format!("{}/{}", second.ip(), if outer_v6 { 64 } else { 24 });
        b.gateway.ip([format!("addr add {address} dev wan")]).unwrap();
        a.set(&format!("peer {key} endpoint {second}")).unwrap();
        world.ping(&world.site.a, b, 2);
        // A would have roamed back if B answered from its first address.
        assert_eq!(a.peer().unwrap().endpoint, Some(second));
        world.ping(b, &world.site.a, 2);
        assert_eq!(a.peer().unwrap().endpoint, Some(second), "B's own packets, too");
        b.gateway.ip([format!("addr del {address} dev wan")]).unwrap();
        wait_for_answers(b, &world.site.a, "B to go on from its other address");
        assert_eq!(a.peer().unwrap().endpoint, Some(first));
        world.finish();
    }
}

/// Packets that a device of `namespace` has sent so far.
fn packets_sent(namespace: &Namespace, device: &str) -> u64 {
    let shown = namespace.exec(&format!("ip -j -s link show dev {device}")).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    shown[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
}

/// The way to B moves to another link while a stream runs. What we send keeps the source that B
/// knows, so both ways carry it, and nothing is lost.
#[test]
fn the_route_to_the_peer_moves_under_traffic() {
    let world = world();
    let (a, router) = (&world.site.a.gateway, &world.site.router);
    millrace_lab::lab::link((a, "wan2"), (router, "wan2-a")).unwrap();
    a.ip(["addr add 203.0.113.2/24 dev wan2"]).unwrap();
    router.ip(["addr add 203.0.113.1/24 dev wan2-a"]).unwrap();
    // The kernel's queue for a neighbour that it still looks for is short.
    a.exec("ping -c1 -W5 203.0.113.1").unwrap();
    let (from, to) = (&world.site.a.host, &world.site.b.host);
    let (address, marker) = ((world.site.b.host_v4, 7000).into(), world.watch.marker());
    let interval = Duration::from_micros(500);
    let stream = Sequence::start(from, to, address, interval, 1200, marker).unwrap();
    let first = world.site.a.router_v4.to_string();
    for (via, device) in [("203.0.113.1", "wan2"), (&first, "wan"), ("203.0.113.1", "wan2")] {
        a.ip([format!("route replace 198.51.100.2/32 via {via}")]).unwrap();
        let before = packets_sent(a, device);
        let moved = || (packets_sent(a, device) > before + 500).then_some(());
        wait_for(format!("the stream to leave by {device}"), LIMIT, moved).unwrap();
    }
    let report = stream.finish();
    assert!(report.received > 1500 && report.lost + report.damaged == 0, "{report:?}");
    world.ping(&world.site.a, &world.site.b, 3);
    world.finish();
}

/// A thousand peers, one with thousands of prefixes, go in and come out again, while a stream of
/// an unchanged peer runs on.
#[test]
fn huge_configurations_round_trip_under_traffic() {
    let world = world();
    let (a, to) = (&world.tunnel.a, &world.site.b);
    let handshake = a.peer().unwrap().last_handshake_s;
    let small = wg(a, "showconf IFACE");
    let mut huge = small.clone();
    for peer in 0..1000 {
        let nets: Vec<String> = match peer {
            0 => (0..5000).map(|n| format!("100.64.{}.{}/32", n / 256, n % 256)).collect(),
            _ => (0..5).map(|n| format!("172.{}.{}.{n}/32", 16 + peer / 250, peer % 250)).collect(),
        };
        let (key, nets) = (random_key().unwrap(), nets.join(", "));
        writeln!(huge, "\n[Peer]\nPublicKey = {key}\nAllowedIPs = {nets}").unwrap();
    }
    let apply = |verb: &str, text: &str| {
        let line = format!("wg {verb} {} /dev/stdin", a.interface());
        a.namespace().exec_with_input(&line, text).unwrap();
    };
    let (interval, marker) = (Duration::from_millis(2), world.watch.marker());
    let address = (to.host_v4, 7000).into();
    let stream =
        Sequence::start(&world.site.a.host, &to.host, address, interval, 500, marker).unwrap();
    let started = Instant::now();
    // More than once: it is done before many packets have passed.
    for _ in 0..4 {
        apply("setconf", &huge);
        let shown = wg(a, "showconf IFACE");
        assert!(shown.len() > 1 << 17, "more than any buffer of the socket: {}", shown.len());
        assert_eq!(a.peers().unwrap().len(), 1001);
        assert_eq!([shown.matches(" 172.").count(), shown.matches(" 100.").count()], [4995, 5000]);
        apply("syncconf", &shown);
        assert_eq!(wg(a, "showconf IFACE"), shown);
        apply("setconf", &small);
        assert_eq!(wg(a, "showconf IFACE"), small);
    }
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    let report = stream.finish();
    assert!(report.received > 100 && report.lost + report.reordered == 0, "{report:?}");
    assert_eq!(a.peer().unwrap().last_handshake_s, handshake, "the session lived through it");
    world.finish();
}

/// The seven points of small order: no packet ever goes to such a peer.
#[test]
fn low_order_keys_get_no_packet() {
    const POINTS: [&str; 7] = [
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
        "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
        "7P///////////////////////////////////////38=",
        "7f///////////////////////////////////////38=",
        "7v///////////////////////////////////////38=",
    ];
    let world = world();
    let a = &world.tunnel.a;
    world.site.a.gateway.ip(["addr add 203.0.113.1/24 dev wan"]).unwrap();
    nft(
        &world.site.a.gateway,
        "table inet lab { chain out { type filter hook output priority 0
               ip daddr 203.0.113.99 counter comment \"low order\"; } }",
    );
    for (n, point) in POINTS.iter().enumerate() {
        // Refused or silent: both are right.
        let _ = a.set(&format!(
            "peer {point} endpoint 203.0.113.99:{} allowed-ips 10.9.{n}.0/24 persistent-keepalive 1",
            1000 + n
        ));
        ip(a, &format!("route replace 10.9.{n}.0/24 dev IFACE"));
    }
    thread::scope(|scope| {
        for n in 0..POINTS.len() {
            let host = &world.site.a.host;
            scope.spawn(move || host.exec(&format!("ping -c1 -W1 10.9.{n}.1")).unwrap_err());
        }
    });
    let rules = world.site.a.gateway.exec("nft list chain inet lab out").unwrap();
    assert!(rules.contains("packets 0 bytes 0"), "{rules}");
    world.ping(&world.site.a, &world.site.b, 2);
    world.finish();
}

/// Started and ended again and again under traffic, and at last with its interface taken away:
/// nothing stays behind.
#[test]
fn devices_come_and_go_under_traffic() {
    let mut world = world();
    // What an operator sets who wants the prefix to be unreachable rather than in the clear.
    for gateway in [&world.site.a.gateway, &world.site.b.gateway] {
        gateway.ip(["route add blackhole 10.0.0.0/8 metric 9999"]).unwrap();
    }
    let traffic = flood(&world, &world.site.a.host, world.site.b.host_v4);
    for _ in 0..10 {
        world.tunnel.a.restart().unwrap();
    }
    wait_for_answers(&world.site.a, &world.site.b, "an answer after the tenth restart");
    let name = world.tunnel.a.interface().to_owned();
    assert_eq!(processes_with(&name), 1, "of eleven that were started");
    ip(&world.tunnel.a, "link del IFACE");
    let ended = wait_for("the daemon to end", LIMIT, || world.tunnel.a.daemon().ended()).unwrap();
    assert_eq!(ended.code(), Some(1), "{}", world.tunnel.a.daemon().log_tail());
    let log = world.tunnel.a.daemon().log();
    assert!(log.contains("is gone") && log.contains("start again"), "{log}");
    drop(traffic);
    let links = world.site.a.gateway.exec("ip -o link").unwrap();
    assert!(!links.contains(&name), "{links}");
    assert_eq!(processes_with(&name), 0);
    world.finish();
}

/// A namespace ends with the device in it, under traffic: the kernel frees it, so nothing of ours
/// holds it any more.
#[test]
fn a_namespace_ends_with_its_device() {
    let lab = Lab::new().unwrap();
    let (home, other) = (lab.namespace("home").unwrap(), lab.namespace("other").unwrap());
    millrace_lab::lab::link((&home, "wan"), (&other, "witness")).unwrap();
    home.ip(["addr add 192.0.2.1/24 dev wan"]).unwrap();
    let options = GatewayOptions {
        private_key: KeyPair::generate().unwrap().private,
        addresses: vec!["10.77.0.1/24".into()],
        peers: vec![Peer {
            public_key: random_key().unwrap(),
            endpoint: Some((Ipv4Addr::new(192, 0, 2, 2), 51_820).into()),
            allowed_ips: vec!["10.77.0.0/24".into()],
            ..Peer::default()
        }],
        ..GatewayOptions::default()
    };
    let device = Gateway::start(&lab, &home, options).unwrap();
    let name = device.interface().to_owned();
    let mut command = home.command("ping");
    command.args(["-q", "-i0.002", "10.77.0.2"]);
    let traffic = Daemon::start(lab.directory(), "flood", command).unwrap();
    let sent = || (device.peer().unwrap().sent_bytes > 0).then_some(());
    wait_for("initiations to leave", LIMIT, sent).unwrap();
    other.exec("ip link show witness").unwrap();
    drop((device, traffic, home));
    let gone = || other.exec("ip link show witness").is_err().then_some(());
    wait_for("the namespace to be freed", LIMIT, gone).unwrap();
    assert_eq!(processes_with(&name), 0);
}

/// Pings without end, five hundred a second.
fn flood(world: &World, from: &Namespace, to: Ipv4Addr) -> Daemon {
    let mut command = from.command("ping");
    command.args(["-q", "-i0.002", "-p", &world.watch.marker().hex(), &to.to_string()]);
    Daemon::start(world.lab.directory(), "flood", command).unwrap()
}

/// Running data planes whose command line holds `text`; a zombie has none.
fn processes_with(text: &str) -> usize {
    let lines = fs::read_dir("/proc").unwrap().flatten();
    let lines = lines.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| line.contains("millrace-dataplane\0") && line.contains(text)).count()
}

/// The sender of a packet without a peer hears "host unreachable", from an address it expects.
#[test]
fn the_sender_hears_that_there_is_no_peer() {
    let world = world();
    let a = &world.tunnel.a;
    ip(a, "route add 10.9.0.0/16 dev IFACE");
    ip(a, "route add fd09::/64 dev IFACE");
    let host = &world.site.a.host;
    let heard = |target: &str| {
        let error = host.exec(&format!("ping -n -c2 -i0.2 -W1 {target}")).unwrap_err();
        error.to_string()
    };
    let v4 = heard("10.9.9.9");
    assert!(v4.contains("From 10.1.0.1") && v4.contains("Destination Host Unreachable"), "{v4}");
    let v6 = heard("fd09::9");
    assert!(v6.contains("Destination unreachable: Address unreachable"), "{v6}");
    assert!(drop_count(a, "tx_no_route") >= 4);
    // A peer without a known address: the same.
    a.set(&format!("peer {} allowed-ips 10.9.0.0/16", random_key().unwrap())).unwrap();
    let v4 = heard("10.9.9.9");
    assert!(v4.contains("Destination Host Unreachable"), "{v4}");
    assert!(drop_count(a, "tx_no_endpoint") >= 2);
    // A flood is answered within the limit.
    let flood = host.exec("ping -n -q -c500 -i0.002 -W1 10.9.9.9").unwrap_err().to_string();
    let errors: u32 = flood.split('+').nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((20..450).contains(&errors), "{flood}");
    connect(&world.site.a, &world.site.b, CONNECT).unwrap();
    world.finish();
}
