//! What the control process answers to `status`, `why` and `ping`: JSON on a unix socket, one
//! request and one answer a line. Within a schema's number fields are only added. No secret is in it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where the control process of `interface` answers.
pub fn socket(interface: &str) -> PathBuf {
    Path::new("/run/millrace").join(format!("{interface}.control"))
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Answered by [`Paths`].
    Status,
    /// Answered by [`WhyPeer`], or [`Refusal`]. `peer`: its key in base64.
    Why { peer: String },
    /// One ping along the present path; answered by [`Pong`] within five seconds, or [`Refusal`].
    Ping { peer: String },
}

/// The request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub error: String,
}

/// `millrace.paths/1`: how the gateway reaches its peers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paths {
    pub schema: String,
    pub interface: String,
    pub version: String,
    /// Why no paths can be found now; none: all is well.
    pub problem: Option<String>,
    /// What does not work and ends nothing, a sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
    pub disco_key: Option<String>,
    /// Where peers find us.
    pub home_relay: Option<String>,
    pub relays: Vec<Relay>,
    pub nat: Nat,
    pub peers: Vec<PeerPath>,
    /// Everything that was lost, refused or not used, those that never happened included.
    pub counters: Vec<Counter>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Relay {
    pub url: String,
    pub up: bool,
    /// How it is, in a sentence.
    pub state: String,
    /// What makes us believe its certificate.
    #[serde(default)]
    pub trust: Trust,
    /// Whether it may have one DERP key only.
    #[serde(default)]
    pub key_pinned: bool,
    pub since_seconds: Option<f64>,
    pub rtt_seconds: Option<f64>,
    /// What the relay says is wrong with our connection; empty: nothing.
    pub health: String,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// Packets that waited for the connection for too long, or found none.
    pub dropped_packets: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// There is none: it is reached without TLS.
    #[default]
    None,
    /// An authority of the system signed it.
    System,
    /// An authority of `relay_ca_file`.
    File,
    /// One of either.
    SystemOrFile,
    /// It is the one that the configuration names.
    Pinned,
}

/// What is between us and the others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Nat {
    /// Where STUN servers see our port.
    pub seen: Vec<String>,
    /// Whether that depends on whom we send to.
    pub mapping_varies: Option<bool>,
    #[serde(default)]
    pub kind: NatKind,
    /// Why it is not known what is filtered; none: it is.
    #[serde(default)]
    pub filtering_unknown: Option<String>,
    /// What a router opened for us, as "pcp 198.51.100.7:51820".
    pub port_mapping: Option<String>,
    /// What peers are told.
    pub candidates: Vec<String>,
}

/// What a NAT or firewall does, in the words of `millrace.netcheck/1`; none: not known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatKind {
    /// IPv4: `none` (no translation), `endpoint_independent`, `address_dependent`,
    /// `address_and_port_dependent`, `dependent`.
    pub mapping: Option<String>,
    /// IPv4: `endpoint_independent` (everybody is let in), `address_dependent`,
    /// `address_and_port_dependent`.
    pub filtering: Option<String>,
    /// The same of IPv6.
    pub filtering_ipv6: Option<String>,
    /// IPv4: the port outside is the one inside.
    pub port_preserved: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathKind {
    /// Straight to an address.
    Direct,
    Relay,
    /// Plain WireGuard decides: the peer never introduced itself.
    Plain,
    /// Neither: no relay is up.
    None,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerPath {
    pub public_key: String,
    pub path: PathKind,
    /// Of a direct path.
    pub address: Option<String>,
    /// Of a relayed one.
    pub relay: Option<String>,
    pub since_seconds: f64,
    /// Why it is this path.
    pub reason: String,
    /// The peer runs millrace and said so.
    pub introduced: bool,
    /// Without traffic lately: it is kept, not searched for.
    pub idle: bool,
    pub rtt_seconds: Option<f64>,
    /// Share of pings on the path without an answer, 0 to 1.
    pub loss_ratio: Option<f64>,
    /// Bytes of the largest inner packet that is proven to pass.
    pub mtu: Option<usize>,
    /// That is less than the tunnel's MTU: senders are told.
    pub shortened: bool,
    pub handshake_age_seconds: Option<f64>,
    pub relayed_sent_bytes: u64,
    pub relayed_received_bytes: u64,
    /// The last changes of the path, the oldest first.
    pub history: Vec<PathChange>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PathChange {
    pub age_seconds: f64,
    pub path: String,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    pub name: String,
    pub count: u64,
    pub meaning: String,
}

/// `millrace.why/1`: why a peer is reached as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WhyPeer {
    pub schema: String,
    pub peer: PeerPath,
    /// One sentence.
    pub verdict: String,
    /// The one change that would help; empty: none is needed.
    pub advice: String,
    /// Our side.
    pub nat: Nat,
    /// The peer's side, as it says; none: it does not say, as older ones.
    #[serde(default)]
    pub peer_nat: Option<NatKind>,
    pub peer_relay: Option<String>,
    /// Where the peer says it is, and what kind of address each is.
    pub peer_candidates: Vec<String>,
    pub pairs: Vec<CandidatePair>,
}

/// One way that was tried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CandidatePair {
    /// The interface, or "any" for what the kernel's routes say.
    pub from: String,
    pub to: String,
    /// What kind of address it is.
    pub kind: String,
    pub in_use: bool,
    /// `works`, `unproven`, `loses_long_frames`, `one_way`, `silent`, `never_answered`,
    /// `quarantined`.
    pub state: String,
    /// The state in words.
    pub meaning: String,
    pub sent: u64,
    pub answered: u64,
    /// Since the peer's own ping last came this way.
    pub asked_age_seconds: Option<f64>,
    pub rtt_seconds: Option<f64>,
}

/// `millrace.pong/1`: one ping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pong {
    pub schema: String,
    pub path: PathKind,
    pub address: Option<String>,
    pub relay: Option<String>,
    /// None: no answer came in time.
    pub rtt_seconds: Option<f64>,
}
