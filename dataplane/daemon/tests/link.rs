//! What the data plane owes control: two gateways in namespaces, and this test as the control of
//! each. Needs root.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use common::{CONNECT, World, drop_count, fact, facts};
use millrace_ebpf::abi::{Endpoint, EndpointKind, Observed};
use millrace_ebpf::link::{
    self, BoxKeyAnswer, BoxKeyRefusal, Delivery, DetourSockets, Handles, LinkClient, LinkError,
    Peer, PublicKey, Run, ToControl, Welcome, detour,
};
use millrace_ebpf::maps::{LineReader, LineWriter};
use millrace_ebpf::spec;
use millrace_lab::iperf::Iperf;
use millrace_lab::keys::{KeyPair, random_key};
use millrace_lab::ping::Ping;
use millrace_lab::{Gateway, Implementation, Namespace, TunnelOptions, wait_for};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const LIMIT: Duration = Duration::from_secs(20);

/// A disco envelope (magic, key, nonce) and some sealed bytes.
fn disco_shaped(number: u8) -> Vec<u8> {
    let mut datagram = b"TS\xf0\x9f\x92\xac".to_vec();
    datagram.resize(100, number);
    datagram
}

/// As much of control as a test needs.
struct Control {
    client: LinkClient,
    welcome: Welcome,
    udp: UdpSocket,
    detours: Option<DetourSockets>,
    endpoints: LineWriter<Endpoint>,
    observed: LineReader<Observed>,
    peers: BTreeMap<u32, Peer>,
    /// Messages that are neither about peers nor the first ones.
    others: Vec<ToControl>,
}

impl Control {
    fn connect(gateway: &Gateway) -> Self {
        let path = link::path(gateway.interface());
        let client = wait_for("the link's socket", LIMIT, || LinkClient::connect(&path).ok());
        let mut client = client.unwrap();
        let first = wait_for("a welcome", LIMIT, || client.receive().unwrap()).unwrap();
        let Delivery { message: ToControl::Welcome(welcome), handles: Some(handles) } = first
        else {
            panic!("{first:?}");
        };
        let Handles { maps, udp, detours } = handles;
        let specs = spec::read_abi(maps.abi.as_fd()).unwrap();
        let endpoints = LineWriter::<Endpoint>::endpoints(maps.endpoints.as_fd(), &specs).unwrap();
        let observed = LineReader::<Observed>::observed(maps.observed.as_fd(), &specs).unwrap();
        let (udp, detours) = (UdpSocket::from(udp), Some(detours));
        let (peers, others) = (BTreeMap::new(), Vec::new());
        let mut control =
            Self { client, welcome, udp, detours, endpoints, observed, peers, others };
        control.wait("the end of the first telling", |control| {
            control.others.contains(&ToControl::Synced)
        });
        control
    }

    /// Takes what was said.
    fn hear(&mut self) {
        while let Some(Delivery { message, .. }) = self.client.receive().unwrap() {
            match message {
                ToControl::PeerUp(peer) => {
                    self.peers.insert(peer.slot, peer);
                }
                ToControl::AllowedIps { slot, allowed_ips } => {
                    self.peers.get_mut(&slot).unwrap().allowed_ips.extend(allowed_ips);
                }
                ToControl::PeerDown { slot } => {
                    self.peers.remove(&slot).unwrap();
                }
                other => self.others.push(other),
            }
        }
    }

    fn wait(&mut self, what: &str, mut is_so: impl FnMut(&mut Self) -> bool) {
        let holds = || {
            self.hear();
            is_so(self).then_some(())
        };
        wait_for(what, LIMIT, holds).unwrap_or_else(|error| panic!("{error}"));
    }

    fn box_key(&mut self, request: u32, peer: PublicKey) -> Result<[u8; 32], BoxKeyRefusal> {
        assert!(self.client.want_box_key(request, peer).unwrap());
        let mut answer = None;
        self.wait("a box key", |control| {
            let place = control.others.iter().position(
                |other| matches!(other, ToControl::BoxKey(answer) if answer.request == request),
            );
            let Some(ToControl::BoxKey(BoxKeyAnswer { key, .. })) =
                place.map(|place| control.others.swap_remove(place))
            else {
                return false;
            };
            answer = Some(key.map(|key| *key.0));
            true
        });
        answer.unwrap()
    }

