//! What each map must be. aya takes any pinned map or passed fd for the one it looks for, so that
//! we compare with the kernel's own description before the first access.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::maps::MapData;
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::{self, ABI_MAGIC, ABI_VERSION, Abi};
use crate::drops;
use crate::error::LoadError;
use crate::sys;

/// `BPF_F_NO_PREALLOC` and `BPF_F_MMAPABLE` of linux/bpf.h.
pub const NO_PREALLOC: u32 = 1;
pub const MMAPABLE: u32 = 1 << 10;

/// Map types of linux/bpf.h.
pub const HASH: u32 = 1;
pub const ARRAY: u32 = 2;
pub const PERCPU_ARRAY: u32 = 6;
pub const XSKMAP: u32 = 17;
pub const REUSEPORT_SOCKARRAY: u32 = 20;

/// A map's shape as the kernel reports it. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    pub name: &'static str,
    pub kind: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

impl MapSpec {
    const fn new(name: &'static str, kind: u32, key_size: u32, value_size: usize) -> Self {
        Self { name, kind, key_size, value_size: value_size as u32, max_entries: 1, flags: 0 }
    }

    const fn entries(mut self, max_entries: u32) -> Self {
        self.max_entries = max_entries;
        self
    }

    const fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    /// Fails with the first field in which the map behind `fd` differs.
    pub fn check(&self, fd: BorrowedFd<'_>) -> Result<(), LoadError> {
        self.check_at(fd, None)
    }

    /// Opens a pinned map and checks it. The path is where the map was pinned on a bpffs.
    pub fn open(&self, path: &Path) -> Result<OwnedFd, LoadError> {
        let fd = MapData::from_pin(path)
            .map_err(map_io_error)
            .and_then(|map| map.fd().as_fd().try_clone_to_owned())
            .map_err(LoadError::map(self.name, "opening the pin"))?;
        self.check_at(fd.as_fd(), Some(path))?;
        Ok(fd)
    }

    fn check_at(&self, fd: BorrowedFd<'_>, path: Option<&Path>) -> Result<(), LoadError> {
        let info = fd
            .try_clone_to_owned()
            .and_then(|fd| MapData::from_fd(fd).map_err(map_io_error))
            .and_then(|map| map.info().map_err(map_io_error))
            .map_err(LoadError::map(self.name, "asking for its shape"))?;
        let kind = info.map_type().map_or(u32::MAX, |kind| kind as u32);
        let fields = [
            ("type", kind, self.kind),
            ("key size", info.key_size(), self.key_size),
            ("value size", info.value_size(), self.value_size),
            ("max entries", info.max_entries(), self.max_entries),
            ("flags", info.map_flags(), self.flags),
        ];
        match fields.into_iter().find(|(_, seen, expected)| seen != expected) {
            None => Ok(()),
            Some((field, seen, expected)) => Err(LoadError::MapMismatch {
                map: self.name,
                path: path.map(Path::to_owned),
                field,
                seen,
                expected,
            }),
        }
    }
}

/// The shape of every map, for the capacities that the loader chose.
#[derive(Clone, Copy, Debug)]
pub struct Specs {
    pub peers_max: u32,
    pub sessions_max: u32,
}

