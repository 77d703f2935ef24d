//! The millrace data plane as a library; `main.rs` is the thin binary.

pub mod clock;
pub mod control;
pub mod failure;
pub mod io;
pub mod offload;
pub mod queue;
pub mod worker;
