//! Frames out of a stream of bytes, whatever pieces it arrives in.

use super::HEADER_LEN;
use super::frame::{FrameError, INFO_MAX, Kind, check};

/// One whole frame of a known kind and of a length within its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw<'b> {
    pub kind: Kind,
    pub payload: &'b [u8],
}

/// Where the stream of one connection stands. It keeps no bytes: those of a frame that has begun
/// stay with the caller, who hands them in again with more behind them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cutter {
    /// Bytes of an unknown frame that have yet to come, and will be ignored.
    skip: usize,
}

impl Cutter {
    /// Takes the next frame off the front of `bytes`. None when what is left is the beginning of a
    /// frame, or nothing; a frame that can never be right is refused by its header alone.
    pub fn next<'b>(&mut self, bytes: &mut &'b [u8]) -> Result<Option<Raw<'b>>, FrameError> {
        loop {
            let skipped = self.skip.min(bytes.len());
            *bytes = &bytes[skipped..];
            self.skip -= skipped;
            let Some((&[kind, l0, l1, l2, l3], body)) = bytes.split_first_chunk::<HEADER_LEN>()
            else {
                return Ok(None);
            };
            let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
            let Some(kind) = Kind::from_byte(kind) else {
                if length > INFO_MAX {
                    return Err(FrameError::UnknownLength { kind, seen: length });
                }
                self.skip = HEADER_LEN + length;
                continue;
            };
            check(kind, length)?;
            let Some((payload, rest)) = body.split_at_checked(length) else { return Ok(None) };
            *bytes = rest;
            return Ok(Some(Raw { kind, payload }));
        }
    }

    /// How many bytes the frame that begins with `bytes` has in all, as far as they tell: what a
    /// caller must have room for.
    pub fn needed(bytes: &[u8]) -> usize {
        match bytes.split_first_chunk::<HEADER_LEN>() {
            Some((&[_, l0, l1, l2, l3], _)) => {
                HEADER_LEN + u32::from_be_bytes([l0, l1, l2, l3]) as usize
            }
            None => HEADER_LEN,
        }
    }
}

/// All frames of `bytes` and why no more, for the fuzz target and the tests.
pub(crate) fn frames(
    cutter: &mut Cutter,
    bytes: &mut &[u8],
) -> (Vec<(Kind, Vec<u8>)>, Option<FrameError>) {
    let mut frames = Vec::new();
    loop {
        match cutter.next(bytes) {
            Ok(Some(raw)) => frames.push((raw.kind, raw.payload.to_vec())),
            Ok(None) => return (frames, None),
            Err(error) => return (frames, Some(error)),
        }
    }
}
