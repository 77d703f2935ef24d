//! What happens to two gateways, and what their tunnel must live through.

use std::time::Duration;

use millrace_path::Route;
use millrace_path::limits::{DATA_SILENCE_MAX, STUN_INTERVAL};
use rand::Rng;

use super::Story;
use crate::sim::World;
use crate::sim::nat::{Mapping, Nat};

type Trouble = (&'static str, fn(&mut Story));

pub(super) const TROUBLES: [Trouble; 21] = [
    ("NATs forget", Story::nats_forget),
    ("NATs forget sooner", Story::nats_forget_sooner),
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
    ("roaming", Story::roaming),
    ("roaming unseen", Story::roaming_unseen),
    ("both roam", Story::both_roam),
    ("STUN lost", Story::stun_lost),
    ("STUN lies", Story::stun_lies),
];

impl Story {
    pub(super) fn trouble(&mut self) {
        let mut at = self.dice.random_range(0..TROUBLES.len());
        if let Some(only) = self.only_trouble {
            at = TROUBLES.iter().position(|(name, _)| *name == only).unwrap();
        }
        let (name, trouble) = TROUBLES[at];
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
            let overtaken = Duration::from_millis(120).mul_f64(self.world.jitter);
            self.no_gap_above(limit + slack + overtaken, "in trouble");
        }
    }

    fn nats_forget(&mut self) {
        self.world.nats().iter_mut().for_each(Nat::flush);
        self.last(Duration::from_secs(10), Duration::from_millis(1_500));
    }

    /// From now on NATs remember hardly longer than the shortest known.
    fn nats_forget_sooner(&mut self) {
        let least = if self.world.gateways.iter().any(|it| it.listens_only) { 15 } else { 10 };
        self.world.nats().iter_mut().for_each(|nat| nat.timeout = Duration::from_secs(least));
        self.last(Duration::from_secs(60), Duration::from_millis(500));
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
        // What was missed at the end is noticed a little later.
        self.world.run_for(Duration::from_secs(5));
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
        // What was missed at the end is noticed a little later.
        self.world.run_for(Duration::from_secs(5));
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
        // What is too narrow for any proof is left as data that has no answer.
        self.last(time, DATA_SILENCE_MAX);
        set(&mut self.world, 1472);
    }

    fn relay_lost(&mut self) {
        let side = self.draw_side();
        self.world.gateways[side].relay_up = false;
        let time = self.draw_time();
        self.world.run_for(time);
        self.world.relays_are_back();
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
        let proven = self.world.both_direct();
        let routes = |world: &World| world.gateways.iter().map(|it| it.routes.len()).sum();
        let before: usize = routes(&self.world);
        let sent = self.world.tunnel_counts();
        self.world.restart(side, back);
        self.last(Duration::from_secs(20), Duration::from_millis(1_500));
        if !proven || !self.lossless {
            return;
        }
        let moves =
            self.world.gateways.iter().flat_map(|it| &it.routes).filter(|(at, route, _)| {
                *at + Duration::from_secs(20) >= self.world.now && *route == Route::Relay
            });
        assert_eq!(moves.count(), 0, "moved by a restart: {} routes", routes(&self.world) - before);
        for (before, after) in sent.into_iter().zip(self.world.tunnel_counts()) {
            // What is on its way at one end of the time and not at the other.
            let lost = (after.0 - before.0).saturating_sub(after.1 - before.1);
            assert!(lost <= 3, "{lost} packets lost in a restart");
        }
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
        // On two paths, one for each way, who is away is not told from one whose path is dead.
        let direct = self.world.is_symmetric();
        self.world.relays_up.clear();
        let side = self.draw_side();
        self.world.restart(side, false);
        // One who says nothing for ten seconds looks dead, then.
        if direct && self.world.gateways.iter().all(|gateway| !gateway.listens_only) {
            self.last(Duration::from_secs(20), Duration::from_millis(1_500));
        }
        self.world.relays_are_back();
    }

    /// No control process on one side: the tunnel goes on, directly.
    fn control_away(&mut self) {
        // On two paths, one for each way, who is away is not told from one whose path is dead.
        let (side, direct) = (self.draw_side(), self.world.is_symmetric());
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

    /// One side, or both where they were in one network, is in another one at once, and notices.
    fn roaming(&mut self) {
        let sides = if self.apart { vec![self.draw_side()] } else { vec![0, 1] };
        self.roam(&sides, 0);
    }

    fn both_roam(&mut self) {
        self.roam(&[0, 1], 2_000);
    }

    fn roam(&mut self, sides: &[usize], unnoticed_ms: u64) {
        let mut away = Duration::ZERO;
        for &side in sides {
            self.move_out(side);
            let unnoticed = Duration::from_millis(self.dice.random_range(0..=unnoticed_ms));
            away += self.lose_relay(side, unnoticed);
            self.world.run_for(unnoticed);
            self.world.roamed(side);
        }
        self.apart = true;
        self.meets = self.would_meet();
        self.last(Duration::from_secs(10), Duration::from_millis(1_500) + away);
        if !self.stun && !self.meets {
            // An address that the other saw before may still lead to it.
            self.world.run_for(Duration::from_secs(45));
            self.meets = self.world.both_direct();
        }
    }

    /// The connection to the relay ends, and another stands after this time.
    fn lose_relay(&mut self, side: usize, least: Duration) -> Duration {
        let time = least + Duration::from_millis(self.dice.random_range(0..3_000));
        self.world.lose_relay(side, time);
        time
    }

    /// The router has another address outside and knows nothing of before; who is behind it learns
    /// so by what fails.
    fn roaming_unseen(&mut self) {
        let side = self.draw_side();
        let Some(outermost) = self.world.outermost_nat(side) else { return self.roaming() };
        self.visits += 1;
        let ip = format!("{}.{}", ["192.0.2", "203.0.113"][side], self.visits).parse().unwrap();
        if self.world.nats()[outermost].mapping == Mapping::None {
            return self.roaming();
        }
        self.world.renumber(outermost, ip);
        let away = [0, 1].map(|side| self.lose_relay(side, Duration::ZERO));
        self.last(Duration::from_secs(10), Duration::from_millis(1_500) + away[0] + away[1]);
        // As the daemon hears from the router, if it asked it for a port.
        (0..2).for_each(|side| self.world.tell_network(side, false));
    }

    /// No server answers for a while: what is proven stays.
    fn stun_lost(&mut self) {
        let before = self.world.stun.silent.clone();
        self.world.stun.silence_all();
        let time = Duration::from_secs(self.dice.random_range(10..150));
        self.last_unmoved(time);
        self.world.stun.silent = before;
        self.world.run_for(STUN_INTERVAL);
    }

    /// A server tells something else than what it sees: what is proven stays.
    fn stun_lies(&mut self) {
        let before = self.world.stun.lies.clone();
        let lies = ["198.18.7.7:4242", "10.1.2.3:51820", "127.0.0.1:51820", "[fd00::1]:51820"];
        let lie = lies[self.dice.random_range(0..lies.len())].parse().unwrap();
        let liar = self.dice.random_range(0..self.world.stun.servers.len());
        self.world.stun.lies.push((self.world.stun.servers[liar], lie));
        let time = Duration::from_secs(self.dice.random_range(10..100));
        self.last_unmoved(time);
        self.world.stun.lies = before;
        self.world.run_for(STUN_INTERVAL);
    }

    fn last_unmoved(&mut self, time: Duration) {
        let proven = self.world.both_direct();
        self.last(time, Duration::from_millis(500));
        assert!(!proven || self.world.both_direct(), "a proven path is left");
    }
}
