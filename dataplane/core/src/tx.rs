//! From the TUN device to UDP: one batch, in place.
//!
//! [`TxBatch::push`], per packet:
//! 1. *Validate*: a whole IP packet, and a vnet header that agrees with it.
//! 2. *Route*: the peer of the longest allowed-ips prefix that covers the destination. What is
//!    already sealed for that peer goes in a circle and ends here.
//! 3. *Fit*: what is longer than the path to the peer carries is refused, or, where a router might
//!    have cut it, takes the detour, which carries every length.
//! 4. *Segment*: cut super-packets, complete checksums, while copying into the slab.
//! 5. *Pad* with zeros to a multiple of 16, never past the MTU.
//!
//! [`TxBatch::seal`], per run of packets to one peer:
//! 6. *Session*: endpoint, usable key, counters for the whole run; else the packets are staged.
//! 7. *Seal* the whole batch: headers, then one call of the AEAD.
//! 8. *Note* activity and traffic; ask for a new handshake when the key is old or worn.
//!
//! 9. [`TxBatch::transmits`] says what to send, as few sends as possible.
//!
//! The slab holds datagrams back to back: 16 bytes of header, padded inner packet, 16 of tag. So
//! neighbours of equal length are one UDP_SEGMENT send.

use std::iter;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use arc_swap::Guard;
use arrayvec::ArrayVec;
use millrace_aead::{SealJob, seal_batch};
use millrace_ebpf::drops::Drop;

use crate::data_header::DataHeader;
use crate::drops::DropCounters;
use crate::ecn;
use crate::ip::{self, IpPacket};
use crate::limits::{
    BATCH_PACKETS, DATA_HEADER_LEN, GSO_BYTES_MAX, GSO_SEGMENTS_MAX, PADDING_MULTIPLE, TAG_LEN,
    TX_SLAB_LEN,
};
use crate::peer::{Endpoint, Peer};
use crate::segment::Plan;
use crate::session::TxSession;
use crate::shared::{FastEvent, Tables};
use crate::time::Instant;
use crate::vnet::VnetHdr;

/// Up to [`BATCH_PACKETS`] datagrams. One per worker, allocated once; used as push, seal,
/// transmits, clear.
pub struct TxBatch {
    slab: Box<[u8]>,
    /// Bytes of the slab that `slots` cover.
    used: usize,
    slots: ArrayVec<Slot, BATCH_PACKETS>,
    /// Every slot belongs to one run, in order: the runs' `packets` add up to `slots.len()`.
    runs: ArrayVec<Run, BATCH_PACKETS>,
    /// The last packet's way: packets come in trains.
    last: Option<Last>,
    sealed: bool,
}

/// Whether a packet is wholly in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Push {
    /// In the batch, or dropped and counted.
    Done,
    /// Dropped and counted, because no peer has that destination or the peer has no known address:
    /// its sender should hear "host unreachable".
    Unroutable,
    /// Dropped and counted, because the path to the peer carries no packet longer than this: its
    /// sender should hear "too big".
    TooLong { mtu: u16 },
    /// The batch is full: seal, send and clear it, then push the same packet with this `resume`.
    Full { resume: usize },
}

/// Datagrams for one send: each `segment_len` long, the last perhaps shorter.
pub struct Transmit<'a> {
    pub peer: &'a Arc<Peer>,
    pub endpoint: Endpoint,
    /// The two bits of the outer header.
    pub ecn: u8,
    pub bytes: &'a [u8],
    pub segment_len: usize,
}

/// One datagram of the slab.
struct Slot {
    datagram_len: u32,
    /// Without padding.
    inner_len: u32,
    ecn: u8,
}

/// A destination that led to the last run's peer, and the longest packet that passes there.
struct Last {
    destination: IpAddr,
    inner_len_max: Option<u16>,
}

/// Consecutive slots of one peer.
struct Run {
    peer: Arc<Peer>,
    /// Too long for the path that the peer has.
    detoured: bool,
    packets: usize,
    /// Set when the run was sealed; without it, nothing of it is sent.
    endpoint: Option<Endpoint>,
}

