//! A world in virtual time: gateways behind NATs, a relay, STUN servers, latency, loss, one seed.
//!
//! The finder is the real one, and so are STUN requests and answers; the world plays the network
//! and the daemon: it asks STUN servers, tells the finder what it learnt, carries what it sends.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by tests that each use a part"
)]

pub mod nat;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::time::Duration;

use millrace_path::candidate::{Candidate, CandidateKind, OwnAddresses};
use millrace_path::finder::{Config, Finder, Input, Network, Uplink};
use millrace_path::introduce::Home;
use millrace_path::limits::FRAME_LEN_DEFAULT;
use millrace_path::path::{Pair, UplinkId};
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};
use millrace_path::transaction::TransactionId;
use millrace_path::{Event, Instant, Output, Route, Transmit, Why, stun};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha12Rng;

use nat::Nat;

/// Where STUN is answered: two addresses, so that a mapping that varies is seen.
pub const STUN_SERVERS: [&str; 2] = ["198.51.100.1:3478", "198.51.100.2:3478"];
/// Some day in 2027.
const WALL_AT_ZERO: u64 = 1_800_000_000_000_000_000;
const STUN_INTERVAL: Duration = Duration::from_secs(23);

/// One gateway and its place in the world.
pub struct Gateway {
    pub finder: Finder,
    pub node_key: PublicKey,
    secret: SecretKey,
    pub socket: SocketAddr,
    /// NATs from the innermost to the outermost, as indices of [`World::nats`].
    pub chain: Vec<usize>,
    /// To the middle of the Internet, one way.
    pub latency: Duration,
    /// Longest datagram that its access link carries.
    pub frame_len_max: usize,
    pub relay_up: bool,
    /// Further sockets on the open Internet, each with its own way there: uplinks 1, 2, ...
    pub extra: Vec<(SocketAddr, Duration)>,
    /// The tunnel has traffic.
    pub busy: bool,
    reflexive: Vec<(TransactionId, Option<SocketAddr>)>,
    timer: Option<Instant>,
    /// Each change of the route and when.
    pub routes: Vec<(Instant, Route, Why)>,
    pub probes_sent: u64,
    pub relay_sent: u64,
}

