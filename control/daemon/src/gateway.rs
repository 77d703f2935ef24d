//! One gateway: its data plane, its relays, its peers and the path finder that decides. Everything
//! comes together here and nothing waits here: the service polls, and calls what is ready.
//!
//! The way of a relayed packet: data plane → detour socket → `detour` → relay of the peer; and
//! back: relay → `relayed` → detour socket → data plane, which alone can open it.

mod connects;
mod detour;
mod kinds;
mod link;
mod outputs;
mod relayed;
mod routers;
mod twice;
mod wire;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use millrace_config::config::EndpointName;
use millrace_config::discovery::{Discovery, HttpUrl};
use millrace_ebpf::link::{self as plane_link, Welcome};
use millrace_path::candidate::{Candidate, CandidateKind, OwnAddresses, Prefix};
use millrace_path::finder::{self, Finder, Input, Uplink};
use millrace_path::introduce::Home;
use millrace_path::output::{Route, Why};
use millrace_path::path::{Pair, UplinkId};
use millrace_path::reflexive::{Reflexive, Seen};
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};
use millrace_path::{Instant, Reason};
use rand::rngs::OsRng;
use rand::{RngCore, TryRngCore};

use crate::clock;
use crate::counters::Counters;
use crate::limits::{CONNECT_AGAIN, HISTORY_LEN, LEAST_FRAME_LEN, TRAFFIC_INTERVAL, TRAFFIC_QUIET};
use crate::names::Names;
use crate::network::{Network, Way};
use crate::plane::Plane;
use crate::relay_client::RelayConfig;
use crate::relays::Relays;
use crate::traffic::Traffic;
use crate::udp::Source;
use connects::Connects;
use detour::Inbound;
use kinds::Kinds;
use routers::Routers;
use twice::Twice;

/// Everything that control knows.
pub struct Gateway {
    pub interface: String,
    pub discovery: Discovery,
    pub network: Network,
    ways: Vec<(UplinkId, Way)>,
    pub plane: Option<Plane>,
    plane_path: PathBuf,
    connect_at: Option<Instant>,
    /// Why there is no data plane, or why it is of no use.
    pub plane_problem: Option<String>,
    pub welcome: Option<Welcome>,
    pub finder: Option<Finder>,
    finder_at: Option<(Instant, Reason)>,
    pub peers: BTreeMap<PublicKey, Peer>,
    slots: BTreeMap<u32, PublicKey>,
    box_requests: BoxRequests,
    connects: Connects,
    pub relays: Relays,
    pub reflexive: Reflexive,
    pub names: Names,
    pub seen: Seen,
    pub kinds: Kinds,
    /// When STUN servers were last asked because a path did not answer.
    suspected_at: Option<Instant>,
    traffic_at: Option<Instant>,
    traffic_seen_at: Instant,
    /// The address of ours that a remote one spoke to.
    sources: HashMap<Pair, Source>,
    twice: Twice,
    pub routers: Routers,
    inbound: Inbound,
    pub counters: Counters,
    /// What operators asked for and is not answered yet, by number.
    pub pinged: VecDeque<Pinged>,
    next_number: u32,
    buffer: Box<[u8]>,
}

/// A configured peer.
pub struct Peer {
    pub key: PublicKey,
    pub slot: u32,
    pub endpoint: Option<SocketAddr>,
    pub keepalive_s: u16,
    pub allowed_ips: Vec<ipnet::IpNet>,
    box_key: Option<BoxKey>,
    /// Why it can have no box key.
    pub problem: Option<&'static str>,
    pub home: Option<Home>,
    /// The relay through which it was last heard.
    pub heard_at: Option<usize>,
    /// Looks at the traffic at which what came may have come by a relay.
    pub relayed_looks: u8,
    pub route: Route,
    pub since: Instant,
    pub history: VecDeque<Change>,
    pub traffic: Traffic,
    pub relayed_sent_bytes: u64,
    pub relayed_received_bytes: u64,
    /// The last handshake initiation that went to a relay: should the peer only then appear there,
    /// it is sent once more, instead of after WireGuard's five seconds.
    parked: Option<(Instant, Vec<u8>)>,
}

/// One change of a peer's route.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub at: Instant,
    pub route: Route,
    pub why: Why,
}

/// The answer to a ping that somebody asked for; no route: it could not be sent.
#[derive(Clone, Copy, Debug)]
pub struct Pinged {
    pub number: u32,
    pub answer: Option<(Route, std::time::Duration)>,
}

/// Box keys that the data plane was asked for.
#[derive(Default)]
struct BoxRequests {
    next: u32,
    waiting: BTreeMap<u32, For>,
    /// There was no room to ask.
    unsent: Vec<u32>,
}

