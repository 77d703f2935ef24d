//! Two gateways in one simulated world after another: every pair of NATs must end as it should.
//!
//! `MILLRACE_WORLDS=n` runs n random worlds, `MILLRACE_SEED=n` runs one again.
#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::time::Duration;

use millrace_path::{Route, Why};
use sim::World;
use sim::front::Front;
use sim::gateway::Leg;
use sim::nat::{Filtering, Mapping, Nat};

const TABLE_HEAD: &str = "\
# Two gateways, each behind one of these: what they end on, and how soon both are there

Simulated: 50 ms there and back, the relay 40 ms, STUN servers 20 and 30 ms away; from a cold start, nine
seeds. Easy: one mapping for all destinations; hard: one for each. Written by `tests/worlds.rs`.

| one | other | path | median, ms | worst, ms |
|---|---|---|---|---|
";

/// Two gateways behind these, 10 and 15 ms from the middle of the Internet.
fn world(seed: u64, fronts: [Front; 2]) -> World {
    let mut world = World::new(seed);
    for (at, front) in fronts.into_iter().enumerate() {
        let public = ["192.0.2.1", "203.0.113.1"][at];
        let (inside, segment) = match front {
            Front::Open | Front::Blocked => (format!("{public}:51820"), None),
            Front::Firewall => {
                let filtering = Filtering::AddressAndPortDependent;
                let nat = Nat::new(Mapping::None, filtering, public, None);
                (format!("{public}:51820"), Some(world.add_nat(nat)))
            }
            Front::Nat(mapping, filtering) => {
                let nat = Nat::new(mapping, filtering, public, None);
                (format!("10.{at}.0.2:51820"), Some(world.add_nat(nat)))
            }
        };
        world.add_gateway(&inside, segment, [10, 15][at]);
    }
    world
}

/// The table of outcomes is a committed file; `MILLRACE_UPDATE=1` writes it anew.
#[test]
fn every_pair_of_nats_ends_as_theory_says() {
    let mut table = String::from(TABLE_HEAD);
    for one in Front::ALL {
        for other in Front::ALL {
            let mut times = Vec::new();
            for seed in 0..9 {
                let mut world = world(seed, [one, other]);
                world.start();
                times.extend(world.run_until(Duration::from_secs(10), World::both_direct));
            }
            assert!(times.is_empty() || times.len() == 9, "{one:?} - {other:?}: {times:?}");
            assert_eq!(!times.is_empty(), one.meets(other), "{one:?} - {other:?}");
            times.sort();
            let row = match times[..] {
                [_, _, _, _, median, .., worst] => {
                    assert!(median <= Duration::from_millis(500), "{one:?} - {other:?}: {times:?}");
                    // Rounded up, so that the file does not change with every draw of the dice.
                    let rounded = |time: Duration| time.as_millis().next_multiple_of(100);
                    format!("direct | {} | {}", rounded(median), rounded(worst))
                }
                _ => "relay | - | -".to_owned(),
            };
            table += &format!("| {} | {} | {row} |\n", one.name(), other.name());
        }
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nat_pairs.md");
    if std::env::var_os("MILLRACE_UPDATE").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), table, "MILLRACE_UPDATE=1 writes it anew");
}

#[test]
fn the_first_route_is_the_relay_and_the_last_the_direct_path() {
    let nat = Front::Nat(Mapping::EndpointIndependent, Filtering::AddressAndPortDependent);
    let mut world = world(1, [nat, nat]);
    world.start();
    assert_eq!(world.route(0, 1), Route::Relay);
    world.run_for(Duration::from_secs(60));
    for gateway in &world.gateways {
        let whys: Vec<_> = gateway.routes.iter().map(|(_, _, why)| *why).collect();
        assert_eq!(whys, [Why::First, Why::Proven]);
    }
}

fn easy() -> Front {
    Front::Nat(Mapping::EndpointIndependent, Filtering::AddressAndPortDependent)
}

/// A world with both gateways on a direct path, settled.
fn direct_world(seed: u64, fronts: [Front; 2]) -> World {
    let mut world = world(seed, fronts);
    world.start();
    world.run_until(Duration::from_secs(5), World::both_direct).unwrap();
    world.run_for(Duration::from_secs(10));
    world
}

