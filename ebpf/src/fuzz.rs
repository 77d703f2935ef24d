//! Fuzz entry points: ordinary functions from bytes to assertions. libFuzzer calls them (see
//! `bench/fuzz`), and so does a test that replays the committed corpora.

use crate::link::{MESSAGE_LEN_MAX, Run, ToControl, ToDataPlane};

/// One datagram of the link or of a detour, as either side gets it.
///
/// Must hold: no panic, and what was read is written as the same bytes, so that no two datagrams
/// mean the same.
pub fn link(input: &[u8]) {
    if input.len() <= MESSAGE_LEN_MAX {
        if let Ok(message) = ToControl::parse(input) {
            assert_eq!(*message.encode(), input);
        }
        match ToDataPlane::parse(input) {
            // Of a hello of the future only the number is read.
            Ok(message @ ToDataPlane::Hello { .. }) => {
                assert!(input.starts_with(&message.encode()))
            }
            Ok(message) => assert_eq!(*message.encode(), input),
            Err(_) => {}
        }
    }
    let mut datagram = input.to_vec();
    let Some(mut run) = Run::parse(&mut datagram) else { return };
    let segment_len = usize::from(run.segment_len);
    let total: usize = run
        .messages()
        .map(|message| {
            assert!(!message.is_empty() && message.len() <= segment_len);
            message.len()
        })
        .sum();
    assert_eq!(total + crate::link::detour::HEADER_LEN, input.len());
}
