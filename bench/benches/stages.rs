//! The stages of the data path in memory, one after the other and as whole pipelines. Each figure
//! is for a whole batch; criterion divides it by the packets ("elements") for its throughput, and
//! `cargo run --release -p millrace-bench --bin stages` prints ns per packet.
//!
//! `transmit` and `receive` are all that a worker does between its system calls. The groups
//! `… without aead` are their share that is not cryptography: each iteration runs the pipeline,
//! then the AEAD alone on packets of the same lengths, and counts the difference, so that whatever
//! slows the machine for a while slows both.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot make its input must stop")]
#![forbid(unsafe_code)]

mod traffic;

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use ipnet::Ipv4Net;
use millrace_aead::{OpenJob, OpeningKey, SealJob, SealingKey, open_batch, seal_batch};
use millrace_ebpf::class::classify;
use millrace_wg::allowed_ips::AllowedIps;
use millrace_wg::coalesce::{CoalesceOptions, Coalescer};
use millrace_wg::limits::{BATCH_PACKETS, MTU_DEFAULT, TAG_LEN};
use millrace_wg::replay::ReplayWindow;
use millrace_wg::segment::Plan;
use millrace_wg::tx::padded_len;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use traffic::{KEY, SIZES, TunPacket, Tunnels, finished, single_packets, super_packet};

criterion_group! {
    name = stages;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(150))
        .measurement_time(Duration::from_millis(500))
        .sample_size(30)
        .nresamples(10_000);
    targets = seal, open, route, replay, segment, coalesce, classification, transmit, receive
}
criterion_main!(stages);

/// Packets of a worst case: each to or from another peer.
const PEERS: usize = BATCH_PACKETS;

fn seal(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("seal");
    for (size, lens) in SIZES {
        let mut aead = Aead::new(lens);
        measure(&mut group, "aead", size, lens.len(), || aead.seal());
    }
}

fn open(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("open");
    for (size, lens) in SIZES {
        let mut aead = Aead::new(lens);
        measure(&mut group, "aead", size, lens.len(), || aead.open());
    }
}

/// Longest-prefix match of addresses that are all covered, each somewhere else in the table.
fn route(criterion: &mut Criterion) {
    const LOOKUPS: usize = 4096;
    let mut group = criterion.benchmark_group("route");
    for (name, prefixes) in [("100", 100), ("10k", 10_000), ("200k", 200_000)] {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut table = AllowedIps::default();
        let mut networks = Vec::new();
        while table.len() < prefixes {
            // Sites of 256 addresses, single hosts, and some larger networks around them.
            let bits = [24, 24, 24, 32, 32, 32, 32, 28, 20, 16][rng.random_range(0..10)];
            let network = Ipv4Net::new(Ipv4Addr::from(rng.random::<u32>()), bits).unwrap().trunc();
            table.insert(network.into(), table.len());
            networks.push(network);
        }
        let addresses: Vec<IpAddr> = (0..LOOKUPS)
            .map(|_| {
                let network = networks[rng.random_range(0..networks.len())];
                let host = rng.random::<u32>() & u32::from(network.hostmask());
                Ipv4Addr::from(u32::from(network.network()) | host).into()
            })
            .collect();
        assert!(addresses.iter().all(|&address| table.lookup(address).is_some()));
        group.throughput(Throughput::Elements(LOOKUPS as u64));
        group.bench_function(BenchmarkId::new("prefixes", name), |bencher| {
            bencher.iter(|| {
                for &address in &addresses {
                    black_box(table.lookup(address));
                }
            });
        });
    }
}

