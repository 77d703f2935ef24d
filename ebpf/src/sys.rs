//! The few bpf(2) commands that we issue ourselves: element access through any map fd, by shared
//! reference, and the XDP link, because aya falls back to a netlink attachment, which would
//! survive us.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const LINK_CREATE: libc::c_long = 28;

const ATTACH_TYPE_XDP: u32 = 37;
const XDP_FLAGS_DRIVER_MODE: u32 = 1 << 2;

/// The part of `union bpf_attr` that element commands read.
#[repr(C)]
struct Element {
    map_fd: RawFd,
    padding: u32,
    key: u64,
    /// Or the place for the next key.
    value: u64,
    flags: u64,
}

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` reads for XDP.
#[repr(C)]
struct LinkCreate {
    program_fd: RawFd,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// `key` and `value` must have the sizes that the map was made with; callers know them from
/// [`crate::spec`], which compared them with the kernel's.
pub(crate) fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    element(MAP_UPDATE_ELEM, map, key, value.as_ptr() as u64)
}

/// True if there was such an element. Sizes as in [`map_update`]; `value` must have room for one
/// value, or for one per possible CPU if the map is per CPU.
pub(crate) fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    found(element(MAP_LOOKUP_ELEM, map, key, value.as_mut_ptr() as u64))
}

/// True if there was such an element. Sizes as in [`map_update`].
pub(crate) fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    found(element(MAP_DELETE_ELEM, map, key, 0))
}

/// Attaches in native mode. The program stays as long as the returned fd.
pub(crate) fn link_xdp(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    let mut attribute = LinkCreate {
        program_fd: program.as_raw_fd(),
        target_ifindex: ifindex,
        attach_type: ATTACH_TYPE_XDP,
        flags: XDP_FLAGS_DRIVER_MODE,
    };
    let fd = bpf(LINK_CREATE, &mut attribute)?;
    // SAFETY: the kernel has just made this fd for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// How many values a per-CPU map's look-up writes: CPUs that may ever come online.
pub(crate) fn possible_cpus() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    parse_cpu_ranges(text.trim()).ok_or_else(|| {
        io::Error::other(format!("/sys/devices/system/cpu/possible is no list of CPUs: {text:?}"))
    })
}

/// Time between two ticks of the kernel (1 s / CONFIG_HZ): how coarse its coarse clocks are.
pub(crate) fn jiffy_ns() -> io::Result<u32> {
    let mut resolution = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which outlives the call.
    if unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut resolution) } < 0 {
        return Err(io::Error::last_os_error());
    }
    match (resolution.tv_sec, u32::try_from(resolution.tv_nsec)) {
        (0, Ok(ns @ 1..)) => Ok(ns),
        _ => Err(io::Error::other("the coarse clock has no resolution below a second")),
    }
}

/// From the kernel's generator.
pub(crate) fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // SAFETY: the buffer has the length that is given and outlives the call.
    let written = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(written) {
        Ok(8) => Ok(u64::from_ne_bytes(bytes)),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn parse_cpu_ranges(text: &str) -> Option<usize> {
    text.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1)
        })
        .sum()
}

fn element(command: libc::c_long, map: BorrowedFd<'_>, key: &[u8], value: u64) -> io::Result<()> {
    let key = key.as_ptr() as u64;
    let mut attribute = Element { map_fd: map.as_raw_fd(), padding: 0, key, value, flags: 0 };
    bpf(command, &mut attribute).map(drop)
}

fn bpf<T>(command: libc::c_long, attribute: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attribute` is a prefix of union bpf_attr of exactly the length given; the kernel
    // takes what lies behind it as zero. The addresses in it are of slices that the callers hold
    // borrowed across this call, of the sizes that the map has.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attribute), size_of::<T>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn found(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_cpu_ranges;

    #[test]
    fn cpu_ranges_are_counted() {
        assert_eq!(parse_cpu_ranges("0-1"), Some(2));
        assert_eq!(parse_cpu_ranges("0"), Some(1));
        assert_eq!(parse_cpu_ranges("0-3,8-11"), Some(8));
        assert_eq!(parse_cpu_ranges("3-0"), None);
        assert_eq!(parse_cpu_ranges(""), None);
    }
}
