//! Packet memory that the kernel and we share (UMEM), and who owns each frame of it right now.
//!
//! One [`Umem`] belongs to a port. Each queue of the port owns a fixed share of its frames
//! (`Frames`), so no two threads ever touch the same frame and nothing is locked. A frame is in
//! one of four hands; their numbers always add up to the share:
//!
//! * *free*: ours, on a stack. The frame used last goes out first, so that it is still in cache.
//! * *lent*: in the fill ring, in the device, or in the receive ring.
//! * *held*: received, and read or changed by a batch of ours.
//! * *sent*: in the transmit ring, in the device, or in the completion ring.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// A page: what every driver takes. igb breaks frames over 1024 bytes with smaller chunks.
const CHUNK_LEN_SAFE: u32 = 4096;
/// Enough for an MTU of 1500 behind the kernel's 256 bytes of headroom.
const CHUNK_LEN_SMALL: u32 = 2048;
/// Above this MTU a frame does not fit the small chunk.
const SMALL_MTU_MAX: u32 = 1700;
const HUGE_PAGE_LEN: usize = 2 << 20;

/// The chunk length for a driver and an MTU. Small chunks halve the memory that packets touch, so
/// drivers that were seen to work with them get them; all others get a page.
pub fn chunk_len(driver: &str, mtu: u32) -> u32 {
    match driver {
        "virtio_net" | "veth" if mtu <= SMALL_MTU_MAX => CHUNK_LEN_SMALL,
        _ => CHUNK_LEN_SAFE,
    }
}

/// The memory of one port.
#[derive(Debug)]
pub struct Umem {
    area: NonNull<u8>,
    len: usize,
    chunk_len: u32,
    chunks: u32,
    huge_pages: bool,
}

// SAFETY: the value itself is never changed after `new`; access to the bytes goes through
// `Frames`, whose shares are disjoint and which each have one owner.
unsafe impl Send for Umem {}
// SAFETY: as above.
unsafe impl Sync for Umem {}

impl Umem {
    /// Maps memory for `chunks` frames of `chunk_len` bytes, in huge pages if there are some.
    /// `chunk_len` is a power of two, 2048 to a page.
    pub fn new(chunks: u32, chunk_len: u32) -> io::Result<Arc<Self>> {
        if !chunk_len.is_power_of_two() || !(2048..=4096).contains(&chunk_len) || chunks == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = (chunks as usize * chunk_len as usize).next_multiple_of(HUGE_PAGE_LEN);
        // Addresses inside are kept in 32 bits.
        if u32::try_from(len).is_err() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let (area, huge_pages) = match map(len, libc::MAP_HUGETLB) {
            Ok(area) => (area, true),
            Err(_) => (map(len, 0)?, false),
        };
        Ok(Arc::new(Self { area, len, chunk_len, chunks, huge_pages }))
    }

    /// Whether the kernel had huge pages for us.
    pub fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// Bytes of one frame, the kernel's headroom included.
    pub fn chunk_len(&self) -> u32 {
        self.chunk_len
    }

    /// What the kernel must know to register the memory.
    pub(super) fn registration(&self) -> libc::xdp_umem_reg {
        libc::xdp_umem_reg {
            addr: self.area.as_ptr() as u64,
            len: u64::from(self.chunks) * u64::from(self.chunk_len),
            chunk_size: self.chunk_len,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        }
    }
}

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: area and len are what mmap gave. All shares hold an Arc of this, so nobody reads
        // it any more; the kernel keeps its own reference to the pages.
        unsafe { libc::munmap(self.area.as_ptr().cast(), self.len) };
    }
}

fn map(len: usize, flags: libc::c_int) -> io::Result<NonNull<u8>> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: a fresh anonymous mapping touches no existing memory.
    let area = unsafe {
        libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    if area == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(area.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// In whose hands a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hand {
    Free,
    Lent,
    Held,
    Sent,
}

/// How many frames are in whose hands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounts {
    pub free: u32,
    pub lent: u32,
    pub held: u32,
    pub sent: u32,
}

impl FrameCounts {
    pub fn total(&self) -> u32 {
        self.free + self.lent + self.held + self.sent
    }
}

/// Bytes of a frame that we may touch: a place that was checked to lie inside one chunk which is
/// in our hands. Only [`Frames`] makes it, once for each time that the frame comes into our hands,
/// and it cannot be copied.
#[derive(Debug)]
pub(super) struct Part {
    chunk: u32,
    /// From the start of the UMEM.
    at: u32,
    len: u32,
}

