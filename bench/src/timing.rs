//! Whether the time of the AEAD depends on what it works on, measured as dudect does (Reparaz,
//! Balasch, Verbauwhede: "Dude, is my code constant time?", 2017): two classes of input in random
//! order, and Welch's t-test on their times. Below [`SUSPICIOUS`] nothing was found; from
//! [`LEAK`] on there is a leak.
//!
//! What is prepared for a call is the same work on the same memory in both classes; only the bytes
//! differ. A comparison that does leak is measured beside, to show that it would be seen.

use std::hint::black_box;
use std::time::Instant;

use millrace_aead::{Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN};
use serde::Serialize;

/// |t| from which on the classes differ for certain.
pub const LEAK: f64 = 10.0;
/// Below this there is nothing but chance.
pub const SUSPICIOUS: f64 = 4.5;
/// Interrupts and other tenants make a long tail: shares of the fastest calls that are also tested
/// alone.
const SHARES: [f64; 5] = [1.0, 0.99, 0.9, 0.75, 0.5];
/// The share without the tail.
const USUAL_SHARE: f64 = 0.9;

/// The packets of a call.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub packets: usize,
    /// Of each text.
    pub bytes: usize,
}

impl Shape {
    /// Small packets side by side, a few and a full group, one that has whole strips of every
    /// back-end and a rest, and long ones in pairs.
    pub const ALL: [Self; 4] = [
        Self { packets: 4, bytes: 64 },
        Self { packets: 16, bytes: 64 },
        Self { packets: 1, bytes: 2100 },
        Self { packets: 24, bytes: 1420 },
    ];
}

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// The largest |t| of all shares.
    pub t: f64,
    /// The difference of the means, without the tail, that would have been [`SUSPICIOUS`].
    pub visible_ns: f64,
}

/// What differs between the classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Experiment {
    /// A fixed key, or a random one for each call.
    SealKey,
    /// Texts of zeros, or random ones.
    SealText,
    OpenKey,
    OpenText,
    /// Forged tags that are wrong in the first byte, or in the last.
    OpenForgedTag,
    /// Both classes are alike: what chance alone gives.
    SealNothing,
}

impl Experiment {
    pub const ALL: [Self; 6] = [
        Self::SealKey,
        Self::SealText,
        Self::OpenKey,
        Self::OpenText,
        Self::OpenForgedTag,
        Self::SealNothing,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::SealKey => "seal, fixed or random key",
            Self::SealText => "seal, fixed or random text",
            Self::OpenKey => "open, fixed or random key",
            Self::OpenText => "open, fixed or random text",
            Self::OpenForgedTag => "open, tag wrong in its first or last byte",
            Self::SealNothing => "seal, no difference (what chance gives)",
        }
    }

    /// Calls `backend` so many times.
    pub fn run(self, backend: Backend, shape: Shape, calls: usize, seed: u64) -> Figure {
        let mut random = Random(seed);
        let mut key = [0; 32];
        let mut packets = vec![vec![0; shape.bytes + TAG_LEN]; shape.packets];
        compare(calls, seed, |class| {
            let varies_key = matches!(self, Self::SealKey | Self::OpenKey);
            random.fill(&mut key, varies_key && class == 1);
            let (sealing, opening) = (SealingKey::new(key), OpeningKey::new(key));
            let varies_text = matches!(self, Self::SealText | Self::OpenText);
            for packet in &mut packets {
                random.fill(packet, varies_text && class == 1);
            }
            match self {
                Self::SealKey | Self::SealText | Self::SealNothing => {
                    time_seal(backend, &sealing, &mut packets)
                }
                Self::OpenKey | Self::OpenText | Self::OpenForgedTag => {
                    time_seal(Backend::Ring, &sealing, &mut packets);
                    if self == Self::OpenForgedTag {
                        for packet in &mut packets {
                            packet[shape.bytes + class * (TAG_LEN - 1)] ^= 1;
                        }
                    }
                    time_open(backend, &opening, &mut packets)
                }
            }
        })
    }
}

fn time_seal(backend: Backend, key: &SealingKey, packets: &mut [Vec<u8>]) -> f64 {
    let mut jobs: Vec<SealJob<'_>> = packets
        .iter_mut()
        .zip(0..)
        .map(|(packet, counter)| SealJob { key, counter, packet })
        .collect();
    time(|| backend.seal_batch(black_box(&mut jobs)))
}

