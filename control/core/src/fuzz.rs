//! Fuzz entry points: ordinary functions from bytes to assertions. libFuzzer calls them (see
//! `bench/fuzz`), and so does a test that replays the committed corpora.

use std::net::{Ipv4Addr, SocketAddr};

use crate::stun;

/// One datagram at the STUN client and at the STUN server.
///
/// Must hold: no panic, answers are bounded, and what the server says its own client understands.
pub fn stun(datagram: &[u8]) {
    let source = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 41_641));
    if let Ok(response) = stun::parse_response(datagram) {
        assert!(response.mapped.port() != 0 && !response.mapped.ip().is_unspecified());
    }
    match stun::answer(datagram, source).map(|answer| stun::parse_response(&answer)) {
        Ok(Ok(response)) => assert_eq!(response.mapped, source),
        Ok(Err(error)) => assert_eq!(error, stun::StunError::Refused { code: 420 }),
        Err(_) => {}
    }
}
