//! A virtual network: one host with sockets, one NAT of any behaviour, servers of RFC 5780, delay.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use proptest::prelude::*;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::nat::{Filtering, Mapping};
use crate::stun::{self, Ask};
use crate::transaction::TransactionId;

const PORT: u16 = 51_820;
const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
/// The server with two addresses, 3478 and 3479, and a relay that only answers.
const FIRST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const RELAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 99);
const WAY: Duration = Duration::from_millis(20);

fn v4(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::from((ip, port))
}

/// What is between host and servers.
#[derive(Clone, Debug)]
struct Net {
    mapping: Mapping,
    filtering: Filtering,
    preserves: bool,
    hairpin: bool,
    udp: bool,
    lifetime: Duration,
    /// Whether the server tells its other address, and whether that address is there.
    offers: bool,
    second_is_there: bool,
    /// Of a hundred datagrams to servers, so many get lost.
    loss: u64,
}

impl Default for Net {
    fn default() -> Self {
        Self {
            mapping: Mapping::EndpointIndependent,
            filtering: Filtering::AddressAndPortDependent,
            preserves: true,
            hairpin: false,
            udp: true,
            lifetime: Duration::from_secs(1000),
            offers: true,
            second_is_there: true,
            loss: 0,
        }
    }
}

/// The outside port, whom it wrote to, and when last.
type Session = (u16, BTreeSet<SocketAddr>, Instant);

struct World {
    net: Net,
    now: Instant,
    check: Netcheck,
    random: ChaCha8Rng,
    sessions: BTreeMap<(u16, Option<SocketAddr>), Session>,
    next_port: u16,
    /// Datagrams on their way to a socket of ours.
    flying: Vec<(Instant, Socket, SocketAddr, Vec<u8>)>,
    sent: Vec<(Socket, SocketAddr)>,
    asked_by_tcp: Vec<String>,
    portals: Vec<String>,
    report: Option<Report>,
}

impl World {
    fn new(net: Net) -> Self {
        Self {
            net,
            now: Instant::from_nanos(1),
            check: Netcheck::default(),
            random: ChaCha8Rng::seed_from_u64(7),
            sessions: BTreeMap::new(),
            next_port: 20_000,
            flying: Vec::new(),
            sent: Vec::new(),
            asked_by_tcp: Vec::new(),
            portals: Vec::new(),
            report: None,
        }
    }

    fn run(&mut self, depth: Depth) -> Report {
        self.run_with(setup(depth))
    }

    fn run_with(&mut self, setup: Setup) -> Report {
        self.report = None;
        self.handle(Input::Start(setup));
        for _ in 0..10_000 {
            if let Some(report) = self.report.take() {
                return report;
            }
            self.step();
        }
        panic!("no report");
    }

    /// Goes to the next datagram or deadline.
    fn step(&mut self) {
        let deadline = self.check.check.as_ref().map(|check| check.deadline().0);
        self.flying.sort_by_key(|(at, ..)| *at);
        let arrival = self.flying.first().map(|(at, ..)| *at);
        if arrival.is_some_and(|at| deadline.is_none_or(|deadline| at <= deadline)) {
            let (at, socket, from, bytes) = self.flying.remove(0);
            self.now = at;
            self.handle(Input::Datagram { socket, from, bytes: &bytes });
        } else {
            assert!(deadline.unwrap() > self.now, "due again at once");
            self.now = deadline.unwrap();
            self.handle(Input::Timeout);
        }
    }

    fn handle(&mut self, input: Input<'_>) {
        self.check.handle(self.now, input, &mut self.random);
        while let Some(output) = self.check.poll_output() {
            match output {
                Output::Transmit { socket, to, datagram } => self.transmit(socket, to, &datagram),
                Output::Connect { relay } => self.asked_by_tcp.push(relay),
                Output::LookForPortal { relay } => self.portals.push(relay),
                Output::Done(report) => self.report = Some(*report),
                Output::Mapped { .. } | Output::Timeout(..) => {}
            }
        }
    }

