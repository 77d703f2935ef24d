//! Frames from one worker to another's clients: appended to one buffer, told by one eventfd.

use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use millrace_path::sealed::PublicKey;
use rustix::event::{EventfdFlags, eventfd};

use crate::registry::Place;
use crate::{limits, outbox};

/// Bytes before the frames of one record: slot, generation, length.
const HEAD_LEN: usize = 12;

/// What waits for one worker.
#[derive(Debug)]
pub struct Mailbox {
    letters: Mutex<Letters>,
    wake: OwnedFd,
}

/// Records of frames, and what is to be done with connections.
#[derive(Debug, Default)]
pub struct Letters {
    bytes: Vec<u8>,
    orders: Vec<Order>,
}

/// What a worker must do with one of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Its key's packets go to another connection (true), or come back to it.
    Shadow(Place, bool),
    /// A client with this key came or went: those who watch hear what is true then.
    Presence(PublicKey),
    /// It ends: a mate asked for it.
    Close(Place),
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { letters: Mutex::default(), wake })
    }

    /// Hands over everything in `letters`, which is empty after it. Returns how many frames were dropped
    /// because the worker is far behind; orders never are.
    pub fn post(&self, letters: &mut Letters) -> u64 {
        let mut waiting = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = waiting.is_empty();
        let fits = waiting.bytes.len() + letters.bytes.len() <= limits::MAIL_BYTES_MAX;
        if waiting.bytes.is_empty() {
            std::mem::swap(&mut waiting.bytes, &mut letters.bytes);
        } else if fits {
            waiting.bytes.extend_from_slice(&letters.bytes);
        }
        waiting.orders.append(&mut letters.orders);
        drop(waiting);
        if was_empty {
            self.ring();
        }
        let dropped = if fits { 0 } else { letters.count() };
        letters.bytes.clear();
        dropped
    }

    /// Wakes the worker.
    pub fn ring(&self) {
        // Fails only when it was rung 2^64 times without an answer.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Takes everything; `letters` must be empty, and lends its buffers.
    pub fn take(&self, letters: &mut Letters) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        let mut waiting = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut *waiting, letters);
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Letters {
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.orders.is_empty()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn push(&mut self, place: Place, frames: &[u8]) {
        self.bytes.extend_from_slice(&place.slot.to_ne_bytes());
        self.bytes.extend_from_slice(&place.generation.to_ne_bytes());
        self.bytes.extend_from_slice(&(frames.len() as u32).to_ne_bytes());
        self.bytes.extend_from_slice(frames);
    }

    pub fn order(&mut self, order: Order) {
        self.orders.push(order);
    }

    pub fn orders(&self) -> &[Order] {
        &self.orders
    }

    /// The record at `at`: slot, generation, where its frames are. The next one begins behind them.
    pub fn record(&self, at: usize) -> Option<(u32, u32, std::ops::Range<usize>)> {
        let (head, _) = self.bytes.get(at..)?.split_first_chunk::<HEAD_LEN>()?;
        let number =
            |i: usize| u32::from_ne_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let start = at + HEAD_LEN;
        Some((number(0), number(4), start..start + number(8) as usize))
    }

    /// Frames in all records.
    pub fn count(&self) -> u64 {
        let records = iter::successors(self.record(0), |(_, _, range)| self.record(range.end));
        records.map(|(_, _, range)| outbox::count(self.frames(range)) as u64).sum()
    }

    pub fn frames(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    /// Empties it; a buffer that a burst made large is given back.
    pub fn clear(&mut self) {
        self.orders.clear();
        self.bytes.clear();
        if self.bytes.capacity() > limits::READ_MAX * 2 {
            self.bytes = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_path::derp::Frame;

    use super::*;

    const PLACE: Place = Place { worker: 1, slot: 2, generation: 3 };

    #[test]
    fn records_arrive_as_they_were_posted() {
        let mailbox = Mailbox::new().unwrap();
        let mut letters = Letters::default();
        letters.push(PLACE, b"first");
        letters.order(Order::Shadow(PLACE, true));
        assert_eq!(mailbox.post(&mut letters), 0);
        letters.push(PLACE, b"second");
        assert_eq!(mailbox.post(&mut letters), 0);
        assert!(letters.is_empty());
        mailbox.take(&mut letters);
        let (slot, generation, range) = letters.record(0).unwrap();
        assert_eq!((slot, generation, letters.frames(range.clone())), (2, 3, &b"first"[..]));
        let (_, _, second) = letters.record(range.end).unwrap();
        assert_eq!(letters.frames(second.clone()), b"second");
        assert_eq!(letters.record(second.end), None);
        assert_eq!(letters.orders(), [Order::Shadow(PLACE, true)]);
    }

    #[test]
    fn a_worker_that_does_not_read_is_not_fed_for_ever() {
        let mailbox = Mailbox::new().unwrap();
        let mut letters = Letters::default();
        let mut frame = Vec::new();
        Frame::RecvPacket { from: PublicKey([7; 32]), packet: &[0; 1 << 16] }.write(&mut frame);
        let pair = [&frame[..], &frame].concat();
        let dropped: u64 = (0..200)
            .map(|_| {
                letters.push(PLACE, &pair);
                letters.push(PLACE, &frame);
                mailbox.post(&mut letters)
            })
            .sum();
        mailbox.take(&mut letters);
        assert!(letters.len() <= limits::MAIL_BYTES_MAX);
        assert!(dropped > 0);
        assert_eq!(letters.count() + dropped, 600);
    }
}
