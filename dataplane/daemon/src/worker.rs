//! A worker: one pinned thread that moves packets both ways between its UDP socket and its TUN
//! queue. The only loop that does.
//!
//! One turn:
//! 1. *Receive* what the socket has, at most [`crate::io::udp::MESSAGES`] messages: split runs into
//!    datagrams, open them in batches, merge what fits across batches, write to the TUN device. The
//!    same with a batch of frames of each AF_XDP socket, if this worker has some.
//! 2. *Transmit* what the TUN device has, at most `TURN_FLUSHES` batches: segment, seal, send.
//! 3. If neither had anything, *wait* for both, without a time limit.
//!
//! A full socket buffer stops step 2, and with it the reading of the TUN device: its queue, not
//! we, decides then what is dropped. The clock is read once a batch.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use millrace_wg::coalesce::{CoalesceOptions, Coalescer};
use millrace_wg::icmp::{IcmpError, IcmpLimit, Trouble};
use millrace_wg::limits::{
    BATCH_PACKETS, COALESCED_MAX, COOKIE_REPLY_LEN, INITIATION_LEN, RESPONSE_LEN,
};
use millrace_wg::rx::{self, Opened, RxPacket};
use millrace_wg::segment::Plan;
use millrace_wg::tx::{Push, Transmit, TxBatch};
use millrace_wg::vnet::VnetHdr;
use millrace_wg::{Drop, DropCounters, Endpoint, Instant, PeerSlot, Shared, Tables};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::by_socket::{self, BySocket};
use crate::clock;
use crate::io::detour::Detour;
use crate::io::frame::{self, Datagram};
use crate::io::icmp::IcmpSender;
use crate::io::lane::{self, Lane};
use crate::io::tun::{self, TunQueue};
use crate::io::udp::{self, Receiver, UdpSocket};
use crate::io::xsk;
use crate::offload::Offloads;
use crate::queue::{Handshake, SlowQueue};
use crate::watchdog::Pulse;

/// Turns without rest after which a worker looks at its descriptors all the same.
const TURNS_UNSEEN: u32 = 64;
const NO_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// TUN reads of one filling: packets that are dropped at once never fill a batch.
const FILL_READS: usize = 4 * BATCH_PACKETS;
/// Batches that one turn sends before it looks at the socket again.
const TURN_FLUSHES: usize = 4;
/// Runs from control that one turn takes.
const TURN_DETOURS: usize = 8;
/// Slices of one TUN write: the vnet header, the packet's headers, one payload a packet.
const SLICES_MAX: usize = COALESCED_MAX + 2;

/// Descriptors that one wait looks at: socket, TUN, stop, mailbox, AF_XDP sockets, detour, pulse.
const POLL_MAX: usize = 4 + 64 + 2;
/// A full transmit ring drains in less than this.
const RING_FULL_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000 };
/// How often a worker that has nothing else to do looks whether its frames were sent.
const SENDING_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// What a worker shares with the rest of the process.
pub struct Context {
    pub shared: Arc<Shared>,
    pub slow: Arc<SlowQueue>,
    pub offloads: Arc<Offloads>,
    pub drops: Arc<DropCounters>,
    /// Tells senders of packets that go nowhere.
    pub icmp: Arc<IcmpSender>,
    /// Readable when the worker must end.
    pub stop: Arc<OwnedFd>,
    /// Where a watchdog is asked for.
    pub pulse: Option<Arc<Pulse>>,
}

impl Context {
    fn by_socket<'w>(&'w self, socket: &'w UdpSocket) -> BySocket<'w> {
        BySocket { socket, gso: &self.offloads.udp_gso, drops: &self.drops }
    }
}

/// Why a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Stopped,
    /// Somebody removed the interface.
    TunGone,
}

pub struct Worker {
    context: Context,
    /// Shared with the slow thread, which changes its mark.
    udp: Arc<UdpSocket>,
    tun: TunQueue,
    receiver: Receiver,
    coalescer: Coalescer,
    /// A super-packet that the TUN device refused, before it is cut.
    refused: Vec<u8>,
    outbound: Outbound,
    /// Place for AF_XDP sockets, where a port runs.
    lane: Option<Lane>,
    /// To and from control, where it can be.
    detour: Option<Detour>,
    /// Runs from control wait.
    detoured: bool,
}

