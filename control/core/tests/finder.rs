//! What a finder does with messages that are forged, replayed, foreign, greedy or dangerous: each
//! is counted by name and changes nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use millrace_path::candidate::{Candidate, CandidateKind, OwnAddresses, Prefix};
use millrace_path::disco::{self, Message};
use millrace_path::finder::{Config, Finder, Input, Network, PathState, Uplink};
use millrace_path::introduce::{self, Home, Introduction};
use millrace_path::limits::{
    CANDIDATES_MAX, FRAME_LEN_DEFAULT, FRAME_LEN_MIN, PROBES_IN_ALL, PROBES_PER_PEER,
};
use millrace_path::nat::{Filtering, Mapping, Nat};
use millrace_path::path::{Pair, UplinkId};
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};
use millrace_path::transaction::TransactionId;
use millrace_path::{Event, Instant, Output, Route, Transmit};
use proptest::prelude::*;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha12Rng;

const OWN_SOCKET: &str = "10.0.0.2:51820";
const OWN_REFLEXIVE: &str = "192.0.2.1:40001";

/// A finder, its clock, and everything that it said.
struct Desk {
    finder: Finder,
    now: Instant,
    deadline: Option<Instant>,
    random: ChaCha12Rng,
    node_secret: [u8; 32],
    sent: Vec<(Pair, Vec<u8>)>,
    relayed: Vec<(PublicKey, Vec<u8>)>,
    events: Vec<Event>,
}

/// A peer whose keys the test has, so that it can say anything.
struct Party {
    node_secret: [u8; 32],
    disco_secret: [u8; 32],
    number: u64,
}

const HARD: Nat = Nat {
    mapping: Some(Mapping::AddressAndPortDependent),
    filtering: Some(Filtering::AddressAndPortDependent),
    filtering_ipv6: None,
    port_preserved: Some(false),
};

fn secret(bytes: [u8; 32]) -> SecretKey {
    SecretKey::from_bytes(bytes)
}

/// What is ours.
fn network(nat: Nat) -> Network {
    Network {
        home: Home::default(),
        candidates: vec![Candidate {
            kind: CandidateKind::Interface,
            address: OWN_SOCKET.parse().unwrap(),
        }],
        addresses: OwnAddresses {
            sockets: vec![OWN_SOCKET.parse().unwrap(), OWN_REFLEXIVE.parse().unwrap()],
            tunnels: vec![Prefix { address: "10.9.0.0".parse().unwrap(), length: 16 }],
        },
        uplinks: vec![Uplink { id: UplinkId(0), ipv6: false }],
        nat,
    }
}

impl Desk {
    fn new() -> Self {
        let mut random = ChaCha12Rng::seed_from_u64(1);
        let (mut node_secret, mut disco) = ([0; 32], [0; 32]);
        random.fill_bytes(&mut node_secret);
        random.fill_bytes(&mut disco);
        let now = Instant::from_nanos(1_000_000_000);
        let config = Config {
            node_key: secret(node_secret).public_key(),
            disco_secret: secret(disco),
            frame_len: FRAME_LEN_DEFAULT,
            least_frame_len: FRAME_LEN_MIN,
            wall_at_zero: 1_800_000_000_000_000_000,
        };
        let (sent, relayed, events) = (Vec::new(), Vec::new(), Vec::new());
        let finder = Finder::new(config, now);
        let mut desk =
            Self { finder, now, deadline: None, random, node_secret, sent, relayed, events };
        desk.handle(Input::Network { network: network(Nat::default()), major: false });
        desk
    }

    fn node_key(&self) -> PublicKey {
        secret(self.node_secret).public_key()
    }

    fn handle(&mut self, input: Input<'_>) {
        self.finder.handle(self.now, input, &mut self.random);
        self.deadline = None;
        while let Some(output) = self.finder.poll_output() {
            match output {
                Output::Transmit(Transmit::Udp { pair, datagram, .. }) => {
                    self.sent.push((pair, datagram));
                }
                Output::Transmit(Transmit::Relay { peer, packet }) => {
                    self.relayed.push((peer, packet));
                }
                Output::Event(event) => self.events.push(event),
                Output::Timeout(at, reason) => {
                    assert!(at > self.now, "{reason:?} is due again at once");
                    self.deadline = Some(at);
                }
            }
        }
    }

    fn wait(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(at) = self.deadline.filter(|at| *at <= end) {
            self.now = at;
            self.handle(Input::Timeout);
        }
        self.now = end;
    }

