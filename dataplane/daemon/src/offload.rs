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

    /// Tries the two socket offloads over loopback with a real send, and gives up what fails.
    pub fn probe(&self) {
        match probe_gso() {
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

/// Sends three datagrams in one call to ourselves. The segment length that was received, if the
/// kernel delivered them as one run.
fn probe_gso() -> io::Result<Option<usize>> {
    let refused = |failure: Failure| io::Error::other(failure.seen);
    let options = UdpOptions { port: 0, fwmark: 0, gro: true };
    let socket = UdpSocket::bind(options).map_err(refused)?;
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
