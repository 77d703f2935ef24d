//! The port mapper against routers of every temper, in virtual time. Real ones are in
//! `control/daemon/tests/portmap.rs`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::limits::{
    MAPPING_LIFETIME, PORTMAP_CLOSE_TIME, PORTMAP_REST_MIN, REBOOT_CHECK_INTERVAL,
};
use millrace_path::portmap::pcp::Nonce;
use millrace_path::portmap::{
    Config, Event, Failure, Input, Lost, Mapped, Output, PortMapper, Protocol, Reason, Router,
    Transmit,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 7);
const ROGUE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 66);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(2, 0, 0, 1);
const PORT: u16 = 51820;

/// Answers datagrams of PCP and NAT-PMP as told, and remembers them.
#[derive(Default)]
struct Script {
    pcp: bool,
    nat_pmp: bool,
    /// Result of PCP maps.
    pcp_result: u8,
    granted_s: Option<u32>,
    outside: Option<Ipv4Addr>,
    /// Second in which the state began.
    born_s: u64,
    /// Answers to each SOAP action, the last for ever; none: there is no UPnP.
    upnp: BTreeMap<&'static str, VecDeque<String>>,
    location: Option<String>,
    boot: u32,
}

struct World {
    mapper: PortMapper,
    random: ChaCha8Rng,
    now: Instant,
    deadline: Option<(Instant, Reason)>,
    router: Script,
    sent: Vec<(Duration, SocketAddr, Vec<u8>)>,
    requests: Vec<String>,
    events: Vec<Event>,
}

impl World {
    fn new(router: Script) -> Self {
        let config =
            Config { internal_port: PORT, lifetime: MAPPING_LIFETIME, nonce: Nonce([9; 12]) };
        let mut world = Self {
            mapper: PortMapper::new(config),
            random: ChaCha8Rng::seed_from_u64(1),
            now: Instant::from_nanos(1_000_000_000_000),
            deadline: None,
            router,
            sent: Vec::new(),
            requests: Vec::new(),
            events: Vec::new(),
        };
        world.input(Input::Network(Some(Router {
            address: ROUTER.into(),
            own: OWN.into(),
            ifindex: 2,
        })));
        world
    }

    fn elapsed(&self) -> Duration {
        self.now.since(Instant::from_nanos(1_000_000_000_000))
    }

    fn input(&mut self, input: Input<'_>) {
        self.mapper.handle(self.now, input, &mut self.random);
        self.deadline = None;
        let outputs: Vec<Output> = std::iter::from_fn(|| self.mapper.poll_output()).collect();
        for output in outputs {
            match output {
                Output::Event(event) => self.events.push(event),
                Output::Timeout(at, reason) => self.deadline = Some((at, reason)),
                Output::Transmit(Transmit::Datagram { to, bytes }) => {
                    self.sent.push((self.elapsed(), to, bytes.clone()));
                    self.answer(to, &bytes);
                }
                Output::Transmit(Transmit::Http { exchange, request, to }) => {
                    assert_eq!(*to.ip(), ROUTER);
                    let answer = self.http(String::from_utf8(request).unwrap());
                    self.input(Input::HttpBytes { exchange, bytes: answer.as_bytes() });
                }
                Output::Transmit(Transmit::HttpEnd { .. }) => {}
            }
        }
    }

