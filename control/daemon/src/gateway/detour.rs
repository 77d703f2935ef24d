//! Sealed packets between the data plane and relays, in runs.

use millrace_ebpf::class::Class;
use millrace_ebpf::link::{DetourSockets, Run, detour::RUN_LEN_MAX};
use millrace_path::Instant;
use millrace_path::sealed::PublicKey;

use super::Gateway;
use crate::counters::{Count, Counters};
use crate::limits::{PARKED_AGE_MAX, TURN_MAX};

/// Type and bytes of a handshake initiation.
const INITIATION: u8 = 1;
const INITIATION_LEN: usize = 148;

/// Packets for the data plane that make one run so far.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    slot: u32,
    segment_len: usize,
    /// A shorter packet ended the run.
    ended: bool,
    class: Option<Class>,
    bytes: Vec<u8>,
}

impl Gateway {
    /// Takes what the data plane wants relayed from detour socket number `at`.
    pub fn handle_detour(&mut self, now: Instant, at: usize) {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..TURN_MAX {
            let Some(tools) = self.plane.as_ref().and_then(|plane| plane.tools.as_ref()) else {
                break;
            };
            let Some(socket) = tools.detours.iter().nth(at) else { break };
            match socket.receive(&mut buffer) {
                Ok(Some([])) | Ok(None) | Err(_) => break,
                Ok(Some(datagram)) => match Run::parse(datagram) {
                    Some(run) => self.relay(now, run),
                    None => self.counters.add(Count::DetourMalformed, 1),
                },
            }
        }
        self.buffer = buffer;
        self.relays.flush(now);
    }

    fn relay(&mut self, now: Instant, mut run: Run<'_>) {
        let peer = self.slots.get(&run.slot).and_then(|key| self.peers.get_mut(key));
        let Some(peer) = peer else {
            self.counters.add(Count::DetourUnknownSlot, run.messages().count() as u64);
            return;
        };
        let Some(at) = self.relays.of_peer(peer.home_url(), peer.heard_at) else {
            self.counters.add(Count::NoRelay, run.messages().count() as u64);
            return;
        };
        let client = &mut self.relays.list[at].client;
        for message in run.messages() {
            if message.len() == INITIATION_LEN && message.first() == Some(&INITIATION) {
                peer.parked = Some((now, message.to_vec()));
            }
            peer.relayed_sent_bytes += message.len() as u64;
            client.send(now, peer.key, message);
        }
    }

    /// The peer has just appeared: what it could not hear is said again.
    pub(super) fn send_parked(&mut self, now: Instant, key: PublicKey) {
        let Some(peer) = self.peers.get_mut(&key) else { return };
        let Some((at, message)) = peer.parked.take() else { return };
        // One that was answered before would only keep a new data plane from its own.
        let tools = self.plane.as_ref().and_then(|plane| plane.tools.as_ref());
        let line = tools.and_then(|tools| tools.observed.read(peer.slot));
        let answered = line.is_some_and(|line| Instant::from_nanos(line.handshake_ns) >= at);
        let at_relay = self.relays.of_peer(peer.home_url(), peer.heard_at);
        let in_time = now.since(at) < PARKED_AGE_MAX && !answered;
        if let Some(relay) = at_relay.filter(|_| in_time) {
            self.relays.list[relay].client.send(now, key, &message);
        }
    }

    /// A packet from a relay that only the data plane can open.
    pub(super) fn pass_on(&mut self, from: PublicKey, class: Class, packet: &[u8]) {
        let Some(peer) = self.peers.get_mut(&from) else {
            self.counters.add(Count::RelayedFromStranger, 1);
            return;
        };
        let Some(tools) = self.plane.as_ref().and_then(|plane| plane.tools.as_ref()) else {
            self.counters.add(Count::NoPlane, 1);
            return;
        };
        peer.relayed_received_bytes += packet.len() as u64;
        self.inbound.push(peer.slot, class, packet, &tools.detours, &mut self.counters);
    }

    pub(super) fn flush_inbound(&mut self) {
        if let Some(tools) = self.plane.as_ref().and_then(|plane| plane.tools.as_ref()) {
            self.inbound.flush(&tools.detours, &mut self.counters);
        }
    }
}

impl Inbound {
    fn push(
        &mut self,
        slot: u32,
        class: Class,
        packet: &[u8],
        detours: &DetourSockets,
        counters: &mut Counters,
    ) {
        let fits = self.slot == slot
            && self.class == Some(class)
            && !self.ended
            && packet.len() <= self.segment_len
            && self.bytes.len() + packet.len() <= RUN_LEN_MAX;
        if !fits {
            self.flush(detours, counters);
            (self.slot, self.class, self.segment_len) = (slot, Some(class), packet.len());
        }
        self.ended = packet.len() < self.segment_len;
        self.bytes.extend_from_slice(packet);
    }

    fn flush(&mut self, detours: &DetourSockets, counters: &mut Counters) {
        if self.bytes.is_empty() {
            return;
        }
        let segment_len = u16::try_from(self.segment_len).unwrap_or(u16::MAX);
        if let Err(error) = detours.send(self.slot, segment_len, &self.bytes) {
            let full = error.kind() == std::io::ErrorKind::WouldBlock;
            let count = if full { Count::PlaneFull } else { Count::NoPlane };
            counters.add(count, self.bytes.len().div_ceil(self.segment_len) as u64);
        }
        self.bytes.clear();
        (self.ended, self.class) = (false, None);
    }
}
