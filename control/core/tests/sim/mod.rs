//! A world in virtual time: gateways behind NATs, relays, STUN servers, latency, loss, one seed.
//!
//! The finder is the real one, and so are STUN requests and answers; the world plays the network,
//! the control process around the finder, and the data plane: it asks STUN servers, tells the
//! finder what it learnt, carries what it sends, and sends tunnel packets where routes say.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by tests that each use a part"
)]

mod control;
pub mod front;
pub mod gateway;
mod internet;
pub mod nat;
mod plane;
mod relay;
pub mod sabotage;
pub mod stun;
pub mod watch;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use millrace_path::candidate::Prefix;
use millrace_path::finder::Input;
use millrace_path::limits::FRAME_LEN_MIN;
use millrace_path::path::{Pair, UplinkId};
use millrace_path::reflexive::{Reflexive, Seen};
use millrace_path::sealed::{PublicKey, SecretKey};
use millrace_path::{Event, Instant, Output, Route, Transmit, stun as wire};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha12Rng;

use gateway::{Gateway, Kind, Leg, Link};
use internet::Internet;
use nat::{Nat, Segment};
use sabotage::Sabotage;
use stun::StunServers;
use watch::Watch;

/// Where STUN is answered: two addresses of each family, so that a mapping that varies is seen.
pub const STUN_SERVERS: [&str; 4] = [
    "198.51.100.1:3478",
    "198.51.100.2:3478",
    "[2001:db8:5700::1]:3478",
    "[2001:db8:5700::2]:3478",
];
/// Some day in 2027.
const WALL_AT_ZERO: u64 = 1_800_000_000_000_000_000;
const DAY: u64 = 86_400_000_000_000;
/// Prefix inside of every tunnel.
const TUNNEL: Prefix =
    Prefix { address: IpAddr::V4(std::net::Ipv4Addr::new(10, 99, 0, 0)), length: 16 };

enum Happening {
    Datagram {
        to: (usize, usize),
        from: SocketAddr,
        bytes: Vec<u8>,
    },
    Tunnel {
        to: usize,
        from: usize,
        source: Option<SocketAddr>,
        number: u64,
        kind: Kind,
    },
    Relayed {
        to: usize,
        from: PublicKey,
        bytes: Vec<u8>,
    },
    PeerGone {
        to: usize,
        peer: PublicKey,
    },
    StunRequest {
        from: SocketAddr,
        server: SocketAddr,
        bytes: Vec<u8>,
    },
    Timer {
        of: usize,
        at: Instant,
    },
    /// The data plane has packets to send.
    Data {
        of: usize,
    },
    /// Control looks at what the data plane saw.
    Poll {
        of: usize,
    },
    /// STUN questions are due.
    StunTimer {
        of: usize,
        at: Instant,
    },
    /// A gateway's connection to its relay stands again.
    RelayUp {
        of: usize,
    },
    /// Control asks STUN servers out of turn.
    Ask {
        of: usize,
    },
}

/// Soonest first, then in the order of scheduling.
struct Scheduled(Reverse<(Instant, u64)>, Happening);

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

