//! Each router behaves as its name says, seen by plain UDP and TCP sockets.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use millrace_lab::{
    Lab, Namespace,
    nat::{
        Direction, Fault, Filtering, Hairpin, Host, Impairment, Input, Internet, Ipv6, Mapping,
        Nat, PROXY_PORT, Policy, PortMapping, RELAY_NAME, Router, RouterOptions, SERVER_V4,
        SERVER_V6,
    },
    second_chance,
};

/// A loaded machine delivers within this; only what must not arrive waits so long.
const LOST: Duration = Duration::from_millis(400);

#[test]
fn each_nat_maps_and_filters_as_named() {
    use Filtering as F;
    use Mapping as M;
    let any = |mapping, filtering| Nat::Translate { mapping, filtering };
    let cases = [
        (Nat::None, Seen { mapping: "independent", filtering: "none", keeps_port: true }),
        (
            Nat::Firewall,
            Seen { mapping: "independent", filtering: "address+port", keeps_port: true },
        ),
        (Nat::OneToOne, Seen { mapping: "independent", filtering: "none", keeps_port: true }),
        (Nat::Linux, Seen { mapping: "independent", filtering: "address+port", keeps_port: true }),
        (Nat::EASY, Seen { mapping: "independent", filtering: "address+port", keeps_port: true }),
        (
            Nat::RESTRICTED_CONE,
            Seen { mapping: "independent", filtering: "address", keeps_port: true },
        ),
        (Nat::FULL_CONE, Seen { mapping: "independent", filtering: "none", keeps_port: true }),
        (
            any(M::EndpointIndependentRandom, F::AddressAndPortDependent),
            Seen { mapping: "independent", filtering: "address+port", keeps_port: false },
        ),
        (
            any(M::AddressDependent, F::AddressAndPortDependent),
            Seen { mapping: "by address", filtering: "address+port", keeps_port: false },
        ),
        (Nat::HARD, Seen { mapping: "random", filtering: "address+port", keeps_port: false }),
        (
            any(M::Sequential, F::AddressAndPortDependent),
            Seen { mapping: "sequential", filtering: "address+port", keeps_port: false },
        ),
    ];
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    thread::scope(|scope| {
        for (nat, expected) in cases {
            let (lab, internet) = (&lab, &internet);
            let case = move || {
                let router = internet.router(lab, "router", RouterOptions::nat(nat)).unwrap();
                let host = router.host(lab, "host").unwrap();
                let servers = Servers::new(internet);
                let (seen, address) = classify(&servers, &host);
                assert_eq!(seen, expected, "{nat:?}");
                let public = matches!(nat, Nat::None | Nat::Firewall);
                let outside = if public { host.v4(0).unwrap() } else { router.wan_v4() };
                assert_eq!(address, outside, "{nat:?}");
            };
            // A random port can be the one that it must not be.
            scope.spawn(move || second_chance(case));
        }
    });
}

#[test]
fn hairpins_as_named() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    for filtering in [Filtering::EndpointIndependent, Filtering::AddressAndPortDependent] {
        for hairpin in [Hairpin::Off, Hairpin::External, Hairpin::Internal] {
            let nat = Nat::Translate { mapping: Mapping::EndpointIndependent, filtering };
            let options = RouterOptions { hairpin, ..RouterOptions::nat(nat) };
            let router = internet.router(&lab, "router", options).unwrap();
            let [a, b] = ["a", "b"].map(|name| router.host(&lab, name).unwrap());
            let servers = Servers::new(&internet);
            let (a, b) = (client(&a.namespace), client(&b.namespace));
            let (to_a, to_b) = (servers.outside(&a).unwrap(), servers.outside(&b).unwrap());
            let inside = a.local_addr().unwrap().port();
            let source = punch(&a, to_a, &b, to_b);
            match hairpin {
                Hairpin::Off => assert_eq!(source, None, "{filtering:?}"),
                Hairpin::External => assert_eq!(source, Some(to_a), "{filtering:?}"),
                // A filter by address knows only addresses outside, and so lets no neighbour in.
                Hairpin::Internal => {
                    let expected = SocketAddr::new(router.lan_v4(11).into(), inside);
                    let open = filtering == Filtering::EndpointIndependent;
                    assert_eq!(source, open.then_some(expected), "{filtering:?}");
                }
            }
        }
    }
}

