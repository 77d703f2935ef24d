//! STUN as the control process asks it, and servers that tell the truth, nothing, or lies.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use millrace_path::{Instant, stun};

use super::{Happening, World};

/// The servers, and what is wrong with them.
pub struct StunServers {
    pub servers: Vec<SocketAddr>,
    /// These say nothing.
    pub silent: BTreeSet<SocketAddr>,
    /// These tell everybody this address.
    pub lies: Vec<(SocketAddr, SocketAddr)>,
}

impl StunServers {
    pub fn silence_all(&mut self) {
        self.silent = self.servers.iter().copied().collect();
    }
}

impl World {
    /// Asks the STUN servers now, as after a path died.
    pub fn ask_stun(&mut self, at: usize) {
        if self.gateways[at].control_up {
            self.gateways[at].reflexive.ask(self.now);
            self.poll_stun(at);
        }
    }

    /// Sends the questions that are due, each on the first uplink of its family.
    pub(super) fn poll_stun(&mut self, at: usize) {
        let now = self.now;
        if !self.gateways[at].control_up {
            return;
        }
        while let Some((server, request)) =
            self.gateways[at].reflexive.poll_transmit(now, &mut self.random)
        {
            let uplink =
                self.gateways[at].legs.iter().position(|leg| leg.is_ipv6() == server.is_ipv6());
            if let Some(leg) = uplink {
                self.send(at, leg, server, request.to_vec());
            }
        }
        self.look_at_reflexive(at);
        if let Some(deadline) = self.gateways[at].reflexive.deadline()
            && self.gateways[at].stun_timer != Some(deadline)
        {
            self.gateways[at].stun_timer = Some(deadline);
            self.schedule(deadline.since(now), Happening::StunTimer { of: at, at: deadline });
        }
    }

    /// What a server does with a request.
    pub(super) fn stun_request(&mut self, from: SocketAddr, server: SocketAddr, bytes: &[u8]) {
        if self.stun.silent.contains(&server) {
            return;
        }
        let lie = self.stun.lies.iter().find(|(liar, _)| *liar == server);
        let seen_as = lie.map_or(from, |(_, lie)| *lie);
        let answer = stun::answer(bytes, seen_as).unwrap();
        if let Some((to, server)) = self.internet.arrive(self.now, server, from) {
            let delay = self.gateways[to.0].legs[to.1].latency;
            self.schedule(delay, Happening::Datagram { to, from: server, bytes: answer.to_vec() });
        }
    }

    pub(super) fn stun_answered(&mut self, at: usize, from: SocketAddr, bytes: &[u8]) {
        if self.gateways[at].control_up {
            // One that comes twice, or for the process before, is refused.
            let _ = self.gateways[at].reflexive.handle(self.now, from, bytes);
            self.look_at_reflexive(at);
        }
    }

    fn look_at_reflexive(&mut self, at: usize) {
        let seen = self.gateways[at].reflexive.seen(self.now);
        if seen != self.gateways[at].seen {
            self.gateways[at].seen = seen;
            self.tell_network(at, false);
        }
    }

    pub(super) fn stun_timer(&mut self, of: usize, at: Instant) {
        if self.gateways[of].stun_timer == Some(at) {
            self.gateways[of].stun_timer = None;
            self.poll_stun(of);
        }
    }
}