    fn write(&mut self, kind: EndpointKind) {
        assert!(self.endpoints.write(0, &Endpoint { kind: kind as u8, ..Endpoint::default() }));
    }

    fn observed(&self) -> Observed {
        self.observed.read(0).unwrap()
    }
}

/// Carries runs between two controls, as a relay does.
struct Shuttle {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<[usize; 2]>>,
}

impl Shuttle {
    fn start(controls: [&mut Control; 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let detours = controls.map(|control| control.detours.take().unwrap());
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || carry(&detours, &stopped));
        Self { stop, thread: Some(thread) }
    }

    /// Packets that went each way.
    fn finish(mut self) -> [usize; 2] {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Shuttle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn carry(detours: &[DetourSockets; 2], stopped: &AtomicBool) -> [usize; 2] {
    let mut buffer = vec![0; detour::BUFFER_LEN];
    let mut carried = [0; 2];
    while !stopped.load(Ordering::Relaxed) {
        let all = detours.iter().flat_map(DetourSockets::iter);
        let mut fds: Vec<_> = all.map(|end| PollFd::new(end, PollFlags::IN)).collect();
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 })).unwrap();
        for (number, (from, to)) in [(0, 1), (1, 0)].into_iter().enumerate() {
            for end in detours[from].iter() {
                while let Ok(Some(datagram)) = end.receive(&mut buffer) {
                    let run = Run::parse(datagram).unwrap();
                    carried[number] += run.bytes.len().div_ceil(usize::from(run.segment_len));
                    // Lost on the way, as everywhere.
                    let _ = detours[to].send(0, run.segment_len, run.bytes);
                }
            }
        }
    }
    carried
}

fn world(knows_endpoint: [bool; 2]) -> World {
    let options = TunnelOptions { knows_endpoint, ..TunnelOptions::default() };
    World::new([Implementation::Millrace; 2], &options)
}

fn key_bytes(base64: &str) -> [u8; 32] {
    BASE64_STANDARD.decode(base64).unwrap().try_into().unwrap()
}

fn own_key(gateway: &Gateway) -> [u8; 32] {
    let shown = format!("wg show {} public-key", gateway.interface());
    key_bytes(gateway.namespace().exec(&shown).unwrap().trim())
}

