//! The path finder of one gateway: all peers, one disco key, one budget.
//!
//! What its driver owes it:
//!
//! * STUN: ask at the start, every 20 s or so while there are peers (the NAT's mapping of the port
//!   must live), and at once at [`Suspected`](crate::Event::Suspected): a mapping that is gone looks
//!   like a dead path. What comes out goes in as [`Input::Network`].
//! * Own addresses as others see them, in [`Network::addresses`]: nothing sends to itself.
//! * [`Input::Traffic`] while the tunnel carries packets: without it a peer is idle, and an idle
//!   one is kept, not searched for.
//! * [`Input::ReceivedDirectly`] about as often as pings, a few times a second, as long as there is
//!   news: a peer whose control process is away answers none, and its tunnel lives.
//! * [`Input::RelayUp`] when a connection to a relay stands.
//! * [`Input::PeerGone`] when a relay says so of a packet to the peer.
//! * Packets for a peer whose relay is down go to our own relay: both may be about to move there.
//! * The path in the data plane's table at the start ([`Input::AddPeer`]), so that a restart moves
//!   nobody's tunnel.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem;
use std::net::SocketAddr;
use std::time::Duration;

use rand::{CryptoRng, RngCore};

use crate::budget::Budget;
use crate::candidate::{Candidate, OwnAddresses};
use crate::disco::{DiscoError, Envelope, Message};
use crate::introduce::{self, Home, IntroduceError};
use crate::limits::{FRAME_LEN_MIN, PROBES_IN_ALL};
use crate::nat::Nat;
use crate::output::{Event, Output, Reason, Refused, Route};
use crate::path::{Pair, UplinkId};
pub use crate::peer::report::{PathReport, PathState, Report};
use crate::peer::{Context, Own, Peer, Places, Pong};
pub use crate::peer::{Held, Uplink};
use crate::sealed::{BoxKey, PublicKey, SecretKey};
use crate::time::Instant;

/// What does not change while the process lives.
#[derive(Debug)]
pub struct Config {
    /// Our WireGuard key.
    pub node_key: PublicKey,
    /// Random, new at each start.
    pub disco_secret: SecretKey,
    /// Bytes of UDP payload of the tunnel's longest packet: its MTU and 32.
    pub frame_len: usize,
    /// What a path must carry to be used: the same, unless the data plane sends shorter packets on a
    /// path that carries only those.
    pub least_frame_len: usize,
    /// Nanoseconds since 1970 at [`Instant`] zero; what the clock does later changes nothing.
    pub wall_at_zero: u64,
}

/// What is ours and changes with the network.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// The relay at which we listen.
    pub home: Home,
    /// What peers are told.
    pub candidates: Vec<Candidate>,
    /// What is never probed.
    pub addresses: OwnAddresses,
    pub uplinks: Vec<Uplink>,
    /// What peers are told of our NAT, for those who ask why.
    pub nat: Nat,
}

/// What happened. Datagrams and packets are opened in place.
#[derive(Debug)]
pub enum Input<'i> {
    /// A peer of the configuration, with the box key of its and our WireGuard keys. Replaces one
    /// with the same key. `endpoint`: where the configuration says it is, if it does. `in_use`: the
    /// path that the process before this one left to the data plane; it is kept until it proves
    /// dead.
    AddPeer {
        peer: PublicKey,
        box_key: BoxKey,
        endpoint: Option<SocketAddr>,
        in_use: Option<Pair>,
    },
    RemovePeer {
        peer: PublicKey,
    },
    /// `major`: links came or went, so that nothing measured before counts.
    Network {
        network: Network,
        major: bool,
    },
    /// A datagram that the demultiplexer took for disco.
    Datagram {
        from: Pair,
        bytes: &'i mut [u8],
    },
    /// A packet that a relay says is from this peer, if it is disco or an introduction.
    Relayed {
        peer: PublicKey,
        bytes: &'i mut [u8],
    },
    /// The tunnel carries packets to or from the peer: once a second is enough.
    Traffic {
        peer: PublicKey,
    },
    /// The tunnel has sent data to the peer since the last look at its counters.
    Sent {
        peer: PublicKey,
    },
    /// A look at the tunnel's counters: when an authenticated packet last came from the peer,
    /// whichever way; None if none has come to this data plane.
    Received {
        peer: PublicKey,
        at: Option<Instant>,
    },
    /// The tunnel's last authenticated packet from the peer that no relay brought came from there,
    /// then.
    ReceivedDirectly {
        peer: PublicKey,
        from: SocketAddr,
        at: Instant,
    },
    /// We are connected to a relay, anew or at last.
    RelayUp,
    /// The relay says that the peer is not connected to it.
    PeerGone {
        peer: PublicKey,
    },
    /// Since then data was sent to the peer and nothing authenticated came back.
    UnansweredData {
        peer: PublicKey,
        since: Instant,
    },
    /// Somebody asks how the peer is reached: [`crate::Event::Pinged`] answers with `number`.
    Ping {
        peer: PublicKey,
        number: u32,
    },
    /// The instant of the last [`Output::Timeout`] is here.
    Timeout,
}

