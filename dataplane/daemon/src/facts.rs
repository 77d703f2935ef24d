//! What `status` says beyond WireGuard's own state: the `mr_` lines of an answer to `get=1`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use millrace_ebpf::drops;
use millrace_wg::{Drop, DropCounters};

use crate::control::About;
use crate::io::netlink::Netlink;
use crate::io::port_status::PortStatus;
use crate::io::udp::UdpSocket;
use crate::io::xdp_port::Port;
use crate::link::{Link, Place};
use crate::offload::Offloads;
use crate::steering::Steering;

/// Facts of a running data plane.
pub struct Facts {
    pub interface: String,
    pub listen_port: u16,
    pub fwmark: AtomicU32,
    pub cores: Vec<usize>,
    pub offloads: Arc<Offloads>,
    /// One for each worker, then the slow thread's.
    pub drops: Vec<Arc<DropCounters>>,
    pub worker_sockets: Vec<Arc<UdpSocket>>,
    /// The slow thread's own, if it has one.
    pub slow_socket: Option<Arc<UdpSocket>>,
    pub notes: Vec<String>,
    pub about: About,
    /// Of names of endpoints that were not found.
    pub name_note: Option<String>,
    /// The AF_XDP port, or why there is none.
    pub port: Result<Port, String>,
}

impl Facts {
    pub fn fwmark(&self) -> u32 {
        self.fwmark.load(Ordering::Relaxed)
    }

    /// What control is told of the interface.
    pub fn place(&self) -> Place<'_> {
        Place { interface: &self.interface, listen_port: self.listen_port, fwmark: self.fwmark() }
    }

    /// Key and value of each line, the key without `mr_`.
    pub fn lines(&self, steering: &Steering, link: &Link) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        let mut put = |key: &str, value: String| lines.push((key.to_owned(), value));
        put("version", env!("CARGO_PKG_VERSION").into());
        let port = match &self.port {
            Ok(port) => port.status(),
            Err(reason) => PortStatus::sockets(reason),
        };
        let kernel = KernelCounts::read(self);
        kernel.drops.add(Drop::HeardTooFast, link.unheard());
        put("receive", port.receive.into());
        put("receive_reason", port.receive_reason);
        put("device", port.device);
        put("queues", port.queues.to_string());
        put("xdp_frames", format!("{} {}", port.frames[0], port.frames[1]));
        put("xdp_passed", kernel.passed.to_string());
        put("xdp_fill_empty", kernel.fill_empty.to_string());
        let by_socket = if self.offloads.udp_gso.is_on() { "gso" } else { "socket" };
        put("transmit", if port.transmit_zero_copy { "xdp-zerocopy" } else { by_socket }.into());
        if let Some(warning) = port.warning {
            put("note", warning);
        }
        put("transmit_reason", port.transmit_reason);
        put("gso_reason", self.offloads.udp_gso.reason());
        put("inner", "tun".into());
        let aead = millrace_aead::choice();
        put("aead", aead.name().into());
        put("aead_reason", aead.reason());
        let cores: Vec<String> = self.cores.iter().map(usize::to_string).collect();
        put("workers", cores.join(","));
        match steering {
            Steering::On(_) => put("steering", "on".into()),
            Steering::Off(why) => put("steering", format!("off: {why}")),
        }
        put("control", link.status());
        put("connects", link.connects.to_string());
        put("past_firewall", link.past_firewall());
        for offload in self.offloads.iter() {
            let state = if offload.is_on() { "on" } else { "off" };
            put("offload", format!("{} {state} {}", offload.name, offload.reason()));
        }
        for (reason, packets) in self.drop_totals(steering) {
            put("drop", format!("{} {}", reason.name(), packets + kernel.drops.get(reason)));
        }
        for note in self.notes.iter().chain(&kernel.unread).chain(&self.name_note) {
            put("note", note.clone());
        }
        if let Some(error) = &self.about.config_error {
            put("config_error", error.clone());
        }
        // A value is one line.
        for (_, value) in &mut lines {
            *value = value.replace(['\n', '\r'], " ");
        }
        lines
    }

    /// Every reason of the list with the sum over all threads and the eBPF programs.
    fn drop_totals<'a>(&'a self, steering: &'a Steering) -> impl Iterator<Item = (Drop, u64)> + 'a {
        let by_programs = |reason| match steering {
            Steering::On(programs) => programs.drops.get(reason).map_or(0, |count| count.packets),
            Steering::Off(_) => 0,
        };
        drops::ALL.iter().map(move |&(reason, ..)| {
            let by_threads: u64 = self.drops.iter().map(|drops| drops.get(reason)).sum();
            (reason, by_threads + by_programs(reason))
        })
    }
}

/// What the kernel counts for us, read only when somebody asks: it costs no packet anything.
#[derive(Default)]
struct KernelCounts {
    drops: DropCounters,
    /// Data messages for AF_XDP on a queue without a socket; they came by the UDP sockets.
    passed: u64,
    /// Times the device found no frame of ours to receive into. With zero-copy the device drops
    /// then, and counts that itself.
    fill_empty: u64,
    /// Counters that could not be read, a sentence each.
    unread: Vec<String>,
}

impl KernelCounts {
    fn read(facts: &Facts) -> Self {
        let mut counts = Self::default();
        for socket in facts.worker_sockets.iter().chain(&facts.slow_socket) {
            let dropped = socket.kernel_drops();
            let dropped = counts.note("a UDP socket", dropped);
            counts.drops.add(Drop::RxSocketFull, dropped);
        }
        let dropped = Netlink::new().and_then(|netlink| netlink.dropped_sending(&facts.interface));
        // Without the interface the data plane is about to end, and says why.
        let dropped = counts.note(&facts.interface, dropped).unwrap_or_default();
        counts.drops.add(Drop::TunQueueFull, dropped);
        let Ok(port) = &facts.port else { return counts };
        counts.passed = counts.note("the XDP program", port.passed());
        let seen = counts.note("an AF_XDP socket", port.statistics());
        counts.fill_empty = seen.fill_ring_empty;
        for (reason, packets) in [
            (Drop::XdpRedirectFailed, seen.rx_dropped),
            (Drop::XdpRingFull, seen.rx_ring_full),
            (Drop::XdpRingClosed, seen.rx_abandoned),
            (Drop::XdpDescriptorInvalid, seen.rx_invalid),
            (Drop::TxDescriptorInvalid, seen.tx_invalid),
        ] {
            counts.drops.add(reason, packets);
        }
        counts
    }

    fn note<T: Default>(&mut self, whose: &str, result: io::Result<T>) -> T {
        result.unwrap_or_else(|error| {
            self.unread.push(format!("the drop counters of {whose} could not be read: {error}"));
            T::default()
        })
    }
}