    fn transmit(&mut self, socket: Socket, to: SocketAddr, datagram: &[u8]) {
        self.sent.push((socket, to));
        if !self.net.udp || self.random.next_u64() % 100 < self.net.loss {
            return;
        }
        let Some(source) = self.translate(socket, to) else { return };
        if to.ip() == OUTSIDE {
            if self.net.hairpin {
                self.deliver(source, to, datagram);
            }
            return;
        }
        for (from, back_to, answer) in self.serve(source, to, datagram) {
            self.now = self.now + WAY;
            self.deliver(from, back_to, &answer);
            self.now = self.now - WAY;
        }
    }

    /// The source outside; opens or refreshes the mapping.
    fn translate(&mut self, socket: Socket, to: SocketAddr) -> Option<SocketAddr> {
        let inside = port_of(socket);
        let key = match self.net.mapping {
            Mapping::None | Mapping::EndpointIndependent => None,
            Mapping::AddressDependent => Some(SocketAddr::new(to.ip(), 0)),
            _ => Some(to),
        };
        let (now, lifetime) = (self.now, self.net.lifetime);
        self.sessions.retain(|_, (_, _, last)| now.since(*last) < lifetime);
        self.next_port += 1;
        let untranslated = self.net.mapping == Mapping::None;
        let kept = untranslated || self.net.preserves && key.is_none();
        let fresh = if kept { inside } else { self.next_port };
        let session = self.sessions.entry((inside, key)).or_insert((fresh, BTreeSet::new(), now));
        session.1.insert(to);
        session.2 = now;
        let ip = if untranslated { INSIDE } else { OUTSIDE };
        Some(v4(ip, session.0))
    }

    /// From outside, through the filter.
    fn deliver(&mut self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let (at, lifetime, filtering) = (self.now + WAY, self.net.lifetime, self.net.filtering);
        for ((inside, _), (port, written_to, last)) in &mut self.sessions {
            let passes = match filtering {
                Filtering::EndpointIndependent => true,
                Filtering::AddressDependent => written_to.iter().any(|a| a.ip() == from.ip()),
                Filtering::AddressAndPortDependent => written_to.contains(&from),
            };
            if *port == to.port() && passes && at.since(*last) < lifetime {
                *last = at;
                self.flying.push((at, socket_of(*inside), from, bytes.to_vec()));
            }
        }
    }

    /// What the servers say: from where, to where, what.
    fn serve(
        &self,
        source: SocketAddr,
        to: SocketAddr,
        datagram: &[u8],
    ) -> Vec<(SocketAddr, SocketAddr, Vec<u8>)> {
        let IpAddr::V4(ip) = to.ip() else { return Vec::new() };
        let two = [FIRST, SECOND].contains(&ip) && [3478, 3479].contains(&to.port());
        if ip == RELAY && to.port() == 3478 {
            return vec![(to, source, stun::answer(datagram, source).unwrap().to_vec())];
        }
        if !two || (ip == SECOND && !self.net.second_is_there) {
            return Vec::new();
        }
        let transaction = stun::transaction_of_request(datagram).unwrap();
        let other = v4(if ip == FIRST { SECOND } else { FIRST }, 6957 - to.port());
        let is = |ask| stun::request(ask, transaction).as_slice() == datagram;
        let mut back_to = source;
        let from = if is(Ask::OtherPort) {
            SocketAddr::new(to.ip(), other.port())
        } else if is(Ask::OtherAddressAndPort) {
            other
        } else {
            let port = (0..=u16::MAX).find(|port| is(Ask::ToPort(*port)));
            back_to.set_port(port.unwrap_or(source.port()));
            to
        };
        if from.ip() == SECOND && !self.net.second_is_there {
            return Vec::new();
        }
        vec![(
            from,
            back_to,
            answer_with_other(transaction, source, self.net.offers.then_some(other)),
        )]
    }

    fn refused(&self, name: &str) -> u64 {
        self.check.refused().find(|(known, _)| *known == name).unwrap().1
    }
}

/// An answer of a server with two addresses, as coturn writes it.
fn answer_with_other(
    transaction: TransactionId,
    source: SocketAddr,
    other: Option<SocketAddr>,
) -> Vec<u8> {
    let request = stun::binding_request(transaction);
    let mut answer = stun::answer(&request, source).unwrap().to_vec();
    if let Some(SocketAddr::V4(other)) = other {
        answer.extend([0x80, 0x2c, 0, 8, 0, 1]);
        answer.extend(other.port().to_be_bytes());
        answer.extend(other.ip().octets());
        answer[3] += 12;
    }
    answer
}

