//! Sessions of a [`Device`]: publishing, rotating and wiping keys, and the few data messages that
//! the slow thread seals itself.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use millrace_aead::{OpeningKey, SealJob, SealingKey, seal_batch};
use rand::RngCore;

use super::{Device, Output};
use crate::Drop;
use crate::data_header::DataHeader;
use crate::limits::{DATA_HEADER_LEN, KEEPALIVE_LEN, STAGED_PACKETS};
use crate::noise::TransportKeys;
use crate::peer::PeerSlot;
use crate::replay::ReplayWindow;
use crate::session::{RxSession, TxSession};
use crate::shared::FastEvent;
use crate::time::{Clock, Instant};
use crate::vnet::VnetHdr;

/// Random indices that are tried before the table is searched.
const INDEX_DRAWS: usize = 16;

impl Device {
    /// Makes both halves of a session; the receiving one is in the table when this returns.
    pub(super) fn publish(
        &mut self,
        now: Instant,
        slot: PeerSlot,
        local_index: u32,
        remote_index: u32,
        keys: &TransportKeys,
        initiator: bool,
    ) -> Arc<TxSession> {
        if let Some(peer) = self.peer(slot) {
            self.shared.sessions.insert(Arc::new(RxSession {
                local_index,
                peer: Arc::clone(&peer.shared),
                key: OpeningKey::new(*keys.receive),
                replay: Mutex::new(ReplayWindow::default()),
                born: now,
                initiator,
                confirmed: AtomicBool::new(initiator),
            }));
        }
        self.outputs.push_back(Output::SessionUp { local_index, peer: slot });
        let key = SealingKey::new(*keys.send);
        Arc::new(TxSession::new(remote_index, local_index, key, now, initiator))
    }

    /// A session that we initiated at `sent_at` becomes the current one. A "next" that nobody
    /// confirmed moves to "previous", because its initiator may be sending with it (Linux
    /// `noise.c`).
    pub(super) fn rotate_in(&mut self, slot: PeerSlot, session: Arc<TxSession>, sent_at: Instant) {
        let own = self.public_key();
        let Some(peer) = self.peer_mut(slot) else { return };
        let slots = &mut peer.sessions;
        let unconfirmed = slots.next.take();
        // The peer's initiation crossed ours, and it already sends with what came of it.
        let crossed = slots.current.as_ref().is_some_and(|s| !s.initiator && s.born >= sent_at);
        if (crossed || unconfirmed.is_some()) && own > Some(peer.shared.public_key) {
            session.yield_rekey();
        }
        let dropped = slots.rotate(session);
        let replaced = unconfirmed.and_then(|next| slots.previous.replace(next));
        slots.split = crossed;
        self.retire(dropped);
        self.retire(replaced);
    }

