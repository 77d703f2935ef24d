//! Fuzz entry points: ordinary functions from bytes to assertions. libFuzzer calls them (see
//! `bench/fuzz`), and so does a test that replays the committed corpora.

use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrayvec::ArrayVec;
use millrace_aead::{OpeningKey, SealingKey};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::coalesce::{CoalesceOptions, Coalescer};
use crate::device::{Device, DeviceConfig, Output, PeerChange};
use crate::drops::DropCounters;
use crate::limits::{BATCH_PACKETS, MTU_DEFAULT};
use crate::peer::{Endpoint, Peer, PeerSlot, PublicKey};
use crate::replay::ReplayWindow;
use crate::rx::{self, Opened, RxPacket};
use crate::secret::Secret;
use crate::session::{RxSession, TxSession};
use crate::shared::{FastEvent, Shared, Tables};
use crate::time::{Clock, Instant};
use crate::tx::{Push, TxBatch};
use crate::vnet::VnetHdr;

/// Steps of one input, so that each ends in time.
const STEPS_MAX: usize = 64;

/// Two devices that shake hands while the input plays the network: it drops, repeats, mixes,
/// changes and invents messages, and lets time pass. Each step is one byte and its arguments.
///
/// Must hold: no panic, a deadline is never due after it was handled, and one message makes a
/// bounded number of answers.
pub fn handshake_messages(mut input: &[u8]) {
    let mut sides = [Side::new(0), Side::new(1)];
    let keys = sides.each_ref().map(|side| side.device.public_key());
    for (side, key) in sides.iter_mut().zip([keys[1], keys[0]]) {
        let Some(key) = key else { return };
        let endpoint = Some(Side::endpoint(1 - side.place));
        let change = PeerChange { endpoint, ..PeerChange::default() };
        assert!(side.device.set_peer(side.clock, key, change).is_ok());
    }
    // Whatever either side sent, for the input to take from.
    let mut wire: Vec<Vec<u8>> = Vec::new();
    for _ in 0..STEPS_MAX {
        let Some(step) = take(&mut input, 2) else { break };
        let side = &mut sides[usize::from(step[0] >> 7)];
        match step[0] & 7 {
            0 => {
                let len = usize::from(step[1]).min(input.len());
                let bytes = take(&mut input, len).unwrap_or_default();
                side.receive(bytes, &mut wire);
            }
            1 | 2 => {
                let picked = usize::from(step[1]).checked_rem(wire.len());
                let Some(mut bytes) = picked.map(|at| wire[at].clone()) else { continue };
                if step[0] & 7 == 2 {
                    change(&mut bytes, &mut input);
                }
                side.receive(&bytes, &mut wire);
            }
            3 => side.pass(Duration::from_millis(u64::from(step[1]) * 40), &mut wire),
            4 => side.pass(Duration::from_secs(step[1].into()), &mut wire),
            5 => side.tell(FastEvent::HandshakeWanted(PeerSlot(0)), &mut wire),
            6 => {
                let packet = vec![0x45; usize::from(step[1])].into();
                side.tell(FastEvent::Stage { peer: PeerSlot(0), packet }, &mut wire);
            }
            _ => side.waiting = usize::from(step[1]) * 4,
        }
    }
}

