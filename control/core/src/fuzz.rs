//! Fuzz entry points: ordinary functions from bytes to assertions. libFuzzer calls them (see
//! `bench/fuzz`), and so does a test that replays the committed corpora.

use std::net::{Ipv4Addr, SocketAddr};

use crate::disco::{self, Envelope, Message};
use crate::limits::CANDIDATES_MAX;
use crate::sealed::{BoxKey, PublicKey};
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

/// The content of a disco message from somebody who has the key, and the datagram as it arrived
/// from somebody who has not.
///
/// Must hold: no panic, nothing opens without the key, lists are bounded, and what was read is
/// written and read again as the same.
pub fn disco(input: &[u8]) {
    let (key, sender) = (BoxKey::from_bytes([1; 32]), PublicKey([2; 32]));
    let mut foreign = input.to_vec();
    if let Some(envelope) = Envelope::parse(&mut foreign) {
        assert_eq!(envelope.open(&key), Err(disco::DiscoError::Sealed));
    }
    let Ok(message) = Message::parse(input) else { return };
    if let Message::CallMeMaybe { addresses } = &message {
        assert!(addresses.len() <= CANDIDATES_MAX);
    }
    let mut datagram = disco::seal(&message, sender, [3; 24], &key);
    let envelope = Envelope::parse(&mut datagram);
    assert_eq!(envelope.map(|envelope| envelope.open(&key)), Some(Ok(message)));
}