#[test]
fn homes_behind_one_carrier_meet_only_by_its_hairpin() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    for hairpin in [Hairpin::Off, Hairpin::External] {
        let lan = Some([100, 64, 1]);
        let carrier = RouterOptions { hairpin, lan, ..RouterOptions::nat(Nat::FULL_CONE) };
        let carrier = internet.router(&lab, "carrier", carrier).unwrap();
        let homes = [(); 2].map(|()| {
            let home = RouterOptions { lan: Some([192, 168, 1]), ..RouterOptions::default() };
            internet.router_behind(&lab, "home", home, &carrier).unwrap()
        });
        let hosts = homes.each_ref().map(|home| home.host(&lab, "host").unwrap());
        assert_eq!(hosts[0].v4(0).unwrap(), hosts[1].v4(0).unwrap());
        let servers = Servers::new(&internet);
        let [a, b] = hosts.each_ref().map(|host| client(&host.namespace));
        let (to_a, to_b) = (servers.outside(&a).unwrap(), servers.outside(&b).unwrap());
        assert_eq!([to_a.ip(), to_b.ip()], [carrier.wan_v4(); 2].map(IpAddr::V4));
        let met = punch(&a, to_a, &b, to_b).is_some();
        assert_eq!(met, hairpin != Hairpin::Off);
        // A port opened by hand on one home router is reached by the address in between.
        let port = b.local_addr().unwrap().port();
        homes[1].forward_port(port, hosts[1].v4(0).unwrap()).unwrap();
        let between = SocketAddr::new(homes[1].wan_v4().into(), port);
        assert!(arrives(&a, between, &b));
    }
}

#[test]
fn policies_let_through_what_they_say() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let tcp443 = listener(&internet.server, 443);
    let tcp80 = listener(&internet.server, 80);
    let cases = [
        (Policy::Open, Through { udp: true, tcp443: true, tcp80: true }),
        (Policy::NoUdp, Through { udp: false, tcp443: true, tcp80: true }),
        (Policy::RejectUdp, Through { udp: false, tcp443: true, tcp80: true }),
        (Policy::OnlyTcp443, Through { udp: false, tcp443: true, tcp80: false }),
        (Policy::Nothing, Through { udp: false, tcp443: false, tcp80: false }),
        (Policy::NoIpv4, Through { udp: false, tcp443: false, tcp80: false }),
    ];
    for (policy, expected) in cases {
        let options = RouterOptions { policy, ipv6: Ipv6::Open, ..RouterOptions::default() };
        let router = internet.router(&lab, "router", options).unwrap();
        let host = router.host(&lab, "host").unwrap();
        let servers = Servers::new(&internet);
        let socket = client(&host.namespace);
        let tcp = |listener: &TcpListener| {
            let address = listener.local_addr().unwrap();
            host.namespace.run(|| TcpStream::connect_timeout(&address, LOST)).is_ok()
        };
        let seen = Through {
            udp: servers.outside(&socket).is_some(),
            tcp443: tcp(&tcp443),
            tcp80: tcp(&tcp80),
        };
        assert_eq!(seen, expected, "{policy:?}");
        if policy == Policy::RejectUdp {
            socket.connect(servers.address(0, 0)).unwrap();
            socket.send(b"refused").unwrap();
            let error = socket.recv(&mut [0; 8]).unwrap_err();
            assert!(
                error.raw_os_error().is_some_and(|errno| errno == libc::EHOSTUNREACH),
                "{error}"
            );
        }
        if policy == Policy::NoIpv4 {
            assert!(host.namespace.exec(&format!("ping -c 1 -W 2 {}", SERVER_V6[0])).is_ok());
        }
    }
}

