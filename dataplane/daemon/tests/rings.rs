//! Our AF_XDP rings against xsk-rs, which shares no code with them, over veth in copy mode.
//! Functional only: nothing here says anything about speed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant as Clock};

use millrace_dataplane::io::xsk::{Mode, QUEUE_FRAMES, RX_RING, Xsk, bind_queues};
use millrace_dataplane::io::xsk_ledger::{Ledger, Statistics};
use millrace_lab::{Lab, Namespace, XskPeer, lab};
use millrace_wg::Instant;
use millrace_wg::limits::BATCH_PACKETS;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const LIMIT: Duration = Duration::from_secs(20);

/// Two namespaces, our sockets on every queue of one end.
struct Bench {
    ours: Vec<Xsk>,
    peers: Vec<XskPeer>,
    start: Clock,
    ledger: Arc<Ledger>,
    _program: RedirectAll,
    _namespaces: [Namespace; 2],
    _lab: Lab,
}

impl Bench {
    fn new(queues: u32) -> Self {
        let lab = Lab::new().unwrap();
        let (a, b) = (lab.namespace("ours").unwrap(), lab.namespace("theirs").unwrap());
        if queues == 1 {
            lab::link((&a, "veth0"), (&b, "veth1")).unwrap();
        } else {
            let count = format!("numtxqueues {queues} numrxqueues {queues}");
            a.ip([
                format!("link add veth0 {count} type veth peer name veth1 {count}"),
                format!("link set veth1 netns {}", b.path()),
                "link set veth0 up".into(),
            ])
            .unwrap();
            b.ip(["link set veth1 up"]).unwrap();
        }
        // No neighbour discovery among the frames that are counted.
        a.sysctl("net/ipv6/conf/veth0/disable_ipv6", "1").unwrap();
        b.sysctl("net/ipv6/conf/veth1/disable_ipv6", "1").unwrap();
        let ledger = Arc::new(Ledger::default());
        let (ours, program) = a.run(|| {
            let ifindex = ifindex("veth0");
            let program = RedirectAll::attach(ifindex).unwrap();
            let ours = bind_queues(&ledger, ifindex, queues, Mode::Copy, 2048).unwrap();
            for (queue, xsk) in (0..).zip(&ours) {
                program.set(queue, xsk.as_fd()).unwrap();
            }
            (ours, program)
        });
        let peers = b.run(|| (0..queues).map(|q| XskPeer::new("veth1", q).unwrap()).collect());
        let namespaces = [a, b];
        Self {
            ours,
            peers,
            start: Clock::now(),
            ledger,
            _program: program,
            _namespaces: namespaces,
            _lab: lab,
        }
    }

    fn now(&self) -> Instant {
        Instant::from_nanos(self.start.elapsed().as_nanos() as u64)
    }

    /// Receives on our queue until `count` frames came, and calls `each` with every one.
    fn take(&mut self, queue: usize, count: usize, mut each: impl FnMut(usize, &mut [u8])) {
        let (mut taken, deadline) = (0, Clock::now() + LIMIT);
        while taken < count {
            let xsk = &mut self.ours[queue];
            let mut batch = xsk.receive();
            for frame in batch.frames() {
                each(taken, frame);
                taken += 1;
            }
            let empty = batch.is_empty();
            drop(batch);
            if empty {
                assert!(Clock::now() < deadline, "{taken} of {count} frames came");
                let mut fds = [PollFd::from_borrowed_fd(xsk.as_fd(), PollFlags::IN)];
                poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 })).unwrap();
            }
        }
    }

    /// Sends all frames on our queue, waiting for room where there is none.
    fn give(&mut self, queue: usize, frames: &[Vec<u8>]) {
        let deadline = Clock::now() + LIMIT;
        for frame in frames {
            loop {
                let now = self.now();
                let xsk = &mut self.ours[queue];
                if xsk.send_room(now) > 0 {
                    assert!(xsk.send(frame.len(), now, |room| room.copy_from_slice(frame)));
                    break;
                }
                xsk.flush(now).unwrap();
                assert!(Clock::now() < deadline);
            }
        }
        let now = self.now();
        self.ours[queue].flush(now).unwrap();
    }

    /// All that was sent is complete, and every frame is where it must be.
    fn settle(&mut self) {
        let deadline = Clock::now() + LIMIT;
        for queue in 0..self.ours.len() {
            while self.ours[queue].outstanding() > 0 {
                let now = self.now();
                self.ours[queue].watch(now).unwrap();
                assert!(Clock::now() < deadline, "sent frames were never completed");
            }
            let counts = self.ours[queue].frame_counts();
            assert_eq!((counts.held, counts.sent), (0, 0));
            assert_eq!(counts.total(), QUEUE_FRAMES);
            assert_eq!(self.ours[queue].take_refused(), 0);
            let statistics = self.ours[queue].statistics().unwrap();
            assert_eq!((statistics.rx_invalid, statistics.tx_invalid), (0, 0));
        }
    }
}