fn port_of(socket: Socket) -> u16 {
    match socket {
        Socket::Tunnel => PORT,
        Socket::Filtering => 41_001,
        Socket::Neighbour => 41_002,
        Socket::Asker => 41_003,
        Socket::Lifetime(step) => 42_000 + u16::from(step),
    }
}

fn socket_of(port: u16) -> Socket {
    match port {
        PORT => Socket::Tunnel,
        41_001 => Socket::Filtering,
        41_002 => Socket::Neighbour,
        41_003 => Socket::Asker,
        step => Socket::Lifetime((step - 42_000) as u8),
    }
}

fn server(name: &str, is_relay: bool, ip: Ipv4Addr) -> Server {
    Server { name: name.into(), is_relay, stun: vec![v4(ip, 3478)] }
}

fn setup(depth: Depth) -> Setup {
    Setup {
        servers: vec![server("https://relay", true, RELAY), server("stun:3478", false, FIRST)],
        addresses: vec![INSIDE.into(), Ipv4Addr::LOCALHOST.into()],
        port: PORT,
        home: None,
        port_mapping: PortMapping::default(),
        depth,
        written_to: Vec::new(),
    }
}

const KINDS: Depth = Depth::Kinds { asker_port: 41_003 };
const DIAGNOSIS: Depth = Depth::Diagnosis { hairpin: true, lifetime: None };

fn any_nat() -> impl Strategy<Value = (Mapping, Filtering)> {
    let mapping = prop::sample::select(vec![
        Mapping::None,
        Mapping::EndpointIndependent,
        Mapping::AddressDependent,
        Mapping::AddressAndPortDependent,
    ]);
    let filtering = prop::sample::select(vec![
        Filtering::EndpointIndependent,
        Filtering::AddressDependent,
        Filtering::AddressAndPortDependent,
    ]);
    (mapping, filtering)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// On the port in use, to which somebody may have been let in before.
    #[test]
    fn the_kinds_of_a_port_in_use_are_right_or_not_known(
        (mapping, filtering) in any_nat(),
        preserves: bool,
        open in prop::sample::subsequence(vec![(SECOND, 3478), (SECOND, 3479), (FIRST, 3479)], 0..=3),
    ) {
        let mut world = World::new(Net { mapping, filtering, preserves, ..Net::default() });
        let written_to: Vec<_> = open.iter().map(|(ip, port)| v4(*ip, *port)).collect();
        for to in &written_to {
            world.translate(Socket::Tunnel, *to);
        }
        let report = world.run_with(Setup { written_to: written_to.clone(), ..setup(KINDS) });
        prop_assert_eq!(report.mapping, Some(mapping));
        if report.filtering.is_some() || written_to.is_empty() {
            prop_assert_eq!(report.filtering, Some(filtering));
        }
        // The port in use stays shut for those who are to knock at it.
        let by_tunnel = world.sent.iter().filter(|(socket, _)| *socket == Socket::Tunnel);
        prop_assert!(by_tunnel.into_iter().all(|(_, to)| *to == v4(FIRST, 3478)));
        prop_assert!(world.asked_by_tcp.is_empty());
        prop_assert!(world.sent.len() <= 3 * 8);
    }

    #[test]
    fn every_nat_is_told_from_every_other(
        (mapping, filtering) in any_nat(),
        preserves: bool,
        hairpin: bool,
    ) {
        let mut world = World::new(Net { mapping, filtering, preserves, hairpin, ..Net::default() });
        let report = world.run(Depth::Full);
        prop_assert!(report.udp);
        prop_assert_eq!(report.mapping, Some(mapping));
        prop_assert_eq!(report.filtering, Some(filtering));
        let depends = [Mapping::AddressDependent, Mapping::AddressAndPortDependent].contains(&mapping);
        prop_assert_eq!(report.mapping_varies_by_dest_ip, Some(depends));
        prop_assert_eq!(report.port_preserved, Some(mapping == Mapping::None || preserves && !depends));
        prop_assert_eq!(report.hairpin, None, "nobody asked for it");
        prop_assert!(world.asked_by_tcp.is_empty());
        prop_assert!(report.took < NETCHECK_TIME_FOR_TESTS);
        // Never to ourselves, and never to the same place without end.
        prop_assert!(world.sent.iter().all(|(_, to)| to.ip() != OUTSIDE && to.ip() != INSIDE));
        prop_assert!(world.sent.len() <= 3 * 8);
    }

    /// A loss that the repetitions bear changes no answer to the worse.
    #[test]
    fn losses_make_unknown_not_wrong((mapping, filtering) in any_nat(), seed: u64) {
        let mut world = World::new(Net { mapping, filtering, loss: 15, ..Net::default() });
        world.random = ChaCha8Rng::seed_from_u64(seed);
        let report = world.run(Depth::Full);
        let wrong = report.mapping.is_some_and(|seen| seen != mapping && seen != Mapping::Dependent);
        prop_assert!(!wrong || mapping == Mapping::AddressAndPortDependent, "{:?}", report.mapping);
        let open = report.filtering == Some(Filtering::EndpointIndependent);
        prop_assert!(!open || filtering == Filtering::EndpointIndependent);
    }

    #[test]
    fn no_datagram_breaks_anything(
        bytes in prop::collection::vec(any::<u8>(), 0..100),
        socket in prop::sample::select(vec![Socket::Tunnel, Socket::Filtering, Socket::Asker]),
    ) {
        let mut world = World::new(Net::default());
        world.handle(Input::Start(setup(Depth::Full)));
        let before = world.refused("malformed") + world.refused("unasked");
        world.handle(Input::Datagram { socket, from: v4(FIRST, 3478), bytes: &bytes });
        prop_assert_eq!(world.refused("malformed") + world.refused("unasked"), before + 1);
    }
}

