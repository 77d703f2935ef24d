//! `millrace-control`: finds a path to each peer of one gateway and writes it into the data plane's
//! table. It holds no private key and sees no plaintext; without it traffic goes on as it goes.
#![forbid(unsafe_code)]

pub mod failure;
pub mod limits;
pub mod network;
