//! DERP version 2, both ends: the byte stream in which two nodes reach each other through a relay,
//! addressed by public key (Tailscale's derp/derp.go is the specification).
//!
//! A frame is a type, a length of four bytes and that many bytes of payload. After the HTTP
//! request of the client the stream opens with `ServerKey` (relay to client), `ClientInfo` and
//! `ServerInfo`, whose contents are boxed between the node's and the relay's key; then packets
//! flow. [`frame`] knows each frame's shape and bounds, [`cut`] takes them out of a stream of bytes
//! as it arrives without copying, [`login`] opens and seals the two boxes, and by the [`mesh_key`]
//! in one of them relays know each other.

pub mod cut;
pub mod frame;
pub mod login;
pub mod mesh_key;

pub use cut::Cutter;
pub use frame::{Frame, FrameError, Gone, Kind};
pub use login::{ClientInfo, LoginError, ServerInfo};
pub use mesh_key::MeshKey;

/// First bytes of a `ServerKey` frame: "DERP" and a key.
pub const MAGIC: [u8; 8] = [0x44, 0x45, 0x52, 0x50, 0xf0, 0x9f, 0x94, 0x91];
/// The version of the protocol in both infos.
pub const VERSION: u32 = 2;
/// Type and length before each payload.
pub const HEADER_LEN: usize = 5;
/// A public key inside a payload.
pub const KEY_LEN: usize = 32;
/// The largest packet that a relay carries.
pub const PACKET_MAX: usize = 64 << 10;
/// The largest frame that carries a packet between a client and a relay.
pub const PACKET_FRAME_MAX: usize = HEADER_LEN + KEY_LEN + PACKET_MAX;
/// A relay sends `KeepAlive` at least this often, plus some seconds of jitter.
pub const KEEP_ALIVE_S: u64 = 60;

#[cfg(test)]
mod tests;