    fn add(&mut self, party: &Party, endpoint: Option<SocketAddr>) {
        let box_key = BoxKey::agree(&secret(self.node_secret), party.key()).unwrap();
        self.handle(Input::AddPeer { peer: party.key(), box_key, endpoint, in_use: None });
    }

    fn relayed_from(&mut self, party: PublicKey, mut bytes: Vec<u8>) {
        self.handle(Input::Relayed { peer: party, bytes: &mut bytes });
    }

    fn datagram_from(&mut self, from: &str, mut bytes: Vec<u8>) {
        let from = Pair { uplink: UplinkId(0), remote: from.parse().unwrap() };
        self.handle(Input::Datagram { from, bytes: &mut bytes });
    }

    /// What was refused since the start, by name.
    fn refused(&self) -> BTreeMap<&'static str, u64> {
        self.finder.refused().filter(|(_, count)| *count > 0).collect()
    }
}

impl Party {
    fn new(number: u8) -> Self {
        let (node_secret, disco_secret) = ([number; 32], [0x80 | number; 32]);
        Self { node_secret, disco_secret, number: 1_800_000_000_000_000_000 }
    }

    fn key(&self) -> PublicKey {
        secret(self.node_secret).public_key()
    }

    fn introduction(&mut self, desk: &Desk, addresses: &[SocketAddr]) -> Vec<u8> {
        self.number += 1;
        let candidate =
            |address: &SocketAddr| Candidate { kind: CandidateKind::Reflexive, address: *address };
        let introduction = Introduction {
            sender: self.key(),
            number: self.number,
            answers: 0,
            disco_key: secret(self.disco_secret).public_key(),
            has_session: false,
            home: Home::default(),
            candidates: addresses.iter().map(candidate).collect(),
            nat: Some(HARD),
        };
        let key = BoxKey::agree(&secret(self.node_secret), desk.node_key()).unwrap();
        introduce::seal(&introduction, [9; 24], &key)
    }

    fn disco(&self, desk: &Desk, message: &Message) -> Vec<u8> {
        let own = secret(self.disco_secret);
        let key = BoxKey::agree(&own, desk.finder.disco_key()).unwrap();
        disco::seal(message, own.public_key(), [8; 24], &key)
    }

    fn ping(&self, desk: &Desk, transaction: u8) -> Vec<u8> {
        let transaction = TransactionId([transaction; 12]);
        self.disco(desk, &Message::ping_of_len(transaction, self.key(), 0))
    }

    /// The pongs that answer what was sent, the newest last.
    fn pongs(&self, desk: &Desk) -> Vec<(Pair, Vec<u8>)> {
        let own = secret(self.disco_secret);
        let key = BoxKey::agree(&own, desk.finder.disco_key()).unwrap();
        let answer = |(pair, datagram): &(Pair, Vec<u8>)| {
            let message = disco::Envelope::parse(&mut datagram.clone())?.open(&key).ok()?;
            let Message::Ping { transaction, .. } = message else { return None };
            let source = OWN_REFLEXIVE.parse().unwrap();
            let pong = Message::Pong { transaction, source, received_age_ms: None };
            Some((*pair, self.disco(desk, &pong)))
        };
        desk.sent.iter().filter_map(answer).collect()
    }
}

/// A finder that knows a party, which introduced itself with these addresses.
fn introduced(addresses: &[&str]) -> (Desk, Party) {
    let (mut desk, mut party) = (Desk::new(), Party::new(1));
    desk.add(&party, None);
    let addresses: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
    let introduction = party.introduction(&desk, &addresses);
    desk.relayed_from(party.key(), introduction);
    (desk, party)
}

#[test]
fn nothing_dangerous_is_ever_probed_whoever_names_it() {
    let dangerous = [
        OWN_SOCKET,
        OWN_REFLEXIVE,
        "127.0.0.1:51820",
        "0.0.0.0:51820",
        "255.255.255.255:51820",
        "224.0.0.1:51820",
        "10.9.1.1:51820",
        "203.0.113.9:0",
        "[::ffff:127.0.0.1]:51820",
    ];
    let mut addresses = dangerous.to_vec();
    addresses.push("203.0.113.9:51820");
    let (mut desk, party) = introduced(&addresses);
    let called = dangerous.map(|address| address.parse().unwrap()).to_vec();
    let call = party.disco(&desk, &Message::CallMeMaybe { addresses: called });
    desk.relayed_from(party.key(), call);
    for (transaction, address) in dangerous.into_iter().enumerate() {
        let ping = party.ping(&desk, transaction as u8);
        desk.datagram_from(address, ping);
    }
    desk.wait(Duration::from_secs(120));
    assert!(desk.sent.len() >= 6);
    for (pair, _) in &desk.sent {
        assert_eq!(pair.remote, "203.0.113.9:51820".parse().unwrap());
    }
    assert_eq!(desk.refused(), BTreeMap::from([("never_probed", dangerous.len() as u64)]));
}

