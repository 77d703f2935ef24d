//! One gateway: the finder, its sockets, and what the data plane has and sees of each peer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use millrace_path::candidate::Candidate;
use millrace_path::finder::Finder;
use millrace_path::limits::FRAME_LEN_DEFAULT;
use millrace_path::nat64::Prefix;
use millrace_path::reflexive::{Reflexive, Seen};
use millrace_path::sealed::{PublicKey, SecretKey};
use millrace_path::{Instant, Route, Why};

use super::nat::Segment;
use super::watch::Watch;

pub struct Gateway {
    pub finder: Finder,
    pub node_key: PublicKey,
    pub secret: SecretKey,
    /// Uplinks, by number.
    pub legs: Vec<Leg>,
    /// The control process runs.
    pub control_up: bool,
    /// What it sends through relays arrives, and what is sent to it.
    pub relay_up: bool,
    /// Its connection to the relay comes back then: until then packets get lost and signals wait.
    pub relay_back_at: Instant,
    /// The relay at which it listens.
    pub home: u16,
    /// The tunnels have traffic.
    pub busy: bool,
    /// Answers what it gets through tunnels, as WireGuard does, but sends nothing of its own.
    pub listens_only: bool,
    /// Plain WireGuard: no finder, no relay.
    pub plain: bool,
    /// Addresses that it names to peers beside its own.
    pub bogus: Vec<Candidate>,
    pub links: BTreeMap<usize, Link>,
    pub reflexive: Reflexive,
    pub seen: Seen,
    pub stun_timer: Option<Instant>,
    /// When STUN servers were last asked because a path did not answer.
    pub suspected_at: Option<Instant>,
    pub timer: Option<Instant>,
    /// Each change of a route and when, of all peers.
    pub routes: Vec<(Instant, Route, Why)>,
    pub probes_sent: u64,
    pub relay_sent: u64,
    pub watch: Watch,
    /// Nanoseconds since 1970 at the start of the world.
    pub wall_at_zero: u64,
}

/// A socket and its place in the world.
#[derive(Clone, Debug)]
pub struct Leg {
    pub socket: SocketAddr,
    /// Behind which NAT.
    pub segment: Segment,
    /// To the middle of the Internet, one way.
    pub latency: Duration,
    /// Longest datagram that its access link carries.
    pub frame_len_max: usize,
    /// No UDP passes in either direction, and nobody says so.
    pub blocked: bool,
    /// IPv4 of a network that has only IPv6: what leaves here is sent to an address under this
    /// prefix, from the socket of an IPv6 leg.
    pub nat64: Option<Prefix>,
}

/// A peer as the data plane has it.
#[derive(Clone, Debug)]
pub struct Link {
    pub route: Route,
    /// The peer's relay, as the last introduction said.
    pub home: u16,
    /// Changes of the route.
    pub changes: u64,
    /// Where the configuration says the peer is, if it does.
    pub endpoint: Option<SocketAddr>,
    /// Datagrams of the finder to where the configuration says that the peer is.
    pub datagrams: u64,
    /// Its messages to the peer through the relay.
    pub signals: u64,
    pub tunnel: Tunnel,
}

/// What a tunnel packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Data,
    Keepalive,
    Initiation,
    Response,
}

/// The tunnel's packets from and to one peer.
#[derive(Clone, Debug, Default)]
pub struct Tunnel {
    pub sent: u64,
    pub received: u64,
    /// Numbers that came through the relay, the last ones, to see copies.
    pub relayed: Vec<u64>,
    pub received_at: Option<Instant>,
    /// From where without a relay, and when.
    pub received_directly: Option<(SocketAddr, Instant)>,
    /// The same, of the last that came so.
    pub came_from: Option<SocketAddr>,
    /// Data went out then, and nothing came back.
    pub unanswered_since: Option<Instant>,
    /// Data came in; a keepalive answers by then if nothing else does.
    pub keepalive_at: Option<Instant>,
    pub traffic: bool,
    /// Data was sent since the last look.
    pub sent_data: bool,
    pub initiated_at: Option<Instant>,
    /// The longest time without a packet since [`Tunnel::watched_from`].
    pub gap_max: Duration,
    pub watched_from: Option<Instant>,
}

impl Tunnel {
    /// From now on gaps count.
    pub fn watch(&mut self, now: Instant) {
        self.gap_max = Duration::ZERO;
        self.watched_from = Some(now);
    }

    /// The longest gap until now, the one that lasts included.
    pub fn gap(&self, now: Instant) -> Duration {
        let last = self.received_at.max(self.watched_from).unwrap_or_default();
        self.gap_max.max(now.since(last))
    }

    pub fn receive(&mut self, now: Instant, kind: Kind) {
        self.unanswered_since = None;
        self.traffic = true;
        if matches!(kind, Kind::Initiation | Kind::Response) {
            return;
        }
        let last = self.received_at.max(self.watched_from).unwrap_or(now);
        self.gap_max = self.gap_max.max(now.since(last));
        self.received_at = Some(now);
        self.received += 1;
        if kind == Kind::Data {
            let answer_by = now + Duration::from_secs(10);
            self.keepalive_at = Some(self.keepalive_at.map_or(answer_by, |at| at.min(answer_by)));
        }
    }

    /// What is to be sent now, if anything: WireGuard's timers.
    pub fn due(&self, now: Instant, talks: bool) -> Option<Kind> {
        let silence = self.unanswered_since.map_or(Duration::ZERO, |since| now.since(since));
        let again = self.initiated_at.is_none_or(|at| now.since(at) >= Duration::from_secs(5));
        if talks && silence >= Duration::from_secs(15) && again {
            return Some(Kind::Initiation);
        }
        if talks {
            return Some(Kind::Data);
        }
        self.keepalive_at.filter(|at| *at <= now).map(|_| Kind::Keepalive)
    }

    pub fn send(&mut self, now: Instant, kind: Kind) -> u64 {
        self.sent += 1;
        self.traffic = true;
        self.keepalive_at = None;
        if kind == Kind::Initiation {
            self.initiated_at = Some(now);
        }
        if kind == Kind::Data {
            self.unanswered_since.get_or_insert(now);
            self.sent_data = true;
        }
        self.sent
    }
}

impl Gateway {
    /// This address is its own, as far as it can know.
    pub fn has(&self, address: SocketAddr) -> bool {
        self.legs.iter().any(|leg| leg.socket == address) || self.seen.addresses.contains(&address)
    }
}

impl Link {
    pub fn new(endpoint: Option<SocketAddr>) -> Self {
        Self {
            route: Route::Unset,
            home: 1,
            changes: 0,
            endpoint,
            datagrams: 0,
            signals: 0,
            tunnel: Tunnel::default(),
        }
    }

    /// Bytes of the longest tunnel packet that the data plane sends on the route.
    pub fn frame_len(&self) -> usize {
        match self.route {
            Route::Direct { frame_len, .. } => frame_len,
            _ => FRAME_LEN_DEFAULT,
        }
    }
}

impl Leg {
    pub fn new(socket: &str, segment: Segment, latency: Duration) -> Self {
        let socket = socket.parse().unwrap();
        Self { socket, segment, latency, frame_len_max: 1472, blocked: false, nat64: None }
    }

    pub fn is_ipv6(&self) -> bool {
        self.socket.is_ipv6() && self.nat64.is_none()
    }
}
