//! The status document, made from an answer to `get=1` and the `mr_` lines in it. Serialised as
//! `millrace.status/1`: within that number fields are only added. It never holds a secret.

use serde::Serialize;

use crate::uapi::{DeviceState, PeerState};

/// The name and number of the JSON form.
pub const SCHEMA: &str = "millrace.status/1";

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    pub schema: &'static str,
    pub interface: String,
    /// Version of the running data plane.
    pub version: String,
    pub health: Health,
    /// Why the health is not "healthy", a sentence each.
    pub warnings: Vec<String>,
    pub public_key: Option<String>,
    pub listen_port: u16,
    pub fwmark: u32,
    pub dataplane: Dataplane,
    pub control: Control,
    pub peers: Vec<Peer>,
    /// Every reason of the drop list, those that never happened included.
    pub drops: Vec<DropCount>,
}

/// One word for scripts and dashboards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Everything runs as asked.
    Healthy,
    /// It works, with a fallback or a warning.
    Degraded,
    /// It cannot carry traffic: no private key.
    Down,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Dataplane {
    pub receive: String,
    pub receive_reason: String,
    pub transmit: String,
    pub transmit_reason: String,
    pub inner: String,
    pub aead: String,
    pub aead_reason: String,
    /// The core of each worker.
    pub workers: Vec<u32>,
    /// "on", or "off" with the reason.
    pub steering: String,
    pub offloads: Vec<Offload>,
    pub af_xdp: AfXdp,
}

/// Whether the control process, which searches paths, is connected.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Control {
    /// "connected"; "absent"; or "off" with the reason.
    pub state: String,
    pub connected_for_seconds: Option<u64>,
    /// Handshakes that it asked for after this data plane was started anew, by what became of them.
    pub connects: Connects,
    /// Whether control hears disco that the host's firewall drops: "on", or "off" with the reason.
    pub past_firewall: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Connects {
    pub started: u64,
    /// There was a session, or a handshake under way.
    pub needless: u64,
    /// Control asked too fast.
    pub refused: u64,
}

