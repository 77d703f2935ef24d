//! The devices that a worker reads and writes. Everything below a batch of packets is here.

pub mod tun;
pub mod udp;