/// The sending half's state between turns.
struct Outbound {
    batch: TxBatch,
    packet: Box<[u8]>,
    /// A packet that is only partly in the batch: its length, vnet header included, and where to
    /// go on.
    partial: Option<(usize, usize)>,
    /// Transmits of the batch that are sent, and bytes of the next one.
    sent: (usize, usize),
    /// The socket's buffer is full.
    blocked: bool,
    /// The AF_XDP ring is full.
    ring_full: bool,
    icmp_limit: IcmpLimit,
}

/// How far a send came.
enum Sent {
    All,
    /// So many bytes of it; the rest must wait for the socket.
    Blocked(usize),
    /// The same, for the AF_XDP ring.
    RingFull(usize),
}

impl Worker {
    pub fn new(
        context: Context,
        udp: Arc<UdpSocket>,
        tun: TunQueue,
        lane: Option<Lane>,
        detour: Option<Detour>,
    ) -> Self {
        let outbound = Outbound {
            batch: TxBatch::new(),
            packet: vec![0; tun::READ_LEN].into_boxed_slice(),
            partial: None,
            sent: (0, 0),
            blocked: false,
            ring_full: false,
            icmp_limit: IcmpLimit::default(),
        };
        Self {
            context,
            udp,
            tun,
            receiver: Receiver::new(),
            coalescer: Coalescer::new(),
            refused: Vec::with_capacity(tun::READ_LEN),
            outbound,
            lane,
            detour,
            detoured: false,
        }
    }

    /// Where this worker reports to.
    pub fn slow_queue(&self) -> Arc<SlowQueue> {
        Arc::clone(&self.context.slow)
    }

    /// Runs until the stop descriptor becomes readable, or the TUN device is gone.
    pub fn run(mut self) -> End {
        let mut turns = 0_u32;
        loop {
            let received = self.receive() | self.receive_frames() | self.receive_detoured();
            let busy = self.transmit() || received;
            turns = turns.wrapping_add(1);
            // A worker that never rests must still notice a socket that has room again, and its
            // own end.
            let look = !busy || self.outbound.blocked || turns.is_multiple_of(TURNS_UNSEEN);
            if look && let Some(end) = self.wait(busy) {
                return end;
            }
        }
    }

    /// Step 1. True if there was anything.
    fn receive(&mut self) -> bool {
        let Self { context, udp, tun, receiver, coalescer, refused, .. } = self;
        // An error of the socket is an ICMP answer to an earlier send: a hint that we do not need.
        let count = receiver.receive(udp, udp::MESSAGES).unwrap_or(0);
        if count == 0 {
            return false;
        }
        let tables = context.shared.tables.load();
        let mut inner_path = InnerPath { context, tun, coalescer, refused, tables: &tables };
        let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> = ArrayVec::new();
        let mut inner = Opened::new();
        for message in receiver.messages(count) {
            if let Some(defect) = message.defect() {
                context.drops.add(defect, 1);
                continue;
            }
            for datagram in message.bytes.chunks_mut(message.segment_len) {
                if datagram.first() != Some(&4) {
                    not_data(context, message.source, datagram);
                    continue;
                }
                packets.push(RxPacket { datagram, source: message.source, ecn: message.ecn });
                if packets.is_full() {
                    inner_path.open(&mut packets, &mut inner);
                }
            }
        }
        inner_path.open(&mut packets, &mut inner);
        inner_path.write(&mut inner);
        true
    }

    /// Step 1 for AF_XDP sockets, after a look whether they are still ours to use.
    fn receive_frames(&mut self) -> bool {
        if self.lane.as_ref().is_some_and(Lane::is_posted) {
            self.empty_rings();
            let Self { context, udp, lane: Some(lane), .. } = self else { return false };
            lane.pick_up(|frame| context.by_socket(udp).resend(frame));
        }
        self.receive_batches()
    }