    /// Lets time pass, timers and all.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        let mut steps = 0;
        while let Some((at, reason)) = self.deadline.filter(|(at, _)| *at <= end) {
            self.now = self.now.max(at);
            self.input(Input::Timeout);
            assert!(
                self.deadline.is_none_or(|next| next.0 > at),
                "{reason:?} is due at once again"
            );
            steps += 1;
            assert!(steps < 100_000);
        }
        self.now = end;
    }

    fn answer(&mut self, to: SocketAddr, bytes: &[u8]) {
        if to.ip() != IpAddr::from(ROUTER) {
            return;
        }
        let epoch = (self.elapsed().as_secs() - self.router.born_s) as u32;
        let outside = self.router.outside.unwrap_or(OUTSIDE);
        let mut answer = bytes.to_vec();
        match (to.port(), bytes) {
            (5351, [2, _, ..]) if self.router.pcp => {
                answer[1] |= 0x80;
                answer[8..12].copy_from_slice(&epoch.to_be_bytes());
                if let (Some(granted), true) = (self.router.granted_s, bytes.len() == 60) {
                    answer[4..8].copy_from_slice(&granted.to_be_bytes());
                }
                if bytes.len() == 60 {
                    answer[3] = self.router.pcp_result;
                    answer[44..60].copy_from_slice(&outside.to_ipv6_mapped().octets());
                }
            }
            (5351, [0, 0]) if self.router.nat_pmp => {
                answer = [0, 0x80, 0, 0].to_vec();
                answer.extend(epoch.to_be_bytes());
                answer.extend(outside.octets());
            }
            (5351, [0, 1, ..]) if self.router.nat_pmp => {
                answer = [0, 0x81, 0, 0].to_vec();
                answer.extend(epoch.to_be_bytes());
                answer.extend(&bytes[4..12]);
            }
            (1900, _) if self.router.location.is_some() => {
                answer = format!(
                    "HTTP/1.1 200 OK\r\nLOCATION: {}\r\nBOOTID.UPNP.ORG: {}\r\n\r\n",
                    self.router.location.as_ref().unwrap(),
                    self.router.boot
                )
                .into_bytes();
            }
            _ => return,
        }
        self.input(Input::Datagram { from: to, bytes: &answer });
    }

    fn http(&mut self, request: String) -> String {
        let respond = |status: u16, body: &str| {
            format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        };
        let action = request
            .split_once("SOAPAction: \"")
            .and_then(|(_, rest)| rest.split_once('#'))
            .and_then(|(_, rest)| rest.split_once('"'))
            .map(|(action, _)| action.to_owned());
        self.requests.push(request);
        let Some(action) = action else {
            return respond(
                200,
                "<root><device><service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1\
                 </serviceType><controlURL>/c</controlURL></service></device></root>",
            );
        };
        let answers = self.router.upnp.get_mut(action.as_str()).unwrap();
        let answer = if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() };
        match answer.unwrap() {
            fault if fault.contains("errorCode") => respond(500, &fault),
            answer => respond(200, &answer),
        }
    }

    fn mapped(&self) -> Vec<Mapped> {
        let mapped = |event: &Event| match event {
            Event::Mapped(mapped) => Some(*mapped),
            _ => None,
        };
        self.events.iter().filter_map(mapped).collect()
    }

    /// When MAP requests of PCP went out, with their nonces.
    fn pcp_maps(&self) -> Vec<(Duration, Vec<u8>)> {
        let maps = self.sent.iter().filter(|(_, _, bytes)| bytes.len() == 60);
        maps.map(|(at, _, bytes)| (*at, bytes.clone())).collect()
    }

    fn refused(&self, name: &str) -> u64 {
        self.mapper.refused().collect::<BTreeMap<_, _>>()[name]
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn upnp(add: &[&str]) -> Script {
    let address = "<x><NewExternalIPAddress>2.0.0.1</NewExternalIPAddress></x>";
    let list = |answers: &[&str]| answers.iter().map(|answer| answer.to_string()).collect();
    Script {
        location: Some("http://192.168.1.1:5000/root.xml".into()),
        upnp: BTreeMap::from([
            ("GetExternalIPAddress", list(&[address])),
            ("AddPortMapping", list(add)),
            ("DeletePortMapping", list(&["<x/>"])),
        ]),
        ..Script::default()
    }
}

fn fault(code: u16) -> String {
    format!("<f><errorCode>{code}</errorCode></f>")
}

#[test]
fn pcp_is_renewed_at_half_of_what_was_granted_with_its_nonce() {
    let mut world =
        World::new(Script { pcp: true, nat_pmp: true, granted_s: Some(20), ..Script::default() });
    world.pass(seconds(60));
    let maps = world.pcp_maps();
    let gaps: Vec<Duration> = maps.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    assert!(gaps.len() >= 5, "{gaps:?}");
    for gap in gaps {
        assert!(gap >= seconds(10) && gap <= seconds(11), "{gap:?}");
    }
    assert!(maps.iter().all(|(_, bytes)| bytes[24..36] == [9; 12]));
    assert_eq!(world.mapped().len(), 1, "{:?}", world.events);
    assert_eq!(world.mapped()[0].lifetime, Some(seconds(20)));
}

#[test]
fn a_restarted_router_is_asked_again_at_the_next_check() {
    for (pcp, nat_pmp) in [(true, false), (false, true)] {
        let mut world = World::new(Script { pcp, nat_pmp, ..Script::default() });
        world.pass(seconds(100));
        assert_eq!(world.mapped().len(), 1);
        let before = world.sent.len();
        world.router.born_s = world.elapsed().as_secs();
        world.pass(REBOOT_CHECK_INTERVAL);
        let asked = |bytes: &[u8]| bytes.len() == 60 || bytes.len() == 12;
        assert!(world.sent[before..].iter().any(|(_, _, bytes)| asked(bytes)), "{pcp}");
        // Once: the clock fits again.
        let before = world.sent.len();
        world.pass(seconds(100));
        assert!(!world.sent[before..].iter().any(|(_, _, bytes)| asked(bytes)), "{pcp}");
    }
}

#[test]
fn an_address_that_changed_is_told() {
    let mut world = World::new(Script { nat_pmp: true, ..Script::default() });
    world.pass(seconds(3));
    world.router.outside = Some(Ipv4Addr::new(2, 0, 0, 2));
    world.pass(REBOOT_CHECK_INTERVAL);
    let externals: Vec<SocketAddr> = world.mapped().iter().map(|mapped| mapped.external).collect();
    assert_eq!(externals, ["2.0.0.1:51820".parse().unwrap(), "2.0.0.2:51820".parse().unwrap()]);
}

#[test]
fn a_private_address_outside_is_a_second_nat() {
    for (outside, behind_nat) in [
        (Ipv4Addr::new(100, 64, 0, 1), true),
        (Ipv4Addr::new(192, 168, 0, 2), true),
        (Ipv4Addr::new(100, 128, 0, 1), false),
    ] {
        let outside = Some(outside);
        let mut world = World::new(Script { pcp: true, outside, ..Script::default() });
        world.pass(seconds(1));
        assert_eq!(world.mapped()[0].behind_nat, behind_nat, "{outside:?}");
    }
}

#[test]
fn an_address_that_is_none_is_no_mapping() {
    for bad in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST] {
        let outside = Some(bad);
        let mut world =
            World::new(Script { pcp: true, nat_pmp: true, outside, ..Script::default() });
        world.pass(seconds(20));
        assert_eq!(world.mapped(), [], "{bad}");
        assert!(world.refused("bad_external") > 0);
    }
}

