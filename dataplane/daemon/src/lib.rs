//! The millrace data plane as a library; `main.rs` is the thin binary.

pub mod control;
pub mod failure;
