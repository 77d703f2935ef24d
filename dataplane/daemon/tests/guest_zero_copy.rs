//! AF_XDP zero-copy for real: our data plane inside a QEMU guest, on cards whose drivers do it, with
//! that kernel's own WireGuard as the peer.
//!
//! ```text
//!  guest, root namespace: millrace on eth1 ── tap ── bridge ── tap ── eth0: wg0 .. guest, namespace `peer`
//! ```
//! The bridge is in a namespace of the lab, where every frame is captured. For the test of a device
//! that stalls, a hub inside QEMU is in the place of taps and bridge: it takes nothing from a card
//! while the other one on it is down. The guest's CPU is software, so this proves function and no
//! speed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use millrace_lab::{
    Capture, Card, Guest, GuestOptions, InnerPrefix, Lab, Marker, Namespace, Result, Wire,
    keys::{KeyPair, random_key},
};

/// For things that happen at once, on a slow guest on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// igb takes a second to attach and then has no carrier for a moment; after a failure the data
/// plane waits up to 30 s before it tries again.
const ATTACHED: Duration = Duration::from_secs(40);

/// How many peers there may be until both queues have had packets: chance puts each flow in one of
/// two, and all after the first in the same once in 262,144 runs.
const PEERS_MAX: u32 = 20;

/// With so many flows, chance leaves one of two queues of four empty once in 500 times. Then they are
/// others.
const PEERS_FOR_FOUR_QUEUES: u32 = 24;

/// The guest with both ends of the tunnel in it. Fields are dropped in this order.
struct World {
    guest: Guest,
    card: Card,
    stalled: bool,
    /// None behind a hub.
    capture: Option<Capture>,
    keys: KeyPair,
    peers: u32,
    inside: InnerPrefix,
    marker: Marker,
    _outside: Namespace,
    _lab: Lab,
}

impl World {
    /// `queues`: of the tap behind eth1, and so of a virtio card; igb has its own.
    fn new(card: Card, queues: u8) -> Result<Self> {
        let lab = Lab::new()?;
        let outside = lab.namespace("outside")?;
        let multi = if queues > 1 { "multi_queue" } else { "" };
        outside.ip([
            "link add bridge type bridge".to_owned(),
            "tuntap add tap0 mode tap".into(),
            format!("tuntap add tap1 mode tap {multi}"),
            "link set tap0 master bridge up".into(),
            "link set tap1 master bridge up".into(),
            "link set bridge up".into(),
        ])?;
        let capture = Capture::start(&lab, &outside)?;
        let tap = |number, queues| Wire::Tap { name: format!("tap{number}"), queues };
        Self::boot(card, vec![tap(0, 1), tap(1, queues)], Some(capture), outside, lab)
    }

    /// Both cards on one hub.
    fn behind_hub(card: Card) -> Result<Self> {
        let lab = Lab::new()?;
        let outside = lab.namespace("outside")?;
        Self::boot(card, vec![Wire::Hub(0), Wire::Hub(0)], None, outside, lab)
    }

    fn boot(
        card: Card,
        wires: Vec<Wire>,
        capture: Option<Capture>,
        outside: Namespace,
        lab: Lab,
    ) -> Result<Self> {
        let options = GuestOptions::new(card, wires)
            .program("millrace-probe")?
            .program("millrace-dataplane")?;
        let mut guest = Guest::boot(&lab, &outside, "guest", &options)?;
        println!("{card:?} on Linux {}", guest.kernel());
        let keys = KeyPair::generate()?;
        let (inside, marker) = (InnerPrefix::random()?, Marker::random()?);
        guest.run(&setup(card, &keys, inside))?;
        let (stalled, peers) = (false, 0);
        let (_outside, _lab) = (outside, lab);
        Ok(Self { guest, card, stalled, capture, keys, peers, inside, marker, _outside, _lab })
    }

    /// Starts the data plane and waits until it receives and sends with zero-copy.
    fn start(&mut self) -> Result<()> {
        self.guest.run(
            "cd /tmp; millrace-dataplane --config /etc/millrace.toml >> /tmp/millrace.log 2>&1 &
             echo $! > /tmp/millrace.pid",
        )?;
        self.guest.wait_until("the data plane", SOON, "millrace-probe uapi mr0 >/dev/null")?;
        self.wait_for_zero_copy()
    }