#[test]
fn a_dead_path_is_left_within_one_and_a_half_seconds_and_taken_again() {
    for seed in 0..50 {
        let mut world = direct_world(seed, [easy(), easy()]);
        world.run_for(Duration::from_millis(seed * 17));
        world.cut = vec![(0, 1), (1, 0)];
        let gone = |world: &World| !world.is_direct(0, 1) && !world.is_direct(1, 0);
        let time = world.run_until(Duration::from_secs(5), gone).unwrap();
        assert!(time < Duration::from_millis(1500), "seed {seed}: {time:?}");
        world.run_for(Duration::from_secs(20));
        assert!(gone(&world));
        world.cut.clear();
        // The peer's next search is at most 44 s away.
        let time = world.run_until(Duration::from_secs(45), World::both_direct);
        assert!(time.is_some(), "seed {seed}");
    }
}

#[test]
fn a_path_that_carries_one_way_only_is_left_by_both() {
    let mut world = direct_world(3, [easy(), easy()]);
    world.cut = vec![(1, 0)];
    let gone = |world: &World| !world.is_direct(0, 1) && !world.is_direct(1, 0);
    let time = world.run_until(Duration::from_secs(5), gone).unwrap();
    assert!(time < Duration::from_millis(1500), "{time:?}");
    world.run_for(Duration::from_secs(120));
    assert!(gone(&world));
}

#[test]
fn a_path_that_never_carried_both_ways_is_never_used() {
    let mut world = world(3, [easy(), easy()]);
    world.cut = vec![(1, 0)];
    world.start();
    world.run_for(Duration::from_secs(120));
    assert!(world.gateways.iter().all(|gateway| gateway.routes.len() == 1));
}

#[test]
fn a_path_that_dies_under_its_proof_has_another_chance() {
    for cut_ms in (80..300).step_by(10) {
        let mut world = world(3, [easy(), easy()]);
        world.start();
        world.run_for(Duration::from_millis(cut_ms));
        world.cut = vec![(0, 1)];
        world.run_for(Duration::from_secs(10));
        world.cut.clear();
        let time = world.run_until(Duration::from_secs(35), World::both_direct);
        assert!(time.is_some(), "cut after {cut_ms} ms");
    }
}

#[test]
fn a_nat_that_forgets_under_a_live_path_is_survived() {
    for seed in 0..20 {
        let mut world = direct_world(seed, [easy(), easy()]);
        world.nats()[0].flush();
        let left = world.run_until(Duration::from_secs(2), |world| !world.both_direct()).unwrap();
        assert!(left < Duration::from_millis(1500), "seed {seed}: {left:?}");
        let back = world.run_until(Duration::from_secs(3), World::both_direct).unwrap();
        assert!(left + back < Duration::from_secs(3), "seed {seed}: {left:?} + {back:?}");
    }
}

#[test]
fn an_idle_path_is_kept_open_through_a_nat_that_forgets_after_ten_seconds() {
    let mut world = world(4, [easy(), easy()]);
    world.nats().iter_mut().for_each(|nat| nat.timeout = Duration::from_secs(10));
    world.start();
    world.run_until(Duration::from_secs(5), World::both_direct).unwrap();
    world.gateways.iter_mut().for_each(|gateway| gateway.busy = false);
    // WireGuard's last keepalive is traffic, too.
    world.run_for(Duration::from_secs(70));
    let before: Vec<_> = world.gateways.iter().map(|gateway| gateway.probes_sent).collect();
    world.run_for(Duration::from_secs(600));
    for (gateway, before) in world.gateways.iter().zip(before) {
        let whys: Vec<_> = gateway.routes.iter().map(|(_, _, why)| *why).collect();
        assert_eq!(whys, [Why::First, Why::Proven]);
        // One ping and one pong each 8 s.
        let sent = gateway.probes_sent - before;
        assert!((140..=165).contains(&sent), "{sent} datagrams in ten idle minutes");
    }
}

#[test]
fn a_search_without_a_find_goes_on_for_ever_at_a_low_price() {
    let hard = Front::Nat(Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent);
    let mut world = world(5, [hard, hard]);
    world.start();
    world.run_for(Duration::from_secs(60));
    let before: Vec<_> =
        world.gateways.iter().map(|gateway| (gateway.probes_sent, gateway.relay_sent)).collect();
    world.run_for(Duration::from_secs(600));
    for (gateway, (probes, relayed)) in world.gateways.iter().zip(before) {
        let (probes, relayed) = (gateway.probes_sent - probes, gateway.relay_sent - relayed);
        // Two sides search every 30 s: 40 searches of 6 rounds and 2 or 3 candidates.
        assert!((100..=1000).contains(&probes), "{probes} probes in ten minutes");
        assert!(relayed <= 150, "{relayed} messages through the relay in ten minutes");
        assert_eq!(gateway.routes.len(), 1);
    }
}

