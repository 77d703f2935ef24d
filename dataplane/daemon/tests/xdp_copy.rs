//! The whole data plane with AF_XDP receive in copy mode over veth: that it carries everything,
//! that it gives the device back, and that it says what runs. Functional only: XDP on a veth costs
//! the other end its offloads, and nothing here says anything about speed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use common::{World, drop_count, fact, subject};
use millrace_ebpf::load::{LoadOptions, Programs};
use millrace_lab::{
    Gateway, Implementation, Lab, Namespace, Site, SiteOptions, TunnelOptions, iperf::Iperf,
    ping::Ping, wait_for,
};

const LIMIT: Duration = Duration::from_secs(15);

fn options(receive: &str) -> TunnelOptions {
    let toml = format!("[dataplane]\nreceive = \"{receive}\"\ndevice = [\"wan\"]\n");
    TunnelOptions { toml, ..TunnelOptions::default() }
}

fn wait_for_receive(gateway: &Gateway, wanted: &str) -> String {
    let seen = || (fact(gateway, "receive")? == wanted).then(|| fact(gateway, "receive_reason"));
    match wait_for(format!("receive = {wanted}"), LIMIT, seen) {
        Ok(reason) => reason.unwrap(),
        Err(error) => panic!("{error}; now {:?}", fact(gateway, "receive_reason")),
    }
}

