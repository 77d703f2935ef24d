//! A connection that we dialed: TCP, TLS if the URL says so, and the HTTP request that makes it a
//! stream of frames.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use super::url::RelayUrl;
use crate::limits;

/// One connection. It writes what the kernel takes and keeps the rest.
#[derive(Debug)]
pub struct Wire {
    socket: TcpStream,
    session: Option<Box<ClientConnection>>,
    /// Without TLS: what the kernel has not taken yet.
    unsent: Vec<u8>,
}

impl Wire {
    /// Connects and has the stream upgraded, all within the time that is left until `deadline`. The
    /// first bytes of the stream may have come with the answer: they are returned too.
    pub fn dial(
        url: &RelayUrl,
        tls: &Arc<ClientConfig>,
        deadline: Instant,
    ) -> io::Result<(Self, Vec<u8>)> {
        let socket = connect(url, deadline)?;
        let session = if url.tls {
            let name = ServerName::try_from(url.host.clone()).map_err(io::Error::other)?;
            let mut session =
                ClientConnection::new(Arc::clone(tls), name).map_err(io::Error::other)?;
            // What waits is bounded by what we take from our mailbox.
            session.set_buffer_limit(None);
            Some(Box::new(session))
        } else {
            None
        };
        let mut wire = Self { socket, session, unsent: Vec::new() };
        let request = format!(
            "GET /derp HTTP/1.1\r\nHost: {}\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n",
            url.host
        );
        wire.send(request.as_bytes())?;
        let mut answer = Vec::new();
        let rest = loop {
            if let Some(rest) = upgraded(&answer)? {
                break rest;
            }
            wire.wait_and_receive(&mut answer, deadline)?;
        };
        Ok((wire, rest))
    }

    /// Appends what comes next, or fails at the deadline.
    pub fn wait_and_receive(&mut self, into: &mut Vec<u8>, deadline: Instant) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            self.flush()?;
            match self.receive(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    into.extend_from_slice(&buffer[..len]);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            self.wait(left(deadline)?)?;
        }
    }

    /// Sends as much as the kernel takes now; the rest waits.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.session {
            Some(session) => session.writer().write_all(bytes)?,
            None => self.unsent.extend_from_slice(bytes),
        }
        self.flush()
    }

    /// Sends what waits.
    pub fn flush(&mut self) -> io::Result<()> {
        let result = match &mut self.session {
            Some(session) => loop {
                if !session.wants_write() {
                    break Ok(());
                }
                if let Err(error) = session.write_tls(&mut self.socket) {
                    break Err(error);
                }
            },
            None => loop {
                if self.unsent.is_empty() {
                    break Ok(());
                }
                match self.socket.write(&self.unsent) {
                    Ok(written) => drop(self.unsent.drain(..written)),
                    Err(error) => break Err(error),
                }
            },
        };
        match result {
            Err(error) if is_later(&error) => Ok(()),
            other => other,
        }
    }

    /// Whether something waits for the kernel.
    pub fn is_blocked(&self) -> bool {
        !self.unsent.is_empty() || self.session.as_ref().is_some_and(|s| s.wants_write())
    }

    /// What came; 0 at the end of the stream, `WouldBlock` when there is nothing.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &mut self.session else { return self.socket.read(buffer) };
        loop {
            match session.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if session.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            if let Err(error) = session.process_new_packets() {
                // The alert says why; that it may not arrive changes nothing.
                let _ = session.write_tls(&mut self.socket);
                return Err(io::Error::other(error));
            }
        }
    }

    fn wait(&self, at_most: Duration) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, self.is_blocked());
        let wait = Timespec {
            tv_sec: at_most.as_secs() as i64,
            tv_nsec: i64::from(at_most.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(&self.socket, flags)], Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The first of the host's addresses that answers.
fn connect(url: &RelayUrl, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let addresses: Vec<_> = (&*url.host, url.port).to_socket_addrs()?.collect();
    for (tried, address) in addresses.iter().enumerate() {
        // Each gets its share of the time, so that a silent one does not use up the others'.
        let share = left(deadline)? / (addresses.len() - tried) as u32;
        match TcpStream::connect_timeout(address, share) {
            Ok(socket) => {
                let options = socket2::SockRef::from(&socket);
                options.set_tcp_nodelay(true)?;
                options.set_tcp_user_timeout(Some(limits::UNACKNOWLEDGED_LIMIT))?;
                options.set_nonblocking(true)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The bytes behind the head of the answer, once that is whole and says that we are through.
fn upgraded(answer: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut headers = [httparse::EMPTY_HEADER; limits::HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(answer) {
        Ok(httparse::Status::Complete(len)) if response.code == Some(101) => {
            Ok(Some(answer[len..].to_vec()))
        }
        Ok(httparse::Status::Complete(_)) => {
            let code = response.code.unwrap_or_default();
            Err(io::Error::other(format!("HTTP status {code}, expected 101: /derp is not here")))
        }
        Ok(httparse::Status::Partial) if answer.len() < limits::REQUEST_MAX => Ok(None),
        _ => Err(io::Error::other("the answer is not HTTP")),
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
