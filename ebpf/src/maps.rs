//! Memory-mapped array maps: lines with one writer and any number of readers in other processes,
//! read and written without a system call.
//!
//! A line of [`Endpoint`] or [`Observed`] is a seqlock: odd → fields → even. All accesses are
//! atomic 32-bit words, so that a torn line is an unlucky value and never undefined behaviour,
//! whatever the other process does.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::abi::{Endpoint, Flags, Observed, Stats, WORKERS_MAX};
use crate::drops::{self, Drop as DropReason};
use crate::error::LoadError;
use crate::spec::{MapSpec, Specs};

/// A line whose first word is its sequence number.
pub trait Line: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {}

impl Line for Endpoint {}
impl Line for Observed {}

/// How often a torn line is read again before the caller keeps what it has.
const RETRIES: usize = 2;

/// Reads lines that another process writes.
#[derive(Clone, Debug)]
pub struct LineReader<T> {
    mapping: Arc<Mapping>,
    line: PhantomData<T>,
}

impl<T: Line> LineReader<T> {
    fn new(fd: BorrowedFd<'_>, spec: &MapSpec) -> Result<Self, LoadError> {
        let mapping = Arc::new(Mapping::new(fd, spec, Access::Read)?);
        Ok(Self { mapping, line: PhantomData })
    }

    /// Lines that the map has.
    pub fn len(&self) -> u32 {
        self.mapping.lines
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// None if the slot does not exist, or if the line was being written at each of three looks.
    pub fn read(&self, slot: u32) -> Option<T> {
        read_line(self.mapping.words32(slot)?)
    }

    /// Replaces `copy` by the current line; false if it could not be read and `copy` stays.
    pub fn refresh(&self, slot: u32, copy: &mut T) -> bool {
        self.read(slot).map(|line| *copy = line).is_some()
    }

    /// The line's sequence number: while it stays, a copy of the line is still right.
    pub fn seq(&self, slot: u32) -> Option<u32> {
        Some(self.mapping.words32(slot)?.first()?.load(Ordering::Acquire))
    }
}

/// Writes lines. There is one writer of a map in the whole system: keep one of these.
#[derive(Debug)]
pub struct LineWriter<T> {
    mapping: Mapping,
    line: PhantomData<T>,
}

impl<T: Line> LineWriter<T> {
    fn new(fd: BorrowedFd<'_>, spec: &MapSpec) -> Result<Self, LoadError> {
        Ok(Self { mapping: Mapping::new(fd, spec, Access::Write)?, line: PhantomData })
    }

    /// Lines that the map has.
    pub fn len(&self) -> u32 {
        self.mapping.lines
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// False if the slot does not exist. The `seq` in `line` is of no account.
    pub fn write(&mut self, slot: u32, line: &T) -> bool {
        match self.mapping.words32(slot) {
            Some(words) => {
                write_line(words, line);
                true
            }
            None => false,
        }
    }

    /// What was last written.
    pub fn read(&self, slot: u32) -> Option<T> {
        read_line(self.mapping.words32(slot)?)
    }
}

impl LineReader<Endpoint> {
    /// Maps ENDPOINTS for reading (data plane). `specs` come from [`crate::spec::read_abi`].
    pub fn endpoints(fd: BorrowedFd<'_>, specs: &Specs) -> Result<Self, LoadError> {
        Self::new(fd, &specs.endpoints())
    }
}

impl LineWriter<Endpoint> {
    /// Maps ENDPOINTS for writing (control).
    pub fn endpoints(fd: BorrowedFd<'_>, specs: &Specs) -> Result<Self, LoadError> {
        Self::new(fd, &specs.endpoints())
    }
}

impl LineReader<Observed> {
    /// Maps OBSERVED for reading (control).
    pub fn observed(fd: BorrowedFd<'_>, specs: &Specs) -> Result<Self, LoadError> {
        Self::new(fd, &specs.observed())
    }
}

impl LineWriter<Observed> {
    /// Maps OBSERVED for writing (data plane).
    pub fn observed(fd: BorrowedFd<'_>, specs: &Specs) -> Result<Self, LoadError> {
        Self::new(fd, &specs.observed())
    }
}

/// FLAGS, shared by every thread of the data plane.
#[derive(Debug)]
pub struct FlagWords(Mapping);

impl FlagWords {
    pub(crate) fn new(fd: BorrowedFd<'_>) -> Result<Self, LoadError> {
        Ok(Self(Mapping::new(fd, &Specs::FLAGS, Access::Write)?))
    }