#[test]
fn ipv6_is_routed_and_filtered() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let server = bind(&internet.server, SERVER_V6[0].into());
    for ipv6 in [Ipv6::Open, Ipv6::Firewall] {
        let options = RouterOptions { ipv6, ..RouterOptions::nat(Nat::HARD) };
        let router = internet.router(&lab, "router", options).unwrap();
        let host = router.host_v6_only(&lab, "host").unwrap();
        let socket = bind(&host.namespace, host.v6(0).unwrap().into());
        let to_host = socket.local_addr().unwrap();
        // Neighbours find each other first: a question that is lost is asked again after a second.
        internet.server.exec(&format!("ping -c 1 -W 5 {}", to_host.ip())).unwrap();
        assert_eq!(arrives(&server, to_host, &socket), ipv6 == Ipv6::Open);
        assert!(arrives(&socket, server.local_addr().unwrap(), &server));
        assert!(arrives(&server, to_host, &socket));
        assert!(host.v4(0).is_err());
    }
}

#[test]
fn faults_hit_what_they_name_and_heal() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let (router, host, servers) = easy(&lab, &internet);
    let socket = client(&host.namespace);
    let outside = servers.outside(&socket).unwrap();
    let both = || {
        let out = arrives(&socket, servers.address(0, 0), &servers.sockets[0][0]);
        (out, arrives(&servers.sockets[0][0], outside, &socket))
    };
    let here = IpAddr::V4(SERVER_V4[0]);
    let cases = [
        (Fault::CutUdp(Direction::Out), (false, true)),
        (Fault::CutUdp(Direction::In), (true, false)),
        (Fault::CutUdp(Direction::Both), (false, false)),
        (Fault::CutTcp(Direction::Both), (true, true)),
        (Fault::Block(here), (false, false)),
        (Fault::BlockUdp(here), (false, false)),
        (Fault::Block(IpAddr::V4(SERVER_V4[1])), (true, true)),
        (Fault::DropLongerThan(30), (false, false)),
        (Fault::DropLongerThan(600), (true, true)),
    ];
    for (fault, expected) in cases {
        router.set_faults(&[fault]).unwrap();
        assert_eq!(both(), expected, "{fault:?}");
    }
    let tcp = listener(&internet.server, 443);
    let connect = || {
        let address = tcp.local_addr().unwrap();
        host.namespace.run(|| TcpStream::connect_timeout(&address, LOST)).is_ok()
    };
    for (fault, expected) in [
        (Fault::CutTcp(Direction::Out), false),
        (Fault::CutUdp(Direction::Both), true),
        (Fault::BlockUdp(here), true),
    ] {
        router.set_faults(&[fault]).unwrap();
        assert_eq!(connect(), expected, "{fault:?}");
    }
    router.set_faults(&[]).unwrap();
    assert_eq!(both(), (true, true));
}

#[test]
fn only_long_packets_of_wireguard_die() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let (router, host, servers) = easy(&lab, &internet);
    let socket = client(&host.namespace);
    router.set_faults(&[Fault::DropWireGuardDataLongerThan(200)]).unwrap();
    let data = |len| [&[4, 0, 0, 0][..], &vec![7; len]].concat();
    let other = |len| [&[1, 0, 0, 0][..], &vec![7; len]].concat();
    for (bytes, expected) in
        [(data(100), true), (data(400), false), (other(400), true), (data(160), true)]
    {
        socket.send_to(&bytes, servers.address(0, 0)).unwrap();
        let seen = receive(&servers.sockets[0][0], |got, _| (got == bytes).then_some(()));
        assert_eq!(seen.is_some(), expected, "{} bytes, type {}", bytes.len(), bytes[0]);
    }
}

#[test]
fn loss_is_by_chance() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let (router, host, servers) = easy(&lab, &internet);
    let socket = client(&host.namespace);
    router.set_faults(&[Fault::LosePermille(200)]).unwrap();
    let server = &servers.sockets[0][0];
    let mut received = 0;
    for _ in 0..20 {
        for _ in 0..50 {
            socket.send_to(b"one of many", servers.address(0, 0)).unwrap();
        }
        router.set_faults(&[]).unwrap();
        socket.send_to(b"last", servers.address(0, 0)).unwrap();
        receive(server, |bytes, _| {
            received += u32::from(bytes != b"last");
            (bytes == b"last").then_some(())
        })
        .unwrap();
        router.set_faults(&[Fault::LosePermille(200)]).unwrap();
    }
    // 800 are expected, with a standard deviation of 13.
    assert!((700..=900).contains(&received), "{received} of 1000");
}