fn udp_in(namespace: &Namespace, address: impl Into<IpAddr>) -> UdpSocket {
    let address = SocketAddr::new(address.into(), 0);
    let socket = namespace.run(|| UdpSocket::bind(address)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

fn connected(gateway: &Gateway) -> bool {
    fact(gateway, "control").unwrap().starts_with("connected ")
}

#[test]
fn control_is_told_of_everything_and_answered() {
    let world = world([true; 2]);
    let (a, b) = (&world.tunnel.a, &world.tunnel.b);
    assert_eq!(fact(a, "control").as_deref(), Some("absent"));
    let mut control = Control::connect(a);
    assert!(connected(a));
    let Welcome { public_key, interface, ifindex, listen_port, mtu, fwmark, .. } =
        control.welcome.clone();
    assert_eq!(public_key, Some(PublicKey(own_key(a))));
    assert_eq!((interface.as_str(), listen_port, mtu, fwmark), (a.interface(), 51820, 1420, 0));
    let links = a.namespace().exec(&format!("ip -o link show dev {interface}")).unwrap();
    assert!(links.starts_with(&format!("{ifindex}:")), "{ifindex} in {links}");
    let peer = control.peers[&0].clone();
    assert_eq!(peer.public_key, PublicKey(own_key(b)));
    assert_eq!(peer.endpoint, Some(SocketAddr::new(world.site.b.wan_v4.into(), 51820)));
    let mut prefixes: Vec<_> = peer.allowed_ips.iter().map(ToString::to_string).collect();
    let mut expected = world.site.b.allowed_ips();
    expected.sort();
    prefixes.sort();
    assert_eq!(prefixes, expected);

    box_keys_are_those_of_nacl(&mut control, a, b);
    // A's data plane never talked to B; asked again it has nothing to do, and a slot may be nobody's.
    assert_eq!(fact(a, "connects").as_deref(), Some("0 0 0"));
    assert!(control.client.connect_now(0).unwrap());
    control.wait("a handshake", |control| control.observed().handshake_ns > 0);
    assert!(control.client.connect_now(0).unwrap());
    assert!(control.client.connect_now(9).unwrap());
    wait_for("counts", LIMIT, || (fact(a, "connects")? == "1 2 0").then_some(())).unwrap();

    let stranger = random_key().unwrap();
    a.set(&format!("peer {stranger} allowed-ips 10.9.0.0/24 persistent-keepalive 7")).unwrap();
    control.wait("a second peer", |control| control.peers.len() == 2);
    assert_eq!(control.peers[&1].keepalive_s, 7);
    assert!(control.endpoints.write(1, &Endpoint { kind: 3, ..Endpoint::default() }));
    a.set(&format!("peer {stranger} remove")).unwrap();
    control.wait("its end", |control| control.peers.len() == 1);
    a.set("fwmark 7").unwrap();
    control.wait("the mark", |control| control.others.contains(&ToControl::Fwmark { mark: 7 }));
    let new = KeyPair::generate().unwrap();
    a.namespace()
        .exec_with_input(&format!("wg set {interface} private-key /dev/stdin"), &new.private)
        .unwrap();
    let public_key = Some(PublicKey(key_bytes(&new.public)));
    control
        .wait("the new key", |control| control.others.contains(&ToControl::OwnKey { public_key }));
    // Nobody cleaned that slot, so the data plane does when it is alone: its next peer roams.
    let lines = control.endpoints;
    assert_eq!(lines.read(1).unwrap().kind, 3);
    drop(control.client);
    wait_for("a clean line", LIMIT, || (lines.read(1)?.kind == 0).then_some(())).unwrap();
    wait_for("control to be absent", LIMIT, || (!connected(a)).then_some(())).unwrap();
    world.finish();
}

fn box_keys_are_those_of_nacl(control: &mut Control, a: &Gateway, b: &Gateway) {
    use crypto_box::aead::Aead;
    use crypto_secretbox::{KeyInit, XSalsa20Poly1305};
    let theirs = crypto_box::SecretKey::from(key_bytes(&b.options.private_key));
    let nonce = [9; 24];
    let sealed = crypto_box::SalsaBox::new(&own_key(a).into(), &theirs)
        .encrypt(&nonce.into(), &b"who is there"[..])
        .unwrap();
    let key = control.box_key(1, PublicKey(own_key(b))).unwrap();
    let opened = XSalsa20Poly1305::new(&key.into()).decrypt(&nonce.into(), &sealed[..]).unwrap();
    assert_eq!(opened, b"who is there");
    assert_eq!(control.box_key(2, PublicKey([0; 32])), Err(BoxKeyRefusal::LowOrder));
}

#[test]
fn what_is_for_control_comes_to_it_and_nothing_else_does() {
    let world = world([true; 2]);
    let (a, site) = (&world.tunnel.a, &world.site);
    let outside = udp_in(&site.b.gateway, site.b.wan_v4);
    let port = SocketAddr::new(site.a.wan_v4.into(), 51820);
    outside.send_to(&disco_shaped(0), port).unwrap();
    wait_for("a drop by name", LIMIT, || (drop_count(a, "control_absent") == 1).then_some(()))
        .unwrap();

    let old = Control::connect(a);
    exchange(&old, &outside, port, 1);
    let mut new = Control::connect(a);
    assert!(matches!(old.client_end(), LinkError::Closed));
    exchange(&new, &outside, port, 2);
    let outside_v6 = udp_in(&site.b.gateway, site.b.wan_v6);
    exchange(&new, &outside_v6, SocketAddr::new(site.a.wan_v6.into(), 51820), 3);

    // What is WireGuard's is not control's, and what control sees says so.
    world.connect();
    let mut nothing = [0; 2048];
    new.udp.set_nonblocking(true).unwrap();
    assert!(new.udp.recv(&mut nothing).is_err(), "a WireGuard message came to control");
    new.wait("the peer to be active", |control| {
        control.others.contains(&ToControl::Active { slot: 0 })
    });
    let b_port = SocketAddr::new(site.b.wan_v4.into(), 51820);
    new.wait("the line of an answered peer", |control| {
        let line = control.observed();
        line.remote() == Some(b_port)
            && line.kind == EndpointKind::Direct as u8
            && line.handshake_ns > 0
            && line.received_ns >= line.handshake_ns
            && line.sent_bytes > 0
            && line.unanswered_ns == 0
    });
    let monotonic = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now_ns = monotonic.tv_sec as u64 * 1_000_000_000 + monotonic.tv_nsec as u64;
    let age = Duration::from_nanos(now_ns.checked_sub(new.observed().received_ns).unwrap());
    assert!(age < LIMIT, "{age:?}");
    drop(new);
    outside.send_to(&disco_shaped(4), port).unwrap();
    wait_for("a drop by name", LIMIT, || (drop_count(a, "control_absent") == 2).then_some(()))
        .unwrap();
    world.finish();
}

/// A datagram from outside, and an answer that leaves from the port.
fn exchange(control: &Control, outside: &UdpSocket, port: SocketAddr, number: u8) {
    outside.send_to(&disco_shaped(number), port).unwrap();
    let mut buffer = [0; 2048];
    let (len, source) =
        wait_for("a datagram for control", LIMIT, || control.udp.recv_from(&mut buffer).ok())
            .unwrap();
    assert_eq!(buffer[..len], disco_shaped(number));
    control.udp.send_to(&disco_shaped(number ^ 0x80), source).unwrap();
    let (len, from) = outside.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], from), (&*disco_shaped(number ^ 0x80), port));
}

