//! One connection to a relay, from TCP on: what arrives is taken apart, what waits is written.

use std::ops::Range;

use millrace_path::Instant;
use millrace_path::derp::{Frame, ServerInfo};
use millrace_path::sealed::PublicKey;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::event::{RelayEvent, Up};
use super::failure::RelayFailure;
use super::http::Answer;
use super::link::{Brought, Link};
use super::liveness::{self, Act, Liveness};
use super::protocol::{Packets, Said};
use super::rate::Rate;
use super::tls::Session;
use super::{RelayClient, Stage, Way};
use crate::limits;

/// The connection and how far it has come.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) link: Link,
    pub(super) step: Step,
    pub(super) way: Way,
    pub(super) limit: Instant,
    pub(super) began: Instant,
    /// Whether epoll tells when the kernel takes more.
    pub(super) writing: bool,
    /// Nothing more comes, once what is unread was taken.
    pub(super) ending: Option<RelayFailure>,
}

/// What the other end is to say next.
#[derive(Debug)]
pub(super) enum Step {
    Tunnel,
    Tls,
    Login,
    Up { liveness: Liveness, rate: Option<Rate>, since: Instant },
}

/// What [`RelayClient::advance`] found.
pub(super) enum Advance {
    Nothing,
    Again,
    Packets(Range<usize>),
}

impl RelayClient {
    /// The connection is readable or writable, or its time is up.
    pub(super) fn wire(&mut self) -> Result<(), RelayFailure> {
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
    pub(super) fn advance(&mut self) -> Result<Advance, RelayFailure> {
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
    pub(super) fn said(&mut self, said: Said) -> Result<(), RelayFailure> {
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

    pub(super) fn act(&mut self, act: Act) -> Result<(), RelayFailure> {
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
    pub(super) fn write_out(&mut self) -> Result<(), RelayFailure> {
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
    pub(super) fn watch(&mut self) -> Result<(), RelayFailure> {
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

impl Step {
    fn doing(&self) -> &'static str {
        match self {
            Self::Tunnel => "asking for a tunnel",
            Self::Tls => "starting TLS",
            Self::Login | Self::Up { .. } => "logging in",
        }
    }
}
