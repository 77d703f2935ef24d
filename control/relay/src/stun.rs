//! STUN: tells clients where their datagrams come from.

use std::net::UdpSocket;
use std::sync::Arc;

use millrace_path::stun;

use crate::metrics::Count;
use crate::shared::Shared;

/// A request is far smaller: what fills this is none, and is cut.
const DATAGRAM_MAX: usize = 1500;

/// Answers until the process ends. `index` is that of its counters.
pub fn serve(socket: &UdpSocket, shared: &Arc<Shared>, index: usize) {
    let counters = &shared.stun[index];
    let mut datagram = [0; DATAGRAM_MAX];
    loop {
        let (len, source) = match socket.recv_from(&mut datagram) {
            Ok(received) => received,
            // An ICMP error about an answer of ours, or a signal: neither is about the next one.
            Err(error) => {
                tracing::debug!("STUN: {error}");
                continue;
            }
        };
        match stun::answer(&datagram[..len], source) {
            Ok(answer) => {
                counters.add(Count::StunAnswered, 1);
                // Lost answers are asked for again.
                let _ = socket.send_to(&answer, source);
            }
            Err(_) => counters.add(Count::StunInvalid, 1),
        }
    }
}
