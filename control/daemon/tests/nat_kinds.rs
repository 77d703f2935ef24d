//! What two gateways know of both NATs, with coturn as the server that can show it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, Running, World, carrier, nats, try_why, why};
use millrace_lab::gateway::own_program;
use millrace_lab::nat::{Hairpin, Internet, Nat, PortMapping, STUN_PORT, STUN_V4, names_for};
use millrace_lab::{Lab, Node, Result, second_chance, wait_for};
use serde_json::{Value, json};

/// What `why --json` is to say of one side.
fn kind(mapping: &str, filtering: &str, port_preserved: bool) -> Value {
    json!({
        "mapping": mapping,
        "filtering": filtering,
        "filtering_ipv6": null,
        "port_preserved": port_preserved,
    })
}

/// Both gateways ask coturn, at one address.
fn world(lab: &Lab, internet: &Internet, [a, b]: [Nat; 2]) -> Result<World> {
    let mut world = World::apart(lab, internet, nats(a, b))?;
    world.daemons.push(internet.start_coturn(lab)?);
    for options in &mut world.options {
        options.stun = vec![format!("{}:{STUN_PORT}", STUN_V4[0])];
    }
    Ok(world)
}

/// Starts a pair and waits until both sides know of both NATs; also what they say of the peer. A hard
/// NAT's random port can be the one inside, and who was kept from an answer asks again much later:
/// callers have a second chance.
fn both_know(nat: [Nat; 2], kinds: &[Value; 2]) -> (Running, [Value; 2]) {
    let running = Running::start(|lab, internet| world(lab, internet, nat), 0);
    let mut running = running.unwrap();
    running.pair.wait_until_ready(LIMIT).unwrap();
    let mut said = [Value::Null, Value::Null];
    let know = || {
        said = [0, 1].map(|side| why(&running.pair.nodes[side]));
        let right = |side: usize| {
            said[side]["nat"]["kind"] == kinds[side] && said[side]["peer_nat"] == kinds[1 - side]
        };
        (right(0) && right(1)).then_some(())
    };
    let known = wait_for("the kinds of both NATs on both sides", LIMIT, know);
    assert!(known.is_ok(), "{nat:?}: {said:#?}");
    (running, said)
}

#[test]
fn two_easy_nats_are_known_on_both_sides() {
    second_chance(two_easy_nats);
}

fn two_easy_nats() {
    let easy = || kind("endpoint_independent", "address_and_port_dependent", true);
    let (mut running, said) = both_know([Nat::EASY, Nat::EASY], &[easy(), easy()]);
    assert_eq!(said[0]["nat"]["mapping_varies"], false);
    assert_eq!(said[0]["nat"]["filtering_unknown"], Value::Null);
    let line = "easy (the same mapping for all destinations), filters by address and port, keeps the \
                port\n";
    let said = text(&running.pair.nodes[1], "why");
    assert_eq!(said.matches(&format!("  NAT         {line}")).count(), 2, "{said}");
    let said = text(&running.pair.nodes[1], "status");
    assert!(said.contains(&format!("\nNAT {line}")), "{said}");
    // A process that knows nothing of what the one before wrote comes to the same end.
    let node = &mut running.pair.nodes[0];
    node.kill_control();
    node.start_control(&running.lab).unwrap();
    wait_for("the filter of a port in use", LIMIT, || {
        let known = try_why(&running.pair.nodes[0])?["nat"]["kind"].clone();
        assert_ne!(known["filtering"], "endpoint_independent");
        (known == easy()).then_some(())
    })
    .unwrap();
    running.finish().unwrap();
}

#[test]
fn two_hard_nats_are_the_reason() {
    second_chance(two_hard_nats);
}

fn two_hard_nats() {
    let hard = || kind("address_and_port_dependent", "address_and_port_dependent", false);
    let (running, _) = both_know([Nat::HARD, Nat::HARD], &[hard(), hard()]);
    let flow = running.pair.flow(0, Duration::from_millis(50)).unwrap();
    flow.first_arrival(LIMIT).unwrap();
    let reason = wait_for("the reason", LIMIT, || {
        let why = why(&running.pair.nodes[0]);
        let verdict = why["verdict"].as_str()?.contains("Both NATs map anew");
        verdict.then_some(why)
    })
    .unwrap();
    assert_eq!(reason["peer"]["path"], "relay");
    assert!(reason["advice"].as_str().unwrap().contains("PCP"), "{reason:#}");
    flow.finish();
    running.finish().unwrap();
}

