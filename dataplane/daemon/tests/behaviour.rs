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
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{CONNECT, World, drop_count};
use millrace_lab::iperf::{Iperf, Udp};
use millrace_lab::keys::{KeyPair, random_key};
use millrace_lab::ping::Ping;
use millrace_lab::tunnel::connect;
use millrace_lab::{
    Gateway, GatewayOptions, Implementation, Namespace, Peer, Side, SiteOptions, TunnelOptions,
    wait_for,
};

const LIMIT: Duration = Duration::from_secs(10);

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
    // Bounded, so that the capture of the outside links misses nothing.
    let iperf = Iperf { streams, bytes: Some(8 << 20), ..Iperf::default() };
    let report = iperf.run(world.lab.directory(), &to.host, to.host_v4, &from.host).unwrap();
    // What the receiver had counted when the sender was done.
    assert!(report.bytes > 100_000, "{report:?}");
}

#[test]
fn both_sides_count_the_same_bytes() {
    let world = world();
    let (a, b) = (&world.tunnel.a, &world.tunnel.b);
    world.ping(&world.site.a, &world.site.b, 10);
    // A handshake's messages are counted as well, so equality is all or nothing.
    wait_for("equal counters", LIMIT, || {
        let (a, b) = (a.peer().unwrap(), b.peer().unwrap());
        (a.sent_bytes == b.received_bytes && b.sent_bytes == a.received_bytes).then_some(())
    })
    .unwrap();
    // Two families, ten pings of 56 bytes each: 84 and 104 bytes inside, padded, and 32 around.
    let least = 10 * (96 + 32) + 10 * (112 + 32);
    assert!(a.peer().unwrap().sent_bytes >= least, "{:?}", a.peer());
    world.finish();
}

#[test]
fn fifty_parallel_streams_over_either_family() {
    for outer_v6 in [false, true] {
        let world = world_with(&TunnelOptions { outer_v6, ..TunnelOptions::default() });
        let (a, b) = (&world.site.a, &world.site.b);
        tcp(&world, a, b, 50);
        tcp(&world, b, a, 50);
        world.finish();
    }
}

#[test]
fn a_huge_mtu_carries_huge_packets() {
    let site = SiteOptions { wan_mtu: 65_535, lan_mtu: 65_535 };
    let options = TunnelOptions { mtu: 65_455, ..TunnelOptions::default() };
    let world = World::on(&site, [Implementation::Millrace; 2], &options);
    world.connect();
    let (a, b) = (&world.site.a, &world.site.b);
    for size in [1400, 9000, 30_000, 65_400] {
        let line = format!("ping -c3 -i0.1 -W2 -M do -s {size} {}", b.host_v4);
        a.host.exec(&line).unwrap();
    }
    tcp(&world, a, b, 1);
    tcp(&world, b, a, 4);
    world.finish();
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
        a.host.exec(&format!("ping -c1 -W2 -M do -s {size} {}", b.host_v4)).unwrap();
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
    // B still has a session that A forgot, so it is A that must begin.
    wait_for_answers(&world.site.a, &world.site.b, "a session after the key came back");
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
        let iperf = Iperf { seconds: 1, ..Iperf::default() };
        let to: std::net::Ipv4Addr = to.parse().unwrap();
        let directory = world.lab.directory();
        let report =
            iperf.run(directory, &sides[server].gateway, to, &sides[client].gateway).unwrap();
        assert!(report.bytes > 100_000, "{report:?}");
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
    for keepalive in [true, false] {
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
    }
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
    a.set("fwmark 0x77").unwrap();
    assert!(!answers(&world.site.a, &world.site.b), "that mark does not escape");
    a.set("fwmark 0x6d6c").unwrap();
    wait_for_answers(&world.site.a, &world.site.b, "the first mark again");
    world.finish();
}

/// B's gateway has two addresses and answers from the one it was spoken to, until that is gone.
#[test]
fn the_source_sticks_to_the_address_spoken_to() {
    let world = world();
    let (a, b) = (&world.tunnel.a, &world.tunnel.b);
    let key = a.peer().unwrap().public_key;
    let second = "198.51.100.77";
    world.site.b.gateway.ip([format!("addr add {second}/24 dev wan")]).unwrap();
    a.set(&format!("peer {key} endpoint {second}:51820")).unwrap();
    world.ping(&world.site.a, &world.site.b, 2);
    // A would have roamed back if B answered from its first address.
    let remote = |gateway: &Gateway| gateway.peer().unwrap().endpoint.unwrap().ip().to_string();
    assert_eq!(remote(a), second);
    world.ping(&world.site.b, &world.site.a, 2);
    assert_eq!(remote(a), second, "B's own packets, too");
    world.site.b.gateway.ip([format!("addr del {second}/24 dev wan")]).unwrap();
    wait_for_answers(&world.site.b, &world.site.a, "B to go on from its other address");
    assert_eq!(remote(a), world.site.b.wan_v4.to_string());
    assert_eq!(b.peers().unwrap().len(), 1);
    world.finish();
}

