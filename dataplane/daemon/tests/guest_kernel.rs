//! Interop with the kernel's own WireGuard, which runs in a QEMU guest in the place of gateway B.
//!
//! ```text
//!  host a ── gateway a: millrace ── router ── bridge ── tap ── guest: Linux 7.x, wg0
//! ```
//! The capture in the router sees every frame between the two, and no inner byte may be in it.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use common::subject;
use millrace_lab::{
    Capture, Card, Gateway, GatewayOptions, Guest, GuestOptions, Lab, Marker, Peer, Result, Side,
    Site, SiteOptions, Wire,
    gateway::configuration,
    keys::{KeyPair, random_key},
    ping::{Ping, PingReport},
    probe::every_length,
    tunnel, wait_for,
};

/// For things that happen at once, on a slow guest on a busy machine.
const SOON: Duration = Duration::from_secs(10);

/// A peer that lost its session is noticed after 15 s of silence; then the handshake, tried every
/// 5 s.
const SILENCE_NOTICED: Duration = Duration::from_secs(15 + 5 + 5);

/// Where the guest's echo listens.
const ECHO_PORT: u16 = 7;

/// Who sends the first handshake message.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Initiator {
    Millrace,
    Kernel,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    initiator: Initiator,
    outer_v6: bool,
    preshared_key: bool,
    mtu: u32,
}

const PLAIN: Shape =
    Shape { initiator: Initiator::Millrace, outer_v6: false, preshared_key: true, mtu: 1420 };

/// The lab with a booted guest. Fields are dropped in this order.
struct World {
    guest: Guest,
    capture: Capture,
    site: Site,
    lab: Lab,
    millrace_keys: KeyPair,
    kernel_keys: KeyPair,
    marker: Marker,
}

impl World {
    fn new(wan_mtu: u32) -> Result<Self> {
        let lab = Lab::new()?;
        let site = Site::new(&lab, &SiteOptions { wan_mtu, ..SiteOptions::default() })?;
        let b = &site.b;
        b.gateway.ip([
            "addr flush dev wan".to_owned(),
            format!("link add outside mtu {wan_mtu} type bridge"),
            "tuntap add tap mode tap".into(),
            format!("link set tap mtu {wan_mtu} master outside up"),
            "link set wan master outside".into(),
            "link set outside up".into(),
        ])?;
        let options =
            GuestOptions::new(Card::Virtio, vec![Wire::Tap { name: "tap".into(), queues: 1 }]);
        let mut guest =
            Guest::boot(&lab, &b.gateway, "kernel", &options.program("millrace-probe")?)?;
        println!("the peer is WireGuard of Linux {}", guest.kernel());
        guest.run(&format!(
            "load virtio_net wireguard
             sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
             ip link set eth0 mtu {wan_mtu} up
             {address_v4}
             ip addr add {}/64 dev eth0 nodad
             ip -6 route add default via {}",
            b.wan_v6,
            b.router_v6,
            address_v4 = address_v4(b, &b.wan_v4.to_string()),
        ))?;
        let capture = Capture::start(&lab, &site.router)?;
        let (millrace_keys, kernel_keys) = (KeyPair::generate()?, KeyPair::generate()?);
        let marker = Marker::random()?;
        Ok(Self { guest, capture, site, lab, millrace_keys, kernel_keys, marker })
    }

    /// Configures both ends anew. Only the initiator knows where the other one is.
    fn tunnel(&mut self, shape: Shape) -> Result<Gateway> {
        let preshared_key = shape.preshared_key.then(random_key).transpose()?;
        let options = |near: &Side, own: &KeyPair, far: &Side, other: &KeyPair, initiates: bool| {
            GatewayOptions {
                implementation: subject(),
                private_key: own.private.clone(),
                addresses: near.tunnel_addresses(),
                mtu: shape.mtu,
                peers: vec![Peer {
                    public_key: other.public.clone(),
                    preshared_key: preshared_key.clone(),
                    endpoint: initiates.then(|| tunnel::endpoint(far, shape.outer_v6)),
                    allowed_ips: far.allowed_ips(),
                    keepalive_s: None,
                }],
                ..GatewayOptions::default()
            }
        };
        let (a, b) = (&self.site.a, &self.site.b);
        let (a_keys, b_keys) = (&self.millrace_keys, &self.kernel_keys);
        let kernel = options(b, b_keys, a, a_keys, shape.initiator == Initiator::Kernel);
        let millrace = options(a, a_keys, b, b_keys, shape.initiator == Initiator::Millrace);
        configure_kernel(&mut self.guest, "wg0", &kernel)?;
        Gateway::start(&self.lab, &a.gateway, millrace)
    }