#[test]
fn the_relay_never_sees_an_address() {
    let mut world = world(6, [easy(), easy()]);
    world.keep_relayed = true;
    world.start();
    world.run_for(Duration::from_secs(10));
    assert!(world.relayed.len() >= 2);
    for packet in &world.relayed {
        for address in [[10, 0, 0, 2], [10, 1, 0, 2], [192, 0, 2, 1], [203, 0, 113, 1]] {
            assert!(packet.windows(4).all(|window| window != address));
        }
    }
}

#[test]
fn frames_that_do_not_pass_are_found_out_before_the_path_is_used() {
    let mut world = world(8, [easy(), easy()]);
    world.gateways[1].legs[0].frame_len_max = 1400;
    world.start();
    world.run_until(Duration::from_secs(5), World::both_direct).unwrap();
    world.run_for(Duration::from_secs(1));
    for gateway in &world.gateways {
        // Which of the lengths is answered first is chance; nothing longer than passes is believed.
        let [_, (_, first, Why::Proven), later @ ..] = &gateway.routes[..] else {
            panic!("{:?}", gateway.routes)
        };
        assert!(later.iter().all(|(_, _, why)| *why == Why::FrameLen));
        let last = later.last().map_or(first, |(_, route, _)| route);
        assert!(matches!(last, Route::Direct { frame_len: 1392, .. }), "{last:?}");
    }
}

#[test]
fn a_path_that_becomes_narrow_in_use_is_seen_to() {
    let mut world = direct_world(18, [easy(), easy()]);
    world.gateways[1].legs[0].frame_len_max = 1400;
    world.run_for(Duration::from_secs(10));
    for gateway in &world.gateways {
        let last = gateway.routes.last().unwrap();
        assert!(matches!(last, (_, Route::Direct { frame_len: 1392, .. }, Why::FrameLen)));
    }
    let changes = world.gateways[0].routes.len();
    world.run_for(Duration::from_secs(1500));
    assert_eq!(world.gateways[0].routes.len(), changes, "asking again moves nothing");
    world.gateways[1].legs[0].frame_len_max = 1200;
    world.run_for(Duration::from_secs(10));
    for gateway in &world.gateways {
        assert!(matches!(gateway.routes.last().unwrap(), (_, Route::Relay, Why::DataLost)));
    }
    world.gateways[1].legs[0].frame_len_max = 1472;
    let back = world.run_until(Duration::from_secs(65), World::both_direct);
    assert!(back.is_some());
}

#[test]
fn a_path_too_narrow_for_any_tunnel_is_not_used() {
    let mut world = world(8, [easy(), easy()]);
    world.gateways[1].legs[0].frame_len_max = 1200;
    world.start();
    world.run_for(Duration::from_secs(60));
    assert!(!world.is_direct(0, 1) && !world.is_direct(1, 0));
}

#[test]
fn gateways_on_one_network_meet_there() {
    let mut world = World::new(9);
    let filtering = Filtering::AddressAndPortDependent;
    world.add_nat(Nat::new(Mapping::EndpointIndependent, filtering, "192.0.2.1", None));
    world.add_gateway("10.0.0.2:51820", Some(0), 10);
    world.add_gateway("10.0.0.3:51820", Some(0), 10);
    world.start();
    world.run_until(Duration::from_secs(5), World::both_direct).unwrap();
    let Route::Direct { pair, .. } = world.route(0, 1) else { panic!("not direct") };
    assert_eq!(pair.remote, "10.0.0.3:51820".parse().unwrap());
}