    /// Takes what waits in rings that are about to be closed. XDP fills them no more; were it
    /// otherwise, as much as a ring holds is enough.
    fn empty_rings(&mut self) {
        for _ in 0..xsk::RX_RING as usize / BATCH_PACKETS {
            if !self.receive_batches() {
                return;
            }
        }
    }

    /// A batch of each socket. Frames go back to the device after the write.
    fn receive_batches(&mut self) -> bool {
        let Self { context, tun, coalescer, refused, lane: Some(lane), .. } = self else {
            return false;
        };
        let mut any = false;
        let (counter, receivers) = lane.receivers();
        for xsk in receivers {
            let ifindex = xsk.place().ifindex;
            match xsk.take_refused() {
                0 => {}
                refused => context.drops.add(Drop::XdpDescriptorInvalid, refused),
            }
            let mut batch = xsk.receive();
            if batch.is_empty() {
                continue;
            }
            any = true;
            counter.count_received(batch.len() as u64);
            let tables = context.shared.tables.load();
            let mut inner_path = InnerPath { context, tun, coalescer, refused, tables: &tables };
            let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> = ArrayVec::new();
            let mut inner = Opened::new();
            for frame in batch.frames() {
                let Some(Datagram { payload, source, ecn }) = frame::parse(frame, ifindex) else {
                    context.drops.add(Drop::RxFrameInvalid, 1);
                    continue;
                };
                if payload.first() == Some(&4) {
                    packets.push(RxPacket { datagram: payload, source, ecn });
                } else {
                    not_data(context, source, payload);
                }
            }
            inner_path.open(&mut packets, &mut inner);
            inner_path.write(&mut inner);
        }
        any
    }

    /// Step 1 for runs that control received. Only a look at the descriptors says that there are
    /// some: without them this costs nothing.
    fn receive_detoured(&mut self) -> bool {
        if !self.detoured {
            return false;
        }
        let Self { context, tun, coalescer, refused, detour: Some(detour), .. } = self else {
            return false;
        };
        let tables = context.shared.tables.load();
        for _ in 0..TURN_DETOURS {
            let Some(received) = detour.receive(&context.drops) else {
                self.detoured = false;
                break;
            };
            let Some((slot, mut run)) = received else { continue };
            let source = Endpoint::detour(slot);
            let mut inner_path = InnerPath { context, tun, coalescer, refused, tables: &tables };
            let mut packets: ArrayVec<RxPacket<'_>, BATCH_PACKETS> = ArrayVec::new();
            let mut inner = Opened::new();
            for datagram in run.messages() {
                if datagram.first() != Some(&4) {
                    not_data(context, source, datagram);
                    continue;
                }
                packets.push(RxPacket { datagram, source, ecn: 0 });
                if packets.is_full() {
                    inner_path.open(&mut packets, &mut inner);
                }
            }
            inner_path.open(&mut packets, &mut inner);
            inner_path.write(&mut inner);
        }
        true
    }

    /// Step 2. True if there was anything to do, and it could be done.
    fn transmit(&mut self) -> bool {
        let Self { context, udp, tun, outbound, lane, detour, .. } = self;
        let (socket, detour) = (context.by_socket(udp), detour.as_ref());
        let mut out = Out { context, socket, lane: lane.as_mut(), detour };
        if !outbound.go_on(&mut out) {
            return false;
        }
        let mut any = false;
        for _ in 0..TURN_FLUSHES {
            let more = outbound.fill(context, tun);
            any |= more || !outbound.batch.is_empty();
            if !outbound.flush(&mut out) || !more {
                break;
            }
        }
        any
    }

