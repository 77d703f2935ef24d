//! Which back-end works on which batch: what is there, proved right by a self-test, and measured to
//! be faster than `ring` for batches like this one.

use std::env;
use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::{Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN, UnknownBackend};

/// Overrides the configuration, for comparisons.
const VARIABLE: &str = "MILLRACE_AEAD";

/// Lengths that are measured; each stands for those around it, nearest by ratio.
const LENGTHS: [usize; 7] = [64, 128, 256, 576, 1024, 1424, 4096];
/// The longest length of each class but the last.
const LENGTHS_UP_TO: [usize; 6] = [95, 191, 383, 767, 1215, 2047];
/// Packets of a batch that are measured; each stands for those up to the next.
const BATCHES: [usize; 5] = [1, 2, 4, 8, 16];
/// Least of so many runs, each of at least one batch: a shared machine only ever adds time.
const RUNS: usize = 5;
/// What a back-end must save to be preferred to `ring`: less is within the noise.
const LEAST_GAIN: f64 = 0.03;

/// The decision, made once for a process.
#[derive(Debug)]
pub struct Choice {
    forced: Option<Backend>,
    /// By length, then by batch.
    table: [[Backend; BATCHES.len()]; LENGTHS.len()],
    /// Back-ends that this CPU could run and that gave wrong results.
    wrong: Vec<Backend>,
}

/// A wanted back-end that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    #[error("{VARIABLE} is \"{0}\": expected ring, avx2 or avx512, or no such variable")]
    Unknown(String),
    #[error("the AEAD back-end {0} is wanted, but this CPU cannot run it: take another, or auto")]
    Unavailable(Backend),
    #[error("the AEAD back-end {0} failed its self-test on this CPU: take another, or auto")]
    Wrong(Backend),
}

static CHOICE: OnceLock<Choice> = OnceLock::new();

/// The decision; made now, by measuring for about two milliseconds, if nobody made it before.
pub fn choice() -> &'static Choice {
    CHOICE.get_or_init(|| Choice::new(None))
}

/// Decides for the whole process. `wanted` is what the configuration says, if it says anything;
/// the environment variable `MILLRACE_AEAD` goes before it. A later call changes nothing.
pub fn choose(wanted: Option<Backend>) -> Result<&'static Choice, ChoiceError> {
    let wanted = match env::var(VARIABLE) {
        Ok(name) if !name.is_empty() => {
            Some(name.parse().map_err(|UnknownBackend(name)| ChoiceError::Unknown(name))?)
        }
        _ => wanted,
    };
    if let Some(backend) = wanted {
        if !backend.is_available() {
            return Err(ChoiceError::Unavailable(backend));
        }
        if !is_right(backend) {
            return Err(ChoiceError::Wrong(backend));
        }
    }
    Ok(CHOICE.get_or_init(|| Choice::new(wanted)))
}

impl Choice {
    fn new(forced: Option<Backend>) -> Self {
        let ring = forced.unwrap_or(Backend::Ring);
        let mut choice =
            Self { forced, table: [[ring; BATCHES.len()]; LENGTHS.len()], wrong: Vec::new() };
        if forced.is_none() {
            choice.measure();
        }
        choice
    }

    fn measure(&mut self) {
        let others = Backend::ALL.into_iter().filter(|b| *b != Backend::Ring && b.is_available());
        let (right, wrong) = others.partition::<Vec<_>, _>(|&backend| is_right(backend));
        self.wrong = wrong;
        for (row, len) in self.table.iter_mut().zip(LENGTHS) {
            for (cell, packets) in row.iter_mut().zip(BATCHES) {
                let mut batch = Batch::new(packets, len);
                let mut best = batch.least_time(Backend::Ring).as_secs_f64() * (1.0 - LEAST_GAIN);
                for &backend in &right {
                    let time = batch.least_time(backend).as_secs_f64();
                    if time < best {
                        (best, *cell) = (time, backend);
                    }
                }
            }
        }
    }

    /// For a batch of so many packets and bytes, tags included.
    #[inline]
    pub fn backend(&self, packets: usize, bytes: usize) -> Backend {
        let len = (bytes / packets.max(1)).saturating_sub(TAG_LEN);
        let length = LENGTHS_UP_TO.iter().take_while(|&&up_to| len > up_to).count();
        let batch = BATCHES[1..].iter().take_while(|&&least| packets >= least).count();
        self.table[length][batch]
    }

    /// The back-end that takes most: full packets in whole batches.
    pub fn name(&self) -> &'static str {
        self.backend(64, 64 * (1424 + TAG_LEN)).name()
    }

    /// Why, in one line.
    pub fn reason(&self) -> String {
        let mut text = match self.forced {
            Some(_) => return "set by the operator".to_owned(),
            None => String::from("measured on this CPU: "),
        };
        let fastest = Backend::ALL.into_iter().rev();
        let mut parts = Vec::new();
        for backend in fastest.filter(|&backend| backend != Backend::Ring) {
            let mut classes = Vec::new();
            for (row, len) in self.table.iter().zip(LENGTHS) {
                if let Some(first) = row.iter().position(|cell| *cell == backend) {
                    classes.push(format!("{len} B from {} packets", BATCHES[first]));
                }
            }
            if !classes.is_empty() {
                parts.push(format!("{backend} ({})", classes.join(", ")));
            }
        }
        parts.push(if parts.is_empty() { "ring".into() } else { "else ring".to_owned() });
        text += &parts.join("; ");
        for backend in &self.wrong {
            let _ = write!(text, "; {backend} failed its self-test and is not used");
        }
        text
    }
}

