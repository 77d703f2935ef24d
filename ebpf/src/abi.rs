//! Everything that crosses between the programs and user space: the Rust twin of `bpf/abi.h`.
//!
//! `tests/layout.rs` compares offsets and sizes with the object's BTF. Any change here raises
//! [`ABI_VERSION`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::drops;

pub const ABI_MAGIC: u32 = 0x6d69_6c6c;
pub const ABI_VERSION: u32 = 6;

pub const PEERS_MAX_DEFAULT: u32 = 1024;
pub const SESSIONS_MAX_DEFAULT: u32 = 8192;
pub const WORKERS_MAX: u32 = 64;
pub const QUEUES_MAX: u32 = 256;
pub const LOCAL_ADDRESSES_MAX: u32 = 4096;
/// Addresses that XDP compares before it searches LOCAL_ADDRESSES.
pub const NEAR_ADDRESSES_MAX: usize = 4;
pub const STATS_DROPS_MAX: usize = 64;

pub const HANDSHAKE_INTERVAL_NS: u64 = 2_000_000;
pub const HANDSHAKE_BURST: u64 = 512;
pub const HANDSHAKE_SETS: u32 = 4096;
pub const HANDSHAKE_WAYS: usize = 4;
/// Time in HANDSHAKES is counted in 2 to this power of nanoseconds.
pub const HANDSHAKE_TICK_SHIFT: u32 = 16;

/// SOCKETS: slots of one family (workers, slow thread, control).
pub const SOCKETS_PER_FAMILY: u32 = WORKERS_MAX + 2;

/// ABI\[0\]: what everyone who opens the maps reads first.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Abi {
    pub magic: u32,
    pub version: u32,
    pub endpoint_size: u32,
    pub observed_size: u32,
    pub session_size: u32,
    pub drop_size: u32,
    pub stats_size: u32,
    pub peers_max: u32,
    pub sessions_max: u32,
    pub workers_max: u32,
    pub queues_max: u32,
    pub drops_count: u32,
}

impl Abi {
    /// What this build writes for the given capacities.
    pub fn new(peers_max: u32, sessions_max: u32) -> Self {
        Self {
            magic: ABI_MAGIC,
            version: ABI_VERSION,
            endpoint_size: size_of::<Endpoint>() as u32,
            observed_size: size_of::<Observed>() as u32,
            session_size: size_of::<Session>() as u32,
            drop_size: size_of::<DropCount>() as u32,
            stats_size: size_of::<Stats>() as u32,
            peers_max,
            sessions_max,
            workers_max: WORKERS_MAX,
            queues_max: QUEUES_MAX,
            drops_count: drops::COUNT as u32,
        }
    }
}

/// FLAGS\[0\]: words that user space may change at any time. 0 is false.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Flags {
    /// SESSIONS holds every live index: an index that is not there is nobody's.
    pub authoritative: u32,
    /// LOCAL_ADDRESSES holds every address of this host: act on packets to these only.
    pub local_addresses: u32,
}

/// How to reach a peer. Numbers equal `enum endpoint_kind` in C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EndpointKind {
    /// Classic WireGuard: answer where the peer last spoke from.
    Unset = 0,
    Direct = 1,
    /// The prefix stands before every message.
    PeerRelay = 2,
    /// Hand the sealed message to control.
    Detour = 3,
}

/// ENDPOINTS\[peer slot\]: written by control, read by the data plane. Untrusted on reading: use
/// the methods.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Endpoint {
    /// Odd while being written; kept by [`crate::maps`].
    pub seq: u32,
    pub kind: u8,
    /// 4, 6, or 0: no address.
    pub family: u8,
    /// Host order.
    pub port: u16,
    /// Network order; IPv4 in the first 4 bytes.
    pub address: [u8; 16],
    /// Source address to use; all zero: the kernel's choice.
    pub local: [u8; 16],
    /// 0: the kernel's choice.
    pub ifindex: u32,
    /// Bytes of a whole outer packet; 0: not known.
    pub path_mtu: u16,
    pub prefix_length: u8,
    pub reserved: u8,
    pub prefix: [u8; 16],
}

impl Endpoint {
    /// None for a number that no kind has.
    pub fn kind(&self) -> Option<EndpointKind> {
        match self.kind {
            0 => Some(EndpointKind::Unset),
            1 => Some(EndpointKind::Direct),
            2 => Some(EndpointKind::PeerRelay),
            3 => Some(EndpointKind::Detour),
            _ => None,
        }
    }

