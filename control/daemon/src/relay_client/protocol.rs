//! What a client and a relay say to each other once bytes flow between them: the upgrade, the
//! login, frames. Bytes in, bytes out; no socket, no clock.

use std::ops::Range;
use std::time::Duration;

use millrace_path::derp::{
    ClientInfo, Cutter, Frame, FrameError, Gone, HEADER_LEN, KEY_LEN, Kind, LoginError, ServerInfo,
};
use millrace_path::sealed::{BoxKey, NONCE_LEN, PublicKey};

use super::http::{Answer, AnswerError};
use crate::limits;

/// One client's side.
#[derive(Debug)]
pub struct Protocol {
    node_key: PublicKey,
    /// The only relay key that is accepted, where the configuration names one.
    pinned: Option<PublicKey>,
    /// Kept from one connection to the next, so that the data plane is asked once.
    box_key: Option<(PublicKey, BoxKey)>,
    phase: Phase,
    cutter: Cutter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The answer to the upgrade is awaited.
    Upgrade,
    ServerKey,
    /// The relay's key is known, that of our boxes is not. `early`: the relay's `ServerKey` frame
    /// has still to come.
    BoxKey {
        relay: PublicKey,
        early: bool,
    },
    ServerInfo {
        relay: PublicKey,
        early: bool,
    },
    Up,
}

/// What the relay said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Nothing that is whole yet.
    Nothing,
    /// The key of the boxes between this relay and us is wanted: [`Protocol::give_box_key`].
    NeedBoxKey(PublicKey),
    /// It is there: [`Protocol::introduce`].
    HasBoxKey,
    Up {
        relay: PublicKey,
        info: ServerInfo,
    },
    /// Whole `RecvPacket` frames, as a range of the bytes: [`Packets`].
    Packets(Range<usize>),
    /// A packet from ourselves, as a range of the bytes.
    Own(Range<usize>),
    PeerGone {
        peer: PublicKey,
        why: Gone,
    },
    Health(String),
    Restarting {
        reconnect_in: Duration,
        try_for: Duration,
    },
    /// To be answered by a `Pong` of the same bytes.
    Ping([u8; 8]),
    Pong([u8; 8]),
}

/// Why the connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error("it answers /derp with {status} {reason}: there is a web server, but no relay", status = .0.status, reason = .0.reason)]
    NoUpgrade(Answer),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a {0:?} frame where none may be")]
    Unexpected(Kind),
    #[error("a {0:?} frame of {1} bytes, expected at most {max}", max = limits::RELAY_FRAME_MAX)]
    TooLong(Kind, usize),
    #[error(
        "the relay's key is {seen}, expected {expected}; if its operator says that this is its \
         new one, write it into `key` of this relay and reload, else somebody is between",
        seen = millrace_config::PublicKey(.0.0), expected = millrace_config::PublicKey(.1.0)
    )]
    RelayKey(PublicKey, PublicKey),
    #[error("the relay's key is no proper key")]
    WeakKey(PublicKey),
    #[error("the relay does not accept our key, or does not hold its own: {0}")]
    Login(LoginError),
}

impl Protocol {
    pub fn new(node_key: PublicKey, pinned: Option<PublicKey>) -> Self {
        let (phase, cutter) = (Phase::Upgrade, Cutter::default());
        Self { node_key, pinned, box_key: None, phase, cutter }
    }

    /// A new connection begins, its upgrade requested. With `early` the relay's key is known from
    /// its certificate and the request asked for a fast start: the answer is the stream itself,
    /// and the login may begin.
    pub fn begin(&mut self, early: Option<PublicKey>) -> Result<Said, ProtocolError> {
        self.cutter = Cutter::default();
        self.phase = Phase::Upgrade;
        match early {
            Some(relay) => self.relay_key(relay, true),
            None => Ok(Said::Nothing),
        }
    }

    pub fn is_up(&self) -> bool {
        self.phase == Phase::Up
    }