#[test]
fn who_is_denied_by_one_protocol_tries_the_next() {
    let mut world =
        World::new(Script { pcp: true, nat_pmp: true, pcp_result: 2, ..Script::default() });
    world.pass(seconds(3));
    assert_eq!(world.mapped()[0].protocol, Protocol::NatPmp);
    let failed = world.events.iter().find_map(|event| match event {
        Event::Failed { protocol: Protocol::Pcp, failure } => Some(failure.to_string()),
        _ => None,
    });
    assert_eq!(failed.unwrap(), "the router answers NOT_AUTHORIZED (2) by PCP");
}

#[test]
fn nobody_answers_and_we_rest_longer_each_time() {
    let mut world = World::new(Script::default());
    world.pass(seconds(3600));
    let Some(Event::Answered(answered)) = world.events.first() else {
        panic!("{:?}", world.events)
    };
    assert_eq!(
        (answered.pcp, answered.nat_pmp, answered.upnp),
        (Some(false), Some(false), Some(false))
    );
    let mut rounds: Vec<Duration> = world.sent.iter().map(|sent| sent.0).collect();
    rounds.dedup_by(|later, earlier| *later - *earlier < seconds(5));
    let gaps: Vec<u64> = rounds.windows(2).map(|pair| (pair[1] - pair[0]).as_secs()).collect();
    assert!(gaps.starts_with(&[31, 61, 121, 241, 481, 601]), "{gaps:?}");
    // It is said once.
    assert_eq!(world.events.len(), 1, "{:?}", world.events);
    assert!(world.sent.len() < 200, "{}", world.sent.len());
    assert_eq!(PORTMAP_REST_MIN, seconds(30));
}

