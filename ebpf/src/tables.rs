//! The maps that user space writes by system call: sessions, sockets, rings, addresses; and the
//! drop counters. All methods take `&self`, so that threads share these as they are.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use zerocopy::{FromZeros, IntoBytes};

use crate::abi::{
    DropCount, NearAddresses, QUEUES_MAX, SOCKETS_PER_FAMILY, Session, WORKERS_MAX,
    local_address_key,
};
use crate::drops::{self, Drop};
use crate::error::LoadError;
use crate::spec::Specs;
use crate::sys;

/// SESSIONS: which receiver indices are live, and who owns them. The place of an index is its low
/// bits, as in the data plane's own table, which never has two live indices in one place.
#[derive(Debug)]
pub struct Sessions {
    map: OwnedFd,
    mask: u32,
}

impl Sessions {
    /// `sessions_max` is a power of two.
    pub(crate) fn new(map: OwnedFd, sessions_max: u32) -> Self {
        debug_assert!(sessions_max.is_power_of_two());
        Self { map, mask: sessions_max - 1 }
    }

    /// Call before the handshake message that tells the peer this index leaves, so that its first
    /// data packet finds it. Replaces what was in the same place.
    pub fn insert(&self, index: u32, peer_slot: u32, worker: u32) -> Result<(), LoadError> {
        if worker >= WORKERS_MAX {
            let (map, slots) = ("SESSIONS", WORKERS_MAX);
            return Err(LoadError::SlotOutOfRange { map, slot: worker, slots });
        }
        self.write(index, Session { index, live: 1, peer_slot, worker }, "inserting a session")
    }

    /// True if the index was there. Another index in the same place stays.
    pub fn remove(&self, index: u32) -> Result<bool, LoadError> {
        let found = self.get(index)?.is_some();
        if found {
            self.write(index, Session::default(), "removing a session")?;
        }
        Ok(found)
    }

    pub fn get(&self, index: u32) -> Result<Option<Session>, LoadError> {
        let mut session = Session::new_zeroed();
        let place = index & self.mask;
        sys::map_lookup(self.map.as_fd(), place.as_bytes(), session.as_mut_bytes())
            .map_err(LoadError::map("SESSIONS", "looking a session up"))?;
        Ok((session.live != 0 && session.index == index).then_some(session))
    }

    fn write(&self, index: u32, session: Session, action: &'static str) -> Result<(), LoadError> {
        let place = index & self.mask;
        sys::map_update(self.map.as_fd(), place.as_bytes(), session.as_bytes())
            .map_err(LoadError::map("SESSIONS", action))
    }
}

/// Which group a socket belongs to: the kernel keeps one per address family that is bound.
/// A dual-stack socket is `Inet6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketFamily {
    Inet4,
    Inet6,
}

/// Who reads a socket of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SocketSlot {
    /// Data messages of this worker's sessions. Below [`WORKERS_MAX`].
    Worker(u32),
    /// Handshakes.
    Slow,
    /// STUN, disco and Geneve.
    Control,
}

/// SOCKETS: what the reuseport program chooses from.
#[derive(Debug)]
pub struct Sockets(pub(crate) OwnedFd);

impl Sockets {
    /// The socket must be bound with SO_REUSEPORT, and may stand in one slot only (the kernel says
    /// EBUSY otherwise). It leaves its slot by itself when it is closed.
    pub fn set(
        &self,
        family: SocketFamily,
        slot: SocketSlot,
        socket: BorrowedFd<'_>,
    ) -> Result<(), LoadError> {
        let key = socket_key(family, slot)?;
        sys::map_update(self.0.as_fd(), key.as_bytes(), socket.as_raw_fd().as_bytes())
            .map_err(LoadError::map("SOCKETS", "entering a socket"))
    }

    /// True if there was a socket.
    pub fn clear(&self, family: SocketFamily, slot: SocketSlot) -> Result<bool, LoadError> {
        let key = socket_key(family, slot)?;
        sys::map_delete(self.0.as_fd(), key.as_bytes())
            .map_err(LoadError::map("SOCKETS", "removing a socket"))
    }
}

/// XSKS: the AF_XDP socket of each receive queue. Packets of a queue without one go to the kernel.
#[derive(Debug)]
pub struct Xsks(pub(crate) OwnedFd);

impl Xsks {
    /// The socket must be bound to the interface that the program is attached to and to this very
    /// queue: the kernel drops what is redirected to another.
    pub fn set(&self, queue: u32, socket: BorrowedFd<'_>) -> Result<(), LoadError> {
        sys::map_update(self.0.as_fd(), queue_key(queue)?.as_bytes(), socket.as_raw_fd().as_bytes())
            .map_err(LoadError::map("XSKS", "entering an AF_XDP socket"))
    }

    /// True if there was a socket.
    pub fn clear(&self, queue: u32) -> Result<bool, LoadError> {
        sys::map_delete(self.0.as_fd(), queue_key(queue)?.as_bytes())
            .map_err(LoadError::map("XSKS", "removing an AF_XDP socket"))
    }
}

