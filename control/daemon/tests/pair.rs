//! Two gateways behind NATs that know nothing of each other but a public key: what operators are
//! told while the relay carries the first packet and a direct path the rest.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::Output;
use std::time::{Duration, Instant};

use millrace_lab::gateway::own_program;
use millrace_lab::nat::{
    Fault, Filtering, Host, Internet, Mapping, Nat, PortMapping, Router, RouterOptions,
};
use millrace_lab::{Connection, Lab, Node, NodeOptions, Pair, Relay, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

fn millrace(node: &Node, arguments: &[&str]) -> Output {
    let mut command = node.host.namespace.command(own_program("millrace").unwrap());
    command.args(arguments).output().unwrap()
}

/// The key of the other gateway, which has no name.
fn key_of_peer(node: &Node) -> String {
    let status = node.status().unwrap();
    status["peers"][0]["public_key"].as_str().unwrap().to_owned()
}

fn wait_until_direct(pair: &Pair) {
    let is_direct = |node: &Node| node.status().unwrap()["paths"]["peers"][0]["path"] == "direct";
    wait_for("direct paths", LIMIT, || pair.nodes.iter().all(is_direct).then_some(())).unwrap();
}

/// Two routers of the usual kind, and a host behind each.
fn homes(lab: &Lab, internet: &Internet) -> ([Router; 2], [Host; 2]) {
    let router = |name: &str| internet.router(lab, name, RouterOptions::default()).unwrap();
    let routers = [router("ra"), router("rb")];
    let hosts = [routers[0].host(lab, "a").unwrap(), routers[1].host(lab, "b").unwrap()];
    (routers, hosts)
}

#[test]
fn operators_see_the_relay_the_direct_path_and_the_reason() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let mut relay = Relay::start(&lab, &internet).unwrap();
    let easy = Nat::Translate {
        mapping: Mapping::EndpointIndependent,
        filtering: Filtering::AddressAndPortDependent,
    };
    let router = |name: &str| internet.router(&lab, name, RouterOptions::nat(easy)).unwrap();
    let routers = [router("ra"), router("rb")];
    let hosts = [routers[0].host(&lab, "a").unwrap(), routers[1].host(&lab, "b").unwrap()];
    let options = [NodeOptions::default(), NodeOptions::default()];
    let mut pair = Pair::start(&lab, &relay, hosts, options, 0).unwrap();
    let flow = pair.flow(0, Duration::from_millis(10)).unwrap();
    flow.first_arrival(LIMIT).unwrap();

    let [a, b] = &pair.nodes;
    let (name_a, key) = (a.gateway.interface().to_owned(), key_of_peer(a));
    let ping = millrace(a, &["ping", &key, "--interface", &name_a, "--until-direct", "--json"]);
    assert_eq!(ping.status.code(), Some(0), "{ping:?}");
    let text = String::from_utf8(ping.stdout).unwrap();
    let pong: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(pong["path"], "direct");
    assert!(pong["rtt_seconds"].as_f64().unwrap() < 1.0, "{pong}");

    let why = millrace(b, &["why", &key_of_peer(b), "--interface", b.gateway.interface()]);
    let text = String::from_utf8(why.stdout).unwrap();
    assert_eq!(why.status.code(), Some(0), "{text}");
    assert!(text.contains("Direct: a proven path is in use."), "{text}");
    for side in ["our side", "the peer"] {
        let (_, rest) = text.split_once(side).unwrap();
        assert!(
            rest.contains("NAT         easy (the same mapping for all destinations)"),
            "{text}"
        );
    }

    let paths = a.status().unwrap()["paths"].clone();
    assert_eq!(paths["schema"], "millrace.paths/1");
    assert_eq!(paths["problem"], Value::Null);
    assert_eq!(paths["relays"][0]["up"], true);
    assert_eq!(paths["nat"]["mapping_varies"], false);
    let history = paths["peers"][0]["history"].as_array().unwrap();
    assert_eq!(history[0]["path"], "relay", "the relay comes first: {history:?}");

    // What it does, it does as somebody who may do nothing.
    let pid = pair.nodes[0].control().unwrap().pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
    let user = nix::unistd::User::from_name("millrace").unwrap().expect("run scripts/setup");
    assert_eq!(line("Uid:").split_whitespace().next(), Some(&*user.uid.to_string()), "{status}");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(line(set), "0000000000000000", "{set}");
    }
    assert_eq!(line("NoNewPrivs:"), "1");

    // Nobody waits for a relay that is gone: the path is there.
    relay.kill();
    wait_for("the news of the relay", LIMIT, || {
        let paths = pair.nodes[0].status().unwrap()["paths"].clone();
        (paths["relays"][0]["up"] == false && paths["peers"][0]["path"] == "direct").then_some(())
    })
    .unwrap();

    // Without control everything goes on, and is not known any more.
    pair.nodes[0].kill_control();
    let ping = millrace(&pair.nodes[0], &["ping", &key, "--interface", &name_a]);
    assert_eq!(ping.status.code(), Some(5), "{ping:?}");
    let sentence = String::from_utf8(ping.stderr).unwrap();
    assert!(sentence.contains("no control process runs for"), "{sentence}");
    assert_eq!(pair.nodes[0].status().unwrap()["paths"], Value::Null);
    let record = flow.finish();
    let lost_later = record.sent.len() - record.came.iter().flatten().count();
    println!("{} sent, {lost_later} lost", record.sent.len());

    let unknown = millrace(
        &pair.nodes[1],
        &["why", "nobody", "--interface", pair.nodes[1].gateway.interface()],
    );
    assert_eq!(unknown.status.code(), Some(2), "{unknown:?}");
}