#[test]
fn two_subscribers_of_one_carrier_meet_where_it_hairpins_and_at_the_relay_where_not() {
    for hairpin in [true, false] {
        let mut world = World::new(10);
        let filtering = Filtering::AddressAndPortDependent;
        let nat = |ip, outer| Nat::new(Mapping::EndpointIndependent, filtering, ip, outer);
        world.add_nat(nat("192.0.2.1", None));
        world.nats()[0].hairpin = hairpin;
        world.add_nat(nat("100.64.0.11", Some(0)));
        world.add_nat(nat("100.64.0.12", Some(0)));
        world.add_gateway("10.0.0.2:51820", Some(1), 10);
        world.add_gateway("10.0.1.3:51820", Some(2), 10);
        world.start();
        let direct = world.run_until(Duration::from_secs(10), World::both_direct);
        assert_eq!(direct.is_some(), hairpin);
    }
}

#[test]
fn data_that_vanishes_where_pings_pass_sends_the_tunnel_back_to_the_relay() {
    let mut world = direct_world(11, [easy(), easy()]);
    let peer = world.gateways[1].node_key;
    let since = world.now;
    world.run_for(Duration::from_secs(11));
    world.unanswered_data(0, peer, since);
    assert!(world.is_direct(0, 1), "WireGuard may be silent for so long");
    world.run_for(Duration::from_secs(2));
    world.unanswered_data(0, peer, since);
    assert_eq!(world.gateways[0].routes.last().unwrap().2, Why::DataLost);
    world.run_for(Duration::from_secs(55));
    assert!(!world.is_direct(0, 1), "pings still pass, and are not believed");
    world.run_for(Duration::from_secs(40));
    assert!(world.is_direct(0, 1), "after a minute the path has another chance");
}

#[test]
fn data_that_the_peer_does_not_report_is_missed_within_seconds() {
    // Who talks, and in which direction data vanishes.
    for (listens, cut) in [(None, (0, 1)), (None, (1, 0)), (Some(1), (0, 1))] {
        let mut world = direct_world(11, [easy(), easy()]);
        listens.into_iter().for_each(|at| world.gateways[at].listens_only = true);
        world.run_for(Duration::from_secs(30));
        assert!(world.both_direct());
        world.data_cut = vec![cut];
        let left = world.run_until(Duration::from_secs(20), |world| !world.is_direct(cut.0, cut.1));
        assert!(left.is_some_and(|left| left < Duration::from_secs(7)), "{left:?}");
        assert_eq!(world.gateways[cut.0].routes.last().unwrap().2, Why::DataLost);
    }
}

#[test]
fn one_who_only_listens_is_no_hole() {
    let mut world = direct_world(11, [easy(), easy()]);
    world.gateways[1].listens_only = true;
    world.loss = 0.02;
    let before = world.gateways.iter().map(|gateway| gateway.routes.len()).collect::<Vec<_>>();
    world.run_for(Duration::from_secs(300));
    let after = world.gateways.iter().map(|gateway| gateway.routes.len()).collect::<Vec<_>>();
    assert_eq!(before, after);
}

#[test]
fn a_nat_that_forgets_costs_one_ping_and_one_question() {
    // What another address outside does, too, where both are behind NATs that keep strangers out:
    // only the relay can tell the other side.
    for seed in 0..20 {
        let mut world = direct_world(seed, [easy(), easy()]);
        world.run_for(Duration::from_millis(37 * seed));
        let routes = world.gateways[0].routes.len();
        world.watch_gaps();
        world.nats()[0].flush();
        world.run_for(Duration::from_secs(5));
        // A heartbeat, patience, a round trip to STUN servers, the relay's way, two packets' distance.
        let gap = world.gap(0, 1);
        assert!(gap < Duration::from_millis(650), "seed {seed}: {gap:?}");
        assert!(world.both_direct());
        assert_eq!(world.gateways[0].routes.len(), routes + 2, "to the relay and back");
    }
}

#[test]
fn another_network_under_the_gateway_is_another_path() {
    let mut world = direct_world(12, [easy(), Front::Open]);
    let filtering = Filtering::AddressAndPortDependent;
    let nat = Nat::new(Mapping::EndpointIndependent, filtering, "192.0.2.99", None);
    let nat = world.add_nat(nat);
    world.move_leg(0, 0, Leg::new("172.16.0.2:51820", Some(nat), Duration::from_millis(10)));
    world.roamed(0);
    let back = |world: &World| {
        let there = "192.0.2.99".parse::<std::net::IpAddr>().unwrap();
        let route = world.route(1, 0);
        let moved = matches!(route, Route::Direct { pair, .. } if pair.remote.ip() == there);
        moved && world.is_direct(0, 1)
    };
    let time = world.run_until(Duration::from_secs(5), back).unwrap();
    assert!(time < Duration::from_secs(5), "{time:?}");
}