/// Sans-IO: [`Self::handle`] what happened, then do what [`Self::poll_output`] says until it says
/// nothing more.
pub struct Finder {
    own: Own,
    peers: BTreeMap<PublicKey, Peer>,
    by_disco_key: BTreeMap<PublicKey, PublicKey>,
    /// Each peer with a deadline once, the soonest first.
    deadlines: BTreeSet<(Instant, Reason, PublicKey)>,
    deadline_of: BTreeMap<PublicKey, (Instant, Reason)>,
    outputs: VecDeque<Output>,
    /// Peers whose pings wait for the budget of all, each once, in the order of their turns.
    waiting: VecDeque<PublicKey>,
    /// The deadline was told since the last input.
    told: bool,
    probes: Budget,
    refused: [u64; Refused::ALL.len()],
}

impl Finder {
    pub fn new(config: Config, now: Instant) -> Self {
        let own = Own {
            node_key: config.node_key,
            disco_key: config.disco_secret.public_key(),
            disco_secret: config.disco_secret,
            home: Home::default(),
            candidates: Vec::new(),
            places: Places::default(),
            addresses: OwnAddresses::default(),
            uplinks: Vec::new(),
            nat: Nat::default(),
            frame_len: config.frame_len.max(FRAME_LEN_MIN),
            least_frame_len: config.least_frame_len.max(FRAME_LEN_MIN),
            wall_at_zero: config.wall_at_zero,
        };
        Self {
            own,
            peers: BTreeMap::new(),
            by_disco_key: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            deadline_of: BTreeMap::new(),
            outputs: VecDeque::new(),
            waiting: VecDeque::new(),
            told: false,
            probes: Budget::new(PROBES_IN_ALL, now),
            refused: [0; Refused::ALL.len()],
        }
    }