#[test]
fn pings_on_demand_go_where_the_tunnel_goes_and_relayed_ones_are_answered() {
    let (mut desk, party) = introduced(&["203.0.113.9:51820"]);
    let peer = party.key();
    desk.handle(Input::Ping { peer, number: 7 });
    let own = secret(party.disco_secret);
    let key = BoxKey::agree(&own, desk.finder.disco_key()).unwrap();
    let open = |packet: &[u8]| {
        disco::Envelope::parse(&mut packet.to_vec()).and_then(|envelope| envelope.open(&key).ok())
    };
    let asked = desk.relayed.iter().find_map(|(_, packet)| match open(packet)? {
        Message::Ping { transaction, .. } => Some(transaction),
        _ => None,
    });
    let transaction = asked.expect("a ping through the relay");
    desk.now = desk.now + Duration::from_millis(30);
    let source = OWN_REFLEXIVE.parse().unwrap();
    let pong = Message::Pong { transaction, source, received_age_ms: None };
    let pong = party.disco(&desk, &pong);
    desk.relayed_from(peer, pong.clone());
    let round_trip = Duration::from_millis(30);
    let pinged = Event::Pinged { peer, number: 7, route: Route::Relay, round_trip };
    assert!(desk.events.contains(&pinged), "{:?}", desk.events);
    // The second answer is none.
    desk.relayed_from(peer, pong);
    assert_eq!(desk.refused(), BTreeMap::from([("pong_unmatched", 1)]));

    let before = desk.relayed.len();
    let ping = party.ping(&desk, 5);
    desk.relayed_from(peer, ping);
    let answer = desk.relayed[before..].iter().find_map(|(_, packet)| open(packet));
    assert!(
        matches!(answer, Some(Message::Pong { transaction: TransactionId([5, ..]), .. })),
        "{answer:?}"
    );

    let stranger = Party::new(9).key();
    desk.handle(Input::Ping { peer: stranger, number: 8 });
    assert_eq!(desk.events.last(), Some(&Event::NotPinged { peer: stranger, number: 8 }));
}

#[test]
fn the_report_says_what_each_path_is_good_for() {
    let (mut desk, party) = introduced(&["203.0.113.9:51820", "203.0.113.10:51820"]);
    desk.wait(Duration::from_secs(1));
    let ping = party.ping(&desk, 1);
    desk.datagram_from("203.0.113.11:9", ping);
    for (pair, pong) in party.pongs(&desk) {
        if pair.remote == "203.0.113.9:51820".parse().unwrap() {
            desk.datagram_from("203.0.113.9:51820", pong);
        }
    }
    let report = desk.finder.report(desk.now, party.key()).unwrap();
    let state = |address: &str| {
        let remote = address.parse().unwrap();
        let path = report.paths.iter().find(|path| path.pair.remote == remote).unwrap();
        assert!(path.sent > 0 && path.answered <= path.sent, "{path:?}");
        path.state
    };
    assert_eq!(state("203.0.113.9:51820"), PathState::Unproven);
    assert_eq!(state("203.0.113.10:51820"), PathState::NeverAnswered);
    assert_eq!(state("203.0.113.11:9"), PathState::OneWay);
}

#[test]
fn both_sides_know_of_both_nats_and_nothing_else_changes_by_that() {
    let (mut desk, party) = introduced(&["203.0.113.9:51820"]);
    desk.wait(Duration::from_secs(120));
    let report = desk.finder.report(desk.now, party.key()).unwrap();
    assert_eq!(report.nat, Some(HARD));
    let (introductions, pings) = (desk.relayed.len(), desk.sent.len());
    for _ in 0..3 {
        desk.handle(Input::Network { network: network(HARD), major: false });
        desk.wait(Duration::from_secs(1));
    }
    assert_eq!(desk.relayed.len(), introductions, "there is no hurry");
    desk.wait(Duration::from_secs(30));
    assert_eq!((desk.relayed.len(), desk.sent.len()), (introductions + 1, pings), "said once");
    let (_, mut packet) = desk.relayed.pop().unwrap();
    let key = BoxKey::agree(&secret(party.node_secret), desk.node_key()).unwrap();
    let introduction = introduce::open(&mut packet, desk.node_key(), &key).unwrap();
    assert_eq!(introduction.nat, Some(HARD));
}