    pub fn remote(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(read_address(self.family, &self.address)?, self.port))
    }

    pub fn local(&self) -> Option<IpAddr> {
        read_address(self.family, &self.local).filter(|address| !address.is_unspecified())
    }

    /// An IPv4-mapped address is written as IPv4.
    pub fn set_remote(&mut self, remote: SocketAddr) {
        (self.family, self.address) = write_address(remote.ip());
        self.port = remote.port();
    }

    /// Of the same family as the remote address.
    pub fn set_local(&mut self, local: IpAddr) {
        self.local = write_address(local).1;
    }

    /// Bytes that stand before every message; empty unless the kind is `PeerRelay`.
    pub fn prefix(&self) -> &[u8] {
        self.prefix.get(..usize::from(self.prefix_length)).unwrap_or(&[])
    }
}

/// OBSERVED\[peer slot\]: written by the data plane, read by control. Times are CLOCK_MONOTONIC
/// nanoseconds, 0: never.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Observed {
    /// Odd while being written; kept by [`crate::maps`].
    pub seq: u32,
    /// 4, 6, or 0: no address.
    pub family: u8,
    /// How the peer last spoke to us: [`EndpointKind::Unset`] for nothing authenticated yet,
    /// `Direct`, or `Detour`.
    pub kind: u8,
    /// Host order.
    pub port: u16,
    pub address: [u8; 16],
    pub local: [u8; 16],
    pub ifindex: u32,
    pub reserved2: u32,
    pub received_ns: u64,
    pub sent_ns: u64,
    pub handshake_ns: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    /// First data sent since anything authenticated was received; 0: all is answered.
    pub unanswered_ns: u64,
    pub reserved3: [u64; 4],
}

impl Observed {
    pub fn remote(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(read_address(self.family, &self.address)?, self.port))
    }

    pub fn set_remote(&mut self, remote: SocketAddr, local: Option<IpAddr>, ifindex: u32) {
        (self.family, self.address) = write_address(remote.ip());
        self.port = remote.port();
        self.local = local.map_or([0; 16], |local| write_address(local).1);
        self.ifindex = ifindex;
    }
}

/// SESSIONS\[receiver index modulo sessions_max\].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Session {
    pub index: u32,
    /// 0: the place is free.
    pub live: u32,
    pub peer_slot: u32,
    /// Below [`WORKERS_MAX`].
    pub worker: u32,
}

/// DROPS\[reason\], one per CPU. Bytes are those of whole frames.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DropCount {
    pub packets: u64,
    pub bytes: u64,
}

/// STATS\[worker\]: each number has one writer and is read alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stats {
    /// CLOCK_MONOTONIC of the worker's last batch.
    pub heartbeat_ns: u64,
    pub received_packets: u64,
    pub received_bytes: u64,
    pub received_batches: u64,
    pub sent_packets: u64,
    pub sent_bytes: u64,
    pub sent_batches: u64,
    pub reserved: u64,
    /// By reason.
    pub drops: [u64; STATS_DROPS_MAX],
}

impl Default for Stats {
    fn default() -> Self {
        Self::new_zeroed()
    }
}

/// NEAR_ADDRESSES\[0\]: keys of LOCAL_ADDRESSES; all zero: none.
pub type NearAddresses = [[u8; 16]; NEAR_ADDRESSES_MAX];

/// Key of LOCAL_ADDRESSES: IPv4 as IPv4-mapped IPv6.
pub fn local_address_key(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn read_address(family: u8, bytes: &[u8; 16]) -> Option<IpAddr> {
    match family {
        4 => Some(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
        6 => Some(Ipv6Addr::from(*bytes).into()),
        _ => None,
    }
}

/// Family and bytes of a line. An IPv4-mapped address is written as IPv4.
fn write_address(address: IpAddr) -> (u8, [u8; 16]) {
    match address.to_canonical() {
        IpAddr::V4(address) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&address.octets());
            (4, bytes)
        }
        IpAddr::V6(address) => (6, address.octets()),
    }
}

const _: () = assert!(size_of::<Abi>() == 48);
const _: () = assert!(size_of::<Flags>() == 8);
const _: () = assert!(size_of::<Endpoint>() == 64);
const _: () = assert!(size_of::<Observed>() == 128);
const _: () = assert!(size_of::<Session>() == 16);
const _: () = assert!(size_of::<DropCount>() == 16);
const _: () = assert!(size_of::<Stats>() == 64 + 8 * STATS_DROPS_MAX);
const _: () = assert!(drops::COUNT <= STATS_DROPS_MAX);
