//! Sans-IO WireGuard over batches of packets: no socket, no clock, no randomness of its own, no log.
//!
//! Two halves share [`Shared`]:
//!
//! * the **fast half** runs on every worker: [`tx::TxBatch`] (route, segment, frame, seal) and
//!   [`rx`] (index, replay, open, allowed source), then [`coalesce`] towards the TUN device;
//! * the **slow half** is one [`device::Device`] on one thread: handshakes, cookies, timers, peers.
//!
//! The fast half tells the slow half what it saw by [`FastEvent`]s; the slow half answers by
//! publishing whole records (tables, sessions, endpoints) that workers pick up at the next batch.
#![forbid(unsafe_code)]

pub mod allowed_ips;
pub mod checksum;
pub mod coalesce;
pub mod cookie;
pub mod data_header;
pub mod device;
pub mod drops;
pub mod ecn;
pub mod fuzz;
pub mod icmp;
pub mod ip;
mod known_peer;
pub mod limits;
pub mod message;
mod noise;
pub mod peer;
pub mod rate_limit;
pub mod replay;
mod resolver;
pub mod rx;
pub mod secret;
pub mod segment;
pub mod session;
pub mod shared;
pub mod time;
pub mod timestamp;
pub mod tx;
pub mod vnet;

pub use drops::DropCounters;
pub use millrace_ebpf::drops::Drop;
pub use peer::{Endpoint, Path, Paths, Peer, PeerSlot, PublicKey};
pub use shared::{FastEvent, Shared, Tables};
pub use time::Instant;
