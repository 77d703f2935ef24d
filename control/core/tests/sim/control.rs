//! The control process around a finder: what it tells it, and what it does with its events.

use std::net::SocketAddr;
use std::time::Duration;

use millrace_path::candidate::{Candidate, CandidateKind, OwnAddresses};
use millrace_path::finder::{Config, Finder, Input, Network, Uplink};
use millrace_path::introduce::Home;
use millrace_path::limits::FRAME_LEN_DEFAULT;
use millrace_path::nat::Nat;
use millrace_path::path::UplinkId;
use millrace_path::reflexive::{Reflexive, Seen};
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};
use millrace_path::{Event, Instant, Route};
use rand::RngCore;

use super::gateway::Leg;
use super::sabotage::Sabotage;
use super::{DAY, Happening, TUNNEL, WALL_AT_ZERO, World};

impl World {
    /// Tells a gateway its own addresses and uplinks as they are now.
    pub fn tell_network(&mut self, at: usize, major: bool) {
        let gateway = &self.gateways[at];
        let mut candidates = Vec::new();
        let mut add = |kind, address| {
            if candidates.iter().all(|known: &Candidate| known.address != address) {
                candidates.push(Candidate { kind, address });
            }
        };
        for leg in gateway.legs.iter().filter(|leg| leg.nat64.is_none()) {
            add(CandidateKind::Interface, leg.socket);
            // As the daemon has it from the router.
            let Some(nat) = leg.segment.map(|nat| &self.internet.nats[nat]) else { continue };
            let ports = nat.forwards.iter().filter(|(_, inside)| **inside == leg.socket);
            for address in ports.map(|(port, _)| SocketAddr::new(nat.public_ip, *port)) {
                add(CandidateKind::PortMapped, address);
            }
        }
        for address in &gateway.seen.addresses {
            add(CandidateKind::Reflexive, *address);
        }
        if gateway.seen.varies == Some(true) {
            for address in &gateway.seen.addresses {
                let kept = SocketAddr::new(address.ip(), gateway.legs[0].socket.port());
                add(CandidateKind::ReflexiveLocalPort, kept);
            }
        }
        let sockets = candidates.iter().filter_map(Candidate::own_address).collect();
        candidates.extend(&gateway.bogus);
        let uplink =
            |(at, leg): (usize, &Leg)| Uplink { id: UplinkId(at as u16), ipv6: leg.is_ipv6() };
        let uplinks = gateway.legs.iter().enumerate().map(uplink).collect();
        let network = Network {
            home: Home { region: gateway.home, url: String::new() },
            candidates,
            addresses: OwnAddresses { sockets, tunnels: vec![TUNNEL] },
            uplinks,
            nat: Nat::default(),
        };
        self.handle(at, Input::Network { network, major });
    }

    /// The data plane says since when data to a peer had no answer.
    pub fn unanswered_data(&mut self, at: usize, peer: PublicKey, since: Instant) {
        self.handle(at, Input::UnansweredData { peer, since });
    }

    /// The gateway has another address behind other NATs, and notices.
    pub fn roamed(&mut self, at: usize) {
        self.gateways[at].reflexive.forget();
        self.gateways[at].seen = Seen::default();
        self.tell_network(at, true);
        self.ask_stun(at);
    }

    /// The gateway listens at another relay now.
    pub fn move_home(&mut self, at: usize, home: u16) {
        self.gateways[at].home = home;
        self.tell_network(at, false);
    }

    /// The control process dies: the data plane goes on with what it has.
    pub fn kill(&mut self, at: usize) {
        self.gateways[at].control_up = false;
        self.gateways[at].timer = None;
    }

    /// The control process dies and another starts, perhaps with its clock a day behind.
    pub fn restart(&mut self, at: usize, clock_back: bool) {
        let wall = WALL_AT_ZERO - if clock_back { DAY } else { 0 };
        self.gateways[at].finder = self.new_finder(self.gateways[at].node_key, wall);
        self.gateways[at].timer = None;
        self.begin_control(at);
    }

    /// A control process that knows nothing yet.
    pub(super) fn begin_control(&mut self, at: usize) {
        let gateway = &mut self.gateways[at];
        gateway.control_up = true;
        (gateway.reflexive, gateway.seen) = (Reflexive::default(), Seen::default());
        gateway.reflexive.set_servers(self.now, &self.stun.servers);
        self.tell_network(at, false);
        self.add_peers(at);
        self.ask_stun(at);
    }

    pub(super) fn new_finder(&mut self, node_key: PublicKey, wall_at_zero: u64) -> Finder {
        let mut bytes = [0; 32];
        self.random.fill_bytes(&mut bytes);
        let disco_secret = SecretKey::from_bytes(bytes);
        let (frame_len, least_frame_len) = (FRAME_LEN_DEFAULT, self.least_frame_len);
        let config = Config { node_key, disco_secret, frame_len, least_frame_len, wall_at_zero };
        Finder::new(config, self.now)
    }

    /// With the paths that the data plane's table has, if a process before left any.
    pub(super) fn add_peers(&mut self, at: usize) {
        let links = self.gateways[at].links.iter();
        let links = links.map(|(other, link)| (*other, link.endpoint, link.route));
        for (other, endpoint, route) in links.collect::<Vec<_>>() {
            let peer = self.gateways[other].node_key;
            let box_key = BoxKey::agree(&self.gateways[at].secret, peer).unwrap();
            let in_use = match route {
                Route::Direct { pair, .. } if !self.is(Sabotage::PathForgotten) => Some(pair),
                _ => None,
            };
            self.gateways[at].links.get_mut(&other).unwrap().signals = 0;
            self.handle(at, Input::AddPeer { peer, box_key, endpoint, in_use });
        }
    }

    pub(super) fn event(&mut self, at: usize, event: Event) {
        match event {
            Event::Route { .. } if self.sabotage == Some(Sabotage::EventLost) => {}
            Event::Route { peer, route, why } => {
                let other = self.by_key[&peer];
                let gateway = &mut self.gateways[at];
                gateway.routes.push((self.now, route, why));
                let link = gateway.links.get_mut(&other).unwrap();
                link.route = route;
                link.changes += 1;
            }
            Event::Introduced { peer, home, .. } => {
                let other = self.by_key[&peer];
                self.gateways[at].links.get_mut(&other).unwrap().home = home.region;
            }
            // As the daemon does: the mapping may be gone.
            Event::Suspected { .. } => {
                let gateway = &mut self.gateways[at];
                let pause = Duration::from_secs(1);
                if gateway.suspected_at.is_none_or(|last| self.now.since(last) >= pause) {
                    gateway.suspected_at = Some(self.now);
                    self.schedule(Duration::ZERO, Happening::Ask { of: at });
                }
            }
            Event::SeenAt { .. } | Event::Pinged { .. } | Event::NotPinged { .. } => {}
        }
    }
}
