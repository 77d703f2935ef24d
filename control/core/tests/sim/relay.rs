//! Relays: which carry what to whom, and that they read none of it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use millrace_path::sealed::PublicKey;
use rand::Rng;

use super::gateway::Kind;
use super::sabotage::Sabotage;
use super::{Happening, World, watch};

impl World {
    pub(super) fn relay_tunnel(&mut self, from: usize, to: usize, number: u64, kind: Kind) {
        let away = self.gateways[from].relay_back_at > self.now;
        if !away && self.relay_reaches(from, to) {
            for _ in 0..self.times(Sabotage::RelayTwice, 2) {
                let packet = Happening::Tunnel { to, from, source: None, number, kind };
                self.schedule(self.relay_latency, packet);
            }
        }
    }

    /// A gateway has no connection to its relay for a time.
    pub fn lose_relay(&mut self, of: usize, time: Duration) {
        self.gateways[of].relay_back_at = self.now + time;
        self.schedule(time, Happening::RelayUp { of });
    }

    /// Everybody's relay is reached again.
    pub fn relays_are_back(&mut self) {
        self.relays_up = [1, 2].into();
        for of in 0..self.gateways.len() {
            self.gateways[of].relay_up = true;
            self.schedule(Duration::ZERO, Happening::RelayUp { of });
        }
    }

    pub(super) fn relay(&mut self, from: usize, peer: PublicKey, mut bytes: Vec<u8>) {
        if self.sabotage == Some(Sabotage::Plaintext) {
            let SocketAddr::V4(own) = self.gateways[from].legs[0].socket else { return };
            bytes.extend(own.ip().octets());
            bytes.extend(own.port().to_be_bytes());
        }
        self.gateways[from].relay_sent += 1;
        let Some(to) = self.by_key.get(&peer).copied() else { return };
        let since = self.now.since(self.started_at);
        let link = self.gateways[from].links.get_mut(&to).unwrap();
        link.signals += if self.sabotage == Some(Sabotage::SignalStorm) { 5 } else { 1 };
        watch::signals(link.signals, since);
        self.assert_sealed(&bytes);
        if self.keep_relayed {
            self.relayed.push(bytes.clone());
        }
        if self.relay_reaches(from, to) {
            // As the daemon does: what is no data waits for the connection.
            let back = self.gateways[from].relay_back_at.since(self.now);
            let from = self.gateways[from].node_key;
            let after = self.relay_latency + back;
            self.schedule(after, Happening::Relayed { to, from, bytes });
        }
    }

    /// As the daemon does: to the peer's relay as far as we know it, to ours if that one is down.
    pub(super) fn relay_reaches(&mut self, from: usize, to: usize) -> bool {
        let (sender, receiver) = (&self.gateways[from], &self.gateways[to]);
        let known = sender.links[&to].home;
        let through = if self.relays_up.contains(&known) { known } else { sender.home };
        if !sender.relay_up || !sender.control_up || !self.relays_up.contains(&through) {
            return false;
        }
        let connected = receiver.relay_up && receiver.relay_back_at <= self.now;
        let there = connected && receiver.control_up && !receiver.plain;
        if !there || through != receiver.home {
            let peer = receiver.node_key;
            self.schedule(self.relay_latency, Happening::PeerGone { to: from, peer });
            return false;
        }
        let deaf = self.relay_deaf.contains(&from) || self.relay_deaf.contains(&to);
        let lost = self.relay_loss > 0.0 && self.random.random_bool(self.relay_loss);
        !deaf && !lost
    }

    /// No address and port of anybody is to be read in what a relay sees.
    pub(super) fn assert_sealed(&self, bytes: &[u8]) {
        // A hub's names are as secret as those of two.
        let gateways = || self.gateways.iter().take(8);
        let own = gateways().flat_map(|gateway| gateway.legs.iter().map(|leg| leg.socket));
        let seen = gateways().flat_map(|gateway| gateway.seen.addresses.iter().copied());
        for address in own.chain(seen) {
            let port = address.port().to_be_bytes();
            let ip = match address.ip() {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let address = [&ip[..], &port].concat();
            assert!(bytes.windows(address.len()).all(|window| window != address), "in the clear");
        }
    }
}