/// Both questions that the receiving side asks of the window for each packet.
fn replay(criterion: &mut Criterion) {
    let batch = BATCH_PACKETS as u64;
    let mut group = criterion.benchmark_group("replay");
    group.throughput(Throughput::Elements(batch));
    // Within each batch the even counters come before the odd ones.
    let overtaken = |nth: u64| nth % (batch / 2) * 2 + nth / (batch / 2);
    let orders: [(&str, &dyn Fn(u64) -> u64); 2] =
        [("in order", &|nth| nth), ("overtaking", &overtaken)];
    for (name, order) in orders {
        let (mut window, mut first) = (ReplayWindow::default(), 0);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for nth in 0..batch {
                    let counter = black_box(first + order(nth));
                    assert!(window.may_accept(counter) && window.accept(counter));
                }
                first += batch;
            });
        });
    }
    let mut window = ReplayWindow::default();
    assert!((0..batch).all(|counter| window.accept(counter)));
    group.bench_function("replayed", |bencher| {
        bencher.iter(|| (0..batch).any(|counter| window.may_accept(black_box(counter))));
    });
}

/// Super-packets cut, and single packets copied; checksums completed in both.
fn segment(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("segment");
    let mut room = vec![0; 1 << 16];
    for (kind, size, packets, count) in tun_reads().filter(|(kind, ..)| *kind != KIND_PEERS) {
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new(kind, size), |bencher| {
            bencher.iter(|| {
                for (vnet, packet) in &packets {
                    let plan = Plan::new(*vnet, packet).unwrap();
                    for index in 0..plan.count() {
                        plan.write(index, &mut room[..plan.len(index)]);
                    }
                }
                black_box(&room);
            });
        });
    }
}

/// One flow that merges into one super-packet (of the mix: one each length), and packets of as many
/// flows as there are packets.
fn coalesce(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("coalesce");
    let mut coalescer = Coalescer::new();
    for (kind, peers, size, lens) in kinds("merging", "64 flows") {
        let packets = finished(&single_packets(lens, peers));
        let mut copies = packets.clone();
        measure(&mut group, kind, size, lens.len(), || {
            restore(&mut copies, &packets);
            let mut inner: ArrayVec<&mut [u8], BATCH_PACKETS> =
                copies.iter_mut().map(Vec::as_mut_slice).collect();
            let start = Instant::now();
            let options = CoalesceOptions { tcp: true, udp: true };
            coalescer.write(options, &mut inner, &mut |vnet, slices| {
                black_box((vnet, slices));
            });
            start.elapsed()
        });
    }
}

/// The Rust twin of the eBPF classifier looks at eight bytes and the length.
fn classification(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("classify");
    for (size, lens) in SIZES {
        let datagrams = Tunnels::new(1).datagrams(&single_packets(lens, 1));
        group.throughput(Throughput::Elements(datagrams.len() as u64));
        group.bench_function(BenchmarkId::new("data", size), |bencher| {
            bencher.iter(|| {
                for datagram in &datagrams {
                    black_box(classify(black_box(datagram)));
                }
            });
        });
    }
}

fn transmit(criterion: &mut Criterion) {
    for without_aead in [false, true] {
        let name = if without_aead { "transmit without aead" } else { "transmit" };
        let mut group = criterion.benchmark_group(name);
        for (kind, size, packets, count) in tun_reads() {
            let peers = if kind == KIND_PEERS { PEERS } else { 1 };
            let mut tunnels = Tunnels::new(peers);
            let lens: Vec<usize> = finished(&packets).iter().map(Vec::len).collect();
            let mut aead = Aead::new(&lens);
            measure(&mut group, kind, size, count, || {
                let start = Instant::now();
                tunnels.transmit(&packets, |transmit| {
                    black_box((transmit.bytes.len(), transmit.endpoint));
                });
                let pipeline = start.elapsed();
                if without_aead { pipeline.saturating_sub(aead.seal()) } else { pipeline }
            });
            tunnels.assert_nothing_dropped();
        }
    }
}

fn receive(criterion: &mut Criterion) {
    for without_aead in [false, true] {
        let name = if without_aead { "receive without aead" } else { "receive" };
        let mut group = criterion.benchmark_group(name);
        for (kind, peers, size, lens) in kinds("merging", KIND_PEERS) {
            let mut tunnels = Tunnels::new(peers);
            let datagrams = tunnels.datagrams(&single_packets(lens, peers));
            let mut copies = datagrams.clone();
            let mut aead = Aead::new(lens);
            measure(&mut group, kind, size, lens.len(), || {
                restore(&mut copies, &datagrams);
                tunnels.forget_counters();
                let start = Instant::now();
                tunnels.receive(&mut copies, |vnet, slices| {
                    black_box((vnet, slices));
                });
                let pipeline = start.elapsed();
                if without_aead { pipeline.saturating_sub(aead.open()) } else { pipeline }
            });
            tunnels.assert_nothing_dropped();
        }
    }
}

