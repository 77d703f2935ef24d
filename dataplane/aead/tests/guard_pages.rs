//! Nothing is read or written outside of a packet: each one ends, or begins, at a page that must
//! not be touched, and the rest of its own pages keeps what stood there. A read beyond ends this
//! program with a signal.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::ffi::c_void;
use std::{fs, ptr, slice};

use common::{backends, text};
use millrace_aead::{Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

const PAGE_LEN: usize = 4096;
/// What stands around a packet.
const AROUND: u8 = 0xa5;
const BATCHES: [usize; 7] = [1, 3, 8, 16, 17, 25, 64];

/// Pages between two that must not be touched.
struct Guarded {
    start: *mut c_void,
    len: usize,
}

/// Which end of the pages a packet lies at.
#[derive(Clone, Copy, Debug)]
enum Side {
    Begin,
    End,
}

impl Guarded {
    fn new(len_least: usize) -> Self {
        let len = len_least.next_multiple_of(PAGE_LEN);
        let (whole, none) = (len + 2 * PAGE_LEN, ProtFlags::empty());
        // SAFETY: a new mapping, wherever the kernel likes; nothing else is there.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), whole, none, MapFlags::PRIVATE) };
        let start = start.unwrap();
        let open = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: pages of that mapping, all but the first and the last.
        unsafe { mprotect(start.byte_add(PAGE_LEN), len, open).unwrap() };
        Self { start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` readable and writable bytes of our mapping, borrowed as long as `self`.
        unsafe { slice::from_raw_parts_mut(self.start.cast::<u8>().add(PAGE_LEN), self.len) }
    }

    /// Fills the pages and returns the place of a packet.
    fn place(&mut self, packet: &[u8], side: Side) -> &mut [u8] {
        let bytes = self.bytes();
        bytes.fill(AROUND);
        let from = match side {
            Side::Begin => 0,
            Side::End => bytes.len() - packet.len(),
        };
        let place = &mut bytes[from..from + packet.len()];
        place.copy_from_slice(packet);
        place
    }

    fn assert_around_is_untouched(&mut self, packet_len: usize, side: Side) {
        let bytes = self.bytes();
        let around = match side {
            Side::Begin => &bytes[packet_len..],
            Side::End => &bytes[..bytes.len() - packet_len],
        };
        assert!(around.iter().all(|&byte| byte == AROUND), "{packet_len} bytes at the {side:?}");
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the whole mapping that `new` made; no borrow of it is left.
        unsafe { munmap(self.start, self.len + 2 * PAGE_LEN).unwrap() };
    }
}

/// Packets of these lengths, plain and as `ring` seals them.
struct Packets {
    plain: Vec<Vec<u8>>,
    sealed: Vec<Vec<u8>>,
}

const KEYS: [[u8; 32]; 2] = [[0x11; 32], [0xee; 32]];

/// Which key a packet has: in batches of three and more, one packet has another.
fn key_of(nth: usize) -> usize {
    usize::from(nth == 2)
}

impl Packets {
    fn new(lens: impl Iterator<Item = usize>) -> Self {
        let plain: Vec<Vec<u8>> =
            lens.enumerate().map(|(nth, len)| text(len + TAG_LEN, nth as u64)).collect();
        let mut sealed = plain.clone();
        let keys = KEYS.map(SealingKey::new);
        for (nth, packet) in sealed.iter_mut().enumerate() {
            let key = &keys[key_of(nth)];
            Backend::Ring.seal_batch(&mut [SealJob { key, counter: nth as u64, packet }]);
        }
        Self { plain, sealed }
    }

    /// Seals and opens all of them as one batch, in place, next to pages not to be touched.
    fn check(&self, backend: Backend, pages: &mut [Guarded], side: Side) {
        let keys = KEYS.map(SealingKey::new);
        let mut jobs: Vec<SealJob<'_>> = pages
            .iter_mut()
            .zip(self.plain.iter().enumerate())
            .map(|(pages, (nth, plain))| SealJob {
                key: &keys[key_of(nth)],
                counter: nth as u64,
                packet: pages.place(plain, side),
            })
            .collect();
        backend.seal_batch(&mut jobs);
        for (job, sealed) in jobs.iter().zip(&self.sealed) {
            assert!(job.packet == sealed, "{backend} seals {} bytes differently", sealed.len());
        }
        self.assert_around(pages, side);

        let keys = KEYS.map(OpeningKey::new);
        let forged = self.sealed.len() / 2;
        let mut jobs: Vec<OpenJob<'_>> = pages
            .iter_mut()
            .zip(self.sealed.iter().enumerate())
            .map(|(pages, (nth, sealed))| OpenJob {
                key: &keys[key_of(nth)],
                counter: nth as u64,
                packet: pages.place(sealed, side),
                verified: false,
            })
            .collect();
        // A refused packet is wiped: that writes, too.
        jobs[forged].packet[0] ^= 1;
        backend.open_batch(&mut jobs);
        for (nth, (job, plain)) in jobs.iter().zip(&self.plain).enumerate() {
            let len = plain.len() - TAG_LEN;
            if nth == forged {
                assert!(!job.verified && job.packet.iter().all(|&byte| byte == 0), "{backend}");
            } else {
                assert!(job.verified && job.packet[..len] == plain[..len], "{backend}, {len}");
                assert_eq!(job.packet[len..], self.sealed[nth][len..], "{backend}: the spent tag");
            }
        }
        self.assert_around(pages, side);
    }

    fn assert_around(&self, pages: &mut [Guarded], side: Side) {
        for (pages, packet) in pages.iter_mut().zip(&self.plain) {
            pages.assert_around_is_untouched(packet.len(), side);
        }
    }
}

fn check_all(lens: impl Fn(usize) -> Vec<usize>, first_lens: impl Iterator<Item = usize>) {
    let backends = backends();
    let mut pages: Vec<Guarded> = Vec::new();
    for len in first_lens {
        for batch in BATCHES {
            let lens = lens(len);
            let packets = Packets::new((0..batch).map(|nth| lens[nth % lens.len()]));
            let longest = lens.iter().max().unwrap() + TAG_LEN;
            if pages.first().is_none_or(|pages| pages.len != longest.next_multiple_of(PAGE_LEN)) {
                pages.clear();
            }
            pages.resize_with(batch.max(pages.len()), || Guarded::new(longest));
            for &backend in &backends {
                for side in [Side::Begin, Side::End] {
                    packets.check(backend, &mut pages[..batch], side);
                }
            }
        }
    }
}

#[test]
fn the_pages_on_both_sides_are_closed() {
    let guarded = Guarded::new(2 * PAGE_LEN);
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let access = |at: usize| {
        let line = maps.lines().find(|line| {
            let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |digits| usize::from_str_radix(digits, 16).unwrap();
            (number(from)..number(to)).contains(&at)
        });
        line.unwrap().split(' ').nth(1).unwrap().to_owned()
    };
    let first = guarded.start.addr() + PAGE_LEN;
    assert_eq!([first - 1, first, first + 2 * PAGE_LEN - 1].map(access), ["---p", "rw-p", "rw-p"]);
    assert_eq!(access(first + 2 * PAGE_LEN), "---p");
}

#[test]
fn every_short_length() {
    check_all(|len| vec![len], 0..=300);
}

#[test]
fn short_lengths_mixed() {
    // Neighbours in a group are not alike: some are over while others go on.
    check_all(|len| vec![len, 300 - len, (len * 7) % 301, len / 2], 0..=300);
}

#[test]
fn long_lengths() {
    // Around strips of 8, 16 and 32 blocks, pages, and the longest datagrams.
    let around = |len: usize| len - 1..=len + 1;
    let lens = [512, 1024, 1408, 1424, 2048, 3072, 4096, 6144, 9000]
        .into_iter()
        .flat_map(around)
        .chain([16_383, 16_384, 32_769, 65_519, 65_534, 65_535]);
    check_all(|len| vec![len], lens.clone());
    check_all(|len| vec![len, 64, len - 17, 1420, 0], lens);
}
