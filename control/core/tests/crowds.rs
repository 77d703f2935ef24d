//! A hub with 999 spokes, and a mesh of twenty: what one gateway's work grows with.
#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::time::Duration;

use millrace_path::Route;
use millrace_path::candidate::{Candidate, CandidateKind};
use sim::World;
use sim::nat::{Filtering, Mapping, Nat};

const SPOKES: usize = 999;

fn easy(public: &str) -> Nat {
    Nat::new(Mapping::EndpointIndependent, Filtering::AddressAndPortDependent, public, None)
}

/// A hub behind a NAT, and spokes each behind their own.
fn hub() -> World {
    let mut world = World::new(1);
    world.data_interval = Duration::from_secs(2);
    world.poll_interval = Duration::from_secs(1);
    let nat = world.add_nat(easy("192.0.2.1"));
    world.add_gateway("192.168.1.2:51820", Some(nat), 10);
    for at in 0..SPOKES {
        let public = format!("100.{}.{}.1", 128 + at / 250, at % 250);
        let nat = world.add_nat(easy(&public));
        let spoke = world.add_gateway("192.168.1.2:51820", Some(nat), 15);
        world.connect(0, spoke, None);
        // Names what nobody has, too, so that there is more to try than the budget bears at once.
        for last in 1..=3 {
            let address = format!("10.77.0.{last}:51820").parse().unwrap();
            let kind = CandidateKind::Interface;
            world.gateways[spoke].bogus.push(Candidate { kind, address });
        }
    }
    world
}

fn direct(world: &World) -> usize {
    (1..=SPOKES).filter(|spoke| world.is_direct(0, *spoke) && world.is_direct(*spoke, 0)).count()
}

#[test]
fn a_hub_meets_its_thousand_spokes_within_its_budget_and_they_take_turns() {
    let mut world = hub();
    world.start();
    world.run_for(Duration::from_secs(5));
    let soon = direct(&world);
    assert!(soon < SPOKES, "the budget is not felt");
    // Five candidates of each spoke, a thousand pings at once and 100 a second; nobody starves.
    let time = world.run_until(Duration::from_secs(55), |world| direct(world) == SPOKES);
    assert!(time.is_some(), "{} of {SPOKES} after a minute", direct(&world));
    let (timeouts, moves) =
        (world.gateways[0].watch.timeouts_in_all, world.gateways[0].routes.len());
    world.run_for(Duration::from_secs(10));
    let timeouts = world.gateways[0].watch.timeouts_in_all - timeouts;
    // Two and a half heartbeats a second of each peer, and what they find due.
    assert!(timeouts <= 10 * 5 * SPOKES as u64, "{timeouts} timeouts in ten seconds");
    assert_eq!(world.gateways[0].routes.len(), moves);
    assert_eq!(direct(&world), SPOKES);
    world.assert_held();
}

#[test]
fn a_mesh_of_twenty_meets_and_a_peer_that_is_plain_wireguard_is_left_alone() {
    let mut world = World::new(2);
    for at in 0..20 {
        let nat = world.add_nat(easy(&format!("192.0.2.{}", at + 1)));
        world.add_gateway("192.168.1.2:51820", Some(nat), 10 + at);
    }
    let plain = world.add_gateway("203.0.113.9:51820", None, 10);
    world.gateways[plain].plain = true;
    for one in 0..20 {
        (0..one).for_each(|other| world.connect(one, other, None));
        world.connect(one, plain, Some("203.0.113.9:51820".parse().unwrap()));
    }
    world.start();
    let met = |world: &World| {
        (0..20).all(|one| (0..20).all(|other| one == other || world.is_direct(one, other)))
    };
    let time = world.run_until(Duration::from_secs(60), met);
    assert!(time.is_some());
    world.run_for(Duration::from_secs(120));
    for one in 0..20 {
        let link = &world.gateways[one].links[&plain];
        assert_eq!((link.route, link.datagrams), (Route::Unset, 0));
        assert!(link.signals <= 12, "{} introductions to who never answers", link.signals);
    }
    world.assert_held();
}
