//! What waits for one client: whole frames, bounded, the oldest dropped first.

use millrace_path::derp::{Cutter, HEADER_LEN, KEY_LEN, Kind};

use crate::limits;

/// First bytes of a disco message, which opens the direct path that relieves us.
const DISCO: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];

/// The queue of one client. An empty one holds no memory: its buffer is lent.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    /// Where the oldest frame starts.
    start: usize,
    frames: usize,
    /// Disco and our own frames, while the client does not keep up: they go first.
    urgent: Vec<u8>,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.urgent.is_empty()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start + self.urgent.len()
    }

    /// Whether a buffer must be lent before the next push.
    pub fn wants_buffer(&self) -> bool {
        self.bytes.capacity() == 0
    }

    /// Lends a cleared buffer.
    pub fn lend(&mut self, buffer: Vec<u8>) {
        debug_assert!(self.bytes.is_empty());
        self.bytes = buffer;
    }

    /// Takes the buffer back once everything is sent.
    pub fn take_buffer(&mut self) -> Option<Vec<u8>> {
        if !self.is_empty() || self.wants_buffer() {
            return None;
        }
        self.start = 0;
        Some(std::mem::take(&mut self.bytes))
    }

    /// Appends `count` whole frames, for a client that reads.
    pub fn push(&mut self, frames: &[u8], count: usize) {
        self.bytes.extend_from_slice(frames);
        self.frames += count;
    }

    /// Appends one frame that goes first and is never dropped. Returns how many bytes of them wait:
    /// the caller bounds it.
    pub fn push_urgent(&mut self, frame: &[u8]) -> usize {
        self.urgent.extend_from_slice(frame);
        self.urgent.len()
    }

    /// Appends whole frames for a client that does not keep up, urgent ones apart, and drops what
    /// is then too much. Returns how many packets were dropped.
    pub fn push_congested(&mut self, frames: &[u8]) -> usize {
        let mut dropped = 0;
        for frame in Frames(frames) {
            if !is_urgent(frame) {
                self.push(frame, 1);
            } else if self.urgent.len() + frame.len() <= limits::URGENT_BYTES_MAX {
                self.urgent.extend_from_slice(frame);
            } else {
                dropped += 1;
            }
        }
        dropped + self.trim()
    }

    /// The oldest bytes to send: all urgent ones, or whole frames of about `at_most` bytes.
    pub fn front(&self, at_most: usize) -> &[u8] {
        if !self.urgent.is_empty() {
            return &self.urgent;
        }
        let waiting = &self.bytes[self.start..];
        if waiting.len() <= at_most { waiting } else { &waiting[..boundary(waiting, at_most)] }
    }

    /// Takes the first `count` bytes of [`Self::front`], which end at a boundary of frames.
    pub fn sent(&mut self, count: usize) {
        if !self.urgent.is_empty() {
            self.urgent.drain(..count);
            if self.urgent.is_empty() {
                self.urgent = Vec::new();
            }
            return;
        }
        self.frames -= Frames(&self.bytes[self.start..self.start + count]).count();
        self.advance(count);
    }

    /// All that waits was sent.
    fn advance(&mut self, count: usize) {
        self.start += count;
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start >= limits::QUEUE_BYTES_MAX {
            // Without this a client that reads slowly for ever would make the buffer grow.
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    /// Drops the oldest packets until the bounds hold.
    fn trim(&mut self) -> usize {
        let mut dropped = 0;
        while self.frames > limits::QUEUE_FRAMES_MAX
            || self.bytes.len() - self.start > limits::QUEUE_BYTES_MAX
        {
            let oldest = Frames(&self.bytes[self.start..]).next().map_or(0, <[u8]>::len);
            self.frames -= 1;
            self.advance(oldest);
            dropped += 1;
        }
        dropped
    }
}

/// The first boundary between frames at or after `at`.
pub fn boundary(frames: &[u8], at: usize) -> usize {
    let mut end = 0;
    for frame in Frames(frames) {
        if end >= at {
            break;
        }
        end += frame.len();
    }
    end
}

/// The packets of whole `RecvPacket` frames.
pub fn packets(frames: &[u8]) -> impl Iterator<Item = &[u8]> {
    Frames(frames).filter_map(|frame| frame.get(HEADER_LEN + KEY_LEN..))
}

/// How many whole frames these bytes are.
pub fn count(frames: &[u8]) -> usize {
    Frames(frames).count()
}

/// Whole frames that we wrote or checked ourselves, one after the other.
struct Frames<'b>(&'b [u8]);

