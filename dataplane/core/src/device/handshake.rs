//! Handshakes of a [`Device`]: the gate before any public-key work, both roles, tries, giving up.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::Rng;
use zerocopy::IntoBytes;

use super::{Device, Output};
use crate::Drop;
use crate::known_peer::Pending;
use crate::limits::{
    INITIATION_INTERVAL_MIN, INITIATION_LEN, REKEY_TIMEOUT, REKEY_TIMEOUT_JITTER_MAX, RESPONSE_LEN,
    RESPONSE_TIME_MAX, UNDER_LOAD_QUEUE, UNDER_LOAD_STICKY, ZERO_KEYS_AFTER,
};
use crate::message::{CookieReply, Initiation, MAC_LEN, Response, TYPE_INITIATION, TYPE_RESPONSE};
use crate::noise::{InitiationReceived, InitiationSent, Refused};
use crate::peer::{Endpoint, PeerSlot};
use crate::secret::Secret;
use crate::time::{Clock, Instant};

/// TOS byte of handshakes: AF41, as the kernel's WireGuard sends them.
const HANDSHAKE_TOS: u8 = 0x88;

impl Device {
    /// The gate before any public-key work: macs, and under load a cookie and a rate.
    pub(super) fn admit(
        &mut self,
        clock: Clock,
        source: Endpoint,
        datagram: &[u8],
        sender_index: u32,
        waiting: usize,
    ) -> Result<(), Drop> {
        if waiting >= UNDER_LOAD_QUEUE {
            self.under_load_until = Some(clock.now + UNDER_LOAD_STICKY);
        }
        let Some(own) = &mut self.own else { return Err(Drop::HsMac1Invalid) };
        if !own.checker.has_mac1(datagram) {
            return Err(Drop::HsMac1Invalid);
        }
        if self.under_load_until.is_none_or(|until| until <= clock.now) {
            return Ok(());
        }
        if !own.checker.has_mac2(clock.now, datagram, source.remote) {
            let rng = &mut *self.rng;
            let reply = own.checker.reply(clock.now, datagram, sender_index, source.remote, rng);
            let bytes = reply.as_bytes().to_vec();
            self.outputs.push_back(Output::Transmit { to: source, bytes, tos: HANDSHAKE_TOS });
            return Err(Drop::HsMac2Needed);
        }
        if self.limiter.allow(clock.now, &source) { Ok(()) } else { Err(Drop::HsRateLimited) }
    }

    /// We are the responder: a session that waits for its first packet.
    pub(super) fn accept_initiation(
        &mut self,
        clock: Clock,
        source: Endpoint,
        message: &Initiation,
    ) -> Result<(), Drop> {
        let Some(own) = &self.own else { return Err(Drop::HsInvalid) };
        let ephemeral = Secret::random(&mut *self.rng);
        let initiation =
            InitiationReceived::read(&own.identity, &own.known, &message.body, ephemeral).map_err(
                |refused| match refused {
                    Refused::UnknownPeer => Drop::HsUnknownPeer,
                    Refused::Invalid => Drop::HsInvalid,
                },
            )?;
        let slot = *self.by_key.get(&initiation.peer).ok_or(Drop::HsUnknownPeer)?;
        let local_index = self.free_index().ok_or(Drop::HsQueueFull)?;
        let Some(peer) = self.peer_mut(slot) else { return Err(Drop::HsUnknownPeer) };
        if peer.newest_timestamp.is_some_and(|newest| initiation.timestamp <= newest) {
            return Err(Drop::HsReplayed);
        }
        let too_soon = |at: Instant| clock.now.since(at) < INITIATION_INTERVAL_MIN;
        if peer.initiation_accepted_at.is_some_and(too_soon) {
            return Err(Drop::HsFlood);
        }
        let timestamp = initiation.timestamp;
        let (body, keys) = initiation.respond(&peer.preshared).ok_or(Drop::HsInvalid)?;
        peer.newest_timestamp = Some(timestamp);
        peer.initiation_accepted_at = Some(clock.now);
        let mut response = Response {
            kind: TYPE_RESPONSE.into(),
            sender_index: local_index.into(),
            receiver_index: message.sender_index,
            body,
            mac1: [0; MAC_LEN],
            mac2: [0; MAC_LEN],
        };
        peer.jar.stamp(clock.now, response.as_mut_bytes());
        peer.shared.roam(source);
        peer.zero_at = Some(clock.now + ZERO_KEYS_AFTER);
        peer.handshake_sent_at = Some(clock.now);
        peer.note_received(clock.now, INITIATION_LEN);
        peer.note_sent(clock.now, RESPONSE_LEN);
        let remote_index = message.sender_index.get();
        let session = self.publish(clock.now, slot, local_index, remote_index, &keys, false);
        if let Some(peer) = self.peer_mut(slot) {
            let replaced = peer.sessions.next.replace(session);
            self.retire(replaced);
        }
        let bytes = response.as_bytes().to_vec();
        self.outputs.push_back(Output::Transmit { to: source, bytes, tos: HANDSHAKE_TOS });
        self.reschedule(clock.now, slot);
        Ok(())
    }

