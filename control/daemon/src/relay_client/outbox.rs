//! What waits for the connection to take it: whole frames, bounded in bytes and in age.
//!
//! A packet that waited longer than a round trip is worth less than the one behind it: TCP inside
//! the tunnel would only learn of a queue. So the oldest data goes first when there is too much,
//! and what helps to leave the relay (disco, introductions, handshakes) stands apart and first.

use std::collections::VecDeque;
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::derp::{Frame, HEADER_LEN, KEY_LEN, PACKET_MAX};
use millrace_path::sealed::PublicKey;

use crate::limits;

/// WireGuard's type 4, with its three zero bytes: data.
const TRANSPORT_DATA: [u8; 4] = [4, 0, 0, 0];

/// Packets that were not sent, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// More waited than [`limits::RELAY_QUEUE_BYTES_MAX`].
    pub full: u64,
    /// It waited longer than [`limits::RELAY_DATA_AGE_MAX`].
    pub late: u64,
    /// Data while there was no connection.
    pub not_connected: u64,
    /// Longer than what a relay carries.
    pub too_long: u64,
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.full + self.late + self.not_connected + self.too_long
    }
}

/// The queue of one relay.
#[derive(Debug, Default)]
pub struct Outbox {
    urgent: Queue,
    data: Queue,
    dropped: Dropped,
}

/// Frames in one piece of memory, oldest first.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Where the oldest frame starts.
    start: usize,
    frames: VecDeque<Waiting>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    since: Instant,
    len: usize,
}

/// Which frames [`Outbox::front`] showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Urgent,
    Data,
}

impl Outbox {
    /// Appends a packet; `connected` says whether data has somewhere to go.
    pub fn push(&mut self, now: Instant, to: PublicKey, packet: &[u8], connected: bool) {
        if packet.len() > PACKET_MAX {
            self.dropped.too_long += 1;
            return;
        }
        let data = packet.starts_with(&TRANSPORT_DATA);
        if data && !connected {
            self.dropped.not_connected += 1;
            return;
        }
        let (queue, bytes_max) = if data {
            (&mut self.data, limits::RELAY_QUEUE_BYTES_MAX)
        } else {
            (&mut self.urgent, limits::RELAY_URGENT_BYTES_MAX)
        };
        queue.push(now, &Frame::SendPacket { to, packet });
        while queue.len() > bytes_max && queue.drop_oldest() {
            self.dropped.full += 1;
        }
    }

    /// Appends a frame of our own, which is never dropped: there are few.
    pub fn push_frame(&mut self, now: Instant, frame: &Frame<'_>) {
        self.urgent.push(now, frame);
    }

    /// Drops what waited too long.
    pub fn drop_late(&mut self, now: Instant) {
        for (queue, age_max) in [
            (&mut self.urgent, limits::RELAY_URGENT_AGE_MAX),
            (&mut self.data, limits::RELAY_DATA_AGE_MAX),
        ] {
            while queue.age(now).is_some_and(|age| age > age_max) && queue.drop_oldest() {
                self.dropped.late += 1;
            }
        }
    }

    /// The connection is gone: data that waited for it is not for the next one.
    pub fn drop_data(&mut self) {
        self.dropped.not_connected += self.data.frames.len() as u64;
        self.data = Queue::default();
    }

    /// The oldest whole frames, urgent ones first, of about `at_most` bytes and at least one; of
    /// data only while `data` says so.
    pub fn front(&self, at_most: usize, data: bool) -> Option<(Lane, &[u8])> {
        let urgent = self.urgent.front(at_most).map(|bytes| (Lane::Urgent, bytes));
        urgent.or_else(|| data.then(|| Some((Lane::Data, self.data.front(at_most)?))).flatten())
    }

    /// Takes away what [`Self::front`] showed and returns how many frames it was.
    pub fn sent(&mut self, lane: Lane, len: usize) -> usize {
        match lane {
            Lane::Urgent => self.urgent.take(len),
            Lane::Data => self.data.take(len),
        }
    }

    /// Whether data waits.
    pub fn has_data(&self) -> bool {
        !self.data.frames.is_empty()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.urgent.len() + self.data.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn dropped(&self) -> Dropped {
        self.dropped
    }
}

impl Queue {
    fn push(&mut self, now: Instant, frame: &Frame<'_>) {
        let before = self.bytes.len();
        frame.write(&mut self.bytes);
        self.frames.push_back(Waiting { since: now, len: self.bytes.len() - before });
    }

    fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    fn age(&self, now: Instant) -> Option<Duration> {
        self.frames.front().map(|oldest| now.since(oldest.since))
    }

    /// False where there is none.
    fn drop_oldest(&mut self) -> bool {
        let Some(oldest) = self.frames.pop_front() else { return false };
        self.advance(oldest.len);
        true
    }

    fn front(&self, at_most: usize) -> Option<&[u8]> {
        let mut len = self.frames.front()?.len;
        if self.len() <= at_most {
            len = self.len();
        } else {
            for frame in self.frames.iter().skip(1) {
                if len + frame.len > at_most {
                    break;
                }
                len += frame.len;
            }
        }
        Some(&self.bytes[self.start..self.start + len])
    }

