//! Loss, duplicates, reordering, restarts and any order of events. The world checks with every
//! datagram that no counter repeats and that nothing is readable (see `common`).
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::Duration;

use common::{A, B, World, millis, secs};
use proptest::prelude::*;

#[test]
fn initiations_that_cross_lose_nothing_and_end_in_one_session() {
    let mut splits = 0;
    for seed in 0..1000 {
        let mut world = World::pair(seed);
        world.introduce(B, A, None);
        world.wire.jitter = millis(seed % 50);
        world.send(A, B, 100);
        let gap = millis(seed % 37);
        world.run_for(gap);
        world.send(B, A, 100);
        world.run_for(secs(20));
        let initiations = world.sent(A, 1, 0).len() + world.sent(B, 1, 0).len();
        assert!(initiations <= 2, "seed {seed}: {initiations} initiations");
        for node in [A, B] {
            assert_eq!(world.nodes[node].inner.len(), 1, "seed {seed}: nothing is lost");
        }
        world.assert_connected();
        if !world.agrees() {
            // Each sends with a session of its own; the next handshake ends that.
            splits += 1;
            world.run_for(secs(92));
            for _ in 0..30 {
                world.send(A, B, 100);
                world.send(B, A, 100);
                world.run_for(secs(1));
            }
            let initiations = world.sent(A, 1, 0).len() + world.sent(B, 1, 0).len();
            assert_eq!(initiations, 3, "seed {seed}: one more, not two that cross again");
            assert!(world.agrees(), "seed {seed}: still split");
            for node in [A, B] {
                let drops: Vec<_> = world.nodes[node].drops.iter().filter(|d| d.1 > 0).collect();
                assert_eq!(world.nodes[node].inner.len(), 32, "seed {seed} node {node}: {drops:?}");
            }
        }
    }
    assert!(splits > 0, "the split that is tested here must occur");
}

#[test]
fn a_lost_response_costs_one_retry() {
    let mut world = World::pair(1);
    world.send(A, B, 100);
    world.run_until(secs(1), |world| !world.sent(A, 1, 0).is_empty());
    world.run_for(millis(5));
    world.wire.loss = 100;
    world.run_for(millis(10));
    assert_eq!(world.sent(B, 2, 0).len(), 1);
    world.wire.loss = 0;
    world.run_for(secs(6));
    assert_eq!(world.sent(B, 2, 0).len(), 2);
    assert_eq!(world.nodes[B].inner.len(), 1);
    world.assert_connected();
    assert!(world.nodes[B].up.len() <= 3);
}

#[test]
fn a_lost_confirmation_is_made_good_by_the_next_packet() {
    let mut world = World::pair(2);
    world.send(A, B, 100);
    world.run_until(secs(1), |world| !world.sent(B, 2, 0).is_empty());
    world.wire.loss = 100;
    world.run_for(millis(20));
    assert!(!world.sent(A, 4, 0).is_empty(), "the staged packet went and was lost");
    world.wire.loss = 0;
    world.send(B, A, 100);
    assert!(world.sent(B, 4, 0).is_empty());
    world.send(A, B, 100);
    world.run_for(secs(1));
    assert_eq!(world.nodes[A].inner.len(), 1);
    world.assert_connected();
}

#[test]
fn either_side_may_restart_at_any_age_of_the_session() {
    for node in [A, B] {
        for age in [1, 60, 119, 121, 170, 181, 600] {
            let mut world = World::connected(age);
            world.introduce(B, A, None);
            world.run_for(secs(age));
            let restarted = world.nodes[node].restarted(&mut world.rng);
            world.nodes[node] = restarted;
            world.introduce(A, B, None);
            world.introduce(B, A, None);
            world.send(node, 1 - node, 100);
            world.run_for(secs(7));
            assert_eq!(world.nodes[1 - node].inner.len(), 1, "{node} after {age} s");
            world.assert_connected();
        }
    }
}

/// The side that lost its keys hears from the other, cannot answer, and is found dead: 15 s.
#[test]
fn the_other_side_notices_a_restart_within_21_s() {
    let mut world = World::connected(3);
    let restarted = world.nodes[B].restarted(&mut world.rng);
    world.nodes[B] = restarted;
    world.introduce(B, A, None);
    world.run_for(secs(30));
    world.nodes[B].inner.clear();
    let start = world.now;
    while world.nodes[B].inner.is_empty() {
        world.send(A, B, 100);
        world.run_for(millis(500));
        assert!(world.now.since(start) < secs(21));
    }
    world.assert_connected();
}

const PRESHARED: Option<[u8; 32]> = Some([9; 32]);