    /// Step 3; with `busy`, only a look at what is ready.
    fn wait(&mut self, busy: bool) -> Option<End> {
        // While the socket or the ring is full, the TUN device is not worth waking up for.
        let (udp_flags, tun_flags) = match (self.outbound.blocked, self.outbound.ring_full) {
            (true, _) => (PollFlags::IN | PollFlags::OUT, PollFlags::empty()),
            (false, true) => (PollFlags::IN, PollFlags::empty()),
            (false, false) => (PollFlags::IN, PollFlags::IN),
        };
        // Nothing tells when a frame was sent, so a sender looks from time to time.
        let sending = self.lane.as_mut().is_some_and(|lane| lane.watch(clock::now()));
        let timeout = match (busy, self.outbound.ring_full, sending) {
            (true, ..) => Some(NO_PAUSE),
            (false, true, _) => Some(RING_FULL_PAUSE),
            (false, false, true) => Some(SENDING_PAUSE),
            (false, false, false) => None,
        };
        let mut fds: ArrayVec<PollFd<'_>, POLL_MAX> = ArrayVec::new();
        fds.push(PollFd::from_borrowed_fd(self.udp.as_fd(), udp_flags));
        fds.push(PollFd::from_borrowed_fd(self.tun.as_fd(), tun_flags));
        fds.push(PollFd::from_borrowed_fd(self.context.stop.as_fd(), PollFlags::IN));
        if let Some(lane) = &self.lane {
            fds.push(PollFd::from_borrowed_fd(lane.mailbox_fd(), PollFlags::IN));
            let sockets = lane.sockets().take(POLL_MAX - 2 - fds.len());
            fds.extend(sockets.map(|xsk| PollFd::from_borrowed_fd(xsk.as_fd(), PollFlags::IN)));
        }
        let lane_end = fds.len();
        let detour = self.detour.as_ref();
        fds.extend(detour.map(|detour| PollFd::from_borrowed_fd(detour.as_fd(), PollFlags::IN)));
        let detour_end = fds.len();
        let pulse = self.context.pulse.as_deref();
        fds.extend(pulse.map(|pulse| PollFd::from_borrowed_fd(pulse.as_fd(), PollFlags::IN)));
        // Interrupted is as good as woken: the next turn looks at everything.
        let _ = poll(&mut fds, timeout.as_ref());
        let is_broken = |fd: &PollFd<'_>| fd.revents().intersects(PollFlags::ERR | PollFlags::HUP);
        let writable = fds[0].revents().contains(PollFlags::OUT);
        let (tun_gone, stopped) = (is_broken(&fds[1]), !fds[2].revents().is_empty());
        let lane_broken = fds[3..lane_end].iter().skip(1).any(is_broken);
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        self.detoured = fds[lane_end..detour_end].iter().any(is_ready);
        let asked = fds[detour_end..].iter().any(is_ready);
        if let (true, Some(pulse)) = (asked, pulse) {
            pulse.answer();
        }
        drop(fds);
        if writable {
            self.outbound.blocked = false;
        }
        if lane_broken {
            self.empty_rings();
            let Self { context, udp, lane, .. } = self;
            lane.iter_mut()
                .for_each(|lane| lane.give_up(|frame| context.by_socket(udp).resend(frame)));
        }
        if tun_gone {
            return Some(End::TunGone);
        }
        stopped.then_some(End::Stopped)
    }
}

/// A datagram that is no data message: handshakes go to the slow thread, the rest is counted.
fn not_data(context: &Context, source: Endpoint, datagram: &[u8]) {
    let is_handshake = matches!(
        (datagram.first(), datagram.len()),
        (Some(1), INITIATION_LEN) | (Some(2), RESPONSE_LEN) | (Some(3), COOKIE_REPLY_LEN)
    );
    let reason = match (is_handshake, datagram.first()) {
        (true, _) => match Handshake::new(source, datagram) {
            Some(handshake) => return context.slow.push_handshake(handshake, &context.drops),
            None => Drop::RxTruncated,
        },
        (false, Some(1..=3)) => Drop::RxTruncated,
        _ => Drop::RxUnknownType,
    };
    context.drops.add(reason, 1);
}

/// From opened packets to the TUN device.
struct InnerPath<'w> {
    context: &'w Context,
    tun: &'w TunQueue,
    coalescer: &'w mut Coalescer,
    refused: &'w mut Vec<u8>,
    tables: &'w Tables,
}