impl Default for TxBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl TxBatch {
    pub fn new() -> Self {
        Self {
            slab: vec![0; TX_SLAB_LEN].into_boxed_slice(),
            used: 0,
            slots: ArrayVec::new(),
            runs: ArrayVec::new(),
            last: None,
            sealed: false,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Steps 1 to 5. `resume` is 0, or what [`Push::Full`] said for the same packet. The routes of
    /// one batch may come from any of the `tables` passed since the last `clear`.
    pub fn push(
        &mut self,
        tables: &Tables,
        vnet: VnetHdr,
        packet: &[u8],
        resume: usize,
        drops: &DropCounters,
    ) -> Push {
        // 1. Validate.
        let Ok(ip) = IpPacket::parse(packet) else {
            drops.add(Drop::TxInnerInvalid, 1);
            return Push::Done;
        };
        let packet = &packet[..ip.len];
        let Some(plan) = Plan::new(vnet, packet) else {
            drops.add(Drop::TxOffloadInvalid, 1);
            return Push::Done;
        };
        // 2. Route.
        let Some(route) = self.route(tables, ip.destination) else {
            drops.add(Drop::TxNoRoute, 1);
            return Push::Unroutable;
        };
        let Some(inner_len_max) = self.inner_len_max(route) else {
            drops.add(Drop::TxNoEndpoint, 1);
            return Push::Unroutable;
        };
        if self.comes_back(route, packet) {
            drops.add(Drop::TxLoop, 1);
            return Push::Done;
        }
        // 3. Fit. A path that carries the longest packets has no limit, padded or not.
        let limit = inner_len_max.filter(|max| *max < tables.mtu);
        let limit = limit.map(|max| max - max % PADDING_MULTIPLE as u16);
        let detoured = match limit.filter(|max| plan.len(0) > usize::from(*max)) {
            None => false,
            Some(_) if ip::may_be_cut(packet) => true,
            Some(mtu) => {
                drops.add(Drop::TxTooLong, 1);
                return Push::TooLong { mtu };
            }
        };
        let last = Last { destination: ip.destination, inner_len_max };
        let way = Way { route, detoured };
        let ecn = ecn::of_packet(packet);
        for index in resume..plan.count() {
            let inner_len = plan.len(index);
            let padded_len = padded_len(inner_len, usize::from(tables.mtu));
            let Some(room) = self.claim(way, inner_len, padded_len, ecn) else {
                return Push::Full { resume: index };
            };
            // 4. Segment.
            let (inner, padding) = room.split_at_mut(inner_len);
            plan.write(index, inner);
            // 5. Pad.
            padding.fill(0);
        }
        self.last = Some(last);
        Push::Done
    }

    /// Where `destination` goes: a peer, or the last run if that went to the same destination.
    fn route<'a>(&self, tables: &'a Tables, destination: IpAddr) -> Option<Route<'a>> {
        if self.last.as_ref().is_some_and(|last| last.destination == destination) {
            return Some(Route::LastRun);
        }
        Some(Route::Peer(tables.allowed_ips.lookup(destination)?))
    }

    /// How long a packet may be there, if that is known; none if there is no way at all.
    fn inner_len_max(&self, route: Route<'_>) -> Option<Option<u16>> {
        match route {
            Route::Peer(peer) => peer.path().map(|path| path.inner_len_max),
            Route::LastRun => self.last.as_ref().map(|last| last.inner_len_max),
        }
    }

    /// Whether `packet` was sealed by the very session that would seal it now: then the way to the
    /// peer leads into its tunnel, and each turn of the loop would make it longer.
    fn comes_back(&self, route: Route<'_>, packet: &[u8]) -> bool {
        let Some(datagram) = ip::udp_payload(packet) else { return false };
        let Ok(header) = DataHeader::parse(datagram) else { return false };
        let peer = match (route, self.runs.last()) {
            (Route::Peer(peer), _) => peer,
            (Route::LastRun, Some(run)) => &run.peer,
            (Route::LastRun, None) => return false,
        };
        let session = peer.tx_session.load();
        session.as_deref().is_some_and(|session| session.receiver_index == header.receiver_index)
    }

    /// Room for one padded inner packet, header and tag around it; none if the batch is full.
    fn claim(
        &mut self,
        way: Way<'_>,
        inner_len: usize,
        padded_len: usize,
        ecn: u8,
    ) -> Option<&mut [u8]> {
        let datagram_len = DATA_HEADER_LEN + padded_len + TAG_LEN;
        let at = self.used;
        // A packet longer than a send may be has the batch for itself.
        let len_max = if at == 0 { self.slab.len() } else { GSO_BYTES_MAX };
        if self.sealed || self.slots.is_full() || at + datagram_len > len_max {
            return None;
        }
        let Way { route, detoured } = way;
        let peer = match (self.runs.last_mut(), route) {
            (Some(run), _) if run.detoured == detoured && route.leads_to(&run.peer) => {
                run.packets += 1;
                None
            }
            (_, Route::Peer(peer)) => Some(peer.clone()),
            (Some(run), Route::LastRun) => Some(run.peer.clone()),
            (None, Route::LastRun) => return None,
        };
        if let Some(peer) = peer {
            self.runs.push(Run { peer, detoured, packets: 1, endpoint: None });
        }
        let slot = Slot { datagram_len: datagram_len as u32, inner_len: inner_len as u32, ecn };
        self.slots.push(slot);
        self.used += datagram_len;
        self.slab.get_mut(at + DATA_HEADER_LEN..at + DATA_HEADER_LEN + padded_len)
    }

