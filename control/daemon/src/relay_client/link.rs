//! The TCP connection to a relay, with TLS inside or not: buffers and system calls.

use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::buffer::spare_capacity;

use super::failure::RelayFailure;
use super::tls::{Received, Session};
use crate::limits;

/// One connection.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    pub address: SocketAddr,
    tls: Option<Tls>,
    /// What was read and not yet taken starts at `taken`.
    plain: Vec<u8>,
    taken: usize,
    /// What the kernel did not take yet starts at `written`.
    out: Vec<u8>,
    written: usize,
}

#[derive(Debug)]
struct Tls {
    /// The relay's name, for messages.
    host: String,
    session: Session,
    cipher: Vec<u8>,
    ready: bool,
}

/// What a read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brought {
    Nothing,
    Bytes,
    /// The other side will send no more.
    End(&'static str),
}

impl Link {
    /// Our end's address; none: the connection is over.
    pub fn local_ip(&self) -> Option<IpAddr> {
        self.stream.local_addr().ok().map(|address| address.ip())
    }

    pub fn new(stream: TcpStream, address: SocketAddr) -> Self {
        let (plain, out) = (Vec::new(), Vec::new());
        Self { stream, address, tls: None, plain, taken: 0, out, written: 0 }
    }

    /// Begins a TLS handshake; what was read and not taken is its beginning.
    pub fn start_tls(&mut self, host: String, session: Session) -> Result<(), RelayFailure> {
        let cipher = self.plain.split_off(self.taken);
        self.plain.clear();
        self.taken = 0;
        self.tls = Some(Tls { host, session, cipher, ready: false });
        self.decrypt().map(drop)
    }

    /// TLS, once the handshake is over.
    pub fn session(&self) -> Option<&Session> {
        self.tls.as_ref().filter(|tls| tls.ready).map(|tls| &tls.session)
    }

    /// Whether what is written now goes to the relay, and not into a handshake.
    pub fn is_ready(&self) -> bool {
        self.tls.as_ref().is_none_or(|tls| tls.ready)
    }

    /// Reads once. All that was read before should have been taken: what was not is moved.
    pub fn read(&mut self) -> Result<Brought, RelayFailure> {
        self.plain.drain(..self.taken);
        self.taken = 0;
        if self.plain.len() > limits::RELAY_UNREAD_MAX {
            return Err(RelayFailure::TooMuch);
        }
        let buffer = self.tls.as_mut().map_or(&mut self.plain, |tls| &mut tls.cipher);
        buffer.reserve(limits::RELAY_READ_MAX);
        match rustix::io::read(&self.stream, spare_capacity(buffer)) {
            Ok(0) => return Ok(Brought::End("")),
            Ok(_) => {}
            Err(error) if is_later(error.kind()) => return Ok(Brought::Nothing),
            Err(error) => return Err(RelayFailure::Broken(error.into())),
        }
        match self.decrypt()? {
            true => Ok(Brought::End(" (TLS)")),
            false => Ok(Brought::Bytes),
        }
    }

    /// True when the relay closed TLS.
    fn decrypt(&mut self) -> Result<bool, RelayFailure> {
        let Some(Tls { host, session, cipher, ready }) = &mut self.tls else { return Ok(false) };
        let received = session.receive(cipher, &mut self.plain, &mut self.out);
        let Received { taken, ready: is_ready, closed } =
            received.map_err(|error| RelayFailure::of_tls(host, &error))?;
        cipher.drain(..taken);
        *ready |= is_ready;
        Ok(closed)
    }

    /// What was read and not taken.
    pub fn unread(&self) -> &[u8] {
        &self.plain[self.taken..]
    }

    pub fn take(&mut self, len: usize) {
        self.taken += len;
    }

    /// Where the unread bytes begin, for [`Self::bytes`].
    pub fn offset(&self) -> usize {
        self.taken
    }

    /// Bytes by their place, also those that were taken, until the next read.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.plain[range]
    }

    /// Gives bytes to the kernel, as many as it takes; the rest waits for [`Self::flush`].
    pub fn write(&mut self, plain: &[u8]) -> Result<(), RelayFailure> {
        let flushed = self.is_flushed();
        match &mut self.tls {
            Some(tls) => {
                let sealed = tls.session.seal(plain, &mut self.out);
                sealed.map_err(|error| RelayFailure::of_tls(&tls.host, &error))?;
            }
            None => {
                let written = if flushed { write(&mut self.stream, plain)? } else { 0 };
                self.out.extend_from_slice(&plain[written..]);
            }
        }
        self.flush().map(drop)
    }

    /// Writes what waits; false while the kernel does not take all of it.
    pub fn flush(&mut self) -> Result<bool, RelayFailure> {
        while !self.is_flushed() {
            match write(&mut self.stream, &self.out[self.written..])? {
                0 => return Ok(false),
                written => self.written += written,
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(true)
    }

    pub fn is_flushed(&self) -> bool {
        self.written == self.out.len()
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Bytes that the kernel took; 0 when it wants none now.
fn write(stream: &mut TcpStream, bytes: &[u8]) -> Result<usize, RelayFailure> {
    match stream.write(bytes) {
        Ok(written) => Ok(written),
        Err(error) if is_later(error.kind()) => Ok(0),
        Err(error) => Err(RelayFailure::Broken(error)),
    }
}

fn is_later(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
