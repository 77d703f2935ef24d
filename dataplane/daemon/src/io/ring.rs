//! One of the four rings of an AF_XDP socket: memory that the kernel maps to us, one side writes
//! entries, the other reads them (kernel documentation, "AF_XDP", "Rings").
//!
//! Publishing is a release store of the own index; seeing the other side's entries is an acquire
//! load of its index. What the kernel side's index claims is never believed past the ring's size.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// A ring's shared memory.
#[derive(Debug)]
struct Mapping<T> {
    base: NonNull<u8>,
    len: usize,
    offsets: Offsets,
    size: u32,
    entry: PhantomData<T>,
}

/// Where the parts of a ring stand, from the start of its memory, in bytes.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    producer: usize,
    consumer: usize,
    flags: usize,
    entries: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; the value that holds it is the only
// user of our side's index.
unsafe impl<T: Send> Send for Mapping<T> {}

impl<T: Copy> Mapping<T> {
    fn new(
        socket: BorrowedFd<'_>,
        page_offset: libc::off_t,
        at: libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        assert!(size.is_power_of_two());
        let offsets = Offsets {
            producer: at.producer as usize,
            consumer: at.consumer as usize,
            flags: at.flags as usize,
            entries: at.desc as usize,
        };
        let len = offsets.entries + size as usize * size_of::<T>();
        let inside = |offset: usize| offset + size_of::<u32>() <= len && offset.is_multiple_of(4);
        if ![offsets.producer, offsets.consumer, offsets.flags].into_iter().all(inside)
            || !offsets.entries.is_multiple_of(align_of::<T>())
        {
            return Err(io::Error::other("the kernel describes a ring that cannot be"));
        }
        // SAFETY: a fresh mapping touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                socket.as_raw_fd(),
                page_offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len, offsets, size, entry: PhantomData })
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: `new` checked that the offset is aligned and inside the mapping, which lives as
        // long as `self`; both sides access the word as an atomic only.
        unsafe { AtomicU32::from_ptr(self.base.add(offset).cast().as_ptr()) }
    }

    /// The place of entry `index`, counted without end.
    fn entry(&self, index: u32) -> NonNull<T> {
        let place = (index & (self.size - 1)) as usize;
        // SAFETY: place < size, and `new` mapped `size` entries from `entries` on.
        unsafe { self.base.add(self.offsets.entries).cast::<T>().add(place) }
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap gave, and no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Our side of a ring that we write: fill and transmit.
#[derive(Debug)]
pub(super) struct Producer<T> {
    mapping: Mapping<T>,
    /// Next entry to write; entries before it are published by [`Self::publish`].
    next: u32,
    /// Entries ever pushed, as far as 32 bits count.
    pushed: u32,
}

impl<T: Copy> Producer<T> {
    pub(super) fn new(
        socket: BorrowedFd<'_>,
        page_offset: libc::off_t,
        at: libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let mapping = Mapping::new(socket, page_offset, at, size)?;
        let next = mapping.word(mapping.offsets.producer).load(Ordering::Relaxed);
        Ok(Self { mapping, next, pushed: 0 })
    }

    /// Entries that can be pushed now.
    pub(super) fn room(&self) -> u32 {
        self.mapping.size - self.waiting()
    }

    /// Entries that the kernel has not taken yet.
    pub(super) fn waiting(&self) -> u32 {
        let consumer = self.mapping.word(self.mapping.offsets.consumer).load(Ordering::Acquire);
        self.next.wrapping_sub(consumer).min(self.mapping.size)
    }

    /// Writes an entry; the caller has seen [`Self::room`] for it.
    pub(super) fn push(&mut self, entry: T) {
        debug_assert!(self.room() > 0);
        // SAFETY: the place is inside the mapping; the kernel reads it only after `publish`, and
        // is done with its older content, as `room` said.
        unsafe { self.mapping.entry(self.next).write(entry) };
        self.next = self.next.wrapping_add(1);
        self.pushed = self.pushed.saturating_add(1);
    }

    /// Shows the kernel all entries that were pushed.
    pub(super) fn publish(&self) {
        self.mapping.word(self.mapping.offsets.producer).store(self.next, Ordering::Release);
    }

    /// Whether the kernel sleeps and wants a system call. Call after [`Self::publish`].
    pub(super) fn needs_wakeup(&self) -> bool {
        // The kernel sets the flag and then looks for entries; we publish entries and then look at
        // the flag. Without the fence both could miss the other.
        fence(Ordering::SeqCst);
        let flags = self.mapping.word(self.mapping.offsets.flags).load(Ordering::Relaxed);
        flags & libc::XDP_RING_NEED_WAKEUP != 0
    }

    /// The entries that were pushed last, newest first, at most a ring full.
    pub(super) fn newest(&self) -> impl Iterator<Item = T> + '_ {
        (1..=self.mapping.size.min(self.pushed)).map(|back| {
            // SAFETY: inside the mapping; we wrote this entry and the kernel only reads it.
            unsafe { self.mapping.entry(self.next.wrapping_sub(back)).read() }
        })
    }
}

/// Our side of a ring that the kernel writes: receive and completion.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    mapping: Mapping<T>,
    /// Next entry to read; entries before it go back by [`Self::release`].
    next: u32,
}

impl<T: Copy> Consumer<T> {
    pub(super) fn new(
        socket: BorrowedFd<'_>,
        page_offset: libc::off_t,
        at: libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let mapping = Mapping::new(socket, page_offset, at, size)?;
        let next = mapping.word(mapping.offsets.consumer).load(Ordering::Relaxed);
        Ok(Self { mapping, next })
    }

    /// Entries that can be popped now.
    pub(super) fn available(&self) -> u32 {
        let producer = self.mapping.word(self.mapping.offsets.producer).load(Ordering::Acquire);
        producer.wrapping_sub(self.next).min(self.mapping.size)
    }

    /// Reads an entry; the caller has seen [`Self::available`] for it.
    pub(super) fn pop(&mut self) -> T {
        debug_assert!(self.available() > 0);
        // SAFETY: inside the mapping; the kernel published the entry before its index, which
        // `available` acquired, and leaves it alone until `release`. Every bit pattern is a T.
        let entry = unsafe { self.mapping.entry(self.next).read() };
        self.next = self.next.wrapping_add(1);
        entry
    }

    /// Gives the kernel the places of all entries that were popped.
    pub(super) fn release(&self) {
        self.mapping.word(self.mapping.offsets.consumer).store(self.next, Ordering::Release);
    }
}
