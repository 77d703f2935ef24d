//! `millrace-control`: finds a path to each peer of one gateway and writes it into the data plane's
//! table. It holds no private key and sees no plaintext; without it traffic goes on as it goes.
#![forbid(unsafe_code)]

pub mod answers;
pub mod api;
pub mod clock;
pub mod counters;
pub mod endpoint_line;
pub mod gateway;
pub mod limits;
pub mod look_up;
pub mod names;
pub mod nat64_driver;
pub mod netcheck_driver;
pub mod network;
pub mod plane;
pub mod portmap_driver;
pub mod privileges;
pub mod relay_client;
pub mod relays;
pub mod service;
pub mod traffic;
pub mod udp;
mod verdict;
pub mod written_to;