/// A frame of a protocol that nobody speaks; its bytes tell its number.
fn frame(number: usize, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at * 7 + number * 13) as u8).collect();
    bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes[14..22].copy_from_slice(&(number as u64).to_be_bytes());
    bytes
}

fn every_length() -> Vec<Vec<u8>> {
    (60..=1514).map(|len| frame(len, len)).collect()
}

#[test]
fn every_length_arrives_whole_in_both_directions() {
    let mut bench = Bench::new(1);
    let frames = every_length();
    // Less than the ring holds at once, so that nothing can be lost.
    for part in frames.chunks(500) {
        bench.peers[0].send(part, LIMIT).unwrap();
        bench.take(0, part.len(), |i, bytes| assert!(bytes == part[i], "length {}", part[i].len()));
        bench.give(0, part);
        assert_eq!(drain(&mut bench.peers[0], part.len()), part);
    }
    bench.settle();
}

#[test]
fn a_hundred_thousand_frames_wrap_the_rings_and_none_is_lost_or_leaked() {
    let mut bench = Bench::new(1);
    for round in 0..200 {
        let frames: Vec<_> = (0..250).map(|i| frame(round * 250 + i, 60 + i)).collect();
        bench.peers[0].send(&frames, LIMIT).unwrap();
        bench.take(0, frames.len(), |i, bytes| assert!(bytes == frames[i], "frame {i}"));
        bench.give(0, &frames);
        assert_eq!(drain(&mut bench.peers[0], frames.len()), frames);
    }
    bench.settle();
}

#[test]
fn a_receiver_that_sleeps_loses_frames_but_no_memory() {
    let mut bench = Bench::new(1);
    // More than the receive ring and all lent frames, while nobody takes any.
    let frames: Vec<_> = (0..6000).map(|i| frame(i, 100)).collect();
    bench.peers[0].send(&frames, LIMIT).unwrap();
    let statistics = bench.ours[0].statistics().unwrap();
    let lost = statistics.rx_ring_full + statistics.fill_ring_empty + statistics.rx_dropped;
    assert!(lost > 0, "the ring is not endless: {statistics:?}");
    bench.take(0, 1000, |i, bytes| assert!(bytes == frames[i], "frame {i}"));
    while !bench.ours[0].receive().is_empty() {}
    bench.settle();
    // And it goes on.
    bench.peers[0].send(&frames[..500], LIMIT).unwrap();
    bench.take(0, 500, |i, bytes| assert!(bytes == frames[i], "frame {i}"));
    bench.settle();
}

#[test]
fn the_ledger_remembers_what_closed_sockets_lost() {
    let mut bench = Bench::new(1);
    let frames: Vec<_> = (0..3000).map(|i| frame(i, 100)).collect();
    bench.peers[0].send(&frames, LIMIT).unwrap();
    let all = || {
        let sum = bench.ledger.sum().unwrap();
        let dropped = sum.rx_ring_full + sum.rx_dropped;
        (dropped + u64::from(RX_RING) == 3000).then_some(sum)
    };
    let open = millrace_lab::wait_for("3,000 frames in the books", LIMIT, all).unwrap();
    bench.take(0, 1000, |i, bytes| assert!(bytes == frames[i], "frame {i}"));
    bench.ours.clear();
    // Taken in whole batches, the last of which reaches past 1,000.
    let taken = 1000_u64.next_multiple_of(BATCH_PACKETS as u64);
    let rx_abandoned = u64::from(RX_RING) - taken;
    assert_eq!(bench.ledger.sum().unwrap(), Statistics { rx_abandoned, ..open });
}

#[test]
fn two_queues_share_one_memory() {
    let mut bench = Bench::new(2);
    for queue in 0..2 {
        // Frames of one queue must not touch those of the other.
        let frames: Vec<_> = (0..500).map(|i| frame(queue * 1000 + i, 60 + i)).collect();
        bench.peers[queue].send(&frames, LIMIT).unwrap();
        bench.take(queue, frames.len(), |i, bytes| assert!(bytes == frames[i], "frame {i}"));
        bench.give(queue, &frames);
        assert_eq!(drain(&mut bench.peers[queue], frames.len()), frames);
        assert!(bench.ours[1 - queue].receive().is_empty());
    }
    bench.settle();
}

