//! What a mate that dialed us may ask for: to hear who comes and goes, packets for our clients, the
//! end of one of them.

use std::sync::atomic::Ordering;

use millrace_path::derp::{Frame, Gone, Kind};
use millrace_path::sealed::PublicKey;

use crate::connection::{Client, End, Phase};
use crate::limits;
use crate::mail::Order;
use crate::metrics::Count;
use crate::outbox;
use crate::registry::Place;
use crate::worker::Worker;

/// `PeerPresent`: the flag of an ordinary client.
const FLAG_CLIENT: u8 = 1;

impl Worker {
    /// A frame that only a mate may send.
    pub(crate) fn mate(
        &mut self,
        slot: u32,
        generation: u32,
        frame: &Frame<'_>,
    ) -> Result<(), End> {
        match *frame {
            Frame::WatchConns => self.watch(slot, generation),
            Frame::ClosePeer(key) => {
                for place in self.shared.registry.places(&key) {
                    self.outgoing[usize::from(place.worker)].order(Order::Close(place));
                }
            }
            _ => return Err(End::Unexpected(frame.kind())),
        }
        Ok(())
    }

    /// Tells a mate all clients, and from now on each change.
    fn watch(&mut self, slot: u32, generation: u32) {
        if self.watchers.contains(&(slot, generation)) {
            return;
        }
        self.watchers.push((slot, generation));
        // Before the look at the registry: who comes after that look sees that somebody watches.
        self.shared.desks[usize::from(self.index)].watchers.fetch_add(1, Ordering::SeqCst);
        for key in self.shared.registry.keys() {
            self.tell_watcher(slot, generation, &present(key));
        }
    }

    /// A key came or went. What is told is what is true when it is told, so that the last word to
    /// each mate is right whatever order the workers speak in.
    pub(crate) fn announce(&mut self, key: PublicKey) {
        let workers = &self.shared.desks[..self.shared.workers];
        for (desk, letters) in workers.iter().zip(&mut self.outgoing) {
            if desk.watchers.load(Ordering::SeqCst) > 0 {
                letters.order(Order::Presence(key));
            }
        }
    }

    pub(crate) fn tell_watchers(&mut self, key: PublicKey) {
        let frame = match self.shared.registry.find(&key) {
            Some(_) => present(key),
            None => Frame::PeerGone { peer: key, why: Gone::Disconnected },
        };
        for (slot, generation) in self.watchers.clone() {
            self.tell_watcher(slot, generation, &frame);
        }
    }

    fn tell_watcher(&mut self, slot: u32, generation: u32, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame.write(&mut bytes);
        let Some(connection) = self.connection(slot, generation) else { return };
        if connection.outbox.push_urgent(&bytes) > limits::MATE_BACKLOG_BYTES_MAX {
            self.doom(slot, generation, End::Behind);
        }
        self.touch(slot, generation);
    }

    /// A mate that watched has gone.
    pub(crate) fn unwatch(&mut self, slot: u32, generation: u32) {
        let before = self.watchers.len();
        self.watchers.retain(|&watcher| watcher != (slot, generation));
        let gone = before - self.watchers.len();
        self.shared.desks[usize::from(self.index)].watchers.fetch_sub(gone, Ordering::SeqCst);
    }

    /// A packet that a mate forwarded, as a `RecvPacket` frame. It goes to a client of ours or
    /// nowhere: never to another relay.
    pub(crate) fn forwarded(
        &mut self,
        slot: u32,
        generation: u32,
        from: PublicKey,
        to: PublicKey,
        frame: &[u8],
    ) {
        debug_assert_eq!(frame.first(), Some(&(Kind::RecvPacket as u8)));
        self.count(Count::ForwardedHere, 1);
        let Some(place) = self.shared.registry.find(&to) else {
            self.count(Count::DropNotHere, 1);
            self.not_here(slot, generation, to);
            return;
        };
        if let Some(mesh) = &self.shared.mesh {
            mesh.heard(&from, to);
        }
        if place.worker == self.index {
            self.deliver(place.slot, place.generation, frame);
        } else {
            self.outgoing[usize::from(place.worker)].push(place, frame);
        }
    }

    /// Sends a run of packets to the mate that has their destination.
    pub(crate) fn forward_far(
        &mut self,
        mate: Place,
        from: PublicKey,
        to: PublicKey,
        frames: &[u8],
    ) {
        let mut out = Vec::with_capacity(frames.len() + frames.len() / 2);
        for packet in outbox::packets(frames) {
            Frame::ForwardPacket { from, to, packet }.write(&mut out);
            self.count(Count::Forwarded, 1);
        }
        self.outgoing[usize::from(mate.worker)].push(mate, &out);
    }

    /// Whether a client that has gone is only with a mate now. Then those who would have heard of
    /// its end hear of it when the mate loses it too.
    pub(crate) fn moved_away(&self, client: &Client) -> bool {
        let Some(mesh) = &self.shared.mesh else { return false };
        if mesh.find(&client.key).is_none() {
            return false;
        }
        for &peer in &client.sent_to {
            mesh.heard(&client.key, peer);
        }
        true
    }

    pub(crate) fn close(&mut self, place: Place) {
        if let Some(connection) = self.connection(place.slot, place.generation)
            && let Phase::Client(_) = connection.phase
        {
            self.doom(place.slot, place.generation, End::Closed);
        }
    }
}

/// Where a client connects from is nobody's business, also not the mates'.
fn present(peer: PublicKey) -> Frame<'static> {
    Frame::PeerPresent { peer, at: None, flags: FLAG_CLIENT }
}