    /// Brings the tunnel up by a packet from the initiator's side.
    fn connect(&mut self, initiator: Initiator, limit: Duration) -> Result<()> {
        match initiator {
            Initiator::Millrace => wait_for("a ping from millrace's side", limit, || {
                self.ping(1).is_ok_and(|report| report.complete()).then_some(())
            }),
            Initiator::Kernel => self.connect_from_kernel(limit),
        }
    }

    fn connect_from_kernel(&mut self, limit: Duration) -> Result<()> {
        let ping = format!("ping -c 1 -W 1 {}", self.site.a.host_v4);
        self.guest.wait_until("a ping from the kernel's side", limit, &ping)
    }

    fn start_echo(&mut self) -> Result<()> {
        for (name, address) in [("v4", self.echo_v4()), ("v6", self.echo_v6())] {
            let log = format!("/tmp/echo-{name}");
            self.guest.run(&format!("millrace-probe echo {address} > {log} 2>&1 &"))?;
            self.guest.wait_until("the echo", SOON, &format!("grep echoing {log}"))?;
        }
        Ok(())
    }

    fn echo_v4(&self) -> SocketAddr {
        SocketAddr::new(self.site.b.tunnel_v4.into(), ECHO_PORT)
    }

    fn echo_v6(&self) -> SocketAddr {
        SocketAddr::new(self.site.b.tunnel_v6.into(), ECHO_PORT)
    }

    fn ping(&self, count: u32) -> Result<PingReport> {
        let ping = Ping { count, marker: Some(self.marker), ..Ping::default() };
        ping.run(&self.site.a.host, self.site.b.tunnel_v4)
    }

    /// Where the kernel sends its packets.
    fn kernel_endpoint(&mut self) -> Result<String> {
        self.guest.run("wg show wg0 endpoints | cut -f2")
    }

    /// Unix time of the kernel's last handshake, and bytes that it received.
    fn kernel_counters(&mut self, interface: &str) -> Result<(u64, u64)> {
        let line = self.guest.run(&format!("wg show {interface} dump | tail -n 1 | cut -f5,6"))?;
        let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap());
        Ok((numbers.next().unwrap(), numbers.next().unwrap()))
    }

    /// What one end sent since its start, the other one received, to the byte and with handshakes.
    /// (A slow guest may answer a probe too late: its second try is no proof of a loss.)
    fn nothing_was_lost(&mut self, millrace: &Gateway) -> Result<()> {
        let mut last = Default::default();
        let equal = wait_for("both ends to have counted the same bytes", SOON, || {
            let ours = millrace.peer().ok()?;
            let kernel = self.guest.run("wg show wg0 transfer | cut -f2,3").ok()?;
            last = (format!("{}\t{}", ours.sent_bytes, ours.received_bytes), kernel);
            (last.0 == last.1).then_some(())
        });
        equal.inspect_err(|_| eprintln!("millrace sent and received, the kernel's: {last:?}"))
    }

    fn finish(self) -> Result<()> {
        let mut inner = self.site.inner_addresses();
        inner.extend(SECOND_TUNNEL.map(|address| address.parse::<IpAddr>().unwrap()));
        let report = self.capture.finish(&[self.marker], &inner)?;
        assert_eq!(report.missed, 0, "tcpdump missed frames");
        println!("{} packets outside, none shows the inside", report.packets);
        report.check()
    }
}