const NETCHECK_TIME_FOR_TESTS: Duration = crate::limits::NETCHECK_TIME;

#[test]
fn one_server_that_offers_nothing_says_little_and_nothing_wrong() {
    for net in [
        Net { offers: false, ..Net::default() },
        Net { offers: false, mapping: Mapping::AddressAndPortDependent, ..Net::default() },
    ] {
        let mut setup = setup(Depth::Full);
        setup.servers.remove(0);
        let report = World::new(net).run_with(setup);
        assert!(report.udp);
        assert_eq!(report.mapping_varies_by_dest_ip, None);
        assert_eq!((report.mapping, report.filtering), (None, None));
        assert_eq!(report.verdict().prospect, Prospect::Unknown);
    }
}

#[test]
fn two_servers_that_offer_nothing_tell_easy_from_hard() {
    let mapping = |mapping| {
        let report = World::new(Net { mapping, offers: false, ..Net::default() }).run(Depth::Full);
        (report.mapping_varies_by_dest_ip, report.mapping, report.verdict().prospect)
    };
    let easy = (Some(false), Some(Mapping::EndpointIndependent), Prospect::Easy);
    assert_eq!(mapping(Mapping::EndpointIndependent), easy);
    let hard = (Some(true), Some(Mapping::Dependent), Prospect::Hard);
    assert_eq!(mapping(Mapping::AddressAndPortDependent), hard);
}

#[test]
fn silence_of_an_address_that_is_not_there_is_no_filter() {
    let net =
        Net { second_is_there: false, filtering: Filtering::AddressDependent, ..Net::default() };
    assert_eq!(World::new(net).run(Depth::Full).filtering, None);
}

#[test]
fn a_hairpin_is_seen_from_another_socket_only() {
    for hairpin in [true, false] {
        for filtering in [Filtering::EndpointIndependent, Filtering::AddressAndPortDependent] {
            let mut world = World::new(Net { hairpin, filtering, ..Net::default() });
            world.handle(Input::Start(setup(DIAGNOSIS)));
            while world.report.is_none() {
                for relay in std::mem::take(&mut world.asked_by_tcp) {
                    let report = TcpReport::Failed("refused".into());
                    world.handle(Input::Connected { relay: &relay, report });
                }
                for relay in std::mem::take(&mut world.portals) {
                    world.handle(Input::Portal { relay: &relay, captive: None });
                }
                world.step();
            }
            assert_eq!(world.report.unwrap().hairpin, Some(hairpin), "{filtering:?}");
            let own = |socket| v4(OUTSIDE, port_of(socket));
            assert!(world.sent.iter().all(|(socket, to)| *to != own(*socket)), "no LAND");
        }
    }
}

