//! Fuzz entry points: ordinary functions from bytes to assertions. libFuzzer calls them (see
//! `bench/fuzz`), and so does a test that replays the committed corpora.

mod portmap;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::candidate::{Candidate, CandidateKind};
use crate::derp::cut::{Cutter, frames};
use crate::derp::frame::Frame;
use crate::derp::{ClientInfo, HEADER_LEN, KEY_LEN, ServerInfo};
use crate::disco::{self, Envelope, Message};
use crate::finder::{Config, Finder, Input, Network, Uplink, only_uplink};
use crate::introduce::{self, Introduction};
use crate::limits::{CANDIDATES_MAX, FRAME_LEN_DEFAULT, FRAME_LEN_MIN, LIFETIME_MAX};
use crate::nat::Nat;
use crate::netcheck;
use crate::output::{Output, Transmit};
use crate::path::{Pair, UplinkId};
use crate::sealed::{BoxKey, NONCE_LEN, PublicKey, SecretKey, TAG_LEN};
use crate::stun;
use crate::time::Instant;
use crate::transaction::TransactionId;
pub use portmap::portmap;

/// One datagram at the STUN client and at the STUN server.
///
/// Must hold: no panic, answers are bounded, and what the server says its own client understands.
pub fn stun(datagram: &[u8]) {
    let source = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 41_641));
    if let Ok(response) = stun::parse_response(datagram) {
        let named = [Some(response.mapped), response.origin, response.other];
        let usable = |a: &SocketAddr| a.port() != 0 && !a.ip().is_unspecified();
        assert!(named.iter().flatten().all(usable));
    }
    match stun::answer(datagram, source).map(|answer| stun::parse_response(&answer)) {
        Ok(Ok(response)) => assert_eq!(response.mapped, source),
        Ok(Err(error)) => assert_eq!(error, stun::StunError::Refused { code: 420 }),
        Err(_) => {}
    }
}

/// A check of two servers, whose answers carry what the input says: first a byte each for which of
/// the last questions is answered, from where and how, then attributes behind our address.
///
/// Must hold: no panic, nothing is due again at once, a bounded number of datagrams, none from a
/// socket to itself or into the networks around us, and an end in time.
pub fn netcheck(mut input: &[u8]) {
    let servers = [1, 2].map(|host| SocketAddr::from((Ipv4Addr::new(192, 0, 2, host), 3478)));
    let own = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 2), 51_820));
    let mapped = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 7), 4_000));
    let server = |address: &SocketAddr| netcheck::Server {
        name: address.to_string(),
        is_relay: false,
        stun: vec![*address],
    };
    let setup = netcheck::Setup {
        servers: servers.iter().map(server).collect(),
        addresses: vec![own.ip()],
        port: own.port(),
        depth: netcheck::Depth::Diagnosis { hairpin: true, lifetime: Some(LIFETIME_MAX) },
        ..netcheck::Setup::default()
    };
    let mut check = netcheck::Netcheck::default();
    let mut random = StdRng::from_seed([9; 32]);
    let (mut now, mut asked, mut deadline) = (Instant::from_nanos(1), Vec::new(), None);
    check.handle(now, netcheck::Input::Start(setup), &mut random);
    for step in 0..2 * NETCHECK_OUTPUTS_MAX {
        // Time passes only without input, and must have its turn.
        input = if step < NETCHECK_OUTPUTS_MAX { input } else { &[] };
        while let Some(output) = check.poll_output() {
            match output {
                netcheck::Output::Transmit { socket, to, datagram } => {
                    assert!(to != own && (to != mapped || socket != netcheck::Socket::Tunnel));
                    assert!(
                        !matches!(to.ip(), IpAddr::V4(ip) if ip.is_private() || ip.is_loopback())
                    );
                    asked.push((socket, to, datagram));
                }
                netcheck::Output::Timeout(at, reason) => {
                    assert!(at > now, "{reason:?} is due again at once");
                    deadline = Some(at);
                }
                netcheck::Output::Done(report) => {
                    // Every report can be told.
                    assert!(report.document().is_object());
                    return;
                }
                _ => {}
            }
        }
        assert!(asked.len() <= NETCHECK_OUTPUTS_MAX);
        if let Some(([pick, how, len], rest)) = input.split_first_chunk::<3>() {
            let (attributes, rest) = rest.split_at(rest.len().min(usize::from(len & 0x3c)));
            input = rest;
            let Some((socket, to, datagram)) = asked.iter().rev().nth(usize::from(*pick)) else {
                continue;
            };
            let mut bytes = datagram.clone();
            if how & 1 == 0 {
                let Ok(answer) = stun::answer(datagram, mapped) else { continue };
                bytes = answer.to_vec();
                let whole = attributes.len() / 4 * 4;
                bytes.extend_from_slice(&attributes[..whole]);
                bytes[3] = bytes[3].wrapping_add(whole as u8);
            }
            let from = if how & 2 == 0 { *to } else { servers[usize::from(how >> 7)] };
            let from = if how & 4 == 0 { from } else { SocketAddr::new(from.ip(), 3479) };
            let socket = if how & 8 == 0 { *socket } else { netcheck::Socket::Tunnel };
            check.handle(
                now,
                netcheck::Input::Datagram { socket, from, bytes: &bytes },
                &mut random,
            );
        } else if let Some(at) = deadline {
            now = at;
            check.handle(now, netcheck::Input::Timeout, &mut random);
        }
    }
    unreachable!("a check ends");
}