/// Inner addresses of the second tunnel of the rekey test: millrace's, the kernel's.
const SECOND_TUNNEL: [&str; 2] = ["10.78.0.1", "10.78.0.2"];

/// Makes the kernel's device, removing what had this name before.
fn configure_kernel(guest: &mut Guest, interface: &str, options: &GatewayOptions) -> Result<()> {
    let mut script = format!(
        "umask 077
         ip link del {interface} 2>/dev/null || true
         ip link add {interface} mtu {} type wireguard
         cat > /tmp/{interface}.conf <<'END'\n{}END
         wg setconf {interface} /tmp/{interface}.conf
         ip link set {interface} up\n",
        options.mtu,
        configuration(options)
    );
    for address in &options.addresses {
        script += &format!("ip addr add {address} dev {interface} nodad\n");
    }
    for prefix in options.peers.iter().flat_map(|peer| &peer.allowed_ips) {
        script += &format!("ip route replace {prefix} dev {interface}\n");
    }
    guest.run(&script).map(drop)
}

/// Gives the guest's card this IPv4 address instead of the one it has.
fn address_v4(side: &Side, address: &str) -> String {
    let router = side.router_v4;
    format!(
        "ip -4 addr flush dev eth0
         ip addr add {address}/24 dev eth0
         ip route replace default via {router}"
    )
}

#[test]
fn every_length_passes_in_both_roles_over_both_families_with_and_without_psk() -> Result<()> {
    let mut world = World::new(1600)?;
    let shapes = [
        PLAIN,
        Shape { initiator: Initiator::Kernel, preshared_key: false, ..PLAIN },
        Shape { outer_v6: true, preshared_key: false, ..PLAIN },
        // With this MTU every inner length to 1500 is one packet of its own.
        Shape { initiator: Initiator::Kernel, outer_v6: true, mtu: 1500, ..PLAIN },
    ];
    for (i, shape) in shapes.into_iter().enumerate() {
        println!("{shape:?}");
        let started = Instant::now();
        let millrace = world.tunnel(shape)?;
        if i == 0 {
            world.start_echo()?;
        }
        world.connect(shape.initiator, SOON)?;
        let outside = tunnel::endpoint(&world.site.a, shape.outer_v6);
        assert_eq!(world.kernel_endpoint()?, outside.to_string());
        let outside = tunnel::endpoint(&world.site.b, shape.outer_v6);
        assert_eq!(millrace.peer()?.endpoint, Some(outside));
        for echo in [world.echo_v4(), world.echo_v6()] {
            let outcome = every_length(&world.site.a.host, echo, 0..=1500, world.marker)?;
            assert_eq!((outcome.passed, outcome.lost), (1501, vec![]), "{shape:?} {echo}");
            if !outcome.retried.is_empty() {
                println!("(length, tries) of those not back in time: {:?}", outcome.retried);
            }
        }
        world.nothing_was_lost(&millrace)?;
        println!("3002 lengths there and back in {:?}", started.elapsed());
    }
    world.finish()
}

#[test]
fn either_side_may_roam() -> Result<()> {
    let mut world = World::new(1500)?;
    let millrace = world.tunnel(PLAIN)?;
    world.connect(Initiator::Millrace, SOON)?;
    let (a, b) = (world.site.a.clone(), world.site.b.clone());

    // Millrace gets another IPv4 address.
    a.gateway.ip([
        format!("addr del {}/24 dev wan", a.wan_v4),
        "addr add 192.0.2.3/24 dev wan".into(),
        format!("route replace default via {}", a.router_v4),
    ])?;
    assert!(world.ping(5)?.complete());
    assert_eq!(world.kernel_endpoint()?, "192.0.2.3:51820");

    // The kernel gets another IPv4 address and another port.
    let moved = address_v4(&b, "198.51.100.9");
    world.guest.run(&format!("{moved}\nwg set wg0 listen-port 51999"))?;
    world.connect_from_kernel(SOON)?;
    assert_eq!(millrace.peer()?.endpoint, "198.51.100.9:51999".parse().ok());
    assert!(world.ping(5)?.complete());

    // The kernel moves to IPv6; millrace follows.
    let (peer, endpoint) = (&world.millrace_keys.public, tunnel::endpoint(&a, true));
    world.guest.run(&format!("wg set wg0 peer {peer} endpoint {endpoint}"))?;
    world.connect_from_kernel(SOON)?;
    assert_eq!(millrace.peer()?.endpoint, Some(SocketAddr::new(b.wan_v6.into(), 51999)));
    assert!(world.ping(5)?.complete());

    // Millrace gets another IPv6 address.
    a.gateway.ip([
        format!("addr del {}/64 dev wan", a.wan_v6),
        "addr add 2001:db8:1::3/64 dev wan nodad".into(),
        format!("route replace default via {}", a.router_v6),
    ])?;
    assert!(world.ping(5)?.complete());
    assert_eq!(world.kernel_endpoint()?, "[2001:db8:1::3]:51820");
    world.finish()
}

