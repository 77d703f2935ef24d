//! Offloads: each is tried with a real operation, used, and given up when the kernel refuses it.
//!
//! A refused operation is repeated in the next lower form, so that a demotion loses nothing. The
//! operator's `[offload]` switches start an offload in the state "off".

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use millrace_wg::Endpoint;

use crate::failure::Failure;
use crate::io::udp::{Receiver, UdpOptions, UdpSocket};

/// The state of one offload, shared by all workers.
#[derive(Debug)]
pub struct Offload {
    pub name: &'static str,
    on: AtomicBool,
    /// It is on, and `reason` says for whom it is not.
    limited: AtomicBool,
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
        Self {
            name,
            on: AtomicBool::new(wanted),
            limited: AtomicBool::new(false),
            reason: Mutex::new(reason.into()),
        }
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

    /// Notes, once, that it stays on but is not for all.
    pub fn limit(&self, what: impl fmt::Display) {
        if !self.limited.swap(true, Ordering::Relaxed) {
            let what = what.to_string();
            tracing::warn!(offload = self.name, what, "offload limited");
            self.explain(format!("{}; {what}", self.reason()));
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

    /// Gives up what a kernel is known to do wrong without an error, so that no probe and no send
    /// can tell. `release` is that of uname(2).
    pub fn avoid_defects(&self, release: &str) {
        if !mangles_equal_segments(release) {
            return;
        }
        // The second too: what is merged for the TUN device, the kernel cuts again on the LAN side.
        for offload in [&self.udp_gso, &self.coalesce_udp] {
            offload.demote(format_args!(
                "Linux {release} sends runs of equal UDP datagrams with wrong headers through some \
                 drivers; update to 7.1.5 or later"
            ));
        }
    }

    /// Turns UDP_GRO on for the sockets of the port: all or none.
    pub fn receive_runs(&self, sockets: &[&UdpSocket]) {
        if !self.udp_gro.is_on() {
            return;
        }
        if let Some(error) = sockets.iter().find_map(|socket| socket.set_gro(true).err()) {
            self.udp_gro.demote(format_args!("the kernel refused UDP_GRO: {error}"));
            for socket in sockets {
                // Those that it did not refuse before take it back.
                let _ = socket.set_gro(false);
            }
        }
    }

    /// Tries the two socket offloads over loopback with a real send, and gives up what fails.
    pub fn probe(&self) {
        match probe_gso(self.udp_gro.is_on()) {
            Ok(received) => {
                self.udp_gso.confirm("a probe over loopback was cut as asked");
                if received.is_some() {
                    self.udp_gro.confirm("a probe over loopback arrived in one piece");
                } else {
                    self.udp_gro.confirm("the kernel took the option");
                }
            }
            Err(error) if blames_form(&error) => {
                self.udp_gso.demote(format_args!("the probe over loopback: {error}"));
            }
            // Loopback may be down; the first real send will tell.
            Err(error) => {
                self.udp_gso.confirm(format_args!("not probed ({error}); until a send is refused"));
                self.udp_gro.confirm("the kernel took the option");
            }
        }
        for offload in [&self.coalesce_tcp, &self.coalesce_udp] {
            offload.confirm("until the TUN device refuses a super-packet");
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

/// The kernel refuses the form of an operation, whatever its content.
pub fn blames_form(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EIO | libc::EMSGSIZE | libc::EOPNOTSUPP)
    )
}

/// Linux 7.0 to 7.1.4 give some drivers wrong UDP lengths and checksums where a run has no shorter
/// last datagram, and most of the run is lost (Linux b10b446; tailscale/tailscale#19777). Kernels of
/// distributions keep their number when they take the repair over, so a few good ones are avoided.
fn mangles_equal_segments(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .next()
        .unwrap_or_default()
        .split('.')
        .map(|number| number.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let version = (next(), next(), next());
    ((7, 0, 0)..(7, 1, 5)).contains(&version)
}

/// Sends three datagrams in one call to ourselves. The segment length that was received, if the
/// kernel delivered them as one run.
fn probe_gso(gro: bool) -> io::Result<Option<usize>> {
    let refused = |failure: Failure| io::Error::other(failure.seen);
    let socket = UdpSocket::bind(UdpOptions { port: 0, fwmark: 0 }).map_err(refused)?;
    socket.set_gro(gro)?;
    let loopback: IpAddr = [127, 0, 0, 1].into();
    let remote = SocketAddr::new(loopback, socket.port()?);
    let to = Endpoint { remote, local: Some(loopback), ifindex: 0 };
    socket.send(&to, 0, &[0x5a; 250], 100)?;
    let mut receiver = Receiver::new();
    let mut lens = Vec::new();
    let mut run = None;
    // Loopback delivers within the send; a few tries cover a busy machine.
    for _ in 0..8 {
        let count = receiver.receive(&socket, 8)?;
        for message in receiver.messages(count) {
            run =
                run.or((message.segment_len < message.bytes.len()).then_some(message.segment_len));
            lens.extend(message.bytes.chunks(message.segment_len.max(1)).map(<[u8]>::len));
        }
        if lens.iter().sum::<usize>() >= 250 {
            break;
        }
    }
    if lens == [100, 100, 50] { Ok(run) } else { Err(io::Error::other("it arrived changed")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_wanted() -> Offloads {
        Offloads::new(&millrace_config::config::Offload::default())
    }

    #[test]
    fn kernels_that_mangle_runs_are_known_by_their_number() {
        let mangling =
            ["7.0.0", "7.0.0-14-generic", "7.0-rc1", "7.0.31", "7.1", "7.1.4-arch1-1", "7.1.4"];
        for release in mangling {
            assert!(mangles_equal_segments(release), "{release}");
        }
        let sound = [
            "6.18.44-fc-v595",
            "6.99.9",
            "7.1.5",
            "7.1.10+deb13-amd64",
            "7.2.12+deb13-amd64",
            "7.10.0",
            "8.0.1",
            "70.1.2",
            "",
            "mainline",
        ];
        for release in sound {
            assert!(!mangles_equal_segments(release), "{release}");
        }
    }

    #[test]
    fn on_a_kernel_that_mangles_runs_a_good_probe_changes_nothing() {
        let offloads = all_wanted();
        offloads.avoid_defects("7.1.2-amd64");
        offloads.probe();
        let off: Vec<_> = offloads.iter().filter(|o| !o.is_on()).map(|o| o.name).collect();
        assert_eq!(off, ["udp_gso", "coalesce_udp"]);
        for offload in [&offloads.udp_gso, &offloads.coalesce_udp] {
            assert!(
                offload.reason().starts_with("Linux 7.1.2-amd64 sends"),
                "{}",
                offload.reason()
            );
        }
        let offloads = all_wanted();
        offloads.avoid_defects("7.2.12");
        offloads.probe();
        assert!(offloads.iter().all(Offload::is_on));
        assert_eq!(offloads.udp_gso.reason(), "a probe over loopback was cut as asked");
    }

    #[test]
    fn what_the_operator_switched_off_keeps_that_reason() {
        let wanted = millrace_config::config::Offload { udp_gso: false, ..Default::default() };
        let offloads = Offloads::new(&wanted);
        offloads.avoid_defects("7.0.1");
        assert_eq!(offloads.udp_gso.reason(), "switched off in the configuration");
    }
}
