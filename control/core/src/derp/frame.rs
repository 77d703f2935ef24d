//! Every frame, its bounds, and its bytes.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use super::{HEADER_LEN, KEY_LEN, MAGIC, PACKET_MAX};
use crate::sealed::{NONCE_LEN, PublicKey, TAG_LEN};

/// Bytes that a small frame may have beyond what we read: a later version may say more.
const SMALL_MAX: usize = 1000;
/// A relay takes no larger introduction of a client.
const CLIENT_INFO_MAX: usize = 256 << 10;
/// No info of a relay, and no frame of a kind that we do not know, may be larger.
pub const INFO_MAX: usize = 1 << 20;

/// The first byte of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    ServerKey = 0x01,
    ClientInfo = 0x02,
    ServerInfo = 0x03,
    SendPacket = 0x04,
    RecvPacket = 0x05,
    KeepAlive = 0x06,
    NotePreferred = 0x07,
    PeerGone = 0x08,
    PeerPresent = 0x09,
    ForwardPacket = 0x0a,
    WatchConns = 0x10,
    ClosePeer = 0x11,
    Ping = 0x12,
    Pong = 0x13,
    Health = 0x14,
    Restarting = 0x15,
}

impl Kind {
    pub const ALL: [Self; 16] = [
        Self::ServerKey,
        Self::ClientInfo,
        Self::ServerInfo,
        Self::SendPacket,
        Self::RecvPacket,
        Self::KeepAlive,
        Self::NotePreferred,
        Self::PeerGone,
        Self::PeerPresent,
        Self::ForwardPacket,
        Self::WatchConns,
        Self::ClosePeer,
        Self::Ping,
        Self::Pong,
        Self::Health,
        Self::Restarting,
    ];

    /// None for a type of a later version, which is skipped.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0x01 => Self::ServerKey,
            0x02 => Self::ClientInfo,
            0x03 => Self::ServerInfo,
            0x04 => Self::SendPacket,
            0x05 => Self::RecvPacket,
            0x06 => Self::KeepAlive,
            0x07 => Self::NotePreferred,
            0x08 => Self::PeerGone,
            0x09 => Self::PeerPresent,
            0x0a => Self::ForwardPacket,
            0x10 => Self::WatchConns,
            0x11 => Self::ClosePeer,
            0x12 => Self::Ping,
            0x13 => Self::Pong,
            0x14 => Self::Health,
            0x15 => Self::Restarting,
            _ => return None,
        })
    }

    /// How many bytes of payload are a frame of this kind.
    pub fn bounds(self) -> RangeInclusive<usize> {
        match self {
            Self::ServerKey => MAGIC.len() + KEY_LEN..=SMALL_MAX,
            Self::ClientInfo => KEY_LEN + NONCE_LEN + TAG_LEN..=CLIENT_INFO_MAX,
            Self::ServerInfo => NONCE_LEN + TAG_LEN..=NONCE_LEN + INFO_MAX,
            Self::SendPacket | Self::RecvPacket => KEY_LEN..=KEY_LEN + PACKET_MAX,
            Self::ForwardPacket => 2 * KEY_LEN..=2 * KEY_LEN + PACKET_MAX,
            Self::KeepAlive | Self::WatchConns => 0..=SMALL_MAX,
            Self::NotePreferred => 1..=1,
            Self::PeerGone | Self::PeerPresent => KEY_LEN..=SMALL_MAX,
            Self::ClosePeer => KEY_LEN..=KEY_LEN,
            Self::Ping | Self::Pong | Self::Restarting => 8..=SMALL_MAX,
            Self::Health => 0..=PACKET_MAX,
        }
    }
}

/// Why a stream cannot be read on. The connection has to be closed: its next frame cannot be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a {kind:?} frame of {seen} bytes, expected {min} to {max}")]
    Length { kind: Kind, seen: usize, min: usize, max: usize },
    #[error(
        "a frame of the unknown type {kind:#04x} and {seen} bytes, expected at most {INFO_MAX}"
    )]
    UnknownLength { kind: u8, seen: usize },
    #[error("a ServerKey frame without the magic of DERP: this is no relay")]
    Magic,
    #[error("a Health frame that is not UTF-8")]
    Text,
}

/// Why a peer cannot be reached through the relay that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It was here and its connection has ended.
    Disconnected,
    /// The relay has no connection of it.
    NotHere,
    /// A reason of a later version.
    Other(u8),
}

impl Gone {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Disconnected,
            1 => Self::NotHere,
            other => Self::Other(other),
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Disconnected => 0,
            Self::NotHere => 1,
            Self::Other(byte) => byte,
        }
    }
}