#[test]
fn mappings_do_not_survive_a_reboot_or_another_address() {
    // The second random port can be the first.
    second_chance(mappings_end);
}

fn mappings_end() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let nat = Nat::Translate {
        mapping: Mapping::EndpointIndependentRandom,
        filtering: Filtering::EndpointIndependent,
    };
    let router = internet.router(&lab, "router", RouterOptions::nat(nat)).unwrap();
    let host = router.host(&lab, "host").unwrap();
    let servers = Servers::new(&internet);
    let socket = client(&host.namespace);
    let server = &servers.sockets[1][1];
    let first = servers.outside(&socket).unwrap();
    assert!(arrives(server, first, &socket));

    router.reboot().unwrap();
    assert!(!arrives(server, first, &socket));
    let second = servers.outside(&socket).unwrap();
    assert_eq!(first.ip(), second.ip());
    assert_ne!(first, second);
    assert!(arrives(server, second, &socket));

    let address = router.change_address().unwrap();
    assert!(!arrives(server, second, &socket));
    let third = servers.outside(&socket).unwrap();
    assert_eq!(third.ip(), IpAddr::V4(address));
    assert_ne!(third.ip(), second.ip());
    assert!(arrives(server, third, &socket));

    for cut in [false, true] {
        let set = |up| if cut { host.set_link(0, up) } else { router.set_wan(up) };
        set(false).unwrap();
        assert_eq!(servers.outside(&socket), None);
        set(true).unwrap();
        let back = || servers.outside(&socket);
        millrace_lab::wait_for("a packet to come out", Duration::from_secs(5), back).unwrap();
    }
}

#[test]
fn an_idle_mapping_ends_after_its_time() {
    // A machine that stands still for two seconds keeps nothing alive.
    second_chance(idle_mapping);
}

fn idle_mapping() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let options = RouterOptions { timeout_s: 2, ..RouterOptions::nat(Nat::EASY) };
    let router = internet.router(&lab, "router", options).unwrap();
    let host = router.host(&lab, "host").unwrap();
    let servers = Servers::new(&internet);
    let socket = client(&host.namespace);
    let server = &servers.sockets[0][0];
    let outside = servers.outside(&socket).unwrap();
    // Kept alive for longer than its time, by traffic from outside alone.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        assert!(arrives(server, outside, &socket));
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(Duration::from_millis(3_300));
    assert!(!arrives(server, outside, &socket));
}

#[test]
fn a_router_that_accepts_a_probe_gives_the_port_away() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    for (input, keeps) in [(Input::Drop, true), (Input::Reject, true), (Input::Accept, false)] {
        let options = RouterOptions { input, ..RouterOptions::nat(Nat::Linux) };
        let router = internet.router(&lab, "router", options).unwrap();
        let host = router.host(&lab, "host").unwrap();
        let servers = Servers::new(&internet);
        let socket = client(&host.namespace);
        let outside = servers.outside(&socket).unwrap();
        let stranger = &servers.sockets[1][0];
        stranger.send_to(b"too early", outside).unwrap();
        socket.send_to(b"answer", servers.address(1, 0)).unwrap();
        let from = receive(stranger, |bytes, from| (bytes == b"answer").then_some(from)).unwrap();
        assert_eq!(from == outside, keeps, "{input:?}");
    }
}

#[test]
fn a_host_firewall_lets_in_answers_only() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let router = internet.router(&lab, "router", RouterOptions::nat(Nat::None)).unwrap();
    let host = router.host(&lab, "host").unwrap();
    let servers = Servers::new(&internet);
    let socket = client(&host.namespace);
    let outside = servers.outside(&socket).unwrap();
    let [asked, stranger] = [0, 1].map(|port| &servers.sockets[0][port]);
    assert!(arrives(stranger, outside, &socket));
    host.firewall().unwrap();
    assert!(servers.outside(&socket).is_some());
    assert!(arrives(asked, outside, &socket));
    host.namespace.exec("conntrack -F").unwrap();
    assert!(!arrives(stranger, outside, &socket));
}

