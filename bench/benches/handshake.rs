//! Handshake messages as the slow thread handles them, each whole: what a peer costs, and what a
//! message costs that is refused, because under a flood that is all that is done.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot make its input must stop")]
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{self, Duration};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use millrace_wg::cookie::{CookieChecker, CookieJar};
use millrace_wg::device::{Device, DeviceConfig, Output, PeerChange};
use millrace_wg::limits::{MTU_DEFAULT, REJECT_AFTER_TIME, UNDER_LOAD_QUEUE};
use millrace_wg::message::{CookieReply, MAC_LEN};
use millrace_wg::secret::Secret;
use millrace_wg::time::Clock;
use millrace_wg::{Drop, DropCounters, Endpoint, FastEvent, Instant, PeerSlot, PublicKey, Shared};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use zerocopy::FromBytes;

criterion_group! {
    name = handshake;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(150))
        .measurement_time(Duration::from_millis(500))
        .sample_size(30)
        .nresamples(10_000);
    targets = accepted, refused, cookies
}
criterion_main!(handshake);

/// Between two handshakes every session expires, so that each is wanted.
const STEP: Duration = REJECT_AFTER_TIME.saturating_add(Duration::from_secs(1));
const PEER: PeerSlot = PeerSlot(0);

fn accepted(criterion: &mut Criterion) {
    let mut group = group(criterion, "handshake");
    let mut pair = Pair::new();
    let parts: [(&str, Part); 3] = [
        ("initiation: make", |cost| cost.make),
        ("initiation: read and answer, new session", |cost| cost.answer),
        ("response: read, new session, keepalive", |cost| cost.finish),
    ];
    for (name, part) in parts {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| (0..iterations).map(|_| part(pair.shake())).sum());
        });
    }
}

fn refused(criterion: &mut Criterion) {
    let mut group = group(criterion, "handshake refused");
    let mut pair = Pair::new();
    pair.shake();
    // Answered, and not yet finished by the initiator.
    let initiation = pair.initiate();
    let response = pair.answer(&initiation);
    let mut stranger = End::new(3);
    stranger.add_peer(pair.clock, &pair.responder);

    let Pair { initiator, responder, clock } = &mut pair;
    let mut measure = |name, end: &mut End, message: &[u8], reason| {
        end.refuses(*clock, message, 0, reason);
        group.bench_function(name, |bencher| {
            bencher.iter(|| end.refuses(*clock, message, 0, reason));
        });
    };
    let mut other = initiation.clone();
    flip(&mut other, MAC1_FROM_END);
    measure("initiation: mac1 wrong", responder, &other, Drop::HsMac1Invalid);
    let mut forged = initiation.clone();
    flip(&mut forged, STATIC_FROM_END);
    CookieJar::new(&responder.public).stamp(clock.now, &mut forged);
    measure("initiation: static key forged", responder, &forged, Drop::HsInvalid);
    let strange = stranger.initiates(*clock);
    measure("initiation: peer unknown", responder, &strange, Drop::HsUnknownPeer);
    measure("initiation: replayed", responder, &initiation, Drop::HsReplayed);
    let mut forged = response.clone();
    flip(&mut forged, TAG_FROM_END);
    CookieJar::new(&initiator.public).stamp(clock.now, &mut forged);
    measure("response: forged", initiator, &forged, Drop::HsInvalid);
    let mut late = response;
    flip(&mut late, INDEX_FROM_RESPONSE_END);
    CookieJar::new(&initiator.public).stamp(clock.now, &mut late);
    measure("response: not asked for", initiator, &late, Drop::HsUnexpected);
}

fn cookies(criterion: &mut Criterion) {
    let mut group = group(criterion, "cookies");
    let mut pair = Pair::new();
    let mut initiation = pair.initiate();
    let Pair { responder, clock, .. } = &mut pair;
    let checker = CookieChecker::new(&responder.public);
    assert!(checker.has_mac1(&initiation));
    group.bench_function("mac1 alone", |bencher| {
        bencher.iter(|| checker.has_mac1(black_box(&initiation)));
    });
    group.bench_function("under load: answer with a cookie", |bencher| {
        bencher.iter(|| {
            responder.refuses(*clock, &initiation, UNDER_LOAD_QUEUE, Drop::HsMac2Needed);
            black_box(responder.next_sent())
        });
    });
    let mut jar = CookieJar::new(&responder.public);
    responder.refuses(*clock, &initiation, UNDER_LOAD_QUEUE, Drop::HsMac2Needed);
    let reply = CookieReply::read_from_bytes(&responder.next_sent().unwrap()).unwrap();
    group.bench_function("read a cookie", |bencher| {
        bencher.iter_custom(|iterations| {
            let accept = |_| {
                jar.stamp(clock.now, &mut initiation);
                let start = time::Instant::now();
                assert!(jar.accept(clock.now, &reply));
                start.elapsed()
            };
            (0..iterations).map(accept).sum()
        });
    });
    jar.stamp(clock.now, &mut initiation);
    while responder.drops.get(Drop::HsRateLimited) == 0 {
        responder.take(*clock, &initiation, UNDER_LOAD_QUEUE);
    }
    responder.forget_outputs();
    group.bench_function("under load: cookie good, rate used up", |bencher| {
        bencher.iter(|| {
            responder.refuses(*clock, &initiation, UNDER_LOAD_QUEUE, Drop::HsRateLimited);
        });
    });
}

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(1));
    group
}

