//! The data plane's end of the link: what listens, and the one client that it serves.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use super::detour::DetourSocket;
use super::message::{ToControl, ToDataPlane, Welcome};
use super::socket::{LinkError, Socket};
use super::{OUTBOX_MESSAGES_MAX, VERSION};
use crate::shared_fds::SharedFds;

/// What listens. Its file's place, mode and group are the caller's affair.
#[derive(Debug)]
pub struct LinkListener(Socket);

impl LinkListener {
    /// The file must not exist.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Socket::listen(path).map(Self)
    }

    /// None if nobody waits.
    pub fn accept(&self) -> io::Result<Option<LinkPeer>> {
        let socket = self.0.accept()?;
        let peer = |socket| LinkPeer { socket, greeted: false, outbox: VecDeque::new() };
        Ok(socket.map(peer))
    }
}

impl AsFd for LinkListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What goes with a welcome, in the order of the descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    pub maps: SharedFds<'a>,
    pub udp: BorrowedFd<'a>,
    /// Control's ends: the slow thread's, then those of the workers.
    pub detours: &'a [DetourSocket],
}

/// A connected client. Poll for reading, and for writing while [`LinkPeer::wants_write`].
#[derive(Debug)]
pub struct LinkPeer {
    socket: Socket,
    greeted: bool,
    outbox: VecDeque<ToControl>,
}

impl LinkPeer {
    /// None if there is nothing now. The first message is a [`ToDataPlane::Hello`] of our version,
    /// and no other is; a client of another version is told so, and the error ends it.
    pub fn receive(&mut self) -> Result<Option<ToDataPlane>, LinkError> {
        let Some(datagram) = self.socket.receive()? else { return Ok(None) };
        if !datagram.descriptors.is_empty() {
            return Err(LinkError::Protocol { what: "unexpected descriptors" });
        }
        let message = ToDataPlane::parse(&datagram.bytes)?;
        match (&message, self.greeted) {
            (ToDataPlane::Hello { version: VERSION }, false) => self.greeted = true,
            (ToDataPlane::Hello { version }, false) => {
                let reason = format!(
                    "control speaks version {version} of the link, the data plane {VERSION}: \
                     install the same version of both"
                );
                // If it does not hear it, it sees the end.
                let _ = self.socket.send(&ToControl::Refused { reason }.encode(), &[]);
                return Err(LinkError::Protocol { what: "control is of another version" });
            }
            (ToDataPlane::Hello { .. }, true) => {
                return Err(LinkError::Protocol { what: "a second hello" });
            }
            (_, false) => {
                return Err(LinkError::Protocol { what: "its first message is no hello" });
            }
            (_, true) => {}
        }
        Ok(Some(message))
    }

    /// The first message, with the descriptors if there are any.
    pub fn welcome(
        &mut self,
        welcome: &Welcome,
        offer: Option<Offer<'_>>,
    ) -> Result<(), LinkError> {
        let descriptors = offer.as_ref().map_or_else(Vec::new, Offer::descriptors);
        debug_assert_eq!(descriptors.len(), welcome.descriptors());
        match self.socket.send(&ToControl::Welcome(welcome.clone()).encode(), &descriptors)? {
            true => Ok(()),
            // A new socket has room for one message.
            false => Err(LinkError::Slow { waiting: 1 }),
        }
    }

    /// Sends in order, now or when there is room.
    pub fn send(&mut self, message: ToControl) -> Result<(), LinkError> {
        if self.outbox.len() >= OUTBOX_MESSAGES_MAX {
            return Err(LinkError::Slow { waiting: self.outbox.len() });
        }
        self.outbox.push_back(message);
        self.flush()
    }

    /// Sends what waits, as far as there is room.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        while let Some(message) = self.outbox.front() {
            if !self.socket.send(&message.encode(), &[])? {
                break;
            }
            self.outbox.pop_front();
        }
        Ok(())
    }

    pub fn wants_write(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// It said hello.
    pub fn is_greeted(&self) -> bool {
        self.greeted
    }
}

impl AsFd for LinkPeer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<'a> Offer<'a> {
    fn descriptors(&self) -> Vec<BorrowedFd<'a>> {
        let SharedFds { abi, endpoints, observed, stats, drops } = self.maps;
        [abi, endpoints, observed, stats, drops, self.udp]
            .into_iter()
            .chain(self.detours.iter().map(AsFd::as_fd))
            .collect()
    }
}
