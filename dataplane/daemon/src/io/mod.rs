//! The devices that a worker reads and writes. Everything below a batch of packets is here.

pub mod detour;
pub mod ethtool;
pub mod frame;
pub mod icmp;
pub mod lane;
pub mod netlink;
pub mod nexthop;
pub mod port_status;
mod ring;
pub mod sender_rest;
pub mod tap;
pub mod tun;
pub mod udp;
pub mod umem;
pub mod xdp_port;
pub mod xsk;
pub mod xsk_ledger;
