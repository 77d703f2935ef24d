//! The devices that a worker reads and writes. Everything below a batch of packets is here.

pub mod frame;
mod ring;
pub mod tun;
pub mod udp;
pub mod umem;
pub mod xsk;