#[test]
fn a_nat_that_does_not_lead_back_inside_is_named() {
    let mut running =
        Running::start(|lab, internet| carrier(lab, internet, Hairpin::Off, [100, 64, 1]), 0)
            .unwrap();
    running.pair.wait_until_ready(LIMIT).unwrap();
    let flow = running.pair.flow(0, Duration::from_millis(50)).unwrap();
    flow.first_arrival(LIMIT).unwrap();
    for node in &running.pair.nodes {
        wait_for("the reason", LIMIT, || {
            let why = why(node);
            assert_ne!(why["nat"]["filtering_unknown"], Value::Null, "the relay cannot show it");
            why["verdict"].as_str()?.contains("no hairpin").then_some(())
        })
        .unwrap();
    }
    flow.finish();
    running.finish().unwrap();
}

/// Behind A a router opens the tunnel's port, behind B none does.
#[test]
fn netcheck_beside_the_daemon_agrees_with_it_and_disturbs_nothing() {
    let running = Running::start(
        |lab, internet| {
            let mut world = world(lab, internet, [Nat::EASY, Nat::EASY])?;
            world.daemons.push(world.routers[0].start_port_mapping(lab, PortMapping::All)?);
            world.options[0].discovery = String::new();
            Ok(world)
        },
        0,
    );
    let mut running = running.unwrap();
    running.pair.wait_until_ready(LIMIT).unwrap();
    let flow = running.pair.flow(0, Duration::from_millis(20)).unwrap();
    running.pair.wait_for(true, LIMIT).unwrap();
    let [a, b] = &running.pair.nodes;
    let known = |node: &Node, filtering: &str| {
        wait_for("what is filtered", LIMIT, || {
            let nat = why(node)["nat"].clone();
            (nat["kind"]["filtering"] == filtering).then_some(nat)
        })
        .unwrap()
    };
    let before = [known(a, "endpoint_independent"), known(b, "address_and_port_dependent")];
    assert!(before[0]["port_mapping"].is_string(), "{:#}", before[0]);
    let began = Instant::now();
    let reports = [netcheck(&running.lab, a), netcheck(&running.lab, b)];
    for field in ["mapping", "filtering", "port_preserved"] {
        assert_eq!(reports[1][field], before[1]["kind"][field], "{field}: {:#}", reports[1]);
    }
    assert_eq!(reports[0]["mapping"], before[0]["kind"]["mapping"]);
    let ports = &reports[0]["port_mapping"];
    assert_eq!([&ports["upnp"], &ports["nat_pmp"], &ports["pcp"]], [true, true, true], "{ports}");
    let opened = ports["mapped"].as_str().unwrap();
    let kept = before[0]["port_mapping"].as_str().unwrap();
    assert!(!kept.ends_with(opened), "{opened} is the tunnel's");
    assert_eq!([why(a)["nat"].clone(), why(b)["nat"].clone()], before);
    running.pair.wait_for(true, LIMIT).unwrap();
    let lost = flow.finish().since(began);
    assert!(lost.lost == 0 && lost.sent > 0, "{lost:?}");
    running.finish().unwrap();
}

/// What a command says to people.
fn text(node: &Node, what: &str) -> String {
    let mut command = node.host.namespace.command(own_program("millrace").unwrap());
    let interface = node.gateway.interface();
    if what == "why" {
        let status = node.status().unwrap();
        let key = status["peers"][0]["public_key"].as_str().unwrap();
        command.args(["why", key, "--interface", interface]);
    } else {
        command.args([what, interface]);
    }
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

/// The document of `millrace netcheck INTERFACE`, which finds the file that the interface runs with.
fn netcheck(lab: &Lab, node: &Node) -> Value {
    let mut command = node.host.namespace.command(own_program("millrace").unwrap());
    command.args(["netcheck", node.gateway.interface(), "--json"]);
    names_for(lab, &mut command).unwrap();
    let output = command.output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn a_full_cone_and_a_restricted_one_are_told_from_hard_ones() {
    let hard = || kind("address_and_port_dependent", "address_and_port_dependent", false);
    let cases = [
        ([Nat::FULL_CONE, Nat::HARD], "endpoint_independent"),
        ([Nat::RESTRICTED_CONE, Nat::HARD], "address_dependent"),
    ];
    thread::scope(|scope| {
        for (nat, filtering) in cases {
            let case = move || {
                let cone = kind("endpoint_independent", filtering, true);
                both_know(nat, &[cone, hard()]).0.finish().unwrap();
            };
            scope.spawn(move || second_chance(case));
        }
    });
}
