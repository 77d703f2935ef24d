//! `millrace netcheck` behind real NATs, asking coturn, an unmodified derper and our own relay.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod schema;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;

use millrace_lab::nat::{
    DERPER_PORT, Fault, Filtering, Hairpin, Host, Internet, Ipv6, Mapping, Nat, Policy,
    PortMapping, Router, RouterOptions, SERVER_V4, STUN_PORT, STUN_V4, STUN_V6, names_for,
};
use millrace_lab::relay::Relay;
use millrace_lab::{Daemon, Lab, second_chance};
use serde_json::Value;

/// An internet with coturn, which can answer from two addresses and two ports of each family.
struct World {
    lab: Lab,
    internet: Internet,
    _coturn: Daemon,
}

impl World {
    fn new() -> Self {
        let lab = Lab::new().unwrap();
        let internet = Internet::new(&lab).unwrap();
        let coturn = internet.start_coturn(&lab).unwrap();
        Self { lab, internet, _coturn: coturn }
    }

    /// A host and the router in front of it, which must stay as long.
    fn host(&self, options: RouterOptions) -> (Router, Host) {
        let router = self.internet.router(&self.lab, "router", options).unwrap();
        let host = router.host(&self.lab, "host").unwrap();
        (router, host)
    }

    /// An unmodified derper: HTTP on 3340, STUN on 3478.
    fn derper(&self) -> Daemon {
        self.internet.start_derper(&self.lab, true).unwrap()
    }

    /// The exit code and the document, which conforms to its schema.
    fn netcheck(&self, host: &Host, words: &[&str]) -> (i32, Value) {
        let mut command = host.namespace.command(env!("CARGO_BIN_EXE_millrace"));
        command.arg("netcheck").arg("--json").args(words);
        self.run(host, command)
    }

    fn run(&self, host: &Host, mut command: Command) -> (i32, Value) {
        names_for(&self.lab, &mut command).unwrap();
        let output = host.namespace.output(&mut command, "").unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        let document: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {:?}: {stderr}", output.stdout));
        schema::check(&document, "millrace.netcheck.1.json");
        (output.status.code().unwrap(), document)
    }
}

fn stun() -> String {
    format!("--stun={}:{STUN_PORT}", STUN_V4[0])
}

fn stun_v6() -> String {
    format!("--stun=[{}]:{STUN_PORT}", STUN_V6[0])
}

fn derper_url() -> String {
    format!("http://{}:{DERPER_PORT}", SERVER_V4[0])
}

/// What a NAT is to be taken for.
struct Expected {
    mapping: &'static str,
    filtering: &'static str,
    varies: bool,
    preserved: bool,
    prospect: &'static str,
    exit: i32,
}

const EIM: Expected = Expected {
    mapping: "endpoint_independent",
    filtering: "address_and_port_dependent",
    varies: false,
    preserved: true,
    prospect: "easy",
    exit: 0,
};
const HARD: Expected = Expected {
    mapping: "address_and_port_dependent",
    varies: true,
    preserved: false,
    prospect: "hard",
    exit: 3,
    ..EIM
};