/// Two open gateways, 50 ms there and back by IPv4, with IPv6 at this round trip.
fn dual_stack(seed: u64, ipv6_rtt_ms: u64) -> World {
    let mut world = world(seed, [Front::Open, Front::Open]);
    for (at, address) in ["[2001:db8::1]:51820", "[2001:db8::2]:51820"].into_iter().enumerate() {
        world.add_leg(at, Leg::new(address, None, Duration::from_millis(ipv6_rtt_ms) / 4));
    }
    world
}

fn uses_ipv6(world: &World, from: usize) -> bool {
    let route = world.route(from, 1 - from);
    matches!(route, Route::Direct { pair, .. } if pair.remote.is_ipv6())
}

#[test]
fn the_faster_family_wins_ipv6_wins_ties_and_nobody_goes_back_and_forth() {
    for seed in 0..10 {
        for (ipv6_rtt_ms, ipv6) in [(20, true), (50, true), (65, false), (200, false)] {
            let mut world = dual_stack(seed, ipv6_rtt_ms);
            world.start();
            world.run_for(Duration::from_secs(300));
            for at in [0, 1] {
                assert_eq!(uses_ipv6(&world, at), ipv6, "{ipv6_rtt_ms} ms, seed {seed}");
                let routes = &world.gateways[at].routes;
                assert!(routes.len() <= 3, "{ipv6_rtt_ms} ms, seed {seed}: {routes:?}");
            }
        }
    }
}

#[test]
fn a_better_path_that_comes_later_is_taken() {
    let mut world = direct_world(13, [Front::Open, Front::Open]);
    for at in [0, 1] {
        let address = ["[2001:db8::1]:51820", "[2001:db8::2]:51820"][at];
        world.add_leg(at, Leg::new(address, None, Duration::from_millis(5)));
        world.tell_network(at, false);
    }
    let both = |world: &World| uses_ipv6(world, 0) && uses_ipv6(world, 1);
    let time = world.run_until(Duration::from_secs(60), both).unwrap();
    assert!(time < Duration::from_secs(10), "{time:?}");
}

#[test]
fn another_path_that_stands_by_takes_over_without_the_relay() {
    let mut world = dual_stack(14, 40);
    world.start();
    world.run_for(Duration::from_secs(30));
    assert!(uses_ipv6(&world, 0));
    world.cut_sockets = vec!["[2001:db8::1]:51820".parse().unwrap()];
    world.run_for(Duration::from_millis(1500));
    for at in [0, 1] {
        let (_, route, why) = *world.gateways[at].routes.last().unwrap();
        assert!(matches!(route, Route::Direct { pair, .. } if pair.remote.is_ipv4()), "{route:?}");
        assert_eq!(why, Why::Dead);
    }
}

#[test]
fn an_uplink_that_goes_away_takes_its_paths_with_it_at_once() {
    let mut world = dual_stack(15, 40);
    world.start();
    world.run_for(Duration::from_secs(30));
    assert!(uses_ipv6(&world, 0));
    world.remove_leg(0);
    world.tell_network(0, false);
    assert!(world.is_direct(0, 1) && !uses_ipv6(&world, 0));
}

#[test]
fn a_control_process_that_starts_again_takes_over_the_path_in_use() {
    for clock_back in [false, true] {
        let mut world = direct_world(16, [easy(), easy()]);
        let routes = world.gateways.iter().map(|gateway| gateway.routes.clone());
        let routes = routes.collect::<Vec<_>>();
        world.restart(0, clock_back);
        world.run_for(Duration::from_secs(60));
        // Nobody's tunnel moved.
        for (gateway, mut routes) in world.gateways.iter().zip(routes) {
            let mut after = gateway.routes.clone();
            // The new process says how long frames may be once it knows.
            after.retain(|(_, _, why)| *why != Why::FrameLen);
            routes.retain(|(_, _, why)| *why != Why::FrameLen);
            assert_eq!(after, routes);
        }
        let replayed = world.gateways[1].finder.refused();
        let replayed = replayed.filter(|(name, count)| *name == "introduce_replayed" && *count > 0);
        assert_eq!(replayed.count() > 0, clock_back, "the clock was seen, and did not matter");
    }
}