pub struct World {
    pub now: Instant,
    pub random: ChaCha12Rng,
    pub gateways: Vec<Gateway>,
    internet: Internet,
    /// Chance that a datagram gets lost, each way.
    pub loss: f64,
    pub relay_loss: f64,
    pub relay_latency: Duration,
    /// Relays that carry anything.
    pub relays_up: BTreeSet<u16>,
    /// Direct datagrams from one gateway to another that vanish.
    pub cut: Vec<(usize, usize)>,
    /// The same for the tunnel's packets only: pings pass.
    pub data_cut: Vec<(usize, usize)>,
    /// Sockets from and to which nothing comes through.
    pub cut_sockets: Vec<SocketAddr>,
    /// Gateways whose relay takes everything from them and delivers nothing, nor to them.
    pub relay_deaf: BTreeSet<usize>,
    pub stun: StunServers,
    /// Chance that a datagram on a path arrives twice.
    pub duplicates: f64,
    /// By how much of itself chance prolongs a delay: from a half on, datagrams overtake others.
    pub jitter: f64,
    /// Bytes of UDP payload that a path must carry to be used.
    pub least_frame_len: usize,
    /// What is broken on purpose.
    pub sabotage: Option<Sabotage>,
    /// Everything that went through a relay, if `keep_relayed`.
    pub relayed: Vec<Vec<u8>>,
    pub keep_relayed: bool,
    pub data_interval: Duration,
    pub poll_interval: Duration,
    started_at: Instant,
    by_key: BTreeMap<PublicKey, usize>,
    queue: BinaryHeap<Scheduled>,
    sequence: u64,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let servers = STUN_SERVERS.map(|server| server.parse().unwrap()).to_vec();
        Self {
            now: Instant::from_nanos(1_000_000_000),
            random: ChaCha12Rng::seed_from_u64(seed),
            gateways: Vec::new(),
            internet: Internet::new(servers.clone()),
            loss: 0.0,
            relay_loss: 0.0,
            relay_latency: Duration::from_millis(20),
            relays_up: [1, 2].into(),
            cut: Vec::new(),
            data_cut: Vec::new(),
            cut_sockets: Vec::new(),
            relay_deaf: BTreeSet::new(),
            stun: StunServers { servers, silent: BTreeSet::new(), lies: Vec::new() },
            duplicates: 0.0,
            jitter: 0.1,
            least_frame_len: FRAME_LEN_MIN,
            sabotage: None,
            relayed: Vec::new(),
            keep_relayed: false,
            data_interval: Duration::from_millis(100),
            poll_interval: Duration::from_millis(250),
            started_at: Instant::from_nanos(1_000_000_000),
            by_key: BTreeMap::new(),
            queue: BinaryHeap::new(),
            sequence: 0,
        }
    }

    pub fn add_nat(&mut self, nat: Nat) -> usize {
        self.internet.add_nat(nat)
    }

    /// Adds a NAT64, behind which a network has only IPv6, this address among it.
    pub fn add_nat64(&mut self, nat: Nat, inside: IpAddr) -> usize {
        let at = self.internet.add_nat(nat);
        self.internet.add_ipv6_behind(at, inside);
        at
    }

    pub fn nats(&mut self) -> &mut [Nat] {
        &mut self.internet.nats
    }

    /// Datagrams whose source was their destination.
    pub fn land(&self) -> u64 {
        self.internet.land
    }

    /// Puts a gateway behind this NAT, or on the Internet.
    pub fn add_gateway(&mut self, socket: &str, segment: Segment, latency_ms: u64) -> usize {
        let mut bytes = [0; 32];
        self.random.fill_bytes(&mut bytes);
        let secret = SecretKey::from_bytes(bytes);
        let node_key = secret.public_key();
        let finder = self.new_finder(node_key, WALL_AT_ZERO);
        let at = self.gateways.len();
        self.by_key.insert(node_key, at);
        self.gateways.push(Gateway {
            node_key,
            finder,
            secret,
            legs: Vec::new(),
            control_up: true,
            relay_up: true,
            relay_back_at: Instant::default(),
            home: 1,
            busy: true,
            listens_only: false,
            plain: false,
            bogus: Vec::new(),
            links: BTreeMap::new(),
            reflexive: Reflexive::default(),
            seen: Seen::default(),
            stun_timer: None,
            suspected_at: None,
            timer: None,
            routes: Vec::new(),
            probes_sent: 0,
            relay_sent: 0,
            watch: Watch::default(),
            wall_at_zero: WALL_AT_ZERO,
        });
        self.add_leg(at, Leg::new(socket, segment, Duration::from_millis(latency_ms)));
        at
    }

    /// Gives a gateway another uplink.
    pub fn add_leg(&mut self, at: usize, leg: Leg) {
        if leg.nat64.is_none() {
            self.internet.add_host(leg.segment, leg.socket, (at, self.gateways[at].legs.len()));
        }
        self.gateways[at].legs.push(leg);
    }

    /// Takes the last uplink away.
    pub fn remove_leg(&mut self, at: usize) {
        let leg = self.gateways[at].legs.pop().unwrap();
        if leg.nat64.is_none() {
            self.internet.remove_host(leg.segment, leg.socket);
        }
    }

    /// Another network under an uplink.
    pub fn move_leg(&mut self, at: usize, leg: usize, to: Leg) {
        let before = std::mem::replace(&mut self.gateways[at].legs[leg], to.clone());
        self.internet.remove_host(before.segment, before.socket);
        self.internet.add_host(to.segment, to.socket, (at, leg));
    }

    /// The two know each other. `endpoint`: of the second, in the configuration of the first.
    pub fn connect(&mut self, one: usize, other: usize, endpoint: Option<SocketAddr>) {
        self.gateways[one].links.insert(other, Link::new(endpoint));
        self.gateways[other].links.insert(one, Link::new(None));
    }

    /// Each gateway learns its addresses and its peers, everybody unless they are connected;
    /// traffic begins.
    pub fn start(&mut self) {
        self.started_at = self.now;
        let all = self.gateways.len();
        if self.gateways.iter().all(|gateway| gateway.links.is_empty()) {
            for (one, other) in (0..all).flat_map(|one| (0..one).map(move |other| (one, other))) {
                self.connect(one, other, None);
            }
        }
        for at in 0..all {
            if !self.gateways[at].plain {
                self.begin_control(at);
                self.schedule(Duration::from_millis(100), Happening::Poll { of: at });
            }
            self.schedule(Duration::from_millis(100), Happening::Data { of: at });
        }
    }

    /// Lets time pass, with all that happens in it.
    pub fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(Scheduled(Reverse((at, _)), _)) = self.queue.peek() {
            if *at > end {
                break;
            }
            let Scheduled(Reverse((at, _)), happening) = self.queue.pop().unwrap();
            self.now = at;
            self.happen(happening);
        }
        self.now = end;
    }

    /// Lets time pass until this holds. How long it took, or None if it did not within `limit`.
    pub fn run_until(
        &mut self,
        limit: Duration,
        holds: impl Fn(&Self) -> bool,
    ) -> Option<Duration> {
        let start = self.now;
        while !holds(self) {
            if self.now.since(start) >= limit {
                return None;
            }
            self.run_for(Duration::from_millis(5));
        }
        Some(self.now.since(start))
    }

    pub fn route(&self, from: usize, to: usize) -> Route {
        self.gateways[from].links[&to].route
    }

    pub fn is_direct(&self, from: usize, to: usize) -> bool {
        matches!(self.route(from, to), Route::Direct { .. })
    }

    pub fn both_direct(&self) -> bool {
        self.is_direct(0, 1) && self.is_direct(1, 0)
    }

    /// Each of two gateways sends to where it gets the other's packets from.
    pub fn is_symmetric(&self) -> bool {
        [(0, 1), (1, 0)].into_iter().all(|(at, other)| {
            let link = &self.gateways[at].links[&other];
            matches!(link.route, Route::Direct { pair, .. } if Some(pair.remote) == link.tunnel.came_from)
        })
    }

    /// Tunnel packets of two gateways, each way: sent, and received.
    pub fn tunnel_counts(&self) -> [(u64, u64); 2] {
        [(0, 1), (1, 0)].map(|(from, to)| {
            let [sender, receiver] = [(from, to), (to, from)];
            let tunnel = |(at, other): (usize, usize)| &self.gateways[at].links[&other].tunnel;
            (tunnel(sender).sent, tunnel(receiver).received)
        })
    }

    /// The NAT between a gateway's first uplink and the Internet.
    pub fn outermost_nat(&self, at: usize) -> Option<usize> {
        let mut nat = self.gateways[at].legs[0].segment?;
        while let Some(outer) = self.internet.nats[nat].outer {
            nat = outer;
        }
        Some(nat)
    }

    /// A NAT has another address outside, and forgot everything.
    pub fn renumber(&mut self, nat: usize, ip: IpAddr) {
        self.internet.renumber(nat, ip);
    }

    /// From now on gaps in all tunnels count.
    pub fn watch_gaps(&mut self) {
        let now = self.now;
        let links = self.gateways.iter_mut().flat_map(|gateway| gateway.links.values_mut());
        links.for_each(|link| link.tunnel.watch(now));
    }

    /// The longest gap of packets from one gateway to another.
    pub fn gap(&self, from: usize, to: usize) -> Duration {
        self.gateways[to].links[&from].tunnel.gap(self.now)
    }

    /// One datagram out of a gateway's socket into the network.
    fn send(&mut self, at: usize, leg: usize, to: SocketAddr, bytes: Vec<u8>) {
        let Some((socket, delay, source)) = self.carry(at, leg, to, bytes.len()) else { return };
        match socket {
            Some(to) => {
                if self.duplicates > 0.0 && self.random.random_bool(self.duplicates) {
                    let later = delay.mul_f64(self.random.random_range(1.0..3.0));
                    let bytes = bytes.clone();
                    self.schedule(later, Happening::Datagram { to, from: source, bytes });
                }
                self.schedule(delay, Happening::Datagram { to, from: source, bytes });
            }
            None => {
                self.schedule(delay, Happening::StunRequest { from: source, server: to, bytes })
            }
        }
    }

    /// Where a datagram comes out, after how long, and as whose it is seen.
    fn carry(
        &mut self,
        at: usize,
        leg: usize,
        mut to: SocketAddr,
        len: usize,
    ) -> Option<(Option<internet::Socket>, Duration, SocketAddr)> {
        let from = self.gateways[at].legs.get(leg)?.clone();
        if self.is(Sabotage::Land) {
            to = from.socket;
        }
        if let (Some(prefix), IpAddr::V4(ip)) = (from.nat64, to.ip()) {
            to.set_ip(prefix.synthesise(ip).into());
        }
        let interrupted = self.is(Sabotage::Flapping) && self.is_interrupted();
        if from.blocked || len > from.frame_len_max || self.cut_sockets.contains(&from.socket) {
            return None;
        }
        let arrival = self.internet.carry(self.now, from.socket, from.segment, to)?;
        // After the NAT: its mapping lives whatever happens on the way.
        if self.loss > 0.0 && self.random.random_bool(self.loss) {
            return None;
        }
        let jitter = self.random.random_range(1.0..1.0 + self.jitter);
        let Some((gateway, there)) = arrival.socket else {
            return Some((None, from.latency.mul_f64(jitter), arrival.source));
        };
        let there = &self.gateways[gateway].legs[there];
        let cut = self.cut.contains(&(at, gateway)) || self.cut_sockets.contains(&there.socket);
        if cut || interrupted || there.blocked || len > there.frame_len_max {
            return None;
        }
        let near = arrival.near && from.segment.is_some();
        let delay = if near { Duration::from_micros(300) } else { from.latency + there.latency };
        Some((arrival.socket, delay.mul_f64(jitter), arrival.source))
    }

    /// On which uplink a gateway takes a datagram that came to this leg, and as whose: through a
    /// NAT64 it is from IPv4.
    fn received_on(&self, at: usize, leg: usize, from: SocketAddr) -> (usize, SocketAddr) {
        let IpAddr::V6(ip) = from.ip() else { return (leg, from) };
        let legs = self.gateways[at].legs.iter().enumerate();
        let mut through = legs.filter_map(|(at, leg)| Some((at, leg.nat64?.extract(ip)?)));
        through
            .next()
            .map_or((leg, from), |(leg, ip)| (leg, SocketAddr::new(ip.into(), from.port())))
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Datagram { to: (to, leg), from, mut bytes } => {
                let (leg, from) = self.received_on(to, leg, from);
                if wire::parse_response(&bytes).is_ok() {
                    return self.stun_answered(to, from, &bytes);
                }
                if self.is(Sabotage::Deaf) {
                    return;
                }
                let from = Pair { uplink: UplinkId(leg as u16), remote: from };
                self.handle(to, Input::Datagram { from, bytes: &mut bytes });
            }
            Happening::Tunnel { to, from, source, number, kind } => {
                self.tunnel_received(to, from, source, number, kind);
            }
            Happening::Relayed { to, from, mut bytes } => {
                self.handle(to, Input::Relayed { peer: from, bytes: &mut bytes });
            }
            Happening::PeerGone { to, peer } => self.handle(to, Input::PeerGone { peer }),
            Happening::StunRequest { from, server, bytes } => {
                self.stun_request(from, server, &bytes);
            }
            Happening::Timer { of, at } => {
                if self.gateways[of].timer == Some(at) {
                    self.gateways[of].timer = None;
                    let peers = self.gateways[of].links.len();
                    self.gateways[of].watch.timeout(self.now, peers);
                    self.handle(of, Input::Timeout);
                }
            }
            Happening::Data { of } => {
                self.send_tunnels(of);
                self.schedule(self.data_interval, Happening::Data { of });
            }
            Happening::Poll { of } => {
                self.poll_data_plane(of);
                self.schedule(self.poll_interval, Happening::Poll { of });
            }
            Happening::StunTimer { of, at } => self.stun_timer(of, at),
            Happening::Ask { of } => self.ask_stun(of),
            Happening::RelayUp { of } => self.handle(of, Input::RelayUp),
        }
    }

    fn handle(&mut self, at: usize, input: Input<'_>) {
        if !self.gateways[at].control_up {
            return;
        }
        let now = self.now;
        let all_done = matches!(input, Input::Timeout);
        self.gateways[at].finder.handle(now, input, &mut self.random);
        let (mut outputs, mut moved) = (0, Vec::new());
        while let Some(output) = self.gateways[at].finder.poll_output() {
            outputs += self.times(Sabotage::Endless, 2000);
            let bound = 1000 + 8 * self.gateways[at].links.len();
            assert!(outputs < bound, "the finder does not come to an end");
            match output {
                Output::Transmit(Transmit::Udp { pair, datagram, .. }) => {
                    self.probe(at, pair, datagram);
                }
                Output::Transmit(Transmit::Relay { peer, packet }) => self.relay(at, peer, packet),
                Output::Event(event) => {
                    if let Event::Route { peer, .. } = event {
                        moved.push(peer);
                    }
                    self.event(at, event);
                }
                Output::Timeout(mut deadline, reason) => {
                    if self.is(Sabotage::TimerInThePast) {
                        deadline = now;
                    }
                    if self.is(Sabotage::RestlessTimer) {
                        deadline = deadline.min(now + Duration::from_millis(1));
                    }
                    // Whatever was due was done; other input is of one peer only.
                    assert!(deadline > now || !all_done, "{reason:?} is due again at once");
                    self.set_timer(at, deadline);
                }
            }
        }
        for peer in moved {
            let route = self.gateways[at].links[&self.by_key[&peer]].route;
            assert_eq!(self.gateways[at].finder.route(peer), Some(route), "events say what is");
        }
    }

    fn probe(&mut self, at: usize, mut pair: Pair, datagram: Vec<u8>) {
        let peers = self.gateways[at].links.len();
        let times = self.times(Sabotage::ProbesTooMany, 4) * self.times(Sabotage::ProbeStorm, 100);
        pair.remote = self.diverted(at, pair.remote);
        let gateway = &mut self.gateways[at];
        for _ in 0..times {
            gateway.probes_sent += 1;
            gateway.watch.datagram(self.now, peers);
        }
        assert!(!gateway.has(pair.remote), "sent to itself: {pair:?}");
        assert!(!TUNNEL.contains(pair.remote.ip()), "sent into the tunnel: {pair:?}");
        let nobody = pair.remote.ip().is_loopback() || pair.remote.ip().is_multicast();
        assert!(!nobody, "sent to nobody: {pair:?}");
        for link in gateway.links.values_mut() {
            link.datagrams += u64::from(link.endpoint == Some(pair.remote));
        }
        self.send(at, usize::from(pair.uplink.0), pair.remote, datagram);
    }

    fn set_timer(&mut self, of: usize, at: Instant) {
        let at = at.max(self.now);
        if self.gateways[of].timer != Some(at) {
            self.gateways[of].timer = Some(at);
            self.schedule(at.since(self.now), Happening::Timer { of, at });
        }
    }

    fn schedule(&mut self, after: Duration, happening: Happening) {
        self.sequence += 1;
        let key = Reverse((self.now + after, self.sequence));
        self.queue.push(Scheduled(key, happening));
    }

    /// What every finder keeps is bounded.
    pub fn assert_held(&self) {
        for gateway in self.gateways.iter().filter(|gateway| !gateway.plain) {
            for other in gateway.links.keys() {
                watch::held(gateway.finder.held(self.gateways[*other].node_key).unwrap());
            }
        }
    }
}