enum Happening {
    Datagram { to: usize, uplink: UplinkId, from: SocketAddr, bytes: Vec<u8> },
    Relayed { to: usize, from: PublicKey, bytes: Vec<u8> },
    StunRequest { from: SocketAddr, segment: Vec<usize>, server: SocketAddr, bytes: Vec<u8> },
    Timer { of: usize, at: Instant },
    Traffic { of: usize },
    Stun { of: usize },
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
    pub nats: Vec<Nat>,
    /// Chance that a datagram gets lost, each way.
    pub loss: f64,
    pub relay_latency: Duration,
    /// Direct datagrams from one gateway to another that vanish.
    pub cut: Vec<(usize, usize)>,
    /// Further sockets to which nothing comes through.
    pub cut_extra: Vec<SocketAddr>,
    /// Everything that went through the relay, for what it must not contain.
    pub relayed: Vec<Vec<u8>>,
    queue: BinaryHeap<Scheduled>,
    sequence: u64,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            now: Instant::from_nanos(1_000_000_000),
            random: ChaCha12Rng::seed_from_u64(seed),
            gateways: Vec::new(),
            nats: Vec::new(),
            loss: 0.0,
            relay_latency: Duration::from_millis(20),
            cut: Vec::new(),
            cut_extra: Vec::new(),
            relayed: Vec::new(),
            queue: BinaryHeap::new(),
            sequence: 0,
        }
    }

    /// Puts a gateway behind these NATs, innermost first.
    pub fn add_gateway(&mut self, socket: &str, chain: Vec<usize>, latency_ms: u64) -> usize {
        let mut bytes = [0; 32];
        self.random.fill_bytes(&mut bytes);
        let secret = SecretKey::from_bytes(bytes);
        self.random.fill_bytes(&mut bytes);
        let config = Config {
            node_key: secret.public_key(),
            disco_secret: SecretKey::from_bytes(bytes),
            frame_len: FRAME_LEN_DEFAULT,
            wall_at_zero: WALL_AT_ZERO,
        };
        self.gateways.push(Gateway {
            node_key: secret.public_key(),
            finder: Finder::new(config, self.now),
            secret,
            socket: socket.parse().unwrap(),
            chain,
            latency: Duration::from_millis(latency_ms),
            frame_len_max: 1472,
            relay_up: true,
            extra: Vec::new(),
            busy: true,
            reflexive: Vec::new(),
            timer: None,
            routes: Vec::new(),
            probes_sent: 0,
            relay_sent: 0,
        });
        self.gateways.len() - 1
    }

    /// Each gateway learns its addresses and its peers; traffic begins.
    pub fn start(&mut self) {
        for at in 0..self.gateways.len() {
            self.tell_network(at, false);
            self.add_peers(at, vec![None; self.gateways.len()]);
            self.schedule(Duration::ZERO, Happening::Stun { of: at });
            self.schedule(Duration::from_millis(100), Happening::Traffic { of: at });
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
        self.gateways[from].finder.route(self.gateways[to].node_key).unwrap()
    }

    pub fn is_direct(&self, from: usize, to: usize) -> bool {
        matches!(self.route(from, to), Route::Direct { .. })
    }

    pub fn both_direct(&self) -> bool {
        self.is_direct(0, 1) && self.is_direct(1, 0)
    }

    /// The relay or the NAT forgets nothing, but a gateway is told that its links changed.
    pub fn tell_network(&mut self, at: usize, major: bool) {
        let gateway = &self.gateways[at];
        let mut candidates =
            vec![Candidate { kind: CandidateKind::Interface, address: gateway.socket }];
        let mapped = gateway.reflexive.iter().filter_map(|(_, mapped)| *mapped);
        for address in mapped.clone() {
            if candidates.iter().all(|known| known.address != address) {
                candidates.push(Candidate { kind: CandidateKind::Reflexive, address });
            }
        }
        let mut sockets = vec![gateway.socket];
        sockets.extend(mapped);
        let mut uplinks = vec![Uplink { id: UplinkId(0), ipv6: gateway.socket.is_ipv6() }];
        for (at, (address, _)) in gateway.extra.iter().enumerate() {
            candidates.push(Candidate { kind: CandidateKind::Interface, address: *address });
            sockets.push(*address);
            uplinks.push(Uplink { id: UplinkId(at as u16 + 1), ipv6: address.is_ipv6() });
        }
        let network = Network {
            home: Home { region: 1, url: String::new() },
            candidates,
            addresses: OwnAddresses { sockets, tunnels: Vec::new() },
            uplinks,
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

    /// The control process dies and another starts, perhaps with its clock a day behind.
    pub fn restart(&mut self, at: usize, clock_back: bool) {
        let mut bytes = [0; 32];
        self.random.fill_bytes(&mut bytes);
        let day = 86_400_000_000_000;
        let config = Config {
            node_key: self.gateways[at].node_key,
            disco_secret: SecretKey::from_bytes(bytes),
            frame_len: FRAME_LEN_DEFAULT,
            wall_at_zero: WALL_AT_ZERO - if clock_back { day } else { 0 },
        };
        // What the process before left in the data plane's table.
        let routes = (0..self.gateways.len()).filter(|other| *other != at).map(|other| match self
            .route(at, other)
        {
            Route::Direct { pair, .. } => Some(pair),
            _ => None,
        });
        let routes = routes.collect();
        self.gateways[at].finder = Finder::new(config, self.now);
        self.gateways[at].timer = None;
        self.tell_network(at, false);
        self.add_peers(at, routes);
    }

    fn add_peers(&mut self, at: usize, in_use: Vec<Option<Pair>>) {
        let others = (0..self.gateways.len()).filter(|other| *other != at);
        for (other, in_use) in others.zip(in_use) {
            let theirs = self.gateways[other].node_key;
            let box_key = BoxKey::agree(&self.gateways[at].secret, theirs).unwrap();
            self.handle(at, Input::AddPeer { peer: theirs, box_key, endpoint: None, in_use });
        }
    }

    /// Asks the STUN servers, now.
    pub fn ask_stun(&mut self, at: usize) {
        self.gateways[at].reflexive.clear();
        for server in STUN_SERVERS {
            let mut id = [0; 12];
            self.random.fill_bytes(&mut id);
            let id = TransactionId(id);
            self.gateways[at].reflexive.push((id, None));
            let request = stun::binding_request(id).to_vec();
            self.send(at, server.parse().unwrap(), request);
        }
    }

    /// One datagram out of a gateway's socket into the network.
    fn send(&mut self, from: usize, to: SocketAddr, bytes: Vec<u8>) {
        let gateway = &self.gateways[from];
        if bytes.len() > gateway.frame_len_max || self.random.random_bool(self.loss) {
            return;
        }
        let (socket, chain) = (gateway.socket, gateway.chain.clone());
        let server = STUN_SERVERS.iter().any(|server| to == server.parse().unwrap());
        let Some(arrival) =
            nat::carry(&mut self.nats, &self.gateways, self.now, socket, &chain, to)
        else {
            return;
        };
        let jitter = self.random.random_range(1.0..1.1);
        if server {
            let delay = gateway_delay(&self.gateways[from], None).mul_f64(jitter);
            let request = Happening::StunRequest {
                from: arrival.source,
                segment: Vec::new(),
                server: to,
                bytes,
            };
            return self.schedule(delay, request);
        }
        let Some(to) = arrival.gateway else { return };
        let cut = self.cut.contains(&(from, to));
        if cut || bytes.len() > self.gateways[to].frame_len_max {
            return;
        }
        let near = self.gateways[from].chain == self.gateways[to].chain && !arrival.crossed;
        let delay = if near && !self.gateways[from].chain.is_empty() {
            Duration::from_micros(300)
        } else {
            gateway_delay(&self.gateways[from], Some(&self.gateways[to]))
        };
        let uplink = UplinkId(0);
        let datagram = Happening::Datagram { to, uplink, from: arrival.source, bytes };
        self.schedule(delay.mul_f64(jitter), datagram);
    }

    /// One datagram from one further socket to another.
    fn send_extra(&mut self, from: usize, uplink: u16, to: SocketAddr, bytes: Vec<u8>) {
        let (source, latency) = self.gateways[from].extra[usize::from(uplink) - 1];
        if self.cut_extra.contains(&to) || self.cut_extra.contains(&source) {
            return;
        }
        for (other, gateway) in self.gateways.iter().enumerate() {
            let place = gateway.extra.iter().position(|(address, _)| *address == to);
            let Some(place) = place else { continue };
            let delay = latency + gateway.extra[place].1;
            let uplink = UplinkId(place as u16 + 1);
            let jitter = self.random.random_range(1.0..1.1);
            let datagram = Happening::Datagram { to: other, uplink, from: source, bytes };
            return self.schedule(delay.mul_f64(jitter), datagram);
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Datagram { to, uplink, from, mut bytes } => {
                if let Ok(response) = stun::parse_response(&bytes) {
                    return self.stun_answered(to, response);
                }
                let from = Pair { uplink, remote: from };
                self.handle(to, Input::Datagram { from, bytes: &mut bytes });
            }
            Happening::Relayed { to, from, mut bytes } => {
                self.handle(to, Input::Relayed { peer: from, bytes: &mut bytes });
            }
            Happening::StunRequest { from, server, bytes, .. } => {
                let answer = stun::answer(&bytes, from).unwrap();
                let target = nat::arrive(&mut self.nats, &self.gateways, self.now, server, from);
                if let Some(to) = target {
                    let delay = gateway_delay(&self.gateways[to], None);
                    let bytes = answer.to_vec();
                    let (uplink, from) = (UplinkId(0), server);
                    self.schedule(delay, Happening::Datagram { to, uplink, from, bytes });
                }
            }
            Happening::Timer { of, at } => {
                if self.gateways[of].timer == Some(at) {
                    self.gateways[of].timer = None;
                    self.handle(of, Input::Timeout);
                }
            }
            Happening::Traffic { of } => {
                if self.gateways[of].busy {
                    for other in (0..self.gateways.len()).filter(|other| *other != of) {
                        let peer = self.gateways[other].node_key;
                        self.handle(of, Input::Traffic { peer });
                    }
                }
                self.schedule(Duration::from_secs(1), Happening::Traffic { of });
            }
            Happening::Stun { of } => {
                self.ask_stun(of);
                self.schedule(STUN_INTERVAL, Happening::Stun { of });
            }
        }
    }

    fn stun_answered(&mut self, at: usize, response: stun::BindingResponse) {
        let known = self.gateways[at].reflexive.clone();
        let Some(slot) = known.iter().position(|(id, _)| *id == response.transaction) else {
            return;
        };
        self.gateways[at].reflexive[slot].1 = Some(response.mapped);
        self.tell_network(at, false);
    }

    fn handle(&mut self, at: usize, input: Input<'_>) {
        let now = self.now;
        self.gateways[at].finder.handle(now, input, &mut self.random);
        let mut outputs = 0;
        while let Some(output) = self.gateways[at].finder.poll_output() {
            outputs += 1;
            assert!(outputs < 1000, "the finder does not come to an end");
            match output {
                Output::Transmit(Transmit::Udp { pair, datagram, .. }) => {
                    self.gateways[at].probes_sent += 1;
                    match pair.uplink {
                        UplinkId(0) => self.send(at, pair.remote, datagram),
                        UplinkId(extra) => self.send_extra(at, extra, pair.remote, datagram),
                    }
                }
                Output::Transmit(Transmit::Relay { peer, packet }) => self.relay(at, peer, packet),
                Output::Event(event) => self.event(at, event),
                Output::Timeout(deadline, reason) => {
                    // Whatever was due was done.
                    assert!(deadline > now, "{reason:?} is due again at once");
                    self.set_timer(at, deadline);
                }
            }
        }
    }

    fn set_timer(&mut self, of: usize, at: Instant) {
        let at = at.max(self.now);
        if self.gateways[of].timer != Some(at) {
            self.gateways[of].timer = Some(at);
            self.schedule(at.since(self.now), Happening::Timer { of, at });
        }
    }

    fn relay(&mut self, from: usize, to: PublicKey, bytes: Vec<u8>) {
        self.gateways[from].relay_sent += 1;
        self.relayed.push(bytes.clone());
        let receiver = self.gateways.iter().position(|gateway| gateway.node_key == to);
        let Some(to) = receiver else { return };
        if self.gateways[from].relay_up && self.gateways[to].relay_up {
            let from = self.gateways[from].node_key;
            self.schedule(self.relay_latency, Happening::Relayed { to, from, bytes });
        }
    }

    fn event(&mut self, at: usize, event: Event) {
        if let Event::Route { route, why, .. } = event {
            self.gateways[at].routes.push((self.now, route, why));
            // As the daemon does: a dead path may be a mapping that is gone.
            if matches!(why, Why::Dead | Why::Withdrawn) {
                self.schedule(Duration::ZERO, Happening::Stun { of: at });
            }
        }
    }

    fn schedule(&mut self, after: Duration, happening: Happening) {
        self.sequence += 1;
        let key = Reverse((self.now + after, self.sequence));
        self.queue.push(Scheduled(key, happening));
    }
}

/// One way, from a gateway to another, or to the middle of the Internet.
fn gateway_delay(from: &Gateway, to: Option<&Gateway>) -> Duration {
    from.latency + to.map_or(Duration::ZERO, |to| to.latency)
}