/// The data plane dies and comes back with new tables and sockets and without a session: control
/// finds them by itself, and the path that it knew is the path. Whoever sent with the old session is
/// asked for a new one.
#[test]
fn a_data_plane_that_is_killed_gets_its_paths_back() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let relay = Relay::start(&lab, &internet).unwrap();
    let (_routers, hosts) = homes(&lab, &internet);
    let options = [NodeOptions::default(), NodeOptions::default()];
    let mut pair = Pair::start(&lab, &relay, hosts, options, 0).unwrap();
    let flow = pair.flow(0, Duration::from_millis(10)).unwrap();
    wait_until_direct(&pair);
    let came_back = |pair: &Pair, what: &str, killed_at| {
        let arrival = flow.arrival_after(Instant::now(), LIMIT).unwrap();
        wait_until_direct(pair);
        let gap = flow.record().since(killed_at).gap;
        println!("{what} restarted: {arrival:?} from then to the next datagram, {gap:?} in all");
        // WireGuard's own timers need 15 s.
        let told = pair.nodes.each_ref().map(|node| node.status().unwrap());
        assert!(gap < Duration::from_secs(10), "{what}: {gap:?}\n{told:#?}");
    };
    let killed_at = Instant::now();
    pair.nodes[0].gateway.restart().unwrap();
    came_back(&pair, "the sender", killed_at);
    // This one has no packet for the other, which sends with a session that is gone.
    let killed_at = Instant::now();
    pair.nodes[1].gateway.restart().unwrap();
    came_back(&pair, "the receiver", killed_at);
    let status = pair.nodes[1].status().unwrap();
    assert_eq!(status["control"]["connects"]["started"], 1, "{}", status["control"]);
    // Nor is there anybody who remembers a session.
    let killed_at = Instant::now();
    pair.nodes[1].kill_control();
    pair.nodes[1].gateway.restart().unwrap();
    pair.nodes[1].start_control(&lab).unwrap();
    came_back(&pair, "the receiver with its control", killed_at);
    let status = pair.nodes[1].status().unwrap();
    assert_eq!(status["control"]["connects"]["started"], 1, "{}", status["control"]);
    let paths = pair.nodes[0].status().unwrap()["paths"].clone();
    assert_eq!(paths["problem"], Value::Null);
}