    /// While true, XDP drops data messages whose index is not in SESSIONS; while false, the kernel
    /// gets them. Set it when the table holds every live session.
    pub fn set_authoritative(&self, value: bool) {
        self.store(0, value);
    }

    pub(crate) fn set_local_addresses(&self, value: bool) {
        self.store(1, value);
    }

    pub fn get(&self) -> Flags {
        let load =
            |word: usize| self.0.words32(0).map_or(0, |words| words[word].load(Ordering::Acquire));
        Flags { authoritative: load(0), local_addresses: load(1) }
    }

    fn store(&self, word: usize, value: bool) {
        if let Some(words) = self.0.words32(0) {
            words[word].store(value.into(), Ordering::Release);
        }
    }
}

/// STATS: one line of counters per worker.
#[derive(Clone, Debug)]
pub struct StatsLines(Arc<Mapping>);

impl StatsLines {
    /// Maps STATS for writing (data plane).
    pub fn writable(fd: BorrowedFd<'_>) -> Result<Self, LoadError> {
        Ok(Self(Arc::new(Mapping::new(fd, &Specs::STATS, Access::Write)?)))
    }

    /// A copy of a worker's counters; each number is right by itself. None past [`WORKERS_MAX`].
    pub fn read(&self, worker: u32) -> Option<Stats> {
        let mut stats = Stats::new_zeroed();
        let copy = <[u64]>::mut_from_bytes(stats.as_mut_bytes()).ok()?;
        for (copy, word) in copy.iter_mut().zip(self.0.words64(worker)?) {
            *copy = word.load(Ordering::Relaxed);
        }
        Some(stats)
    }

    /// The line that only this worker writes. None past [`WORKERS_MAX`].
    pub fn worker(&self, worker: u32) -> Option<WorkerStats> {
        (worker < WORKERS_MAX).then(|| WorkerStats { mapping: Arc::clone(&self.0), worker })
    }
}

/// STATS as another process sees it (control).
#[derive(Clone, Debug)]
pub struct StatsReader(StatsLines);

impl StatsReader {
    pub fn open(fd: BorrowedFd<'_>) -> Result<Self, LoadError> {
        let mapping = Mapping::new(fd, &Specs::STATS, Access::Read)?;
        Ok(Self(StatsLines(Arc::new(mapping))))
    }

    /// As [`StatsLines::read`].
    pub fn read(&self, worker: u32) -> Option<Stats> {
        self.0.read(worker)
    }
}

/// A counter of [`Stats`] by its place in the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Counter {
    HeartbeatNs = 0,
    ReceivedPackets = 1,
    ReceivedBytes = 2,
    ReceivedBatches = 3,
    SentPackets = 4,
    SentBytes = 5,
    SentBatches = 6,
}

/// One worker's line. Adding is a load and a store: the worker is the only writer.
#[derive(Debug)]
pub struct WorkerStats {
    mapping: Arc<Mapping>,
    worker: u32,
}

impl WorkerStats {
    pub fn add(&mut self, counter: Counter, amount: u64) {
        self.update(counter as usize, |value| value.wrapping_add(amount));
    }

    pub fn set(&mut self, counter: Counter, value: u64) {
        self.update(counter as usize, |_| value);
    }

    /// Publishes a drop counter that user space keeps.
    pub fn set_drops(&mut self, reason: DropReason, packets: u64) {
        self.update(DROPS_AT + reason as usize, |_| packets);
    }