#[derive(Clone, Debug)]
enum Step {
    Send {
        from: usize,
        count: usize,
    },
    Wait {
        millis: u64,
    },
    Weather {
        loss: u32,
        duplicates: u32,
        jitter_ms: u64,
    },
    Restart(usize),
    Load {
        node: usize,
        waiting: usize,
    },
    Wipe(usize),
    WallClock {
        node: usize,
        error_secs: i64,
    },
    /// Something that was on the wire comes again, perhaps changed.
    Replay {
        which: prop::sample::Index,
        flip: Option<prop::sample::Index>,
    },
    Move(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..2usize;
    prop_oneof![
        6 => (node.clone(), 1..20usize).prop_map(|(from, count)| Step::Send { from, count }),
        4 => prop_oneof![0..200u64, 0..30_000u64, 100_000..200_000u64]
            .prop_map(|millis| Step::Wait { millis }),
        2 => (0..60u32, 0..40u32, 0..3000u64).prop_map(|(loss, duplicates, jitter_ms)| {
            Step::Weather { loss, duplicates, jitter_ms }
        }),
        1 => node.clone().prop_map(Step::Restart),
        1 => (node.clone(), prop_oneof![Just(0), Just(512)])
            .prop_map(|(node, waiting)| Step::Load { node, waiting }),
        1 => node.clone().prop_map(Step::Wipe),
        1 => (node.clone(), -100_000..100_000i64)
            .prop_map(|(node, error_secs)| Step::WallClock { node, error_secs }),
        4 => (any::<prop::sample::Index>(), any::<Option<prop::sample::Index>>())
            .prop_map(|(which, flip)| Step::Replay { which, flip }),
        1 => node.prop_map(Step::Move),
    ]
}

fn carry_out(world: &mut World, step: &Step, moves: &mut u8) {
    match step {
        Step::Send { from, count } => {
            for len in 0..*count {
                world.send(*from, 1 - from, 60 + len * 67);
            }
        }
        Step::Wait { millis } => world.run_for(Duration::from_millis(*millis)),
        Step::Weather { loss, duplicates, jitter_ms } => {
            (world.wire.loss, world.wire.duplicates) = (*loss, *duplicates);
            world.wire.jitter = Duration::from_millis(*jitter_ms);
        }
        Step::Restart(node) => {
            let restarted = world.nodes[*node].restarted(&mut world.rng);
            world.nodes[*node] = restarted;
            world.introduce(A, B, PRESHARED);
            world.introduce(B, A, PRESHARED);
        }
        Step::Load { node, waiting } => world.nodes[*node].waiting = *waiting,
        Step::Wipe(node) => {
            let clock = world.clock(*node);
            world.nodes[*node].device.wipe_all(clock);
            world.drain(*node);
        }
        Step::WallClock { node, error_secs } => world.nodes[*node].wall_error_secs = *error_secs,
        Step::Replay { which, flip } if !world.eve.is_empty() => {
            let mut datagram = world.eve[which.index(world.eve.len())].clone();
            if let Some(flip) = flip {
                let bit = flip.index(datagram.bytes.len() * 8);
                datagram.bytes[bit / 8] ^= 1 << (bit % 8);
            }
            world.inject(&datagram);
        }
        Step::Replay { .. } => {}
        Step::Move(node) => {
            *moves = moves.wrapping_add(1);
            world.nodes[*node].address = ([198, 51, 100, *moves], 4000 + *node as u16).into();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_it_heals(seed: u64, steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::pair(seed);
        world.introduce(B, A, PRESHARED);
        world.introduce(A, B, PRESHARED);
        let mut moves = 0;
        for step in &steps {
            carry_out(&mut world, step, &mut moves);
        }
        // The weather clears; both know where the other is.
        world.wire = common::Wire {
            latency: millis(10), jitter: Duration::ZERO, loss: 0, duplicates: 0,
        };
        // What is still under way from an old address would move its sender back there.
        world.run_for(secs(5));
        for node in [A, B] {
            world.nodes[node].waiting = 0;
            world.peer(node, 1 - node).roam(common::endpoint(world.nodes[1 - node].address));
        }
        // Long enough for a dead peer to be noticed and a handshake to follow.
        for _ in 0..60 {
            world.send(A, B, 100);
            world.send(B, A, 100);
            world.run_for(millis(700));
        }
        world.assert_carries();
        for node in &world.nodes {
            prop_assert!(node.up.len() <= 3);
        }
        // And in the end nothing is left.
        world.run_for(secs(700));
        prop_assert!(world.nodes.iter().all(|node| node.up.is_empty()));
        prop_assert!(world.nodes.iter().all(|node| node.device.poll_timeout().is_none()));
    }
}
