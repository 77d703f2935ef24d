//! From workers to the slow thread: bounded queues and one wake-up. Nothing here waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::queue::{ArrayQueue, SegQueue};
use millrace_wg::limits::{HANDSHAKE_QUEUE, INITIATION_LEN, SLOW_QUEUE};
use millrace_wg::{Drop, DropCounters, Endpoint, FastEvent};
use rustix::event::{EventfdFlags, eventfd};

/// A handshake message that came to a worker, because nothing steered it to the slow thread.
pub struct Handshake {
    pub source: Endpoint,
    len: u8,
    bytes: [u8; INITIATION_LEN],
}

/// Three queues, so that a flood of packets or handshakes cannot push out what is said only once.
pub struct SlowQueue {
    /// Never full: a peer has at most a few of them on the way, by its flags.
    events: SegQueue<FastEvent>,
    /// Packets that wait for a session.
    staged: ArrayQueue<FastEvent>,
    handshakes: ArrayQueue<Handshake>,
    wake: OwnedFd,
    /// A worker lost its TUN device.
    tun_gone: AtomicBool,
}

impl Handshake {
    /// None if it is longer than the longest handshake message.
    pub fn new(source: Endpoint, message: &[u8]) -> Option<Self> {
        let mut bytes = [0; INITIATION_LEN];
        bytes.get_mut(..message.len())?.copy_from_slice(message);
        Some(Self { source, len: message.len() as u8, bytes })
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..usize::from(self.len)]
    }
}

impl SlowQueue {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            events: SegQueue::new(),
            staged: ArrayQueue::new(SLOW_QUEUE),
            handshakes: ArrayQueue::new(HANDSHAKE_QUEUE),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            tun_gone: AtomicBool::new(false),
        })
    }

    pub fn push_event(&self, event: FastEvent, drops: &DropCounters) {
        match event {
            FastEvent::Stage { .. } => {
                if self.staged.push(event).is_err() {
                    drops.add(Drop::SlowQueueFull, 1);
                }
            }
            event => self.events.push(event),
        }
        self.wake();
    }

    pub fn push_handshake(&self, handshake: Handshake, drops: &DropCounters) {
        if self.handshakes.push(handshake).is_err() {
            drops.add(Drop::HsQueueFull, 1);
        }
        self.wake();
    }

    /// Call before popping: what is pushed from now on wakes again.
    pub fn reset_wake(&self) {
        let mut counter = [0; 8];
        // Fails only if nobody woke us.
        let _ = rustix::io::read(&self.wake, &mut counter);
    }

    pub fn pop_event(&self) -> Option<FastEvent> {
        self.events.pop().or_else(|| self.staged.pop())
    }

    pub fn pop_handshake(&self) -> Option<Handshake> {
        self.handshakes.pop()
    }

    /// Handshakes that still wait.
    pub fn handshakes_waiting(&self) -> usize {
        self.handshakes.len()
    }

    /// After a turn that did not take everything: the next wait returns at once.
    pub fn wake_if_not_empty(&self) {
        if !self.events.is_empty() || !self.staged.is_empty() || !self.handshakes.is_empty() {
            self.wake();
        }
    }

    pub fn report_tun_gone(&self) {
        self.tun_gone.store(true, Ordering::Release);
        self.wake();
    }

    pub fn is_tun_gone(&self) -> bool {
        self.tun_gone.load(Ordering::Acquire)
    }

    fn wake(&self) {
        // Fails only when the counter is about to overflow, and then the slow thread is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl AsFd for SlowQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use millrace_wg::PeerSlot;

    use super::*;

    #[test]
    fn staged_packets_never_push_out_what_is_said_once() {
        let (queue, drops) = (SlowQueue::new().unwrap(), DropCounters::default());
        let slot = PeerSlot(7);
        for _ in 0..SLOW_QUEUE + 10 {
            let packet = Box::from([0; 20]);
            queue.push_event(FastEvent::Stage { peer: slot, packet }, &drops);
        }
        assert_eq!(drops.iter().find(|(drop, _)| *drop == Drop::SlowQueueFull).unwrap().1, 10);
        queue.push_event(FastEvent::HandshakeWanted(slot), &drops);
        assert!(
            matches!(queue.pop_event(), Some(FastEvent::HandshakeWanted(_))),
            "and it is first"
        );
        assert!(matches!(queue.pop_event(), Some(FastEvent::Stage { .. })));
    }
}