#[test]
fn a_ping_is_answered_to_where_it_came_from_and_asked_back_once() {
    let (mut desk, party) = introduced(&[]);
    let ping = party.ping(&desk, 1);
    desk.datagram_from("203.0.113.9:777", ping.clone());
    let lens: Vec<_> = desk.sent.iter().map(|(_, datagram)| datagram.len()).collect();
    assert_eq!(lens, [disco::PONG_LEN, disco::PING_LEN]);
    assert!(desk.sent.iter().all(|(pair, _)| pair.remote.port() == 777));
    // Replayed, from there and from elsewhere.
    for from in ["203.0.113.9:777", "198.51.100.66:6666"] {
        desk.datagram_from(from, ping.clone());
    }
    assert_eq!(desk.sent.len(), 2);
    assert_eq!(desk.refused(), BTreeMap::from([("ping_replayed", 2)]));
}

#[test]
fn a_pong_counts_once_and_only_from_where_the_ping_went() {
    let (mut desk, party) = introduced(&["203.0.113.9:51820"]);
    desk.wait(Duration::from_millis(10));
    let (pair, pong) = party.pongs(&desk)[0].clone();
    desk.datagram_from("198.51.100.66:6666", pong.clone());
    assert_eq!(desk.refused(), BTreeMap::from([("pong_from_elsewhere", 1)]));
    desk.datagram_from(&pair.remote.to_string(), pong.clone());
    let seen = |event: &&Event| matches!(event, Event::SeenAt { .. });
    assert_eq!(desk.events.iter().filter(seen).count(), 1);
    desk.datagram_from(&pair.remote.to_string(), pong);
    assert_eq!(desk.refused()["pong_unmatched"], 1);
    // A short ping alone does not open the path to the tunnel: the long frame must come through.
    assert_eq!(desk.finder.route(party.key()), Some(Route::Relay));
    let (pair, proof) = party.pongs(&desk).pop().unwrap();
    desk.datagram_from(&pair.remote.to_string(), proof);
    let route = Route::Direct { pair, frame_len: FRAME_LEN_DEFAULT };
    assert_eq!(desk.finder.route(party.key()), Some(route));
}

#[test]
fn an_answer_after_the_time_out_is_none() {
    let (mut desk, party) = introduced(&["203.0.113.9:51820"]);
    desk.wait(Duration::from_millis(10));
    let (pair, pong) = party.pongs(&desk)[0].clone();
    desk.wait(Duration::from_secs(6));
    desk.datagram_from(&pair.remote.to_string(), pong);
    assert_eq!(desk.refused()["pong_unmatched"], 1);
}

#[test]
fn strangers_are_counted_before_any_cryptography_and_never_answered() {
    let (mut desk, party) = introduced(&[]);
    let stranger = Party::new(7);
    let ping = stranger.ping(&desk, 1);
    desk.datagram_from("198.51.100.66:6666", ping.clone());
    // Under the party's name, with the stranger's box.
    let mut forged = ping;
    forged[6..38].copy_from_slice(&secret(party.disco_secret).public_key().0);
    desk.datagram_from("198.51.100.66:6666", forged);
    desk.datagram_from("198.51.100.66:6666", b"TS\xf0\x9f\x92\xac".to_vec());
    let called = Message::CallMeMaybe { addresses: vec!["203.0.113.9:1".parse().unwrap()] };
    let by_udp = party.disco(&desk, &called);
    desk.datagram_from("203.0.113.9:777", by_udp);
    desk.relayed_from(stranger.key(), vec![1, 2, 3]);
    desk.wait(Duration::from_secs(30));
    assert!(desk.sent.is_empty());
    let expected = [
        ("call_me_maybe_by_udp", 1),
        ("disco_forged", 1),
        ("not_disco", 1),
        ("relay_unknown_peer", 1),
        ("unknown_disco_key", 1),
    ];
    assert_eq!(desk.refused(), BTreeMap::from(expected));
}

