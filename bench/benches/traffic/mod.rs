//! What the stages are measured on: batches of inner TCP packets, and both ends of the tunnels
//! that carry them, in memory.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use arrayvec::ArrayVec;
use ipnet::{IpNet, Ipv4Net};
use millrace_aead::{OpeningKey, SealingKey};
use millrace_wg::checksum;
use millrace_wg::coalesce::{CoalesceOptions, Coalescer};
use millrace_wg::limits::BATCH_PACKETS;
use millrace_wg::replay::ReplayWindow;
use millrace_wg::rx::{self, Opened, RxPacket};
use millrace_wg::segment::Plan;
use millrace_wg::session::{RxSession, TxSession};
use millrace_wg::tx::{Push, Transmit, TxBatch};
use millrace_wg::vnet::VnetHdr;
use millrace_wg::{DropCounters, Endpoint, Instant, Peer, PeerSlot, PublicKey, Shared, Tables};

/// The lengths that every stage is measured at: the name, and the inner packets of one batch.
pub(crate) const SIZES: [(&str, &[usize]); 4] = [
    ("64", &[64; BATCH_PACKETS]),
    ("576", &[576; BATCH_PACKETS]),
    ("1420", &[1420; SUPER_PACKETS_1420]),
    ("imix", &imix()),
];
/// Full segments of 1,420 bytes in one super-packet of 64 KiB.
const SUPER_PACKETS_1420: usize = (u16::MAX as usize - HEADERS_LEN) / (1420 - HEADERS_LEN);
/// IPv4 and TCP, both without options.
const HEADERS_LEN: usize = 40;
pub(crate) const KEY: [u8; 32] = [9; 32];

/// Time stands still: every session is new, and no timer is due.
fn now() -> Instant {
    Instant::from_nanos(1)
}

/// Five times the simple mix of 7 small, 4 middle and 1 large packet, none in bulk.
const fn imix() -> [usize; 60] {
    const MIX: [usize; 12] = [64, 576, 64, 64, 576, 64, 1420, 64, 576, 64, 64, 576];
    let mut lens = [0; 60];
    let mut place = 0;
    while place < lens.len() {
        lens[place] = MIX[place % MIX.len()];
        place += 1;
    }
    lens
}

/// One packet as a TUN read gives it: its checksum is still open.
pub(crate) type TunPacket = (VnetHdr, Vec<u8>);

/// One packet each of `lens`, to `peers` peers in turn. Packets of one length to one peer are one
/// TCP flow, in sequence.
pub(crate) fn single_packets(lens: &[usize], peers: usize) -> Vec<TunPacket> {
    let flow_place = |place: usize| {
        let same = |&other: &usize| lens[other] == lens[place] && other % peers == place % peers;
        (0..place).filter(same).count()
    };
    lens.iter()
        .enumerate()
        .map(|(place, &len)| tcp_packet(place % peers, len, len, flow_place(place)))
        .collect()
}

/// One super-packet that is cut into `segments` inner packets of `inner_len` bytes.
pub(crate) fn super_packet(inner_len: usize, segments: usize) -> TunPacket {
    let payload_len = inner_len - HEADERS_LEN;
    let (mut vnet, packet) = tcp_packet(0, inner_len, HEADERS_LEN + payload_len * segments, 0);
    vnet.gso_type = VnetHdr::GSO_TCPV4;
    vnet.gso_size = payload_len as u16;
    (vnet, packet)
}

/// From 10.1.`peer`.2 to 10.2.`peer`.2; the flow's packets before it were `inner_len` long.
fn tcp_packet(peer: usize, inner_len: usize, len: usize, flow_place: usize) -> TunPacket {
    let mut packet = vec![0xab; len];
    packet[..HEADERS_LEN].fill(0);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    packet[4..6].copy_from_slice(&(flow_place as u16).to_be_bytes());
    (packet[8], packet[9]) = (64, 6);
    packet[12..16].copy_from_slice(&source(peer).octets());
    packet[16..20].copy_from_slice(&destination(peer).octets());
    packet[20..22].copy_from_slice(&(40_000 + inner_len as u16).to_be_bytes());
    let sequence = (flow_place * (inner_len - HEADERS_LEN)) as u32;
    packet[24..28].copy_from_slice(&sequence.to_be_bytes());
    (packet[32], packet[33]) = (0x50, 0x10);
    let ip_checksum = checksum::finish(checksum::sum(&packet[..20]));
    packet[10..12].copy_from_slice(&ip_checksum);
    let pseudo_header = checksum::pseudo_header(&packet[12..20], 6, len - 20);
    packet[36..38].copy_from_slice(&checksum::fold(pseudo_header));
    let vnet = VnetHdr {
        flags: VnetHdr::F_NEEDS_CSUM,
        csum_start: 20,
        csum_offset: 16,
        ..VnetHdr::default()
    };
    (vnet, packet)
}

fn source(peer: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, peer as u8, 2)
}

fn destination(peer: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 2, peer as u8, 2)
}

