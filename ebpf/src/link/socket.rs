//! A SOCK_SEQPACKET socket whose messages may carry descriptors. Never waits.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    recvmsg, sendmsg, socket_with,
};
use zeroize::{Zeroize, Zeroizing};

use super::message::MessageError;
use super::{DESCRIPTORS_MAX, MESSAGE_LEN_MAX};

/// Room for the descriptors of one message.
const ANCILLARY_LEN: usize = rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX));

/// Why a link is of no more use. The caller drops its end.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the other side closed the link")]
    Closed,
    #[error("the other side breaks the protocol: {0}")]
    Message(#[from] MessageError),
    #[error("the other side breaks the protocol: {what}")]
    Protocol { what: &'static str },
    #[error("the data plane refused us: {reason}")]
    Refused { reason: String },
    #[error("the other side does not read: {waiting} messages wait for it")]
    Slow { waiting: usize },
    #[error("the link failed: {0}")]
    Io(#[from] io::Error),
}

/// One end of a connection, or what listens for some.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

/// What arrived in one datagram.
pub(super) struct Datagram {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Socket {
    fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(Self(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?))
    }

    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = Self::new()?;
        rustix::net::connect(&socket.0, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    }

    pub(super) fn listen(path: &Path) -> io::Result<Self> {
        let socket = Self::new()?;
        rustix::net::bind(&socket.0, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket.0, 4)?;
        Ok(socket)
    }

    /// None if nobody waits.
    pub(super) fn accept(&self) -> io::Result<Option<Self>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.0, flags) {
            Ok(fd) => Ok(Some(Self(fd))),
            Err(error) => nothing_yet(error),
        }
    }

    /// False if there is no room now.
    pub(super) fn send(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<bool, LinkError> {
        let mut space = [MaybeUninit::uninit(); ANCILLARY_LEN];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(LinkError::Protocol { what: "more descriptors than a message may carry" });
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, flags) {
            Ok(_) => Ok(true),
            Err(error) => Ok(nothing_yet::<()>(error).map_err(closed)?.is_some()),
        }
    }

    /// None if there is nothing now.
    pub(super) fn receive(&self) -> Result<Option<Datagram>, LinkError> {
        // One byte more tells a message that is too long from the longest.
        let mut bytes = Zeroizing::new(vec![0; MESSAGE_LEN_MAX + 1]);
        let mut space = [MaybeUninit::uninit(); ANCILLARY_LEN];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags);
        let received = match received {
            Ok(received) => received,
            Err(error) => return nothing_yet(error).map_err(closed),
        };
        // Taken out even if the message is refused, so that they are closed.
        let descriptors = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(LinkError::Protocol { what: "more descriptors than a message may carry" });
        }
        match received.bytes {
            0 => Err(LinkError::Closed),
            1..=MESSAGE_LEN_MAX => {
                bytes[received.bytes..].zeroize();
                bytes.truncate(received.bytes);
                Ok(Some(Datagram { bytes, descriptors }))
            }
            _ => Err(LinkError::Protocol { what: "a message is too long" }),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// None for an error that only says "not now".
fn nothing_yet<T>(error: rustix::io::Errno) -> io::Result<Option<T>> {
    use rustix::io::Errno;
    match error {
        Errno::AGAIN | Errno::INTR | Errno::CONNABORTED => Ok(None),
        error => Err(error.into()),
    }
}

fn closed(error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::NotConnected => LinkError::Closed,
        _ => LinkError::Io(error),
    }
}