/// AF_XDP in numbers since the start. None of them is a loss by itself: those are among the drops.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AfXdp {
    /// The interface; empty without AF_XDP.
    pub device: String,
    /// Receive queues that have a socket now.
    pub queues: u32,
    pub frames_received: u64,
    pub frames_sent: u64,
    /// Data messages that came on a queue without a socket and so to the UDP sockets.
    pub frames_passed: u64,
    /// Times the device found no frame to receive into: it may have dropped then.
    pub fill_ring_empty: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Offload {
    pub name: String,
    pub on: bool,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peer {
    /// As the configuration has it.
    pub name: Option<String>,
    pub public_key: String,
    pub endpoint: Option<String>,
    /// "direct" (by UDP), or "detour" (sealed, by the control process and its relay).
    pub path: String,
    pub allowed_ips: Vec<String>,
    /// None before the first handshake.
    pub last_handshake_age_seconds: Option<u64>,
    pub has_session: bool,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub tx_packets: u64,
    /// Packets that wait for a handshake.
    pub staged_packets: u64,
    /// None if it is off.
    pub keepalive_seconds: Option<u16>,
    pub has_preshared_key: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DropCount {
    pub reason: String,
    pub packets: u64,
}

impl Status {
    /// `unix_seconds`: the time now, to say how old handshakes are.
    pub fn new(interface: &str, state: &DeviceState, unix_seconds: u64) -> Self {
        let fact = |key: &str| facts(&state.facts, key).next().unwrap_or_default().to_owned();
        let dataplane = Dataplane {
            receive: fact("receive"),
            receive_reason: fact("receive_reason"),
            transmit: fact("transmit"),
            transmit_reason: fact("transmit_reason"),
            inner: fact("inner"),
            aead: fact("aead"),
            aead_reason: fact("aead_reason"),
            workers: fact("workers").split(',').filter_map(|core| core.parse().ok()).collect(),
            steering: fact("steering"),
            offloads: facts(&state.facts, "offload").filter_map(offload).collect(),
            af_xdp: AfXdp::new(&state.facts),
        };
        let mut warnings: Vec<String> = facts(&state.facts, "note").map(str::to_owned).collect();
        if let Some(why) = facts(&state.facts, "config_error").next() {
            warnings.push(format!("the configuration file is not what runs: {why}"));
        }
        if let Some(why) = dataplane.steering.strip_prefix("off: ") {
            warnings.push(format!("one worker only: {why}"));
        }
        let unheard =
            facts(&state.facts, "past_firewall").next().and_then(|f| f.strip_prefix("off: "));
        // Without steering nothing is searched for, and that is said above.
        if let Some(why) =
            unheard.filter(|why| dataplane.steering == "on" && !why.contains("configuration"))
        {
            warnings.push(format!("peers are not heard past the host's firewall: {why}"));
        }
        let switched_off = |o: &&Offload| !o.on && !o.reason.contains("configuration");
        for offload in dataplane.offloads.iter().filter(switched_off) {
            warnings.push(format!("{} was given up: {}", offload.name, offload.reason));
        }
        let health = match (&state.private_key, warnings.is_empty()) {
            (None, _) => {
                warnings.push("the device has no private key".to_owned());
                Health::Down
            }
            (Some(_), true) => Health::Healthy,
            (Some(_), false) => Health::Degraded,
        };
        Self {
            schema: SCHEMA,
            interface: interface.to_owned(),
            version: fact("version"),
            health,
            warnings,
            public_key: state.private_key.as_ref().map(|key| key.public_key().to_base64()),
            listen_port: state.listen_port,
            fwmark: state.fwmark,
            dataplane,
            control: Control {
                past_firewall: fact("past_firewall"),
                ..Control::new(&fact("control"), &fact("connects"), unix_seconds)
            },
            peers: state.peers.iter().map(|peer| Peer::new(peer, unix_seconds)).collect(),
            drops: facts(&state.facts, "drop").filter_map(drop_count).collect(),
        }
    }

    /// Whether traffic can pass: a key, and a session with at least one peer if there are peers.
    pub fn is_ready(&self) -> bool {
        self.health != Health::Down
            && (self.peers.is_empty() || self.peers.iter().any(|peer| peer.has_session))
    }
}

impl Control {
    /// `connected SINCE`, `absent`, or `off: REASON`; and three numbers.
    fn new(fact: &str, connects: &str, unix_seconds: u64) -> Self {
        let mut numbers = connects.split(' ').map(|number| number.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        let connects = Connects { started: next(), needless: next(), refused: next() };
        match fact.split_once(' ') {
            Some(("connected", since)) => Self {
                state: "connected".to_owned(),
                connected_for_seconds: since
                    .parse()
                    .ok()
                    .map(|since: u64| unix_seconds.saturating_sub(since)),
                connects,
                ..Self::default()
            },
            _ => Self { state: fact.to_owned(), connects, ..Self::default() },
        }
    }
}

impl AfXdp {
    fn new(all: &[(String, String)]) -> Self {
        let fact = |key| facts(all, key).next().unwrap_or_default();
        let number = |text: &str| text.parse().unwrap_or(0);
        let (received, sent) = fact("xdp_frames").split_once(' ').unwrap_or_default();
        Self {
            device: fact("device").to_owned(),
            queues: fact("queues").parse().unwrap_or(0),
            frames_received: number(received),
            frames_sent: number(sent),
            frames_passed: number(fact("xdp_passed")),
            fill_ring_empty: number(fact("xdp_fill_empty")),
        }
    }
}

impl Peer {
    fn new(state: &PeerState, unix_seconds: u64) -> Self {
        let fact = |key: &str| facts(&state.facts, key).next().unwrap_or_default();
        let number = |key: &str| fact(key).parse().unwrap_or(0);
        let (handshake_seconds, _) = state.last_handshake;
        Self {
            name: facts(&state.facts, "name").next().map(str::to_owned),
            public_key: state.public_key.to_base64(),
            endpoint: state.endpoint.map(|endpoint| endpoint.to_string()),
            path: fact("path").to_owned(),
            allowed_ips: state.allowed_ips.iter().map(ToString::to_string).collect(),
            last_handshake_age_seconds: (handshake_seconds > 0)
                .then(|| unix_seconds.saturating_sub(handshake_seconds)),
            has_session: fact("session") == "up",
            rx_bytes: state.rx_bytes,
            tx_bytes: state.tx_bytes,
            rx_packets: number("rx_packets"),
            tx_packets: number("tx_packets"),
            staged_packets: number("staged"),
            keepalive_seconds: (state.keepalive_seconds > 0).then_some(state.keepalive_seconds),
            has_preshared_key: state.preshared_key.is_some(),
        }
    }
}

fn facts<'a>(facts: &'a [(String, String)], key: &str) -> impl Iterator<Item = &'a str> {
    facts.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
}

/// `NAME on|off REASON`.
fn offload(value: &str) -> Option<Offload> {
    let mut words = value.splitn(3, ' ');
    let (name, on) = (words.next()?.to_owned(), words.next()? == "on");
    Some(Offload { name, on, reason: words.next().unwrap_or_default().to_owned() })
}

/// `NAME COUNT`.
fn drop_count(value: &str) -> Option<DropCount> {
    let (reason, packets) = value.split_once(' ')?;
    Some(DropCount { reason: reason.to_owned(), packets: packets.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{PublicKey, SecretKey};
    use zeroize::Zeroizing;

    fn state() -> DeviceState {
        let fact = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        DeviceState {
            private_key: Some(SecretKey::new(Zeroizing::new([0x42; 32]))),
            listen_port: 51820,
            facts: vec![
                fact("version", "0.1.0"),
                fact("receive", "socket"),
                fact("workers", "0,3"),
                fact("steering", "on"),
                fact("offload", "udp_gso on a probe worked"),
                fact("drop", "rx_replayed 3"),
                fact("device", "wan"),
                fact("queues", "2"),
                fact("xdp_frames", "70 60"),
                fact("xdp_passed", "5"),
                fact("xdp_fill_empty", "4"),
                fact("control", "connected 1012"),
                fact("connects", "3 2 1"),
                fact("past_firewall", "on"),
            ],
            peers: vec![PeerState {
                last_handshake: (1000, 5),
                preshared_key: Some(SecretKey::new(Zeroizing::new([0x43; 32]))),
                facts: vec![fact("session", "up"), fact("rx_packets", "9")],
                ..PeerState::new(PublicKey([7; 32]))
            }],
            ..DeviceState::default()
        }
    }

    #[test]
    fn a_document_says_everything_but_secrets() {
        let state = state();
        let status = Status::new("mr0", &state, 1042);
        assert_eq!((status.health, status.is_ready()), (Health::Healthy, true));
        assert_eq!(status.dataplane.workers, [0, 3]);
        assert_eq!(status.drops, [DropCount { reason: "rx_replayed".into(), packets: 3 }]);
        assert_eq!(status.peers[0].last_handshake_age_seconds, Some(42));
        assert_eq!(status.peers[0].rx_packets, 9);
        assert_eq!(status.control.connected_for_seconds, Some(30));
        let connects = Connects { started: 3, needless: 2, refused: 1 };
        assert_eq!(status.control.connects, connects);
        assert_eq!(Control::new("off: no BPF", "", 0).state, "off: no BPF");
        let af_xdp = AfXdp {
            device: "wan".into(),
            queues: 2,
            frames_received: 70,
            frames_sent: 60,
            frames_passed: 5,
            fill_ring_empty: 4,
        };
        assert_eq!(status.dataplane.af_xdp, af_xdp);
        let json = serde_json::to_string(&status).unwrap();
        for secret in [state.private_key, state.peers[0].preshared_key.clone()] {
            assert!(!json.contains(secret.unwrap().to_base64().as_str()));
        }
    }

    #[test]
    fn a_fallback_is_degraded_and_a_missing_key_is_down() {
        let mut state = state();
        state.facts[4].1 = "udp_gso off the kernel refused".into();
        assert_eq!(Status::new("mr0", &state, 0).health, Health::Degraded);
        state.facts[4].1 = "udp_gso off switched off in the configuration".into();
        let heard = state.facts.iter().position(|(key, _)| key == "past_firewall").unwrap();
        state.facts[heard].1 = "off: a packet socket could not be opened".into();
        assert_eq!(Status::new("mr0", &state, 0).health, Health::Degraded);
        state.facts[heard].1 = "off: the configuration says so".into();
        assert_eq!(Status::new("mr0", &state, 0).health, Health::Healthy);
        state.private_key = None;
        assert_eq!(Status::new("mr0", &state, 0).health, Health::Down);
    }
}