#[test]
fn each_nat_is_classified_right_by_coturn() {
    let any = |mapping, filtering| Nat::Translate { mapping, filtering };
    let apd = Filtering::AddressAndPortDependent;
    let cases = [
        (
            Nat::None,
            Expected {
                mapping: "none",
                filtering: "endpoint_independent",
                prospect: "open",
                ..EIM
            },
        ),
        (Nat::Firewall, Expected { mapping: "none", ..EIM }),
        (Nat::OneToOne, Expected { filtering: "endpoint_independent", prospect: "open", ..EIM }),
        (Nat::Linux, EIM),
        (Nat::EASY, EIM),
        (Nat::RESTRICTED_CONE, Expected { filtering: "address_dependent", ..EIM }),
        (Nat::FULL_CONE, Expected { filtering: "endpoint_independent", prospect: "open", ..EIM }),
        (any(Mapping::EndpointIndependentRandom, apd), Expected { preserved: false, ..EIM }),
        (any(Mapping::AddressDependent, apd), Expected { mapping: "address_dependent", ..HARD }),
        (Nat::HARD, HARD),
        (any(Mapping::Sequential, apd), HARD),
    ];
    let world = &World::new();
    thread::scope(|scope| {
        for (nat, expected) in cases {
            let case = move || {
                let (_router, host) = world.host(RouterOptions::nat(nat));
                let (exit, document) = world.netcheck(&host, &[&stun()]);
                let what = format!("{nat:?}: {document:#}");
                assert_eq!(document["udp"], true, "{what}");
                assert_eq!(document["ipv4"]["state"], "yes", "{what}");
                assert_eq!(document["ipv6"]["state"], "no", "{what}");
                assert_eq!(document["mapping"], expected.mapping, "{what}");
                assert_eq!(document["filtering"], expected.filtering, "{what}");
                assert_eq!(document["mapping_varies_by_dest_ip"], expected.varies, "{what}");
                assert_eq!(document["port_preserved"], expected.preserved, "{what}");
                assert_eq!(document["verdict"]["prospect"], expected.prospect, "{what}");
                let public = expected.mapping == "none";
                let hairpin = if public { Value::Null } else { Value::Bool(false) };
                assert_eq!(document["hairpin"], hairpin, "{what}");
                assert_eq!(exit, expected.exit, "{what}");
            };
            // A random port can be the one that it must not be.
            scope.spawn(move || second_chance(case));
        }
    });
}

#[test]
fn a_hairpin_is_seen_where_there_is_one() {
    let world = World::new();
    for filtering in [Filtering::EndpointIndependent, Filtering::AddressAndPortDependent] {
        let nat = Nat::Translate { mapping: Mapping::EndpointIndependent, filtering };
        let options = RouterOptions { hairpin: Hairpin::External, ..RouterOptions::nat(nat) };
        let (_router, host) = world.host(options);
        let (_, document) = world.netcheck(&host, &[&stun()]);
        assert_eq!(document["hairpin"], true, "{filtering:?}: {document:#}");
        let (_, document) = world.netcheck(&host, &[&stun(), "--no-hairpin"]);
        assert_eq!(document["hairpin"], Value::Null);
    }
}

#[test]
fn the_lifetime_of_a_mapping_is_measured() {
    // A machine that stands still for two seconds measures another.
    second_chance(lifetime);
}

fn lifetime() {
    let world = World::new();
    let (_router, host) = world.host(RouterOptions { timeout_s: 10, ..RouterOptions::default() });
    let (_, document) = world.netcheck(&host, &[&stun(), "--lifetime=13s"]);
    let lifetime = &document["mapping_lifetime"];
    assert_eq!(lifetime["at_least_seconds"], 8.0, "{document:#}");
    assert_eq!(lifetime["less_than_seconds"], 12.0, "{document:#}");
}

