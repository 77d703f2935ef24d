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

pub mod front;
pub mod gateway;
mod internet;
pub mod nat;
pub mod watch;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use millrace_path::candidate::{Candidate, CandidateKind, OwnAddresses, Prefix};
use millrace_path::finder::{Config, Finder, Input, Network, Uplink};
use millrace_path::introduce::Home;
use millrace_path::limits::{FRAME_LEN_DEFAULT, FRAME_LEN_MIN};
use millrace_path::path::{Pair, UplinkId};
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};
use millrace_path::transaction::TransactionId;
use millrace_path::{Event, Instant, Output, Route, Transmit, Why, stun};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha12Rng;

use gateway::{Gateway, Kind, Leg, Link};
use internet::Internet;
use nat::{Nat, Segment};
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
const STUN_INTERVAL: Duration = Duration::from_secs(23);
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
    Stun {
        of: usize,
        again: bool,
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
    /// Nobody answers STUN requests.
    pub stun_down: bool,
    /// Everything that went through a relay, if `keep_relayed`.
    pub relayed: Vec<Vec<u8>>,
    pub keep_relayed: bool,
    pub data_interval: Duration,
    pub poll_interval: Duration,
    started_at: Instant,
    by_key: BTreeMap<PublicKey, usize>,
    servers: Vec<SocketAddr>,
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
            stun_down: false,
            relayed: Vec::new(),
            keep_relayed: false,
            data_interval: Duration::from_millis(100),
            poll_interval: Duration::from_millis(250),
            started_at: Instant::from_nanos(1_000_000_000),
            by_key: BTreeMap::new(),
            servers,
            queue: BinaryHeap::new(),
            sequence: 0,
        }
    }

    pub fn add_nat(&mut self, nat: Nat) -> usize {
        self.internet.add_nat(nat)
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
            home: 1,
            busy: true,
            listens_only: false,
            plain: false,
            bogus: Vec::new(),
            links: BTreeMap::new(),
            reflexive: Vec::new(),
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
        self.internet.add_host(leg.segment, leg.socket, (at, self.gateways[at].legs.len()));
        self.gateways[at].legs.push(leg);
    }

    /// Takes the last uplink away.
    pub fn remove_leg(&mut self, at: usize) {
        let leg = self.gateways[at].legs.pop().unwrap();
        self.internet.remove_host(leg.segment, leg.socket);
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
                self.tell_network(at, false);
                self.add_peers(at);
                self.schedule(Duration::ZERO, Happening::Stun { of: at, again: true });
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

    /// Tells a gateway its own addresses and uplinks as they are now.
    pub fn tell_network(&mut self, at: usize, major: bool) {
        let gateway = &self.gateways[at];
        let own = |address| Candidate { kind: CandidateKind::Interface, address };
        let mut candidates: Vec<_> = gateway.legs.iter().map(|leg| own(leg.socket)).collect();
        let mut sockets: Vec<_> = gateway.legs.iter().map(|leg| leg.socket).collect();
        for leg in &gateway.legs {
            // As the daemon has it from the router.
            let Some(nat) = leg.segment.map(|nat| &self.internet.nats[nat]) else { continue };
            let ports = nat.forwards.iter().filter(|(_, inside)| **inside == leg.socket);
            for address in ports.map(|(port, _)| SocketAddr::new(nat.public_ip, *port)) {
                candidates.push(Candidate { kind: CandidateKind::PortMapped, address });
                sockets.push(address);
            }
        }
        for address in gateway.reflexive.iter().filter_map(|(_, _, mapped)| *mapped) {
            if candidates.iter().all(|known| known.address != address) {
                candidates.push(Candidate { kind: CandidateKind::Reflexive, address });
            }
            sockets.push(address);
        }
        candidates.extend(&gateway.bogus);
        let uplink = |(at, leg): (usize, &Leg)| Uplink {
            id: UplinkId(at as u16),
            ipv6: leg.socket.is_ipv6(),
        };
        let uplinks = gateway.legs.iter().enumerate().map(uplink).collect();
        let network = Network {
            home: Home { region: gateway.home, url: String::new() },
            candidates,
            addresses: OwnAddresses { sockets, tunnels: vec![TUNNEL] },
            uplinks,
            nat: millrace_path::nat::Nat::default(),
        };
        self.handle(at, Input::Network { network, major });
    }

    /// The data plane says since when data to a peer had no answer.
    pub fn unanswered_data(&mut self, at: usize, peer: PublicKey, since: Instant) {
        self.handle(at, Input::UnansweredData { peer, since });
    }

    /// The gateway has another address behind other NATs, and notices.
    pub fn roamed(&mut self, at: usize) {
        self.gateways[at].reflexive.clear();
        self.tell_network(at, true);
        self.ask_stun(at);
    }

    /// The gateway listens at another relay now.
    pub fn move_home(&mut self, at: usize, home: u16) {
        self.gateways[at].home = home;
        self.tell_network(at, false);
    }

    /// The control process dies: the data plane goes on with what it has.
    pub fn kill(&mut self, at: usize) {
        self.gateways[at].control_up = false;
        self.gateways[at].timer = None;
    }

    /// The control process dies and another starts, perhaps with its clock a day behind.
    pub fn restart(&mut self, at: usize, clock_back: bool) {
        let wall = WALL_AT_ZERO - if clock_back { DAY } else { 0 };
        self.gateways[at].finder = self.new_finder(self.gateways[at].node_key, wall);
        self.gateways[at].timer = None;
        self.gateways[at].control_up = true;
        self.tell_network(at, false);
        self.add_peers(at);
        self.ask_stun(at);
    }

    fn new_finder(&mut self, node_key: PublicKey, wall_at_zero: u64) -> Finder {
        let mut bytes = [0; 32];
        self.random.fill_bytes(&mut bytes);
        let disco_secret = SecretKey::from_bytes(bytes);
        let frame_len = FRAME_LEN_DEFAULT;
        let least_frame_len = FRAME_LEN_MIN;
        let config = Config { node_key, disco_secret, frame_len, least_frame_len, wall_at_zero };
        Finder::new(config, self.now)
    }

    /// With the paths that the data plane's table has, if a process before left any.
    fn add_peers(&mut self, at: usize) {
        let links = self.gateways[at].links.iter();
        let links = links.map(|(other, link)| (*other, link.endpoint, link.route));
        for (other, endpoint, route) in links.collect::<Vec<_>>() {
            let peer = self.gateways[other].node_key;
            let box_key = BoxKey::agree(&self.gateways[at].secret, peer).unwrap();
            let in_use = match route {
                Route::Direct { pair, .. } => Some(pair),
                _ => None,
            };
            self.gateways[at].links.get_mut(&other).unwrap().signals = 0;
            self.handle(at, Input::AddPeer { peer, box_key, endpoint, in_use });
        }
    }

    /// Asks the STUN servers on every uplink, now.
    pub fn ask_stun(&mut self, at: usize) {
        if !self.gateways[at].control_up {
            return;
        }
        self.gateways[at].reflexive.retain(|(_, _, mapped)| mapped.is_some());
        for leg in 0..self.gateways[at].legs.len() {
            let ipv6 = self.gateways[at].legs[leg].socket.is_ipv6();
            for server in self.servers.clone() {
                if server.is_ipv6() == ipv6 {
                    let mut id = [0; 12];
                    self.random.fill_bytes(&mut id);
                    let request = stun::binding_request(TransactionId(id)).to_vec();
                    self.gateways[at].reflexive.push((TransactionId(id), leg, None));
                    self.send(at, leg, server, request);
                }
            }
        }
    }

    /// One datagram out of a gateway's socket into the network.
    fn send(&mut self, at: usize, leg: usize, to: SocketAddr, bytes: Vec<u8>) {
        let Some((socket, delay, source)) = self.carry(at, leg, to, bytes.len()) else { return };
        match socket {
            Some(to) => self.schedule(delay, Happening::Datagram { to, from: source, bytes }),
            None if self.stun_down => {}
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
        to: SocketAddr,
        len: usize,
    ) -> Option<(Option<internet::Socket>, Duration, SocketAddr)> {
        let from = self.gateways[at].legs.get(leg)?.clone();
        if from.blocked || len > from.frame_len_max || self.cut_sockets.contains(&from.socket) {
            return None;
        }
        let arrival = self.internet.carry(self.now, from.socket, from.segment, to)?;
        // After the NAT: its mapping lives whatever happens on the way.
        if self.loss > 0.0 && self.random.random_bool(self.loss) {
            return None;
        }
        let jitter = self.random.random_range(1.0..1.1);
        let Some((gateway, there)) = arrival.socket else {
            return Some((None, from.latency.mul_f64(jitter), arrival.source));
        };
        let there = &self.gateways[gateway].legs[there];
        let cut = self.cut.contains(&(at, gateway)) || self.cut_sockets.contains(&there.socket);
        if cut || there.blocked || len > there.frame_len_max {
            return None;
        }
        let near = arrival.near && from.segment.is_some();
        let delay = if near { Duration::from_micros(300) } else { from.latency + there.latency };
        Some((arrival.socket, delay.mul_f64(jitter), arrival.source))
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Datagram { to: (to, leg), from, mut bytes } => {
                if let Ok(response) = stun::parse_response(&bytes) {
                    return self.stun_answered(to, response);
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
                let answer = stun::answer(&bytes, from).unwrap();
                if let Some(to) = self.internet.arrive(self.now, server, from) {
                    let delay = self.gateways[to.0].legs[to.1].latency;
                    let bytes = answer.to_vec();
                    self.schedule(delay, Happening::Datagram { to, from: server, bytes });
                }
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
            Happening::Stun { of, again } => {
                self.ask_stun(of);
                if again {
                    self.schedule(STUN_INTERVAL, Happening::Stun { of, again });
                }
            }
        }
    }

    fn stun_answered(&mut self, at: usize, response: stun::BindingResponse) {
        let known = &mut self.gateways[at].reflexive;
        let Some(slot) = known.iter().position(|(id, ..)| *id == response.transaction) else {
            return;
        };
        let leg = known[slot].1;
        known[slot].2 = Some(response.mapped);
        // As many as there are servers, the newest: older ones are of mappings that may be gone.
        let of_leg = known.iter().filter(|(_, of, mapped)| *of == leg && mapped.is_some());
        let mut surplus = of_leg.count().saturating_sub(2);
        known.retain(|(_, of, mapped)| {
            let old = *of == leg && mapped.is_some() && surplus > 0;
            surplus -= usize::from(old);
            !old
        });
        self.tell_network(at, false);
    }

    /// One packet of each busy tunnel, or the keepalive that is due.
    fn send_tunnels(&mut self, of: usize) {
        let now = self.now;
        let talks = self.gateways[of].busy && !self.gateways[of].listens_only;
        for to in self.gateways[of].links.keys().copied().collect::<Vec<_>>() {
            if let Some(kind) = self.gateways[of].links[&to].tunnel.due(now, talks) {
                self.send_tunnel(of, to, kind);
            }
        }
    }

    /// One packet as the route says.
    fn send_tunnel(&mut self, of: usize, to: usize, kind: Kind) {
        let link = self.gateways[of].links.get_mut(&to).unwrap();
        let number = link.tunnel.send(self.now, kind);
        let len = match kind {
            Kind::Data => link.frame_len(),
            Kind::Keepalive => 32,
            Kind::Initiation => 148,
            Kind::Response => 92,
        };
        match link.route {
            Route::Unset => {}
            Route::Relay => self.relay_tunnel(of, to, number, kind),
            Route::Direct { pair, .. } => {
                let leg = usize::from(pair.uplink.0);
                let Some((socket, delay, source)) = self.carry(of, leg, pair.remote, len) else {
                    return;
                };
                // Anybody else has no key for it.
                let reached = socket.is_some_and(|(gateway, _)| gateway == to);
                if reached && (kind != Kind::Data || !self.data_cut.contains(&(of, to))) {
                    let source = Some(source);
                    self.schedule(delay, Happening::Tunnel { to, from: of, source, number, kind });
                }
            }
        }
    }

    fn relay_tunnel(&mut self, from: usize, to: usize, number: u64, kind: Kind) {
        if self.relay_reaches(from, to) {
            let packet = Happening::Tunnel { to, from, source: None, number, kind };
            self.schedule(self.relay_latency, packet);
        }
    }

    fn tunnel_received(
        &mut self,
        to: usize,
        from: usize,
        source: Option<SocketAddr>,
        number: u64,
        kind: Kind,
    ) {
        let now = self.now;
        let Some(link) = self.gateways[to].links.get_mut(&from) else { return };
        link.tunnel.receive(now, kind);
        match source {
            Some(source) => link.tunnel.received_directly = Some((source, now)),
            None => {
                assert!(!link.tunnel.relayed.contains(&number), "two copies through the relay");
                if link.tunnel.relayed.len() == 64 {
                    link.tunnel.relayed.remove(0);
                }
                link.tunnel.relayed.push(number);
            }
        }
        if kind == Kind::Initiation {
            self.send_tunnel(to, from, Kind::Response);
        }
    }

    fn poll_data_plane(&mut self, of: usize) {
        if !self.gateways[of].control_up {
            return;
        }
        for other in self.gateways[of].links.keys().copied().collect::<Vec<_>>() {
            let peer = self.gateways[other].node_key;
            let tunnel = &mut self.gateways[of].links.get_mut(&other).unwrap().tunnel;
            let traffic = std::mem::take(&mut tunnel.traffic);
            let (direct, unanswered) = (tunnel.received_directly.take(), tunnel.unanswered_since);
            if traffic {
                self.handle(of, Input::Traffic { peer });
            }
            if let Some((from, at)) = direct {
                self.handle(of, Input::ReceivedDirectly { peer, from, at });
            }
            if let Some(since) = unanswered {
                self.handle(of, Input::UnansweredData { peer, since });
            }
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
            outputs += 1;
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
                Output::Timeout(deadline, reason) => {
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

    fn probe(&mut self, at: usize, pair: Pair, datagram: Vec<u8>) {
        let peers = self.gateways[at].links.len();
        let gateway = &mut self.gateways[at];
        gateway.probes_sent += 1;
        gateway.watch.datagram(self.now, peers);
        let own = gateway.legs.iter().map(|leg| leg.socket);
        let mapped = gateway.reflexive.iter().filter_map(|(_, _, mapped)| *mapped);
        assert!(own.chain(mapped).all(|own| own != pair.remote), "sent to itself: {pair:?}");
        assert!(!TUNNEL.contains(pair.remote.ip()), "sent into the tunnel: {pair:?}");
        assert!(!pair.remote.ip().is_loopback() && !pair.remote.ip().is_multicast());
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

    fn relay(&mut self, from: usize, peer: PublicKey, bytes: Vec<u8>) {
        self.gateways[from].relay_sent += 1;
        let Some(to) = self.by_key.get(&peer).copied() else { return };
        let since = self.now.since(self.started_at);
        let link = self.gateways[from].links.get_mut(&to).unwrap();
        link.signals += 1;
        watch::signals(link.signals, since);
        self.assert_sealed(&bytes);
        if self.keep_relayed {
            self.relayed.push(bytes.clone());
        }
        if self.relay_reaches(from, to) {
            let from = self.gateways[from].node_key;
            self.schedule(self.relay_latency, Happening::Relayed { to, from, bytes });
        }
    }

    /// As the daemon does: to the peer's relay as far as we know it, to ours if that one is down.
    fn relay_reaches(&mut self, from: usize, to: usize) -> bool {
        let (sender, receiver) = (&self.gateways[from], &self.gateways[to]);
        let known = sender.links[&to].home;
        let through = if self.relays_up.contains(&known) { known } else { sender.home };
        if !sender.relay_up || !sender.control_up || !self.relays_up.contains(&through) {
            return false;
        }
        let there = receiver.relay_up && receiver.control_up && !receiver.plain;
        if !there || through != receiver.home {
            let peer = receiver.node_key;
            self.schedule(self.relay_latency, Happening::PeerGone { to: from, peer });
            return false;
        }
        let deaf = self.relay_deaf.contains(&from) || self.relay_deaf.contains(&to);
        let lost = self.relay_loss > 0.0 && self.random.random_bool(self.relay_loss);
        !deaf && !lost
    }

    /// No address and port of anybody is to be read in what a relay sees.
    fn assert_sealed(&self, bytes: &[u8]) {
        // A hub's names are as secret as those of two.
        for leg in self.gateways.iter().take(8).flat_map(|gateway| &gateway.legs) {
            let port = leg.socket.port().to_be_bytes();
            let ip = match leg.socket.ip() {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let address = [&ip[..], &port].concat();
            assert!(bytes.windows(address.len()).all(|window| window != address), "in the clear");
        }
    }

    fn event(&mut self, at: usize, event: Event) {
        match event {
            Event::Route { peer, route, why } => {
                let other = self.by_key[&peer];
                let gateway = &mut self.gateways[at];
                gateway.routes.push((self.now, route, why));
                let link = gateway.links.get_mut(&other).unwrap();
                link.route = route;
                link.changes += 1;
                // As the daemon does: a dead path may be a mapping that is gone.
                if matches!(why, Why::Dead | Why::Withdrawn) {
                    self.schedule(Duration::ZERO, Happening::Stun { of: at, again: false });
                }
            }
            Event::Introduced { peer, home, .. } => {
                let other = self.by_key[&peer];
                self.gateways[at].links.get_mut(&other).unwrap().home = home.region;
            }
            Event::SeenAt { .. } | Event::Pinged { .. } | Event::NotPinged { .. } => {}
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
