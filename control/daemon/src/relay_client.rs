//! The connection to one relay: found, kept, and made again whatever happens to it.
//!
//! No thread waits for it (but for a name server), and no clock is read: the owner waits until the
//! client's one descriptor is readable or [`RelayClient::deadline`] has passed, calls
//! [`RelayClient::handle`], and takes [`RelayClient::next_event`] until there is none. Packets are
//! queued with [`RelayClient::send`]; [`RelayClient::flush`] after the last of a batch writes them
//! in one piece.
//!
//! The parts: [`resolve`] and [`dial`] make a TCP connection, [`link`] moves bytes through it, with
//! [`tls`] and [`trust`] where the URL says https, [`http`] asks a proxy and the relay's web server,
//! [`protocol`] is DERP; [`outbox`] and [`rate`] bound what waits, [`liveness`] and [`retry`] decide
//! when to begin anew.

pub mod config;
pub mod dial;
pub mod failure;
mod files;
pub mod fuzz;
pub mod http;
pub mod link;
pub mod liveness;
pub mod outbox;
pub mod protocol;
pub mod rate;
pub mod resolve;
pub mod retry;
pub mod tls;
pub mod trust;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::derp::{Frame, Gone, ServerInfo};
use millrace_path::sealed::{BoxKey, PublicKey};
use rustix::event::PollFlags;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

pub use config::{Fingerprint, Proxy, RelayConfig, Trust};
pub use failure::RelayFailure;
pub use outbox::Dropped;
pub use protocol::Packets;

use crate::limits;
use config::ProxyServer;
use dial::{Dial, Dialled};
use http::Answer;
use link::{Brought, Link};
use liveness::{Act, Liveness};
use outbox::Outbox;
use protocol::{Protocol, Said};
use rate::Rate;
use resolve::{Found, Resolver};
use retry::Retry;
use tls::Session;

/// A client of one relay.
#[derive(Debug)]
pub struct RelayClient {
    config: RelayConfig,
    node_key: PublicKey,
    /// Holds whatever descriptors the current stage has.
    epoll: OwnedFd,
    resolver: Resolver,
    stage: Stage,
    protocol: Protocol,
    outbox: Outbox,
    retry: Retry,
    tls: Option<Arc<ClientConfig>>,
    events: VecDeque<RelayEvent<'static>>,
    counts: Counts,
    now: Instant,
    home: bool,
    told_of_mark: bool,
}

#[derive(Debug)]
enum Stage {
    Waiting { until: Instant },
    LookUp { way: Way, limit: Instant, began: Instant },
    Dial { way: Way, dial: Dial, limit: Instant, began: Instant },
    Wire(Box<Wire>),
}

/// Where the TCP connection goes, and what is asked for there.
struct Way {
    host: String,
    port: u16,
    proxy: Option<ProxyServer>,
}

#[derive(Debug)]
struct Wire {
    link: Link,
    step: Step,
    way: Way,
    limit: Instant,
    began: Instant,
    /// Whether epoll tells when the kernel takes more.
    writing: bool,
    /// Nothing more comes, once what is unread was taken.
    ending: Option<RelayFailure>,
}

#[derive(Debug)]
enum Step {
    Tunnel,
    Tls,
    Login,
    Up { liveness: Liveness, rate: Option<Rate>, since: Instant },
}

/// What happened.
#[derive(Debug)]
pub enum RelayEvent<'c> {
    Connecting(Connecting),
    /// The owner must call [`RelayClient::give_box_key`] with the key of the boxes between the
    /// relay and this node.
    NeedBoxKey {
        relay_key: PublicKey,
    },
    Up(Up),
    /// In the order of arrival.
    Packets(Packets<'c>),
    PeerGone {
        peer: PublicKey,
        why: Gone,
    },
    /// What the relay says is wrong with this connection, as a second one with the same key; empty
    /// when all is well again. A stranger's words.
    Health(String),
    Restarting {
        reconnect_in: Duration,
        try_for: Duration,
    },
    /// Something that an operator should know and that ends nothing.
    Note(&'static str),
    Down {
        failure: RelayFailure,
        retry_at: Instant,
    },
}

/// What a connection that is not up yet waits for. Prints as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connecting {
    LookUp { host: String },
    Tcp { addresses: Vec<IpAddr>, port: u16 },
    Tunnel { proxy: SocketAddr, host: String, port: u16 },
    Tls { address: SocketAddr },
    Login { address: SocketAddr },
}

