//! The namespace lab: real kernels' networking, real peers, no contact with the host's own network.
//!
//! A [`Lab`] makes anonymous network namespaces and joins them with veth links. [`Site`] is the
//! topology that tests, demo and benches share. [`Gateway`] runs millrace or another WireGuard in
//! it, [`Capture`] watches the outside links and proves that nothing of the inside shows there.
//!
//! Everything is removed when its owner is dropped. A lab that is killed leaves nothing behind
//! either: namespaces have no name to leak and every child dies with its parent.

pub mod capture;
pub mod chance;
pub mod connection;
pub mod error;
pub mod flow;
pub mod gateway;
pub mod go_module;
pub mod guest;
pub mod hung_thread;
pub mod interrupt;
pub mod iperf;
pub mod keys;
pub mod lab;
pub mod marker;
pub mod namespace;
pub mod nat;
pub mod node;
pub mod overlay;
pub mod ping;
pub mod probe;
pub mod process;
pub mod refusal;
pub mod relay;
pub mod site;
pub mod tunnel;
pub mod wait;
#[cfg(feature = "xsk")]
pub mod xsk_peer;

pub use capture::Capture;
pub use chance::second_chance;
pub use connection::Connection;
pub use error::{Error, Result};
pub use flow::Flow;
pub use gateway::{Gateway, GatewayOptions, Implementation, Peer};
pub use guest::{Card, Guest, GuestOptions, Wire};
pub use hung_thread::HungThread;
pub use lab::Lab;
pub use marker::{InnerPrefix, Marker};
pub use namespace::Namespace;
pub use node::{Node, NodeOptions, Pair, Path};
pub use process::Daemon;
pub use refusal::Refusal;
pub use relay::Relay;
pub use site::{Side, Site, SiteOptions};
pub use tunnel::{Tunnel, TunnelOptions};
pub use wait::wait_for;
#[cfg(feature = "xsk")]
pub use xsk_peer::XskPeer;