/// A tunnel inside a tunnel, or a badly built one: packets as long as ours vanish. The path is used
/// for shorter ones, and TCP inside, which nobody else tells, moves as it would on any such link.
#[test]
fn a_path_for_shorter_packets_is_used_for_them() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let relay = Relay::start(&lab, &internet).unwrap();
    let (routers, hosts) = homes(&lab, &internet);
    routers[0].set_faults(&[Fault::DropLongerThan(1400)]).unwrap();
    let options = [NodeOptions::default(), NodeOptions::default()];
    let mut pair = Pair::start(&lab, &relay, hosts, options, 0).unwrap();
    // Until then the data plane keeps 128 packets: little more than a second of the stream.
    pair.wait_until_ready(LIMIT).unwrap();
    let flow = pair.flow(0, Duration::from_millis(10)).unwrap();
    wait_until_direct(&pair);
    for node in &pair.nodes {
        let path = node.status().unwrap()["paths"]["peers"][0].clone();
        assert_eq!((&path["mtu"], &path["shortened"]), (&1280.into(), &true.into()), "{path}");
    }
    let [a, b] = &pair.nodes;
    for (from, to) in [(a, b), (b, a)] {
        let address = (to.tunnel_v4, 0).into();
        let (from, to) = (&from.host.namespace, &to.host.namespace);
        let connection = Connection::start(from, to, address, 2 << 20, pair.marker).unwrap();
        let moved = || connection.seen().ok().filter(|seen| seen.bytes > 8 << 20);
        wait_for("8 MiB by TCP", LIMIT, moved).unwrap();
    }
    let shown = millrace(a, &["status", a.gateway.interface()]);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.contains("packets up to 1280 B"), "{text}");
    let why = millrace(a, &["why", &key_of_peer(a), "--interface", a.gateway.interface()]);
    let text = String::from_utf8(why.stdout).unwrap();
    assert!(text.contains("Direct, for shorter packets than the tunnel's longest."), "{text}");
    let path = a.status().unwrap()["paths"]["peers"][0].clone();
    assert_eq!(path["path"], "direct", "{path}");
    assert_eq!(flow.finish().all().lost, 0);
}

/// The nonces of PCP MAP requests (RFC 6887 section 11.1) that came to a router.
const NONCES: &str = "table inet nonces {
    set seen { typeof @th,256,96; flags dynamic; size 16; }
    chain requests {
        type filter hook prerouting priority -300
        udp dport 5351 @th,64,16 0x0201 add @seen { @th,256,96 }
    }
}";

/// A PCP router may let only who knows the nonce renew a mapping, and control keeps no file: killed,
/// it must come back with the same. (miniupnpd of Debian 12 does not look, so we do.)
#[test]
fn a_control_that_is_killed_renews_what_its_router_opened() {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let relay = Relay::start(&lab, &internet).unwrap();
    let (routers, hosts) = homes(&lab, &internet);
    let _miniupnpd = routers[0].start_port_mapping(&lab, PortMapping::All).unwrap();
    let home = routers[0].namespace();
    home.exec_with_input("nft -f -", NONCES).unwrap();
    let seen = || {
        let set = home.exec("nft list set inet nonces seen").unwrap();
        let elements = set.split("elements = {").nth(1).unwrap_or_default();
        let nonces =
            elements.split(['}', ',']).map(str::trim).filter(|word| word.starts_with("0x"));
        nonces.map(str::to_owned).collect::<Vec<_>>()
    };
    let asks = NodeOptions { discovery: String::new(), ..NodeOptions::default() };
    let mut pair = Pair::start(&lab, &relay, hosts, [asks, NodeOptions::default()], 0).unwrap();
    let mapped = |pair: &Pair| {
        let mapped = || {
            let mapped = pair.nodes[0].paths().ok()?["nat"]["port_mapping"].clone();
            mapped.as_str().map(str::to_owned)
        };
        wait_for("an open port", LIMIT, mapped).unwrap()
    };
    let first = mapped(&pair);
    assert!(first.starts_with("Pcp "), "{first}");
    let nonces = seen();
    assert_eq!(nonces.len(), 1, "{nonces:?}");
    pair.nodes[0].kill_control();
    pair.nodes[0].start_control(&lab).unwrap();
    assert_eq!(mapped(&pair), first);
    assert_eq!(seen(), nonces);
}