impl Control {
    /// How the link ended, after what was still said.
    fn client_end(mut self) -> LinkError {
        wait_for("the end of a link", LIMIT, || self.client.receive().err()).unwrap()
    }
}

#[test]
fn a_tunnel_lives_by_detours_alone() {
    let mut world = world([false; 2]);
    world.be_seen_outside();
    // Nothing may even try.
    let rules = "table inet only {\nchain forward {\ntype filter hook forward priority 0;\n\
                 udp dport 51820 counter drop\n}\n}\n";
    world.site.router.exec_with_input("nft -f -", rules).unwrap();
    let mut controls = [Control::connect(&world.tunnel.a), Control::connect(&world.tunnel.b)];
    // A is told; B answers where it is spoken to.
    controls[0].write(EndpointKind::Detour);
    let [a, b] = &mut controls;
    let shuttle = Shuttle::start([a, b]);
    world.connect();
    world.ping(&world.site.a, &world.site.b, 10);
    world.ping(&world.site.b, &world.site.a, 10);
    for (from, to) in [(&world.site.a, &world.site.b), (&world.site.b, &world.site.a)] {
        let iperf = Iperf { bytes: Some(24 << 20), ..Iperf::default() };
        let report = iperf.run(world.lab.directory(), &to.host, to.host_v4, &from.host).unwrap();
        assert!(report.bytes > 6 << 20, "{report:?}");
    }
    for (gateway, control) in [&world.tunnel.a, &world.tunnel.b].into_iter().zip(&mut controls) {
        assert_eq!(gateway.peer().unwrap().endpoint, None, "100:: means nothing to anybody");
        assert_eq!(facts(gateway, "path"), ["detour"]);
        control.wait("the line of a detoured peer", |control| {
            let line = control.observed();
            (line.kind, line.remote(), line.unanswered_ns) == (EndpointKind::Detour as u8, None, 0)
        });
    }

    // Without its interface a tunnel has no routes: what connections still say, and pings before the
    // routes are back, must not leave in the clear by the default route.
    for gateway in [&world.site.a.gateway, &world.site.b.gateway] {
        gateway.ip(["route add blackhole 10.0.0.0/8", "route add blackhole fd00::/8"]).unwrap();
    }

    // New keys come the same way.
    let handshakes: Vec<_> =
        controls.iter().map(|control| control.observed().handshake_ns).collect();
    for state in ["down", "up"] {
        let line = format!("link set {} {state}", world.tunnel.a.interface());
        world.tunnel.a.namespace().ip([line]).unwrap();
    }
    world.ping_again(&world.site.a, &world.site.b);
    for (control, before) in controls.iter_mut().zip(handshakes) {
        control.wait("a new handshake", |control| control.observed().handshake_ns > before);
    }

    // Killed and started again, it has new sockets and maps, and a new session by the same way. Until
    // control sees the end, the port is still taken.
    let packets = shuttle.finish();
    assert!(packets.into_iter().all(|packets| packets > 4000), "{packets:?}");
    let [a, b] = controls;
    let end = thread::spawn(move || b.client_end());
    world.tunnel.b.restart().unwrap();
    assert!(matches!(end.join().unwrap(), LinkError::Closed));
    let mut again = Control::connect(&world.tunnel.b);
    drop(a);
    let mut a = Control::connect(&world.tunnel.a);
    again.write(EndpointKind::Detour);
    let shuttle = Shuttle::start([&mut a, &mut again]);
    world.ping_again(&world.site.b, &world.site.a);
    world.ping_again(&world.site.a, &world.site.b);
    shuttle.finish();
    let counted = world.site.router.exec("nft list ruleset").unwrap();
    assert!(counted.contains("counter packets 0 "), "{counted}");
    world.finish();
}