#[test]
fn without_udp_relays_are_tried_by_tcp_and_the_verdict_says_so() {
    let mut world = World::new(Net { udp: false, ..Net::default() });
    world.handle(Input::Start(setup(Depth::Full)));
    while world.asked_by_tcp.is_empty() {
        world.step();
    }
    assert_eq!(world.now.since(Instant::from_nanos(1)), Duration::from_secs(1));
    let (connect, ready) = (Duration::from_millis(30), Duration::from_millis(75));
    let report = TcpReport::Connected { connect, ready };
    world.handle(Input::Connected { relay: "https://relay", report });
    world.handle(Input::Portal { relay: "https://relay", captive: Some(false) });
    while world.report.is_none() {
        world.step();
    }
    let report = world.report.unwrap();
    assert!(!report.udp);
    assert_eq!(report.nearest_relay(), Some(("https://relay", connect)));
    assert_eq!(report.captive_portal, Some(false));
    let verdict = report.verdict();
    assert_eq!(verdict.prospect, Prospect::RelayOnly);
    assert!(verdict.sentence.contains("UDP is blocked"), "{verdict:?}");
}

#[test]
fn a_captive_portal_without_a_way_out_is_named() {
    let mut world = World::new(Net { udp: false, ..Net::default() });
    world.handle(Input::Start(setup(Depth::Full)));
    while world.portals.is_empty() {
        world.step();
    }
    world.handle(Input::Portal { relay: "https://relay", captive: Some(true) });
    let report = TcpReport::Failed("connection refused".into());
    world.handle(Input::Connected { relay: "https://relay", report });
    while world.report.is_none() {
        world.step();
    }
    let verdict = world.report.unwrap().verdict();
    assert_eq!(verdict.prospect, Prospect::Nothing);
    assert!(verdict.sentence.contains("captive portal"));
}

#[test]
fn a_driver_that_says_nothing_does_not_hold_the_report_up() {
    let mut world = World::new(Net { udp: false, ..Net::default() });
    let report = world.run(Depth::Full);
    assert_eq!(report.took, NETCHECK_TIME_FOR_TESTS);
    assert!(matches!(report.servers[0].tcp, Some(TcpReport::Failed(_))));
    assert_eq!(report.verdict().prospect, Prospect::Nothing);
}

#[test]
fn the_lifetime_of_a_mapping_is_between_two_steps() {
    let longest = Duration::from_secs(130);
    for (lifetime, at_least, less_than) in [
        (4, 0, Some(5)),
        (10, 8, Some(12)),
        (30, 25, Some(32)),
        (121, 90, Some(125)),
        (500, 125, None),
    ] {
        let mut world =
            World::new(Net { lifetime: Duration::from_secs(lifetime), ..Net::default() });
        let mut setup = setup(Depth::Diagnosis { hairpin: false, lifetime: Some(longest) });
        setup.servers.remove(0);
        let report = world.run_with(setup);
        let seconds = Duration::from_secs;
        let expected =
            MappingLifetime { at_least: seconds(at_least), less_than: less_than.map(seconds) };
        assert_eq!(report.mapping_lifetime, Some(expected), "{lifetime} s");
        // As soon as it is known, and never after the bound.
        let last = seconds(less_than.unwrap_or(125)) + seconds(2);
        assert!(report.took <= last, "{:?} of {lifetime} s", report.took);
        assert_eq!(report.filtering, Some(Filtering::AddressAndPortDependent));
    }
}