#[test]
fn a_second_leg_takes_over() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let (first, mut host, servers) = easy(&lab, &internet);
    let second = internet.router(&lab, "second", RouterOptions::default()).unwrap();
    host.connect(&second).unwrap();
    let socket = client(&host.namespace);
    let outside = || servers.outside(&socket).map(|address| address.ip());
    assert_eq!(outside(), Some(first.wan_v4().into()));
    host.set_link(0, false).unwrap();
    assert_eq!(outside(), Some(second.wan_v4().into()));
    host.set_link(0, true).unwrap();
    assert_eq!(outside(), Some(first.wan_v4().into()));
}

#[test]
fn a_cable_does_what_it_is_told() {
    // It is a thread that may have to wait for its turn.
    second_chance(cable);
}

fn cable() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let router = internet.router(&lab, "router", RouterOptions::default()).unwrap();
    let (host, wire) = router.host_on_wire(&lab, "host").unwrap();
    let servers = Servers::new(&internet);
    let socket = client(&host.namespace);
    let outside = servers.outside(&socket).unwrap();
    let server = &servers.sockets[0][0];
    let none = Impairment::default();
    // What comes of 1,000 numbered datagrams to the host.
    let run = |impairment| {
        wire.set(none, impairment);
        for number in 0..1000u32 {
            let bytes = [&number.to_be_bytes()[..], &[7; 100]].concat();
            server.send_to(&bytes, outside).unwrap();
            // The queues of the kernel hold a thousand, and others use them, too.
            if number % 10 == 9 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        let mut numbers = Vec::new();
        let mut damaged = 0;
        receive(&socket, |bytes, _| {
            damaged += u32::from(bytes[4..] != [7; 100]);
            numbers.push(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
            None::<()>
        });
        wire.set(none, none);
        (numbers, damaged)
    };
    let (numbers, damaged) = run(none);
    assert!(numbers.is_sorted() && numbers.len() == 1000 && damaged == 0, "{}", numbers.len());
    let (numbers, _) = run(Impairment { loss: 100, ..none });
    assert!((850..=950).contains(&numbers.len()), "{} of 1000 with 10 % loss", numbers.len());
    // On average 500 pass; that none of 950 begins a burst is a chance of 5e-9.
    let (numbers, _) = run(Impairment { burst: 20, burst_len: 50, ..none });
    let longest = numbers.windows(2).map(|pair| pair[1] - pair[0]).max();
    assert!(longest >= Some(51) && numbers.len() > 150, "{longest:?}, {}", numbers.len());
    let (mut numbers, _) = run(Impairment { duplicate: 100, ..none });
    assert!((1050..=1150).contains(&numbers.len()), "{} with 10 % doubled", numbers.len());
    numbers.dedup();
    assert_eq!(numbers.len(), 1000);
    let (numbers, _) = run(Impairment { jitter: Duration::from_millis(5), ..none });
    assert!(numbers.len() == 1000 && !numbers.is_sorted());
    let (numbers, damaged) = run(Impairment { damage: 100, ..none });
    assert!(numbers.len() == 1000 && (50..=150).contains(&damaged), "{damaged} damaged");

    let delay = Duration::from_millis(30);
    wire.set(Impairment { delay, ..none }, Impairment { delay, ..none });
    let start = Instant::now();
    assert!(host.namespace.exec(&format!("ping -c 1 -W 2 {}", SERVER_V4[0])).is_ok());
    assert!(start.elapsed() >= 2 * delay, "{:?}", start.elapsed());
}

#[test]
fn frames_outside_are_single_packets() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let (router, host, servers) = easy(&lab, &internet);
    let socket = client(&host.namespace);
    router.set_faults(&[Fault::DropLongerThan(600)]).unwrap();
    set(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 500);
    socket.send_to(&[5; 2500], servers.address(0, 0)).unwrap();
    let mut count = 0;
    let all = receive(&servers.sockets[0][0], |bytes, _| {
        count += u32::from(bytes == [5; 500]);
        (count == 5).then_some(())
    });
    assert!(all.is_some(), "{count} of 5 segments came through");
}