/// Frames that came through AF_XDP.
fn frames(gateway: &Gateway) -> u64 {
    let text = fact(gateway, "xdp_frames").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// Whether an XDP program is on the gateway's outside interface.
fn has_xdp(gateway: &Namespace) -> bool {
    gateway.exec("ip link show dev wan").unwrap().contains("xdp")
}

#[test]
fn everything_is_carried_over_both_families() {
    for outer_v6 in [false, true] {
        let pair = [subject(), Implementation::WireguardGo];
        let world = World::new(pair, &TunnelOptions { outer_v6, ..options("xdp-copy") });
        let reason = wait_for_receive(&world.tunnel.a, "xdp-copy");
        assert!(reason.contains("1 queues of wan (veth)"), "{reason}");
        assert!(has_xdp(&world.site.a.gateway));
        world.connect();
        let (a, b) = (&world.site.a, &world.site.b);
        for inner_v6 in [false, true] {
            world.every_length(a, b, inner_v6);
            world.every_length(b, a, inner_v6);
        }
        // Twice 1,501 requests of B, twice 1,501 answers, for two families.
        assert!(frames(&world.tunnel.a) > 6000, "{}", frames(&world.tunnel.a));
        world.finish();
    }
}

#[test]
fn bulk_runs_both_ways() {
    let pair = [subject(), subject()];
    let world = World::new(pair, &options("xdp-copy"));
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    wait_for_receive(&world.tunnel.b, "xdp-copy");
    world.connect();
    let (a, b) = (&world.site.a, &world.site.b);
    for reverse in [false, true] {
        let iperf = Iperf { seconds: 1, streams: 2, reverse, ..Iperf::default() };
        let report = iperf.run(world.lab.directory(), &b.host, b.host_v4, &a.host).unwrap();
        assert!(report.bytes > 1 << 20, "{report:?}");
    }
    assert!(frames(&world.tunnel.a) > 500 && frames(&world.tunnel.b) > 500);
    drop(world.tunnel);
}

/// Our port, on us and on the hosts behind us.
const PORT: u16 = 51820;

/// Datagrams of every kind that XDP judges: data of an index that nobody has, a handshake, and what
/// is no protocol of ours.
fn strange_payloads() -> Vec<Vec<u8>> {
    let with_head = |head: &[u8], len: usize| {
        let mut payload = head.to_vec();
        payload.resize(len, 0x5a);
        payload
    };
    vec![
        with_head(&[4, 0, 0, 0, 1, 2, 3, 4], 96),
        with_head(&[1, 0, 0, 0, 1, 2, 3, 4], 148),
        with_head(b"GET / HTTP/1.1", 60),
    ]
}

#[test]
fn packets_to_the_same_port_of_another_host_pass_untouched() {
    let world = World::new([subject(), Implementation::WireguardGo], &options("xdp-copy"));
    let reason = wait_for_receive(&world.tunnel.a, "xdp-copy");
    let (side, router) = (&world.site.a, &world.site.router);
    router
        .ip([
            format!("route add {}/32 via {}", side.host_v4, side.wan_v4),
            format!("route add {}/128 via {}", side.host_v6, side.wan_v6),
        ])
        .unwrap();
    let judged = ["xdp_unknown_index", "xdp_unknown_class", "xdp_handshake_rate"];
    let sum = || judged.iter().map(|reason| drop_count(&world.tunnel.a, reason)).sum::<u64>();
    for host in [IpAddr::from(side.host_v4), side.host_v6.into()] {
        let receiver = side.host.run(|| UdpSocket::bind((host, PORT)).unwrap());
        receiver.set_read_timeout(Some(LIMIT)).unwrap();
        let any: IpAddr = if host.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let sender = router.run(|| UdpSocket::bind((any, 0)).unwrap());
        for payload in strange_payloads() {
            sender.send_to(&payload, (host, PORT)).unwrap();
            let mut room = [0; 2000];
            let (len, _) = receiver.recv_from(&mut room).unwrap();
            assert_eq!(room[..len], payload, "to {host}: {reason}");
        }
    }
    assert_eq!(sum(), 0);
}

#[test]
fn what_is_for_us_and_nobodys_is_dropped_by_name() {
    let world = World::new([subject(), Implementation::WireguardGo], &options("xdp-copy"));
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    world.connect();
    let (side, router) = (&world.site.a, &world.site.router);
    let sender = router.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let [data, _, unknown] = strange_payloads().try_into().unwrap();
    let expect = |to: IpAddr, index: u64, class: u64| {
        for payload in [&data, &data, &unknown] {
            sender.send_to(payload, (to, PORT)).unwrap();
        }
        let seen = || {
            let seen = ["xdp_unknown_index", "xdp_unknown_class"]
                .map(|reason| drop_count(&world.tunnel.a, reason));
            (seen == [index, class]).then_some(())
        };
        wait_for(format!("{index} and {class} drops"), LIMIT, seen).unwrap();
    };
    expect(side.wan_v4.into(), 2, 1);
    // An address that comes later is ours from then on. Until the port's thread knows it, what is
    // for it goes to the kernel, and a worker counts it.
    side.gateway.ip(["addr add 192.0.2.77/24 dev wan"]).unwrap();
    let later: IpAddr = [192, 0, 2, 77].into();
    let known = || {
        sender.send_to(&unknown, (later, PORT)).unwrap();
        (drop_count(&world.tunnel.a, "xdp_unknown_class") > 1).then_some(())
    };
    wait_for("the new address to be known", LIMIT, known).unwrap();
    // One that goes is not ours any more. The packet after it, of another reason, says when it was
    // judged.
    side.gateway.ip(["addr del 192.0.2.77/24 dev wan"]).unwrap();
    let forgotten = || {
        let counts = || {
            ["xdp_unknown_class", "xdp_unknown_index"]
                .map(|reason| drop_count(&world.tunnel.a, reason))
        };
        let [class, index] = counts();
        sender.send_to(&unknown, (later, PORT)).unwrap();
        sender.send_to(&data, (side.wan_v4, PORT)).unwrap();
        let judged = || (counts()[1] > index).then_some(());
        wait_for("the second packet", LIMIT, judged).unwrap();
        (counts()[0] == class).then_some(())
    };
    wait_for("the old address to be forgotten", LIMIT, forgotten).unwrap();
    world.ping(&world.site.b, &world.site.a, 3);
    world.finish();
}

#[test]
fn killed_it_leaves_the_link_clean_and_the_host_reachable() {
    let mut world = World::new([subject(), Implementation::WireguardGo], &options("xdp-copy"));
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    world.connect();
    world.tunnel.a.daemon().signal(libc::SIGKILL);
    let gateway = world.site.a.gateway.clone();
    wait_for("XDP to be gone", LIMIT, || (!has_xdp(&gateway)).then_some(())).unwrap();
    let reached = Ping { count: 3, ..Ping::default() }.run(&world.site.router, world.site.a.wan_v4);
    assert!(reached.unwrap().complete());
    // And it can take the device again at once.
    world.tunnel.a.restart().unwrap();
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    world.connect();
    world.ping(&world.site.b, &world.site.a, 5);
    assert!(frames(&world.tunnel.a) > 0);
    world.finish();
}

#[test]
fn a_link_that_was_down_is_taken_again() {
    let world = World::new([subject(), Implementation::WireguardGo], &options("xdp-copy"));
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    world.connect();
    let side = &world.site.a;
    side.gateway.ip(["link set wan down"]).unwrap();
    assert_eq!(wait_for_receive(&world.tunnel.a, "socket"), "wan is down");
    let warning = "AF_XDP was asked for and does not run: wan is down";
    assert_eq!(fact(&world.tunnel.a, "note").as_deref(), Some(warning));
    assert!(!has_xdp(&side.gateway));
    side.gateway
        .ip([
            "link set wan up".to_owned(),
            // What the kernel forgot when the link went down.
            format!("route replace default via {}", side.router_v4),
        ])
        .unwrap();
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    assert_eq!(fact(&world.tunnel.a, "note"), None);
    let before = frames(&world.tunnel.a);
    let reached =
        || Ping { count: 1, ..Ping::default() }.run(&side.host, world.site.b.host_v4).ok();
    wait_for("the tunnel", LIMIT, || reached().filter(|report| report.complete())).unwrap();
    assert!(frames(&world.tunnel.a) > before);
}

#[test]
fn a_lost_carrier_means_sockets_until_it_is_back() {
    let world = World::new([subject(), Implementation::WireguardGo], &options("xdp-copy"));
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    world.site.router.ip(["link set wan-a down"]).unwrap();
    assert_eq!(wait_for_receive(&world.tunnel.a, "socket"), "wan has no carrier");
    world.site.router.ip(["link set wan-a up"]).unwrap();
    wait_for_receive(&world.tunnel.a, "xdp-copy");
}

#[test]
fn traffic_goes_on_by_socket_when_the_program_is_detached() {
    let world = World::new([subject(), Implementation::WireguardGo], &options("xdp-copy"));
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    world.connect();
    let gateway = &world.site.a.gateway;
    common::detach_xdp(gateway);
    assert!(!has_xdp(gateway));
    world.ping(&world.site.a, &world.site.b, 3);
    // The next look notices, and takes the device again.
    wait_for("XDP to be back", LIMIT, || has_xdp(gateway).then_some(())).unwrap();
    wait_for_receive(&world.tunnel.a, "xdp-copy");
    world.finish();
}

#[test]
fn somebody_elses_program_is_left_alone() {
    let lab = Lab::new().unwrap();
    let site = Site::new(&lab, &SiteOptions::default()).unwrap();
    let programs = Programs::load(LoadOptions::new(9)).unwrap();
    let attached = site.a.gateway.run(|| {
        // SAFETY: a terminated string that outlives the call.
        let index = unsafe { libc::if_nametoindex(c"wan".as_ptr()) };
        programs.attach_xdp(index).unwrap()
    });
    let pair = [subject(), Implementation::WireguardGo];
    let tunnel = millrace_lab::Tunnel::start(&lab, &site, pair, &options("xdp-copy")).unwrap();
    let seen = || fact(&tunnel.a, "receive_reason").filter(|reason| reason.contains("already"));
    let reason = wait_for("the refusal", LIMIT, seen).unwrap();
    assert!(reason.contains("the XDP program millrace_xdp (id "), "{reason}");
    assert!(reason.contains("`ip link set dev wan xdp off`"), "{reason}");
    assert_eq!(fact(&tunnel.a, "receive").unwrap(), "socket");
    millrace_lab::tunnel::connect(&site.a, &site.b, LIMIT).unwrap();
    assert!(has_xdp(&site.a.gateway), "theirs is still there");
    drop(attached);
}

#[test]
fn auto_keeps_sockets_on_veth_and_says_why() {
    let world = World::new([subject(), Implementation::WireguardGo], &options("auto"));
    let seen = || fact(&world.tunnel.a, "receive_reason").filter(|reason| reason != "starting");
    let reason = wait_for("a choice", LIMIT, seen).unwrap();
    assert!(reason.contains("offers no AF_XDP zero-copy"), "{reason}");
    assert_eq!(fact(&world.tunnel.a, "receive").unwrap(), "socket");
    assert_eq!(fact(&world.tunnel.a, "transmit").unwrap(), "gso");
    assert_eq!(fact(&world.tunnel.a, "note"), None, "nobody asked for more");
    assert!(!has_xdp(&world.site.a.gateway));
    world.connect();
    world.finish();
}