/// One frame; packets and boxes are borrowed from the bytes it was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'b> {
    /// Relay to client, first: with which key its boxes are made.
    ServerKey(PublicKey),
    /// Client to relay: who it is, and a box that proves it.
    ClientInfo { from: PublicKey, nonce: [u8; NONCE_LEN], sealed: &'b [u8] },
    /// Relay to client: its side of the proof.
    ServerInfo { nonce: [u8; NONCE_LEN], sealed: &'b [u8] },
    /// Client to relay.
    SendPacket { to: PublicKey, packet: &'b [u8] },
    /// Relay to client.
    RecvPacket { from: PublicKey, packet: &'b [u8] },
    /// Relay to client.
    KeepAlive,
    /// Client to relay: whether this relay is its home.
    NotePreferred(bool),
    /// Relay to client.
    PeerGone { peer: PublicKey, why: Gone },
    /// Relay to relay: a client of mine, where it connects from, and its flags.
    PeerPresent { peer: PublicKey, at: Option<SocketAddr>, flags: u8 },
    /// Relay to relay.
    ForwardPacket { from: PublicKey, to: PublicKey, packet: &'b [u8] },
    /// Relay to relay: asks for `PeerPresent` and `PeerGone` of every client.
    WatchConns,
    /// Relay to relay.
    ClosePeer(PublicKey),
    /// Either way; answered by `Pong` with the same bytes.
    Ping([u8; 8]),
    /// Either way.
    Pong([u8; 8]),
    /// Relay to client: what is wrong with the connection; empty when all is well again.
    Health(&'b str),
    /// Relay to client: it ends; connect again after the first time, for as long as the second.
    Restarting { reconnect_in_ms: u32, try_for_ms: u32 },
}

impl<'b> Frame<'b> {
    /// Reads a payload. Bytes beyond what a kind needs are of a later version and ignored.
    pub fn parse(kind: Kind, payload: &'b [u8]) -> Result<Self, FrameError> {
        check(kind, payload.len())?;
        let mut body = Body(payload);
        Ok(match kind {
            Kind::ServerKey => {
                if body.take::<8>() != MAGIC {
                    return Err(FrameError::Magic);
                }
                Self::ServerKey(body.key())
            }
            Kind::ClientInfo => {
                Self::ClientInfo { from: body.key(), nonce: body.take(), sealed: body.0 }
            }
            Kind::ServerInfo => Self::ServerInfo { nonce: body.take(), sealed: body.0 },
            Kind::SendPacket => Self::SendPacket { to: body.key(), packet: body.0 },
            Kind::RecvPacket => Self::RecvPacket { from: body.key(), packet: body.0 },
            Kind::KeepAlive => Self::KeepAlive,
            Kind::NotePreferred => Self::NotePreferred(body.take::<1>() != [0]),
            // Early relays gave no reason; then there was only one.
            Kind::PeerGone => Self::PeerGone {
                peer: body.key(),
                why: body.0.first().map_or(Gone::Disconnected, |&byte| Gone::from_byte(byte)),
            },
            Kind::PeerPresent => body.peer_present(),
            Kind::ForwardPacket => {
                Self::ForwardPacket { from: body.key(), to: body.key(), packet: body.0 }
            }
            Kind::WatchConns => Self::WatchConns,
            Kind::ClosePeer => Self::ClosePeer(body.key()),
            Kind::Ping => Self::Ping(body.take()),
            Kind::Pong => Self::Pong(body.take()),
            Kind::Health => Self::Health(str::from_utf8(payload).map_err(|_| FrameError::Text)?),
            Kind::Restarting => Self::Restarting {
                reconnect_in_ms: u32::from_be_bytes(body.take()),
                try_for_ms: u32::from_be_bytes(body.take()),
            },
        })
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::ServerKey(_) => Kind::ServerKey,
            Self::ClientInfo { .. } => Kind::ClientInfo,
            Self::ServerInfo { .. } => Kind::ServerInfo,
            Self::SendPacket { .. } => Kind::SendPacket,
            Self::RecvPacket { .. } => Kind::RecvPacket,
            Self::KeepAlive => Kind::KeepAlive,
            Self::NotePreferred(_) => Kind::NotePreferred,
            Self::PeerGone { .. } => Kind::PeerGone,
            Self::PeerPresent { .. } => Kind::PeerPresent,
            Self::ForwardPacket { .. } => Kind::ForwardPacket,
            Self::WatchConns => Kind::WatchConns,
            Self::ClosePeer(_) => Kind::ClosePeer,
            Self::Ping(_) => Kind::Ping,
            Self::Pong(_) => Kind::Pong,
            Self::Health(_) => Kind::Health,
            Self::Restarting { .. } => Kind::Restarting,
        }
    }

    /// Appends header and payload.
    pub fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend([self.kind() as u8, 0, 0, 0, 0]);
        match self {
            Self::ServerKey(key) => put(out, &[&MAGIC, &key.0]),
            Self::ClientInfo { from, nonce, sealed } => put(out, &[&from.0, nonce, sealed]),
            Self::ServerInfo { nonce, sealed } => put(out, &[nonce, sealed]),
            Self::SendPacket { to: key, packet } | Self::RecvPacket { from: key, packet } => {
                put(out, &[&key.0, packet]);
            }
            Self::KeepAlive | Self::WatchConns => {}
            Self::NotePreferred(home) => put(out, &[&[u8::from(*home)]]),
            Self::PeerGone { peer, why } => put(out, &[&peer.0, &[why.byte()]]),
            Self::PeerPresent { peer, at, flags } => {
                let (ip, port) = at.map_or(([0; 16], 0), |at| (ip_bytes(at.ip()), at.port()));
                put(out, &[&peer.0, &ip, &port.to_be_bytes(), &[*flags]]);
            }
            Self::ForwardPacket { from, to, packet } => put(out, &[&from.0, &to.0, packet]),
            Self::ClosePeer(peer) => put(out, &[&peer.0]),
            Self::Ping(data) | Self::Pong(data) => put(out, &[data]),
            Self::Health(text) => put(out, &[text.as_bytes()]),
            Self::Restarting { reconnect_in_ms, try_for_ms } => {
                put(out, &[&reconnect_in_ms.to_be_bytes(), &try_for_ms.to_be_bytes()]);
            }
        }
        let length = (out.len() - start - HEADER_LEN) as u32;
        out[start + 1..start + HEADER_LEN].copy_from_slice(&length.to_be_bytes());
    }
}

/// Turns a whole `SendPacket` frame into the `RecvPacket` frame that its destination gets, in
/// place: the two have one shape, so a relay changes 33 bytes and copies nothing.
pub fn readdress(frame: &mut [u8], from: PublicKey) {
    debug_assert_eq!(frame.first(), Some(&(Kind::SendPacket as u8)));
    if let Some((head, _)) = frame.split_first_chunk_mut::<{ HEADER_LEN + KEY_LEN }>() {
        head[0] = Kind::RecvPacket as u8;
        head[HEADER_LEN..].copy_from_slice(&from.0);
    }
}

/// Turns a whole `ForwardPacket` frame, at least of its least length, into the `RecvPacket` frame
/// that its destination gets: that is the end of the same bytes. Returns source, destination and
/// where the new frame starts.
pub fn deliver_forwarded(frame: &mut [u8]) -> (PublicKey, PublicKey, usize) {
    const START: usize = KEY_LEN;
    debug_assert_eq!(frame.first(), Some(&(Kind::ForwardPacket as u8)));
    let mut keys = Body(&frame[HEADER_LEN..]);
    let (from, to) = (keys.key(), keys.key());
    let length = (frame.len() - START - HEADER_LEN) as u32;
    let (head, _) = frame[START..].split_at_mut(HEADER_LEN + KEY_LEN);
    head[0] = Kind::RecvPacket as u8;
    head[1..HEADER_LEN].copy_from_slice(&length.to_be_bytes());
    head[HEADER_LEN..].copy_from_slice(&from.0);
    (from, to, START)
}

/// Refuses a length outside the bounds of its kind.
pub(super) fn check(kind: Kind, seen: usize) -> Result<(), FrameError> {
    let bounds = kind.bounds();
    if bounds.contains(&seen) {
        return Ok(());
    }
    Err(FrameError::Length { kind, seen, min: *bounds.start(), max: *bounds.end() })
}

fn put(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// What is left of a payload whose length was checked.
struct Body<'b>(&'b [u8]);

impl<'b> Body<'b> {
    /// The next bytes; zeros where the payload is shorter, which the bounds rule out.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((taken, rest)) = self.0.split_first_chunk() else { return [0; N] };
        self.0 = rest;
        *taken
    }

    fn key(&mut self) -> PublicKey {
        PublicKey(self.take())
    }

    /// Address and flags came with later versions. All zeros mean "not told".
    fn peer_present(&mut self) -> Frame<'b> {
        let peer = self.key();
        let at = (self.0.len() >= 18).then(|| {
            let ip = Ipv6Addr::from(self.take::<16>());
            SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(self.take()))
        });
        let at = at.filter(|at| !(at.ip().is_unspecified() && at.port() == 0));
        Frame::PeerPresent { peer, at, flags: self.0.first().copied().unwrap_or(0) }
    }
}

fn ip_bytes(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}
