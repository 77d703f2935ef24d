//! Detours: sealed messages that go by control (and its relay) instead of by UDP. A run of messages
//! to or from one peer is one datagram of a unix socket pair; the data plane has a pair for the
//! slow thread and one for each worker.
//!
//! ```text
//! 0        4           6          8
//! ├ slot ──┼ segment ──┼ reserved ┼ messages …    little-endian; reserved is zero
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags,
    SocketType, recvmsg, sendmsg, socketpair, sockopt,
};

/// Bytes before the messages of a run.
pub const HEADER_LEN: usize = 8;
/// Bytes of all messages of a run: what one UDP_SEGMENT send takes.
pub const RUN_LEN_MAX: usize = 65_535;
/// Room for a datagram that is one byte too long, so that such a one is told.
pub const BUFFER_LEN: usize = HEADER_LEN + RUN_LEN_MAX + 1;
/// What may wait for the other side, in bytes: the kernel doubles it and counts its own overhead.
/// Some 40 full runs: more would only be delay.
const QUEUE_LEN: usize = 2 << 20;

/// Type word of a WireGuard data message.
const DATA: u8 = 4;

/// Messages of one peer.
#[derive(Debug, PartialEq, Eq)]
pub struct Run<'a> {
    pub slot: u32,
    /// Bytes of each message but the last, which may be shorter. Never zero.
    pub segment_len: u16,
    /// Never empty.
    pub bytes: &'a mut [u8],
}

impl<'a> Run<'a> {
    /// None unless the whole datagram obeys the header.
    pub fn parse(datagram: &'a mut [u8]) -> Option<Self> {
        let (header, bytes) = datagram.split_first_chunk_mut::<HEADER_LEN>()?;
        let [a, b, c, d, e, f, reserved @ ..] = *header;
        let (slot, segment_len) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        let fits = 1..=bytes.len().min(RUN_LEN_MAX);
        let is_valid = reserved == [0; 2]
            && bytes.len() <= RUN_LEN_MAX
            && fits.contains(&usize::from(segment_len));
        is_valid.then_some(Self { slot, segment_len, bytes })
    }

    fn header(slot: u32, segment_len: u16) -> [u8; HEADER_LEN] {
        let ([a, b, c, d], [e, f]) = (slot.to_le_bytes(), segment_len.to_le_bytes());
        [a, b, c, d, e, f, 0, 0]
    }

    /// The messages, each by itself.
    pub fn messages(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_mut(usize::from(self.segment_len))
    }
}

/// One end of a pair. Never waits.
#[derive(Debug)]
pub struct DetourSocket(OwnedFd);

impl DetourSocket {
    /// Both ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        for end in [&ours, &theirs] {
            // The forced form passes the system's limit and needs CAP_NET_ADMIN.
            if sockopt::set_socket_send_buffer_size_force(end, QUEUE_LEN).is_err() {
                sockopt::set_socket_send_buffer_size(end, QUEUE_LEN)?;
            }
        }
        Ok((Self(ours), Self(theirs)))
    }

    pub(super) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a run to, or from, the peer in `slot`. `WouldBlock`: the queue is full; anything else:
    /// nobody is there.
    pub fn send(&self, slot: u32, segment_len: u16, bytes: &[u8]) -> io::Result<()> {
        let header = Run::header(slot, segment_len);
        let parts = [IoSlice::new(&header), IoSlice::new(bytes)];
        let mut none: [MaybeUninit<u8>; 0] = [];
        let mut none = SendAncillaryBuffer::new(&mut none);
        sendmsg(&self.0, &parts, &mut none, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// One datagram into `buffer`, which should be [`BUFFER_LEN`] long: the part of it to
    /// [`Run::parse`]. None if there is nothing now; an error if the other side is gone.
    pub fn receive<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Option<&'b mut [u8]>> {
        let mut none: [MaybeUninit<u8>; 0] = [];
        let mut none = RecvAncillaryBuffer::new(&mut none);
        let mut parts = [IoSliceMut::new(buffer)];
        match recvmsg(&self.0, &mut parts, &mut none, RecvFlags::DONTWAIT) {
            // No run is empty: it is the end of the connection.
            Ok(received) if received.bytes == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(received) => Ok(Some(&mut buffer[..received.bytes])),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for DetourSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Control's ends of all pairs.
#[derive(Debug)]
pub struct DetourSockets {
    pub slow: DetourSocket,
    /// At least one.
    pub workers: Vec<DetourSocket>,
}

impl DetourSockets {
    /// Hands messages from the peer in `slot` to the thread that owns them: data messages to the
    /// peer's worker, handshakes to the slow thread. A run must not mix the two. Errors as of
    /// [`DetourSocket::send`].
    pub fn send(&self, slot: u32, segment_len: u16, bytes: &[u8]) -> io::Result<()> {
        let place = slot as usize % self.workers.len().max(1);
        let to = match self.workers.get(place) {
            Some(worker) if bytes.first() == Some(&DATA) => worker,
            _ => &self.slow,
        };
        to.send(slot, segment_len, bytes)
    }

    /// All of them: poll each for reading.
    pub fn iter(&self) -> impl Iterator<Item = &DetourSocket> {
        std::iter::once(&self.slow).chain(&self.workers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_over_as_one_datagram() {
        let (ours, theirs) = DetourSocket::pair().unwrap();
        let sent: Vec<u8> = (0..60_000_u32).map(|number| number as u8).collect();
        ours.send(9, 1452, &sent).unwrap();
        let mut buffer = vec![0; BUFFER_LEN];
        let mut run = Run::parse(theirs.receive(&mut buffer).unwrap().unwrap()).unwrap();
        assert_eq!((run.slot, run.segment_len, &*run.bytes), (9, 1452, &*sent));
        assert_eq!(run.messages().count(), 60_000_usize.div_ceil(1452));
        assert!(theirs.receive(&mut buffer).unwrap().is_none());
    }

    #[test]
    fn a_full_queue_and_an_absent_reader_are_told_apart() {
        let (ours, theirs) = DetourSocket::pair().unwrap();
        let mut runs = 0;
        let full = loop {
            match ours.send(0, 1000, &[4; 60_000]) {
                Ok(()) => runs += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!((16..200).contains(&runs), "{runs} runs waited");
        drop(theirs);
        let gone = ours.send(0, 1000, &[4; 1000]).unwrap_err();
        assert_ne!(gone.kind(), io::ErrorKind::WouldBlock);
        ours.receive(&mut [0; 64]).unwrap_err();
    }

    #[test]
    fn a_header_that_contradicts_its_datagram_is_refused() {
        let datagram = |segment_len: u16, reserved: u8, len: usize| {
            let mut all = Run::header(1, segment_len).to_vec();
            all[7] = reserved;
            all.resize(HEADER_LEN + len, 4);
            all
        };
        assert!(Run::parse(&mut datagram(32, 0, 32)).is_some());
        assert!(Run::parse(&mut datagram(32, 0, 33)).is_some());
        for (segment_len, reserved, len) in
            [(0, 0, 32), (33, 0, 32), (32, 1, 32), (32, 0, 0), (32, 0, RUN_LEN_MAX + 1)]
        {
            let mut all = datagram(segment_len, reserved, len);
            assert!(Run::parse(&mut all).is_none(), "{segment_len} {reserved} {len}");
        }
        assert!(Run::parse(&mut [0; 7]).is_none());
    }
}
