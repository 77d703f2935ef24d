//! Which socket of the port gets which packet: the reuseport program, if this host lets us load it.
//!
//! Without it one worker runs, with a socket that gets everything: nothing else would keep the
//! packets of a session on one worker.

use std::os::fd::AsFd;
use std::sync::Arc;

use millrace_config::limits::PEERS_MAX;
use millrace_ebpf::load::{LoadOptions, Programs};
use millrace_ebpf::tables::{SocketFamily, SocketSlot};
use millrace_wg::PeerSlot;

use crate::endpoint_table::EndpointTable;
use crate::io::udp::UdpSocket;

/// The loaded programs, or why there are none.
pub enum Steering {
    On(Arc<Programs>),
    Off(String),
}

impl Steering {
    /// Loads the programs for `port`. Never an error: a gateway without them works.
    pub fn load(port: u16, workers: usize, sessions_max: usize) -> Self {
        let mut options = LoadOptions::new(port);
        options.workers = workers as u32;
        options.sessions_max = sessions_max as u32;
        options.peers_max = PEERS_MAX as u32;
        match Programs::load(options) {
            Ok(programs) => Self::On(Arc::new(programs)),
            Err(error) => Self::Off(error.to_string()),
        }
    }

    /// Enters the sockets and attaches the program to their group. On an error steering is off.
    pub fn attach(&mut self, workers: &[UdpSocket], slow: &UdpSocket) {
        let Self::On(programs) = self else { return };
        let family = if slow.is_v6() { SocketFamily::Inet6 } else { SocketFamily::Inet4 };
        let result = workers
            .iter()
            .zip(0..)
            .try_for_each(|(socket, worker)| {
                programs.sockets.set(family, SocketSlot::Worker(worker), socket.as_fd())
            })
            .and_then(|()| programs.sockets.set(family, SocketSlot::Slow, slow.as_fd()))
            .and_then(|()| programs.steer(slow.as_fd()));
        match result {
            // From here on every session is entered before its peer can use it.
            Ok(()) => programs.flags.set_authoritative(true),
            Err(error) => *self = Self::Off(error.to_string()),
        }
    }

    /// Where control says that peers are; none without the programs' maps.
    pub fn endpoints(&self) -> Option<EndpointTable> {
        let Self::On(programs) = self else { return None };
        let table = programs.endpoints();
        table.inspect_err(|error| tracing::warn!(%error, "peers roam")).ok().map(EndpointTable)
    }

    /// The sessions end with us: what still comes for them is the kernel's.
    pub fn close(&self) {
        let Self::On(programs) = self else { return };
        programs.flags.set_authoritative(false);
    }

    /// A new receiving session: call before the peer can answer with its index.
    pub fn session_up(&self, local_index: u32, peer: PeerSlot, workers: usize) {
        let Self::On(programs) = self else { return };
        let worker = peer.0 % workers.max(1) as u32;
        if let Err(error) = programs.sessions.insert(local_index, peer.0, worker) {
            // The packets still arrive, at a worker chosen by their addresses, but only while XDP
            // lets pass what it does not know.
            programs.flags.set_authoritative(false);
            tracing::warn!(%error, "a session is not steered");
        }
    }

    pub fn session_down(&self, local_index: u32) {
        let Self::On(programs) = self else { return };
        if let Err(error) = programs.sessions.remove(local_index) {
            tracing::warn!(%error, "an ended session stays in the steering table");
        }
    }
}
