//! Offloads: each is tried with a real operation, used, and given up when the kernel refuses it.
//!
//! A refused operation is repeated in the next lower form, so that a demotion loses nothing. The
//! operator's `[offload]` switches start an offload in the state "off".

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The state of one offload, shared by all workers.
#[derive(Debug)]
pub struct Offload {
    pub name: &'static str,
    on: AtomicBool,
    /// Why it is on or off, for `status`.
    reason: Mutex<String>,
}

/// Every offload of the data path.
#[derive(Debug)]
pub struct Offloads {
    /// Many datagrams in one send (UDP_SEGMENT).
    pub udp_gso: Offload,
    /// Many datagrams in one receive (UDP_GRO).
    pub udp_gro: Offload,
    /// TCP super-packets from the TUN device.
    pub tun_tso: Offload,
    /// UDP super-packets from the TUN device.
    pub tun_uso: Offload,
    /// TCP packets merged before they are written to the TUN device.
    pub coalesce_tcp: Offload,
    /// The same for UDP.
    pub coalesce_udp: Offload,
}

impl Offload {
    fn new(name: &'static str, wanted: bool) -> Self {
        let reason = if wanted { "not tried yet" } else { "switched off in the configuration" };
        Self { name, on: AtomicBool::new(wanted), reason: Mutex::new(reason.into()) }
    }

    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Notes that a real operation worked.
    pub fn confirm(&self, how: impl fmt::Display) {
        if self.is_on() {
            self.explain(how.to_string());
        }
    }

    /// Gives the offload up until the next start.
    pub fn demote(&self, why: impl fmt::Display) {
        if self.on.swap(false, Ordering::Relaxed) {
            let why = why.to_string();
            tracing::warn!(offload = self.name, why, "offload given up");
            self.explain(why);
        }
    }

    pub fn reason(&self) -> String {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn explain(&self, why: String) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}

impl Offloads {
    pub fn new(wanted: &millrace_config::config::Offload) -> Self {
        Self {
            udp_gso: Offload::new("udp_gso", wanted.udp_gso),
            udp_gro: Offload::new("udp_gro", wanted.udp_gro),
            tun_tso: Offload::new("tun_tso", wanted.tun_tso),
            tun_uso: Offload::new("tun_uso", wanted.tun_uso),
            coalesce_tcp: Offload::new("coalesce_tcp", wanted.coalesce_tcp),
            coalesce_udp: Offload::new("coalesce_udp", wanted.coalesce_udp),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Offload> {
        [
            &self.udp_gso,
            &self.udp_gro,
            &self.tun_tso,
            &self.tun_uso,
            &self.coalesce_tcp,
            &self.coalesce_udp,
        ]
        .into_iter()
    }
}
