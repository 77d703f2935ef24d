//! The connection to one relay: found, kept, and made again whatever happens to it.
//!
//! No thread waits for it (but for a name server), and no clock is read: the owner waits until the
//! client's one descriptor is readable or [`RelayClient::deadline`] has passed, calls
//! [`RelayClient::handle`], and takes [`RelayClient::next_event`] until there is none. Packets are
//! queued with [`RelayClient::send`]; [`RelayClient::flush`] after the last of a batch writes them
//! in one piece.
//!
//! The parts: `attempt` goes through the stages, [`resolve`] and [`dial`] make a TCP connection,
//! `wire` is what happens on it and [`link`] moves its bytes, with [`tls`] and [`trust`] where the
//! URL says https; [`http`] asks a proxy and the relay's web server, [`protocol`] is DERP; [`outbox`]
//! and [`rate`] bound what waits, [`liveness`] and [`retry`] decide when to begin anew.

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
mod wire;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::derp::Frame;
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
use outbox::Outbox;
use protocol::Protocol;
use rate::Rate;
use resolve::Resolver;
use retry::Retry;
use wire::{Advance, Step, Wire};

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
    /// When the network last changed, until a connection fails.
    changed_at: Option<Instant>,
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
            changed_at: None,
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
        self.changed_at = Some(self.now);
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
            // It was the former network's, and the network was not the relay's fault.
            _ if self
                .changed_at
                .take()
                .is_some_and(|at| now.since(at) < limits::RELAY_DOUBT_LIMIT) =>
            {
                now
            }
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
}

impl AsFd for RelayClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Without the credentials.
impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Way({}:{}, proxy: {})", self.host, self.port, self.proxy.is_some())
    }
}