    fn wait_for_zero_copy(&mut self) -> Result<()> {
        let script = "millrace-probe uapi mr0 > /tmp/uapi; cat /tmp/uapi /tmp/millrace.log
                      grep -q '^mr_receive=xdp-zerocopy$' /tmp/uapi &&
                      grep -q '^mr_transmit=xdp-zerocopy$' /tmp/uapi";
        self.guest.wait_until("zero-copy both ways", ATTACHED, script)
    }

    /// One line of the data plane's status, without its key.
    fn fact(&mut self, key: &str) -> Result<String> {
        self.guest.run(&format!("millrace-probe uapi mr0 | sed -n 's/^mr_{key}=//p'"))
    }

    /// Frames received and sent through AF_XDP.
    fn frames(&mut self) -> Result<[u64; 2]> {
        let text = self.fact("xdp_frames")?;
        let mut numbers = text.split_whitespace().map(|number| number.parse().unwrap());
        Ok([numbers.next().unwrap(), numbers.next().unwrap()])
    }

    /// Adds the kernel's next WireGuard device, at its own outer address and so in its own flow.
    fn add_peer(&mut self) -> Result<u32> {
        self.peers += 1;
        let n = self.peers;
        let (keys, preshared_key) = (KeyPair::generate()?, random_key()?);
        let (private, public, ours) = (&keys.private, &keys.public, &self.keys.public);
        self.guest.run(&format!(
            "umask 077; echo {private} > /tmp/key; echo {preshared_key} > /tmp/psk
             peer() {{ ip netns exec peer \"$@\"; }}
             peer ip addr add {outer}/16 dev eth0
             peer ip addr add fd09::{outer_v6}/64 dev eth0 nodad
             peer ip rule add fwmark {n} table {table}
             peer ip route add 10.9.0.0/16 dev eth0 src {outer} table {table}
             peer ip link add wg{n} type wireguard
             peer wg set wg{n} private-key /tmp/key listen-port {port} fwmark {n} peer {ours} \\
                preshared-key /tmp/psk endpoint 10.9.0.1:51820 allowed-ips 10.77.0.1/32,{inside}::1/128
             peer ip link set wg{n} up
             peer ip addr add 10.77.{n}.2/32 dev wg{n}; peer ip addr add {inside}:{n}::2/128 dev wg{n} nodad
             wg set mr0 peer {public} preshared-key /tmp/psk endpoint {outer}:{port} \\
                allowed-ips 10.77.{n}.0/24,{inside}:{n}::/64
             ip route replace 10.77.{n}.0/24 dev mr0; ip route replace {inside}:{n}::/64 dev mr0
             # Which device answers millrace depends on the address that was asked.
             peer ip rule add from 10.77.{n}.2 table {back}; peer ip -6 rule add from {inside}:{n}::2 table {back}
             peer ip route add 10.77.0.1/32 dev wg{n} table {back}
             peer ip -6 route add {inside}::1/128 dev wg{n} table {back}
             rm /tmp/key /tmp/psk",
            inside = self.inside,
            outer = outer_v4(n),
            outer_v6 = 10 + n,
            port = 51820 + n,
            table = 100 + n,
            back = 200 + n,
        ))?;
        Ok(n)
    }

    /// A queue of virtio-net was seen to stand still from its first frame on, told again and again that
    /// there are some: once in twenty runs on a busy machine. What is lost then must be told, and the
    /// next attempt must do; that once.
    fn ping(&mut self, n: u32) -> Result<()> {
        let what = format!("a ping of peer {n}");
        self.guest.wait_until(&what, SOON, &format!("ping -c 1 -W 1 10.77.{n}.2"))?;
        let may_stall = self.card == Card::Virtio && !self.stalled && self.fact("note")?.is_empty();
        let line = format!("ping -q -c 5 -i 0.2 -W 2 10.77.{n}.2 || true");
        let mut all = self.guest.run(&line)?;
        if may_stall && !all.contains(" 0% packet loss") {
            self.stalled = true;
            let told =
                "millrace-probe uapi mr0 > /tmp/uapi; grep '^mr_[rtn]' /tmp/uapi; ethtool -S eth1
                        grep -q '^mr_note=AF_XDP transmit rests: the device did not' /tmp/uapi";
            self.guest.wait_until("a stall that explains lost pings", SOON, told)?;
            println!("stalled with {n} peers: {all}");
            self.wait_for_zero_copy()?;
            all = self.guest.run(&line)?;
        }
        assert!(all.contains(" 0% packet loss"), "{all}");
        Ok(())
    }

    /// The kernel goes on over IPv6 outside, and millrace follows it.
    fn move_to_ipv6(&mut self, n: u32) -> Result<()> {
        let ours = &self.keys.public;
        self.guest.run(&format!(
            "ip netns exec peer wg set wg{n} peer {ours} endpoint [fd09::1]:51820"
        ))?;
        let ping = format!("ip netns exec peer ping -c 1 -W 1 -I 10.77.{n}.2 10.77.0.1");
        self.guest.wait_until("a ping by the kernel over IPv6", SOON, &ping)?;
        let endpoints = self.guest.run("wg show mr0 endpoints")?;
        assert!(endpoints.contains(&format!("[fd09::{}]:{}", 10 + n, 51820 + n)), "{endpoints}");
        Ok(())
    }

    /// Packets that each receive queue of eth1 has had (virtio: has given to AF_XDP).
    fn queue_packets(&mut self) -> Result<Vec<u64>> {
        let text = self.guest.run(
            "ethtool -S eth1 | sed -nE 's/^ *(rx_queue_[0-9]_packets|rx[0-9]_xdp_redirects): //p'",
        )?;
        Ok(text.split_whitespace().map(|number| number.parse().unwrap()).collect())
    }

    /// Adds peers, each in its own flow, until every queue of eth1 has had some packets.
    fn fill_queues(&mut self) -> Result<Vec<u64>> {
        let before = self.queue_packets()?;
        let mut packets = before.clone();
        while packets.iter().zip(&before).any(|(now, before)| *now < before + 5) {
            assert!(self.peers < PEERS_MAX, "a queue stays silent: {before:?} {packets:?}");
            let next = self.add_peer()?;
            self.ping(next)?;
            packets = self.queue_packets()?;
        }
        println!("{} peers, packets by queue {packets:?}", self.peers);
        Ok(packets)
    }

    fn every_length(&mut self, address: &str) -> Result<()> {
        let log = "/tmp/echo";
        self.guest
            .run(&format!("ip netns exec peer millrace-probe echo {address} > {log} 2>&1 &"))?;
        self.guest.wait_until("the echo", SOON, &format!("grep echoing {log}"))?;
        let marker = self.marker.hex();
        let line = format!("millrace-probe lengths {address} 0 1500 {marker}");
        let said = self.guest.run_within(Duration::from_secs(100), &line)?;
        println!("{address}: {said}");
        assert!(said.starts_with("passed 1501 "), "{said}");
        Ok(())
    }

    /// What the guest's kernel must not have said, and what must not have been seen outside.
    fn finish(mut self) -> Result<()> {
        println!("{}", self.guest.run("millrace-probe uapi mr0 | grep '^mr_[rtq]'")?);
        let complaints = "dmesg | grep -E 'transmit queue|Tx Unit Hang|BUG:|WARNING:|Call Trace'";
        assert!(!self.guest.succeeds(complaints)?, "{}", self.guest.run("dmesg")?);
        let inner = [
            IpAddr::from([10, 77, 0, 1]),
            IpAddr::from([10, 77, 1, 2]),
            self.inside.address(0, 1).into(),
            self.inside.address(1, 2).into(),
        ];
        let Some(capture) = self.capture else { return Ok(()) };
        let report = capture.finish(&[self.marker], &inner)?;
        assert_eq!(report.missed, 0, "tcpdump missed frames");
        println!("{} packets outside, none shows the inside", report.packets);
        report.check()
    }
}

/// A peer's address outside, in 10.9.0.0/16. igb's hash of two addresses is linear in their bits: with
/// one key of 32 it puts addresses in a row into one queue. These are of rank 14, not 5.
fn outer_v4(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a09_0000 | (n * 25_173) & 0xffff)
}

/// Both ends of the guest, without tunnels: the data plane's configuration has no peer.
fn setup(card: Card, keys: &KeyPair, inside: InnerPrefix) -> String {
    let driver = if card == Card::Virtio { "virtio_net" } else { "igb" };
    // By default igb looks at addresses only; every peer has its own.
    let private = &keys.private;
    format!(
        "load {driver} wireguard tun
         sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
         ethtool -L eth1 combined 2 2>/dev/null || true
         ip netns add peer
         ip link set eth0 netns peer
         ip -n peer link set lo up
         ip -n peer link set eth0 up
         ip -n peer addr add 10.9.0.2/16 dev eth0
         ip addr add 10.9.0.1/16 dev eth1
         ip addr add fd09::1/64 dev eth1 nodad
         ip link set eth1 up
         umask 077; echo {private} > /etc/millrace.key
         cat > /etc/millrace.toml <<'END'
schema = 1
[interface]
name = \"mr0\"
private_key_file = \"/etc/millrace.key\"
listen_port = 51820
address = [\"10.77.0.1/24\", \"{inside}::1/64\"]
mtu = 1420
[dataplane]
receive = \"xdp-zerocopy\"
transmit = \"xdp-zerocopy\"
device = [\"eth1\"]
END"
    )
}

fn zero_copy_carries_everything(card: Card) -> Result<()> {
    let mut world = World::new(card, if card == Card::Virtio { 2 } else { 1 })?;
    world.start()?;
    println!("{} queues: {}", world.fact("queues")?, world.fact("receive_reason")?);
    let first = world.add_peer()?;
    world.ping(first)?;
    // After a stall, which the first ping may have met and borne.
    world.wait_for_zero_copy()?;

    let before = world.frames()?;
    world.every_length("10.77.1.2:7")?;
    world.move_to_ipv6(first)?;
    world.every_length(&format!("[{}]:8", world.inside.address(1, 2)))?;
    let after = world.frames()?;
    // Nearly all of them: the packets before a look-up of the next hop go by the socket.
    for (way, i) in [("received", 0), ("sent", 1)] {
        let frames = after[i] - before[i];
        let reason = world.fact("transmit_reason")?;
        assert!(
            frames >= 2 * 1400,
            "{way} {frames} frames through AF_XDP of 3002; transmit: {reason}"
        );
    }

    world.guest.run("ip netns exec peer iperf3 -s -D --forceflush")?;
    for reverse in ["", "-R"] {
        let line = format!("iperf3 -c 10.77.1.2 -t 2 --connect-timeout 5000 {reverse}");
        let said = world.guest.run(&line)?;
        println!("{}", said.lines().filter(|line| line.contains("receiver")).collect::<String>());
    }

    assert_eq!(world.fill_queues()?.len(), 2);
    for n in 1..=world.peers {
        world.ping(n)?;
    }

    world.guest.run("ip link set eth1 down")?;
    world.guest.run("ip link set eth1 up; ip addr replace fd09::1/64 dev eth1 nodad")?;
    world.wait_for_zero_copy()?;
    world.ping(first)?;

    world.guest.run("wg showconf mr0 > /tmp/mr0.conf")?;
    let pid = world.guest.run("cat /tmp/millrace.pid")?;
    world.guest.run(&format!("kill -9 {pid}"))?;
    let gone = "! ip link show dev eth1 | grep -q xdp";
    world.guest.wait_until("XDP to be gone", SOON, gone)?;
    let reach = "ip netns exec peer ping -c 1 -W 1 10.9.0.1";
    world.guest.wait_until("a host that is reachable without its data plane", SOON, reach)?;
    world.start()?;
    let restored = "wg setconf mr0 /tmp/mr0.conf
        for n in $(seq 1 $peers); do
          ip route replace 10.77.$n.0/24 dev mr0; ip route replace $inside:$n::/64 dev mr0
        done";
    world.guest.run(&format!("peers={}; inside={}\n{restored}", world.peers, world.inside))?;
    world.ping(first)?;
    let frames = world.frames()?;
    // Six pings; the first go by the socket while the next hop is looked up.
    assert!(
        frames.iter().all(|&frames| frames >= 3),
        "{frames:?} through AF_XDP after the restart"
    );
    world.finish()
}

#[test]
fn virtio() -> Result<()> {
    zero_copy_carries_everything(Card::Virtio)
}

#[test]
fn igb() -> Result<()> {
    zero_copy_carries_everything(Card::Igb)
}

/// virtio-net adds queue pairs when XDP is attached to a card that has some unused: one a CPU. What
/// is sent through those was seen to stall, and what arrives there is lost without a socket on it.
#[test]
fn queues_that_attaching_adds_receive_and_never_send() -> Result<()> {
    let mut world = World::new(Card::Virtio, 4)?;
    let channels = "ethtool -l eth1 | grep Combined | tail -1 | tr -dc 0-9";
    assert_eq!(world.guest.run(channels)?, "2", "two of the card's four are in use");
    world.start()?;
    println!("{} queues: {}", world.fact("queues")?, world.fact("receive_reason")?);
    assert_eq!(world.fact("queues")?, "4", "two more with XDP");
    let first = world.add_peer()?;
    world.ping(first)?;
    // After a stall, which the first ping may have met and borne.
    world.wait_for_zero_copy()?;
    for _ in 1..PEERS_FOR_FOUR_QUEUES {
        world.add_peer()?;
    }
    // The tap sends a flow to the queue that it last came from, so to the first two; but one that it
    // has not heard for three seconds goes to any of the four. So nobody answers. Each round has flows
    // of its own.
    world.guest.run("sysctl -qw net.ipv4.icmp_echo_ignore_all=1")?;
    let one_way = format!(
        "round=$(cat /tmp/round 2>/dev/null || echo 1); echo $((round + 1)) > /tmp/round
         for n in $(seq {PEERS_FOR_FOUR_QUEUES}); do
           ip netns exec peer wg set wg$n listen-port $((51820 + n + 100 * round))
           ip netns exec peer ping -q -c 3 -i 0.1 -W 1 -I 10.77.$n.2 10.77.0.1 > /dev/null &
         done; wait
         ethtool -S eth1 | grep -E 'rx[0-9]_xdp_redirects' | tee /tmp/queues
         [ $(grep -vc ': 0$' /tmp/queues) = 4 ]"
    );
    world.guest.wait_until("packets on each of four queues", ATTACHED, &one_way)?;
    println!("packets by queue {:?}", world.queue_packets()?);
    world.guest.run("sysctl -qw net.ipv4.icmp_echo_ignore_all=0")?;
    let before = world.frames()?;
    for n in 1..=world.peers {
        world.ping(n)?;
    }
    world.every_length("10.77.1.2:7")?;
    let after = world.frames()?;
    // Both ways on rings, whichever queue the packets came from.
    for way in [0, 1] {
        assert!(after[way] > before[way] + 1400, "{before:?} {after:?}");
    }
    assert_eq!(world.fact("transmit")?, "xdp-zerocopy", "{}", world.fact("transmit_reason")?);
    let kicks = world.guest.run("ethtool -S eth1 | sed -nE 's/^ *tx([0-9])_kicks: /\\1 /p'")?;
    println!("how often each queue was told to send: {kicks}");
    assert!(kicks.contains("2 0\n3 0"), "{kicks}");
    assert_eq!(world.fact("xdp_passed")?, "0", "no queue is without a socket");
    world.finish()
}

/// A card that takes frames and never says that they are sent.
#[test]
fn a_device_that_stalls_is_left_alone_for_a_while() -> Result<()> {
    let mut world = World::behind_hub(Card::Virtio)?;
    world.start()?;
    let first = world.add_peer()?;
    world.ping(first)?;
    // Nobody takes what eth1 sends, once eth0's 256 buffers are full. The carrier stays.
    world.guest.run("ip -n peer link set eth0 down")?;
    world.guest.run(
        "for n in $(seq 20); do ping -q -c 50 -i 0.02 -W 1 10.77.1.2 > /dev/null 2>&1 & done",
    )?;
    let stalled = "millrace-probe uapi mr0 > /tmp/uapi; grep '^mr_[rtn]' /tmp/uapi
                   grep -q '^mr_transmit_reason=the device did not complete' /tmp/uapi";
    world.guest.wait_until("the stall to be noticed", SOON, stalled)?;
    let note = world.fact("note")?;
    assert!(note.starts_with("AF_XDP transmit rests: the device did not complete"), "{note}");
    assert!(note.ends_with("again after 30 s or when the link was down"), "{note}");
    world
        .guest
        .run("ip -n peer link set eth0 up; ip -n peer addr add fd09::11/64 dev eth0 nodad")?;
    // It still receives on rings, and sends by socket.
    let by_socket = "millrace-probe uapi mr0 > /tmp/uapi
                     grep -q '^mr_receive=xdp-zerocopy$' /tmp/uapi &&
                     grep -q '^mr_transmit=gso$' /tmp/uapi";
    world.guest.wait_until("receive on rings, transmit by socket", SOON, by_socket)?;
    world.ping(first)?;
    world.wait_for_zero_copy()?;
    assert_eq!(world.fact("note")?, "");
    let before = world.frames()?;
    world.ping(first)?;
    let after = world.frames()?;
    // Six pings; the first go by the socket while the next hop is looked up.
    assert!(after[1] >= before[1] + 3, "{before:?} {after:?}");
    Ok(())
}