    /// Steps 6 to 8. Packets without a usable session leave as [`FastEvent::Stage`].
    pub fn seal(&mut self, now: Instant, drops: &DropCounters, events: &mut dyn FnMut(FastEvent)) {
        if std::mem::replace(&mut self.sealed, true) {
            return;
        }
        // 6. Session.
        let mut keys: ArrayVec<Option<Reserved>, BATCH_PACKETS> = ArrayVec::new();
        let (mut slots, mut inner) = (&self.slots[..], &self.slab[..self.used]);
        for run in &mut self.runs {
            let (run_slots, other_slots) = slots.split_at(run.packets);
            let len = run_slots.iter().map(|slot| slot.datagram_len as usize).sum();
            let (run_bytes, other_bytes) = inner.split_at(len);
            (slots, inner) = (other_slots, other_bytes);
            let reserved =
                run.reserve(now, drops, |peer| stage(peer, run_slots, run_bytes, events));
            keys.push(reserved);
        }
        // 7. Seal.
        let mut jobs: ArrayVec<SealJob<'_>, BATCH_PACKETS> = ArrayVec::new();
        let (mut slots, mut rest) = (self.slots.iter(), &mut self.slab[..self.used]);
        for (run, reserved) in self.runs.iter().zip(&keys) {
            for (nth, slot) in slots.by_ref().take(run.packets).enumerate() {
                let (datagram, other) = rest.split_at_mut(slot.datagram_len as usize);
                rest = other;
                let Some(Reserved { session, first_counter }) = reserved else { continue };
                let Some(session) = session.as_deref() else { continue };
                let counter = first_counter + nth as u64;
                let (header, packet) = datagram.split_at_mut(DATA_HEADER_LEN);
                let receiver_index = session.receiver_index;
                header.copy_from_slice(&DataHeader { receiver_index, counter }.to_bytes());
                jobs.push(SealJob { key: &session.key, counter, packet });
            }
        }
        seal_batch(&mut jobs);
        // 8. Note.
        let mut slots = &self.slots[..];
        for (run, reserved) in self.runs.iter().zip(&keys) {
            let (run_slots, others) = slots.split_at(run.packets);
            slots = others;
            let Some(session) = reserved.as_ref().and_then(|r| r.session.as_deref()) else {
                continue;
            };
            let bytes = run_slots.iter().map(|slot| u64::from(slot.datagram_len)).sum();
            note_sent(&run.peer, session, now, run.packets as u64, bytes, events);
        }
    }

    /// Step 9: what to send. At most [`GSO_SEGMENTS_MAX`] datagrams and [`GSO_BYTES_MAX`] bytes
    /// each, unless a single datagram is longer than that.
    pub fn transmits(&self) -> impl Iterator<Item = Transmit<'_>> {
        let (mut slots, mut bytes) = (&self.slots[..], &self.slab[..self.used]);
        let mut runs = self.runs.iter();
        let mut current: Option<(&Run, usize)> = None;
        iter::from_fn(move || {
            loop {
                let (run, left) = match current.take() {
                    Some((run, left)) if left > 0 => (run, left),
                    _ => {
                        let run = runs.next()?;
                        (run, run.packets)
                    }
                };
                let packets = match run.endpoint {
                    Some(_) => sendable_together(&slots[..left]),
                    None => left,
                };
                let (sent, other_slots) = slots.split_at(packets);
                let len = sent.iter().map(|slot| slot.datagram_len as usize).sum();
                let (sent_bytes, other_bytes) = bytes.split_at(len);
                (slots, bytes) = (other_slots, other_bytes);
                current = Some((run, left - packets));
                let Some(endpoint) = run.endpoint else { continue };
                return Some(Transmit {
                    peer: &run.peer,
                    endpoint,
                    ecn: sent[0].ecn,
                    bytes: sent_bytes,
                    segment_len: sent[0].datagram_len as usize,
                });
            }
        })
    }

    /// Makes the batch empty. The slab keeps its memory, and its place in the cache.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.runs.clear();
        self.used = 0;
        self.last = None;
        self.sealed = false;
    }
}

#[derive(Clone, Copy)]
enum Route<'a> {
    LastRun,
    Peer(&'a Arc<Peer>),
}

