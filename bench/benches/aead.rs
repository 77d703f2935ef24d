//! The AEAD's back-ends under criterion, which compares with the run before: `cargo bench -p
//! millrace-bench --bench aead -- seal/1420`. Beside other libraries, and for tables, there is the
//! program `aead`.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot make its input must stop")]
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use millrace_aead::{Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN};

criterion_group! {
    name = aead;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .sample_size(30)
        .nresamples(10_000);
    targets = seal, open
}
criterion_main!(aead);

/// Bytes of text: the smallest packets, middle ones, the fullest that Ethernet carries, large ones.
const LENGTHS: [usize; 4] = [64, 576, 1420, 4096];
const BATCHES: [usize; 3] = [1, 16, 64];
const KEY: [u8; 32] = [9; 32];

fn seal(criterion: &mut Criterion) {
    let key = SealingKey::new(KEY);
    for_all(criterion, "seal", |backend, packets| {
        let mut jobs: Vec<SealJob<'_>> = packets
            .iter_mut()
            .zip(0..)
            .map(|(packet, counter)| SealJob { key: &key, counter, packet })
            .collect();
        let start = Instant::now();
        backend.seal_batch(&mut jobs);
        start.elapsed()
    });
}

fn open(criterion: &mut Criterion) {
    let (sealing, opening) = (SealingKey::new(KEY), OpeningKey::new(KEY));
    for_all(criterion, "open", |backend, packets| {
        for (packet, counter) in packets.iter_mut().zip(0..) {
            sealing.seal(counter, packet);
        }
        let mut jobs: Vec<OpenJob<'_>> = packets
            .iter_mut()
            .zip(0..)
            .map(|(packet, counter)| OpenJob { key: &opening, counter, packet, verified: false })
            .collect();
        let start = Instant::now();
        backend.open_batch(&mut jobs);
        let elapsed = start.elapsed();
        assert!(jobs.iter().all(|job| job.verified));
        elapsed
    });
}

/// `once` prepares and works on a batch, and returns the time of the work alone.
fn for_all(
    criterion: &mut Criterion,
    operation: &str,
    once: impl Fn(Backend, &mut [Vec<u8>]) -> Duration,
) {
    for len in LENGTHS {
        let mut group = criterion.benchmark_group(format!("{operation}/{len}"));
        for backend in Backend::ALL.into_iter().filter(|backend| backend.is_available()) {
            for batch in BATCHES {
                let mut packets = vec![vec![0xab; len + TAG_LEN]; batch];
                group.throughput(Throughput::Elements(batch as u64));
                group.bench_function(BenchmarkId::new(backend.name(), batch), |bencher| {
                    bencher
                        .iter_custom(|count| (0..count).map(|_| once(backend, &mut packets)).sum());
                });
            }
        }
    }
}
