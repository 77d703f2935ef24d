//! The contract between XDP, the data plane, control and the relay.
//!
//! Without the `load` feature this is only what both sides must agree on: drop reasons, message
//! classes and map layouts.

pub mod abi;
pub mod class;
pub mod drops;
#[cfg(feature = "load")]
pub mod error;
#[cfg(feature = "load")]
pub mod load;
#[cfg(feature = "load")]
pub mod maps;
#[cfg(feature = "load")]
pub mod spec;
#[cfg(feature = "load")]
mod sys;
#[cfg(feature = "load")]
pub mod tables;
#[cfg(feature = "load")]
pub mod xdp_owner;