#[test]
fn either_side_may_restart() -> Result<()> {
    let mut world = World::new(1500)?;
    let mut millrace = world.tunnel(PLAIN)?;
    world.connect(Initiator::Millrace, SOON)?;
    let kernel_again = "ip link del wg0
        ip link add wg0 type wireguard; wg setconf wg0 /tmp/wg0.conf; ip link set wg0 up";
    let mut again = kernel_again.to_owned();
    for address in world.site.b.tunnel_addresses() {
        again += &format!("\nip addr add {address} dev wg0 nodad");
    }
    for prefix in world.site.a.allowed_ips() {
        again += &format!("\nip route replace {prefix} dev wg0");
    }

    // The kernel forgets its session. Millrace still has one and must notice the silence.
    world.guest.run(&again)?;
    let started = Instant::now();
    world.connect(Initiator::Millrace, SILENCE_NOTICED)?;
    println!("after the kernel's restart: {:?}", started.elapsed());
    assert!(world.ping(5)?.complete());

    // Millrace is killed. It knows where the kernel is, and its next packet brings a handshake,
    // whose timestamp must be newer than that of the process before.
    millrace.restart()?;
    world.connect(Initiator::Millrace, SOON)?;
    assert!(world.ping(5)?.complete());

    // Killed again; only the kernel has something to say, and it is the one to notice.
    millrace.restart()?;
    let started = Instant::now();
    world.connect(Initiator::Kernel, SILENCE_NOTICED)?;
    println!("after our restart: {:?}", started.elapsed());
    assert!(world.ping(5)?.complete());
    world.finish()
}

#[test]
fn keepalives_go_both_ways_and_change_nothing() -> Result<()> {
    let mut world = World::new(1500)?;
    let millrace = world.tunnel(PLAIN)?;
    world.connect(Initiator::Millrace, SOON)?;

    // The kernel sends one datagram that nobody answers: after 10 s millrace says that it is there,
    // or the kernel would start a handshake at 15 s.
    let silent = (world.site.a.host).run(|| UdpSocket::bind(("0.0.0.0", 9))).unwrap();
    let before = settled_counters(&mut world)?;
    let host = world.site.a.host_v4;
    world.guest.run(&format!("millrace-probe send {host}:9 once"))?;
    silent.set_read_timeout(Some(SOON)).unwrap();
    silent.recv(&mut [0; 16]).expect("the datagram arrives");
    let started = Instant::now();
    let answered = wait_for("a passive keepalive", Duration::from_secs(14), || {
        let now = world.kernel_counters("wg0").ok()?;
        (now.1 > before.1).then_some(now)
    })?;
    println!("passive keepalive after {:?}", started.elapsed());
    assert!(started.elapsed() > Duration::from_secs(8), "too early for a passive keepalive");
    assert_eq!(answered, (before.0, before.1 + 32), "one empty packet and no handshake");

    // Persistent keepalives of the kernel, then of millrace.
    let peer = world.millrace_keys.public.clone();
    let before = millrace.peer()?.received_bytes;
    world.guest.run(&format!("wg set wg0 peer {peer} persistent-keepalive 1"))?;
    wait_for("three of the kernel's keepalives", SOON, || {
        (millrace.peer().ok()?.received_bytes >= before + 3 * 32).then_some(())
    })?;
    world.guest.run(&format!("wg set wg0 peer {peer} persistent-keepalive 0"))?;
    let before = world.kernel_counters("wg0")?;
    millrace.set(&format!("peer {} persistent-keepalive 1", world.kernel_keys.public))?;
    let now = wait_for("three of our keepalives", SOON, || {
        let now = world.kernel_counters("wg0").ok()?;
        (now.1 >= before.1 + 3 * 32).then_some(now)
    })?;
    assert_eq!(now.0, before.0, "no handshake between");
    assert_eq!((now.1 - before.1) % 32, 0, "only empty packets");
    world.finish()
}

