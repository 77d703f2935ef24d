//! What a client of a relay tells its owner.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::derp::{Gone, ServerInfo};
use millrace_path::sealed::PublicKey;

use super::failure::RelayFailure;
use super::protocol::Packets;

/// What happened.
#[derive(Debug)]
pub enum RelayEvent<'c> {
    Connecting(Connecting),
    /// The owner must call [`super::RelayClient::give_box_key`] with the key of the boxes between the
    /// relay and this node.
    NeedBoxKey {
        relay_key: PublicKey,
    },
    Up(Up),
    /// In the order of arrival.
    Packets(Packets<'c>),
    PeerGone {
        peer: PublicKey,
        why: Gone,
    },
    /// What the relay says is wrong with this connection, as a second one with the same key; empty
    /// when all is well again. A stranger's words.
    Health(String),
    Restarting {
        reconnect_in: Duration,
        try_for: Duration,
    },
    /// Something that an operator should know and that ends nothing.
    Note(&'static str),
    Down {
        failure: RelayFailure,
        retry_at: Instant,
    },
}

/// What a connection that is not up yet waits for. Prints as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connecting {
    LookUp { host: String },
    Tcp { addresses: Vec<IpAddr>, port: u16 },
    Tunnel { proxy: SocketAddr, host: String, port: u16 },
    Tls { address: SocketAddr },
    Login { address: SocketAddr },
}

impl fmt::Display for Connecting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LookUp { host } => write!(f, "looking {host} up"),
            Self::Tcp { addresses, port } => {
                let addresses: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
                write!(f, "connecting to {} port {port}", addresses.join(", "))
            }
            Self::Tunnel { proxy, host, port } => {
                write!(f, "asking the proxy {proxy} for a tunnel to {host} port {port}")
            }
            Self::Tls { address } => write!(f, "starting TLS with {address}"),
            Self::Login { address } => write!(f, "logging in at {address}"),
        }
    }
}

/// A connection that carries packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Up {
    pub relay_key: PublicKey,
    pub info: ServerInfo,
    /// The other end of TCP: the relay, or the proxy.
    pub address: SocketAddr,
    pub proxied: bool,
    /// As "TLSv1_3"; none over plain HTTP.
    pub tls: Option<String>,
    /// From the start of the look-up to here.
    pub connect_time: Duration,
}

/// What was moved, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub logins: u64,
    pub failures: u64,
    pub sent_packets: u64,
    pub sent_bytes: u64,
    pub received_packets: u64,
    pub received_bytes: u64,
}