    /// We are the initiator: the session may send at once.
    pub(super) fn accept_response(
        &mut self,
        clock: Clock,
        source: Endpoint,
        message: &Response,
    ) -> Result<(), Drop> {
        let local_index = message.receiver_index.get();
        let place = self.shared.sessions.place_of(local_index);
        let slot = *self.pending.get(&place).ok_or(Drop::HsUnexpected)?;
        let Some(peer) = self.peer_mut(slot) else { return Err(Drop::HsUnexpected) };
        let answered = |pending: &mut Pending| {
            // Held back for long, it may belong to a session that its maker has lost.
            let in_time = clock.now.since(pending.sent_at) <= RESPONSE_TIME_MAX;
            pending.local_index == local_index && in_time
        };
        let pending = peer.pending.take_if(answered).ok_or(Drop::HsUnexpected)?;
        let sent_at = pending.sent_at;
        let keys = match pending.state.finish(&message.body, &peer.preshared) {
            Ok(keys) => keys,
            Err(state) => {
                peer.pending = Some(Pending { local_index, state, sent_at });
                return Err(Drop::HsInvalid);
            }
        };
        self.pending.remove(&place);
        let Some(peer) = self.peer_mut(slot) else { return Err(Drop::HsUnexpected) };
        peer.shared.roam(source);
        peer.handshake_done(clock);
        peer.zero_at = Some(clock.now + ZERO_KEYS_AFTER);
        peer.note_received(clock.now, RESPONSE_LEN);
        let remote_index = message.sender_index.get();
        let session = self.publish(clock.now, slot, local_index, remote_index, &keys, true);
        self.rotate_in(slot, session, sent_at);
        self.use_current(clock, slot);
        Ok(())
    }

    pub(super) fn accept_cookie(
        &mut self,
        clock: Clock,
        message: &CookieReply,
    ) -> Result<(), Drop> {
        let index = message.receiver_index.get();
        let initiation_of = |slot: &PeerSlot| {
            let pending = self.peer(*slot).and_then(|peer| peer.pending.as_ref());
            pending.is_some_and(|pending| pending.local_index == index)
        };
        let place = self.shared.sessions.place_of(index);
        let slot = self.pending.get(&place).copied().filter(initiation_of).or_else(|| {
            // A response of ours may also be answered by a cookie.
            self.shared.sessions.get(index).and_then(|s| s.as_deref().map(|s| s.peer.slot))
        });
        let peer = slot.and_then(|slot| self.peer_mut(slot)).ok_or(Drop::HsUnexpected)?;
        if peer.jar.accept(clock.now, message) { Ok(()) } else { Err(Drop::HsUnexpected) }
    }

    /// Starts a handshake with a peer that may still send with a session that we lost. False if there
    /// is no such peer, or a session, or tries of ours. A response of ours is none: its initiation may
    /// have been an old one.
    pub fn connect(&mut self, clock: Clock, slot: PeerSlot) -> bool {
        let idle = self.peer(slot).is_some_and(|peer| peer.retry_at.is_none());
        let wanted = idle && self.needs_handshake(clock.now, slot);
        if wanted {
            self.start_handshake(clock, slot, false);
        }
        wanted
    }