fn time_open(backend: Backend, key: &OpeningKey, packets: &mut [Vec<u8>]) -> f64 {
    let mut jobs: Vec<OpenJob<'_>> = packets
        .iter_mut()
        .zip(0..)
        .map(|(packet, counter)| OpenJob { key, counter, packet, verified: false })
        .collect();
    time(|| backend.open_batch(black_box(&mut jobs)))
}

/// A comparison that ends at the first difference, under the same test as the others.
pub fn leaky_comparison(calls: usize, seed: u64) -> Figure {
    let right = [0x5a_u8; TAG_LEN];
    compare(calls, seed, |class| {
        let mut forged = right;
        forged[class * (TAG_LEN - 1)] ^= 1;
        let (right, forged) = (black_box(&right), black_box(&forged));
        time(|| {
            let equal = right.iter().zip(forged).all(|(a, b)| black_box(*a) == *b);
            black_box(equal);
        })
    })
}

/// Nanoseconds.
fn time(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64
}

/// The largest |t| over all [`SHARES`] of `calls` calls of `measure`, whose argument is the class.
fn compare(calls: usize, seed: u64, mut measure: impl FnMut(usize) -> f64) -> Figure {
    let mut order = Random(seed ^ 0xc1a5);
    let mut times = [Vec::with_capacity(calls), Vec::with_capacity(calls)];
    // The first ones meet cold caches.
    for nth in 0..calls + calls / 100 {
        let class = (order.next() >> 63) as usize;
        let time = measure(class);
        if nth >= calls / 100 {
            times[class].push(time);
        }
    }
    let mut sorted = times.concat();
    sorted.sort_unstable_by(f64::total_cmp);
    let moments = |share: f64| {
        let limit = sorted[((sorted.len() as f64 * share) as usize).saturating_sub(1)];
        [0, 1].map(|class: usize| Moments::of(&times[class], limit))
    };
    let ts = SHARES.into_iter().map(moments).map(|[a, b]| a.welch_t(b).abs());
    let [a, b] = moments(USUAL_SHARE);
    Figure { t: ts.fold(0.0, f64::max), visible_ns: SUSPICIOUS * a.error(b) }
}

/// Count, mean and variance of a class.
#[derive(Clone, Copy)]
struct Moments {
    count: f64,
    mean: f64,
    variance: f64,
}

impl Moments {
    /// Of the times up to `limit`.
    fn of(times: &[f64], limit: f64) -> Self {
        let taken = || times.iter().copied().filter(|&time| time <= limit);
        let count = taken().count() as f64;
        let mean = taken().sum::<f64>() / count;
        let variance = taken().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0);
        Self { count, mean, variance }
    }

    /// The standard error of the difference of both means.
    fn error(self, other: Self) -> f64 {
        (self.variance / self.count + other.variance / other.count).sqrt()
    }

    /// Zero where there is nothing to compare.
    fn welch_t(self, other: Self) -> f64 {
        let t = (self.mean - other.mean) / self.error(other);
        if t.is_finite() { t } else { 0.0 }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Zeros, or random bytes if `varies`. They are drawn in any case and masked, so that what comes
    /// before the measurement is the same.
    fn fill(&mut self, bytes: &mut [u8], varies: bool) {
        let mask = black_box(0_u64.wrapping_sub(u64::from(varies)));
        for eight in bytes.chunks_mut(8) {
            let drawn = (self.next() & mask).to_le_bytes();
            eight.copy_from_slice(&drawn[..eight.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t_is_that_of_a_known_example() {
        // Means 21 and 23.367, variances 15.724 and 4.483.
        let a = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9];
        let b = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5];
        let t = Moments::of(&a, f64::MAX).welch_t(Moments::of(&b, f64::MAX));
        assert!((t + 1.289_6).abs() < 0.001, "{t}");
    }

    #[test]
    fn classes_that_differ_are_told_apart_and_equal_ones_are_not() {
        let mut random = Random(1);
        let mut noise = || (random.next() % 1000) as f64;
        assert!(compare(20_000, 2, |class| noise() + class as f64 * 50.0).t > LEAK);
        assert!(compare(20_000, 3, |_| noise()).t < SUSPICIOUS);
    }
}
