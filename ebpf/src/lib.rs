//! The contract between XDP, the data plane, control and the relay.
//!
//! Without features this is only what both sides must agree on: drop reasons, message classes and
//! map layouts. `load` adds the programs and the maps, `link` the protocol between the data plane
//! and control.

pub mod abi;
pub mod class;
pub mod drops;
#[cfg(feature = "load")]
pub mod error;
#[cfg(feature = "link")]
pub mod fuzz;
#[cfg(feature = "link")]
pub mod link;
#[cfg(feature = "load")]
pub mod load;
#[cfg(feature = "load")]
pub mod maps;
pub mod shared_fds;
#[cfg(feature = "load")]
pub mod spec;
#[cfg(feature = "load")]
mod sys;
#[cfg(feature = "load")]
pub mod tables;
#[cfg(feature = "load")]
pub mod xdp_owner;