#[test]
fn where_udp_is_blocked_the_relay_is_measured_by_tcp() {
    let world = World::new();
    let _derper = world.derper();
    for policy in [Policy::NoUdp, Policy::RejectUdp] {
        let (_router, host) = world.host(RouterOptions { policy, ..RouterOptions::default() });
        let (exit, document) = world.netcheck(&host, &[&stun(), "--relay", &derper_url()]);
        assert_eq!(exit, 3, "{document:#}");
        assert_eq!(document["udp"], false);
        assert_eq!(document["ipv4"]["state"], "no_connectivity");
        assert_eq!(document["verdict"]["prospect"], "relay_only");
        let sentence = document["verdict"]["sentence"].as_str().unwrap();
        assert!(sentence.contains("UDP is blocked"), "{sentence}");
        assert_eq!(document["nearest_relay"]["relay"], derper_url());
        assert!(document["servers"][0]["tcp"]["connect_seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(document["captive_portal"], false);
    }
}

#[test]
fn derper_answers_by_stun_and_is_the_nearest_relay() {
    let world = World::new();
    let _derper = world.derper();
    let (_router, host) = world.host(RouterOptions::default());
    let (exit, document) = world.netcheck(&host, &["--relay", &derper_url()]);
    assert_eq!(exit, 0, "{document:#}");
    let latency = &document["servers"][0]["ipv4_latency_seconds"];
    assert_eq!(document["nearest_relay"]["latency_seconds"], *latency);
    assert!(latency.as_f64().unwrap() > 0.0);
    // One address shows nothing of others.
    assert_eq!(document["mapping_varies_by_dest_ip"], Value::Null);
    assert_eq!(document["verdict"]["prospect"], "unknown");
    // A second server at another address does.
    let second = format!("--stun={}:{STUN_PORT}", STUN_V4[1]);
    let (_, document) = world.netcheck(&host, &["--relay", &derper_url(), &second]);
    assert_eq!(document["mapping_varies_by_dest_ip"], false);
    assert_eq!(document["mapping"], "endpoint_independent");
    assert_eq!(document["verdict"]["prospect"], "easy");
    // coturn 4.6.1 names itself as its other address when asked at its second: not to be followed.
    assert_eq!(document["filtering"], Value::Null);
}

#[test]
fn a_configuration_names_our_own_relay_and_whom_its_certificate_is_of() {
    let world = World::new();
    let relay = Relay::start(&world.lab, &world.internet).unwrap();
    let (_router, host) =
        world.host(RouterOptions { ipv6: Ipv6::Firewall, ..RouterOptions::default() });
    let file = world.lab.directory().join("netcheck.toml");
    let discovery = relay.discovery();
    fs::write(&file, format!("schema = 1\n[interface]\nname = \"mr0\"\n[discovery]\n{discovery}"))
        .unwrap();
    let (exit, document) = world.netcheck(&host, &["--config", file.to_str().unwrap()]);
    assert_eq!(exit, 0, "{document:#}");
    let server = &document["servers"][0];
    assert!(server["ipv4_latency_seconds"].is_number(), "{document:#}");
    assert!(server["ipv6_latency_seconds"].is_number(), "{document:#}");
    assert_eq!(server["tcp"]["error"], Value::Null);
    assert!(server["tcp"]["ready_seconds"].as_f64() >= server["tcp"]["connect_seconds"].as_f64());
    assert_eq!(document["mapping_varies_by_dest_ip"], false, "two addresses answered");
    // Without its authority there is one clear error, and the rest goes on.
    let url = format!("https://{}", millrace_lab::nat::RELAY_NAME);
    let (exit, document) = world.netcheck(&host, &["--relay", &url]);
    assert_eq!(exit, 3, "{document:#}");
    let error = document["servers"][0]["tcp"]["error"].as_str().unwrap();
    assert!(error.contains("relay_ca_file"), "{error}");
    assert_eq!(document["nearest_relay"], Value::Null);
}

#[test]
fn ipv6_has_three_values() {
    let world = World::new();
    let options = RouterOptions { ipv6: Ipv6::Firewall, ..RouterOptions::default() };
    let router = world.internet.router(&world.lab, "router", options).unwrap();
    let only = router.host_v6_only(&world.lab, "only IPv6").unwrap();
    let (exit, document) = world.netcheck(&only, &[&stun(), &stun_v6()]);
    assert_eq!(exit, 0, "{document:#}");
    assert_eq!(document["ipv4"]["state"], "no");
    assert_eq!(document["ipv6"]["state"], "yes");
    let address: SocketAddr = document["ipv6"]["address"].as_str().unwrap().parse().unwrap();
    assert_eq!(address.ip(), IpAddr::from(only.v6(0).unwrap()));
    assert_eq!(document["filtering_ipv6"], "address_and_port_dependent", "{document:#}");
    let both = router.host(&world.lab, "both").unwrap();
    let blocked = STUN_V6.map(|address| Fault::Block(address.into()));
    router.set_faults(&blocked).unwrap();
    let (exit, document) = world.netcheck(&both, &[&stun(), &stun_v6()]);
    assert_eq!((exit, &document["ipv6"]["state"]), (0, &"no_connectivity".into()), "{document:#}");
    assert_eq!(document["ipv4"]["state"], "yes");
    // And an IPv6 that lets everybody in.
    let (_router, open) =
        world.host(RouterOptions { ipv6: Ipv6::Open, ..RouterOptions::default() });
    let (_, document) = world.netcheck(&open, &[&stun_v6()]);
    assert_eq!(document["filtering_ipv6"], "endpoint_independent", "{document:#}");
}

#[test]
fn a_captive_portal_is_told_from_a_relay() {
    let world = World::new();
    let _derper = world.derper();
    let options = RouterOptions { policy: Policy::NoUdp, ..RouterOptions::default() };
    let router = world.internet.router(&world.lab, "router", options).unwrap();
    let host = router.host(&world.lab, "host").unwrap();
    let (lan, namespace) = (router.lan_v4(1), router.namespace());
    let listener = namespace.run(|| TcpListener::bind((lan, 8080))).unwrap();
    // All HTTP goes to the router, which sends everybody to its login.
    let redirect = format!(
        "table ip portal {{ chain pre {{ type nat hook prerouting priority -110;
            iifname \"lan\" meta l4proto tcp dnat to {lan}:8080
        }}\n}}\n"
    );
    namespace.exec_with_input("nft -f -", &redirect).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            login(stream);
        }
    });
    let (exit, document) = world.netcheck(&host, &["--relay", &derper_url()]);
    assert_eq!(document["captive_portal"], true, "{document:#}");
    assert_eq!((exit, &document["verdict"]["prospect"]), (4, &"nothing".into()));
    let sentence = document["verdict"]["sentence"].as_str().unwrap();
    assert!(sentence.contains("captive portal"), "{sentence}");
}