#[test]
fn a_rogue_on_the_lan_is_not_heard() {
    let mut world = World::new(Script::default());
    let rogue = |port| SocketAddr::from((ROGUE, port));
    let mapped = [0, 0x81, 0, 0, 0, 0, 0, 1, 0xca, 0x6c, 0xca, 0x6c, 0, 0, 0x1c, 0x20];
    let address = [0, 0x80, 0, 0, 0, 0, 0, 1, 6, 6, 6, 6];
    let ssdp = b"HTTP/1.1 200 OK\r\nLOCATION: http://192.168.1.66:80/x\r\n\r\n";
    for _ in 0..3 {
        world.input(Input::Datagram { from: rogue(5351), bytes: &address });
        world.input(Input::Datagram { from: rogue(5351), bytes: &mapped });
        world.input(Input::Datagram { from: rogue(1900), bytes: ssdp });
    }
    // The router's own answer must not send us to others either.
    world.input(Input::Datagram { from: (ROUTER, 1900).into(), bytes: ssdp });
    // Nor may the router's address say what was not asked for.
    world.input(Input::Datagram { from: (ROUTER, 5351).into(), bytes: &mapped });
    world.pass(seconds(10));
    assert_eq!(world.refused("not_the_router"), 9);
    assert_eq!(world.refused("url_elsewhere"), 1);
    assert_eq!(world.refused("unasked"), 1);
    assert_eq!((world.mapped(), world.requests.len()), (vec![], 0));
    assert_eq!(world.mapper.answered().nat_pmp, Some(false));
}

#[test]
fn an_answer_for_another_nonce_is_not_ours() {
    let mut world = World::new(Script { pcp: true, ..Script::default() });
    world.pass(seconds(1));
    let mut forged = world.pcp_maps()[0].1.clone();
    forged[1] |= 0x80;
    forged[24] ^= 1;
    world.input(Input::Datagram { from: (ROUTER, 5351).into(), bytes: &forged });
    assert_eq!(world.refused("other_mapping"), 1);
    // Of the right nonce, but nothing was asked just now.
    forged[24] ^= 1;
    world.input(Input::Datagram { from: (ROUTER, 5351).into(), bytes: &forged });
    assert_eq!(world.refused("unasked"), 1);
    assert_eq!(world.mapped().len(), 1);
}

#[test]
fn upnp_takes_a_permanent_lease_where_there_is_no_other() {
    let mut world = World::new(upnp(&[&fault(725), "<x/>"]));
    world.pass(seconds(3));
    let mapped = world.mapped()[0];
    assert_eq!((mapped.protocol, mapped.lifetime), (Protocol::Upnp, None));
    let leases: Vec<&str> = world
        .requests
        .iter()
        .filter_map(|request| request.split_once("<NewLeaseDuration>")?.1.split('<').next())
        .collect();
    assert_eq!(leases, ["7200", "0"]);
    // It is deleted all the same.
    world.input(Input::Shutdown);
    assert!(world.requests.last().unwrap().contains("#DeletePortMapping"));
    assert_eq!(world.events.last(), Some(&Event::Closed));
}

#[test]
fn upnp_takes_another_port_where_ours_is_taken_and_keeps_it() {
    let mut world = World::new(upnp(&[&fault(718), &fault(718), "<x/>"]));
    world.pass(seconds(3));
    let external = world.mapped()[0].external;
    assert!(external.port() >= 1024 && external.port() != PORT);
    world.pass(MAPPING_LIFETIME);
    let ports: Vec<&str> = world
        .requests
        .iter()
        .filter(|request| request.contains("#AddPortMapping"))
        .filter_map(|request| request.split_once("<NewExternalPort>")?.1.split('<').next())
        .collect();
    assert_eq!(ports[0], "51820");
    assert!(
        ports.len() >= 4 && ports[2..].iter().all(|port| **port == external.port().to_string())
    );
    assert_eq!(world.mapped().len(), 1);
}

#[test]
fn upnp_that_always_conflicts_is_given_up() {
    let mut world = World::new(upnp(&[&fault(718)]));
    world.pass(seconds(10));
    let adds = world.requests.iter().filter(|request| request.contains("#AddPort")).count();
    assert_eq!((world.mapped(), adds), (vec![], 4));
    let failed = |event: &Event| matches!(event, Event::Failed { failure: Failure::Denied(_), .. });
    assert!(world.events.iter().any(failed));
}

