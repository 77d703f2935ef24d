//! Control's end of the link. Poll the descriptor for reading, then receive until there is nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::detour::{DetourSocket, DetourSockets};
use super::message::{Steering, ToControl, ToDataPlane};
use super::socket::{Datagram, LinkError, Socket};
use super::{PublicKey, VERSION};

/// A connection to the data plane.
#[derive(Debug)]
pub struct LinkClient {
    socket: Socket,
    welcomed: bool,
}

/// A message, and what came with it.
#[derive(Debug)]
pub struct Delivery {
    pub message: ToControl,
    /// Of a welcome with [`Steering::On`].
    pub handles: Option<Handles>,
}

/// What control works with. Close all of it when the link ends.
#[derive(Debug)]
pub struct Handles {
    pub maps: MapHandles,
    /// Bound to the data plane's port: gets STUN, disco and Geneve, sends from the same port.
    /// Dual-stack unless the host has no IPv6; non-blocking; its mark is the data plane's affair.
    pub udp: OwnedFd,
    pub detours: DetourSockets,
}

/// Open them by [`crate::spec::read_abi`] and the constructors in [`crate::maps`] and
/// [`crate::tables`]. No capability is needed.
#[derive(Debug)]
pub struct MapHandles {
    pub abi: OwnedFd,
    /// Write: control is its one writer.
    pub endpoints: OwnedFd,
    /// Read. (Linux maps no array whose fd can only be read, so that not to write is a promise.)
    pub observed: OwnedFd,
    pub stats: OwnedFd,
    pub drops: OwnedFd,
}

impl LinkClient {
    /// Connects and says hello. The error is `NotFound` or `ConnectionRefused` while no data plane
    /// runs, and `PermissionDenied` for whoever is neither root nor of the group.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::connect(path)?;
        let hello = ToDataPlane::Hello { version: VERSION }.encode();
        match socket.send(&hello, &[]) {
            Ok(true) => Ok(Self { socket, welcomed: false }),
            // A new socket has room.
            Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
            Err(LinkError::Io(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    /// None if there is nothing now. On an error the link is over: connect anew.
    pub fn receive(&mut self) -> Result<Option<Delivery>, LinkError> {
        let Some(Datagram { bytes, descriptors }) = self.socket.receive()? else {
            return Ok(None);
        };
        let message = ToControl::parse(&bytes)?;
        let handles = match &message {
            ToControl::Refused { reason } => {
                return Err(LinkError::Refused { reason: reason.clone() });
            }
            ToControl::Welcome(welcome) if !self.welcomed => {
                self.welcomed = true;
                if descriptors.len() != welcome.descriptors() {
                    let what = "a welcome with a wrong number of descriptors";
                    return Err(LinkError::Protocol { what });
                }
                match welcome.steering {
                    Steering::On { .. } => Some(Handles::from_list(descriptors)?),
                    Steering::Off { .. } => None,
                }
            }
            _ if !self.welcomed => {
                return Err(LinkError::Protocol { what: "its first message is no welcome" });
            }
            ToControl::Welcome(_) => {
                return Err(LinkError::Protocol { what: "a second welcome" });
            }
            _ if !descriptors.is_empty() => {
                return Err(LinkError::Protocol { what: "unexpected descriptors" });
            }
            _ => None,
        };
        Ok(Some(Delivery { message, handles }))
    }

    /// Asks for the box key between the node key and `peer`. False if there is no room now: ask
    /// again later.
    pub fn want_box_key(&self, request: u32, peer: PublicKey) -> Result<bool, LinkError> {
        self.socket.send(&ToDataPlane::WantBoxKey { request, peer }.encode(), &[])
    }

    /// Asks for a handshake with the peer in `slot`. False as with [`Self::want_box_key`].
    pub fn connect_now(&self, slot: u32) -> Result<bool, LinkError> {
        self.socket.send(&ToDataPlane::ConnectNow { slot }.encode(), &[])
    }
}

impl AsFd for LinkClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Handles {
    /// In the order of [`super::Offer`].
    fn from_list(descriptors: Vec<OwnedFd>) -> Result<Self, LinkError> {
        let mut list = descriptors.into_iter();
        let mut next =
            || list.next().ok_or(LinkError::Protocol { what: "a descriptor is missing" });
        let maps = MapHandles {
            abi: next()?,
            endpoints: next()?,
            observed: next()?,
            stats: next()?,
            drops: next()?,
        };
        let (udp, slow) = (next()?, DetourSocket::new(next()?));
        let workers = list.map(DetourSocket::new).collect();
        Ok(Self { maps, udp, detours: DetourSockets { slow, workers } })
    }
}