#[test]
fn introductions_that_are_replayed_reflected_or_foreign_change_nothing() {
    let (mut desk, mut party) = introduced(&[]);
    let first = party.introduction(&desk, &["203.0.113.9:1".parse().unwrap()]);
    let mut second = party.introduction(&desk, &[]);
    desk.relayed_from(party.key(), first.clone());
    desk.relayed_from(party.key(), second.clone());
    let events = desk.events.len();
    desk.relayed_from(party.key(), first);
    desk.relayed_from(party.key(), second.clone());
    let (_, own) = desk.relayed[0].clone();
    desk.relayed_from(party.key(), own);
    second[8] = 2;
    desk.relayed_from(party.key(), second);
    assert_eq!(desk.events.len(), events);
    let expected = [("introduce_forged", 1), ("introduce_replayed", 2), ("introduce_version", 1)];
    assert_eq!(desk.refused(), BTreeMap::from(expected));
}

#[test]
fn a_peer_cannot_take_the_disco_key_of_another() {
    let (mut desk, party) = introduced(&[]);
    let mut thief = Party { disco_secret: party.disco_secret, ..Party::new(2) };
    desk.add(&thief, None);
    let introduction = thief.introduction(&desk, &["198.51.100.66:6666".parse().unwrap()]);
    desk.relayed_from(thief.key(), introduction);
    assert_eq!(desk.refused(), BTreeMap::from([("introduce_forged", 1)]));
    let ping = party.ping(&desk, 1);
    desk.datagram_from("203.0.113.9:777", ping);
    assert!(desk.sent.iter().all(|(pair, _)| pair.remote.port() == 777));
    assert_eq!(desk.sent.len(), 2);
}

#[test]
fn a_peer_with_an_endpoint_stays_plain_wireguard_until_it_introduces_itself() {
    let (mut desk, mut party) = (Desk::new(), Party::new(1));
    desk.add(&party, Some("203.0.113.9:51820".parse().unwrap()));
    for _ in 0..3600 {
        desk.handle(Input::Traffic { peer: party.key() });
        desk.wait(Duration::from_secs(1));
    }
    assert!(desk.sent.is_empty() && desk.events.is_empty());
    assert_eq!(desk.finder.route(party.key()), Some(Route::Unset));
    assert!((10..100).contains(&desk.relayed.len()), "{} introductions", desk.relayed.len());
    let introduction = party.introduction(&desk, &[]);
    desk.relayed_from(party.key(), introduction);
    assert_eq!(desk.finder.route(party.key()), Some(Route::Relay));
    // The configured address is a candidate like any other.
    desk.wait(Duration::from_millis(10));
    assert_eq!(desk.sent[0].0.remote, "203.0.113.9:51820".parse().unwrap());
}

/// For a peer whose data plane is new: whoever talked to it of late may go on with a lost session.
#[test]
fn an_introduction_says_whether_there_may_be_a_session() {
    let (mut desk, mut party) = (Desk::new(), Party::new(1));
    desk.add(&party, None);
    let node_key = desk.node_key();
    let key = BoxKey::agree(&secret(party.node_secret), node_key).unwrap();
    let mut said = |desk: &mut Desk| {
        desk.relayed.clear();
        let introduction = party.introduction(desk, &[]);
        desk.relayed_from(party.key(), introduction);
        let (_, packet) = &mut desk.relayed[0];
        introduce::open(packet, node_key, &key).unwrap().has_session
    };
    assert!(!said(&mut desk));
    desk.handle(Input::Traffic { peer: Party::new(1).key() });
    desk.wait(Duration::from_secs(179));
    assert!(said(&mut desk));
    desk.wait(Duration::from_secs(2));
    assert!(!said(&mut desk));
}

#[test]
fn probes_are_bounded_for_each_peer_and_for_all_together() {
    let mut desk = Desk::new();
    let mut parties: Vec<_> = (1..=50).map(Party::new).collect();
    for (at, party) in parties.iter_mut().enumerate() {
        desk.add(party, None);
        let address = |host: usize| format!("203.0.{at}.{host}:51820").parse().unwrap();
        let addresses: Vec<_> = (1..=CANDIDATES_MAX).map(address).collect();
        let introduction = party.introduction(&desk, &addresses);
        desk.relayed_from(party.key(), introduction);
    }
    desk.wait(Duration::from_secs(10));
    let allowed = |rate: millrace_path::budget::Rate| (rate.burst + 10 * rate.per_second) as usize;
    assert!(desk.sent.len() <= allowed(PROBES_IN_ALL) + 1, "{} probes", desk.sent.len());
    assert!(desk.sent.len() >= PROBES_IN_ALL.burst as usize);
    for at in 0..parties.len() {
        let of_peer = |(pair, _): &&(Pair, Vec<u8>)| matches!(pair.remote.ip(), std::net::IpAddr::V4(ip) if usize::from(ip.octets()[2]) == at);
        let count = desk.sent.iter().filter(of_peer).count();
        assert!(count <= allowed(PROBES_PER_PEER), "{count} probes to peer {at}");
    }
}