#[test]
fn a_proxy_is_the_only_way_out() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let options = RouterOptions { policy: Policy::Nothing, ..RouterOptions::default() };
    let router = internet.router(&lab, "router", options).unwrap();
    let host = router.host(&lab, "host").unwrap();
    let _proxy = router.start_proxy(&lab, Some(("millrace", "secret"))).unwrap();
    let _server = listener(&internet.server, 443);
    let ask = |target: &str, credentials: &str| {
        let proxy = (router.lan_v4(1), PROXY_PORT);
        let mut stream = host.namespace.run(|| TcpStream::connect(proxy)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        write!(stream, "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{credentials}\r\n").unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[9..]).into_owned()
    };
    // millrace:secret in base64.
    let known = "Proxy-Authorization: Basic bWlsbHJhY2U6c2VjcmV0\r\n";
    assert_eq!(ask(&format!("{RELAY_NAME}:443"), known), "200");
    assert_eq!(ask(&format!("{RELAY_NAME}:80"), known), "403");
    assert_eq!(ask(&format!("{RELAY_NAME}:443"), ""), "407");
}

#[test]
fn hosts_open_ports_by_nat_pmp() {
    // The daemon is a process that may have to wait for its turn.
    second_chance(nat_pmp);
}

fn nat_pmp() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let router = internet.router(&lab, "router", RouterOptions::nat(Nat::HARD)).unwrap();
    let host = router.host(&lab, "host").unwrap();
    let servers = Servers::new(&internet);
    let _daemon = router.start_port_mapping(&lab, PortMapping::PmpAndPcp).unwrap();
    let socket = client(&host.namespace);
    let port = socket.local_addr().unwrap().port();
    let outside = SocketAddr::new(router.wan_v4().into(), port);
    assert!(!arrives(&servers.sockets[0][0], outside, &socket));
    // RFC 6886 section 3.3: map this UDP port for an hour.
    let request =
        [&[0, 1, 0, 0][..], &port.to_be_bytes(), &port.to_be_bytes(), &[0, 0, 0x0e, 0x10]];
    socket.send_to(&request.concat(), (router.lan_v4(1), 5351)).unwrap();
    let answer = receive(&socket, |bytes, _| (bytes.len() == 16).then(|| bytes.to_vec())).unwrap();
    assert_eq!(answer[..4], [0, 129, 0, 0], "{answer:?}");
    assert!(arrives(&servers.sockets[0][0], outside, &socket));
}

/// What a socket inside and the servers outside find out.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mapping: &'static str,
    filtering: &'static str,
    keeps_port: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Through {
    udp: bool,
    tcp443: bool,
    tcp80: bool,
}

/// Two sockets on each of the server's addresses.
struct Servers {
    sockets: [[UdpSocket; 2]; 2],
}

impl Servers {
    fn new(internet: &Internet) -> Self {
        let socket = |address: Ipv4Addr| bind(&internet.server, address.into());
        Self { sockets: SERVER_V4.map(|address| [(); 2].map(|()| socket(address))) }
    }

    fn address(&self, server: usize, port: usize) -> SocketAddr {
        self.sockets[server][port].local_addr().unwrap()
    }

    /// Where `socket` seems to be, for the first server.
    fn outside(&self, socket: &UdpSocket) -> Option<SocketAddr> {
        self.source(socket, 0, 0)
    }

    fn source(&self, socket: &UdpSocket, server: usize, port: usize) -> Option<SocketAddr> {
        // A cut link is an error here and now.
        socket.send_to(b"who am I", self.address(server, port)).ok()?;
        let who = |bytes: &[u8], from| (bytes == b"who am I").then_some(from);
        receive(&self.sockets[server][port], who)
    }
}