#[test]
fn a_queue_can_be_bound_again_at_once() {
    let mut bench = Bench::new(1);
    for _ in 0..3 {
        let ifindex = bench.ours[0].place().ifindex;
        bench.ours.clear();
        let program = &bench._program;
        let bound =
            bench._namespaces[0].run(|| bind_queues(&Arc::default(), ifindex, 1, Mode::Copy, 4096));
        bench.ours = bound.unwrap();
        program.set(0, bench.ours[0].as_fd()).unwrap();
        bench.peers[0].send(&[frame(1, 1514)], LIMIT).unwrap();
        bench.take(0, 1, |_, bytes| assert!(bytes == frame(1, 1514)));
    }
    bench.settle();
}

#[test]
fn veth_has_no_zero_copy_and_says_so() {
    let lab = Lab::new().unwrap();
    let (a, b) = (lab.namespace("a").unwrap(), lab.namespace("b").unwrap());
    lab::link((&a, "veth0"), (&b, "veth1")).unwrap();
    let error = a
        .run(|| bind_queues(&Arc::default(), ifindex("veth0"), 1, Mode::ZeroCopy, 4096))
        .unwrap_err();
    assert!(error.to_string().contains("does not offer ZeroCopy mode on queue 0"), "{error}");
}

/// What the peer received, at least `count` frames.
fn drain(peer: &mut XskPeer, count: usize) -> Vec<Vec<u8>> {
    let (mut frames, deadline) = (Vec::new(), Clock::now() + LIMIT);
    while frames.len() < count {
        frames.extend(peer.receive(Duration::from_millis(50)).unwrap());
        assert!(Clock::now() < deadline, "{} of {count} frames came", frames.len());
    }
    frames
}

/// In the calling thread's namespace.
fn ifindex(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "there is no interface {name:?}");
    index
}

/// An XDP program that redirects every frame of a queue to its socket, or passes it: the few
/// instructions that need no compiler. It is detached when this is dropped.
struct RedirectAll {
    map: OwnedFd,
    _link: OwnedFd,
}

#[repr(C, align(8))]
struct Attributes([u8; 128]);

impl RedirectAll {
    fn attach(ifindex: u32) -> io::Result<Self> {
        // type XSKMAP, key 4, value 4, entries 4
        let map = bpf(0, &[(0, 17), (4, 4), (8, 4), (12, 4)], &[])?;
        let instruction = |code: u8, registers: u8, immediate: i32| {
            let [a, b, c, d] = immediate.to_ne_bytes();
            [code, registers, 0, 0, a, b, c, d]
        };
        let mut load_queue = instruction(0x61, 0x12, 0);
        load_queue[2] = 16; // r2 = xdp_md.rx_queue_index
        let program: Vec<u8> = [
            load_queue,
            instruction(0x18, 0x11, map.as_raw_fd()), // r1 = map
            instruction(0, 0, 0),
            instruction(0xb7, 0x03, 2),  // r3 = XDP_PASS
            instruction(0x85, 0x00, 51), // bpf_redirect_map
            instruction(0x95, 0x00, 0),
        ]
        .concat();
        let license = c"GPL";
        let pointers = [(8, program.as_ptr() as u64), (16, license.as_ptr() as u64)];
        let count = (program.len() / 8) as u32;
        let program = bpf(5, &[(0, 6), (4, count)], &pointers)?;
        // BPF_LINK_CREATE, attach type BPF_XDP, native mode
        let native = 4;
        let words = [(0, program.as_raw_fd() as u32), (4, ifindex), (8, 37), (12, native)];
        Ok(Self { map, _link: bpf(28, &words, &[])? })
    }

    fn set(&self, queue: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let value = socket.as_raw_fd();
        let pointers = [(8, (&raw const queue) as u64), (16, (&raw const value) as u64)];
        let mut attributes = attributes(&[(0, self.map.as_raw_fd() as u32)], &pointers);
        // SAFETY: BPF_MAP_UPDATE_ELEM reads four bytes behind each of the two pointers.
        let done = unsafe { libc::syscall(libc::SYS_bpf, 2, &raw mut attributes, 128) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn attributes(words: &[(usize, u32)], pointers: &[(usize, u64)]) -> Attributes {
    let mut attributes = Attributes([0; 128]);
    for (at, word) in words {
        attributes.0[*at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    for (at, pointer) in pointers {
        attributes.0[*at..at + 8].copy_from_slice(&pointer.to_ne_bytes());
    }
    attributes
}

/// A bpf(2) call that makes a descriptor.
fn bpf(command: i64, words: &[(usize, u32)], pointers: &[(usize, u64)]) -> io::Result<OwnedFd> {
    let mut attributes = attributes(words, pointers);
    // SAFETY: all pointers in the attributes are to values that the caller keeps.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attributes, 128) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
