//! Sends sealed runs by socket, in as few calls as the kernel takes.
//!
//! A run goes in one call (UDP_SEGMENT). Where the kernel refuses that, the same run goes again
//! datagram by datagram, so that nothing is lost. The refusal is the run's own fault if its
//! datagrams do not fit the route, which then cuts each into fragments; other peers keep their runs.
//! It is the device's if it cannot do the checksums: then no run is tried any more.

use std::io::{self, ErrorKind};

use millrace_wg::tx::Transmit;
use millrace_wg::{Drop, DropCounters};

use crate::io::frame;
use crate::io::udp::{self, UdpSocket};
use crate::offload::Offload;

/// A worker's socket as a way out.
#[derive(Clone, Copy)]
pub struct BySocket<'w> {
    pub socket: &'w UdpSocket,
    pub gso: &'w Offload,
    pub drops: &'w DropCounters,
}

/// How far a send came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    All,
    /// So many bytes of it; the socket's buffer is full.
    Blocked(usize),
}

impl BySocket<'_> {
    /// Sends `transmit` from byte `offset` on. What cannot be sent is counted.
    pub fn send(&self, transmit: &Transmit<'_>, mut offset: usize) -> Sent {
        let mut endpoint = transmit.endpoint;
        let mut refused: Option<io::Error> = None;
        while offset < transmit.bytes.len() {
            let rest = &transmit.bytes[offset..];
            let is_run = self.gso.is_on() && refused.is_none();
            let len = if is_run { rest.len() } else { rest.len().min(transmit.segment_len) };
            match self.socket.send(&endpoint, transmit.ecn, &rest[..len], transmit.segment_len) {
                Ok(()) => {
                    offset += len;
                    // It was the form: the same bytes went the other way.
                    if let Some(error) = &refused {
                        self.gso.limit(format_args!(
                            "runs to some peers, {} the first, go datagram by datagram: {error}",
                            endpoint.remote
                        ));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Sent::Blocked(offset);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if len > transmit.segment_len && blames_route(&error) => {
                    refused = Some(error);
                }
                Err(error) if len > transmit.segment_len && blames_device(&error) => {
                    self.gso.demote(format_args!(
                        "the kernel refused a UDP_SEGMENT send to {}: {error}",
                        endpoint.remote
                    ));
                }
                // Our address of that packet is gone: let the kernel choose, as for a new peer.
                Err(error) if endpoint.local.is_some() && udp::blames_source(&error) => {
                    (endpoint.local, endpoint.ifindex, refused) = (None, 0, None);
                    // Only if the peer has not moved meanwhile.
                    if transmit.peer.endpoint.load().as_deref() == Some(&transmit.endpoint) {
                        transmit.peer.roam(endpoint);
                    }
                }
                Err(_) => {
                    let packets = len.div_ceil(transmit.segment_len) as u64;
                    self.drops.add(Drop::TxSocketError, packets);
                    offset += len;
                }
            }
        }
        Sent::All
    }

    /// Sends a frame that a device never completed.
    pub fn resend(&self, frame: &mut [u8]) {
        let sent = frame::reread(frame).is_some_and(|(endpoint, tos, payload)| {
            let len = payload.len();
            self.socket.send(&endpoint, tos, payload, len).is_ok()
        });
        if !sent {
            self.drops.add(Drop::TxSocketError, 1);
        }
    }
}

/// A run whose datagrams do not fit the route's MTU: EMSGSIZE since Linux 6.14, before that EINVAL.
/// A kernel that takes no run at all says EINVAL too; the probe at the start finds that.
fn blames_route(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL))
}

/// A device without checksum offload (until Linux 6.10), or IPsec on the way.
fn blames_device(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT))
}
