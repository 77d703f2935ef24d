//! The protocol between the data plane and control: one message a datagram over a unix
//! SOCK_SEQPACKET socket, descriptors by SCM_RIGHTS.
//!
//! The data plane listens at [`path`] and serves one client; a new one replaces the old, which sees
//! the end of its connection and must close what it was given. Both ends take the other for
//! untrusted: messages are parsed strictly and bounded, and whoever breaks a rule is left.
//!
//! ```text
//! control → data plane   Hello                         WantBoxKey…  ConnectNow…
//! data plane → control          Welcome + descriptors  PeerUp… Synced  BoxKey…  PeerUp, PeerDown, Heard, …
//! ```
//!
//! No secret passes but box keys (see [`BoxKey`]): never a private key, never a raw Diffie-Hellman
//! result, never a packet that is not sealed.

pub mod client;
pub mod detour;
pub mod message;
pub mod server;
mod socket;
mod wire;

use std::fmt;
use std::path::{Path, PathBuf};

pub use client::{Delivery, Handles, LinkClient, MapHandles};
pub use detour::{DetourSocket, DetourSockets, Run};
pub use message::{
    BoxKey, BoxKeyAnswer, BoxKeyRefusal, Heard, Peer, Steering, ToControl, ToDataPlane, Welcome,
};
pub use server::{LinkListener, LinkPeer, Offer};
pub use socket::LinkError;

/// Both ends must be of one version; there is no negotiation.
pub const VERSION: u16 = 2;

/// Bytes of the longest message.
pub const MESSAGE_LEN_MAX: usize = 2048;
/// Prefixes in one message; the rest of a peer's follow in [`ToControl::AllowedIps`].
pub const PREFIXES_PER_MESSAGE: usize = 64;
/// Bytes of a sentence that says why something is not there.
pub const REASON_LEN_MAX: usize = 512;
/// Bytes of a frame in [`Heard`]: pings and pongs have 124 and less; what proves that long frames pass
/// comes when the host's firewall knows the flow.
pub const HEARD_LEN_MAX: usize = 256;
/// Bytes of an interface's name: `IFNAMSIZ` without the zero.
pub const INTERFACE_LEN_MAX: usize = 15;
/// Descriptors of a [`Welcome`]: maps, the UDP socket, detours of the slow thread and workers.
pub const DESCRIPTORS_MAX: usize = 5 + 1 + 1 + crate::abi::WORKERS_MAX as usize;
/// Messages that wait for a client that reads slowly; one that lets more wait is left. Four times
/// the peers that a device may have.
pub const OUTBOX_MESSAGES_MAX: usize = 65_536;

/// Where the data plane's sockets lie.
pub const DIRECTORY: &str = "/run/millrace";
/// Members of this group may connect; without such a group only root.
pub const GROUP: &str = "millrace";

/// Where the data plane of `interface` listens.
pub fn path(interface: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{interface}.link"))
}

/// A Curve25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "PublicKey({a:02x}{b:02x}{c:02x}{d:02x}..)")
    }
}