/// The way to B moves to another link while a stream runs. What we send keeps the source that B
/// knows, so both ways carry it.
#[test]
fn the_route_to_the_peer_moves_under_traffic() {
    let world = world();
    let (a, router) = (&world.site.a.gateway, &world.site.router);
    millrace_lab::lab::link((a, "wan2"), (router, "wan2-a")).unwrap();
    a.ip(["addr add 203.0.113.2/24 dev wan2"]).unwrap();
    router.ip(["addr add 203.0.113.1/24 dev wan2-a"]).unwrap();
    thread::scope(|scope| {
        let stream = scope.spawn(|| {
            let udp = Some(Udp { bits_per_second: 20_000_000, length: 1200 });
            let iperf = Iperf { seconds: 4, udp, ..Iperf::default() };
            let (a, b) = (&world.site.a, &world.site.b);
            iperf.run(world.lab.directory(), &b.host, b.host_v4, &a.host).unwrap()
        });
        for via in ["203.0.113.1", &world.site.a.router_v4.to_string(), "203.0.113.1"] {
            thread::sleep(Duration::from_secs(1));
            a.ip([format!("route replace 198.51.100.2/32 via {via}")]).unwrap();
        }
        let report = stream.join().unwrap();
        assert!(report.packets > 5000 && report.lost_packets < 50, "{report:?}");
    });
    world.ping(&world.site.a, &world.site.b, 3);
    world.finish();
}

/// Thousands of prefixes and peers go in and come out again, and traffic goes on meanwhile.
#[test]
fn huge_configurations_round_trip_under_traffic() {
    let world = world();
    let a = &world.tunnel.a;
    let handshake = a.peer().unwrap().last_handshake_s;
    let mut text = String::new();
    for peer in 0..500 {
        writeln!(text, "[Peer]\nPublicKey = {}", random_key().unwrap()).unwrap();
        let nets: Vec<String> =
            (0..20).map(|n| format!("172.{}.{}.{n}/32", 16 + peer / 250, peer % 250)).collect();
        writeln!(text, "AllowedIPs = {}", nets.join(", ")).unwrap();
    }
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let ping = Ping { count: 200, interval_ms: 10, ..Ping::default() };
            ping.run(&world.site.a.host, world.site.b.host_v4).unwrap()
        });
        let started = Instant::now();
        let line = format!("wg addconf {} /dev/stdin", a.interface());
        a.namespace().exec_with_input(&line, &text).unwrap();
        let dump = wg(a, "show IFACE dump");
        assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
        assert!(dump.len() > 1 << 17, "{} bytes", dump.len());
        assert_eq!(dump.lines().count(), 1 + 1 + 500);
        assert_eq!(dump.matches("172.16.").count() + dump.matches("172.17.").count(), 500 * 20);
        assert!(traffic.join().unwrap().complete(), "pings were lost meanwhile");
    });
    // One peer with thousands of prefixes, and all gone again.
    let nets: Vec<String> =
        (0..4096).map(|n| format!("100.64.{}.{}/32", n / 256, n % 256)).collect();
    let key = random_key().unwrap();
    let more = format!("[Peer]\nPublicKey = {key}\nAllowedIPs = {}\n", nets.join(", "));
    let line = format!("wg addconf {} /dev/stdin", a.interface());
    a.namespace().exec_with_input(&line, &more).unwrap();
    assert_eq!(wg(a, "show IFACE allowed-ips").matches("100.64.").count(), 4096);
    let own = a.peers().unwrap().iter().position(|peer| peer.last_handshake_s > 0).unwrap();
    let keep = a.peers().unwrap()[own].clone();
    for peer in a.peers().unwrap() {
        if peer.public_key != keep.public_key {
            a.set(&format!("peer {} remove", peer.public_key)).unwrap();
            if a.peers().unwrap().len() < 450 {
                break;
            }
        }
    }
    world.ping(&world.site.a, &world.site.b, 3);
    let now = a.peers().unwrap().into_iter().find(|p| p.public_key == keep.public_key).unwrap();
    assert_eq!(now.last_handshake_s, handshake, "the session lived through it");
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
    for n in 0..POINTS.len() {
        let _ = world.site.a.host.exec(&format!("ping -c1 -W1 10.9.{n}.1"));
    }
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
    let flood = |host: &Namespace, to: &Side| {
        let mut command = host.command("ping");
        command.args(["-q", "-i0.002", "-w20", &to.host_v4.to_string()]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let mut traffic = flood(&world.site.a.host, &world.site.b);
    for _ in 0..10 {
        world.tunnel.a.restart().unwrap();
    }
    wait_for_answers(&world.site.a, &world.site.b, "an answer after the tenth restart");
    ip(&world.tunnel.a, "link del IFACE");
    let ended = wait_for("the daemon to end", LIMIT, || world.tunnel.a.daemon().ended()).unwrap();
    assert_eq!(ended.code(), Some(1), "{}", world.tunnel.a.daemon().log_tail());
    let log = world.tunnel.a.daemon().log();
    assert!(log.contains("is gone"), "{log}");
    let _ = traffic.kill();
    let _ = traffic.wait();
    let links = world.site.a.gateway.exec("ip -o link").unwrap();
    assert!(!links.contains(world.tunnel.a.interface()), "{links}");
    drop(world);
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
