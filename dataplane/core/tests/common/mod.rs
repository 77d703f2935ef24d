//! A world without sockets: devices, a wire between them with latency, loss, duplicates and
//! reordering, one virtual clock, and Eve, who records every datagram and checks what must hold for
//! each of them:
//!
//! * no counter is used twice under a key, and no key is used before it is confirmed;
//! * no inner address and no marker of ours is readable;
//! * the lengths of data messages are padded.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]
#![allow(dead_code, reason = "each test program uses its part of the world")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrayvec::ArrayVec;
use millrace_wg::data_header::DataHeader;
use millrace_wg::device::{Device, DeviceConfig, Output, PeerChange};
use millrace_wg::limits::{BATCH_PACKETS, DATA_HEADER_LEN, MTU_DEFAULT, TAG_LEN};
use millrace_wg::rx::{self, Opened, RxPacket};
use millrace_wg::secret::Secret;
use millrace_wg::time::{Clock, Instant};
use millrace_wg::timestamp::Tai64n;
use millrace_wg::tx::{Push, TxBatch};
use millrace_wg::vnet::VnetHdr;
use millrace_wg::{Drop, DropCounters, Endpoint, FastEvent, Peer, PublicKey, Shared};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;

/// Stands in every inner packet; Eve looks for it.
const MARKER: &[u8] = b"the marker that must stay inside";
/// 2023-11-14, where every world begins.
const WALL: Duration = Duration::from_secs(1_700_000_000);

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) nodes: Vec<Node>,
    pub(crate) wire: Wire,
    /// Everything that was ever sent.
    pub(crate) eve: Vec<Datagram>,
    pub(crate) rng: ChaCha8Rng,
    counters: BTreeSet<(usize, u32, u64)>,
    /// What arrives at the same moment arrives in the order of sending.
    order: u64,
    pub(crate) seed: u64,
}

#[derive(Clone, Copy)]
pub(crate) struct Wire {
    pub(crate) latency: Duration,
    /// Added at random, so that packets overtake each other.
    pub(crate) jitter: Duration,
    /// Of 100.
    pub(crate) loss: u32,
    pub(crate) duplicates: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Datagram {
    pub(crate) at: Instant,
    pub(crate) from: usize,
    pub(crate) source: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
    pub(crate) tos: u8,
}

impl Datagram {
    pub(crate) fn kind(&self) -> u8 {
        self.bytes[0]
    }