fn classify(servers: &Servers, host: &Host) -> (Seen, Ipv4Addr) {
    let socket = client(&host.namespace);
    let inside = socket.local_addr().unwrap().port();
    let order = [(0, 0), (0, 1), (1, 0), (1, 1)];
    let sources = order.map(|(server, port)| servers.source(&socket, server, port).unwrap());
    let ports = sources.map(|source| source.port());
    let distinct = HashSet::from(ports).len();
    let mapping = match ports {
        _ if distinct == 1 => "independent",
        [a, b, c, d] if a == b && c == d => "by address",
        [a, b, c, d] if [1, 2, 3].map(|n| a.wrapping_add(n)) == [b, c, d] => "sequential",
        // Four random numbers, of which two might be equal by chance.
        _ if distinct >= 3 => "random",
        _ => "unknown",
    };
    let keeps_port = ports[0] == inside;

    let socket = client(&host.namespace);
    let outside = servers.outside(&socket).unwrap();
    let [[asked, same_address], [other, _]] = &servers.sockets;
    other.send_to(b"other address", outside).unwrap();
    same_address.send_to(b"other port", outside).unwrap();
    // Packets keep their order, so what has not come by then is not coming.
    asked.send_to(b"last", outside).unwrap();
    let mut heard = HashSet::new();
    let last = receive(&socket, |bytes, _| {
        heard.insert(bytes.to_vec());
        (bytes == b"last").then_some(())
    });
    let heard = |what: &str| heard.contains(what.as_bytes());
    let filtering = match (last.is_some(), heard("other port"), heard("other address")) {
        (true, true, true) => "none",
        (true, true, false) => "address",
        (true, false, false) => "address+port",
        _ => "unknown",
    };
    let IpAddr::V4(address) = sources[0].ip() else { panic!("an IPv6 source") };
    (Seen { mapping, filtering, keeps_port }, address)
}

/// Each writes to the other's mapping in turn; the source that the second saw of the first.
fn punch(a: &UdpSocket, to_a: SocketAddr, b: &UdpSocket, to_b: SocketAddr) -> Option<SocketAddr> {
    (0..3).find_map(|_| {
        a.send_to(b"from a", to_b).unwrap();
        let source = receive(b, |bytes, from| (bytes == b"from a").then_some(from));
        b.send_to(b"from b", to_a).unwrap();
        source
    })
}

fn arrives(from: &UdpSocket, to: SocketAddr, at: &UdpSocket) -> bool {
    let bytes = millrace_lab::Marker::random().unwrap().0;
    from.send_to(&bytes, to).unwrap();
    receive(at, |got, _| (got == bytes).then_some(())).is_some()
}

/// Receives until `found` is satisfied or nothing comes any more.
fn receive<T>(
    socket: &UdpSocket,
    mut found: impl FnMut(&[u8], SocketAddr) -> Option<T>,
) -> Option<T> {
    let mut buffer = [0; 2048];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                if let Some(value) = found(&buffer[..len], from) {
                    return Some(value);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // An ICMP error for something sent before.
            Err(_) => {}
        }
    }
}

fn easy(lab: &Lab, internet: &Internet) -> (Router, Host, Servers) {
    let router = internet.router(lab, "router", RouterOptions::default()).unwrap();
    let host = router.host(lab, "host").unwrap();
    (router, host, Servers::new(internet))
}

fn client(namespace: &Namespace) -> UdpSocket {
    bind(namespace, Ipv4Addr::UNSPECIFIED.into())
}

fn bind(namespace: &Namespace, address: IpAddr) -> UdpSocket {
    let socket = namespace.run(|| UdpSocket::bind((address, 0))).unwrap();
    socket.set_read_timeout(Some(LOST)).unwrap();
    // The usual room is for 256 datagrams.
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 8 << 20);
    socket
}

fn set(socket: &UdpSocket, level: libc::c_int, name: libc::c_int, value: libc::c_int) {
    let (pointer, len) = ((&raw const value).cast(), size_of_val(&value) as libc::socklen_t);
    // SAFETY: the descriptor is open, the value is live and of the length given.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer, len) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

fn listener(namespace: &Namespace, port: u16) -> TcpListener {
    namespace.run(|| TcpListener::bind((SERVER_V4[0], port))).unwrap()
}
