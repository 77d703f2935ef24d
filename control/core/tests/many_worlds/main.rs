//! Thousands of worlds, each drawn from one number: places behind NATs in NATs, distances, losses,
//! and troubles one after another. What can meet must meet, stay, and lose nothing that it need not.
//!
//! `MILLRACE_WORLDS=n` runs n of them, `MILLRACE_SEED=n` runs one again and says what happens.
#![allow(clippy::unwrap_used, reason = "tests")]

mod places;
#[path = "../sim/mod.rs"]
mod sim;
mod troubles;

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use millrace_path::Why;
use millrace_path::limits::FULL_FRAME_AGAIN;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use places::Place;
use sim::World;
use sim::gateway::Gateway;
use sim::sabotage::Sabotage;
use troubles::TROUBLES;

/// Worlds that `cargo test` runs: they take half a minute on two cores.
const WORLDS: u64 = 3_000;

/// Until what can meet has met, at a loss of up to three percent: the searches of half a minute.
const MEET_LIMIT: Duration = Duration::from_secs(70);

#[test]
fn whatever_happens_who_can_meet_meets_and_nothing_is_sent_that_must_not() {
    let variable = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let seeds = match variable("MILLRACE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("MILLRACE_WORLDS").unwrap_or(WORLDS),
    };
    let next = AtomicU64::new(seeds.start);
    let run = || {
        let mut seen = Seen::default();
        while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|n| *n < seeds.end)
        {
            let mut story = Story::new(seed);
            let failed = story.try_run().is_err();
            if failed || seeds.end - seeds.start == 1 {
                eprintln!("world {seed}: {}{}", story.told, story.routes());
            }
            seen.add(seed, &story, failed);
        }
        seen
    };
    let cores = thread::available_parallelism().map_or(1, Into::into);
    let seen = thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(Seen::default(), Seen::and)
    });
    println!("{:?}\ntime to direct: {}", seen.counts, seen.times_text());
    if let Some(seed) = seen.failed.first() {
        let command = "cargo test -p millrace-path --test many_worlds -- --nocapture";
        panic!("worlds {:?}; again: MILLRACE_SEED={seed} {command}", seen.failed);
    }
    // Each trouble happens, and both ends are reached, or the worlds show little.
    let worlds = seeds.end - seeds.start;
    let enough = |count: u64| count >= worlds / 60;
    let kinds = TROUBLES.len() + 2;
    assert!(worlds < 500 || seen.counts.len() == kinds && seen.counts.into_values().all(enough));
}

