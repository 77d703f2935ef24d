//! One HTTP exchange with a router: connect, write, read to the end, without waiting.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;

use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::{Domain, Protocol, Socket, Type};

/// What came of a turn.
#[derive(Debug)]
pub(super) enum Progress {
    Waits,
    Read(usize),
    /// The router closed its end.
    Ended,
    Failed(io::Error),
}

/// The connection; dropped, it is closed and the epoll knows it no more.
#[derive(Debug)]
pub(super) struct Http {
    exchange: u32,
    stream: TcpStream,
    request: Vec<u8>,
    written: usize,
}

impl Http {
    pub(super) fn start(
        epoll: &OwnedFd,
        exchange: u32,
        own: IpAddr,
        to: SocketAddrV4,
        request: Vec<u8>,
    ) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.bind(&SocketAddr::new(own, 0).into())?;
        match socket.connect(&SocketAddr::V4(to).into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let stream = TcpStream::from(socket);
        epoll::add(epoll, &stream, EventData::new_u64(1), EventFlags::OUT)?;
        Ok(Self { exchange, stream, request, written: 0 })
    }

    pub(super) fn exchange(&self) -> u32 {
        self.exchange
    }

    /// Writes what is left of the request, or reads what has come of the answer.
    pub(super) fn drive(&mut self, epoll: &OwnedFd, buffer: &mut [u8]) -> Progress {
        match self.turn(epoll, buffer) {
            Ok(progress) => progress,
            Err(error) => match error.kind() {
                // Writing to a connection that is not made yet says the second.
                ErrorKind::WouldBlock | ErrorKind::NotConnected => Progress::Waits,
                ErrorKind::Interrupted => Progress::Waits,
                _ => Progress::Failed(error),
            },
        }
    }

    fn turn(&mut self, epoll: &OwnedFd, buffer: &mut [u8]) -> io::Result<Progress> {
        while self.written < self.request.len() {
            self.written += self.stream.write(&self.request[self.written..])?;
            if self.written == self.request.len() {
                epoll::modify(epoll, &self.stream, EventData::new_u64(1), EventFlags::IN)?;
            }
        }
        Ok(match self.stream.read(buffer)? {
            0 => Progress::Ended,
            len => Progress::Read(len),
        })
    }
}
