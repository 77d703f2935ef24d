//! One connection: its socket, its TLS, what is half read and what is half written.
//!
//! While it is idle it owns no buffer: reading and writing go through those of the worker, and only
//! a piece that cannot be finished yet is kept, in memory of its size.

use std::collections::HashSet;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use millrace_path::derp::Cutter;
use millrace_path::sealed::PublicKey;

use crate::limits;
use crate::outbox::{Outbox, boundary};
use crate::rate::Bucket;
use crate::session::Session;

/// How far a connection has come.
#[derive(Debug)]
pub enum Phase {
    /// An HTTP request is awaited. Whether /derp may be asked for here.
    Request { relay: bool },
    /// `ClientInfo` is awaited.
    Login(Cutter),
    /// It is a client.
    Client(Box<Client>),
}

/// Who is logged in.
#[derive(Debug)]
pub struct Client {
    pub key: PublicKey,
    pub cutter: Cutter,
    /// It called us its home.
    pub home: bool,
    /// Another connection gets the packets of its key.
    pub shadow: bool,
    /// Whom it sent packets, so that they hear when it goes.
    pub sent_to: HashSet<PublicKey>,
    /// How often it may hear that somebody is not here.
    pub not_here: Bucket,
    /// How often it may take its key over.
    pub take_over: Bucket,
    pub rate: Option<Bucket>,
    /// It is another relay of the mesh.
    pub mate: bool,
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum End {
    #[error("the client left")]
    Left,
    #[error("the answer was the last")]
    Answered,
    #[error("{0}")]
    System(#[from] io::Error),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("HTTP: {0}")]
    Http(#[from] crate::http::RequestError),
    #[error("{0}")]
    Frame(#[from] millrace_path::derp::FrameError),
    #[error("{0}")]
    Login(#[from] millrace_path::derp::LoginError),
    #[error("a {0:?} frame, which clients do not send")]
    Unexpected(millrace_path::derp::Kind),
    #[error("bytes that cannot be the beginning of a frame that fits")]
    TooLong,
    #[error("the key is not on the list of this relay")]
    NotAdmitted,
    #[error("a relay whose mesh key is not ours")]
    MeshKey,
    #[error("a mate that does not read what it asked to hear")]
    Behind,
    #[error("a mate asked to end it")]
    Closed,
    #[error("no request or login in time")]
    Timeout,
}

/// A connection of one worker.
#[derive(Debug)]
pub struct Connection {
    socket: TcpStream,
    pub session: Option<Session>,
    pub peer: SocketAddr,
    pub phase: Phase,
    pub outbox: Outbox,
    /// Bytes of what has begun and not ended: of a TLS record, else of a request or frame.
    held: Vec<u8>,
    /// With TLS, the same of what was decrypted.
    pub plain: Vec<u8>,
    /// Bytes that must leave before anything else, and how many have.
    unsent: Vec<u8>,
    unsent_at: usize,
    /// It ends when `unsent` is.
    pub closing: bool,
    /// The kernel tells us when it takes bytes again.
    pub watched: bool,
    /// Reading is paused for its rate limit.
    pub paused: bool,
    /// It stands in the worker's list of those to flush.
    pub dirty: bool,
    /// When it must have come further, or hear from us.
    pub deadline_ms: u64,
}

impl Connection {
    pub fn new(socket: TcpStream, peer: SocketAddr, relay: bool, deadline_ms: u64) -> Self {
        Self {
            socket,
            session: None,
            peer,
            phase: Phase::Request { relay },
            outbox: Outbox::default(),
            held: Vec::new(),
            plain: Vec::new(),
            unsent: Vec::new(),
            unsent_at: 0,
            closing: false,
            watched: false,
            paused: false,
            dirty: false,
            deadline_ms,
        }
    }

    /// Reads once, behind what was held. Returns how much of `buffer` is filled; none when the
    /// kernel has nothing.
    pub fn fill(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, End> {
        let held = self.held.len();
        let room = buffer.get_mut(held..).filter(|room| !room.is_empty()).ok_or(End::TooLong)?;
        let read = match rustix::io::read(&self.socket, room) {
            Ok(0) => return Err(End::Left),
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(error) => return Err(io::Error::from(error).into()),
        };
        buffer[..held].copy_from_slice(&self.held);
        self.held = Vec::new();
        Ok(Some(held + read))
    }

    /// Keeps what could not be used yet.
    pub fn hold(&mut self, bytes: &[u8]) {
        debug_assert!(self.held.is_empty());
        if !bytes.is_empty() {
            self.held = bytes.to_vec();
        }
    }

    /// Whether the kernel took everything so far.
    pub fn is_clear(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Writes whole frames. Returns how many bytes of them are done with, always at a boundary: the
    /// rest of a frame that was cut, or of sealed records, is kept.
    pub fn send(&mut self, frames: &[u8], scratch: &mut Vec<u8>) -> Result<usize, End> {
        debug_assert!(self.is_clear());
        let Some(session) = &mut self.session else {
            let written = write(&self.socket, frames)?;
            if written == frames.len() {
                return Ok(written);
            }
            let end = boundary(frames, written);
            self.unsent.extend_from_slice(&frames[written..end]);
            return Ok(end);
        };
        let mut done = 0;
        while done < frames.len() && self.unsent.is_empty() {
            let rest = &frames[done..];
            let some = boundary(rest, limits::SEAL_BYTES);
            let sealed = session.seal(&rest[..some], scratch)?;
            let written = write(&self.socket, &scratch[..sealed])?;
            self.unsent.extend_from_slice(&scratch[written..sealed]);
            done += some;
        }
        Ok(done)
    }

    /// Writes bytes that are not frames: an HTTP answer, a TLS handshake (`sealed`: as they are).
    pub fn send_bytes(
        &mut self,
        bytes: &[u8],
        sealed: bool,
        scratch: &mut Vec<u8>,
    ) -> Result<(), End> {
        let bytes = match &mut self.session {
            Some(session) if !sealed => {
                let len = session.seal(bytes, scratch)?;
                &scratch[..len]
            }
            _ => bytes,
        };
        let written = if self.is_clear() { write(&self.socket, bytes)? } else { 0 };
        self.unsent.extend_from_slice(&bytes[written..]);
        Ok(())
    }

    /// Writes what waits, oldest first, until the kernel takes no more. Returns the bytes sent.
    pub fn flush(&mut self, scratch: &mut Vec<u8>) -> Result<usize, End> {
        if !self.is_clear() {
            self.unsent_at += write(&self.socket, &self.unsent[self.unsent_at..])?;
            if self.unsent_at < self.unsent.len() {
                return Ok(0);
            }
            self.unsent = Vec::new();
            self.unsent_at = 0;
        }
        let mut outbox = std::mem::take(&mut self.outbox);
        let mut total = 0;
        let result = loop {
            if outbox.is_empty() || !self.is_clear() {
                break Ok(total);
            }
            match self.send(outbox.front(usize::MAX), scratch) {
                Ok(sent) => {
                    outbox.sent(sent);
                    total += sent;
                    if sent == 0 {
                        break Ok(total);
                    }
                }
                Err(end) => break Err(end),
            }
        };
        self.outbox = outbox;
        result
    }

    /// Whether something waits for the kernel.
    pub fn is_blocked(&self) -> bool {
        !self.is_clear() || !self.outbox.is_empty()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Writes what the kernel takes now.
fn write(socket: &TcpStream, bytes: &[u8]) -> Result<usize, End> {
    use rustix::net::SendFlags;
    if bytes.is_empty() {
        return Ok(0);
    }
    match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
        Ok(written) => Ok(written),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
        Err(error) => Err(io::Error::from(error).into()),
    }
}
