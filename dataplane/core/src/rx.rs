//! From UDP (or an AF_XDP ring) to inner packets: one batch, in place.
//!
//! [`open`] asks six questions, and each "no" is one drop with a name:
//! 1. Is it a data message of a session that we know and may still use?
//! 2. Could its counter be new? (A cheap look, before any cryptography.)
//! 3. Is it authentic? The whole batch at once.
//! 4. Is its counter really new? From here on the packet is the peer's: roaming, key
//!    confirmation, activity and traffic. A packet without content is a keepalive and ends here.
//! 5. Is it an honest IP packet, from an inner address that leads back to this very peer?
//! 6. Does its ECN combine with the outer one (RFC 6040)?
//!
//! Packets of a batch may belong to any sessions in any order; consecutive ones of the same
//! session are a run, and sessions, locks and clocks are touched once per run.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use arc_swap::Guard;
use arrayvec::ArrayVec;
use millrace_aead::{OpenJob, open_batch};
use millrace_ebpf::drops::Drop;

use crate::data_header::{DataHeader, NotData};
use crate::drops::DropCounters;
use crate::ecn;
use crate::ip::{IpPacket, Malformed};
use crate::limits::{
    BATCH_PACKETS, COALESCE_PACKETS, DATA_HEADER_LEN, KEEPALIVE_LEN, REJECT_AFTER_MESSAGES,
    REKEY_ON_RECEIVE_AGE, TAG_LEN,
};
use crate::peer::{Endpoint, Peer};
use crate::replay::ReplayWindow;
use crate::session::RxSession;
use crate::shared::{FastEvent, Shared, Tables};
use crate::time::Instant;
use crate::tx::{want_handshake, watch};

/// One datagram as it arrived.
pub struct RxPacket<'a> {
    /// The UDP payload.
    pub datagram: &'a mut [u8],
    /// Canonical (see [`Endpoint`]), `local` and `ifindex` as the packet says.
    pub source: Endpoint,
    /// The two ECN bits of the outer header.
    pub ecn: u8,
}

/// Inner packets that were opened and wait to be merged and written.
pub type Opened<'a> = ArrayVec<&'a mut [u8], COALESCE_PACKETS>;

/// Empties `packets` and appends to `inner` what passed, trimmed and in the order of arrival.
/// `inner` needs room for all of `packets`; packets beyond its room stay in `packets`.
pub fn open<'a>(
    shared: &Shared,
    tables: &Tables,
    now: Instant,
    packets: &mut ArrayVec<RxPacket<'a>, BATCH_PACKETS>,
    drops: &DropCounters,
    events: &mut dyn FnMut(FastEvent),
    inner: &mut Opened<'a>,
) {
    let room = packets.len().min(inner.remaining_capacity());
    let mut batch: ArrayVec<RxPacket<'a>, BATCH_PACKETS> = packets.drain(..room).collect();
    // 1. Known and usable?
    let mut runs: ArrayVec<Run, BATCH_PACKETS> = ArrayVec::new();
    let mut counters: ArrayVec<u64, BATCH_PACKETS> = ArrayVec::new();
    batch.retain(|packet| match identify(shared, now, packet, &mut runs) {
        Ok(counter) => {
            counters.push(counter);
            true
        }
        Err(reason) => {
            drops.add(reason, 1);
            false
        }
    });
    // 2. Perhaps new? 3. Authentic?
    let verdicts = authenticate(&mut batch, &counters, &runs);
    // 4. Really new? 5. Honest? 6. Congested?
    let mut arrived = batch.into_iter().zip(counters).zip(verdicts);
    let mut last_source = None;
    for run in &runs {
        let Some(session) = run.session.as_deref() else { continue };
        let mut commit = Commit::new(session);
        for ((packet, counter), verdict) in arrived.by_ref().take(run.packets) {
            match verdict.and_then(|()| commit.accept(&packet, counter)) {
                Ok(Content::Keepalive) => {}
                Ok(Content::Data) => {
                    match inspect(tables, &session.peer, &mut last_source, packet) {
                        Ok(packet) => inner.push(packet),
                        Err(reason) => drops.add(reason, 1),
                    }
                }
                Err(reason) => drops.add(reason, 1),
            }
        }
        commit.note(now, events);
    }
}

/// Consecutive packets of one session.
struct Run {
    session: Guard<Option<Arc<RxSession>>>,
    local_index: u32,
    packets: usize,
}

/// Finds the packet's session, adds it to the last run or starts one, and returns its counter.
fn identify(
    shared: &Shared,
    now: Instant,
    packet: &RxPacket<'_>,
    runs: &mut ArrayVec<Run, BATCH_PACKETS>,
) -> Result<u64, Drop> {
    let header = DataHeader::parse(packet.datagram).map_err(|reason| match reason {
        NotData::Truncated => Drop::RxTruncated,
        NotData::Type => Drop::RxUnknownType,
    })?;
    if header.counter >= REJECT_AFTER_MESSAGES {
        return Err(Drop::RxSessionExpired);
    }
    if let Some(run) = runs.last_mut().filter(|run| run.local_index == header.receiver_index) {
        run.packets += 1;
        return Ok(header.counter);
    }
    let session = shared.sessions.get(header.receiver_index).ok_or(Drop::RxUnknownIndex)?;
    if !session.as_deref().is_some_and(|session| session.usable(now)) {
        return Err(Drop::RxSessionExpired);
    }
    runs.push(Run { session, local_index: header.receiver_index, packets: 1 });
    Ok(header.counter)
}