    pub(crate) fn is_data(&self) -> bool {
        self.kind() == 4
    }
}

pub(crate) struct Node {
    pub(crate) device: Device,
    pub(crate) shared: Arc<Shared>,
    pub(crate) drops: Arc<DropCounters>,
    pub(crate) address: SocketAddr,
    pub(crate) public: PublicKey,
    pub(crate) private: Secret,
    /// Inner packets that came out.
    pub(crate) inner: Vec<Vec<u8>>,
    /// What `handle_datagram` is told of the queue.
    pub(crate) waiting: usize,
    /// Added to the wall clock, in seconds.
    pub(crate) wall_error_secs: i64,
    /// What the daemon would have on disk.
    pub(crate) mark: Option<Tai64n>,
    /// Sessions that the device said are up.
    pub(crate) up: BTreeSet<u32>,
    batch: TxBatch,
    inbox: BTreeMap<(Instant, u64), Datagram>,
}

pub(crate) fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub(crate) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl World {
    /// A and B with each other as peers; only A knows where the other is.
    pub(crate) fn pair(seed: u64) -> Self {
        let mut world = Self::empty(seed, 2);
        world.introduce(A, B, None);
        world
    }

    /// A pair whose handshake is done: A was the initiator.
    pub(crate) fn connected(seed: u64) -> Self {
        let mut world = Self::pair(seed);
        world.send(A, B, 100);
        world.run_for(secs(1));
        assert_eq!(world.nodes[B].inner.len(), 1, "the handshake works");
        world.nodes[B].inner.clear();
        world
    }

    pub(crate) fn empty(seed: u64, nodes: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let nodes = (0..nodes).map(|place| Node::new(&mut rng, place)).collect();
        let latency = millis(10);
        Self {
            now: Instant::from_nanos(1_000_000_000),
            nodes,
            wire: Wire { latency, jitter: Duration::ZERO, loss: 0, duplicates: 0 },
            eve: Vec::new(),
            rng,
            counters: BTreeSet::new(),
            order: 0,
            seed,
        }
    }

    /// Makes `a` and `b` peers of each other; `a` knows `b`'s address.
    pub(crate) fn introduce(&mut self, a: usize, b: usize, preshared: Option<[u8; 32]>) {
        for (one, other) in [(a, b), (b, a)] {
            let endpoint = (one == a).then(|| endpoint(self.nodes[b].address));
            let change = PeerChange {
                preshared_key: preshared.map(Secret::new),
                endpoint,
                add_allowed_ips: allowed_ips(other),
                ..PeerChange::default()
            };
            self.change_peer(one, other, change);
        }
    }

    pub(crate) fn change_peer(&mut self, node: usize, other: usize, change: PeerChange) {
        let (clock, key) = (self.clock(node), self.nodes[other].public);
        self.nodes[node].device.set_peer(clock, key, change).unwrap();
        self.drain(node);
    }

    pub(crate) fn keepalive(&mut self, node: usize, other: usize, interval: Duration) {
        let change = PeerChange { keepalive: Some(interval), ..PeerChange::default() };
        self.change_peer(node, other, change);
    }

    pub(crate) fn clock(&self, node: usize) -> Clock {
        let wall = (WALL + Duration::from_nanos(self.now.as_nanos())).as_secs() as i64;
        let wall = (wall + self.nodes[node].wall_error_secs).max(0) as u64;
        let nanos = Duration::from_nanos(self.now.as_nanos() % 1_000_000_000);
        Clock { now: self.now, wall: secs(wall) + nanos }
    }

    // --- traffic ------------------------------------------------------------------------------

    /// `from` sends an inner packet of `len` bytes to `to`.
    pub(crate) fn send(&mut self, from: usize, to: usize, len: usize) {
        let packet = inner_packet(from, to, len);
        self.send_packet(from, &packet);
    }

    pub(crate) fn send_packet(&mut self, from: usize, packet: &[u8]) {
        let now = self.now;
        let node = &mut self.nodes[from];
        let tables = node.shared.tables.load_full();
        let mut events = Vec::new();
        let mut on_event = |event| events.push(event);
        let vnet = VnetHdr::default();
        let pushed = node.batch.push(&tables, vnet, packet, 0, &node.drops);
        assert!(!matches!(pushed, Push::Full { .. }));
        node.batch.seal(now, &node.drops, &mut on_event);
        let mut sent = Vec::new();
        for transmit in node.batch.transmits() {
            for bytes in transmit.bytes.chunks(transmit.segment_len) {
                sent.push((transmit.endpoint, bytes.to_vec(), transmit.ecn));
            }
        }
        node.batch.clear();
        for (to, bytes, tos) in sent {
            self.put(from, to, bytes, tos);
        }
        self.tell(from, events);
    }

    /// Hands events of the fast half to the slow one.
    pub(crate) fn tell(&mut self, node: usize, events: Vec<FastEvent>) {
        for event in events {
            let clock = self.clock(node);
            self.nodes[node].device.handle_event(clock, event);
            self.drain(node);
        }
    }

    pub(crate) fn drain(&mut self, node: usize) {
        while let Some(output) = self.nodes[node].device.poll_output() {
            let this = &mut self.nodes[node];
            match output {
                Output::Transmit { to, bytes, tos } => self.put(node, to, bytes, tos),
                Output::SessionUp { local_index, .. } => {
                    assert!(this.up.insert(local_index), "{local_index} twice");
                    assert!(this.shared.sessions.get(local_index).is_some());
                }
                Output::SessionDown { local_index } => {
                    assert!(this.up.remove(&local_index), "{local_index} was not up");
                    assert!(this.shared.sessions.get(local_index).is_none());
                }
                Output::TimestampUsed(mark) => {
                    assert!(Some(mark) > this.mark, "a mark only grows");
                    this.mark = Some(mark);
                }
            }
        }
    }

    /// A datagram leaves: Eve looks at it, then the wire decides.
    fn put(&mut self, from: usize, to: Endpoint, bytes: Vec<u8>, tos: u8) {
        let source = self.nodes[from].address;
        let datagram = Datagram { at: self.now, from, source, to: to.remote, bytes, tos };
        self.look(&datagram);
        self.eve.push(datagram.clone());
        let copies = 1 + u32::from(self.rng.random_range(0..100) < self.wire.duplicates);
        for _ in 0..copies {
            if self.rng.random_range(0..100) >= self.wire.loss {
                let jitter = self.rng.random_range(Duration::ZERO..=self.wire.jitter);
                self.arrive_after(self.wire.latency + jitter, datagram.clone());
            }
        }
    }

    /// Puts any datagram on the wire, as an attacker can.
    pub(crate) fn arrive_after(&mut self, delay: Duration, datagram: Datagram) {
        let at = self.now + delay;
        self.order += 1;
        let order = self.order;
        if let Some(node) = self.nodes.iter_mut().find(|node| node.address == datagram.to) {
            node.inbox.insert((at, order), datagram);
        }
    }

    pub(crate) fn inject(&mut self, datagram: &Datagram) {
        self.arrive_after(Duration::ZERO, datagram.clone());
        self.run_for(Duration::ZERO);
    }

    fn look(&mut self, datagram: &Datagram) {
        let bytes = &datagram.bytes;
        let readable = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(!readable(MARKER), "seed {}: a marker outside", self.seed);
        for node in 0..self.nodes.len() {
            assert!(!readable(&v6(node).octets()), "seed {}: an inner address", self.seed);
            for other in 0..self.nodes.len() {
                let both = [v4(node).octets(), v4(other).octets()].concat();
                assert!(!readable(&both), "seed {}: inner addresses", self.seed);
            }
        }
        if !datagram.is_data() {
            return;
        }
        let padded = bytes.len() - DATA_HEADER_LEN - TAG_LEN;
        assert!(padded.is_multiple_of(16) || padded == MTU_DEFAULT.into(), "padding: {padded}");
        let header = DataHeader::parse(bytes).unwrap();
        let used = (datagram.from, header.receiver_index, header.counter);
        assert!(self.counters.insert(used), "seed {}: counter twice: {used:?}", self.seed);
        let node = &self.nodes[datagram.from];
        let tables = node.shared.tables.load();
        let sending = tables.allowed_ips.iter().find_map(|(_, peer)| {
            let session = peer.tx_session.load_full()?;
            (session.receiver_index == header.receiver_index).then_some(session)
        });
        let opening = node.shared.sessions.get(sending.expect("sent with a session").local_index);
        let opening = opening.expect("a sending session also receives");
        let confirmed = opening.as_ref().unwrap().confirmed.load(Ordering::Relaxed);
        assert!(confirmed, "seed {}: sent under a key that nobody confirmed", self.seed);
    }

    // --- time ---------------------------------------------------------------------------------

    pub(crate) fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        while self.step(end) {}
        self.now = end;
    }