impl fmt::Display for Connecting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LookUp { host } => write!(f, "looking {host} up"),
            Self::Tcp { addresses, port } => {
                let addresses: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
                write!(f, "connecting to {} port {port}", addresses.join(", "))
            }
            Self::Tunnel { proxy, host, port } => {
                write!(f, "asking the proxy {proxy} for a tunnel to {host} port {port}")
            }
            Self::Tls { address } => write!(f, "starting TLS with {address}"),
            Self::Login { address } => write!(f, "logging in at {address}"),
        }
    }
}

/// A connection that carries packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Up {
    pub relay_key: PublicKey,
    pub info: ServerInfo,
    /// The other end of TCP: the relay, or the proxy.
    pub address: SocketAddr,
    pub proxied: bool,
    /// As "TLSv1_3"; none over plain HTTP.
    pub tls: Option<String>,
    /// From the start of the look-up to here.
    pub connect_time: Duration,
}

/// What was moved, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub logins: u64,
    pub failures: u64,
    pub sent_packets: u64,
    pub sent_bytes: u64,
    pub received_packets: u64,
    pub received_bytes: u64,
}

/// What [`RelayClient::advance`] found.
enum Advance {
    Nothing,
    Again,
    Packets(Range<usize>),
}

impl RelayClient {
    /// Connects for the first time at the first [`Self::handle`]. Fails where the system has no
    /// more descriptors.
    pub fn new(config: RelayConfig, node_key: PublicKey, now: Instant) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let resolver = Resolver::new()?;
        epoll::add(&epoll, &resolver, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self {
            protocol: Protocol::new(node_key, config.relay_key),
            config,
            node_key,
            epoll,
            resolver,
            stage: Stage::Waiting { until: now },
            outbox: Outbox::default(),
            retry: Retry::default(),
            tls: None,
            events: VecDeque::new(),
            counts: Counts::default(),
            now,
            home: false,
            told_of_mark: false,
        })
    }

    /// What to wait for: the same descriptor for as long as the client lives, readable when there
    /// is something to do, whichever way.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.epoll.as_fd(), PollFlags::IN)
    }

    /// When [`Self::handle`] must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        Some(match &self.stage {
            Stage::Waiting { until } => *until,
            Stage::LookUp { limit, .. } => *limit,
            Stage::Dial { dial, limit, .. } => {
                dial.deadline().map_or(*limit, |next| next.min(*limit))
            }
            Stage::Wire(wire) => match &wire.step {
                Step::Up { liveness, rate, .. } => {
                    let refilled = rate.as_ref().filter(|_| self.outbox.has_data());
                    let refilled = refilled.map(Rate::ready_at).filter(|_| wire.link.is_flushed());
                    refilled.map_or(liveness.deadline(), |at| at.min(liveness.deadline()))
                }
                _ => wire.limit,
            },
        })
    }

    /// Does what is due. Then take [`Self::next_event`] until there is none.
    pub fn handle(&mut self, now: Instant) {
        self.now = self.now.max(now);
        let result = match &mut self.stage {
            Stage::Waiting { until } if *until <= now => self.begin(),
            Stage::Waiting { .. } => Ok(()),
            Stage::LookUp { .. } => self.look_up(),
            Stage::Dial { .. } => self.dial(),
            Stage::Wire(_) => self.wire(),
        };
        self.settle(result);
    }

    /// What happened, oldest first. The last call, which finds nothing, writes what became due.
    pub fn next_event(&mut self) -> Option<RelayEvent<'_>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let found = self.advance();
            match found {
                Ok(Advance::Packets(range)) => {
                    let Stage::Wire(wire) = &self.stage else { return None };
                    return Some(RelayEvent::Packets(Packets::new(wire.link.bytes(range))));
                }
                Ok(Advance::Again) => {}
                Ok(Advance::Nothing) => {
                    let flushed = self.write_out();
                    self.settle(flushed);
                    if self.events.is_empty() {
                        return None;
                    }
                }
                Err(failure) => self.settle(Err(failure)),
            }
        }
    }

    /// Queues a packet. Data that finds no connection is dropped; disco, introductions and
    /// handshakes wait a while for one.
    pub fn send(&mut self, now: Instant, to: PublicKey, packet: &[u8]) {
        let (mut up, mut writing) = (false, false);
        if let Stage::Wire(wire) = &mut self.stage
            && let Step::Up { liveness, .. } = &mut wire.step
        {
            liveness.sent(now);
            (up, writing) = (true, wire.writing);
        }
        self.outbox.push(now, to, packet, up);
        // A long batch goes out in pieces, before the queue drops its head.
        if up && !writing && self.outbox.len() >= limits::RELAY_WRITE_MAX {
            self.flush(now);
        }
    }

    /// Writes what is queued, as far as it goes. A failure is told by the next event.
    pub fn flush(&mut self, now: Instant) {
        self.now = self.now.max(now);
        let result = self.write_out();
        self.settle(result);
    }

    /// The answer to `NeedBoxKey`.
    pub fn give_box_key(&mut self, now: Instant, relay_key: PublicKey, key: BoxKey) {
        self.now = self.now.max(now);
        self.protocol.give_box_key(relay_key, key);
        let result = self.introduce();
        self.settle(result);
    }

    /// Whether this relay is the one at which peers find us: told to the relay.
    pub fn set_home(&mut self, now: Instant, home: bool) {
        if std::mem::replace(&mut self.home, home) != home && self.is_up() {
            self.outbox.push_frame(now, &Frame::NotePreferred(home));
            self.flush(now);
        }
    }

    /// An address or a route came or went. A connection is asked whether it still works, and
    /// waiting is over.
    pub fn network_changed(&mut self, now: Instant) {
        self.now = self.now.max(now);
        self.retry.forget();
        let result = match &mut self.stage {
            Stage::Waiting { until } => {
                *until = now;
                Ok(())
            }
            Stage::Wire(wire) => match &mut wire.step {
                Step::Up { liveness, .. } => {
                    let act = liveness.doubt(now, rand::random());
                    self.act(act).and_then(|()| self.write_out())
                }
                _ => Err(RelayFailure::Network),
            },
            _ => Err(RelayFailure::Network),
        };
        self.settle(result);
    }

    pub fn is_up(&self) -> bool {
        matches!(&self.stage, Stage::Wire(wire) if matches!(wire.step, Step::Up { .. }))
    }

    /// Round trip to the relay, as its last answer showed it.
    pub fn round_trip(&self) -> Option<Duration> {
        let Stage::Wire(wire) = &self.stage else { return None };
        let Step::Up { liveness, .. } = &wire.step else { return None };
        liveness.round_trip()
    }

    /// What the relay knows us by.
    pub fn node_key(&self) -> PublicKey {
        self.node_key
    }

    pub fn config(&self) -> &RelayConfig {
        &self.config
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    pub fn dropped(&self) -> Dropped {
        self.outbox.dropped()
    }

    /// Bytes that wait here for the connection.
    pub fn queued_bytes(&self) -> usize {
        self.outbox.len()
    }

    /// Ends the attempt or the connection where something failed.
    fn settle(&mut self, result: Result<(), RelayFailure>) {
        let Err(failure) = result else { return };
        if let Stage::Wire(wire) = &self.stage
            && let Step::Up { since, .. } = wire.step
        {
            self.retry.worked(self.now.since(since));
        }
        let now = self.now;
        let retry_at = match failure {
            RelayFailure::Network => now,
            _ => self.retry.next(now, failure.is_lasting(), &mut rand::rng()),
        };
        // Dropping the sockets takes them out of epoll.
        self.stage = Stage::Waiting { until: retry_at };
        // Files and certificates may be others by then.
        self.tls = None;
        self.outbox.drop_data();
        self.counts.failures += 1;
        self.events.push_back(RelayEvent::Down { failure, retry_at });
    }

    /// Starts an attempt.
    fn begin(&mut self) -> Result<(), RelayFailure> {
        let url = &self.config.url;
        let proxy = self.config.proxy.find(url, |name| std::env::var(name).ok())?;
        let target = proxy.as_ref().map_or(url, |proxy| &proxy.url);
        let way = Way { host: target.host.clone(), port: target.port, proxy };
        let (began, limit) = (self.now, self.now + limits::RELAY_LOOK_UP_LIMIT);
        match self.resolver.ask(&way.host) {
            Found::Addresses(addresses) => self.dial_to(way, &addresses, began),
            Found::NotYet => {
                let host = way.host.clone();
                self.events.push_back(RelayEvent::Connecting(Connecting::LookUp { host }));
                self.stage = Stage::LookUp { way, limit, began };
                Ok(())
            }
            Found::Error(error) => self.not_found(way, began, error),
        }
    }

    fn look_up(&mut self) -> Result<(), RelayFailure> {
        let found = self.resolver.poll();
        let now = self.now;
        let Stage::LookUp { way, limit, began } = &mut self.stage else { return Ok(()) };
        let (host, began) = (way.host.clone(), *began);
        match found {
            Found::NotYet if now < *limit => Ok(()),
            found => {
                let way = Way { host, port: way.port, proxy: way.proxy.take() };
                match found {
                    Found::Addresses(addresses) => self.dial_to(way, &addresses, began),
                    Found::Error(error) => self.not_found(way, began, error),
                    Found::NotYet => match self.resolver.last_known(&way.host) {
                        Some(addresses) => self.dial_to(way, &addresses, began),
                        None => Err(RelayFailure::LookUpLimit {
                            host: way.host,
                            limit: limits::RELAY_LOOK_UP_LIMIT,
                        }),
                    },
                }
            }
        }
    }

    /// The name server fails: the relay is probably where it was.
    fn not_found(&mut self, way: Way, began: Instant, error: String) -> Result<(), RelayFailure> {
        match self.resolver.last_known(&way.host) {
            Some(addresses) => self.dial_to(way, &addresses, began),
            None => Err(RelayFailure::LookUp { host: way.host, error }),
        }
    }

    fn dial_to(
        &mut self,
        way: Way,
        addresses: &[IpAddr],
        began: Instant,
    ) -> Result<(), RelayFailure> {
        let dial = Dial::new(addresses, way.port, self.config.mark, self.now);
        let (addresses, port) = (addresses.to_vec(), way.port);
        self.events.push_back(RelayEvent::Connecting(Connecting::Tcp { addresses, port }));
        let limit = self.now + limits::RELAY_CONNECT_LIMIT;
        self.stage = Stage::Dial { way, dial, limit, began };
        self.dial()
    }

    fn dial(&mut self) -> Result<(), RelayFailure> {
        let Stage::Dial { way, dial, limit, began } = &mut self.stage else { return Ok(()) };
        let dialled = dial.poll(self.now, &self.epoll);
        if dial.unmarked && !std::mem::replace(&mut self.told_of_mark, true) {
            let note = "the connection to the relay has no firewall mark: \
                        that needs the capability CAP_NET_ADMIN";
            self.events.push_back(RelayEvent::Note(note));
        }
        match dialled {
            Dialled::NotYet if self.now < *limit => Ok(()),
            Dialled::NotYet => {
                let what = format!("{} port {}", way.host, way.port);
                Err(RelayFailure::ConnectLimit { what, limit: limits::RELAY_CONNECT_LIMIT })
            }
            Dialled::Failed(failure) => Err(failure),
            Dialled::Connected(stream, address) => {
                let (data, flags) = (EventData::new_u64(0), EventFlags::IN);
                let watched = epoll::modify(&self.epoll, &stream, data, flags);
                watched.map_err(|error| RelayFailure::System(error.into()))?;
                let way = Way {
                    host: std::mem::take(&mut way.host),
                    port: way.port,
                    proxy: way.proxy.take(),
                };
                let (limit, began) = (*limit, *began);
                let tunnel = way.proxy.is_some();
                self.stage = Stage::Wire(Box::new(Wire {
                    link: Link::new(stream, address),
                    step: Step::Tunnel,
                    way,
                    limit,
                    began,
                    writing: false,
                    ending: None,
                }));
                if tunnel { self.ask_tunnel() } else { self.start() }
            }
        }
    }

    fn ask_tunnel(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let (host, port) = (self.config.url.host.clone(), self.config.url.port);
        let credentials = wire.way.proxy.as_ref().and_then(|proxy| proxy.credentials.as_ref());
        let request = http::connect_request(&host, port, credentials.map(|text| text.as_str()));
        let proxy = wire.link.address;
        self.events.push_back(RelayEvent::Connecting(Connecting::Tunnel { proxy, host, port }));
        wire.link.write(&request)?;
        self.watch()
    }

    /// The connection reaches the relay: TLS, or at once the login.
    fn start(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let url = &self.config.url;
        if !url.tls {
            return self.log_in();
        }
        let config = match &self.tls {
            Some(config) => config.clone(),
            None => self.tls.insert(trust::client_config(&self.config.trust)?).clone(),
        };
        let name = ServerName::try_from(url.host.clone())
            .map_err(|_| RelayFailure::Host(url.host.clone()))?;
        let session =
            Session::new(config, name).map_err(|error| RelayFailure::of_tls(&url.host, &error))?;
        let address = wire.link.address;
        self.events.push_back(RelayEvent::Connecting(Connecting::Tls { address }));
        wire.step = Step::Tls;
        wire.link.start_tls(url.host.clone(), session)?;
        wire.link.flush()?;
        self.watch()
    }

    /// Asks for the relay's stream. Where its certificates name its key the login goes along with
    /// the request, which saves a round trip.
    fn log_in(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let early = wire.link.session().and_then(|session| {
            // Before TLS 1.3 certificates travel in clear, and anybody could have put this one in.
            let safe = session.version() == Some(rustls::ProtocolVersion::TLSv1_3);
            trust::relay_key(session.certificates()).filter(|_| safe)
        });
        let url = &self.config.url;
        let usual_port = if url.tls { 443 } else { 80 };
        let mut request = http::upgrade_request(&url.host, url.port, usual_port, early.is_some());
        wire.step = Step::Login;
        let address = wire.link.address;
        self.events.push_back(RelayEvent::Connecting(Connecting::Login { address }));
        let said = self.protocol.begin(early)?;
        self.protocol.introduce(rand::random(), &mut request);
        wire.link.write(&request)?;
        self.said(said)?;
        self.watch()
    }

    /// Sends our introduction once there is a box key.
    fn introduce(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        if !matches!(wire.step, Step::Login) {
            return Ok(());
        }
        let mut out = Vec::new();
        self.protocol.introduce(rand::random(), &mut out);
        if !out.is_empty() {
            wire.link.write(&out)?;
        }
        self.watch()
    }

    /// The connection is readable or writable, or its time is up.
    fn wire(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        if wire.ending.is_none() {
            match wire.link.read() {
                Ok(Brought::Nothing) => {}
                Ok(Brought::Bytes) => {
                    if let Step::Up { liveness, .. } = &mut wire.step {
                        liveness.heard(self.now);
                    }
                }
                Ok(Brought::End(how)) => wire.ending = Some(RelayFailure::Closed(how)),
                Err(failure) => wire.ending = Some(failure),
            }
        }
        if let Step::Up { liveness, .. } = &mut wire.step {
            let act = liveness.poll(self.now, rand::random());
            return self.act(act);
        }
        if self.now >= wire.limit && wire.ending.is_none() {
            return Err(match self.protocol.wants_box_key() {
                Some(_) if matches!(wire.step, Step::Login) => {
                    RelayFailure::BoxKeyLimit(limits::RELAY_CONNECT_LIMIT)
                }
                _ => RelayFailure::ConnectLimit {
                    what: format!("{} while {}", wire.link.address, wire.step.doing()),
                    limit: limits::RELAY_CONNECT_LIMIT,
                },
            });
        }
        Ok(())
    }

    /// Takes the next thing out of what was read.
    fn advance(&mut self) -> Result<Advance, RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(Advance::Nothing) };
        let found = match &wire.step {
            Step::Tunnel => match Answer::parse(wire.link.unread()) {
                Err(error) => return Err(RelayFailure::ProxyAnswer(error)),
                Ok(None) => false,
                Ok(Some((answer, len))) => {
                    let proxy = wire.way.proxy.as_ref();
                    let sent = proxy.is_some_and(|proxy| proxy.credentials.is_some());
                    if !(200..300).contains(&answer.status) {
                        return Err(RelayFailure::of_proxy(&answer, sent));
                    }
                    wire.link.take(len);
                    self.start()?;
                    true
                }
            },
            Step::Tls if wire.link.is_ready() => {
                self.log_in()?;
                true
            }
            Step::Tls => false,
            Step::Login | Step::Up { .. } => {
                let offset = wire.link.offset();
                let (len, said) = self.protocol.next(wire.link.unread())?;
                wire.link.take(len);
                match said {
                    Said::Nothing => false,
                    Said::Packets(range) => {
                        let range = offset + range.start..offset + range.end;
                        let packets = Packets::new(wire.link.bytes(range.clone()));
                        let (count, bytes) = packets.fold((0, 0), |(count, bytes), (_, packet)| {
                            (count + 1, bytes + packet.len() as u64)
                        });
                        self.counts.received_packets += count;
                        self.counts.received_bytes += bytes;
                        return Ok(Advance::Packets(range));
                    }
                    Said::Own(range) => {
                        let range = offset + range.start..offset + range.end;
                        if let Step::Up { liveness, .. } = &mut wire.step {
                            liveness.own(wire.link.bytes(range));
                        }
                        true
                    }
                    said => {
                        self.said(said)?;
                        true
                    }
                }
            }
        };
        if found {
            return Ok(Advance::Again);
        }
        let Stage::Wire(wire) = &mut self.stage else { return Ok(Advance::Nothing) };
        match wire.ending.take() {
            Some(failure) => Err(failure),
            None => Ok(Advance::Nothing),
        }
    }

    /// Something of the relay that is no packet.
    fn said(&mut self, said: Said) -> Result<(), RelayFailure> {
        let now = self.now;
        match said {
            Said::Nothing | Said::Packets(_) | Said::Own(_) => {}
            Said::NeedBoxKey(relay_key) => {
                self.events.push_back(RelayEvent::NeedBoxKey { relay_key });
            }
            Said::HasBoxKey => return self.introduce(),
            Said::Up { relay, info } => return self.up(relay, info),
            Said::PeerGone { peer, .. } if peer == self.node_key => {}
            Said::PeerGone { peer, why } => {
                self.events.push_back(RelayEvent::PeerGone { peer, why });
            }
            Said::Health(text) => self.events.push_back(RelayEvent::Health(text)),
            Said::Restarting { reconnect_in, try_for } => {
                self.retry.restarting(now, reconnect_in, try_for);
                self.events.push_back(RelayEvent::Restarting { reconnect_in, try_for });
            }
            Said::Ping(data) => self.outbox.push_frame(now, &Frame::Pong(data)),
            Said::Pong(data) => {
                if let Stage::Wire(wire) = &mut self.stage
                    && let Step::Up { liveness, .. } = &mut wire.step
                {
                    liveness.pong(now, data);
                }
            }
        }
        Ok(())
    }

    fn up(&mut self, relay_key: PublicKey, info: ServerInfo) -> Result<(), RelayFailure> {
        let now = self.now;
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let mut liveness = Liveness::new(now);
        let act = liveness.ask(now, rand::random());
        let rate = Rate::new(info.bytes_per_second, info.burst_bytes, now);
        wire.step = Step::Up { liveness, rate, since: now };
        let tls = wire.link.session().and_then(Session::version);
        self.counts.logins += 1;
        self.events.push_back(RelayEvent::Up(Up {
            relay_key,
            info,
            address: wire.link.address,
            proxied: wire.way.proxy.is_some(),
            tls: tls.map(|version| format!("{version:?}")),
            connect_time: now.since(wire.began),
        }));
        if self.home {
            self.outbox.push_frame(now, &Frame::NotePreferred(true));
        }
        self.act(act)
    }

    fn act(&mut self, act: Act) -> Result<(), RelayFailure> {
        match act {
            Act::Nothing => {}
            Act::Probe(data) => {
                let packet = liveness::own_packet(data);
                self.outbox.push_frame(self.now, &Frame::Ping(data));
                let own = Frame::SendPacket { to: self.node_key, packet: &packet };
                self.outbox.push_frame(self.now, &own);
            }
            Act::End(dead) => return Err(dead.into()),
        }
        Ok(())
    }

    /// Writes what waits until there is nothing or the kernel takes no more.
    fn write_out(&mut self) -> Result<(), RelayFailure> {
        let now = self.now;
        self.outbox.drop_late(now);
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let Step::Up { rate, .. } = &mut wire.step else {
            wire.link.flush()?;
            return self.watch();
        };
        while wire.link.flush()? {
            let allowed = rate.as_mut().map_or(usize::MAX, |rate| rate.available(now));
            let at_most = limits::RELAY_WRITE_MAX.min(allowed);
            let Some((lane, bytes)) = self.outbox.front(at_most, allowed > 0) else { break };
            let len = bytes.len();
            wire.link.write(bytes)?;
            let count = self.outbox.sent(lane, len) as u64;
            self.counts.sent_packets += count;
            self.counts.sent_bytes += len as u64;
            if let Some(rate) = rate {
                rate.take(len);
            }
        }
        self.watch()
    }

    /// Lets epoll tell when the kernel takes more, if it did not take all.
    fn watch(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let writing = !wire.link.is_flushed();
        if writing == wire.writing {
            return Ok(());
        }
        wire.writing = writing;
        let flags = if writing { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        epoll::modify(&self.epoll, &wire.link, EventData::new_u64(0), flags)
            .map_err(|error| RelayFailure::System(error.into()))
    }
}

impl AsFd for RelayClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Step {
    fn doing(&self) -> &'static str {
        match self {
            Self::Tunnel => "asking for a tunnel",
            Self::Tls => "starting TLS",
            Self::Login | Self::Up { .. } => "logging in",
        }
    }
}

/// Without the credentials.
impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Way({}:{}, proxy: {})", self.host, self.port, self.proxy.is_some())
    }
}