#[test]
fn a_path_taken_over_that_is_dead_is_left() {
    let mut world = direct_world(17, [easy(), easy()]);
    world.cut = vec![(0, 1), (1, 0)];
    world.restart(0, false);
    world.run_for(Duration::from_secs(2));
    assert!(!world.is_direct(0, 1) && !world.is_direct(1, 0));
}

/// Whatever happens to two gateways that can meet, soon after they meet again, and stay.
#[test]
fn random_troubles_are_survived() {
    use rand::{Rng, SeedableRng};
    for seed in seeds(60) {
        let mut dice = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut world = world(seed, [easy(), [easy(), Front::Firewall][seed as usize % 2]]);
        world.start();
        let mut log = Vec::new();
        for _ in 0..4 {
            world.run_for(Duration::from_millis(dice.random_range(0..30_000)));
            let at = dice.random_range(0..2);
            let trouble = dice.random_range(0..6);
            let lasting = Duration::from_millis(dice.random_range(100..20_000));
            log.push((world.now, trouble, at, lasting));
            match trouble {
                0 => world.nats().iter_mut().for_each(Nat::flush),
                1 => world.cut = vec![(0, 1), (1, 0)],
                2 => world.cut = vec![(at, 1 - at)],
                3 => world.gateways[at].relay_up = false,
                4 => world.restart(at, dice.random_bool(0.5)),
                _ => world.gateways[at].busy = false,
            }
            world.run_for(lasting);
            world.cut.clear();
            for gateway in &mut world.gateways {
                (gateway.relay_up, gateway.busy) = (true, true);
            }
        }
        let case = format!("MILLRACE_SEED={seed}: {log:?}");
        // The last trouble may not have been noticed yet.
        world.run_for(Duration::from_secs(2));
        let back = world.run_until(Duration::from_secs(65), World::both_direct);
        let all: Vec<_> = world.gateways.iter().map(|it| &it.routes).collect();
        assert!(back.is_some(), "{case}: {all:#?}");
        world.run_for(Duration::from_secs(5));
        let routes = |world: &World| world.gateways.iter().map(|it| it.routes.len()).sum::<usize>();
        let before = routes(&world);
        world.run_for(Duration::from_secs(120));
        let all: Vec<_> = world.gateways.iter().map(|it| &it.routes).collect();
        assert!(world.both_direct(), "{case}: {all:#?}");
        let all: Vec<_> = world.gateways.iter().map(|it| &it.routes).collect();
        assert_eq!(routes(&world), before, "{case}: {all:#?}");
    }
}

/// The seeds to run: one that was printed, or as many as asked for.
fn seeds(usual: u64) -> std::ops::Range<u64> {
    let variable = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    match variable("MILLRACE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("MILLRACE_WORLDS").unwrap_or(usual),
    }
}

/// Random pairs of NATs, distances, losses, time-outs: what can meet meets and stays.
#[test]
fn random_worlds_converge_and_do_not_flap() {
    use rand::{Rng, SeedableRng};
    for seed in seeds(100) {
        let mut dice = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let fronts = [0; 2].map(|_| Front::ALL[dice.random_range(0..Front::ALL.len())]);
        let mut world = world(seed, fronts);
        world.loss = dice.random_range(0.0..0.03);
        world.relay_latency = Duration::from_millis(dice.random_range(5..150));
        for gateway in &mut world.gateways {
            gateway.legs[0].latency = Duration::from_millis(dice.random_range(1..60));
        }
        for nat in world.nats() {
            nat.timeout = Duration::from_secs(dice.random_range(10..300));
        }
        let case = format!("MILLRACE_SEED={seed}: {fronts:?}, loss {:.3}", world.loss);
        world.start();
        let direct = world.run_until(Duration::from_secs(40), World::both_direct);
        assert_eq!(direct.is_some(), fronts[0].meets(fronts[1]), "{case}: {direct:?}");
        world.run_for(Duration::from_secs(300));
        for gateway in &world.gateways {
            // The relay first, a path, perhaps a better one soon after; loss alone moves nothing.
            assert!(gateway.routes.len() <= 3, "{case}: {:?}", gateway.routes);
            let per_second = gateway.probes_sent as f64 / 340.0;
            assert!(per_second < 16.0, "{case}: {per_second} datagrams a second");
        }
    }
}