/// Whose key it is.
#[derive(Clone, Copy)]
enum For {
    Peer(PublicKey),
    Relay(PublicKey),
    /// Nobody's: a secret of our own that no restart changes.
    PortMapping,
}

impl Peer {
    fn new(now: Instant, peer: plane_link::Peer) -> Self {
        Self {
            key: PublicKey(peer.public_key.0),
            slot: peer.slot,
            endpoint: peer.endpoint,
            keepalive_s: peer.keepalive_s,
            allowed_ips: peer.allowed_ips,
            box_key: None,
            problem: None,
            home: None,
            heard_at: None,
            relayed_looks: 0,
            route: Route::Unset,
            since: now,
            history: VecDeque::new(),
            traffic: Traffic::default(),
            relayed_sent_bytes: 0,
            relayed_received_bytes: 0,
            parked: None,
        }
    }

    fn remember(&mut self, change: Change) {
        if self.history.len() == HISTORY_LEN {
            self.history.pop_front();
        }
        self.history.push_back(change);
        (self.route, self.since) = (change.route, change.at);
    }

    fn home_url(&self) -> Option<&str> {
        self.home.as_ref().map(|home| home.url.as_str()).filter(|url| !url.is_empty())
    }
}

impl Gateway {
    /// Knows nothing yet: connects to the data plane at the first [`Self::handle_timeouts`].
    pub fn new(interface: &str, discovery: Discovery) -> io::Result<Self> {
        let now = clock::now();
        let mut this = Self {
            interface: interface.to_owned(),
            discovery: Discovery::default(),
            network: Network::default(),
            ways: Vec::new(),
            plane: None,
            plane_path: plane_link::path(interface),
            connect_at: Some(now),
            plane_problem: Some("not tried yet".to_owned()),
            welcome: None,
            finder: None,
            finder_at: None,
            peers: BTreeMap::new(),
            slots: BTreeMap::new(),
            box_requests: BoxRequests::default(),
            connects: Connects::new(now),
            relays: Relays::default(),
            reflexive: Reflexive::default(),
            names: Names::new()?,
            seen: Seen::default(),
            kinds: Kinds::new(now)?,
            suspected_at: None,
            traffic_at: None,
            traffic_seen_at: now,
            sources: HashMap::new(),
            twice: Twice::default(),
            routers: Routers::new()?,
            inbound: Inbound::default(),
            counters: Counters::default(),
            pinged: VecDeque::new(),
            next_number: 0,
            buffer: vec![0; plane_link::detour::BUFFER_LEN].into(),
        };
        this.look_at_network()?;
        this.set_discovery(now, discovery)?;
        Ok(this)
    }