/// Opens in place every packet that the replay window does not refuse already.
fn authenticate(
    batch: &mut [RxPacket<'_>],
    counters: &[u64],
    runs: &[Run],
) -> [Result<(), Drop>; BATCH_PACKETS] {
    let mut verdicts = [Err(Drop::RxReplayed); BATCH_PACKETS];
    let mut jobs: ArrayVec<OpenJob<'_>, BATCH_PACKETS> = ArrayVec::new();
    let mut places: ArrayVec<usize, BATCH_PACKETS> = ArrayVec::new();
    let mut packets = batch.iter_mut().zip(counters).enumerate();
    for run in runs {
        let Some(session) = run.session.as_deref() else { continue };
        let window = lock(session);
        for (place, (packet, &counter)) in packets.by_ref().take(run.packets) {
            if window.may_accept(counter) {
                let packet = &mut packet.datagram[DATA_HEADER_LEN..];
                jobs.push(OpenJob { key: &session.key, counter, packet, verified: false });
                places.push(place);
            }
        }
    }
    open_batch(&mut jobs);
    for (place, job) in places.iter().zip(&jobs) {
        verdicts[*place] = if job.verified { Ok(()) } else { Err(Drop::RxAuthFailed) };
    }
    verdicts
}

enum Content {
    Data,
    Keepalive,
}

/// What a run's authentic packets change, gathered under one lock and written once.
struct Commit<'s> {
    session: &'s RxSession,
    window: MutexGuard<'s, ReplayWindow>,
    /// Where the newest packet so far came from.
    newest_source: Option<Endpoint>,
    packets: u64,
    bytes: u64,
    data: bool,
}

impl<'s> Commit<'s> {
    fn new(session: &'s RxSession) -> Self {
        let window = lock(session);
        Self { session, window, newest_source: None, packets: 0, bytes: 0, data: false }
    }

    /// Takes an authentic packet in, unless its counter was seen meanwhile.
    fn accept(&mut self, packet: &RxPacket<'_>, counter: u64) -> Result<Content, Drop> {
        if !self.window.accept(counter) {
            return Err(Drop::RxReplayed);
        }
        // An old packet that was delayed on the way must not move the peer back.
        if self.window.is_newest(counter) {
            self.newest_source = Some(packet.source);
        }
        self.packets += 1;
        self.bytes += packet.datagram.len() as u64;
        if packet.datagram.len() == KEEPALIVE_LEN {
            return Ok(Content::Keepalive);
        }
        self.data = true;
        Ok(Content::Data)
    }

    /// Roaming, key confirmation, traffic, activity, and rekeying by age.
    fn note(self, now: Instant, events: &mut dyn FnMut(FastEvent)) {
        drop(self.window);
        if self.packets == 0 {
            return;
        }
        let (session, peer) = (self.session, &self.session.peer);
        if let Some(source) = self.newest_source {
            peer.roam(source);
        }
        let confirmed = &session.confirmed;
        if !confirmed.load(Ordering::Relaxed) && !confirmed.swap(true, Ordering::Relaxed) {
            let local_index = session.local_index;
            events(FastEvent::Confirmed { peer: peer.slot, local_index });
        }
        peer.received.add(self.packets, self.bytes);
        let activity = &peer.activity;
        activity.received_at.set(now);
        activity.authenticated_at.set(now);
        activity.unanswered_since.clear();
        if self.data {
            activity.unacknowledged_since.set_if_clear(now);
        }
        watch(peer, events);
        if session.initiator && now.since(session.born) >= REKEY_ON_RECEIVE_AGE {
            // Late packets of a session that is already replaced ask for nothing.
            let current = peer.tx_session.load();
            if current.as_deref().is_some_and(|tx| tx.local_index == session.local_index) {
                want_handshake(peer, events);
            }
        }
    }
}

/// The inner packet without its padding, if it is honest and may come from this peer.
/// `last_source` remembers the last allowed address: packets come in trains.
fn inspect<'a, 't>(
    tables: &'t Tables,
    peer: &Arc<Peer>,
    last_source: &mut Option<(IpAddr, &'t Arc<Peer>)>,
    packet: RxPacket<'a>,
) -> Result<&'a mut [u8], Drop> {
    let RxPacket { datagram, ecn, .. } = packet;
    let end = datagram.len() - TAG_LEN;
    let content = &mut datagram[DATA_HEADER_LEN..end];
    let ip = IpPacket::parse(content).map_err(|reason| match reason {
        Malformed::Length => Drop::RxInnerLength,
        Malformed::Version => Drop::RxInnerVersion,
    })?;
    let owner = match *last_source {
        Some((address, owner)) if address == ip.source => Some(owner),
        _ => tables.allowed_ips.lookup(ip.source),
    };
    let owner = owner.filter(|owner| Arc::ptr_eq(owner, peer)).ok_or(Drop::RxSourceNotAllowed)?;
    *last_source = Some((ip.source, owner));
    let inner = &mut content[..ip.len];
    if !ecn::apply(inner, ecn) {
        return Err(Drop::RxEcnInvalid);
    }
    Ok(inner)
}

/// A panic elsewhere cannot leave the window half written: every state of it is a valid one.
fn lock(session: &RxSession) -> MutexGuard<'_, ReplayWindow> {
    session.replay.lock().unwrap_or_else(PoisonError::into_inner)
}