    /// Runs until `done`, at most `limit`; how long it took.
    pub(crate) fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Duration {
        let start = self.now;
        while !done(self) {
            assert!(self.step(start + limit), "seed {}: not within {limit:?}", self.seed);
        }
        self.now.since(start)
    }

    /// The next thing that happens until `end`; false if nothing does.
    fn step(&mut self, end: Instant) -> bool {
        let arrivals = self.nodes.iter().enumerate().filter_map(|(place, node)| {
            let (&(at, order), _) = node.inbox.first_key_value()?;
            Some((at, order, place))
        });
        let arrival = arrivals.min();
        let timeouts = self.nodes.iter().enumerate().filter_map(|(place, node)| {
            let (at, reason) = node.device.poll_timeout()?;
            assert!(!reason.is_empty());
            Some((at, place))
        });
        let timeout = timeouts.min();
        match (arrival, timeout) {
            (Some((at, order, place)), timeout)
                if at <= end && timeout.is_none_or(|(due, _)| at <= due) =>
            {
                self.now = self.now.max(at);
                let datagram = self.nodes[place].inbox.remove(&(at, order)).unwrap();
                self.deliver(place, datagram);
                true
            }
            (_, Some((due, place))) if due <= end => {
                self.now = self.now.max(due);
                let clock = self.clock(place);
                self.nodes[place].device.handle_timeout(clock);
                self.drain(place);
                let next = self.nodes[place].device.poll_timeout();
                assert!(
                    next.is_none_or(|(at, _)| at > self.now),
                    "seed {}: a deadline that is always due: {next:?}",
                    self.seed
                );
                true
            }
            _ => false,
        }
    }

    fn deliver(&mut self, place: usize, mut datagram: Datagram) {
        let clock = self.clock(place);
        let node = &mut self.nodes[place];
        let source = endpoint(datagram.source);
        if datagram.bytes.first() != Some(&4) {
            node.device.handle_datagram(clock, source, &datagram.bytes, node.waiting);
            return self.drain(place);
        }
        let mut events = Vec::new();
        let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> = ArrayVec::new();
        packets.push(RxPacket { datagram: &mut datagram.bytes, source, ecn: datagram.tos & 3 });
        let mut inner = Opened::new();
        let tables = node.shared.tables.load_full();
        let mut on_event = |event| events.push(event);
        rx::open(
            &node.shared,
            &tables,
            clock.now,
            &mut packets,
            &node.drops,
            &mut on_event,
            &mut inner,
        );
        node.inner.extend(inner.into_iter().map(|packet| packet.to_vec()));
        self.tell(place, events);
    }

    // --- questions ----------------------------------------------------------------------------

    /// What `from` sent of type `kind` since Eve's record had `since` entries.
    pub(crate) fn sent(&self, from: usize, kind: u8, since: usize) -> Vec<&Datagram> {
        self.eve[since..].iter().filter(|d| d.from == from && d.kind() == kind).collect()
    }

