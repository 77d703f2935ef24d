//! How two WireGuard peers find a way to each other: no socket, no clock, no randomness of its own,
//! no log. The daemon, the simulator and the fuzzers run this same code.
//!
//! Two layers:
//!
//! * **wire formats**, each a parser and a writer of bytes that somebody else sent or will read;
//!   everything that must be unpredictable (nonces, transaction identifiers) is an argument;
//! * **state machines**, driven by `handle(now, input)` and emptied by `poll_output()`, which
//!   yields what to send, what happened, and the next instant with its reason.
#![forbid(unsafe_code)]

pub mod budget;
pub mod candidate;
pub mod derp;
pub mod disco;
pub mod finder;
pub mod fuzz;
pub mod home_relay;
pub mod introduce;
pub mod limits;
pub mod nat;
pub mod nat64;
pub mod netcheck;
pub mod output;
pub mod path;
mod peer;
pub mod portmap;
pub mod reflexive;
pub mod score;
pub mod sealed;
pub mod stun;
pub mod time;
pub mod transaction;
mod wire_address;

pub use output::{Event, Output, Reason, Refused, Route, Transmit, Why};
pub use time::Instant;
