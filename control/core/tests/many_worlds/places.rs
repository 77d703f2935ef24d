//! Where the two gateways are: drawn from dice, with what theory says of whether they meet.

use std::collections::BTreeSet;
use std::time::Duration;

use millrace_path::candidate::{Candidate, CandidateKind};
use millrace_path::limits::FRAME_LEN_DEFAULT;
use millrace_path::nat64::Prefix;
use rand::Rng;

use super::Story;
use crate::sim::front::Front;
use crate::sim::gateway::Leg;
use crate::sim::nat::{Filtering, Mapping, Nat};
use crate::sim::sabotage::Sabotage;

/// What stands before a gateway, for each family that it has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    pub v4: Option<Front>,
    pub v6: Option<Front>,
}

impl Place {
    fn meets(self, other: Self, stun: bool) -> bool {
        let by = |one: Option<Front>, other: Option<Front>| {
            one.zip(other).is_some_and(|(one, other)| one.meets_with(other, stun))
        };
        by(self.v4, other.v4) || by(self.v6, other.v6)
    }
}

/// A place, and the uplinks that a gateway has there.
struct Drawn {
    place: Place,
    legs: Vec<Leg>,
}

impl Story {
    /// Places, distances and losses.
    pub(super) fn draw(&mut self) {
        self.draw_stun();
        match self.dice.random_range(0..10) {
            0 => self.draw_one_network(),
            1 | 2 => self.draw_one_carrier(),
            _ => self.draw_apart(),
        }
        if self.dice.random_bool(0.3) {
            self.draw_ipv6();
        }
        self.draw_network();
        let dice = &mut self.dice;
        let listener = dice.random_bool(0.2).then(|| dice.random_range(0..2));
        for (at, gateway) in self.world.gateways.iter_mut().enumerate() {
            gateway.listens_only = listener == Some(at);
            if dice.random_bool(0.2) {
                let kind = CandidateKind::Interface;
                for address in ["127.0.0.1:51820", "10.99.0.1:51820", "224.0.0.1:51820"] {
                    gateway.bogus.push(Candidate { kind, address: address.parse().unwrap() });
                }
            }
        }
        self.draw_nats();
    }

    /// What the network between does to datagrams.
    fn draw_network(&mut self) {
        let (dice, world) = (&mut self.dice, &mut self.world);
        self.lossless = dice.random_bool(0.5);
        if !self.lossless {
            world.loss = dice.random_range(0.0..0.03);
            world.relay_loss = dice.random_range(0.0..0.03);
        }
        if dice.random_bool(0.2) {
            // Datagrams overtake each other, and some come twice.
            world.jitter = dice.random_range(0.1..1.5);
            world.duplicates = dice.random_range(0.0..0.1);
        }
        if dice.random_bool(0.5) {
            // As the daemon has it: a path that does not carry all of the tunnel's packets is none.
            world.least_frame_len = FRAME_LEN_DEFAULT;
        }
        world.relay_latency = Duration::from_millis(dice.random_range(5..150));
        let what = format!(
            "loss {:.3} and {:.3}, relay {:?}, jitter {:.1}, {:.3} come twice, frames from {}",
            world.loss,
            world.relay_loss,
            world.relay_latency,
            world.jitter,
            world.duplicates,
            world.least_frame_len
        );
        self.tell(&what);
    }

    /// STUN servers: mostly all of them, seldom none, or some that are silent or lie.
    fn draw_stun(&mut self) {
        let servers = self.world.stun.servers.clone();
        match self.dice.random_range(0..20) {
            0 => {
                self.stun = false;
                self.world.stun.silence_all();
                self.tell("no STUN server answers");
            }
            1 => {
                self.world.stun.silent = BTreeSet::from([servers[0], servers[2]]);
                self.tell("every other STUN server is silent");
            }
            2 => {
                let lies = ["198.18.7.7:4242", "10.1.2.3:51820", "10.99.0.1:51820", "[fd00::1]:1"];
                let lie = lies[self.dice.random_range(0..lies.len())].parse().unwrap();
                self.world.stun.lies = vec![(servers[1], lie), (servers[3], lie)];
                self.tell(&format!("every other STUN server says {lie}"));
            }
            _ => {}
        }
    }

