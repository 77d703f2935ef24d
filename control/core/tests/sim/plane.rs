//! The data plane of a gateway: tunnel packets along the routes, and what it tells control of them.

use std::net::SocketAddr;

use millrace_path::Route;
use millrace_path::finder::Input;

use super::gateway::Kind;
use super::sabotage::Sabotage;
use super::{Happening, World};

impl World {
    /// One packet of each busy tunnel, or the keepalive that is due.
    pub(super) fn send_tunnels(&mut self, of: usize) {
        let now = self.now;
        let talks = self.gateways[of].busy && !self.gateways[of].listens_only;
        for to in self.gateways[of].links.keys().copied().collect::<Vec<_>>() {
            if let Some(kind) = self.gateways[of].links[&to].tunnel.due(now, talks) {
                self.send_tunnel(of, to, kind);
            }
        }
    }

    /// One packet as the route says.
    pub(super) fn send_tunnel(&mut self, of: usize, to: usize, kind: Kind) {
        let link = self.gateways[of].links.get_mut(&to).unwrap();
        let number = link.tunnel.send(self.now, kind);
        let len = match kind {
            Kind::Data => link.frame_len(),
            Kind::Keepalive => 32,
            Kind::Initiation => 148,
            Kind::Response => 92,
        };
        match link.route {
            Route::Unset => {}
            Route::Relay => self.relay_tunnel(of, to, number, kind),
            Route::Direct { pair, .. } => {
                assert!(!self.gateways[of].has(pair.remote), "a tunnel to itself: {pair:?}");
                let leg = usize::from(pair.uplink.0);
                let Some((socket, delay, source)) = self.carry(of, leg, pair.remote, len) else {
                    return;
                };
                // Anybody else has no key for it.
                let leg = socket.filter(|(gateway, _)| *gateway == to).map(|(_, leg)| leg);
                let reached = leg.is_some();
                let source = leg.map_or(source, |leg| self.received_on(to, leg, source).1);
                let gap = self.is(Sabotage::Gaps) && self.is_interrupted();
                if reached && !gap && (kind != Kind::Data || !self.data_cut.contains(&(of, to))) {
                    let source = Some(source);
                    self.schedule(delay, Happening::Tunnel { to, from: of, source, number, kind });
                }
            }
        }
    }

    pub(super) fn tunnel_received(
        &mut self,
        to: usize,
        from: usize,
        source: Option<SocketAddr>,
        number: u64,
        kind: Kind,
    ) {
        let now = self.now;
        let Some(link) = self.gateways[to].links.get_mut(&from) else { return };
        link.tunnel.receive(now, kind);
        match source {
            Some(source) => {
                link.tunnel.received_directly = Some((source, now));
                link.tunnel.came_from = Some(source);
            }
            None => {
                assert!(!link.tunnel.relayed.contains(&number), "two copies through the relay");
                if link.tunnel.relayed.len() == 64 {
                    link.tunnel.relayed.remove(0);
                }
                link.tunnel.relayed.push(number);
            }
        }
        if kind == Kind::Initiation {
            self.send_tunnel(to, from, Kind::Response);
        }
    }

    pub(super) fn poll_data_plane(&mut self, of: usize) {
        if !self.gateways[of].control_up {
            return;
        }
        for other in self.gateways[of].links.keys().copied().collect::<Vec<_>>() {
            let peer = self.gateways[other].node_key;
            let tunnel = &mut self.gateways[of].links.get_mut(&other).unwrap().tunnel;
            let traffic = std::mem::take(&mut tunnel.traffic);
            let (sent, received) = (std::mem::take(&mut tunnel.sent_data), tunnel.received_at);
            let (direct, unanswered) = (tunnel.received_directly.take(), tunnel.unanswered_since);
            if traffic {
                self.handle(of, Input::Traffic { peer });
            }
            if sent {
                self.handle(of, Input::Sent { peer });
            }
            self.handle(of, Input::Received { peer, at: received });
            if let Some((from, at)) = direct {
                self.handle(of, Input::ReceivedDirectly { peer, from, at });
            }
            if let Some(since) = unanswered {
                self.handle(of, Input::UnansweredData { peer, since });
            }
        }
    }
}
