//! The back-ends by name, and how each is handed a batch.

use std::fmt;
use std::str::FromStr;

#[cfg(target_arch = "x86_64")]
use crate::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use crate::avx512::Avx512;
#[cfg(target_arch = "x86_64")]
use crate::wide;
use crate::{OpenJob, SealJob};

/// An implementation of ChaCha20-Poly1305. Whichever is used, the bytes are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Backend {
    /// `ring`, one packet after the other. On every CPU.
    Ring,
    /// Eight lanes, several packets at a time.
    Avx2,
    /// Thirty-two lanes, several packets at a time. Needs F, BW, VL, IFMA, VBMI2, VPOPCNTDQ, and
    /// BMI2, which Ice Lake and Zen 4 were the first to have.
    Avx512,
}

impl Backend {
    pub const ALL: [Self; 3] = [Self::Ring, Self::Avx2, Self::Avx512];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU has what it needs.
    pub fn is_available(self) -> bool {
        match self {
            Self::Ring => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// As [`crate::seal_batch`], by this back-end; by `ring` if it is not available.
    pub fn seal_batch(self, jobs: &mut [SealJob<'_>]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if let Some(engine) = Avx2::detect() => wide::seal_batch(engine, jobs),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if let Some(engine) = Avx512::detect() => wide::seal_batch(engine, jobs),
            _ => jobs.iter_mut().for_each(seal_by_ring),
        }
    }

    /// As [`crate::open_batch`], by this back-end; by `ring` if it is not available.
    pub fn open_batch(self, jobs: &mut [OpenJob<'_>]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 if let Some(engine) = Avx2::detect() => wide::open_batch(engine, jobs),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 if let Some(engine) = Avx512::detect() => wide::open_batch(engine, jobs),
            _ => jobs.iter_mut().for_each(open_by_ring),
        }
    }
}

pub(crate) fn seal_by_ring(job: &mut SealJob<'_>) {
    job.key.0.ring.seal(job.counter, job.packet);
}

pub(crate) fn open_by_ring(job: &mut OpenJob<'_>) {
    job.verified = job.key.0.ring.open(job.counter, job.packet);
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is none of a back-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownBackend(pub String);

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(name: &str) -> Result<Self, UnknownBackend> {
        let mut all = Self::ALL.into_iter();
        all.find(|backend| backend.name() == name).ok_or_else(|| UnknownBackend(name.to_owned()))
    }
}
