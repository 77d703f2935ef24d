//! Thousands of worlds, each drawn from one number: places behind NATs in NATs, distances, losses,
//! and troubles one after another. What can meet must meet, stay, and lose nothing that it need not.
//!
//! `MILLRACE_WORLDS=n` runs n of them, `MILLRACE_SEED=n` runs one again and says what happens.
#![allow(clippy::unwrap_used, reason = "tests")]

mod sim;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use millrace_path::candidate::{Candidate, CandidateKind};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sim::World;
use sim::front::Front;
use sim::gateway::Leg;
use sim::nat::{Filtering, Mapping, Nat};

/// Worlds that `cargo test` runs: they take half a minute on one core.
const WORLDS: u64 = 1_000;

/// Until what can meet has met, at a loss of up to three percent: the searches of half a minute.
const MEET_LIMIT: Duration = Duration::from_secs(70);

#[test]
fn whatever_happens_who_can_meet_meets_and_nothing_is_sent_that_must_not() {
    let variable = |name| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let seeds = match variable("MILLRACE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("MILLRACE_WORLDS").unwrap_or(WORLDS),
    };
    let (mut seen, mut failed) = (BTreeMap::<&str, u64>::new(), Vec::new());
    for seed in seeds.clone() {
        let mut story = Story::new(seed);
        if catch_unwind(AssertUnwindSafe(|| story.run())).is_err() {
            failed.push(seed);
            eprintln!("MILLRACE_SEED={seed}: {}{}", story.told, story.routes());
        }
        for name in story.troubles {
            *seen.entry(name).or_default() += 1;
        }
        *seen.entry(if story.meets { "direct" } else { "relay" }).or_default() += 1;
    }
    println!("{seen:?}");
    assert!(failed.is_empty(), "MILLRACE_SEED= any of {failed:?}");
    // Each trouble happens, and both ends are reached, or the worlds show little.
    let enough = |count: u64| count >= (seeds.end - seeds.start) / 50;
    assert!(seeds.end - seeds.start < 500 || seen.len() == 17 && seen.into_values().all(enough));
}