/// Counters that each CPU keeps for itself.
#[derive(Debug)]
struct PerCpu {
    name: &'static str,
    map: OwnedFd,
    cpus: usize,
}

impl PerCpu {
    fn new(name: &'static str, map: OwnedFd) -> Result<Self, LoadError> {
        let cpus = sys::possible_cpus().map_err(LoadError::map(name, "counting possible CPUs"))?;
        Ok(Self { name, map, cpus })
    }

    /// The sum over all CPUs.
    fn get(&self, key: u32) -> Result<DropCount, LoadError> {
        let mut per_cpu = vec![DropCount::default(); self.cpus];
        sys::map_lookup(self.map.as_fd(), key.as_bytes(), per_cpu.as_mut_bytes())
            .map_err(LoadError::map(self.name, "reading a counter"))?;
        Ok(per_cpu.iter().fold(DropCount::default(), |sum, one| DropCount {
            packets: sum.packets.wrapping_add(one.packets),
            bytes: sum.bytes.wrapping_add(one.bytes),
        }))
    }
}

/// PASSED: data messages of live sessions that came on a queue without an AF_XDP socket.
#[derive(Debug)]
pub struct Passed(PerCpu);

impl Passed {
    pub(crate) fn new(map: OwnedFd) -> Result<Self, LoadError> {
        PerCpu::new("PASSED", map).map(Self)
    }

    pub fn get(&self) -> Result<DropCount, LoadError> {
        self.0.get(0)
    }
}

/// DROPS: what the programs threw away, summed over all CPUs.
#[derive(Debug)]
pub struct Drops(PerCpu);

impl Drops {
    pub(crate) fn new(map: OwnedFd) -> Result<Self, LoadError> {
        PerCpu::new("DROPS", map).map(Self)
    }

    /// The counters of another process's programs, by an fd that it gave.
    pub fn open(map: OwnedFd) -> Result<Self, LoadError> {
        Specs::DROPS.check(map.as_fd())?;
        Self::new(map)
    }

    pub fn get(&self, reason: Drop) -> Result<DropCount, LoadError> {
        self.0.get(reason as u32)
    }

    /// Every reason with its sum, in the order of `drops.h`.
    pub fn all(&self) -> Result<Vec<(Drop, DropCount)>, LoadError> {
        drops::ALL.iter().map(|(reason, ..)| Ok((*reason, self.get(*reason)?))).collect()
    }
}

/// LOCAL_ADDRESSES: the set of this host's addresses; and NEAR_ADDRESSES, its first few.
#[derive(Debug)]
pub struct LocalAddresses {
    map: OwnedFd,
    near: OwnedFd,
    present: Mutex<HashSet<[u8; 16]>>,
}

impl LocalAddresses {
    pub(crate) fn new(map: OwnedFd, near: OwnedFd) -> Self {
        Self { map, near, present: Mutex::default() }
    }

    /// Makes the set equal to `addresses`. New ones come first, so that no address that stays is
    /// missing at any moment. A near address that is half written matches nothing, and then the
    /// set is searched.
    pub(crate) fn replace(&self, addresses: &[IpAddr]) -> Result<(), LoadError> {
        let wanted: HashSet<_> = addresses.iter().copied().map(local_address_key).collect();
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        for key in wanted.difference(&present.clone()) {
            sys::map_update(self.map.as_fd(), key, &[1])
                .map_err(LoadError::map("LOCAL_ADDRESSES", "inserting an address"))?;
            present.insert(*key);
        }
        let mut near = NearAddresses::default();
        for (near, address) in near.iter_mut().zip(addresses) {
            *near = local_address_key(*address);
        }
        sys::map_update(self.near.as_fd(), 0u32.as_bytes(), near.as_bytes())
            .map_err(LoadError::map("NEAR_ADDRESSES", "writing the addresses"))?;
        for key in present.clone().difference(&wanted) {
            sys::map_delete(self.map.as_fd(), key)
                .map_err(LoadError::map("LOCAL_ADDRESSES", "removing an address"))?;
            present.remove(key);
        }
        Ok(())
    }
}

fn socket_key(family: SocketFamily, slot: SocketSlot) -> Result<u32, LoadError> {
    let slot = match slot {
        SocketSlot::Worker(slot) if slot < WORKERS_MAX => slot,
        SocketSlot::Worker(slot) => {
            let (map, slots) = ("SOCKETS", WORKERS_MAX);
            return Err(LoadError::SlotOutOfRange { map, slot, slots });
        }
        SocketSlot::Slow => WORKERS_MAX,
        SocketSlot::Control => WORKERS_MAX + 1,
    };
    Ok(match family {
        SocketFamily::Inet4 => slot,
        SocketFamily::Inet6 => SOCKETS_PER_FAMILY + slot,
    })
}

fn queue_key(queue: u32) -> Result<u32, LoadError> {
    if queue < QUEUES_MAX {
        return Ok(queue);
    }
    Err(LoadError::SlotOutOfRange { map: "XSKS", slot: queue, slots: QUEUES_MAX })
}
