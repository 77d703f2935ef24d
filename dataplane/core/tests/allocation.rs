//! The packet path allocates nothing: a counting allocator watches whole cycles of both directions.
#![allow(clippy::unwrap_used, reason = "a test that cannot build its input must stop")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use arrayvec::ArrayVec;
use millrace_aead::{OpeningKey, SealingKey};
use millrace_wg::coalesce::{CoalesceOptions, Coalescer};
use millrace_wg::limits::BATCH_PACKETS;
use millrace_wg::replay::ReplayWindow;
use millrace_wg::rx::{self, Opened, RxPacket};
use millrace_wg::session::{RxSession, TxSession};
use millrace_wg::tx::{Push, TxBatch};
use millrace_wg::vnet::VnetHdr;
use millrace_wg::{DropCounters, Endpoint, Instant, Peer, PeerSlot, PublicKey, Shared, Tables};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; the counter is a plain cell of the
// thread and allocates nothing itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Payload bytes of one segment.
const SEGMENT_LEN: usize = 1360;
const SEGMENTS: usize = 40;
const HEADERS_LEN: usize = 40;

/// A TCP super-packet from 10.1.0.2 to 10.2.0.2, as a TUN read gives it.
fn super_packet() -> (VnetHdr, Vec<u8>) {
    let len = HEADERS_LEN + SEGMENT_LEN * SEGMENTS;
    let mut packet = vec![0xab; len];
    packet[..HEADERS_LEN].fill(0);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    (packet[8], packet[9]) = (64, 6);
    packet[12..16].copy_from_slice(&[10, 1, 0, 2]);
    packet[16..20].copy_from_slice(&[10, 2, 0, 2]);
    (packet[32], packet[33]) = (0x50, 0x10);
    let vnet = VnetHdr {
        flags: VnetHdr::F_NEEDS_CSUM,
        gso_type: VnetHdr::GSO_TCPV4,
        hdr_len: HEADERS_LEN as u16,
        gso_size: SEGMENT_LEN as u16,
        csum_start: 20,
        csum_offset: 16,
    };
    (vnet, packet)
}

fn peer(address: &str) -> Arc<Peer> {
    let remote: SocketAddr = address.parse().unwrap();
    let endpoint = Endpoint { remote, local: None, ifindex: 0 };
    Arc::new(Peer::new(PeerSlot(0), PublicKey([1; 32]), Some(endpoint)))
}

#[test]
fn a_cycle_of_both_directions_allocates_nothing() {
    let now = Instant::from_nanos(1);
    let sender = peer("192.0.2.2:51820");
    let session = TxSession::new(7, 7, SealingKey::new([9; 32]), now, true);
    sender.tx_session.store(Some(Arc::new(session)));
    let mut tables = Tables::default();
    tables.allowed_ips.insert("10.2.0.0/16".parse().unwrap(), Arc::clone(&sender));

    let receiver = peer("198.51.100.2:51820");
    let shared = Shared::new(16);
    shared.sessions.insert(Arc::new(RxSession {
        local_index: 7,
        peer: Arc::clone(&receiver),
        key: OpeningKey::new([9; 32]),
        replay: Mutex::new(ReplayWindow::default()),
        born: now,
        initiator: false,
        confirmed: AtomicBool::new(false),
    }));
    let mut inner_tables = Tables::default();
    inner_tables.allowed_ips.insert("10.1.0.0/16".parse().unwrap(), Arc::clone(&receiver));

    let (vnet, packet) = super_packet();
    let drops = DropCounters::default();
    let (mut batch, mut coalescer) = (TxBatch::new(), Coalescer::new());
    let mut wire = vec![0; 1 << 17];
    let options = CoalesceOptions { tcp: true, udp: true };
    let mut written = 0;
    let mut cycle = || {
        let mut ignore = |_| {};
        let pushed = batch.push(&tables, vnet, &packet, 0, &drops);
        assert_eq!(pushed, Push::Done);
        batch.seal(now, &drops, &mut ignore);
        let (mut len, mut segment_len) = (0, 0);
        for transmit in batch.transmits() {
            wire[len..len + transmit.bytes.len()].copy_from_slice(transmit.bytes);
            (len, segment_len) = (len + transmit.bytes.len(), transmit.segment_len);
        }
        let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> = ArrayVec::new();
        let source =
            Endpoint { remote: "198.51.100.2:51820".parse().unwrap(), local: None, ifindex: 0 };
        for datagram in wire[..len].chunks_mut(segment_len) {
            packets.push(RxPacket { datagram, source, ecn: 0 });
        }
        let mut inner = Opened::new();
        rx::open(&shared, &inner_tables, now, &mut packets, &drops, &mut ignore, &mut inner);
        assert_eq!(inner.len(), SEGMENTS);
        coalescer.write(options, &mut inner, &mut |_, slices| {
            written += slices.iter().map(|slice| slice.len()).sum::<usize>();
        });
        batch.clear();
    };
    // Warm: thread-local slots of the swapped records are made at the first use.
    cycle();
    let before = ALLOCATIONS.with(Cell::get);
    for _ in 0..200 {
        cycle();
    }
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "allocations in 200 cycles");
    assert_eq!(written, 201 * packet.len(), "every cycle came out as one super-packet");
    assert!(drops.iter().all(|(_, count)| count == 0));
}