/// One queue's share of the frames.
#[derive(Debug)]
pub(super) struct Frames {
    umem: Arc<Umem>,
    first: u32,
    hands: Box<[Hand]>,
    free: Vec<u32>,
    counts: FrameCounts,
}

impl Frames {
    /// The frames `first..first + count`. Shares of one UMEM must not overlap.
    ///
    /// # Safety
    /// No other `Frames` of this UMEM has one of these frames.
    pub(super) unsafe fn new(umem: Arc<Umem>, first: u32, count: u32) -> Self {
        assert!(first.checked_add(count).is_some_and(|end| end <= umem.chunks));
        Self {
            umem,
            first,
            hands: vec![Hand::Free; count as usize].into_boxed_slice(),
            free: (first..first + count).rev().collect(),
            counts: FrameCounts { free: count, ..FrameCounts::default() },
        }
    }

    pub(super) fn counts(&self) -> FrameCounts {
        debug_assert_eq!(self.counts.total() as usize, self.hands.len());
        debug_assert_eq!(self.counts.free as usize, self.free.len());
        self.counts
    }

    /// Counts anew by looking at every frame; for tests and for a check before memory is given up.
    pub(super) fn recount(&self) -> FrameCounts {
        let in_hand = |hand| self.hands.iter().filter(|&&h| h == hand).count() as u32;
        FrameCounts {
            free: in_hand(Hand::Free),
            lent: in_hand(Hand::Lent),
            held: in_hand(Hand::Held),
            sent: in_hand(Hand::Sent),
        }
    }

    /// Takes a free frame for the fill ring: its address.
    pub(super) fn lend(&mut self) -> Option<u64> {
        let chunk = self.free.pop()?;
        self.counts.free -= 1;
        self.counts.lent += 1;
        self.hands[(chunk - self.first) as usize] = Hand::Lent;
        Some(u64::from(chunk) * u64::from(self.umem.chunk_len))
    }

    /// A received descriptor: the frame is held from now on. None if the descriptor is not of a
    /// frame that we lent, or reaches over its end: then it is not touched.
    pub(super) fn hold(&mut self, address: u64, len: u32) -> Option<Part> {
        let chunk = self.chunk_of(address)?;
        let hand = &mut self.hands[(chunk - self.first) as usize];
        let offset = (address % u64::from(self.umem.chunk_len)) as u32;
        if *hand != Hand::Lent || offset.checked_add(len)? > self.umem.chunk_len {
            return None;
        }
        *hand = Hand::Held;
        self.counts.lent -= 1;
        self.counts.held += 1;
        Some(Part { chunk, at: u32::try_from(address).ok()?, len })
    }

    /// A held frame is free again, on top of the stack.
    pub(super) fn release(&mut self, part: Part) {
        debug_assert_eq!(self.hands[(part.chunk - self.first) as usize], Hand::Held);
        self.counts.held -= 1;
        self.put_back(part.chunk);
    }

    /// Takes a free frame to send `len` bytes from its start.
    pub(super) fn take_to_send(&mut self, len: u32) -> Option<Part> {
        if len > self.umem.chunk_len {
            return None;
        }
        let chunk = self.free.pop()?;
        self.counts.free -= 1;
        self.counts.held += 1;
        self.hands[(chunk - self.first) as usize] = Hand::Held;
        Some(Part { chunk, at: chunk * self.umem.chunk_len, len })
    }

    /// A held frame goes to the transmit ring: its descriptor.
    pub(super) fn send(&mut self, part: Part) -> libc::xdp_desc {
        debug_assert_eq!(self.hands[(part.chunk - self.first) as usize], Hand::Held);
        self.hands[(part.chunk - self.first) as usize] = Hand::Sent;
        self.counts.held -= 1;
        self.counts.sent += 1;
        libc::xdp_desc { addr: u64::from(part.at), len: part.len, options: 0 }
    }

    /// A completed frame is free again. False if it is none that we sent.
    pub(super) fn complete(&mut self, address: u64) -> bool {
        let Some(chunk) = self.chunk_of(address) else { return false };
        if self.hands[(chunk - self.first) as usize] != Hand::Sent {
            return false;
        }
        self.counts.sent -= 1;
        self.put_back(chunk);
        true
    }

    /// The bytes of a frame in our hands.
    pub(super) fn bytes_mut<'a>(&'a mut self, part: &'a Part) -> &'a mut [u8] {
        self.bytes_of_many(std::slice::from_ref(part)).next().unwrap_or_default()
    }