#[test]
fn answers_count_only_from_who_was_asked_where_it_was_asked_and_once() {
    let mut world = World::new(Net { udp: false, ..Net::default() });
    let mut setup = setup(Depth::Full);
    setup.servers.remove(0);
    world.check.handle(world.now, Input::Start(setup), &mut world.random);
    let Some(Output::Transmit { datagram, to, .. }) = world.check.poll_output() else { panic!() };
    let mapped = v4(OUTSIDE, 4_000);
    let answer = stun::answer(&datagram, mapped).unwrap();
    let feed = |world: &mut World, socket, from, bytes: &[u8]| {
        world.handle(Input::Datagram { socket, from, bytes });
    };
    feed(&mut world, Socket::Tunnel, v4(SECOND, 3478), &answer);
    assert_eq!(world.refused("wrong_source"), 1);
    feed(&mut world, Socket::Asker, to, &answer);
    assert_eq!(world.refused("wrong_socket"), 1);
    let foreign = stun::answer(&stun::binding_request(TransactionId([9; 12])), mapped).unwrap();
    feed(&mut world, Socket::Tunnel, to, &foreign);
    assert_eq!(world.refused("unasked"), 1);
    feed(&mut world, Socket::Tunnel, to, &datagram);
    assert_eq!(world.refused("unasked"), 2, "our own question is no answer");
    feed(&mut world, Socket::Tunnel, to, &answer[..20]);
    assert_eq!(world.refused("malformed"), 1);
    feed(&mut world, Socket::Tunnel, to, &answer);
    feed(&mut world, Socket::Tunnel, to, &answer);
    // The check is over with the only answer: the second one comes after it.
    assert_eq!(world.refused("unasked"), 3);
    assert_eq!(world.report.take().unwrap().ipv4.global, Some(mapped));
    world.handle(Input::Connected { relay: "x", report: TcpReport::Failed(String::new()) });
    assert_eq!(world.refused("relay_unasked"), 1);
}

#[test]
fn a_server_that_ignores_what_it_is_asked_for_shows_no_filter() {
    // Its answers carry another address, yet always come from where they were asked.
    let mut world = World::new(Net::default());
    let mut setup = setup(Depth::Full);
    setup.servers.remove(0);
    world.check.handle(world.now, Input::Start(setup), &mut world.random);
    let mut report = None;
    for _ in 0..100 {
        let mut answers = Vec::new();
        while let Some(output) = world.check.poll_output() {
            match output {
                Output::Transmit { socket, to, datagram } => {
                    let transaction = stun::transaction_of_request(&datagram).unwrap();
                    let mapped = v4(OUTSIDE, port_of(socket));
                    let other = Some(v4(SECOND, 3479));
                    answers.push((socket, to, answer_with_other(transaction, mapped, other)));
                }
                Output::Done(done) => report = Some(done),
                Output::Timeout(at, _) => world.now = at,
                _ => {}
            }
        }
        for (socket, from, bytes) in answers {
            let input = Input::Datagram { socket, from, bytes: &bytes };
            world.check.handle(world.now, input, &mut world.random);
        }
        world.check.handle(world.now, Input::Timeout, &mut world.random);
    }
    let report = report.unwrap();
    assert_eq!((report.mapping, report.filtering), (Some(Mapping::EndpointIndependent), None));
    assert_eq!(world.refused("wrong_source"), 1);
}

#[test]
fn a_server_cannot_send_us_anywhere() {
    let server = v4(FIRST, 3478);
    for bad in [
        v4(Ipv4Addr::new(192, 168, 1, 1), 53),
        v4(Ipv4Addr::LOCALHOST, 22),
        v4(Ipv4Addr::new(169, 254, 169, 254), 80),
        v4(Ipv4Addr::new(100, 64, 0, 1), 80),
        v4(Ipv4Addr::BROADCAST, 9),
        v4(Ipv4Addr::new(224, 0, 0, 1), 9),
        v4(FIRST, 3479),
        v4(SECOND, 3478),
        v4(INSIDE, PORT),
    ] {
        let mut world = World::new(Net { udp: false, ..Net::default() });
        let mut setup = setup(Depth::Full);
        setup.servers.remove(0);
        world.check.handle(world.now, Input::Start(setup), &mut world.random);
        let Some(Output::Transmit { datagram, .. }) = world.check.poll_output() else { panic!() };
        let transaction = stun::transaction_of_request(&datagram).unwrap();
        let answer = answer_with_other(transaction, v4(OUTSIDE, 1), Some(bad));
        world.handle(Input::Datagram { socket: Socket::Tunnel, from: server, bytes: &answer });
        assert_eq!(world.refused("address_unusable"), 1, "{bad}");
        assert!(world.sent.iter().all(|(_, to)| *to == server), "{bad}");
    }
}