impl Route<'_> {
    /// `last`: the peer of the last run.
    fn leads_to(self, last: &Arc<Peer>) -> bool {
        match self {
            Self::LastRun => true,
            Self::Peer(peer) => Arc::ptr_eq(peer, last),
        }
    }
}

#[derive(Clone, Copy)]
struct Way<'a> {
    route: Route<'a>,
    detoured: bool,
}

/// A session and the first of the counters that were reserved for a run.
struct Reserved {
    session: Guard<Option<Arc<TxSession>>>,
    first_counter: u64,
}

impl Run {
    /// Session and counters for the run; none if it cannot be sent now, after `stage` or a count.
    fn reserve(
        &mut self,
        now: Instant,
        drops: &DropCounters,
        stage: impl FnOnce(&Peer),
    ) -> Option<Reserved> {
        if self.peer.gone.load(Ordering::Relaxed) {
            drops.add(Drop::TxNoRoute, self.packets as u64);
            return None;
        }
        let Some(endpoint) = self.peer.destination() else {
            drops.add(Drop::TxNoEndpoint, self.packets as u64);
            return None;
        };
        let session = self.peer.tx_session.load();
        let usable = session.as_deref().filter(|session| session.usable(now));
        let Some(first_counter) = usable.and_then(|s| s.reserve(self.packets as u64)) else {
            stage(&self.peer);
            return None;
        };
        let detour = || Endpoint::detour(self.peer.slot);
        self.endpoint = Some(if self.detoured { detour() } else { endpoint });
        Some(Reserved { session, first_counter })
    }
}

fn stage(peer: &Peer, slots: &[Slot], mut bytes: &[u8], events: &mut dyn FnMut(FastEvent)) {
    for slot in slots {
        let (datagram, others) = bytes.split_at(slot.datagram_len as usize);
        bytes = others;
        let packet = &datagram[DATA_HEADER_LEN..DATA_HEADER_LEN + slot.inner_len as usize];
        events(FastEvent::Stage { peer: peer.slot, packet: packet.into() });
    }
    want_handshake(peer, events);
}

fn note_sent(
    peer: &Peer,
    session: &TxSession,
    now: Instant,
    packets: u64,
    bytes: u64,
    events: &mut dyn FnMut(FastEvent),
) {
    peer.sent.add(packets, bytes);
    let activity = &peer.activity;
    activity.sent_at.set(now);
    activity.authenticated_at.set(now);
    activity.unanswered_since.set_if_clear(now);
    activity.unacknowledged_since.clear();
    watch(peer, events);
    if session.is_worn(now) {
        want_handshake(peer, events);
    }
}

/// Tells the slow thread to look at the peer's timers, unless it does already.
pub(crate) fn watch(peer: &Peer, events: &mut dyn FnMut(FastEvent)) {
    // What was just noted of the peer is seen by a slow thread that stops watching it now; or we
    // see that it stopped.
    fence(Ordering::SeqCst);
    let watched = &peer.activity.watched;
    if !watched.load(Ordering::Relaxed) && !watched.swap(true, Ordering::Relaxed) {
        events(FastEvent::Activity(peer.slot));
    }
}

/// Asks for a handshake, once until the slow thread has started it.
pub(crate) fn want_handshake(peer: &Peer, events: &mut dyn FnMut(FastEvent)) {
    let wanted = &peer.activity.handshake_wanted;
    if !wanted.load(Ordering::Relaxed) && !wanted.swap(true, Ordering::Relaxed) {
        events(FastEvent::HandshakeWanted(peer.slot));
    }
}

/// Length after padding. Never past the MTU; a packet already longer than the MTU is measured by
/// its last MTU-sized unit, as the Linux kernel does.
pub fn padded_len(inner_len: usize, mtu: usize) -> usize {
    if mtu == 0 {
        return inner_len.next_multiple_of(PADDING_MULTIPLE);
    }
    let unit = if inner_len > mtu { inner_len % mtu } else { inner_len };
    inner_len - unit + unit.next_multiple_of(PADDING_MULTIPLE).min(mtu)
}

/// How many of `slots` one send can carry: equal lengths, only the last shorter, one ECN value.
fn sendable_together(slots: &[Slot]) -> usize {
    let first = &slots[0];
    let (mut packets, mut bytes) = (1, first.datagram_len as usize);
    for slot in &slots[1..] {
        bytes += slot.datagram_len as usize;
        let fits = packets < GSO_SEGMENTS_MAX && bytes <= GSO_BYTES_MAX;
        if !fits || slot.ecn != first.ecn || slot.datagram_len > first.datagram_len {
            break;
        }
        packets += 1;
        if slot.datagram_len < first.datagram_len {
            break;
        }
    }
    packets
}