    /// The bytes of several held frames at once.
    pub(super) fn bytes_of_many<'a>(
        &'a mut self,
        parts: &'a [Part],
    ) -> impl Iterator<Item = &'a mut [u8]> {
        parts.iter().map(|part| {
            assert!(self.hands[(part.chunk - self.first) as usize] == Hand::Held);
            // SAFETY: hold() and take_to_send() checked that the part lies inside its chunk. The
            // frame is held: the kernel has no descriptor of it. A frame that is held has one
            // part, which cannot be copied, so the parts of a slice are disjoint. The share is
            // ours alone (`new`), and `self` and the parts are borrowed while the slices live.
            unsafe {
                let start = self.umem.area.add(part.at as usize);
                std::slice::from_raw_parts_mut(start.as_ptr(), part.len as usize)
            }
        })
    }

    /// A copy of a sent frame's bytes, which the kernel may be reading too.
    pub(super) fn copy_sent(&self, descriptor: &libc::xdp_desc) -> Option<Vec<u8>> {
        let chunk = self.chunk_of(descriptor.addr)?;
        let offset = descriptor.addr % u64::from(self.umem.chunk_len);
        let fits = offset + u64::from(descriptor.len) <= u64::from(self.umem.chunk_len);
        if !fits || self.hands[(chunk - self.first) as usize] != Hand::Sent {
            return None;
        }
        // SAFETY: inside the chunk, as just checked; the device only reads a frame that is sent,
        // and we write none before it is complete, so two readers share it.
        let bytes = unsafe {
            let start = self.umem.area.add(descriptor.addr as usize);
            std::slice::from_raw_parts(start.as_ptr(), descriptor.len as usize)
        };
        Some(bytes.to_vec())
    }

    fn chunk_of(&self, address: u64) -> Option<u32> {
        let chunk = u32::try_from(address / u64::from(self.umem.chunk_len)).ok()?;
        let index = chunk.checked_sub(self.first)?;
        ((index as usize) < self.hands.len()).then_some(chunk)
    }

    fn put_back(&mut self, chunk: u32) {
        self.hands[(chunk - self.first) as usize] = Hand::Free;
        self.counts.free += 1;
        self.free.push(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(umem: &Arc<Umem>, first: u32, count: u32) -> Frames {
        // SAFETY: each test makes disjoint shares.
        unsafe { Frames::new(Arc::clone(umem), first, count) }
    }

    #[test]
    fn frames_go_round_and_are_conserved() {
        let umem = Umem::new(8, 2048).unwrap();
        let mut frames = share(&umem, 4, 4);
        let lent: Vec<u64> = (0..3).map(|_| frames.lend().unwrap()).collect();
        assert_eq!(lent[0], 4 * 2048, "the share begins at its first frame");
        let part = frames.hold(lent[1] + 256, 100).unwrap();
        frames.bytes_mut(&part).fill(7);
        assert_eq!(frames.counts(), FrameCounts { free: 1, lent: 2, held: 1, sent: 0 });
        frames.release(part);
        assert_eq!(frames.lend(), Some(lent[1]), "the frame used last goes out first");
        let part = frames.take_to_send(60).unwrap();
        let descriptor = frames.send(part);
        assert_eq!(frames.copy_sent(&descriptor).unwrap().len(), 60);
        assert_eq!(frames.counts(), FrameCounts { free: 0, lent: 3, held: 0, sent: 1 });
        assert!(frames.take_to_send(60).is_none() && frames.lend().is_none());
        assert!(frames.complete(descriptor.addr));
        assert_eq!(frames.counts(), frames.recount());
    }

    #[test]
    fn descriptors_that_cannot_be_are_refused() {
        let umem = Umem::new(8, 2048).unwrap();
        let mut frames = share(&umem, 2, 4);
        let lent = frames.lend().unwrap();
        assert!(frames.hold(lent + 2000, 100).is_none(), "over the end of the chunk");
        assert!(frames.hold(lent + 1, u32::MAX).is_none());
        assert!(frames.hold(u64::MAX, 1).is_none());
        assert!(frames.hold(0, 60).is_none(), "another share");
        assert!(frames.hold(lent + 2048, 60).is_none(), "a frame that was never lent");
        assert!(frames.hold(lent, 2048).is_some());
        assert!(frames.hold(lent, 60).is_none(), "the same frame twice");
        assert!(!frames.complete(lent), "never sent");
        assert!(frames.take_to_send(2049).is_none());
        assert_eq!(frames.counts(), frames.recount());
    }

    #[test]
    fn only_known_drivers_get_small_chunks() {
        assert_eq!(chunk_len("virtio_net", 1500), 2048);
        assert_eq!(chunk_len("virtio_net", 3000), 4096);
        assert_eq!(chunk_len("igb", 1500), 4096);
        assert_eq!(chunk_len("", 1500), 4096);
    }
}