    /// How long NATs remember, and what else they do.
    pub(super) fn draw_nats(&mut self) {
        // Who listens only sends every ten seconds where its control process is away.
        let listens = self.world.gateways.iter().any(|gateway| gateway.listens_only);
        let (broken, dice) = (self.world.sabotage == Some(Sabotage::OpenNats), &mut self.dice);
        for nat in self.world.nats() {
            let timeout_s = dice.random_range(if listens { 15..300 } else { 10..300 });
            nat.timeout = Duration::from_secs(timeout_s);
            nat.refreshed_inwards = dice.random_bool(0.5);
            nat.keeps_ports = dice.random_bool(0.5);
            if broken {
                nat.filtering = Filtering::EndpointIndependent;
            }
        }
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

    /// Two places with nothing in common.
    fn draw_apart(&mut self) {
        for side in [0, 1] {
            let drawn = self.draw_place(side);
            self.places[side] = drawn.place;
            self.settle(side, drawn.legs);
        }
        self.apart = true;
        self.meets = self.would_meet();
        self.tell(&format!("apart: {:?}", self.places));
    }

    pub(super) fn would_meet(&self) -> bool {
        self.places[0].meets(self.places[1], self.stun)
    }

    /// A gateway moves into its place, or, if it is there, out of another.
    fn settle(&mut self, side: usize, mut legs: Vec<Leg>) {
        let latency = Duration::from_millis(self.dice.random_range(1..60));
        legs.iter_mut().for_each(|leg| leg.latency = latency);
        let mut legs = legs.into_iter();
        if side == self.world.gateways.len() {
            let first = legs.next().unwrap();
            let gateway = self.world.add_gateway(&first.socket.to_string(), first.segment, 1);
            self.world.gateways[gateway].legs[0] = first;
        }
        legs.for_each(|leg| self.world.add_leg(side, leg));
    }

    /// A place where nobody was before, perhaps behind two NATs, perhaps without IPv4.
    fn draw_place(&mut self, side: usize) -> Drawn {
        self.visits += 1;
        if self.dice.random_bool(0.1) {
            return self.draw_ipv6_only(side);
        }
        let public = format!("{}.{}", ["192.0.2", "203.0.113"][side], self.visits);
        let mut front = self.draw_front();
        let segment = self.add_front(front, &public, None);
        let mut socket = format!("{public}:51820");
        let mut inside = segment;
        if matches!(front, Front::Nat(..)) {
            // Everybody has the same router at home, with the same addresses.
            let net = if self.visits <= 2 { 1 } else { self.visits };
            socket = format!("192.168.{net}.{}:51820", self.dice.random_range(2..4));
            if self.dice.random_bool(0.2) {
                let home = self.draw_front();
                if let Front::Nat(..) = home {
                    inside = self.add_front(home, "100.64.0.5", segment);
                    front = front.around(home);
                }
            }
        }
        let mut leg = Leg::new(&socket, inside, Duration::ZERO);
        leg.blocked = front == Front::Blocked;
        if let (true, Some(nat), Front::Nat(..)) =
            (inside == segment && self.dice.random_bool(0.1), inside, front)
        {
            self.world.nats()[nat].forwards.insert(51_820, leg.socket);
            front = Front::Open;
        }
        Drawn { place: Place { v4: Some(front), v6: None }, legs: vec![leg] }
    }

    /// A network that has only IPv6, and IPv4 through a NAT64.
    fn draw_ipv6_only(&mut self, side: usize) -> Drawn {
        let address = format!("2001:db8:{}::{}", side + 1, self.visits);
        let Front::Nat(mapping, filtering) =
            Front::ALL[self.dice.random_range(2..Front::ALL.len())]
        else {
            unreachable!("the rest are NATs")
        };
        let public = format!("{}.{}", ["192.0.2", "203.0.113"][side], self.visits);
        let mut nat = Nat::new(mapping, filtering, &public, None);
        let prefixes = [("64:ff9b::", 96), ("2001:db8:64::", 96), ("2001:db8:aa00::", 56)];
        let (prefix, length) = prefixes[self.dice.random_range(0..prefixes.len())];
        let prefix = Prefix::new(prefix.parse().unwrap(), length).unwrap();
        nat.nat64 = Some(prefix);
        let nat = self.world.add_nat64(nat, address.parse().unwrap());
        let v6 = [Front::Open, Front::Firewall][self.dice.random_range(0..2)];
        let segment = self.add_front(v6, &address, Some(nat));
        let leg = Leg::new(&format!("[{address}]:51820"), segment, Duration::ZERO);
        let through = Leg { nat64: Some(prefix), ..leg.clone() };
        let v4 = Front::Nat(mapping, filtering).around(v6);
        Drawn { place: Place { v4: Some(v4), v6: Some(v6) }, legs: vec![leg, through] }
    }

    /// IPv6 beside IPv4.
    fn draw_ipv6(&mut self) {
        for side in [0, 1] {
            if self.places[side].v6.is_some() {
                continue;
            }
            let address = format!("2001:db8:{}::ff", side + 1);
            let fronts = [Front::Open, Front::Firewall, Front::Blocked];
            let front = fronts[self.dice.random_range(0..fronts.len())];
            let segment = self.add_front(front, &address, None);
            let mut leg = Leg::new(&format!("[{address}]:51820"), segment, Duration::ZERO);
            leg.blocked = front == Front::Blocked;
            self.settle(side, vec![leg]);
            self.places[side].v6 = Some(front);
        }
        self.meets |= self.would_meet();
        self.tell(&format!("IPv6: {:?}", self.places.map(|place| place.v6)));
    }

    /// Both in one network.
    fn draw_one_network(&mut self) {
        self.visits = 2;
        let front = self.draw_front();
        let front = if front == Front::Firewall { Front::Open } else { front };
        let segment = self.add_front(front, "192.0.2.254", None);
        let ports = [51_820, [51_820, 51_821][self.dice.random_range(0..2)]];
        for (side, port) in ports.into_iter().enumerate() {
            let socket = match segment {
                None => format!("192.0.2.{}:{port}", side + 240),
                _ => format!("192.168.1.{}:{port}", side + 2),
            };
            self.settle(side, vec![Leg::new(&socket, segment, Duration::ZERO)]);
        }
        self.meets = true;
        self.tell(&format!("on one network behind {front:?}"));
    }

    /// Two homes behind one NAT of a carrier.
    fn draw_one_carrier(&mut self) {
        self.visits = 2;
        use Mapping::{AddressAndPortDependent, EndpointIndependent};
        let mapping = [EndpointIndependent, AddressAndPortDependent][self.dice.random_range(0..2)];
        let carrier = Front::Nat(mapping, Filtering::AddressAndPortDependent);
        let outer = self.add_front(carrier, "192.0.2.254", None);
        let hairpin = self.dice.random_bool(0.5);
        self.world.nats()[0].hairpin = hairpin;
        let mut fronts = [Front::Open; 2];
        let mut forward = false;
        for side in [0, 1] {
            let home = Front::ALL[self.dice.random_range(2..Front::ALL.len())];
            let segment = self.add_front(home, ["100.64.0.11", "100.64.0.12"][side], outer);
            let socket = ["192.168.1.2:51820", "192.168.1.3:51820"][self.dice.random_range(0..2)];
            self.settle(side, vec![Leg::new(socket, segment, Duration::ZERO)]);
            if self.dice.random_bool(0.2) {
                self.world.nats()[side + 1].forwards.insert(51_820, socket.parse().unwrap());
                forward = true;
            }
            fronts[side] = carrier.around(home);
        }
        self.meets = forward || (hairpin && fronts[0].meets_with(fronts[1], self.stun));
        self.tell(&format!("one carrier, hairpin {hairpin}, forward {forward}: {fronts:?}"));
    }

    /// One side leaves for another network: its addresses and NATs are others from now on.
    pub(super) fn move_out(&mut self, side: usize) {
        while !self.world.gateways[side].legs.is_empty() {
            self.world.remove_leg(side);
        }
        let drawn = self.draw_place(side);
        self.places[side] = drawn.place;
        self.settle(side, drawn.legs);
        self.draw_nats();
        self.tell(&format!("side {side} is now at {:?}", drawn.place));
    }
}