impl InnerPath<'_> {
    /// Opens a batch and appends what it holds to `inner`, which is written first if it is full.
    /// Leaves `packets` empty.
    fn open<'a>(
        &mut self,
        packets: &mut ArrayVec<RxPacket<'a>, BATCH_PACKETS>,
        inner: &mut Opened<'a>,
    ) {
        if packets.is_empty() {
            return;
        }
        if packets.len() > inner.remaining_capacity() {
            self.write(inner);
        }
        let Context { shared, slow, drops, .. } = self.context;
        let mut events = |event| slow.push_event(event, drops);
        rx::open(shared, self.tables, clock::now(), packets, drops, &mut events, inner);
    }

    /// Merges and writes what was opened. Leaves `inner` empty.
    fn write(&mut self, inner: &mut Opened<'_>) {
        let offloads = &self.context.offloads;
        let options = CoalesceOptions {
            tcp: offloads.coalesce_tcp.is_on(),
            udp: offloads.coalesce_udp.is_on(),
        };
        let (tun, refused, context) = (self.tun, &mut *self.refused, self.context);
        self.coalescer.write(options, inner, &mut |vnet, slices| {
            write_inner(context, tun, refused, vnet, slices);
        });
        inner.clear();
    }
}

/// Writes one packet to the TUN device; a super-packet that it refuses goes again in pieces.
fn write_inner(
    context: &Context,
    tun: &TunQueue,
    refused: &mut Vec<u8>,
    vnet: VnetHdr,
    slices: &[IoSlice<'_>],
) {
    let header = vnet.to_bytes();
    let mut all: ArrayVec<IoSlice<'_>, SLICES_MAX> = ArrayVec::new();
    all.push(IoSlice::new(&header));
    if all.try_extend_from_slice(slices).is_err() {
        debug_assert!(false, "a merged packet has at most one slice a packet and its headers");
        context.drops.add(Drop::TunWriteFailed, 1);
        return;
    }
    match tun.write(&all) {
        Ok(()) => {}
        Err(error) if vnet.gso_type != VnetHdr::GSO_NONE && is_refusal(&error) => {
            let offload = if vnet.gso_type & !VnetHdr::GSO_ECN == VnetHdr::GSO_UDP_L4 {
                &context.offloads.coalesce_udp
            } else {
                &context.offloads.coalesce_tcp
            };
            offload.demote(format_args!("the TUN device refused a super-packet: {error}"));
            refused.clear();
            slices.iter().for_each(|slice| refused.extend_from_slice(slice));
            write_pieces(context, tun, vnet, refused);
        }
        Err(_) => context.drops.add(Drop::TunWriteFailed, 1),
    }
}

/// Cuts a super-packet in user space and writes each piece.
fn write_pieces(context: &Context, tun: &TunQueue, vnet: VnetHdr, packet: &[u8]) {
    let Some(plan) = Plan::new(vnet, packet) else {
        context.drops.add(Drop::TunWriteFailed, 1);
        return;
    };
    let header = VnetHdr::default().to_bytes();
    let mut piece = [0; u16::MAX as usize];
    for index in 0..plan.count() {
        let piece = &mut piece[..plan.len(index)];
        plan.write(index, piece);
        if tun.write(&[IoSlice::new(&header), IoSlice::new(piece)]).is_err() {
            context.drops.add(Drop::TunWriteFailed, 1);
        }
    }
}

/// The kernel does not take this form, as opposed to this packet or not now.
fn is_refusal(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP))
}

impl Outbound {
    /// Finishes what the socket or the ring stopped. False if it is still full.
    fn go_on(&mut self, out: &mut Out<'_>) -> bool {
        !self.blocked && (self.batch.is_empty() || self.flush(out))
    }