impl Specs {
    pub const ABI: MapSpec = MapSpec::new("ABI", ARRAY, 4, size_of::<Abi>());
    pub const FLAGS: MapSpec =
        MapSpec::new("FLAGS", ARRAY, 4, size_of::<abi::Flags>()).flags(MMAPABLE);
    pub const STATS: MapSpec = MapSpec::new("STATS", ARRAY, 4, size_of::<abi::Stats>())
        .entries(abi::WORKERS_MAX)
        .flags(MMAPABLE);
    pub const XSKS: MapSpec = MapSpec::new("XSKS", XSKMAP, 4, 4).entries(abi::QUEUES_MAX);
    pub const SOCKETS: MapSpec =
        MapSpec::new("SOCKETS", REUSEPORT_SOCKARRAY, 4, 4).entries(2 * abi::SOCKETS_PER_FAMILY);
    pub const DROPS: MapSpec = MapSpec::new("DROPS", PERCPU_ARRAY, 4, size_of::<abi::DropCount>())
        .entries(drops::COUNT as u32);
    pub const PASSED: MapSpec =
        MapSpec::new("PASSED", PERCPU_ARRAY, 4, size_of::<abi::DropCount>());
    pub const LOCAL_ADDRESSES: MapSpec = MapSpec::new("LOCAL_ADDRESSES", HASH, 16, 1)
        .entries(abi::LOCAL_ADDRESSES_MAX)
        .flags(NO_PREALLOC);
    pub const NEAR_ADDRESSES: MapSpec =
        MapSpec::new("NEAR_ADDRESSES", ARRAY, 4, size_of::<abi::NearAddresses>());
    pub const HANDSHAKES: MapSpec =
        MapSpec::new("HANDSHAKES", ARRAY, 4, 8 * abi::HANDSHAKE_WAYS).entries(abi::HANDSHAKE_SETS);

    pub fn endpoints(&self) -> MapSpec {
        MapSpec::new("ENDPOINTS", ARRAY, 4, size_of::<abi::Endpoint>())
            .entries(self.peers_max)
            .flags(MMAPABLE)
    }

    pub fn observed(&self) -> MapSpec {
        MapSpec::new("OBSERVED", ARRAY, 4, size_of::<abi::Observed>())
            .entries(self.peers_max)
            .flags(MMAPABLE)
    }

    pub fn sessions(&self) -> MapSpec {
        MapSpec::new("SESSIONS", ARRAY, 4, size_of::<abi::Session>()).entries(self.sessions_max)
    }
}

/// Reads the header from an ABI map that somebody else made and refuses what this build does not
/// speak. The capacities in it say which shapes the other maps must have.
pub fn read_abi(fd: BorrowedFd<'_>) -> Result<Specs, LoadError> {
    Specs::ABI.check(fd)?;
    let mut seen = Abi::new_zeroed();
    sys::map_lookup(fd, &0u32.to_ne_bytes(), seen.as_mut_bytes())
        .map_err(LoadError::map("ABI", "reading the header"))?;
    check_abi(&seen)?;
    Ok(Specs { peers_max: seen.peers_max, sessions_max: seen.sessions_max })
}

fn check_abi(seen: &Abi) -> Result<(), LoadError> {
    let expected = Abi::new(seen.peers_max, seen.sessions_max);
    let fields = [
        ("magic", seen.magic, ABI_MAGIC),
        ("version", seen.version, ABI_VERSION),
        ("endpoint size", seen.endpoint_size, expected.endpoint_size),
        ("observed size", seen.observed_size, expected.observed_size),
        ("session size", seen.session_size, expected.session_size),
        ("drop size", seen.drop_size, expected.drop_size),
        ("stats size", seen.stats_size, expected.stats_size),
        ("workers", seen.workers_max, expected.workers_max),
        ("queues", seen.queues_max, expected.queues_max),
        ("drop reasons", seen.drops_count, expected.drops_count),
    ];
    match fields.into_iter().find(|(_, seen, expected)| seen != expected) {
        None => Ok(()),
        Some((field, seen, expected)) => Err(LoadError::Abi { field, seen, expected }),
    }
}

fn map_io_error(error: aya::maps::MapError) -> std::io::Error {
    match error {
        aya::maps::MapError::SyscallError(error) => error.io_error,
        error => std::io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_of_another_version_is_refused_with_both_numbers() {
        let mut seen = Abi::new(8, 8);
        check_abi(&seen).expect("our own header");
        seen.version = 9;
        let error = check_abi(&seen).expect_err("another version");
        assert!(matches!(
            error,
            LoadError::Abi { field: "version", seen: 9, expected: ABI_VERSION }
        ));
    }
}