    /// Whose box key is wanted before anything else.
    pub fn wants_box_key(&self) -> Option<PublicKey> {
        match self.phase {
            Phase::BoxKey { relay, .. } if !self.has_box_key(relay) => Some(relay),
            _ => None,
        }
    }

    /// The key of the boxes between a relay and us, asked for or not.
    pub fn give_box_key(&mut self, relay: PublicKey, key: BoxKey) {
        self.box_key = Some((relay, key));
    }

    /// Appends our introduction, once there is everything for it.
    pub fn introduce(&mut self, nonce: [u8; NONCE_LEN], out: &mut Vec<u8>) {
        let Phase::BoxKey { relay, early } = self.phase else { return };
        let Some((of, key)) = &self.box_key else { return };
        if *of == relay {
            ClientInfo::default().write(self.node_key, key, nonce, out);
            self.phase = Phase::ServerInfo { relay, early };
        }
    }

    /// Takes the next thing off the front of `bytes` and returns how many bytes are done with.
    /// Ranges are of `bytes`.
    pub fn next(&mut self, bytes: &[u8]) -> Result<(usize, Said), ProtocolError> {
        match self.phase {
            Phase::Upgrade => self.upgrade(bytes),
            // The stream waits.
            Phase::BoxKey { .. } => Ok((0, Said::Nothing)),
            Phase::ServerKey | Phase::ServerInfo { .. } => self.login(bytes),
            Phase::Up => self.frames(bytes),
        }
    }

    fn upgrade(&mut self, bytes: &[u8]) -> Result<(usize, Said), ProtocolError> {
        let Some((answer, len)) = Answer::parse(bytes)? else { return Ok((0, Said::Nothing)) };
        if answer.status != 101 {
            return Err(ProtocolError::NoUpgrade(answer));
        }
        self.phase = Phase::ServerKey;
        let (used, said) = self.login(&bytes[len..])?;
        Ok((len + used, said))
    }

    fn login(&mut self, bytes: &[u8]) -> Result<(usize, Said), ProtocolError> {
        let mut rest = bytes;
        loop {
            let Some(raw) = self.cutter.next(&mut rest)? else {
                bounded(rest)?;
                return Ok((bytes.len() - rest.len(), Said::Nothing));
            };
            let said = match (Frame::parse(raw.kind, raw.payload)?, self.phase) {
                (Frame::ServerKey(relay), Phase::ServerKey) => self.relay_key(relay, false)?,
                (Frame::ServerKey(seen), Phase::ServerInfo { relay, early: true }) => {
                    if seen != relay {
                        return Err(ProtocolError::RelayKey(seen, relay));
                    }
                    self.phase = Phase::ServerInfo { relay, early: false };
                    continue;
                }
                (
                    Frame::ServerInfo { nonce, sealed },
                    Phase::ServerInfo { relay, early: false },
                ) => self.server_info(relay, &nonce, sealed)?,
                _ => return Err(ProtocolError::Unexpected(raw.kind)),
            };
            return Ok((bytes.len() - rest.len(), said));
        }
    }

    fn relay_key(&mut self, relay: PublicKey, early: bool) -> Result<Said, ProtocolError> {
        if let Some(pinned) = self.pinned
            && pinned != relay
        {
            return Err(ProtocolError::RelayKey(relay, pinned));
        }
        if relay == self.node_key {
            return Err(ProtocolError::WeakKey(relay));
        }
        self.phase = Phase::BoxKey { relay, early };
        Ok(if self.has_box_key(relay) { Said::HasBoxKey } else { Said::NeedBoxKey(relay) })
    }

    fn has_box_key(&self, relay: PublicKey) -> bool {
        self.box_key.as_ref().is_some_and(|(of, _)| *of == relay)
    }