    pub(crate) fn last_sent(&self, from: usize, kind: u8) -> Datagram {
        (*self.sent(from, kind, 0).last().unwrap()).clone()
    }

    pub(crate) fn peer(&self, node: usize, other: usize) -> Arc<Peer> {
        let key = self.nodes[other].public;
        let mut peers = self.nodes[node].device.peers();
        Arc::clone(peers.find(|view| view.peer.public_key == key).unwrap().peer)
    }

    pub(crate) fn drops(&self, node: usize, reason: Drop) -> u64 {
        self.nodes[node].drops.get(reason)
    }

    /// Both directions carry a packet now, without a new handshake.
    pub(crate) fn assert_connected(&mut self) {
        let before = self.eve.len();
        self.assert_carries();
        assert!(self.eve[before..].iter().all(Datagram::is_data), "seed {}", self.seed);
    }

    /// Both directions carry a packet now.
    pub(crate) fn assert_carries(&mut self) {
        for (from, to) in [(A, B), (B, A)] {
            let seen = self.nodes[to].inner.len();
            self.send(from, to, 200);
            self.run_for(millis(100));
            assert_eq!(self.nodes[to].inner.len(), seen + 1, "seed {}: {from}", self.seed);
        }
    }

    /// Both sides send with two halves of one session.
    pub(crate) fn agrees(&self) -> bool {
        let session = |node, other| self.peer(node, other).tx_session.load_full();
        match (session(A, B), session(B, A)) {
            (Some(a), Some(b)) => {
                (a.local_index, a.receiver_index) == (b.receiver_index, b.local_index)
            }
            _ => false,
        }
    }
}

impl Node {
    fn new(rng: &mut ChaCha8Rng, place: usize) -> Self {
        let private = Secret::generate_private_key(rng);
        let address = SocketAddr::new(Ipv4Addr::new(192, 0, 2, place as u8 + 1).into(), 51820);
        Self::with(rng, private, address, None)
    }

    /// The same machine after a restart: keys and disk stay, everything else is lost.
    pub(crate) fn restarted(&self, rng: &mut ChaCha8Rng) -> Self {
        let mut node = Self::with(rng, self.private.clone(), self.address, self.mark);
        node.wall_error_secs = self.wall_error_secs;
        node
    }

    fn with(
        rng: &mut ChaCha8Rng,
        private: Secret,
        address: SocketAddr,
        mark: Option<Tai64n>,
    ) -> Self {
        let (shared, drops) = (Arc::new(Shared::new(64)), Arc::new(DropCounters::default()));
        let config = DeviceConfig {
            mtu: MTU_DEFAULT,
            newest_timestamp: mark,
            drops: Arc::clone(&drops),
            paths: None,
        };
        let own_rng = ChaCha8Rng::from_rng(rng);
        let mut device = Device::new(config, Arc::clone(&shared), Box::new(own_rng));
        let clock = Clock { now: Instant::from_nanos(1), wall: WALL };
        device.set_private_key(clock, Some(private.clone()));
        Self {
            device,
            shared,
            drops,
            address,
            public: private.public_key(),
            private,
            inner: Vec::new(),
            waiting: 0,
            wall_error_secs: 0,
            mark,
            up: BTreeSet::new(),
            batch: TxBatch::new(),
            inbox: BTreeMap::new(),
        }
    }
}

pub(crate) fn endpoint(remote: SocketAddr) -> Endpoint {
    Endpoint { remote, local: None, ifindex: 0 }
}

pub(crate) fn v4(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 73, 19, node as u8 + 1)
}

pub(crate) fn v6(node: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd73, 0x1913, 0x57a1, 0, 0, 0, 0x99, node as u16 + 1)
}

fn allowed_ips(node: usize) -> Vec<ipnet::IpNet> {
    vec![IpAddr::from(v4(node)).into(), IpAddr::from(v6(node)).into()]
}

/// An IPv4 packet of exactly `len` bytes, at least 20, with the marker as far as it fits.
pub(crate) fn inner_packet(from: usize, to: usize, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[8] = 64;
    packet[9] = 253;
    packet[12..16].copy_from_slice(&v4(from).octets());
    packet[16..20].copy_from_slice(&v4(to).octets());
    let room = &mut packet[20..];
    let fits = MARKER.len().min(room.len());
    room[..fits].copy_from_slice(&MARKER[..fits]);
    packet
}

/// An IPv6 packet of exactly `len` bytes, at least 40.
pub(crate) fn inner_packet_v6(from: usize, to: usize, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&(len as u16 - 40).to_be_bytes());
    packet[6] = 253;
    packet[7] = 64;
    packet[8..24].copy_from_slice(&v6(from).octets());
    packet[24..40].copy_from_slice(&v6(to).octets());
    packet
}