/// Bytes of the longest outer packet that the router of [`a_path_for_short_packets_is_used_for_them`]
/// lets through, and of what fits into it: less 60 for headers, a multiple of 16.
const PATH_MTU: u16 = 1400;
const INNER_MTU: usize = 1328;

/// Senders hear how long packets may be and adapt; what may be cut goes by the detour, whole.
#[test]
fn a_path_for_short_packets_is_used_for_them() {
    let world = world([true; 2]);
    let rules = format!(
        "table inet only {{\nchain forward {{\ntype filter hook forward priority 0;\n\
         ip length > {PATH_MTU} counter drop\n}}\n}}\n"
    );
    world.site.router.exec_with_input("nft -f -", &rules).unwrap();
    // veth would carry whole runs, which the rule takes for long packets.
    for gateway in [&world.site.a.gateway, &world.site.b.gateway] {
        gateway.exec("ethtool -K wan tso off gso off tx-udp-segmentation off").unwrap();
    }
    world.connect();
    let mut controls = [Control::connect(&world.tunnel.a), Control::connect(&world.tunnel.b)];
    for (control, far) in controls.iter_mut().zip([&world.site.b, &world.site.a]) {
        let mut line = Endpoint { kind: EndpointKind::Direct as u8, ..Endpoint::default() };
        line.set_remote(SocketAddr::new(far.wan_v4.into(), 51820));
        line.path_mtu = PATH_MTU;
        assert!(control.endpoints.write(0, &line));
    }
    let (a, host, far) = (&world.tunnel.a, &world.site.a.host, &world.site.b);
    let ping = |options: &str, len: usize, to: &dyn std::fmt::Display| {
        let line = format!("ping -n -c2 -i0.2 -W1 {options} -s {len} {to}");
        host.exec(&line).map_err(|error| error.to_string())
    };
    // 28 and 48 bytes are the headers of an echo request. First one that a router might cut, before
    // the host learns to cut it.
    let [one, other] = &mut controls;
    let shuttle = Shuttle::start([one, other]);
    ping("-M dont", 1420 - 28, &far.host_v4).unwrap();
    let carried = shuttle.finish();
    assert!(carried[0] >= 2 && carried[1] >= 2, "{carried:?}");
    ping("-M do", INNER_MTU - 28, &far.host_v4).unwrap();
    ping("-M do", INNER_MTU - 48, &far.host_v6).unwrap();
    let heard = ping("-M do", INNER_MTU - 27, &far.host_v4).unwrap_err();
    assert!(heard.contains(&format!("Frag needed and DF set (mtu = {INNER_MTU})")), "{heard}");
    let heard = ping("-M do", INNER_MTU - 47, &far.host_v6).unwrap_err();
    assert!(heard.contains(&format!("Packet too big: mtu={INNER_MTU}")), "{heard}");
    assert!(drop_count(a, "tx_too_long") >= 2);

    // TCP learns it by itself, both ways and in both families.
    let iperf = Iperf { bytes: Some(24 << 20), ..Iperf::default() };
    let to: [IpAddr; 2] = [far.host_v4.into(), far.host_v6.into()];
    for (to, reverse) in [(to[0], false), (to[0], true), (to[1], false)] {
        let iperf = Iperf { reverse, ..iperf.clone() };
        let report = iperf.run(world.lab.directory(), &far.host, to, host).unwrap();
        assert!(report.bytes > 6 << 20, "{report:?}");
    }

    let rules = world.site.router.exec("nft list ruleset").unwrap();
    assert!(rules.contains("counter packets 0 "), "a long packet was sent all the same: {rules}");
    world.finish();
}