    fn take(&mut self, len: usize) -> usize {
        let mut left = len;
        let mut count = 0;
        while let Some(oldest) = self.frames.front()
            && oldest.len <= left
        {
            left -= oldest.len;
            count += 1;
            self.frames.pop_front();
        }
        self.advance(len - left);
        count
    }

    fn advance(&mut self, count: usize) {
        self.start += count;
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start >= limits::RELAY_QUEUE_BYTES_MAX {
            // Without this a connection that is slow for ever would make the buffer grow.
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }
}

/// What a packet of `len` bytes counts against a relay's rate limit.
pub fn frame_len(len: usize) -> usize {
    HEADER_LEN + KEY_LEN + len
}

#[cfg(test)]
mod tests {
    use millrace_path::derp::Cutter;
    use proptest::prelude::*;

    use super::*;

    const PEER: PublicKey = PublicKey([7; 32]);

    fn at(ms: u64) -> Instant {
        Instant::from_nanos(ms * 1_000_000)
    }

    fn data(number: u32, len: usize) -> Vec<u8> {
        let mut packet = TRANSPORT_DATA.to_vec();
        packet.extend(number.to_be_bytes());
        packet.resize(len.max(8), 0);
        packet
    }

    /// Takes everything and returns the packets in the order of sending.
    fn drain(outbox: &mut Outbox) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        while let Some((lane, bytes)) = outbox.front(10_000, true) {
            let (len, mut rest, mut count) = (bytes.len(), bytes, 0);
            while let Some(raw) = Cutter::default().next(&mut rest).unwrap() {
                packets.push(raw.payload[KEY_LEN..].to_vec());
                count += 1;
            }
            assert!(rest.is_empty());
            assert_eq!(outbox.sent(lane, len), count);
        }
        packets
    }

    #[test]
    fn what_helps_to_leave_the_relay_goes_first_and_is_not_dropped_for_data() {
        let mut outbox = Outbox::default();
        for number in 0..2_000 {
            outbox.push(at(0), PEER, &data(number, 1_000), true);
            if number == 10 {
                outbox.push(at(0), PEER, b"TS disco", true);
            }
        }
        let packets = drain(&mut outbox);
        assert_eq!(packets[0], b"TS disco");
        // The newest data is there, the oldest is not.
        assert_eq!(packets[packets.len() - 1], data(1_999, 1_000));
        assert!(packets.len() * frame_len(1_000) > limits::RELAY_QUEUE_BYTES_MAX * 9 / 10);
        assert_eq!(outbox.dropped().full as usize, 2_001 - packets.len());
        assert_eq!(packets[1], data(2_000 - (packets.len() as u32 - 1), 1_000));
    }

    #[test]
    fn data_ages_sooner_than_what_is_urgent() {
        let mut outbox = Outbox::default();
        outbox.push(at(0), PEER, &data(1, 100), true);
        outbox.push(at(0), PEER, b"TS disco", true);
        outbox.push(at(90), PEER, &data(2, 100), true);
        outbox.drop_late(at(101));
        assert_eq!(drain(&mut outbox), [b"TS disco".to_vec(), data(2, 100)]);
        assert_eq!(outbox.dropped(), Dropped { late: 1, ..Dropped::default() });
        outbox.push(at(200), PEER, b"TS disco", true);
        outbox.drop_late(at(2_201));
        assert!(outbox.is_empty());
    }

    #[test]
    fn without_a_connection_only_what_is_urgent_waits() {
        let mut outbox = Outbox::default();
        outbox.push(at(0), PEER, &data(1, 100), false);
        outbox.push(at(0), PEER, b"TS disco", false);
        outbox.push(at(0), PEER, &vec![0; PACKET_MAX + 1], false);
        assert_eq!(outbox.dropped().not_connected, 1);
        assert_eq!(outbox.dropped().too_long, 1);
        assert_eq!(drain(&mut outbox), [b"TS disco".to_vec()]);
    }

    proptest! {
        /// Whatever comes and goes: order is kept in each lane, memory is bounded, all is counted.
        #[test]
        fn nothing_is_lost_uncounted(
            steps in prop::collection::vec((0_usize..3_000, 0_u64..40, any::<bool>()), 1..300)
        ) {
            let mut outbox = Outbox::default();
            let (mut now, mut sent, mut last) = (0, 0, None);
            for (number, &(len, passed, take)) in (0..).zip(&steps) {
                now += passed;
                outbox.push(at(now), PEER, &data(number, len), true);
                outbox.drop_late(at(now));
                if take {
                    let (lane, bytes) = outbox.front(len, true).unwrap();
                    let len = bytes.len();
                    let number = u32::from_be_bytes(bytes[41..45].try_into().unwrap());
                    prop_assert!(last < Some(number));
                    let count = outbox.sent(lane, len);
                    last = Some(number + count as u32 - 1);
                    sent += count;
                }
            }
            sent += drain(&mut outbox).len();
            prop_assert_eq!(sent + outbox.dropped().late as usize, steps.len());
        }
    }
}