    /// The first packet under a responder's key came: it may send now.
    pub(super) fn confirm(&mut self, clock: Clock, slot: PeerSlot, local_index: u32) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let slots = &mut peer.sessions;
        if let Some(next) = slots.next.take_if(|next| next.local_index == local_index) {
            let dropped = slots.rotate(next);
            peer.handshake_done(clock);
            self.retire(dropped);
            self.use_current(clock, slot);
        } else if slots.previous.as_ref().is_some_and(|s| s.local_index == local_index) {
            // Both initiated at once, both handshakes succeeded, and each sends with its own.
            slots.split = true;
        }
    }

    /// The current session sends from now on; what waited for it goes first.
    pub(super) fn use_current(&mut self, clock: Clock, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let current = peer.sessions.current.clone();
        peer.shared.tx_session.store(current.clone());
        let staged = std::mem::take(&mut peer.staged);
        self.send_staged(clock, staged);
        if current.is_some_and(|session| session.initiator && session.sent() == 0) {
            // The responder may not send before it hears something under this key.
            self.send_keepalive(clock, slot);
        }
        self.reschedule(clock.now, slot);
    }

    pub(super) fn retire(&mut self, session: Option<Arc<TxSession>>) {
        if let Some(session) = session {
            self.shared.sessions.remove(session.local_index);
            self.outputs.push_back(Output::SessionDown { local_index: session.local_index });
        }
    }

    /// Ends every session and handshake of a peer. The keys wipe themselves.
    pub(super) fn wipe(&mut self, slot: PeerSlot) {
        self.drop_pending(slot);
        let Some(peer) = self.peer_mut(slot) else { return };
        peer.shared.tx_session.store(None);
        peer.zero_at = None;
        let slots = std::mem::take(&mut peer.sessions);
        for session in [slots.previous, slots.current, slots.next] {
            self.retire(session);
        }
    }

    /// A random index whose place in the table no session and no handshake has; none if all are
    /// taken.
    pub(super) fn free_index(&mut self) -> Option<u32> {
        let Self { shared, rng, pending, .. } = self;
        let table = &shared.sessions;
        let is_free =
            |&index: &u32| !table.is_taken(index) && !pending.contains_key(&table.place_of(index));
        let mut draws = std::iter::repeat_with(|| rng.next_u32());
        if let Some(index) = draws.by_ref().take(INDEX_DRAWS).find(is_free) {
            return Some(index);
        }
        let start = draws.next()?;
        (0..table.capacity() as u32).map(|step| start.wrapping_add(step)).find(is_free)
    }

    /// Keeps an inner packet for the session that is to come.
    pub(super) fn stage(&mut self, clock: Clock, slot: PeerSlot, packet: Box<[u8]>) {
        if !self.is_up {
            return self.drops.add(Drop::InterfaceDown, 1);
        }
        let Some(peer) = self.peer_mut(slot) else {
            return self.drops.add(Drop::TxNoRoute, 1);
        };
        if peer.shared.tx_session.load().as_deref().is_some_and(|s| s.usable(clock.now)) {
            // A session came while the packet was on its way to us.
            return self.send_staged(clock, VecDeque::from([packet]));
        }
        let oldest = (peer.staged.len() >= STAGED_PACKETS).then(|| peer.staged.pop_front());
        peer.staged.push_back(packet);
        let trying = peer.retry_at.is_some();
        self.drops.add(Drop::TxNoSession, oldest.is_some().into());
        if !trying {
            self.start_handshake(clock, slot, false);
        }
    }

    pub(super) fn drop_staged(&mut self, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let lost = std::mem::take(&mut peer.staged).len();
        self.drops.add(Drop::TxNoSession, lost as u64);
    }

    /// Seals and sends inner packets as a worker does: routes may have changed while they waited.
    fn send_staged(&mut self, clock: Clock, packets: VecDeque<Box<[u8]>>) {
        if packets.is_empty() {
            return;
        }
        let Self { batch, outputs, drops, shared, .. } = self;
        let tables = shared.tables.load();
        let (mut lost, mut rekey) = (0, Vec::new());
        let mut events = |event: FastEvent| match event {
            FastEvent::Stage { .. } => lost += 1,
            FastEvent::HandshakeWanted(slot) => rekey.push(slot),
            _ => {}
        };
        for packet in packets {
            batch.push(&tables, VnetHdr::default(), &packet, 0, drops);
            batch.seal(clock.now, drops, &mut events);
            outputs.extend(batch.transmits().map(|transmit| Output::Transmit {
                to: transmit.endpoint,
                bytes: transmit.bytes.to_vec(),
                tos: transmit.ecn,
            }));
            batch.clear();
        }
        drops.add(Drop::TxNoSession, lost);
        for slot in rekey {
            self.start_handshake(clock, slot, false);
        }
    }

    /// An empty data message; without a session, a handshake instead.
    pub(super) fn send_keepalive(&mut self, clock: Clock, slot: PeerSlot) {
        let Some(peer) = self.peer_mut(slot) else { return };
        let endpoint = peer.shared.destination();
        let session = peer.shared.tx_session.load_full().filter(|s| s.usable(clock.now));
        let reserved = session.as_ref().and_then(|session| session.reserve(1));
        let (Some(to), Some(session), Some(counter)) = (endpoint, session, reserved) else {
            return self.start_handshake(clock, slot, false);
        };
        let mut bytes = vec![0; KEEPALIVE_LEN];
        let header = DataHeader { receiver_index: session.receiver_index, counter };
        let (head, packet) = bytes.split_at_mut(DATA_HEADER_LEN);
        head.copy_from_slice(&header.to_bytes());
        seal_batch(&mut [SealJob { key: &session.key, counter, packet }]);
        peer.note_sent(clock.now, KEEPALIVE_LEN);
        self.outputs.push_back(Output::Transmit { to, bytes, tos: 0 });
        if session.is_worn(clock.now) {
            // A tunnel that carries nothing but keepalives must rekey, too.
            self.start_handshake(clock, slot, false);
        }
    }
}