#[test]
fn what_nobody_carries_is_dropped_by_name() {
    let world = world([false; 2]);
    world.be_seen_outside();
    let a = &world.tunnel.a;
    let mut controls = [Control::connect(a), Control::connect(&world.tunnel.b)];
    controls[0].write(EndpointKind::Detour);
    let [one, other] = &mut controls;
    let shuttle = Shuttle::start([one, other]);
    world.connect();
    shuttle.finish();
    // Connected, and deaf: the queue fills.
    let host = &world.site.a.host;
    let flood = format!("ping -l 6000 -c 6000 -s 1300 -w1 -q {}", world.site.b.host_v4);
    let _ = host.exec(&flood);
    assert!(drop_count(a, "detour_full") > 0, "{:?}", facts(a, "drop"));
    let path = link::path(a.interface());
    drop(controls);
    wait_for("control to be absent", LIMIT, || (!connected(a)).then_some(())).unwrap();
    let _ = host.exec(&format!("ping -c3 -i0.2 -W1 {}", world.site.b.host_v4));
    assert!(drop_count(a, "detour_gone") >= 3, "{:?}", facts(a, "drop"));
    assert_eq!(drop_count(a, "tx_socket_error"), 0);
    // Whoever says nothing sensible changes nothing.
    let client = LinkClient::connect(&path).unwrap();
    assert!(client.want_box_key(0, PublicKey([1; 32])).unwrap());
    drop(client);
    wait_for("control to be absent", LIMIT, || (!connected(a)).then_some(())).unwrap();
    // Bytes that are no run, and a slot that cannot be.
    let mut control = Control::connect(a);
    let detours = control.detours.take().unwrap();
    detours.send(1 << 14, 40, &[4; 40]).unwrap();
    detours.slow.send(0, 41, &[1; 40]).unwrap();
    wait_for("drops by name", LIMIT, || (drop_count(a, "detour_invalid") == 2).then_some(()))
        .unwrap();
    world.finish();
}

#[test]
fn control_comes_and_goes_and_traffic_notices_nothing() {
    let world = world([true; 2]);
    world.connect();
    let b_port = SocketAddr::new(world.site.b.wan_v4.into(), 51820);
    thread::scope(|scope| {
        let pings = scope.spawn(|| {
            let ping = Ping { count: 300, interval_ms: 10, ..Ping::default() };
            ping.run(&world.site.a.host, world.site.b.host_v4).unwrap()
        });
        while !pings.is_finished() {
            let mut control = Control::connect(&world.tunnel.a);
            let mut line = Endpoint { kind: EndpointKind::Direct as u8, ..Endpoint::default() };
            let SocketAddr::V4(v4) = b_port else { unreachable!() };
            (line.family, line.port) = (4, v4.port());
            line.address[..4].copy_from_slice(&v4.ip().octets());
            assert!(control.endpoints.write(0, &line));
            thread::sleep(Duration::from_millis(100));
        }
        let report = pings.join().unwrap();
        assert!(report.complete(), "{report:?}");
    });
    world.finish();
}