/// The kernel's counters once nothing is on the way any more.
fn settled_counters(world: &mut World) -> Result<(u64, u64)> {
    // Its answer to our last ping may leave us owing a passive keepalive.
    let mut last = (world.kernel_counters("wg0")?, Instant::now());
    wait_for("silence", Duration::from_secs(30), || {
        let now = world.kernel_counters("wg0").ok()?;
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(11)).then_some(now)
    })
}

#[test]
fn both_sides_rekey_under_traffic_without_a_loss() -> Result<()> {
    /// Past the 120 s after which an initiator makes a new key, with 50 ms between two pings.
    const PINGS: u32 = 2_700;
    let mut world = World::new(1500)?;
    // In the first tunnel millrace is the initiator, in the second one the kernel.
    let first = world.tunnel(PLAIN)?;
    let second = second_tunnel(&mut world)?;
    world.connect(Initiator::Millrace, SOON)?;
    let ping = format!("ping -c 1 -W 1 {}", SECOND_TUNNEL[0]);
    world.guest.wait_until("a ping through the second tunnel", SOON, &ping)?;
    let before = [world.kernel_counters("wg0")?.0, world.kernel_counters("wg1")?.0];

    let ping = Ping { count: PINGS, marker: Some(world.marker), ..Ping::default() };
    let (a, b) = (&world.site.a, &world.site.b);
    let reports = thread::scope(|scope| {
        let through_second =
            scope.spawn(|| ping.run(&a.gateway, SECOND_TUNNEL[1].parse::<IpAddr>().unwrap()));
        [ping.run(&a.host, b.tunnel_v4), through_second.join().unwrap()]
    });
    let after = [world.kernel_counters("wg0")?.0, world.kernel_counters("wg1")?.0];
    for (i, (report, gateway)) in reports.into_iter().zip([&first, &second]).enumerate() {
        let report = report?;
        assert_eq!(report.received, PINGS, "tunnel {i}: {report:?}");
        let apart = after[i] - before[i];
        assert!((119..=130).contains(&apart), "tunnel {i}: a new key after {apart} s");
        let ours = gateway.peer()?.last_handshake_s;
        assert!(ours.abs_diff(after[i]) <= 2, "tunnel {i}: both ends took part in the handshake");
        println!("tunnel {i}: new key after {apart} s, {report:?}");
    }
    world.finish()
}

fn second_tunnel(world: &mut World) -> Result<Gateway> {
    let keys = [KeyPair::generate()?, KeyPair::generate()?];
    let endpoint = SocketAddr::new(world.site.a.wan_v4.into(), 51821);
    let options = |i: usize| GatewayOptions {
        implementation: subject(),
        private_key: keys[i].private.clone(),
        listen_port: 51821,
        addresses: vec![format!("{}/24", SECOND_TUNNEL[i])],
        peers: vec![Peer {
            public_key: keys[1 - i].public.clone(),
            endpoint: (i == 1).then_some(endpoint),
            allowed_ips: vec![format!("{}/32", SECOND_TUNNEL[1 - i])],
            ..Peer::default()
        }],
        ..GatewayOptions::default()
    };
    configure_kernel(&mut world.guest, "wg1", &options(1))?;
    Gateway::start(&world.lab, &world.site.a.gateway, options(0))
}