    /// Takes in what happened at `now`, which never goes back. False for bytes that were refused, and
    /// counted, because nobody whom we know sent them.
    pub fn handle<R: RngCore + CryptoRng>(
        &mut self,
        now: Instant,
        input: Input<'_>,
        random: &mut R,
    ) -> bool {
        self.told = false;
        let mut taken = Ok(());
        match input {
            Input::AddPeer { peer, box_key, endpoint, in_use } => {
                self.remove(peer);
                let mut context = self.context(now, random);
                let added = Peer::new(peer, box_key, endpoint, in_use, &mut context);
                self.peers.insert(peer, added);
                self.with_peer(now, random, peer, |_, _| ());
            }
            Input::RemovePeer { peer } => self.remove(peer),
            Input::Network { network, major } => self.network(now, random, network, major),
            Input::Datagram { from, bytes } => taken = self.datagram(now, random, from, bytes),
            Input::Relayed { peer, bytes } => taken = self.relayed(now, random, peer, bytes),
            Input::Traffic { peer } => {
                self.with_peer(now, random, peer, |peer, context| peer.active(context));
            }
            Input::Sent { peer } => {
                self.with_peer(now, random, peer, |peer, context| peer.sent(context.now));
            }
            Input::Received { peer, at } => {
                self.with_peer(now, random, peer, |peer, _| peer.received(at));
            }
            Input::ReceivedDirectly { peer, from, at } => {
                let told = |peer: &mut Peer, context: &mut Context<'_>| {
                    peer.received_directly(context, from, at);
                };
                self.with_peer(now, random, peer, told);
            }
            Input::RelayUp => {
                for peer in self.peers.keys().copied().collect::<Vec<_>>() {
                    self.with_peer(now, random, peer, |peer, context| peer.relay_up(context.now));
                }
            }
            Input::PeerGone { peer } => {
                self.with_peer(now, random, peer, |peer, context| peer.gone(context));
            }
            Input::UnansweredData { peer, since } => {
                let told = |peer: &mut Peer, context: &mut Context<'_>| {
                    peer.unanswered_data(context, since);
                };
                self.with_peer(now, random, peer, told);
            }
            Input::Ping { peer, number } => {
                let asked = self.with_peer(now, random, peer, |peer, context| {
                    // Who asks for the way wants one.
                    peer.active(context);
                    peer.ask(context, number)
                });
                if asked != Some(true) {
                    self.outputs.push_back(Output::Event(Event::NotPinged { peer, number }));
                }
            }
            Input::Timeout => self.timeout(now, random),
        }
        if let Err(refused) = taken {
            self.refused[refused as usize] += 1;
        }
        self.serve_waiting(now, random);
        taken.is_ok()
    }

    /// The next thing to do, in order; None until the next input.
    pub fn poll_output(&mut self) -> Option<Output> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        if self.told {
            return None;
        }
        self.told = true;
        let peers = self.deadlines.first().map(|(at, reason, _)| (*at, *reason));
        let budget = (!self.waiting.is_empty()).then(|| (self.probes.ready_at(), Reason::Budget));
        let (at, reason) = peers.into_iter().chain(budget).min()?;
        Some(Output::Timeout(at, reason))
    }

    /// Where a peer's packets go.
    pub fn route(&self, peer: PublicKey) -> Option<Route> {
        self.peers.get(&peer).map(|peer| peer.route)
    }

    /// All that is known of a peer.
    pub fn report(&self, now: Instant, peer: PublicKey) -> Option<Report> {
        Some(self.peers.get(&peer)?.report(now, self.own.lens()))
    }

    /// How much is kept of a peer: bounded, whatever it says.
    pub fn held(&self, peer: PublicKey) -> Option<Held> {
        self.peers.get(&peer).map(Peer::held)
    }

    /// Our disco key: what peers call us by.
    pub fn disco_key(&self) -> PublicKey {
        self.own.disco_key
    }

    /// What was not used, by name and how often.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Refused::ALL.into_iter().map(|(refused, name)| (name, self.refused[refused as usize]))
    }

    fn datagram<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        from: Pair,
        bytes: &mut [u8],
    ) -> Result<(), Refused> {
        // The same address in its other form is another key of every table.
        let ip = from.remote.ip().to_canonical();
        let from = Pair { remote: SocketAddr::new(ip, from.remote.port()), ..from };
        let (peer, message) = self.open(bytes)?;
        let handled = self.with_peer(now, random, peer, |peer, context| {
            peer.heard_directly(context.now);
            match message {
                Message::Ping { transaction, .. } => peer.ping(context, from, transaction),
                Message::Pong { transaction, source, received_age_ms } => {
                    let received_age = received_age_ms.map(|ms| Duration::from_millis(ms.into()));
                    peer.pong(context, from, Pong { transaction, seen_as: source, received_age })
                }
                Message::CallMeMaybe { .. } => Err(Refused::CallMeMaybeByUdp),
                Message::Unknown { .. } => Err(Refused::DiscoUnknownType),
            }
        });
        handled.unwrap_or(Err(Refused::UnknownDiscoKey))
    }

    fn relayed<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        peer: PublicKey,
        bytes: &mut [u8],
    ) -> Result<(), Refused> {
        if !self.peers.contains_key(&peer) {
            return Err(Refused::RelayUnknownPeer);
        }
        if introduce::is_introduction(bytes) {
            return self.introduced(now, random, peer, bytes);
        }
        let (sender, message) = self.open(bytes)?;
        if sender != peer {
            return Err(Refused::UnknownDiscoKey);
        }
        let handled = self.with_peer(now, random, peer, |peer, context| {
            peer.heard();
            match message {
                Message::CallMeMaybe { addresses } => {
                    peer.called(now, addresses);
                    Ok(())
                }
                Message::Ping { transaction, .. } => peer.relayed_ping(context, transaction),
                Message::Pong { transaction, .. } => peer.relayed_pong(context, transaction),
                Message::Unknown { .. } => Err(Refused::DiscoUnknownType),
            }
        });
        handled.unwrap_or(Err(Refused::RelayUnknownPeer))
    }

    fn introduced<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        peer: PublicKey,
        bytes: &mut [u8],
    ) -> Result<(), Refused> {
        let before = self.peers.get(&peer).and_then(Peer::disco_key);
        let own = self.own.disco_key;
        let known = mem::take(&mut self.by_disco_key);
        let is_taken = |key| key == own || known.get(&key).is_some_and(|owner| *owner != peer);
        let taken = self.with_peer(now, random, peer, |peer, context| {
            Ok((peer.introduced(context, bytes, is_taken)?, peer.disco_key()))
        });
        self.by_disco_key = known;
        let (new, key) = match taken {
            Some(Ok(taken)) => taken,
            Some(Err(error)) => return Err(refused_introduction(error)),
            None => return Err(Refused::RelayUnknownPeer),
        };
        if new {
            before.map(|before| self.by_disco_key.remove(&before));
            key.map(|key| self.by_disco_key.insert(key, peer));
        }
        Ok(())
    }

    /// Opens a disco message and says whose it is. No cryptography for strangers.
    fn open(&self, bytes: &mut [u8]) -> Result<(PublicKey, Message), Refused> {
        let envelope = Envelope::parse(bytes).ok_or(Refused::NotDisco)?;
        let key = self.by_disco_key.get(&envelope.sender).ok_or(Refused::UnknownDiscoKey)?;
        let peer = self.peers.get(key).ok_or(Refused::UnknownDiscoKey)?;
        let message = envelope.open(peer.disco_box().ok_or(Refused::UnknownDiscoKey)?);
        let message = message.map_err(|error| match error {
            DiscoError::Sealed => Refused::DiscoForged,
            DiscoError::Short { .. } => Refused::DiscoShort,
        })?;
        Ok((*key, message))
    }

    fn network<R: RngCore>(&mut self, now: Instant, random: &mut R, network: Network, major: bool) {
        let own = &self.own;
        let same = own.home == network.home
            && own.candidates == network.candidates
            && own.uplinks == network.uplinks;
        let same_nat = own.nat == network.nat;
        let moved = self.own.places.take(&network.candidates);
        self.own.home = network.home;
        self.own.candidates = network.candidates;
        self.own.addresses = network.addresses;
        self.own.uplinks = network.uplinks;
        self.own.nat = network.nat;
        if same && same_nat && !major {
            return;
        }
        for peer in self.peers.keys().copied().collect::<Vec<_>>() {
            self.with_peer(now, random, peer, |peer, context| {
                if same && !major {
                    peer.own_nat_changed(now);
                } else {
                    peer.own_changed(context, major, moved);
                }
            });
        }
    }

    fn timeout<R: RngCore>(&mut self, now: Instant, random: &mut R) {
        let due = self.deadlines.iter().take_while(|(at, ..)| *at <= now);
        for peer in due.map(|(.., peer)| *peer).collect::<Vec<_>>() {
            self.with_peer(now, random, peer, |_, _| ());
        }
    }

    /// A ping for each peer in turn, as long as the budget of all lasts: without turns, the peers
    /// with the lowest keys would have all of it, and every peer would wake for every token.
    fn serve_waiting<R: RngCore>(&mut self, now: Instant, random: &mut R) {
        while !self.waiting.is_empty() && self.probes.is_ready(now) {
            let Some(peer) = self.waiting.pop_front() else { return };
            self.with_peer(now, random, peer, |peer, context| peer.turn(context));
        }
    }

    /// Lets a peer take something in and then do all that is due. None if there is no such peer.
    fn with_peer<R: RngCore, T>(
        &mut self,
        now: Instant,
        random: &mut R,
        key: PublicKey,
        take_in: impl FnOnce(&mut Peer, &mut Context<'_>) -> T,
    ) -> Option<T> {
        let mut peer = self.peers.remove(&key)?;
        let mut context = self.context(now, random);
        let taken = take_in(&mut peer, &mut context);
        peer.tick(&mut context);
        let deadline = peer.deadline(&context);
        self.peers.insert(key, peer);
        self.set_deadline(key, deadline);
        Some(taken)
    }

    fn context<'c, R: RngCore>(&'c mut self, now: Instant, random: &'c mut R) -> Context<'c> {
        let Self { own, outputs, probes, waiting, .. } = self;
        Context { now, own, random, outputs, probes, waiting }
    }

    fn set_deadline(&mut self, peer: PublicKey, deadline: Option<(Instant, Reason)>) {
        if let Some((at, reason)) = self.deadline_of.remove(&peer) {
            self.deadlines.remove(&(at, reason, peer));
        }
        if let Some((at, reason)) = deadline {
            self.deadline_of.insert(peer, (at, reason));
            self.deadlines.insert((at, reason, peer));
        }
    }

    fn remove(&mut self, key: PublicKey) {
        self.set_deadline(key, None);
        self.waiting.retain(|waiting| *waiting != key);
        if let Some(disco_key) = self.peers.remove(&key).and_then(|peer| peer.disco_key()) {
            self.by_disco_key.remove(&disco_key);
        }
    }
}

/// A pair of the only uplink, for drivers that have one.
pub fn only_uplink(remote: SocketAddr) -> Pair {
    Pair { uplink: UplinkId(0), remote }
}

fn refused_introduction(error: IntroduceError) -> Refused {
    match error {
        IntroduceError::Version { .. } => Refused::IntroduceVersion,
        IntroduceError::Sealed | IntroduceError::Sender => Refused::IntroduceForged,
        IntroduceError::Long { .. } | IntroduceError::Malformed => Refused::IntroduceMalformed,
        IntroduceError::Replayed { .. } => Refused::IntroduceReplayed,
    }
}