/// Packets to measure with, and to test with.
struct Batch {
    keys: Vec<SealingKey>,
    packets: Vec<Vec<u8>>,
}

impl Batch {
    fn new(packets: usize, len: usize) -> Self {
        Self::with_keys(packets, len, 1)
    }

    /// The packets' keys take turns.
    fn with_keys(packets: usize, len: usize, keys: usize) -> Self {
        let packet = (0..len + TAG_LEN).map(|at| at as u8).collect();
        Self {
            keys: (0..keys).map(|nth| SealingKey::new(key(nth))).collect(),
            packets: vec![packet; packets],
        }
    }

    fn seal(&mut self, backend: Backend) {
        let jobs = self.packets.iter_mut().enumerate().zip(self.keys.iter().cycle());
        let mut jobs: Vec<SealJob<'_>> =
            jobs.map(|((nth, packet), key)| SealJob { key, counter: nth as u64, packet }).collect();
        backend.seal_batch(black_box(&mut jobs));
    }

    fn least_time(&mut self, backend: Backend) -> Duration {
        let time = |_| {
            let start = Instant::now();
            self.seal(backend);
            start.elapsed()
        };
        (0..RUNS).map(time).min().unwrap_or_default()
    }
}

/// Of those that a batch has in turn.
fn key(nth: usize) -> [u8; 32] {
    [0x5a ^ nth as u8; 32]
}

/// Whether `backend` seals as `ring` does, opens what was sealed, and refuses what was changed, on
/// batches that take each of its ways.
fn is_right(backend: Backend) -> bool {
    const SHAPES: [(usize, usize); 9] = [
        (1, 0),
        (1, 1424),
        (3, 63),
        (8, 600),
        (16, 64),
        (20, 1424),
        (33, 100),
        (41, 1420),
        (2, 9000),
    ];
    [1, 2].into_iter().all(|keys| {
        SHAPES.into_iter().all(|(packets, len)| is_right_on(backend, packets, len, keys))
    })
}

fn is_right_on(backend: Backend, packets: usize, len: usize, keys: usize) -> bool {
    let batch = || Batch::with_keys(packets, len, keys);
    let (mut expected, mut seen) = (batch(), batch());
    let plain = seen.packets.clone();
    expected.seal(Backend::Ring);
    seen.seal(backend);
    if seen.packets != expected.packets {
        return false;
    }
    let damaged = packets / 2;
    let bit_at = (len + TAG_LEN) / 2;
    seen.packets[damaged][bit_at] ^= 0x10;
    let opening: Vec<OpeningKey> = (0..keys).map(|nth| OpeningKey::new(key(nth))).collect();
    let jobs = seen.packets.iter_mut().enumerate().zip(opening.iter().cycle());
    let mut jobs: Vec<OpenJob<'_>> = jobs
        .map(|((nth, packet), key)| OpenJob { key, counter: nth as u64, packet, verified: false })
        .collect();
    backend.open_batch(&mut jobs);
    jobs.iter().zip(&plain).enumerate().all(|(nth, (job, plain))| {
        if nth == damaged {
            !job.verified && job.packet.iter().all(|&byte| byte == 0)
        } else {
            job.verified && job.packet[..len] == plain[..len]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_choice_is_used_for_everything() {
        let choice = Choice::new(Some(Backend::Ring));
        assert_eq!(choice.backend(1, 80), Backend::Ring);
        assert_eq!(choice.backend(64, 64 * 1440), Backend::Ring);
        assert_eq!(choice.reason(), "set by the operator");
    }

    #[test]
    fn classes_meet_where_they_say() {
        let mut choice = Choice::new(Some(Backend::Ring));
        choice.table[1][2] = Backend::Avx2;
        for (packets, len, expected) in [
            (4, 96, Backend::Avx2),
            (7, 191, Backend::Avx2),
            (4, 95, Backend::Ring),
            (4, 192, Backend::Ring),
            (3, 96, Backend::Ring),
            (8, 96, Backend::Ring),
        ] {
            let bytes = packets * (len + TAG_LEN);
            assert_eq!(choice.backend(packets, bytes), expected, "{packets} of {len}");
        }
        choice.backend(0, 0);
        choice.backend(1, 3);
    }

    #[test]
    fn every_backend_that_runs_here_passes_its_self_test() {
        for backend in Backend::ALL.into_iter().filter(|backend| backend.is_available()) {
            assert!(is_right(backend), "{backend}");
        }
    }

    #[test]
    fn a_measured_choice_says_what_it_chose() {
        let choice = Choice::new(None);
        assert!(choice.wrong.is_empty());
        assert!(choice.reason().contains("ring"), "{}", choice.reason());
    }
}
