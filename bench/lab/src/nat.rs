//! Gateways behind NATs: an internet with a server site, and routers of every behaviour that RFC 4787
//! names, made of nftables and connection tracking.
//!
//! ```text
//!            server 2.255.1.10, 2.255.2.10, 2001:db8:5::10, ::11; coturn at .20, ::20, ::21
//!               │
//!             core ── no route to private or shared addresses
//!           ┌───┴────┐
//!      router 1    router 2        WAN 2.0.N.2, IPv6 prefix 2001:db8:N::/64
//!        │ lan       │ lan
//!       host       router 3        double NAT: its WAN is on router 2's LAN
//!                    │ lan
//!                   host
//! ```
//! The outside addresses only look public: nothing leads out of the namespaces. Documentation ranges
//! will not do for IPv4, because miniupnpd and tayga refuse them.

mod coturn;
mod derper;
mod faults;
mod host;
mod internet;
mod nat64;
mod router;
mod rules;
mod services;
mod wire;

pub use coturn::{STUN_PORT, STUN_V4, STUN_V6};
pub use derper::DERPER_PORT;
pub use faults::{Direction, Fault};
pub use host::Host;
pub use internet::{Internet, RELAY_NAME, SERVER_V4, SERVER_V6, names_for};
pub use nat64::Nat64;
pub use router::{Router, RouterOptions};
pub use rules::{Filtering, Hairpin, Input, Ipv6, Mapping, Nat, Policy};
pub use services::{PROXY_PORT, PortMapping};
pub use wire::{Impairment, Wire};