    fn update(&mut self, word: usize, change: impl FnOnce(u64) -> u64) {
        if let Some(word) = self.mapping.words64(self.worker).and_then(|words| words.get(word)) {
            word.store(change(word.load(Ordering::Relaxed)), Ordering::Relaxed);
        }
    }
}

const DROPS_AT: usize = std::mem::offset_of!(Stats, drops) / size_of::<u64>();
const _: () = assert!(DROPS_AT + drops::COUNT <= size_of::<Stats>() / size_of::<u64>());

fn read_line<T: Line>(words: &[AtomicU32]) -> Option<T> {
    let (seq, _) = words.split_first()?;
    for _ in 0..=RETRIES {
        let before = seq.load(Ordering::Acquire);
        let mut line = T::new_zeroed();
        let copy = <[u32]>::mut_from_bytes(line.as_mut_bytes()).ok()?;
        for (copy, word) in copy.iter_mut().zip(words) {
            *copy = word.load(Ordering::Relaxed);
        }
        // The field loads above must not move below the second look at the number.
        fence(Ordering::Acquire);
        if before % 2 == 0 && seq.load(Ordering::Relaxed) == before {
            return Some(line);
        }
        std::hint::spin_loop();
    }
    None
}

fn write_line<T: Line>(words: &[AtomicU32], line: &T) {
    let Some((seq, fields)) = words.split_first() else { return };
    // A writer that died in the middle left an odd number; the next one starts at the same.
    let odd = seq.load(Ordering::Relaxed) | 1;
    seq.store(odd, Ordering::Relaxed);
    // The field stores below must not be seen before the odd number.
    fence(Ordering::Release);
    for (word, bytes) in fields.iter().zip(line.as_bytes().chunks_exact(4).skip(1)) {
        let bytes = bytes.try_into().unwrap_or_default();
        word.store(u32::from_ne_bytes(bytes), Ordering::Relaxed);
    }
    seq.store(odd.wrapping_add(1), Ordering::Release);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// A BPF_F_MMAPABLE array in our address space.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    lines: u32,
    line_size: usize,
    /// Keeps the map alive and says who it is; the mapping alone would do for the memory.
    _fd: OwnedFd,
}

// SAFETY: the memory is only ever touched through atomics, and lives as long as the value.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Checks that the map is what `spec` says, then maps all of it.
    fn new(fd: BorrowedFd<'_>, spec: &MapSpec, access: Access) -> Result<Self, LoadError> {
        spec.check(fd)?;
        let fd =
            fd.try_clone_to_owned().map_err(LoadError::map(spec.name, "keeping the map's fd"))?;
        let line_size = spec.value_size as usize;
        // The kernel rounds each value up to 8 bytes; our layouts need no rounding.
        debug_assert!(line_size.is_multiple_of(8));
        let length = line_size * spec.max_entries as usize;
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours. The
        // kernel refuses lengths past the array's end.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                fd.as_fd().as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(LoadError::map(spec.name, "mapping it into memory")(error));
        }
        let Some(start) = NonNull::new(start.cast()) else {
            let error = std::io::Error::other("the kernel mapped it at address 0");
            return Err(LoadError::map(spec.name, "mapping it into memory")(error));
        };
        Ok(Self { start, lines: spec.max_entries, line_size, _fd: fd })
    }

    fn words32(&self, line: u32) -> Option<&[AtomicU32]> {
        let start = self.line(line)?.cast::<AtomicU32>();
        // SAFETY: the line lies in the mapping (checked there), is aligned to 8, and is touched by
        // atomics only. It is never seen through the other word size: a map has either sequenced
        // lines and flags (32) or statistics (64).
        Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), self.line_size / 4) })
    }

    fn words64(&self, line: u32) -> Option<&[AtomicU64]> {
        let start = self.line(line)?.cast::<AtomicU64>();
        // SAFETY: as in `words32`.
        Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), self.line_size / 8) })
    }

    fn line(&self, line: u32) -> Option<NonNull<u8>> {
        if line >= self.lines {
            return None;
        }
        // SAFETY: line < lines, so that the offset stays inside the mapping.
        let start = unsafe { self.start.add(line as usize * self.line_size) };
        debug_assert!(start.as_ptr().addr().is_multiple_of(8));
        Some(start)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let length = self.line_size * self.lines as usize;
        // SAFETY: exactly what `new` mapped; every slice of it borrowed `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), length) };
    }
}