/// Where a flipped bit makes a message wrong in one way, counted from the end: both macs are the
/// last 32 bytes of a message. In an initiation the sealed timestamp (28) and static key (48)
/// stand before them, in a response the tag (16) and ephemeral key (32), then the index (4).
const MAC1_FROM_END: usize = 2 * MAC_LEN;
const STATIC_FROM_END: usize = 2 * MAC_LEN + 28 + 48;
const TAG_FROM_END: usize = 2 * MAC_LEN + 16;
const INDEX_FROM_RESPONSE_END: usize = 2 * MAC_LEN + 16 + 32 + 4;

fn flip(message: &mut [u8], from_end: usize) {
    let at = message.len() - from_end;
    message[at] ^= 1;
}

/// An initiator and a responder that know each other, and the time for both.
struct Pair {
    initiator: End,
    responder: End,
    clock: Clock,
}

/// Of one handshake.
struct Cost {
    make: Duration,
    answer: Duration,
    finish: Duration,
}

type Part = fn(Cost) -> Duration;

impl Pair {
    fn new() -> Self {
        let clock = Clock { now: Instant::from_nanos(1), wall: Duration::from_secs(1_700_000_000) };
        let (mut initiator, mut responder) = (End::new(1), End::new(2));
        initiator.add_peer(clock, &responder);
        responder.add_peer(clock, &initiator);
        Self { initiator, responder, clock }
    }

    /// A whole handshake, long after the one before.
    fn shake(&mut self) -> Cost {
        let start = time::Instant::now();
        let initiation = self.initiate();
        let make = start.elapsed();
        let start = time::Instant::now();
        let response = self.answer(&initiation);
        let answer = start.elapsed();
        let start = time::Instant::now();
        self.initiator.take(self.clock, &response, 0);
        let finish = start.elapsed();
        let keepalive = self.initiator.next_sent();
        assert!(keepalive.is_some_and(|bytes| bytes[0] == 4), "the handshake works");
        for end in [&mut self.initiator, &mut self.responder] {
            end.forget_outputs();
        }
        Cost { make, answer, finish }
    }

    fn initiate(&mut self) -> Vec<u8> {
        self.clock.now = self.clock.now + STEP;
        self.clock.wall += STEP;
        self.initiator.initiates(self.clock)
    }

    fn answer(&mut self, initiation: &[u8]) -> Vec<u8> {
        self.responder.take(self.clock, initiation, 0);
        self.responder.next_sent().unwrap()
    }
}

struct End {
    device: Device,
    drops: Arc<DropCounters>,
    public: PublicKey,
}

impl End {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let private = Secret::generate_private_key(&mut rng);
        let (public, drops) = (private.public_key(), Arc::new(DropCounters::default()));
        let config = DeviceConfig {
            mtu: MTU_DEFAULT,
            newest_timestamp: None,
            drops: Arc::clone(&drops),
            paths: None,
        };
        let mut device = Device::new(config, Arc::new(Shared::new(64)), Box::new(rng));
        let clock = Clock { now: Instant::from_nanos(1), wall: Duration::ZERO };
        device.set_private_key(clock, Some(private));
        Self { device, drops, public }
    }

    fn add_peer(&mut self, clock: Clock, other: &Self) {
        let change = PeerChange { endpoint: Some(endpoint()), ..PeerChange::default() };
        self.device.set_peer(clock, other.public, change).unwrap();
        self.forget_outputs();
    }

    fn initiates(&mut self, clock: Clock) -> Vec<u8> {
        self.device.handle_event(clock, FastEvent::HandshakeWanted(PEER));
        self.next_sent().unwrap()
    }

    /// `waiting`: how many messages wait behind it.
    fn take(&mut self, clock: Clock, message: &[u8], waiting: usize) {
        self.device.handle_datagram(clock, endpoint(), message, waiting);
    }

    /// Panics if the message is not dropped for just this `reason`.
    fn refuses(&mut self, clock: Clock, message: &[u8], waiting: usize, reason: Drop) {
        let before = self.drops.get(reason);
        self.take(clock, message, waiting);
        assert_eq!(self.drops.get(reason), before + 1, "{reason:?}");
    }

    fn next_sent(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Output::Transmit { bytes, .. } = self.device.poll_output()? {
                return Some(bytes);
            }
        }
    }

    fn forget_outputs(&mut self) {
        while self.device.poll_output().is_some() {}
    }
}

fn endpoint() -> Endpoint {
    let address = IpAddr::from(Ipv4Addr::new(192, 0, 2, 1));
    Endpoint { remote: SocketAddr::new(address, 51820), local: None, ifindex: 0 }
}
