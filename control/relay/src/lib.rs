//! `millrace-relay`: carries packets between nodes that have no other way, addressed by public key
//! (DERP version 2 over HTTPS), and tells them where they are seen from (STUN).
//!
//! The way of a packet: [`worker`] reads a connection → [`traffic`] cuts frames, re-addresses them in
//! place and asks the [`registry`] where their destination is → the [`outbox`] of that connection, or
//! the [`mail`] of its worker → one write at the end of the turn ([`connection`]).
#![forbid(unsafe_code)]

pub mod acme;
pub mod addresses;
pub mod connection;
pub mod files;
pub mod http;
pub mod limits;
pub mod mail;
pub mod mesh;
pub mod metrics;
pub mod outbox;
pub mod rate;
pub mod registry;
pub mod service;
pub mod session;
pub mod settings;
pub mod shared;
pub mod stun;
pub mod traffic;
pub mod worker;