/// Packets of any kind through the packet path, out and back in.
///
/// Must hold: a packet without offload becomes one datagram or one drop; every datagram opens
/// exactly once at the other side; the coalescer writes every byte of content that came in.
pub fn frames(input: &[u8]) {
    let now = Instant::from_nanos(1);
    let (shared, tables) = one_session(now);
    let (sent_drops, received_drops) = (DropCounters::default(), DropCounters::default());
    let dropped = |drops: &DropCounters| drops.iter().map(|(_, count)| count).sum::<u64>();
    let (mut batch, mut coalescer) = (TxBatch::new(), Coalescer::new());
    let mut input = input;
    for _ in 0..STEPS_MAX {
        let Some(head) = take(&mut input, 3) else { break };
        let vnet = if head[0] & 1 == 1 {
            let bytes = take(&mut input, VnetHdr::LEN).unwrap_or_default();
            VnetHdr::parse(bytes).unwrap_or_default()
        } else {
            VnetHdr::default()
        };
        let repeat = 1 + usize::from(head[0] >> 5);
        let len = usize::from(u16::from_le_bytes([head[1], head[2]])).min(input.len());
        let packet = take(&mut input, len).unwrap_or_default();
        for _ in 0..repeat {
            let before = dropped(&sent_drops);
            let mut resume = 0;
            while let Push::Full { resume: next } =
                batch.push(&tables, vnet, packet, resume, &sent_drops)
            {
                assert!(next >= resume && !batch.is_empty(), "a full batch makes progress");
                resume = next;
                let sent = through(&mut batch, &mut coalescer, &shared, &tables, &received_drops);
                assert!(sent > 0);
            }
            let was_dropped = dropped(&sent_drops) - before;
            assert!(was_dropped <= 1, "one packet, one drop");
        }
    }
    through(&mut batch, &mut coalescer, &shared, &tables, &received_drops);
}

/// Raw datagrams at the receiving side, with the good session's index now and then.
pub fn datagrams(mut input: &[u8]) {
    let now = Instant::from_nanos(1);
    let (shared, tables) = one_session(now);
    let drops = DropCounters::default();
    let mut count = 0;
    for _ in 0..STEPS_MAX {
        let Some(head) = take(&mut input, 2) else { break };
        let len = usize::from(head[0]).min(input.len());
        let mut datagram = take(&mut input, len).unwrap_or_default().to_vec();
        if head[1] & 1 == 1 && datagram.len() >= 8 {
            datagram[..8].copy_from_slice(&[4, 0, 0, 0, 7, 0, 0, 0]);
        }
        let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> = ArrayVec::new();
        packets.push(RxPacket {
            datagram: &mut datagram,
            source: Side::endpoint(0),
            ecn: head[1] & 3,
        });
        let mut inner = Opened::new();
        rx::open(&shared, &tables, now, &mut packets, &drops, &mut |_| {}, &mut inner);
        assert!(packets.is_empty() && inner.is_empty(), "nothing forged gets through");
        count += 1;
    }
    assert_eq!(drops.iter().map(|(_, count)| count).sum::<u64>(), count, "each was counted");
}

/// Seals what the batch holds, opens it again and writes it to the TUN side; how many datagrams.
fn through(
    batch: &mut TxBatch,
    coalescer: &mut Coalescer,
    shared: &Shared,
    tables: &Tables,
    drops: &DropCounters,
) -> usize {
    let now = Instant::from_nanos(2);
    batch.seal(now, &DropCounters::default(), &mut |_| {});
    let mut datagrams: Vec<(Vec<u8>, u8)> = Vec::new();
    for transmit in batch.transmits() {
        assert!(transmit.segment_len > 0);
        for bytes in transmit.bytes.chunks(transmit.segment_len) {
            datagrams.push((bytes.to_vec(), transmit.ecn));
        }
    }
    batch.clear();
    let count = datagrams.len();
    assert!(count <= BATCH_PACKETS);
    let before: u64 = drops.iter().map(|(_, count)| count).sum();
    let source = Side::endpoint(0);
    let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> = datagrams
        .iter_mut()
        .map(|(datagram, ecn)| RxPacket { datagram, source, ecn: *ecn })
        .collect();
    let mut inner = Opened::new();
    rx::open(shared, tables, now, &mut packets, drops, &mut |_| {}, &mut inner);
    let after: u64 = drops.iter().map(|(_, count)| count).sum();
    // The sender checks destinations, the receiver sources: those may still differ.
    assert_eq!(inner.len() as u64 + after - before, count as u64, "each is opened or counted");
    let bytes: usize = inner.iter().map(|packet| packet.len()).sum();
    let packets = inner.len();
    let (mut written, mut writes) = (0, 0);
    let options = CoalesceOptions { tcp: true, udp: true };
    coalescer.write(options, &mut inner, &mut |_, slices| {
        written += slices.iter().map(|slice| slice.len()).sum::<usize>();
        writes += 1;
    });
    assert!(writes <= packets && written <= bytes, "merging only takes headers away");
    assert!(packets == 0 || (writes > 0 && written > 0));
    count
}