/// What a hotel answers to everything.
fn login(mut stream: TcpStream) {
    let _ = stream.read(&mut [0; 2000]);
    let answer = "HTTP/1.1 302 Found\r\nLocation: http://login.hotel.example/\r\n\
                  Content-Length: 0\r\nConnection: close\r\n\r\n";
    let _ = stream.write_all(answer.as_bytes());
}

#[test]
fn a_router_that_opens_ports_makes_a_hard_nat_open() {
    let world = World::new();
    let (router, host) = world.host(RouterOptions::nat(Nat::HARD));
    let miniupnpd = router.start_port_mapping(&world.lab, PortMapping::PmpAndPcp).unwrap();
    let (exit, document) = world.netcheck(&host, &[&stun()]);
    let ports = &document["port_mapping"];
    assert_eq!([&ports["upnp"], &ports["nat_pmp"], &ports["pcp"]], [false, true, true], "{ports}");
    let mapped: SocketAddr = ports["mapped"].as_str().unwrap().parse().unwrap();
    assert_eq!(mapped.ip(), IpAddr::from(router.wan_v4()));
    assert_eq!((exit, &document["verdict"]["prospect"]), (0, &"open".into()), "{document:#}");
    drop(miniupnpd);
    let (exit, document) = world.netcheck(&host, &[&stun(), "--no-port-mapping"]);
    assert_eq!((exit, &document["port_mapping"]["pcp"]), (3, &Value::Null));
}

#[test]
fn nobody_answers_and_a_limit_of_time() {
    let world = World::new();
    let (_router, host) =
        world.host(RouterOptions { policy: Policy::Nothing, ..RouterOptions::default() });
    let (exit, document) = world.netcheck(&host, &[&stun()]);
    assert_eq!((exit, &document["verdict"]["prospect"]), (4, &"nothing".into()), "{document:#}");
    let mut command = host.namespace.command(env!("CARGO_BIN_EXE_millrace"));
    command.args(["netcheck", &stun(), "--timeout", "500ms"]);
    let output = host.namespace.output(&mut command, "").unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(124), 0));
}

#[test]
fn the_text_ends_with_what_will_work_and_what_would_help() {
    // A hard NAT keeps a port once in 65,536 times.
    second_chance(text_of_a_hard_nat);
}

fn text_of_a_hard_nat() {
    let world = World::new();
    let (_router, host) = world.host(RouterOptions::nat(Nat::HARD));
    let mut command = host.namespace.command(env!("CARGO_BIN_EXE_millrace"));
    command.args(["netcheck", &stun()]);
    let output = host.namespace.output(&mut command, "").unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    for part in [
        "UDP               yes\n",
        "MappingVariesByDestIP: yes",
        "port preserved    no\n",
        "\nThis NAT is hard",
        "\nWhat would help: Turn on endpoint-independent mapping",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
}