    /// A new `[discovery]`: relays and servers that stay are not disturbed.
    pub fn set_discovery(&mut self, now: Instant, discovery: Discovery) -> io::Result<()> {
        let stun_of = |relay: &HttpUrl| {
            let text = if relay.host.contains(':') {
                format!("[{}]:{STUN_PORT}", relay.host)
            } else {
                format!("{}:{STUN_PORT}", relay.host)
            };
            EndpointName::parse(&text).ok()
        };
        let mut names: Vec<EndpointName> =
            discovery.relay.iter().filter_map(|relay| stun_of(&relay.url)).collect();
        for name in &discovery.stun {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        self.names.want(now, names);
        // Those that need no look-up are known at once.
        self.reflexive.set_servers(now, &self.names.addresses());
        self.discovery = discovery;
        self.set_relays(now)?;
        self.look_at_routers(now);
        self.tell_finder(now, false);
        Ok(())
    }

    fn set_relays(&mut self, now: Instant) -> io::Result<()> {
        let welcome = self.welcome.as_ref();
        let node_key = welcome.and_then(|w| w.public_key).map(|key| PublicKey(key.0));
        let mark = welcome.map(|welcome| welcome.fwmark).filter(|mark| *mark != 0);
        let discovery = &self.discovery;
        let config = |relay| RelayConfig { mark, ..RelayConfig::of(relay, discovery) };
        let configs = discovery.relay.iter().map(config).collect();
        let urls: Vec<String> = self.relays.list.iter().map(|relay| relay.url.clone()).collect();
        self.relays.set(now, configs, node_key)?;
        // Their places may be others now.
        for peer in self.peers.values_mut() {
            peer.heard_at = peer.heard_at.and_then(|at| self.relays.position(urls.get(at)?));
        }
        Ok(())
    }

    /// Asks the kernel what networks there are. Call at news of it.
    pub fn look_at_network(&mut self) -> io::Result<()> {
        let now = clock::now();
        let mut seen = Network::look()?;
        // Our own tunnel is no way for itself, whatever kind of interface it is.
        let own = self.interface.as_str();
        seen.links.values_mut().filter(|link| link.name == own).for_each(|l| l.is_tunnel = true);
        if seen == self.network {
            return Ok(());
        }
        let major = seen.is_major_change(&self.network);
        self.network = seen;
        self.set_ways();
        self.look_at_routers(now);
        if major {
            tracing::info!(ways = self.ways.len(), "the network changed");
            self.sources.clear();
            self.reflexive.forget();
            self.seen = Seen::default();
            self.kinds.forget(now);
            self.names.again(now);
            self.relays.network_changed(now, &self.network.addresses);
        }
        self.reflexive.ask(now);
        self.tell_finder(now, major);
        Ok(())
    }

    /// Tells the finder what is ours now.
    fn tell_finder(&mut self, now: Instant, major: bool) {
        let Some(welcome) = &self.welcome else { return };
        let candidates = self.candidates(welcome.listen_port);
        let home = self.relays.home().map(|relay| Home { region: 0, url: relay.url.clone() });
        let network = finder::Network {
            home: home.unwrap_or_default(),
            addresses: OwnAddresses {
                sockets: candidates.iter().filter_map(Candidate::own_address).collect(),
                tunnels: self.tunnels(),
            },
            candidates,
            uplinks: self.ways.iter().map(|(id, way)| Uplink { id: *id, ipv6: way.ipv6 }).collect(),
            nat: self.nat(),
        };
        self.input(now, Input::Network { network, major });
    }

    /// What peers are told of us, whose data plane has this port.
    pub fn candidates(&self, port: u16) -> Vec<Candidate> {
        let mut candidates = self.network.candidates(port);
        let mut add = |kind, address| {
            if !candidates.iter().any(|known: &Candidate| known.address == address) {
                candidates.push(Candidate { kind, address });
            }
        };
        for address in &self.discovery.address {
            add(CandidateKind::Configured, *address);
        }
        for mapped in &self.routers.mapped {
            add(CandidateKind::PortMapped, mapped.external);
        }
        let is_hard = self.nat().is_hard() == Some(true);
        for address in &self.seen.addresses {
            add(CandidateKind::Reflexive, *address);
        }
        // What was seen is no guess.
        for address in self.seen.addresses.iter().filter(|_| is_hard) {
            let kept = SocketAddr::new(address.ip(), port);
            add(CandidateKind::ReflexiveLocalPort, kept);
        }
        candidates
    }

    /// Prefixes that lead into tunnels, ours and others'.
    fn tunnels(&self) -> Vec<Prefix> {
        let routed = self.peers.values().flat_map(|peer| &peer.allowed_ips);
        let routed = routed.filter(|net| net.prefix_len() > 0);
        let routed = routed.map(|net| Prefix { address: net.network(), length: net.prefix_len() });
        let is_tunnel = |ifindex| self.network.links.get(&ifindex).is_some_and(|l| l.is_tunnel);
        let own = self.network.addresses.iter().filter(|address| is_tunnel(address.ifindex));
        let own = own.map(|address| Prefix { address: address.ip, length: address.prefix_len });
        routed.chain(own).collect()
    }

    /// A new path finder, as with a new key: every peer begins anew, from the path in use.
    fn restart_finder(&mut self, now: Instant) {
        let Some(welcome) = &self.welcome else { return };
        let Some(node_key) = welcome.public_key else {
            self.finder = None;
            return;
        };
        let mut secret = zeroize::Zeroizing::new([0; 32]);
        let mut random = OsRng.unwrap_err();
        random.fill_bytes(&mut *secret);
        let wall = clock::since_1970().as_nanos() as u64;
        // Type, index, counter and tag around the inner packet.
        let frame_len = usize::from(welcome.mtu) + 32;
        let config = finder::Config {
            node_key: PublicKey(node_key.0),
            disco_secret: SecretKey::from_bytes(*secret),
            frame_len,
            // On shorter paths the data plane tells senders how long packets may be.
            least_frame_len: frame_len.min(LEAST_FRAME_LEN),
            wall_at_zero: wall.saturating_sub(now.as_nanos()),
        };
        self.finder = Some(Finder::new(config, now));
        self.tell_finder(now, false);
        for key in self.peers.keys().copied().collect::<Vec<_>>() {
            self.add_to_finder(now, key);
        }
    }

    /// One input, and everything that follows from it.
    fn input(&mut self, now: Instant, input: Input<'_>) {
        let Some(finder) = &mut self.finder else { return };
        finder.handle(now, input, &mut OsRng.unwrap_err());
        self.carry_out(now);
    }

    /// Pings a peer along its present route; the answer appears in [`Self::pinged`].
    pub fn ping(&mut self, now: Instant, peer: PublicKey) -> u32 {
        self.next_number = self.next_number.wrapping_add(1);
        let number = self.next_number;
        if self.finder.is_none() {
            self.pinged.push_back(Pinged { number, answer: None });
        } else {
            self.input(now, Input::Ping { peer, number });
        }
        number
    }

    /// Writes what waits for relays: after operators were served.
    pub fn flush(&mut self, now: Instant) {
        self.relays.flush(now);
    }

    /// When [`Self::handle_timeouts`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let finder = self.finder_at.map(|(at, _)| at);
        let deadlines = [finder, self.connect_at, self.traffic_at, self.reflexive.deadline()];
        let reflexive_waits = self.plane.as_ref().is_none_or(|plane| plane.tools.is_none());
        let deadlines = deadlines.into_iter().take(if reflexive_waits { 3 } else { 4 });
        let others = [
            self.names.deadline(),
            self.relays.deadline(),
            self.routers.deadline(),
            self.kinds_deadline(clock::now()),
            self.connects.deadline(),
        ];
        deadlines.chain(others).flatten().min()
    }