/// What one check may send: its questions, with what each may lead to, a few times each.
const NETCHECK_OUTPUTS_MAX: usize = 200;

/// The content of a disco message from somebody who has the key, and the datagram as it arrived
/// from somebody who has not.
///
/// Must hold: no panic, nothing opens without the key, lists are bounded, and what was read is
/// written and read again as the same.
pub fn disco(input: &[u8]) {
    let (key, sender) = (BoxKey::from_bytes([1; 32]), PublicKey([2; 32]));
    let mut foreign = input.to_vec();
    if let Some(envelope) = Envelope::parse(&mut foreign) {
        assert_eq!(envelope.open(&key), Err(disco::DiscoError::Sealed));
    }
    let Ok(message) = Message::parse(input) else { return };
    if let Message::CallMeMaybe { addresses } = &message {
        assert!(addresses.len() <= CANDIDATES_MAX);
    }
    let mut datagram = disco::seal(&message, sender, [3; 24], &key);
    let envelope = Envelope::parse(&mut datagram);
    assert_eq!(envelope.map(|envelope| envelope.open(&key)), Some(Ok(message)));
}

/// Any bytes as what a relay or a client sends, cut at the place that the first byte says.
///
/// Must hold: what is cut in one piece and what is cut in two are the same frames, and a frame that
/// parses prints to bytes that parse to it. The same bytes as the content of both sides' logins, from
/// somebody who has the key: what opens is written and opened again as the same.
pub fn derp(bytes: &[u8]) {
    let Some((&at, stream)) = bytes.split_first() else { return };
    derp_login(stream);
    let at = usize::from(at).min(stream.len());
    let whole = frames(&mut Cutter::default(), &mut { stream });
    let mut cutter = Cutter::default();
    let mut first = &stream[..at];
    let mut pieces = frames(&mut cutter, &mut first);
    if pieces.1.is_none() {
        let mut rest = &[first, &stream[at..]].concat()[..];
        let (frames, error) = frames(&mut cutter, &mut rest);
        pieces.0.extend(frames);
        pieces.1 = error;
    }
    assert_eq!(whole, pieces, "cut at {at}");
    for (kind, payload) in &whole.0 {
        let Ok(frame) = Frame::parse(*kind, payload) else { continue };
        let mut printed = Vec::new();
        frame.write(&mut printed);
        let again = Cutter::default().next(&mut printed.as_slice()).ok().flatten();
        let again = again.and_then(|raw| Frame::parse(raw.kind, raw.payload).ok());
        assert_eq!(again.as_ref(), Some(&frame), "printed: {printed:02x?}");
    }
}

