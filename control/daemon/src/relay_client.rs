//! The connection to one relay: found, kept, and made again whatever happens to it.
//!
//! No thread waits for it (but for a name server), and no clock is read: the owner waits until the
//! client's one descriptor is readable or [`RelayClient::deadline`] has passed, calls
//! [`RelayClient::handle`], and takes [`RelayClient::next_event`] until there is none. Packets are
//! queued with [`RelayClient::send`]; [`RelayClient::flush`] after the last of a batch writes them
//! in one piece.
//!
//! The parts: `attempt` goes through the stages, [`resolve`] and [`dial`] make a TCP connection, [`link`] moves bytes through it, with
//! [`tls`] and [`trust`] where the URL says https, [`http`] asks a proxy and the relay's web server,
//! [`protocol`] is DERP; [`outbox`] and [`rate`] bound what waits, [`liveness`] and [`retry`] decide
//! when to begin anew.

mod attempt;
pub mod config;
pub mod dial;
pub mod event;
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
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::derp::{Frame, ServerInfo};
use millrace_path::sealed::{BoxKey, PublicKey};
use rustix::event::PollFlags;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustls::ClientConfig;

pub use config::{Proxy, RelayConfig, Trust};
pub use event::{Connecting, Counts, RelayEvent, Up};
pub use failure::RelayFailure;
pub use outbox::Dropped;
pub use protocol::Packets;

use crate::limits;
use config::ProxyServer;
use dial::Dial;
use http::Answer;
use link::{Brought, Link};
use liveness::{Act, Liveness};
use outbox::Outbox;
use protocol::{Protocol, Said};
use rate::Rate;
use resolve::Resolver;
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
        if !matches!(self.stage, Stage::LookUp { .. }) {
            // Nobody waits any longer, but the next failure of a name server may need it.
            self.resolver.poll("");
        }
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

    /// The relay's key, while the login waits for that of the boxes between it and this node.
    pub fn wants_box_key(&self) -> Option<PublicKey> {
        self.protocol.wants_box_key()
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

    /// An address or a route came or went; `is_ours` says of an address whether it is there. A
    /// connection from one that is gone is over, any other is asked whether it still works, and
    /// waiting is over.
    pub fn network_changed(&mut self, now: Instant, is_ours: impl Fn(IpAddr) -> bool) {
        self.now = self.now.max(now);
        self.retry.forget();
        let result = match &mut self.stage {
            Stage::Waiting { until } => {
                *until = now;
                Ok(())
            }
            Stage::Wire(wire) => match &mut wire.step {
                Step::Up { liveness, .. } if wire.link.local_ip().is_some_and(&is_ours) => {
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

    /// Takes the next thing out of what was read; what ended the connection comes last.
    fn advance(&mut self) -> Result<Advance, RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(Advance::Nothing) };
        let advance = match &wire.step {
            Step::Tunnel => self.tunnel()?,
            Step::Tls if wire.link.is_ready() => {
                self.log_in()?;
                Advance::Again
            }
            Step::Tls => Advance::Nothing,
            Step::Login | Step::Up { .. } => self.stream()?,
        };
        if let Advance::Nothing = advance
            && let Stage::Wire(wire) = &mut self.stage
            && let Some(failure) = wire.ending.take()
        {
            return Err(failure);
        }
        Ok(advance)
    }

    /// The proxy's answer.
    fn tunnel(&mut self) -> Result<Advance, RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(Advance::Nothing) };
        let parsed = Answer::parse(wire.link.unread()).map_err(RelayFailure::ProxyAnswer)?;
        let Some((answer, len)) = parsed else { return Ok(Advance::Nothing) };
        if !(200..300).contains(&answer.status) {
            let proxy = wire.way.proxy.as_ref();
            let sent_credentials = proxy.is_some_and(|proxy| proxy.credentials.is_some());
            return Err(RelayFailure::of_proxy(&answer, sent_credentials));
        }
        wire.link.take(len);
        self.start()?;
        Ok(Advance::Again)
    }

    /// The next thing that the relay says.
    fn stream(&mut self) -> Result<Advance, RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(Advance::Nothing) };
        let offset = wire.link.offset();
        let place = |range: Range<usize>| offset + range.start..offset + range.end;
        let (len, said) = self.protocol.next(wire.link.unread())?;
        wire.link.take(len);
        match said {
            Said::Nothing => return Ok(Advance::Nothing),
            Said::Packets(range) => {
                let range = place(range);
                for (_, packet) in Packets::new(wire.link.bytes(range.clone())) {
                    self.counts.received_packets += 1;
                    self.counts.received_bytes += packet.len() as u64;
                }
                return Ok(Advance::Packets(range));
            }
            Said::Own(range) => {
                if let Step::Up { liveness, .. } = &mut wire.step {
                    liveness.own(wire.link.bytes(place(range)));
                }
            }
            said => self.said(said)?,
        }
        Ok(Advance::Again)
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