/// One world of two gateways and what happens in it.
struct Story {
    dice: ChaCha8Rng,
    world: World,
    /// The two have a path.
    meets: bool,
    lossless: bool,
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
            troubles: Vec::new(),
            told: String::new(),
        }
    }

    fn run(&mut self) {
        self.draw();
        self.world.start();
        self.meet("at the start");
        let quiet = Duration::from_secs(self.dice.random_range(5..60));
        self.world.run_for(quiet);
        for _ in 0..self.dice.random_range(0..4) {
            self.trouble();
        }
        // The last search may be on its way still.
        self.world.run_for(Duration::from_secs(20));
        self.stay();
        self.world.assert_held();
        assert_eq!(self.world.land(), 0, "a packet with its own source as destination");
    }

    fn tell(&mut self, what: &str) {
        self.told += &format!("\n  {:9.3} s {what}", self.world.now.as_nanos() as f64 / 1e9);
    }

    /// Places, distances and losses.
    fn draw(&mut self) {
        match self.dice.random_range(0..10) {
            0 => self.draw_one_network(),
            1 | 2 => self.draw_one_carrier(),
            _ => self.draw_apart(),
        }
        if self.dice.random_bool(0.3) {
            self.draw_ipv6();
        }
        let dice = &mut self.dice;
        self.lossless = dice.random_bool(0.5);
        if !self.lossless {
            self.world.loss = dice.random_range(0.0..0.03);
            self.world.relay_loss = dice.random_range(0.0..0.03);
        }
        self.world.relay_latency = Duration::from_millis(dice.random_range(5..150));
        let listener = dice.random_bool(0.2).then(|| dice.random_range(0..2));
        let one_listens = listener.is_some();
        for nat in self.world.nats() {
            // Who listens only sends every ten seconds where its control process is away.
            nat.timeout =
                Duration::from_secs(dice.random_range(if one_listens { 15..300 } else { 10..300 }));
            nat.refreshed_inwards = dice.random_bool(0.5);
            nat.keeps_ports = dice.random_bool(0.5);
        }
        for (at, gateway) in self.world.gateways.iter_mut().enumerate() {
            for leg in &mut gateway.legs {
                leg.latency = Duration::from_millis(dice.random_range(1..60));
            }
            gateway.listens_only = listener == Some(at);
            if dice.random_bool(0.2) {
                let kind = CandidateKind::Interface;
                for address in ["127.0.0.1:51820", "10.99.0.1:51820", "224.0.0.1:51820"] {
                    gateway.bogus.push(Candidate { kind, address: address.parse().unwrap() });
                }
            }
        }
        let what = format!(
            "loss {:.3} and {:.3}, relay {:?}",
            self.world.loss, self.world.relay_loss, self.world.relay_latency
        );
        self.tell(&what);
    }

    fn draw_front(&mut self) -> Front {
        if self.dice.random_bool(0.05) {
            return Front::Blocked;
        }
        if self.dice.random_bool(0.1) {
            return Front::Nat(Mapping::Linux, Filtering::AddressAndPortDependent);
        }
        Front::ALL[self.dice.random_range(0..Front::ALL.len())]
    }

    /// Adds the NAT of a front, and says where its inside is.
    fn add_front(&mut self, front: Front, public: &str, outer: Option<usize>) -> Option<usize> {
        let (mapping, filtering) = match front {
            Front::Open | Front::Blocked => return outer,
            Front::Firewall => (Mapping::None, Filtering::AddressAndPortDependent),
            Front::Nat(mapping, filtering) => (mapping, filtering),
        };
        Some(self.world.add_nat(Nat::new(mapping, filtering, public, outer)))
    }

    /// Two places with nothing in common, one of them perhaps behind two NATs.
    fn draw_apart(&mut self) {
        let mut fronts = [Front::Open; 2];
        for at in [0, 1] {
            let public = ["192.0.2.1", "203.0.113.1"][at];
            let mut front = self.draw_front();
            let segment = self.add_front(front, public, None);
            let mut socket = format!("{public}:51820");
            let mut inside = segment;
            if matches!(front, Front::Nat(..)) {
                // Everybody has the same router at home, with the same addresses.
                socket = ["192.168.1.2:51820", "192.168.1.3:51820"][self.dice.random_range(0..2)]
                    .to_owned();
                if self.dice.random_bool(0.2) {
                    let home = self.draw_front();
                    if let Front::Nat(..) = home {
                        inside = self.add_front(home, "100.64.0.5", segment);
                        front = front.around(home);
                    }
                }
            }
            let gateway = self.world.add_gateway(&socket, inside, 1);
            self.world.gateways[gateway].legs[0].blocked = front == Front::Blocked;
            if let (true, Some(nat), Front::Nat(..)) =
                (inside == segment && self.dice.random_bool(0.1), inside, front)
            {
                self.world.nats()[nat].forwards.insert(51_820, socket.parse().unwrap());
                front = Front::Open;
            }
            fronts[at] = front;
        }
        self.meets = fronts[0].meets(fronts[1]);
        self.tell(&format!("apart: {fronts:?}"));
    }

    fn draw_one_network(&mut self) {
        let front = self.draw_front();
        let front = if front == Front::Firewall { Front::Open } else { front };
        let segment = self.add_front(front, "192.0.2.1", None);
        let ports = [51_820, [51_820, 51_821][self.dice.random_range(0..2)]];
        for at in [0, 1] {
            let socket = match segment {
                None => format!("192.0.2.{}:{}", at + 1, ports[at]),
                _ => format!("192.168.1.{}:{}", at + 2, ports[at]),
            };
            self.world.add_gateway(&socket, segment, 1);
        }
        self.meets = true;
        self.tell(&format!("on one network behind {front:?}"));
    }

    /// Two homes behind one NAT of a carrier.
    fn draw_one_carrier(&mut self) {
        use Mapping::{AddressAndPortDependent, EndpointIndependent};
        let mapping = [EndpointIndependent, AddressAndPortDependent][self.dice.random_range(0..2)];
        let carrier = Front::Nat(mapping, Filtering::AddressAndPortDependent);
        let outer = self.add_front(carrier, "192.0.2.1", None);
        let hairpin = self.dice.random_bool(0.5);
        self.world.nats()[0].hairpin = hairpin;
        let mut fronts = [Front::Open; 2];
        let mut forward = false;
        for at in [0, 1] {
            let home = Front::ALL[self.dice.random_range(2..Front::ALL.len())];
            let segment = self.add_front(home, ["100.64.0.11", "100.64.0.12"][at], outer);
            let socket = ["192.168.1.2:51820", "192.168.1.3:51820"][self.dice.random_range(0..2)];
            self.world.add_gateway(socket, segment, 1);
            if self.dice.random_bool(0.2) {
                self.world.nats()[at + 1].forwards.insert(51_820, socket.parse().unwrap());
                forward = true;
            }
            fronts[at] = carrier.around(home);
        }
        self.meets = forward || (hairpin && fronts[0].meets(fronts[1]));
        self.tell(&format!("one carrier, hairpin {hairpin}, forward {forward}: {fronts:?}"));
    }

    fn draw_ipv6(&mut self) {
        let mut blocked = false;
        for at in [0, 1] {
            let address = ["2001:db8:1::1", "2001:db8:2::1"][at];
            let front =
                [Front::Open, Front::Firewall, Front::Blocked][self.dice.random_range(0..3)];
            let segment = self.add_front(front, address, None);
            let mut leg = Leg::new(&format!("[{address}]:51820"), segment, Duration::ZERO);
            leg.blocked = front == Front::Blocked;
            blocked |= leg.blocked;
            self.world.add_leg(at, leg);
        }
        self.meets |= !blocked;
        self.tell(&format!("IPv6, blocked: {blocked}"));
    }

    /// Every route of both, for people.
    fn routes(&self) -> String {
        let mut text = String::new();
        for (at, gateway) in self.world.gateways.iter().enumerate() {
            for (when, route, why) in &gateway.routes {
                let seconds = when.as_nanos() as f64 / 1e9;
                text += &format!("\n  {seconds:9.3} s gateway {at}: {why:?} {route:?}");
            }
        }
        text
    }

    /// The expected end is reached.
    fn meet(&mut self, when: &str) {
        // Where data vanished nobody looks again for a minute, then for two.
        let holes = self.troubles.iter().filter(|name| name.contains("data cut")).count() as u32;
        let hole_time = Duration::from_secs(60) * (2_u32.pow(holes) - 1);
        let direct = self.world.run_until(MEET_LIMIT + hole_time, World::both_direct);
        assert_eq!(direct.is_some(), self.meets, "{when}");
        self.tell(&format!("{when}: {direct:?}"));
    }

    /// Nothing happens, and so nothing moves.
    fn stay(&mut self) {
        let state = |world: &World| {
            let gateways = world.gateways.iter();
            gateways.map(|it| (it.routes.len(), it.probes_sent, it.relay_sent)).collect::<Vec<_>>()
        };
        let (before, time) = (state(&self.world), 300);
        self.world.watch_gaps();
        self.world.run_for(Duration::from_secs(time));
        assert_eq!(self.world.both_direct(), self.meets, "stays");
        for (before, after) in before.into_iter().zip(state(&self.world)) {
            // A better path may be found once; loss alone moves nothing.
            assert!(after.0 - before.0 <= 1, "{} changes of a quiet path", after.0 - before.0);
            let probes = (after.1 - before.1) as f64 / time as f64;
            assert!(probes < 12.0, "{probes} datagrams a second");
            let signals = after.2 - before.2;
            assert!(signals <= 120, "{signals} messages through the relay");
        }
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

    fn trouble(&mut self) {
        type Trouble = (&'static str, fn(&mut Story));
        const TROUBLES: [Trouble; 15] = [
            ("NATs forget", Story::nats_forget),
            ("cut", Story::cut),
            ("one-way cut", Story::one_way_cut),
            ("data cut", Story::data_cut),
            ("one-way data cut", Story::one_way_data_cut),
            ("narrow", Story::narrow),
            ("relay lost", Story::relay_lost),
            ("relay moved", Story::relay_moved),
            ("relay deaf", Story::relay_deaf),
            ("restart", Story::restart),
            ("both restart", Story::both_restart),
            ("restart without relay", Story::restart_without_relay),
            ("control away", Story::control_away),
            ("idle", Story::idle),
            ("burst of loss", Story::burst),
        ];
        let (name, trouble) = TROUBLES[self.dice.random_range(0..TROUBLES.len())];
        self.tell(name);
        self.troubles.push(name);
        trouble(self);
        self.meet(&format!("after {name}"));
        let pause = Duration::from_millis(self.dice.random_range(0..60_000));
        self.world.run_for(pause);
    }

    fn draw_time(&mut self) -> Duration {
        Duration::from_millis(self.dice.random_range(100..40_000))
    }

    fn draw_side(&mut self) -> usize {
        self.dice.random_range(0..2)
    }

    /// Lets the trouble last; while the relay works, the tunnel must go on after `limit`.
    fn last(&mut self, time: Duration, limit: Duration) {
        self.world.watch_gaps();
        self.world.run_for(time);
        if self.lossless {
            // One interval of data, the way of a relay, and the jitter of both.
            let slack = self.world.data_interval * 2 + self.world.relay_latency * 2;
            self.no_gap_above(limit + slack, "in trouble");
        }
    }

    fn nats_forget(&mut self) {
        self.world.nats().iter_mut().for_each(Nat::flush);
        self.last(Duration::from_secs(10), Duration::from_millis(1_500));
    }

    fn cut(&mut self) {
        self.world.cut = vec![(0, 1), (1, 0)];
        let time = self.draw_time();
        self.last(time, Duration::from_millis(1_500));
        self.world.cut.clear();
    }

    fn one_way_cut(&mut self) {
        let side = self.draw_side();
        self.world.cut = vec![(side, 1 - side)];
        let time = self.draw_time();
        self.last(time, Duration::from_millis(1_500));
        self.world.cut.clear();
    }

    fn data_cut(&mut self) {
        self.world.data_cut = vec![(0, 1), (1, 0)];
        let time = self.draw_time();
        let limit = self.data_lost_limit();
        self.last(time, limit);
        self.world.data_cut.clear();
    }

    /// Until lost data is noticed on two paths: a silence each, or several where only keepalives
    /// answer; and then by the other side, which hears no pings any more.
    fn data_lost_limit(&self) -> Duration {
        let gateways = &self.world.gateways;
        let silence = if gateways.iter().any(|it| it.listens_only) { 50 } else { 13 };
        Duration::from_secs(silence + 2) * 2
    }

    fn one_way_data_cut(&mut self) {
        let side = self.draw_side();
        self.world.data_cut = vec![(side, 1 - side)];
        let time = self.draw_time();
        let limit = self.data_lost_limit();
        self.last(time, limit);
        self.world.data_cut.clear();
    }

    /// Long frames are dropped; what the data plane sends follows the length that was proven.
    fn narrow(&mut self) {
        let len = self.dice.random_range(1_100..1_460);
        let side = self.draw_side();
        let set = |world: &mut World, len| {
            world.gateways[side].legs.iter_mut().for_each(|leg| leg.frame_len_max = len);
        };
        set(&mut self.world, len);
        let time = self.draw_time();
        self.last(time, Duration::from_secs(11));
        set(&mut self.world, 1472);
    }

    fn relay_lost(&mut self) {
        let side = self.draw_side();
        self.world.gateways[side].relay_up = false;
        let time = self.draw_time();
        self.world.run_for(time);
        self.world.gateways[side].relay_up = true;
    }

    /// The relay dies, and both move to another, one after the other.
    fn relay_moved(&mut self) {
        let (from, to) = if self.world.gateways[0].home == 1 { (1, 2) } else { (2, 1) };
        self.world.relays_up.remove(&from);
        for side in [0, 1] {
            let time = Duration::from_millis(self.dice.random_range(0..5_000));
            self.world.run_for(time);
            self.world.move_home(side, to);
        }
        self.world.relays_up.insert(from);
        // Once each knows where the other is now.
        self.world.run_for(Duration::from_secs(35));
        self.last(Duration::from_secs(5), Duration::from_millis(1_500));
    }

    /// One side's relay takes everything and delivers nothing, until that side moves.
    fn relay_deaf(&mut self) {
        let side = self.draw_side();
        self.world.relay_deaf.insert(side);
        self.world.run_for(Duration::from_secs(15));
        let home = 3 - self.world.gateways[side].home;
        self.world.relay_deaf.clear();
        self.world.move_home(side, home);
        self.world.run_for(Duration::from_secs(35));
        self.last(Duration::from_secs(5), Duration::from_millis(1_500));
        let home = 3 - home;
        self.world.move_home(side, home);
    }

    fn restart(&mut self) {
        let (side, back) = (self.draw_side(), self.dice.random_bool(0.5));
        self.world.restart(side, back);
        self.last(Duration::from_secs(20), Duration::from_millis(1_500));
    }

    fn both_restart(&mut self) {
        for side in [0, 1] {
            let (back, pause) = (self.dice.random_bool(0.5), self.dice.random_range(0..2_000));
            self.world.restart(side, back);
            self.last(Duration::from_millis(pause), Duration::from_millis(1_500));
        }
        self.last(Duration::from_secs(20), Duration::from_millis(1_500));
    }

    /// A path in use lives through a restart that nobody can be told of.
    fn restart_without_relay(&mut self) {
        let direct = self.world.both_direct();
        self.world.relays_up.clear();
        let side = self.draw_side();
        self.world.restart(side, false);
        // One who says nothing for ten seconds looks dead, then.
        if direct && self.world.gateways.iter().all(|gateway| !gateway.listens_only) {
            self.last(Duration::from_secs(20), Duration::from_millis(1_500));
        }
        self.world.relays_up = [1, 2].into();
    }

    /// No control process on one side: the tunnel goes on, directly.
    fn control_away(&mut self) {
        let (side, direct) = (self.draw_side(), self.world.both_direct());
        let back = self.dice.random_bool(0.5);
        self.world.kill(side);
        let time = self.draw_time();
        if direct {
            self.last(time, Duration::from_millis(500));
        }
        self.world.restart(side, back);
        if direct {
            self.last(Duration::from_secs(20), Duration::from_millis(1_500));
        }
    }

    fn idle(&mut self) {
        let set = |world: &mut World, busy| {
            world.gateways.iter_mut().for_each(|gateway| gateway.busy = busy);
        };
        set(&mut self.world, false);
        let time = Duration::from_secs(self.dice.random_range(1..200));
        self.world.run_for(time);
        set(&mut self.world, true);
        self.last(Duration::from_secs(5), Duration::from_millis(1_500));
    }

    fn burst(&mut self) {
        let before = self.world.loss;
        self.world.loss = 0.5;
        self.world.run_for(Duration::from_millis(700));
        self.world.loss = before;
    }
}