fn derp_login(content: &[u8]) {
    let (key, nonce) = (BoxKey::from_bytes([1; 32]), [2; 24]);
    let mut sealed = [&[0; TAG_LEN], content].concat();
    key.seal(&nonce, &mut sealed);
    let mut printed = Vec::new();
    if let Ok(info) = ClientInfo::open(&key, &nonce, &sealed) {
        info.write(PublicKey([3; 32]), &key, nonce, &mut printed);
        let sealed = &printed[HEADER_LEN + KEY_LEN + NONCE_LEN..];
        assert_eq!(ClientInfo::open(&key, &nonce, sealed).as_ref(), Ok(&info));
        printed.clear();
    }
    if let Ok(info) = ServerInfo::open(&key, &nonce, &sealed) {
        info.write(&key, nonce, &mut printed);
        let sealed = &printed[HEADER_LEN + NONCE_LEN..];
        assert_eq!(ServerInfo::open(&key, &nonce, sealed).as_ref(), Ok(&info));
    }
}

/// The content of an introduction from somebody who has the key, and the packet as it arrived from
/// somebody who has not.
///
/// Must hold: as for [`disco()`].
pub fn introduce(input: &[u8]) {
    let key = BoxKey::from_bytes([1; 32]);
    assert!(introduce::open(&mut input.to_vec(), PublicKey([2; 32]), &key).is_err());
    let Some(introduction) = Introduction::parse(input) else { return };
    assert!(introduction.candidates.len() <= CANDIDATES_MAX);
    let mut packet = introduce::seal(&introduction, [3; 24], &key);
    assert!(packet.len() <= introduce::LEN_MAX);
    // What is known of the NAT is left out where there is no room.
    let nat = introduction.nat.filter(|_| packet.len() > introduce::LEN_MAX - Nat::WIRE_LEN);
    let without = Introduction { nat: None, ..introduction.clone() };
    let opened = introduce::open(&mut packet, introduction.sender, &key);
    assert!(opened == Ok(introduction) || nat.is_some() && opened == Ok(without));
}

/// Steps of one input, so that each ends in time.
const STEPS_MAX: usize = 64;
/// What one step may send: every candidate once, proofs for every path, and a little.
const OUTPUTS_MAX: usize = 1000;

/// A finder and one peer that has all keys and says what the input wants, while time passes.
///
/// Must hold: no panic, nothing is due again at once, a bounded answer to each step, and no probe
/// to our own socket.
pub fn finder(mut input: &[u8]) {
    let mut side = FinderSide::new();
    for _ in 0..STEPS_MAX {
        let Some(([step, argument], rest)) = input.split_first_chunk::<2>() else { break };
        input = rest;
        let port = u16::from(*argument);
        let address = SocketAddr::from((Ipv4Addr::new(203, 0, 113, argument & 3), port + 1));
        match step % 9 {
            0 => side.introduce(*argument, &[address, FinderSide::own_socket()]),
            1 => side.say(address, &Message::CallMeMaybe { addresses: vec![address] }, true),
            2 => {
                let transaction = TransactionId([*argument; 12]);
                side.say(
                    address,
                    &Message::Ping { transaction, node_key: None, padding: 0 },
                    false,
                );
            }
            3 => side.answer(usize::from(*argument)),
            4 => side.pass(Duration::from_millis(u64::from(*argument) * 10)),
            5 => side.pass(Duration::from_secs(u64::from(argument & 63))),
            6 => side.handle(Input::Traffic { peer: side.peer }),
            7 => side.handle(Input::UnansweredData { peer: side.peer, since: side.now }),
            _ => {
                let (raw, rest) = input.split_at(input.len().min(usize::from(*argument)));
                input = rest;
                let from = only_uplink(address);
                side.handle(Input::Datagram { from, bytes: &mut raw.to_vec() });
                side.handle(Input::Relayed { peer: side.peer, bytes: &mut raw.to_vec() });
            }
        }
    }
}

struct FinderSide {
    finder: Finder,
    now: Instant,
    random: StdRng,
    deadline: Option<Instant>,
    peer: PublicKey,
    node_box: [u8; 32],
    disco_secret: SecretKey,
    sent: Vec<(Pair, Vec<u8>)>,
}