/// What is read from the TUN device: kind, size, packets, and how many inner packets they make.
fn tun_reads() -> impl Iterator<Item = (&'static str, &'static str, Vec<TunPacket>, usize)> {
    let equal = |lens: &[usize]| lens.iter().all(|len| *len == lens[0]);
    let large = SIZES.into_iter().filter(move |(_, lens)| equal(lens)).map(|(size, lens)| {
        let packets = vec![super_packet(lens[0], lens.len())];
        ("super-packet", size, packets, lens.len())
    });
    let single = kinds("single packets", KIND_PEERS)
        .map(|(kind, peers, size, lens)| (kind, size, single_packets(lens, peers), lens.len()));
    large.chain(single)
}

/// Every size as `one` flow, and as packets of [`PEERS`] others where their number matters most.
fn kinds(
    one: &'static str,
    many: &'static str,
) -> impl Iterator<Item = (&'static str, usize, &'static str, &'static [usize])> {
    let one = SIZES.into_iter().map(move |(size, lens)| (one, 1, size, lens));
    let many = SIZES.into_iter().map(move |(size, lens)| (many, PEERS, size, lens));
    one.chain(many.filter(|(_, _, size, _)| ["64", "imix"].contains(size)))
}

const KIND_PEERS: &str = "64 peers";

/// The AEAD alone, on packets as long as inner packets of certain lengths are when padded.
struct Aead {
    sealing: SealingKey,
    opening: OpeningKey,
    sealed: Vec<Vec<u8>>,
    packets: Vec<Vec<u8>>,
}

impl Aead {
    fn new(inner_lens: &[usize]) -> Self {
        let sealing = SealingKey::new(KEY);
        let packet_len = |&len: &usize| padded_len(len, MTU_DEFAULT.into()) + TAG_LEN;
        let packets: Vec<Vec<u8>> =
            inner_lens.iter().map(|len| vec![0xab; packet_len(len)]).collect();
        let mut sealed = packets.clone();
        for packet in &mut sealed {
            sealing.seal(0, packet);
        }
        Self { sealing, opening: OpeningKey::new(KEY), sealed, packets }
    }

    fn seal(&mut self) -> Duration {
        let key = &self.sealing;
        let mut jobs: ArrayVec<SealJob<'_>, BATCH_PACKETS> =
            self.packets.iter_mut().map(|packet| SealJob { key, counter: 0, packet }).collect();
        let start = Instant::now();
        seal_batch(&mut jobs);
        start.elapsed()
    }

    fn open(&mut self) -> Duration {
        restore(&mut self.packets, &self.sealed);
        let key = &self.opening;
        let job = |packet| OpenJob { key, counter: 0, packet, verified: false };
        let mut jobs: ArrayVec<OpenJob<'_>, BATCH_PACKETS> =
            self.packets.iter_mut().map(|packet| job(packet)).collect();
        let start = Instant::now();
        open_batch(&mut jobs);
        let elapsed = start.elapsed();
        assert!(jobs.iter().all(|job| job.verified));
        elapsed
    }
}

/// Makes `copies` what they were before they were worked on in place.
fn restore(copies: &mut [Vec<u8>], originals: &[Vec<u8>]) {
    for (copy, original) in copies.iter_mut().zip(originals) {
        copy.copy_from_slice(original);
    }
}

/// One line of a group: `batch` prepares and works on `packets` packets, and returns the time of
/// the work alone.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    kind: &str,
    size: &str,
    packets: usize,
    mut batch: impl FnMut() -> Duration,
) {
    group.throughput(Throughput::Elements(packets as u64));
    group.bench_function(BenchmarkId::new(kind, size), |bencher| {
        bencher.iter_custom(|iterations| (0..iterations).map(|_| batch()).sum());
    });
}