    /// Does what is due.
    pub fn handle_timeouts(&mut self, now: Instant) {
        if self.connect_at.is_some_and(|at| at <= now) {
            self.connect(now);
        }
        if self.finder_at.is_some_and(|(at, _)| at <= now) {
            self.finder_at = None;
            self.input(now, Input::Timeout);
        }
        if self.names.handle(now) {
            let addresses = self.names.addresses();
            self.reflexive.set_servers(now, &addresses);
        }
        self.handle_routers(now);
        self.ask_servers(now);
        self.handle_kinds(now);
        for at in 0..self.relays.list.len() {
            if self.relays.list[at].client.deadline().is_some_and(|deadline| deadline <= now) {
                self.handle_relay(now, at);
            }
        }
        if self.traffic_at.is_some_and(|at| at <= now) {
            self.traffic_at = Some(now + TRAFFIC_INTERVAL);
            self.look_at_traffic(now);
            // Who wakes up is told by the data plane.
            if now.since(self.traffic_seen_at) >= TRAFFIC_QUIET {
                self.traffic_at = None;
            }
        }
        self.ask_for_handshakes(now);
        self.relays.flush(now);
    }

    fn connect(&mut self, now: Instant) {
        match Plane::connect(&self.plane_path) {
            Ok(plane) => {
                self.connect_at = None;
                self.plane = Some(plane);
            }
            Err(error) => {
                self.connect_at = Some(now + CONNECT_AGAIN);
                let why = format!("connecting to {}: {error}", self.plane_path.display());
                if self.plane_problem.as_ref() != Some(&why) {
                    tracing::warn!("no data plane: {why}");
                }
                self.plane_problem = Some(why);
            }
        }
    }

    /// What the tables say of each peer's traffic.
    fn look_at_traffic(&mut self, now: Instant) {
        let Some(tools) = self.plane.as_ref().and_then(|plane| plane.tools.as_ref()) else {
            return;
        };
        let mut changes = Vec::new();
        for peer in self.peers.values_mut() {
            let Some(line) = tools.observed.read(peer.slot) else { continue };
            let change = peer.traffic.look(&line);
            let directly = change.received && peer.relayed_looks == 0;
            peer.relayed_looks = peer.relayed_looks.saturating_sub(1);
            let from = line.remote().filter(|_| directly);
            let at = (line.received_ns > 0).then(|| Instant::from_nanos(line.received_ns));
            changes.push((peer.key, change, from, at));
        }
        for (peer, change, from, at) in changes {
            if change.active || change.unanswered_since.is_some() {
                self.traffic_seen_at = now;
            }
            if change.active {
                self.input(now, Input::Traffic { peer });
            }
            if change.sent {
                self.input(now, Input::Sent { peer });
            }
            if change.received {
                self.input(now, Input::Received { peer, at });
            }
            if let (Some(from), Some(at)) = (from, at) {
                let from = self.real_address(from);
                self.input(now, Input::ReceivedDirectly { peer, from, at });
            }
            if let Some(since) = change.unanswered_since {
                self.input(now, Input::UnansweredData { peer, since });
            }
        }
    }
}

/// Where every relay's STUN server listens.
const STUN_PORT: u16 = 3478;