    /// Sends an initiation now, or as soon as the last handshake message is five seconds old.
    /// `retry`: one of a series of tries.
    pub(super) fn start_handshake(&mut self, clock: Clock, slot: PeerSlot, retry: bool) {
        let able = self.own.is_some() && self.is_up;
        let Some(peer) = self.peer_mut(slot) else { return };
        let endpoint = peer.shared.destination();
        let (true, Some(to)) = (able, endpoint) else {
            // Nothing to try with: whoever wants one must ask again.
            peer.shared.activity.handshake_wanted.store(false, Ordering::Relaxed);
            return;
        };
        if !retry {
            peer.trying_since = Some(clock.now);
        }
        match peer.handshake_sent_at {
            Some(sent_at) if clock.now.since(sent_at) < REKEY_TIMEOUT => {
                let jitter = peer.jitter;
                peer.retry_at.get_or_insert(sent_at + REKEY_TIMEOUT + jitter);
                self.reschedule(clock.now, slot);
            }
            _ => {
                if !self.send_initiation(clock, slot, to) {
                    self.give_up(clock, slot);
                }
            }
        }
    }

    /// False where no handshake with this peer is possible: its key is a point of low order.
    fn send_initiation(&mut self, clock: Clock, slot: PeerSlot, to: Endpoint) -> bool {
        self.drop_pending(slot);
        let Some(local_index) = self.free_index() else { return false };
        let Self { own, rng, timestamps, outputs, peers, .. } = self;
        let peer = peers.get_mut(slot.0 as usize).and_then(Option::as_mut);
        let (Some(own), Some(peer)) = (own, peer) else { return false };
        let (timestamp, lease) = timestamps.next(clock);
        outputs.extend(lease.map(Output::TimestampUsed));
        let ephemeral = Secret::random(&mut **rng);
        let key = &peer.shared.public_key;
        let started = InitiationSent::start(&own.identity, &own.known, key, timestamp, ephemeral);
        let Some((state, body)) = started else { return false };
        let mut message = Initiation {
            kind: TYPE_INITIATION.into(),
            sender_index: local_index.into(),
            body,
            mac1: [0; MAC_LEN],
            mac2: [0; MAC_LEN],
        };
        peer.jar.stamp(clock.now, message.as_mut_bytes());
        peer.pending = Some(Pending { local_index, state, sent_at: clock.now });
        peer.jitter = rng.random_range(std::time::Duration::ZERO..=REKEY_TIMEOUT_JITTER_MAX);
        peer.handshake_sent_at = Some(clock.now);
        peer.trying_since.get_or_insert(clock.now);
        peer.retry_at = Some(clock.now + REKEY_TIMEOUT + peer.jitter);
        peer.note_sent(clock.now, INITIATION_LEN);
        self.pending.insert(self.shared.sessions.place_of(local_index), slot);
        let bytes = message.as_bytes().to_vec();
        self.outputs.push_back(Output::Transmit { to, bytes, tos: HANDSHAKE_TOS });
        self.reschedule(clock.now, slot);
        true
    }

    /// The tries of a handshake ended without success.
    pub(super) fn give_up(&mut self, clock: Clock, slot: PeerSlot) {
        self.drop_pending(slot);
        self.drop_staged(slot);
        let Some(peer) = self.peer_mut(slot) else { return };
        peer.stop_trying();
        // Whoever answers late, or sent last, must not leave a keepalive timer behind.
        peer.shared.activity.unacknowledged_since.clear();
        peer.zero_at.get_or_insert(clock.now + ZERO_KEYS_AFTER);
        self.reschedule(clock.now, slot);
    }

    /// Forgets the unanswered initiation; its ephemeral key wipes itself.
    pub(super) fn drop_pending(&mut self, slot: PeerSlot) {
        let pending = self.peer_mut(slot).and_then(|peer| peer.pending.take());
        if let Some(Pending { local_index, .. }) = pending {
            self.pending.remove(&self.shared.sessions.place_of(local_index));
        }
    }

    /// Whether a handshake is worth its cost: a worker may have asked before the newest one ended.
    pub(super) fn needs_handshake(&self, now: Instant, slot: PeerSlot) -> bool {
        let session = self.peer(slot).and_then(|peer| peer.shared.tx_session.load_full());
        session.is_none_or(|session: Arc<_>| session.is_worn(now) || !session.usable(now))
    }
}
