//! The millrace data plane as a library; `main.rs` is the thin binary.