#[test]
fn pongs_and_reflexive_probes_are_bounded_against_a_flood_of_valid_pings() {
    let (mut desk, party) = introduced(&[]);
    for port in 1..=10_000_u16 {
        let mut transaction = [0; 12];
        transaction[..2].copy_from_slice(&port.to_be_bytes());
        let message = Message::ping_of_len(TransactionId(transaction), party.key(), 0);
        let ping = party.disco(&desk, &message);
        desk.datagram_from(&format!("203.0.113.9:{port}"), ping);
    }
    assert!(desk.sent.len() <= 200 + 120, "{} datagrams", desk.sent.len());
    assert_eq!(desk.refused(), BTreeMap::from([("ping_over_budget", 9_800)]));
    desk.wait(Duration::from_secs(600));
    assert!(desk.sent.len() <= 320 + 600 * 20, "{} datagrams", desk.sent.len());
}

/// A peer that has all keys names victims for a minute, as fast as it likes.
#[test]
fn a_hostile_peer_cannot_make_us_flood_whom_it_names() {
    let (mut desk, mut party) = introduced(&[]);
    let victims = |round: u8| {
        let victim = move |last| SocketAddr::from(([198, 51, round, last], 53));
        (1..=CANDIDATES_MAX as u8).map(victim).collect::<Vec<_>>()
    };
    let (seconds, mut heard) = (60, 0);
    for round in 0..10 * seconds {
        desk.handle(Input::Traffic { peer: party.key() });
        let introduction = party.introduction(&desk, &victims(round as u8));
        let call = Message::CallMeMaybe { addresses: victims(!round as u8) };
        let call = party.disco(&desk, &call);
        heard += introduction.len() + call.len();
        desk.relayed_from(party.key(), introduction);
        desk.relayed_from(party.key(), call);
        desk.wait(Duration::from_millis(100));
    }
    let allowed = (PROBES_PER_PEER.burst + PROBES_PER_PEER.per_second * seconds) as usize;
    assert!(desk.sent.len() <= allowed, "{} datagrams in a minute", desk.sent.len());
    let sent: usize = desk.sent.iter().map(|(_, datagram)| datagram.len()).sum();
    // Short pings only, and fewer bytes than it took to ask for them this way.
    assert!(desk.sent.iter().all(|(_, datagram)| datagram.len() == disco::PING_LEN));
    assert!(sent < heard, "{sent} bytes for {heard}");
    let held = desk.finder.held(party.key()).unwrap();
    assert!(held.candidates <= CANDIDATES_MAX && held.queued <= 2 * CANDIDATES_MAX, "{held:?}");
}

#[test]
fn a_removed_peer_is_forgotten() {
    let (mut desk, party) = introduced(&["203.0.113.9:51820"]);
    desk.handle(Input::RemovePeer { peer: party.key() });
    desk.wait(Duration::from_millis(10));
    let sent = desk.sent.len();
    let ping = party.ping(&desk, 1);
    desk.datagram_from("203.0.113.9:51820", ping);
    desk.wait(Duration::from_secs(600));
    assert_eq!(desk.sent.len(), sent);
    assert_eq!(desk.finder.route(party.key()), None);
    assert_eq!(desk.refused(), BTreeMap::from([("unknown_disco_key", 1)]));
}

proptest! {
    #[test]
    fn no_bytes_from_a_stranger_change_anything(
        datagrams in proptest::collection::vec(any::<(bool, Vec<u8>)>(), 0..20)
    ) {
        let (mut desk, party) = introduced(&[]);
        let events = desk.events.len();
        for (relayed, bytes) in datagrams {
            if relayed {
                desk.relayed_from(party.key(), bytes);
            } else {
                desk.datagram_from("198.51.100.66:6666", bytes);
            }
        }
        prop_assert_eq!(desk.events.len(), events);
        prop_assert!(desk.sent.is_empty());
    }
}
