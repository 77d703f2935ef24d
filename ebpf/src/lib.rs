//! The contract between XDP, the data plane, control and the relay.
//!
//! Without the `load` feature this is only what both sides must agree on: drop reasons, message
//! classes and map layouts.

pub mod drops;