impl<'b> Iterator for Frames<'b> {
    type Item = &'b [u8];

    fn next(&mut self) -> Option<&'b [u8]> {
        if self.0.is_empty() {
            return None;
        }
        let (frame, rest) = self.0.split_at(Cutter::needed(self.0).min(self.0.len()));
        self.0 = rest;
        Some(frame)
    }
}

fn is_urgent(frame: &[u8]) -> bool {
    frame.first() != Some(&(Kind::RecvPacket as u8)) || is_disco(frame)
}

/// Whether a frame carries a disco message.
pub fn is_disco(frame: &[u8]) -> bool {
    frame.get(HEADER_LEN + KEY_LEN..).is_some_and(|packet| packet.starts_with(&DISCO))
}

#[cfg(test)]
mod tests {
    use millrace_path::derp::Frame;
    use millrace_path::sealed::PublicKey;
    use proptest::prelude::*;

    use super::*;

    fn packet(number: u32, len: usize) -> Vec<u8> {
        let mut content = number.to_be_bytes().to_vec();
        content.resize(len.max(4), 0);
        let mut frame = Vec::new();
        Frame::RecvPacket { from: PublicKey([1; 32]), packet: &content }.write(&mut frame);
        frame
    }

    fn number(frame: &[u8]) -> u32 {
        u32::from_be_bytes(frame[HEADER_LEN + KEY_LEN..][..4].try_into().unwrap())
    }

    #[test]
    fn the_oldest_packet_is_dropped_first() {
        let mut outbox = Outbox::default();
        let mut dropped = 0;
        for sent in 0..limits::QUEUE_FRAMES_MAX as u32 + 10 {
            dropped += outbox.push_congested(&packet(sent, 100));
        }
        assert_eq!(dropped, 10);
        let first = Frames(outbox.front(1)).next().map(number);
        assert_eq!(first, Some(10));
    }

    #[test]
    fn bytes_are_bounded_as_frames_are() {
        let mut outbox = Outbox::default();
        for sent in 0..20 {
            outbox.push_congested(&packet(sent, 64 << 10));
            assert!(outbox.len() <= limits::QUEUE_BYTES_MAX);
        }
        assert_eq!(Frames(outbox.front(1)).next().map(number), Some(17));
    }

    #[test]
    fn disco_and_control_survive_a_flood_and_go_first() {
        let mut outbox = Outbox::default();
        let mut disco = Vec::new();
        Frame::RecvPacket { from: PublicKey([1; 32]), packet: &DISCO }.write(&mut disco);
        outbox.push_congested(&disco);
        let mut pong = Vec::new();
        Frame::Pong([7; 8]).write(&mut pong);
        outbox.push_congested(&pong);
        for sent in 0..1000 {
            outbox.push_congested(&packet(sent, 1000));
        }
        assert_eq!(outbox.front(1), [disco, pong].concat());
    }

    proptest! {
        /// Whatever is pushed, sent and dropped: frames stay whole and in order, none comes twice.
        #[test]
        fn frames_stay_whole_and_in_order(
            steps in prop::collection::vec((1_usize..6, 4_usize..40_000, 0_usize..90_000), 1..60)
        ) {
            let mut outbox = Outbox::default();
            let (mut pushed, mut sent, mut dropped) = (0, 0, 0);
            let mut newest = None;
            for (count, len, take) in steps {
                for _ in 0..count {
                    dropped += outbox.push_congested(&packet(pushed, len));
                    pushed += 1;
                }
                prop_assert!(outbox.len() <= limits::QUEUE_BYTES_MAX);
                if take > 0 && !outbox.is_empty() {
                    let front = outbox.front(take).to_vec();
                    for frame in Frames(&front) {
                        prop_assert!(newest < Some(number(frame)));
                        newest = Some(number(frame));
                        sent += 1;
                    }
                    outbox.sent(front.len());
                }
            }
            let left = Frames(outbox.front(usize::MAX)).count();
            prop_assert_eq!(pushed as usize, sent + dropped + left);
        }
    }
}