/// A session with itself: everything that is sealed under index 7 opens again.
fn one_session(now: Instant) -> (Shared, Tables) {
    let slot = PeerSlot(0);
    let peer = Arc::new(Peer::new(slot, PublicKey([1; 32]), Some(Side::endpoint(1))));
    let session = TxSession::new(7, 7, SealingKey::new([9; 32]), now, true);
    peer.tx_session.store(Some(Arc::new(session)));
    let shared = Shared::new(16);
    shared.sessions.insert(Arc::new(RxSession {
        local_index: 7,
        peer: Arc::clone(&peer),
        key: OpeningKey::new([9; 32]),
        replay: Mutex::new(ReplayWindow::default()),
        born: now,
        initiator: true,
        confirmed: AtomicBool::new(true),
    }));
    let mut tables = Tables::default();
    for net in [[10, 0, 0, 0].into(), [192, 168, 0, 0].into()] {
        if let Ok(net) = ipnet::IpNet::new(net, 8) {
            tables.allowed_ips.insert(net, Arc::clone(&peer));
        }
    }
    if let Ok(net) = ipnet::IpNet::new([0xfdu16 << 8, 0, 0, 0, 0, 0, 0, 0].into(), 8) {
        tables.allowed_ips.insert(net, peer);
    }
    (shared, tables)
}

struct Side {
    device: Device,
    place: usize,
    clock: Clock,
    waiting: usize,
}

impl Side {
    fn new(place: usize) -> Self {
        let mut rng = StdRng::seed_from_u64(place as u64);
        let clock = Clock { now: Instant::from_nanos(1), wall: Duration::from_secs(1_700_000_000) };
        let key = Secret::generate_private_key(&mut rng);
        let config = DeviceConfig {
            mtu: MTU_DEFAULT,
            newest_timestamp: None,
            drops: Arc::default(),
            paths: None,
        };
        let mut device = Device::new(config, Arc::new(Shared::new(16)), Box::new(rng));
        device.set_private_key(clock, Some(key));
        Self { device, place, clock, waiting: 0 }
    }

    fn endpoint(place: usize) -> Endpoint {
        let remote: SocketAddr = ([192, 0, 2, place as u8], 51820).into();
        Endpoint { remote, local: None, ifindex: 0 }
    }

    fn receive(&mut self, bytes: &[u8], wire: &mut Vec<Vec<u8>>) {
        let source = Self::endpoint(1 - self.place);
        self.device.handle_datagram(self.clock, source, bytes, self.waiting);
        self.drain(wire);
    }

    fn tell(&mut self, event: FastEvent, wire: &mut Vec<Vec<u8>>) {
        self.device.handle_event(self.clock, event);
        self.drain(wire);
    }

    fn pass(&mut self, time: Duration, wire: &mut Vec<Vec<u8>>) {
        self.clock.now = self.clock.now + time;
        self.clock.wall += time;
        self.device.handle_timeout(self.clock);
        let next = self.device.poll_timeout();
        assert!(next.is_none_or(|(at, _)| at > self.clock.now), "handled and still due: {next:?}");
        self.drain(wire);
    }

    /// One message, and at most what was staged.
    fn drain(&mut self, wire: &mut Vec<Vec<u8>>) {
        let mut outputs = 0;
        while let Some(output) = self.device.poll_output() {
            outputs += 1;
            assert!(outputs < 200, "one input, endless output");
            if let Output::Transmit { bytes, .. } = output {
                wire.push(bytes);
            }
        }
    }
}

fn take<'a>(input: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(len)?;
    *input = rest;
    Some(taken)
}

/// Cuts, lengthens or flips, as the next three bytes of the input say.
fn change(bytes: &mut Vec<u8>, input: &mut &[u8]) {
    let Some(&[kind, at, with]) = take(input, 3).and_then(|taken| taken.first_chunk()) else {
        return;
    };
    let at = usize::from(at);
    match kind % 4 {
        0 => bytes.truncate(at),
        1 => bytes.resize(bytes.len() + at, with),
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= with;
            }
        }
    }
}
