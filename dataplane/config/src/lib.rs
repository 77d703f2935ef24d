//! Configuration of the data plane: TOML, wg0.conf, UAPI text and status, all pure.
#![forbid(unsafe_code)]