/// A check that cannot fail checks nothing: each is shown something broken.
#[test]
fn every_check_finds_what_is_broken_on_purpose() {
    for (sabotage, says) in Sabotage::ALL {
        let found = (0..200).any(|seed| {
            let mut story = Story::new(seed);
            story.world.sabotage = Some(sabotage);
            story.only_trouble = Some("restart");
            story.troubles_max = usize::from(sabotage == Sabotage::PathForgotten);
            let Err(panic) = story.try_run() else { return false };
            let text = panic_text(&*panic);
            assert!(text.contains(says), "{sabotage:?}, world {seed}: {text}");
            println!("{sabotage:?}: world {seed}: {text}");
            true
        });
        assert!(found, "{sabotage:?} is not found");
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default()
}

/// What the worlds showed.
#[derive(Default)]
struct Seen {
    counts: BTreeMap<&'static str, u64>,
    /// From the start until both are there.
    times: Vec<Duration>,
    failed: Vec<u64>,
}

impl Seen {
    fn add(&mut self, seed: u64, story: &Story, failed: bool) {
        for name in story.troubles.iter().copied() {
            *self.counts.entry(name).or_default() += 1;
        }
        *self.counts.entry(if story.meets { "direct" } else { "relay" }).or_default() += 1;
        self.times.extend(story.met_in);
        self.failed.extend(failed.then_some(seed));
    }

    fn and(mut self, other: Self) -> Self {
        for (name, count) in other.counts {
            *self.counts.entry(name).or_default() += count;
        }
        self.times.extend(other.times);
        self.failed.extend(other.failed);
        self
    }

    fn times_text(&self) -> String {
        let mut times = self.times.clone();
        times.sort_unstable();
        let last = times.len().saturating_sub(1);
        let at = |percent: usize| times.get((times.len() * percent / 100).min(last));
        let text = [50, 90, 99, 100].map(|percent| format!("{percent} % in {:?}", at(percent)));
        text.join(", ")
    }
}

/// One world of two gateways and what happens in it.
struct Story {
    dice: ChaCha8Rng,
    world: World,
    /// The two have a path.
    meets: bool,
    lossless: bool,
    /// A STUN server tells the truth.
    stun: bool,
    /// What stands before each, where they have nothing in common.
    places: [Place; 2],
    apart: bool,
    /// Networks that somebody was in.
    visits: usize,
    only_trouble: Option<&'static str>,
    troubles_max: usize,
    /// From the start to direct paths of both.
    met_in: Option<Duration>,
    troubles: Vec<&'static str>,
    /// What was drawn, for people.
    told: String,
}

impl Story {
    fn new(seed: u64) -> Self {
        Self {
            dice: ChaCha8Rng::seed_from_u64(seed),
            world: World::new(seed),
            meets: false,
            lossless: true,
            stun: true,
            places: [Place::default(); 2],
            apart: false,
            visits: 0,
            only_trouble: None,
            troubles_max: usize::MAX,
            met_in: None,
            troubles: Vec::new(),
            told: String::new(),
        }
    }

    /// The world until something is wrong with it.
    fn try_run(&mut self) -> thread::Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.run()))
    }

    fn run(&mut self) {
        self.draw();
        self.world.start();
        self.met_in = self.meet("at the start");
        let quiet = Duration::from_secs(self.dice.random_range(5..60));
        self.world.run_for(quiet);
        for _ in 0..self.dice.random_range(0..4).min(self.troubles_max) {
            self.trouble();
        }
        // The last search may be on its way still.
        self.world.run_for(Duration::from_secs(20));
        if self.troubles.contains(&"narrow") {
            // And each path is asked once more for full frames.
            self.world.run_for(FULL_FRAME_AGAIN * 2);
        }
        self.stay();
        self.world.assert_held();
        assert_eq!(self.world.land(), 0, "a packet with its own source as destination");
    }

    fn tell(&mut self, what: &str) {
        self.told += &format!("\n  {:9.3} s {what}", self.world.now.as_nanos() as f64 / 1e9);
    }

    /// Every route of both, for people.
    fn routes(&self) -> String {
        let mut text = String::new();
        for (at, gateway) in self.world.gateways.iter().enumerate() {
            for (when, route, why) in &gateway.routes {
                let seconds = when.as_nanos() as f64 / 1e9;
                text += &format!("\n  {seconds:9.3} s gateway {at}: {why:?} {route:?}");
            }
            let peer = self.world.gateways[1 - at].node_key;
            let report = gateway.finder.report(self.world.now, peer).unwrap();
            let knows = report.candidates.iter().map(|candidate| candidate.address);
            let states = report.paths.iter().map(|path| (path.pair.remote, path.state));
            let (knows, states) = (knows.collect::<Vec<_>>(), states.collect::<Vec<_>>());
            let own = &gateway.seen.addresses;
            text += &format!("\n  gateway {at} is seen at {own:?}, knows {knows:?}: {states:?}");
        }
        text
    }

    /// The expected end is reached.
    fn meet(&mut self, when: &str) -> Option<Duration> {
        // Where data vanished nobody looks again for a minute, then for two.
        let holes = self.troubles.iter().filter(|name| name.contains("data cut")).count() as u32;
        let hole_time = Duration::from_secs(60) * (2_u32.pow(holes) - 1);
        // Who cannot meet has searched again by then.
        let limit = if self.meets { MEET_LIMIT + hole_time } else { Duration::from_secs(45) };
        let direct = self.world.run_until(limit, World::both_direct);
        assert_eq!(direct.is_some(), self.meets, "{when}");
        self.tell(&format!("{when}: {direct:?}"));
        direct
    }

    /// Nothing happens, and so nothing moves.
    fn stay(&mut self) {
        let state = |world: &World| {
            let gateways = world.gateways.iter();
            // Which frames a path carries may be found out again; it is the same path.
            let moves =
                |it: &Gateway| it.routes.iter().filter(|(_, _, why)| *why != Why::FrameLen).count();
            gateways.map(|it| (moves(it), it.probes_sent, it.relay_sent)).collect::<Vec<_>>()
        };
        // Now and then for longer than anything is remembered.
        let time = if self.dice.random_bool(0.2) { 400 } else { 120 };
        let before = state(&self.world);
        self.world.watch_gaps();
        self.world.run_for(Duration::from_secs(time));
        for (before, after) in before.into_iter().zip(state(&self.world)) {
            // A better path may be found once; loss alone moves nothing.
            assert!(after.0 - before.0 <= 1, "{} changes of a quiet path", after.0 - before.0);
            let probes = (after.1 - before.1) as f64 / time as f64;
            assert!(probes < 16.0, "{probes} datagrams a second");
            let signals = after.2 - before.2;
            assert!(signals <= time / 2, "{signals} messages through the relay");
        }
        assert_eq!(self.world.both_direct(), self.meets, "stays");
        if self.lossless {
            self.no_gap_above(Duration::from_millis(1_500), "quiet");
        }
    }

    /// Nobody who is spoken to waited longer than this since gaps are watched.
    fn no_gap_above(&self, limit: Duration, why: &str) {
        for (from, to) in [(0, 1), (1, 0)] {
            if !self.world.gateways[from].listens_only {
                let gap = self.world.gap(from, to);
                assert!(gap <= limit, "{why}: nothing from {from} to {to} for {gap:?}");
            }
        }
    }
}