    fn server_info(
        &mut self,
        relay: PublicKey,
        nonce: &[u8; NONCE_LEN],
        sealed: &[u8],
    ) -> Result<Said, ProtocolError> {
        let Some((_, key)) = &self.box_key else { return Ok(Said::NeedBoxKey(relay)) };
        let info = ServerInfo::open(key, nonce, sealed).map_err(ProtocolError::Login)?;
        self.phase = Phase::Up;
        Ok(Said::Up { relay, info })
    }

    /// Packets that follow each other are one thing.
    fn frames(&mut self, bytes: &[u8]) -> Result<(usize, Said), ProtocolError> {
        let mut rest = bytes;
        loop {
            let Some(raw) = self.cutter.next(&mut rest)? else {
                bounded(rest)?;
                return Ok((bytes.len() - rest.len(), Said::Nothing));
            };
            let end = bytes.len() - rest.len();
            let said = match Frame::parse(raw.kind, raw.payload)? {
                Frame::RecvPacket { from, packet } if from == self.node_key => {
                    Said::Own(end - packet.len()..end)
                }
                Frame::RecvPacket { .. } => {
                    let start = end - HEADER_LEN - raw.payload.len();
                    let end = self.run(bytes, end);
                    return Ok((end, Said::Packets(start..end)));
                }
                Frame::PeerGone { peer, why } => Said::PeerGone { peer, why },
                Frame::Health(text) => Said::Health(bounded_text(text)),
                Frame::Restarting { reconnect_in_ms, try_for_ms } => Said::Restarting {
                    reconnect_in: Duration::from_millis(reconnect_in_ms.into())
                        .min(limits::RELAY_RESTART_WAIT_MAX),
                    try_for: Duration::from_millis(try_for_ms.into())
                        .min(limits::RELAY_RESTART_TRY_MAX),
                },
                Frame::Ping(data) => Said::Ping(data),
                Frame::Pong(data) => Said::Pong(data),
                // A later version may repeat its info; of the mesh nothing is for us.
                Frame::KeepAlive | Frame::ServerInfo { .. } | Frame::PeerPresent { .. } => continue,
                _ => return Err(ProtocolError::Unexpected(raw.kind)),
            };
            return Ok((end, said));
        }
    }

    /// Where the packets end that begin before `end`.
    fn run(&self, bytes: &[u8], mut end: usize) -> usize {
        // Nothing is skipped inside a run, so that a cutter of its own stands at the same place.
        loop {
            let mut rest = &bytes[end..];
            if rest.first() != Some(&(Kind::RecvPacket as u8)) {
                return end;
            }
            let Ok(Some(raw)) = Cutter::default().next(&mut rest) else { return end };
            if raw.payload[..KEY_LEN] == self.node_key.0 {
                return end;
            }
            end = bytes.len() - rest.len();
        }
    }
}

/// The packets of a run of `RecvPacket` frames: from whom, and what.
#[derive(Clone, Debug)]
pub struct Packets<'b>(&'b [u8]);

impl<'b> Packets<'b> {
    /// Of the bytes that [`Said::Packets`] names.
    pub fn new(frames: &'b [u8]) -> Self {
        Self(frames)
    }
}

impl<'b> Iterator for Packets<'b> {
    type Item = (PublicKey, &'b [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let raw = Cutter::default().next(&mut self.0).ok().flatten()?;
        let (from, packet) = raw.payload.split_first_chunk()?;
        Some((PublicKey(*from), packet))
    }
}

/// A frame that has begun is of a size that we hold.
fn bounded(rest: &[u8]) -> Result<(), ProtocolError> {
    let needed = Cutter::needed(rest);
    match rest.first().copied().and_then(Kind::from_byte) {
        Some(kind) if needed > limits::RELAY_FRAME_MAX => Err(ProtocolError::TooLong(kind, needed)),
        _ => Ok(()),
    }
}

/// Text of a stranger, for a line of ours.
fn bounded_text(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(limits::RELAY_HEALTH_CHARS_MAX).map(plain).collect()
}
