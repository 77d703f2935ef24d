//! Fuzz entry points: ordinary functions from bytes to assertions. libFuzzer calls them (see
//! `bench/fuzz`), and so does a test that replays the committed corpora.

use std::net::{Ipv4Addr, SocketAddr};

use crate::derp::cut::{Cutter, frames};
use crate::derp::frame::Frame;
use crate::disco::{self, Envelope, Message};
use crate::introduce::{self, Introduction};
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

/// Any bytes as what a relay or a client sends, cut at the place that the first byte says.
///
/// Must hold: what is cut in one piece and what is cut in two are the same frames, and a frame that
/// parses prints to bytes that parse to it.
pub fn derp(bytes: &[u8]) {
    let Some((&at, stream)) = bytes.split_first() else { return };
    let at = usize::from(at).min(stream.len());
    let whole = frames(&mut Cutter::default(), &mut { stream });
    let mut cutter = Cutter::default();
    let mut first = &stream[..at];
    let mut pieces = frames(&mut cutter, &mut first);
    if pieces.1.is_none() {
        let mut rest = &[first, &stream[at..]].concat()[..];
        let (frames, error) = frames(&mut cutter, &mut rest);
        pieces.0.extend(frames);
        pieces.1 = error;
    }
    assert_eq!(whole, pieces, "cut at {at}");
    for (kind, payload) in &whole.0 {
        let Ok(frame) = Frame::parse(*kind, payload) else { continue };
        let mut printed = Vec::new();
        frame.write(&mut printed);
        let again = Cutter::default().next(&mut printed.as_slice()).ok().flatten();
        let again = again.and_then(|raw| Frame::parse(raw.kind, raw.payload).ok());
        assert_eq!(again.as_ref(), Some(&frame), "printed: {printed:02x?}");
    }
}

/// The content of an introduction from somebody who has the key, and the packet as it arrived from
/// somebody who has not.
///
/// Must hold: as for [`disco()`].
pub fn introduce(input: &[u8]) {
    let key = BoxKey::from_bytes([1; 32]);
    assert!(introduce::open(&mut input.to_vec(), PublicKey([2; 32]), &key).is_err());
    let Some(introduction) = Introduction::parse(input) else { return };
    assert!(introduction.candidates.len() <= CANDIDATES_MAX);
    let mut packet = introduce::seal(&introduction, [3; 24], &key);
    assert!(packet.len() <= introduce::LEN_MAX);
    assert_eq!(introduce::open(&mut packet, introduction.sender, &key), Ok(introduction));
}