/// The address of a detour on the wire is an address as any other.
#[test]
fn a_packet_from_the_discard_prefix_becomes_no_detour() {
    let options = TunnelOptions { outer_v6: true, ..TunnelOptions::default() };
    let world = World::new([Implementation::Millrace; 2], &options);
    let (a, b, site) = (&world.tunnel.a, &world.tunnel.b, &world.site);
    let mut control = Control::connect(a);
    // What detour(0) of A would be, but for the port.
    let discard: Ipv6Addr = "100::".parse().unwrap();
    site.b.gateway.ip([format!("addr add {discard}/128 dev wan nodad")]).unwrap();
    site.b
        .gateway
        .ip([format!("route replace {} via {} src {discard}", "2001:db8:1::/64", site.b.router_v6)])
        .unwrap();
    site.router.ip([format!("route add {discard}/128 via {} dev wan-b", site.b.wan_v6)]).unwrap();
    site.a.gateway.ip([format!("route replace {discard}/128 via {}", site.a.router_v6)]).unwrap();
    let ping = format!("ping -c1 -W1 {}", site.a.host_v4);
    wait_for("a ping", CONNECT, || site.b.host.exec(&ping).ok()).unwrap();
    let seen = a.peer().unwrap().endpoint;
    assert_eq!(seen, Some(SocketAddr::new(discard.into(), 51820)), "B spoke from there");
    assert_eq!(facts(a, "path"), ["direct"]);
    world.ping(&site.a, &site.b, 3);
    control.wait("the line", |control| control.observed().kind == EndpointKind::Direct as u8);
    let mut buffer = vec![0; detour::BUFFER_LEN];
    for end in control.detours.as_ref().unwrap().iter() {
        assert!(end.receive(&mut buffer).unwrap().is_none());
    }
    assert_eq!(b.peers().unwrap().len(), 1);
    world.finish();
}

/// What the host's firewall drops is heard if it is short disco to the port, and nothing else is.
#[test]
fn disco_is_heard_past_the_host_s_firewall_within_bounds() {
    let world = world([true; 2]);
    let (a, site) = (&world.tunnel.a, &world.site);
    let rules = "table inet deaf {\nchain input {\ntype filter hook input priority 0;\n\
                 udp dport { 51820, 51821 } drop\n}\n}\n";
    site.a.gateway.exec_with_input("nft -f -", rules).unwrap();
    assert_eq!(fact(a, "past_firewall").as_deref(), Some("on"));
    let mut control = Control::connect(a);
    let mut almost = disco_shaped(7);
    almost[5] ^= 1;
    let mut long = disco_shaped(8);
    long.resize(400, 8);
    for (own, theirs) in [
        (IpAddr::from(site.a.wan_v4), IpAddr::from(site.b.wan_v4)),
        (site.a.wan_v6.into(), site.b.wan_v6.into()),
    ] {
        let outside = udp_in(&site.b.gateway, theirs);
        let to = SocketAddr::new(own, 51820);
        for (frame, port) in [(&almost, 51820), (&long, 51820), (&disco_shaped(9), 51821)] {
            outside.send_to(frame, SocketAddr::new(own, port)).unwrap();
        }
        outside.send_to(&disco_shaped(1), to).unwrap();
        control.wait("a frame", |control| {
            control.others.iter().any(|other| matches!(other, ToControl::Heard(_)))
        });
        let from = outside.local_addr().unwrap();
        let heard = control.others.iter().position(|other| matches!(other, ToControl::Heard(_)));
        let ToControl::Heard(heard) = control.others.swap_remove(heard.unwrap()) else { panic!() };
        assert_eq!((heard.from, heard.to, &*heard.frame), (from, to, &*disco_shaped(1)));
        assert_ne!(heard.ifindex, 0);
    }
    let mut nothing = [0; 2048];
    assert!(control.udp.recv(&mut nothing).is_err(), "the firewall drops it");

    // Faster than it may be: counted, and those of a turn are told.
    let outside = udp_in(&site.b.gateway, site.b.wan_v4);
    let port = SocketAddr::new(site.a.wan_v4.into(), 51820);
    let mut sent = 0_u64;
    wait_for("a drop by name", LIMIT, || {
        (0..500).for_each(|_| _ = outside.send_to(&disco_shaped(2), port));
        sent += 500;
        (drop_count(a, "heard_too_fast") > 0).then_some(())
    })
    .unwrap();
    let mut heard = 0;
    control.wait("all frames, told or counted", |control| {
        control.others.retain(|other| {
            let is = matches!(other, ToControl::Heard(_));
            heard += u64::from(is);
            !is
        });
        heard + drop_count(a, "heard_too_fast") == sent
    });
    assert!(heard >= 32, "{heard} of {sent}");
    assert_eq!(drop_count(a, "control_absent"), 0);
    drop(control);
    world.finish();
}