#[test]
fn a_restarted_upnp_is_noticed_by_its_boot_number() {
    let mut world = World::new(upnp(&["<x/>"]));
    world.pass(seconds(100));
    let adds = |world: &World| {
        world.requests.iter().filter(|request| request.contains("#AddPortMapping")).count()
    };
    assert_eq!(adds(&world), 1);
    world.router.boot += 1;
    world.router.location = Some("http://192.168.1.1:5001/other.xml".into());
    world.pass(REBOOT_CHECK_INTERVAL);
    assert_eq!(adds(&world), 2);
    assert!(world.requests.last().unwrap().contains("Host: 192.168.1.1:5001"));
}

#[test]
fn silence_at_renewal_loses_the_mapping_when_it_expires_and_not_before() {
    let mut world = World::new(Script { pcp: true, ..Script::default() });
    world.pass(seconds(1));
    world.router.pcp = false;
    world.pass(MAPPING_LIFETIME - seconds(5));
    assert!(!world.events.iter().any(|event| matches!(event, Event::Lost { .. })));
    world.pass(seconds(10));
    let external = "2.0.0.1:51820".parse().unwrap();
    assert!(world.events.contains(&Event::Lost { external, why: Lost::Expired }));
    // And comes back with the router, at the port that was ours.
    world.router.pcp = true;
    world.pass(seconds(700));
    assert_eq!(world.mapped().len(), 2);
    assert_eq!(world.mapped()[1].external, external);
}

#[test]
fn another_network_takes_the_mapping_away() {
    let mut world = World::new(Script { pcp: true, ..Script::default() });
    world.pass(seconds(1));
    world.input(Input::Network(None));
    assert!(matches!(world.events.last(), Some(Event::Answered(_))));
    assert!(world.events.iter().any(|e| matches!(e, Event::Lost { why: Lost::Network, .. })));
    let sent = world.sent.len();
    world.pass(seconds(3600));
    assert_eq!(world.sent.len(), sent, "without a router nothing is sent");
}

#[test]
fn an_ipv6_firewall_is_opened_by_pcp_alone() {
    let mut world = World::new(Script::default());
    world.input(Input::Network(None));
    world.sent.clear();
    let (address, own) = ("fe80::1".parse().unwrap(), "2001:db8::7".parse::<IpAddr>().unwrap());
    world.input(Input::Network(Some(Router { address, own, ifindex: 5 })));
    world.pass(seconds(1));
    assert!(world.sent.iter().all(|(_, to, bytes)| {
        to.to_string() == "[fe80::1%5]:5351" && bytes.len() == 24 && bytes[0] == 2
    }));
    let mut announce = world.sent[0].2.clone();
    announce[1] |= 0x80;
    let from: SocketAddr = "[fe80::1%5]:5351".parse().unwrap();
    world.input(Input::Datagram { from, bytes: &announce });
    let mut map = world.sent.last().unwrap().2.clone();
    assert_eq!(map[8..24], "2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
    map[1] |= 0x80;
    map[44..60].copy_from_slice(&"2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
    world.input(Input::Datagram { from, bytes: &map });
    assert_eq!(world.mapped()[0].external, SocketAddr::new(own, PORT));
}

#[test]
fn a_silent_router_does_not_hold_up_the_end() {
    let mut world = World::new(Script { nat_pmp: true, ..Script::default() });
    world.pass(seconds(3));
    world.router.nat_pmp = false;
    let before = world.sent.len();
    world.input(Input::Shutdown);
    world.pass(PORTMAP_CLOSE_TIME);
    assert_eq!(world.events.last(), Some(&Event::Closed));
    let deletes: Vec<&[u8]> = world.sent[before..].iter().map(|sent| sent.2.as_slice()).collect();
    assert_eq!(deletes.len(), 3);
    assert!(deletes.iter().all(|bytes| bytes[..] == [0, 1, 0, 0, 0xca, 0x6c, 0, 0, 0, 0, 0, 0]));
    assert_eq!(world.deadline, None);
}
