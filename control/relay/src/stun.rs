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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use millrace_path::stun;

    /// RFC 8489's shortest request, the 40 bytes of Tailscale's clients, and one that asks for what
    /// we do not know: an attacker who writes somebody else's address gains next to nothing.
    #[test]
    fn an_answer_is_hardly_larger_than_its_request() {
        const HEADERS_V4: usize = 20 + 8;
        const HEADERS_V6: usize = 40 + 8;
        let shortest = [&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42][..], &[7; 12]].concat();
        let usual = stun::binding_request(millrace_path::transaction::TransactionId([7; 12]));
        let (v4, v6): (SocketAddr, SocketAddr) =
            ("192.0.2.1:1".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap());
        let len = |request: &[u8], from| stun::answer(request, from).unwrap().len();
        assert_eq!((usual.len(), len(&usual, v4), len(&usual, v6)), (40, 32, 44));
        assert_eq!((shortest.len(), len(&shortest, v4), len(&shortest, v6)), (20, 32, 44));
        let mut unknown = shortest.clone();
        unknown[3] = 8;
        unknown.extend([0, 3, 0, 4, 0, 0, 0, 0]);
        for (request, from, headers) in [
            (&usual[..], v4, HEADERS_V4),
            (&usual, v6, HEADERS_V6),
            (&shortest, v4, HEADERS_V4),
            (&shortest, v6, HEADERS_V6),
            (&unknown, v4, HEADERS_V4),
            (&unknown, v6, HEADERS_V6),
        ] {
            let gain = (len(request, from) + headers) as f32 / (request.len() + headers) as f32;
            assert!(gain < 1.36, "{gain} for {} bytes from {from}", request.len());
        }
        // Half a request, and an answer that somebody sends on to us, get nothing.
        assert!(stun::answer(&shortest[..19], v4).is_err());
        assert!(stun::answer(&stun::answer(&usual, v4).unwrap(), v4).is_err());
    }
}
