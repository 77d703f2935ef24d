//! Fuzz entry point: an ordinary function from bytes to assertions. libFuzzer calls it (see
//! `bench/fuzz`), and so does a test that replays the committed corpus.

use millrace_path::derp::{Frame, PACKET_MAX, ServerInfo};
use millrace_path::sealed::{BoxKey, PublicKey};

use super::protocol::{Packets, Protocol, ProtocolError, Said};
use crate::limits;

const NODE: PublicKey = PublicKey([1; 32]);
const RELAY: PublicKey = PublicKey([2; 32]);

/// Any bytes as what a relay sends. The first says where they are cut, the second how far the
/// connection has come.
///
/// Must hold: no panic; what comes in one piece and what comes in two says the same; what waits for
/// more is bounded; packets are whole and not our own.
pub fn relay(input: &[u8]) {
    let Some((&[cut, stage], bytes)) = input.split_first_chunk() else { return };
    let cut = usize::from(cut).min(bytes.len());
    let whole = conversation(stage, &[bytes]);
    let pieces = conversation(stage, &[&bytes[..cut], &bytes[cut..]]);
    assert_eq!(whole, pieces, "cut at {cut}");
}

/// Everything that is said when bytes arrive in these pieces, and why it ends.
fn conversation(stage: u8, pieces: &[&[u8]]) -> (Vec<Said>, Vec<Vec<u8>>, Option<ProtocolError>) {
    let mut protocol = Protocol::new(NODE, None);
    protocol.give_box_key(RELAY, BoxKey::from_bytes([3; 32]));
    let (mut said, mut packets, mut unread) = (Vec::new(), Vec::new(), opening(stage));
    let early = (stage % 4 == 3).then_some(RELAY);
    if let Err(error) = protocol.begin(early) {
        return (said, packets, Some(error));
    }
    protocol.introduce([4; 24], &mut Vec::new());
    for piece in pieces {
        unread.extend_from_slice(piece);
        loop {
            let (len, what) = match protocol.next(&unread) {
                Ok(next) => next,
                Err(error) => return (said, packets, Some(error)),
            };
            match what {
                Said::Nothing => {
                    unread.drain(..len);
                    break;
                }
                Said::Packets(range) => {
                    assert!(range.end <= len);
                    let run = Packets::new(&unread[range]);
                    packets.extend(run.map(|(from, packet)| {
                        assert!(from != NODE && packet.len() <= PACKET_MAX);
                        packet.to_vec()
                    }));
                }
                Said::Own(range) => assert!(range.end <= len),
                Said::HasBoxKey => protocol.introduce([4; 24], &mut Vec::new()),
                // Another relay's key: nobody gives ours, and the stream waits.
                Said::NeedBoxKey(_) => return (said, packets, None),
                Said::Health(text) => {
                    assert!(text.chars().count() <= limits::RELAY_HEALTH_CHARS_MAX);
                    said.push(Said::Health(text));
                }
                what => said.push(what),
            }
            unread.drain(..len);
        }
        assert!(unread.len() <= limits::RELAY_FRAME_MAX + limits::HTTP_HEAD_MAX);
    }
    (said, packets, None)
}

/// What a relay that behaves has said before: nothing, the upgrade, or all up to the login.
fn opening(stage: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    if stage % 4 == 1 || stage % 4 == 2 {
        bytes.extend_from_slice(b"HTTP/1.1 101 Switching Protocols\r\n\r\n");
    }
    if stage % 4 >= 2 {
        Frame::ServerKey(RELAY).write(&mut bytes);
        ServerInfo::default().write(&BoxKey::from_bytes([3; 32]), [5; 24], &mut bytes);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    /// Replays what fuzzing found worth keeping (`bench/fuzz/corpora/relay_client`).
    #[test]
    fn the_corpus() {
        let corpus =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/fuzz/corpora/relay_client");
        let mut count = 0;
        for entry in fs::read_dir(corpus).unwrap() {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            relay(&fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 0, "no corpus");
    }

    /// The opening itself is one that a client takes.
    #[test]
    fn a_relay_that_behaves_brings_a_connection_up() {
        for stage in [2, 3] {
            let (said, _, error) = conversation(stage, &[&[]]);
            assert_eq!(error, None);
            assert!(matches!(said[..], [Said::Up { relay: RELAY, .. }]), "{said:?}");
        }
    }

    fn frame() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop_oneof![4 => Just(5_u8), 1 => 0_u8..0x20];
        let key = prop_oneof![3 => Just([7_u8; 32]), 1 => Just(NODE.0)];
        (kind, key, prop::collection::vec(any::<u8>(), 0..80), prop::num::u8::ANY).prop_map(
            |(kind, key, rest, odd)| {
                let len = (32 + rest.len()) as u32 + u32::from(odd == 0) * 70_000;
                [&[kind][..], &len.to_be_bytes(), &key, &rest].concat()
            },
        )
    }

    proptest! {
        #[test]
        fn frames_of_a_hostile_relay(
            cut: u8, stage: u8, frames in prop::collection::vec(frame(), 0..12)
        ) {
            relay(&[&[cut, stage][..], &frames.concat()].concat());
        }

        #[test]
        fn bytes_of_a_hostile_relay(input in prop::collection::vec(any::<u8>(), 0..600)) {
            relay(&input);
        }
    }
}
