//! One worker's drop counters: written by that worker alone, read by status and metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use millrace_ebpf::drops::{ALL, COUNT, Drop};

/// A counter for every reason of the drop list.
pub struct DropCounters([AtomicU64; COUNT]);

impl Default for DropCounters {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; COUNT])
    }
}

impl DropCounters {
    pub fn add(&self, reason: Drop, packets: u64) {
        self.0[reason as usize].fetch_add(packets, Ordering::Relaxed);
    }

    pub fn get(&self, reason: Drop) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }

    /// Every reason with its count, in the order of the list.
    pub fn iter(&self) -> impl Iterator<Item = (Drop, u64)> + '_ {
        ALL.iter().map(|&(reason, ..)| (reason, self.get(reason)))
    }
}