#[test]
fn a_server_cannot_make_a_socket_write_to_itself_or_to_others() {
    let inside = v4(Ipv4Addr::new(192, 168, 1, 1), 53);
    let one = v4(OUTSIDE, 4_000);
    for [tunnel, neighbour] in [
        [one, one],
        [one, v4(SECOND, 53)],
        [inside, inside],
        [inside, v4(Ipv4Addr::new(192, 168, 1, 1), 54)],
    ] {
        let mut world = World::new(Net { udp: false, ..Net::default() });
        let mut setup = setup(DIAGNOSIS);
        setup.servers.remove(0);
        let mut asked = VecDeque::new();
        world.check.handle(world.now, Input::Start(setup), &mut world.random);
        for mapped in [tunnel, neighbour] {
            while let Some(output) = world.check.poll_output() {
                if let Output::Transmit { socket, datagram, .. } = output {
                    asked.push_back((socket, datagram));
                }
            }
            let (socket, datagram) = asked.pop_back().unwrap();
            let bytes = stun::answer(&datagram, mapped).unwrap();
            let input = Input::Datagram { socket, from: v4(FIRST, 3478), bytes: &bytes };
            world.check.handle(world.now, input, &mut world.random);
        }
        assert_eq!(world.refused("address_unusable"), 1, "{tunnel} {neighbour}");
        while let Some(output) = world.check.poll_output() {
            assert!(!matches!(output, Output::Transmit { .. }), "{output:?}");
        }
    }
}

#[test]
fn addresses_that_names_should_not_give_are_not_asked() {
    let mut world = World::new(Net::default());
    let mut setup = setup(Depth::Full);
    setup.servers[0].stun = vec![v4(Ipv4Addr::UNSPECIFIED, 3478), "[::]:3478".parse().unwrap()];
    let report = world.run_with(setup);
    assert_eq!(world.refused("address_unusable"), 2);
    assert!(report.udp);
}

#[test]
fn between_full_checks_only_the_nearest_are_asked() {
    let mut world = World::new(Net::default());
    let mut setup = setup(Depth::Nearest);
    let far =
        |index: u8| server(&format!("https://far{index}"), true, Ipv4Addr::new(9, 9, 9, index));
    setup.servers.extend((1..=10).map(far));
    let full = world.run_with(setup.clone());
    assert_eq!(full.filtering, Some(Filtering::AddressAndPortDependent), "the first is a full one");
    world.sent.clear();
    world.now = world.now + Duration::from_secs(20);
    setup.home = Some("https://relay".into());
    let report = world.run_with(setup.clone());
    assert_eq!(report.filtering, full.filtering, "taken over");
    assert_eq!(report.mapping, full.mapping);
    let asked: BTreeSet<_> = world.sent.iter().map(|(_, to)| to.ip()).collect();
    assert!(asked.len() <= 4 && asked.contains(&IpAddr::V4(RELAY)), "{asked:?}");
    // Another address outside: what was known before says nothing now.
    let taken = |report: &Report| report.filtering.is_some();
    let mut moved = report.clone();
    moved.filtering = None;
    moved.ipv4.global = Some(v4(Ipv4Addr::new(203, 0, 113, 8), 1));
    moved.take_over(&full);
    assert!(!taken(&moved));
    // After five minutes all are asked again.
    world.now = world.now + FULL_CHECK_INTERVAL;
    world.sent.clear();
    world.run_with(setup);
    let asked: BTreeSet<_> = world.sent.iter().map(|(_, to)| to.ip()).collect();
    assert!(asked.len() >= 12, "{asked:?}");
}

#[test]
fn port_mapping_makes_a_hard_nat_open() {
    let mut report =
        World::new(Net { mapping: Mapping::AddressAndPortDependent, ..Net::default() })
            .run(Depth::Full);
    assert_eq!(report.verdict().prospect, Prospect::Hard);
    report.port_mapping.pcp = Some(true);
    assert_eq!(report.verdict().prospect, Prospect::Hard, "it opened nothing");
    report.port_mapping.mapped = Some(v4(OUTSIDE, 4_000));
    assert_eq!(report.verdict().prospect, Prospect::Open);
}

#[test]
fn three_values_of_ipv6() {
    let mut report = World::new(Net::default()).run(Depth::Full);
    assert_eq!(report.ipv6.word(), "no");
    report.ipv6.in_host = true;
    assert_eq!(report.ipv6.word(), "no_connectivity");
    report.ipv6.global = Some("[2001:db8::1]:1".parse().unwrap());
    assert_eq!(report.ipv6.word(), "yes");
    assert_eq!(report.document()["ipv6"]["address"], "[2001:db8::1]:1");
}