/// The inner packets of `packets`, cut and with their checksums completed.
pub(crate) fn finished(packets: &[TunPacket]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (vnet, packet) in packets {
        let plan = Plan::new(*vnet, packet).unwrap();
        for index in 0..plan.count() {
            let mut inner = vec![0; plan.len(index)];
            plan.write(index, &mut inner);
            all.push(inner);
        }
    }
    all
}

/// Tunnels between one sender and one receiver, each of a peer of its own.
pub(crate) struct Tunnels {
    routes: Tables,
    batch: TxBatch,
    shared: Shared,
    sources: Tables,
    sessions: Vec<Arc<RxSession>>,
    coalescer: Coalescer,
    drops: DropCounters,
}

impl Tunnels {
    /// At most 256.
    pub(crate) fn new(peers: usize) -> Self {
        let (mut routes, mut sources) = (Tables::default(), Tables::default());
        let shared = Shared::new(4 * peers);
        let mut sessions = Vec::new();
        for place in 0..peers {
            let sender = peer(place);
            let index = place as u32;
            let session = TxSession::new(index, index, SealingKey::new(KEY), now(), true);
            sender.tx_session.store(Some(Arc::new(session)));
            routes.allowed_ips.insert(network(destination(place)), sender);

            let receiver = peer(place);
            sources.allowed_ips.insert(network(source(place)), Arc::clone(&receiver));
            let session = Arc::new(RxSession {
                local_index: index,
                peer: receiver,
                key: OpeningKey::new(KEY),
                replay: Mutex::new(ReplayWindow::default()),
                born: now(),
                initiator: false,
                confirmed: AtomicBool::new(false),
            });
            shared.sessions.insert(Arc::clone(&session));
            sessions.push(session);
        }
        let (batch, coalescer, drops) = Default::default();
        Self { routes, batch, shared, sources, sessions, coalescer, drops }
    }

    /// Everything that a worker does with what it read from the TUN device, up to the send.
    pub(crate) fn transmit(&mut self, packets: &[TunPacket], mut sink: impl FnMut(&Transmit<'_>)) {
        for (vnet, packet) in packets {
            let mut from = 0;
            while let Push::Full { resume } =
                self.batch.push(&self.routes, *vnet, packet, from, &self.drops)
            {
                self.send(&mut sink);
                from = resume;
            }
        }
        self.send(&mut sink);
    }

    fn send(&mut self, sink: &mut impl FnMut(&Transmit<'_>)) {
        self.batch.seal(now(), &self.drops, &mut |_| {});
        self.batch.transmits().for_each(|transmit| sink(&transmit));
        self.batch.clear();
    }

    /// The datagrams that [`Self::transmit`] makes of `packets`.
    pub(crate) fn datagrams(&mut self, packets: &[TunPacket]) -> Vec<Vec<u8>> {
        let mut datagrams = Vec::new();
        self.transmit(packets, |transmit| {
            datagrams.extend(transmit.bytes.chunks(transmit.segment_len).map(<[u8]>::to_vec));
        });
        datagrams
    }

    /// Everything that a worker does with at most one batch of received `datagrams`, up to the
    /// write. `sink` gets the number of slices of each write.
    pub(crate) fn receive(
        &mut self,
        datagrams: &mut [Vec<u8>],
        mut sink: impl FnMut(VnetHdr, usize),
    ) {
        let source = endpoint();
        let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> =
            datagrams.iter_mut().map(|datagram| RxPacket { datagram, source, ecn: 0 }).collect();
        let mut inner = Opened::new();
        let (shared, sources, drops) = (&self.shared, &self.sources, &self.drops);
        rx::open(shared, sources, now(), &mut packets, drops, &mut |_| {}, &mut inner);
        let options = CoalesceOptions { tcp: true, udp: true };
        self.coalescer.write(options, &mut inner, &mut |vnet, slices| sink(vnet, slices.len()));
    }

    /// Forgets which counters were received, so that the same datagrams are new again.
    pub(crate) fn forget_counters(&self) {
        for session in &self.sessions {
            let mut window = session.replay.lock().unwrap_or_else(PoisonError::into_inner);
            *window = ReplayWindow::default();
        }
    }

    /// Panics if anything was dropped: then something else was measured than its name says.
    pub(crate) fn assert_nothing_dropped(&self) {
        for (reason, count) in self.drops.iter() {
            assert_eq!(count, 0, "{reason:?}");
        }
    }
}

fn network(address: Ipv4Addr) -> IpNet {
    Ipv4Net::new(address, 24).unwrap().trunc().into()
}

fn peer(place: usize) -> Arc<Peer> {
    Arc::new(Peer::new(PeerSlot(place as u32), PublicKey([place as u8; 32]), Some(endpoint())))
}

fn endpoint() -> Endpoint {
    let address = IpAddr::from(Ipv4Addr::new(192, 0, 2, 1));
    Endpoint { remote: SocketAddr::new(address, 51820), local: None, ifindex: 0 }
}