    /// Reads the TUN device until the batch is full or the device empty. True if the batch is full:
    /// flush it, there may be more.
    fn fill(&mut self, context: &Context, tun: &TunQueue) -> bool {
        let tables = context.shared.tables.load();
        // Only a packet that goes nowhere asks for the time.
        let mut now = None;
        for _ in 0..FILL_READS {
            let (len, resume) = match self.partial.take() {
                Some(partial) => partial,
                None => match tun.read(&mut self.packet) {
                    Ok(len) => (len, 0),
                    // Nothing there, or the interface is down or gone: the slow thread sees to it.
                    Err(_) => return false,
                },
            };
            let read = &self.packet[..len];
            let Some(vnet) = VnetHdr::parse(read) else {
                context.drops.add(Drop::TxInnerInvalid, 1);
                continue;
            };
            let packet = &read[VnetHdr::LEN..];
            let trouble = match self.batch.push(&tables, vnet, packet, resume, &context.drops) {
                Push::Done => continue,
                Push::Unroutable => Trouble::Unreachable,
                Push::TooLong { mtu } => Trouble::TooBig { mtu },
                Push::Full { resume } => {
                    self.partial = Some((len, resume));
                    return true;
                }
            };
            if self.icmp_limit.allow(*now.get_or_insert_with(clock::now))
                && let Some(answer) = IcmpError::answer(packet, trouble)
            {
                context.icmp.send(&answer);
            }
        }
        true
    }

    /// Seals the batch if that is still to do, and sends it. False if the socket became full.
    fn flush(&mut self, out: &mut Out<'_>) -> bool {
        let context = out.context;
        if self.batch.is_empty() {
            return true;
        }
        let now = clock::now();
        if self.sent == (0, 0) {
            let mut events = |event| context.slow.push_event(event, &context.drops);
            self.batch.seal(now, &context.drops, &mut events);
        }
        let (first, mut offset) = self.sent;
        self.ring_full = false;
        for (number, transmit) in self.batch.transmits().enumerate().skip(first) {
            let bytes = match out.send(&transmit, offset, now) {
                Sent::All => {
                    offset = 0;
                    continue;
                }
                Sent::Blocked(bytes) => {
                    self.blocked = true;
                    bytes
                }
                Sent::RingFull(bytes) => {
                    self.ring_full = true;
                    bytes
                }
            };
            self.sent = (number, bytes);
            out.flush_ring(now);
            return false;
        }
        out.flush_ring(now);
        self.batch.clear();
        self.sent = (0, 0);
        true
    }
}

/// Ways out for sealed packets.
struct Out<'w> {
    context: &'w Context,
    socket: BySocket<'w>,
    lane: Option<&'w mut Lane>,
    detour: Option<&'w Detour>,
}

impl Out<'_> {
    /// Sends `transmit` from byte `offset` on: into a ring, or by socket where the lane cannot.
    fn send(&mut self, transmit: &Transmit<'_>, offset: usize, now: Instant) -> Sent {
        if let Some(slot) = transmit.endpoint.detour_slot() {
            self.detour(slot, transmit);
            return Sent::All;
        }
        if let Some(lane) = &mut self.lane {
            match lane.send(transmit, offset, now) {
                lane::Sent::All => return Sent::All,
                lane::Sent::Full(bytes) => return Sent::RingFull(bytes),
                lane::Sent::Elsewhere => {}
            }
        }
        match self.socket.send(transmit, offset) {
            by_socket::Sent::All => Sent::All,
            by_socket::Sent::Blocked(bytes) => Sent::Blocked(bytes),
        }
    }

    /// Never to the wire, whatever happens: control has it, or nobody.
    #[cold]
    fn detour(&self, slot: PeerSlot, transmit: &Transmit<'_>) {
        let Transmit { segment_len, bytes, .. } = *transmit;
        match self.detour {
            Some(detour) => detour.send(slot, segment_len, bytes, &self.context.drops),
            None => {
                let packets = bytes.len().div_ceil(segment_len.max(1));
                self.context.drops.add(Drop::DetourGone, packets as u64);
            }
        }
    }

    fn flush_ring(&mut self, now: Instant) {
        if let Some(lane) = &mut self.lane {
            lane.flush(now);
        }
    }
}