impl FinderSide {
    fn new() -> Self {
        let now = Instant::from_nanos(1_000_000_000);
        let config = Config {
            node_key: PublicKey([1; 32]),
            disco_secret: SecretKey::from_bytes([2; 32]),
            frame_len: FRAME_LEN_DEFAULT,
            least_frame_len: FRAME_LEN_MIN,
            wall_at_zero: 0,
        };
        let mut side = Self {
            finder: Finder::new(config, now),
            now,
            random: StdRng::from_seed([3; 32]),
            deadline: None,
            peer: PublicKey([4; 32]),
            node_box: [5; 32],
            disco_secret: SecretKey::from_bytes([6; 32]),
            sent: Vec::new(),
        };
        let mut network = Network::default();
        network.addresses.sockets.push(Self::own_socket());
        network.uplinks.push(Uplink { id: UplinkId(0), ipv6: false });
        side.handle(Input::Network { network, major: false });
        let box_key = BoxKey::from_bytes(side.node_box);
        side.handle(Input::AddPeer { peer: side.peer, box_key, endpoint: None, in_use: None });
        side
    }

    fn own_socket() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 51_820))
    }

    fn handle(&mut self, input: Input<'_>) {
        self.finder.handle(self.now, input, &mut self.random);
        self.deadline = None;
        let mut outputs = 0;
        while let Some(output) = self.finder.poll_output() {
            outputs += 1;
            match output {
                Output::Transmit(Transmit::Udp { pair, datagram, .. }) => {
                    assert_ne!(pair.remote, Self::own_socket());
                    self.sent.push((pair, datagram));
                }
                Output::Timeout(at, reason) => {
                    assert!(at > self.now, "{reason:?} is due again at once");
                    self.deadline = Some(at);
                }
                Output::Transmit(Transmit::Relay { .. }) | Output::Event(_) => {}
            }
        }
        assert!(outputs <= OUTPUTS_MAX);
    }

    fn pass(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(at) = self.deadline.filter(|at| *at <= end) {
            self.now = at;
            self.handle(Input::Timeout);
        }
        self.now = end;
    }

    fn introduce(&mut self, number: u8, addresses: &[SocketAddr]) {
        let candidate = |address: &SocketAddr| Candidate {
            kind: CandidateKind::from_wire(number),
            address: *address,
        };
        let introduction = Introduction {
            sender: self.peer,
            number: u64::from(number) + 1,
            answers: 0,
            disco_key: self.disco_secret.public_key(),
            has_session: false,
            home: introduce::Home::default(),
            candidates: addresses.iter().map(candidate).collect(),
            nat: Some(Nat::from_wire([number; 4])),
        };
        let key = BoxKey::from_bytes(self.node_box);
        let mut bytes = introduce::seal(&introduction, [7; 24], &key);
        self.handle(Input::Relayed { peer: self.peer, bytes: &mut bytes });
    }

    fn say(&mut self, from: SocketAddr, message: &Message, relayed: bool) {
        let Some(key) = BoxKey::agree(&self.disco_secret, self.finder.disco_key()) else { return };
        let mut bytes = disco::seal(message, self.disco_secret.public_key(), [8; 24], &key);
        if relayed {
            self.handle(Input::Relayed { peer: self.peer, bytes: &mut bytes });
        } else {
            self.handle(Input::Datagram { from: only_uplink(from), bytes: &mut bytes });
        }
    }

    /// Answers one of the pings that were sent.
    fn answer(&mut self, pick: usize) {
        let Some(at) = pick.checked_rem(self.sent.len()) else { return };
        let (pair, mut datagram) = self.sent[at].clone();
        let Some(key) = BoxKey::agree(&self.disco_secret, self.finder.disco_key()) else { return };
        let opened = Envelope::parse(&mut datagram).and_then(|envelope| envelope.open(&key).ok());
        if let Some(Message::Ping { transaction, .. }) = opened {
            let (source, received_age_ms) = (pair.remote, None);
            let pong = Message::Pong { transaction, source, received_age_ms };
            self.say(pair.remote, &pong, false);
        }
    }
}
