//! News from the data plane.

use millrace_ebpf::link::{BoxKeyAnswer, LinkError, PublicKey as LinkKey, ToControl, Welcome};
use millrace_path::Instant;
use millrace_path::finder::Input;
use millrace_path::output::{Route, Why};
use millrace_path::path::{Pair, UplinkId};
use millrace_path::sealed::{BoxKey, PublicKey};

use super::routers::SECRET_POINT;
use super::{Change, For, Gateway, Peer};
use crate::endpoint_line;
use crate::limits::{CONNECT_AGAIN, TRAFFIC_INTERVAL};
use crate::plane::{News, PlaneError};
use crate::relay_client::RelayClient;
use crate::udp::Source;

impl Gateway {
    /// Takes in what the data plane says. Call when its descriptor is readable.
    pub fn handle_plane(&mut self, now: Instant) {
        loop {
            let Some(plane) = &mut self.plane else { return };
            match plane.receive() {
                Ok(None) => break,
                Ok(Some(News::Welcome(welcome, problem))) => self.welcomed(now, welcome, problem),
                Ok(Some(News::Message(message))) => self.told(now, message),
                Err(error) => {
                    self.lost_plane(now, &error);
                    return;
                }
            }
        }
        self.ask_for_box_keys();
    }

    /// Everything that was the data plane's is given back; what is known of peers stays, because
    /// it may be back in a moment.
    fn lost_plane(&mut self, now: Instant, error: &PlaneError) {
        if matches!(error, PlaneError::Link(LinkError::Closed)) {
            tracing::warn!("the data plane ended");
        } else {
            tracing::error!("the data plane is of no use: {error}");
        }
        self.plane_problem = Some(error.to_string());
        self.plane = None;
        self.sessions_lost(now);
        self.connect_at = Some(now + CONNECT_AGAIN);
        self.traffic_at = None;
        self.slots.clear();
        self.box_requests.waiting.clear();
        self.box_requests.unsent.clear();
    }

    fn welcomed(&mut self, now: Instant, welcome: Welcome, problem: Option<String>) {
        tracing::info!(
            interface = welcome.interface,
            port = welcome.listen_port,
            "connected to the data plane"
        );
        if let Some(why) = &problem {
            tracing::error!("no paths can be found: the data plane has no eBPF programs: {why}");
        }
        self.plane_problem = problem;
        let before = self.welcome.replace(welcome.clone());
        (self.traffic_at, self.traffic_seen_at) = (Some(now + TRAFFIC_INTERVAL), now);
        // Who is not told again until `Synced` is gone.
        for peer in self.peers.values_mut() {
            peer.slot = u32::MAX;
        }
        let same = before.is_some_and(|before| {
            before.public_key == welcome.public_key
                && before.mtu == welcome.mtu
                && before.listen_port == welcome.listen_port
        });
        if !same || self.finder.is_none() {
            self.kinds.forget(now);
            self.new_key(now);
        } else if !self.routers.has_secret() {
            self.want_box_key(For::PortMapping);
        }
        self.reflexive.ask(now);
        self.look_at_routers(now);
    }

    /// All that was made with the former key is void.
    fn new_key(&mut self, now: Instant) {
        for peer in self.peers.values_mut() {
            (peer.box_key, peer.problem) = (None, None);
        }
        if let Err(error) = self.set_relays(now) {
            tracing::error!(%error, "no more descriptors for relays");
        }
        self.restart_finder(now);
        self.routers.close();
        self.want_box_key(For::PortMapping);
        for key in self.peers.keys().copied().collect::<Vec<_>>() {
            self.want_box_key(For::Peer(key));
        }
    }

    fn told(&mut self, now: Instant, message: ToControl) {
        match message {
            ToControl::PeerUp(peer) => self.peer_up(now, peer),
            ToControl::AllowedIps { slot, allowed_ips } => {
                if let Some(peer) = self.slots.get(&slot).and_then(|k| self.peers.get_mut(k)) {
                    peer.allowed_ips.extend(allowed_ips);
                }
            }
            ToControl::PeerDown { slot } => self.peer_down(now, slot),
            ToControl::Synced => {
                let gone = self.peers.values().filter(|peer| peer.slot == u32::MAX);
                for key in gone.map(|peer| peer.key).collect::<Vec<_>>() {
                    self.forget(now, key);
                }
                self.tell_finder(now, false);
            }
            ToControl::BoxKey(answer) => self.box_key(now, answer),
            ToControl::OwnKey { public_key } => {
                if let Some(welcome) = &mut self.welcome {
                    welcome.public_key = public_key;
                }
                self.new_key(now);
            }
            ToControl::Mtu { mtu } => {
                if let Some(welcome) = &mut self.welcome {
                    welcome.mtu = mtu;
                }
                self.restart_finder(now);
            }
            ToControl::Fwmark { mark } => {
                if let Some(welcome) = &mut self.welcome {
                    welcome.fwmark = mark;
                }
                if let Err(error) = self.set_relays(now) {
                    tracing::error!(%error, "no more descriptors for relays");
                }
            }
            ToControl::Heard(heard) => self.heard(now, heard),
            ToControl::Active { slot } => {
                self.traffic_at.get_or_insert(now + TRAFFIC_INTERVAL);
                self.traffic_seen_at = now;
                if let Some(&peer) = self.slots.get(&slot) {
                    self.input(now, Input::Traffic { peer });
                }
            }
            ToControl::Welcome(_) | ToControl::Refused { .. } => {}
        }
    }

    fn peer_up(&mut self, now: Instant, told: millrace_ebpf::link::Peer) {
        let (key, slot) = (PublicKey(told.public_key.0), told.slot);
        self.slots.insert(slot, key);
        let known = self.peers.get_mut(&key);
        let same = known.filter(|known| known.endpoint == told.endpoint && known.box_key.is_some());
        if let Some(known) = same {
            // As after a restart of the data plane: what was found out is still right.
            (known.slot, known.keepalive_s) = (slot, told.keepalive_s);
            known.allowed_ips = told.allowed_ips;
            known.traffic = Default::default();
            let route = known.route;
            self.write_line(key, route);
            return;
        }
        self.peers.insert(key, Peer::new(now, told));
        self.want_box_key(For::Peer(key));
    }

    fn peer_down(&mut self, now: Instant, slot: u32) {
        if let Some(tools) = self.plane.as_mut().and_then(|plane| plane.tools.as_mut()) {
            tools.endpoints.write(slot, &endpoint_line::line(Route::Unset, Source::default()));
        }
        if let Some(key) = self.slots.remove(&slot) {
            self.forget(now, key);
        }
    }

    fn forget(&mut self, now: Instant, key: PublicKey) {
        self.peers.remove(&key);
        self.input(now, Input::RemovePeer { peer: key });
    }

    /// Gives a peer to the finder, once there is a key for it.
    pub(super) fn add_to_finder(&mut self, now: Instant, key: PublicKey) {
        let Some(peer) = self.peers.get(&key) else { return };
        let Some(box_key) = peer.box_key.clone() else { return };
        let line = self.plane.as_ref().and_then(|plane| plane.tools.as_ref());
        let line = line.and_then(|tools| tools.endpoints.read(peer.slot));
        let in_use =
            line.as_ref().and_then(endpoint_line::in_use).map(|(remote, local, ifindex)| {
                let remote = self.real_address(remote);
                let way = |way: &crate::network::Way| {
                    way.ipv6 == remote.is_ipv6() && (way.ifindex == ifindex || way.ifindex == 0)
                };
                let uplink = self.ways.iter().rev().find(|(_, known)| way(known));
                let usual = UplinkId(u16::from(remote.is_ipv6()));
                let pair = Pair { uplink: uplink.map_or(usual, |(id, _)| *id), remote };
                (pair, Source { ip: local, ifindex })
            });
        if let Some((pair, source)) = in_use {
            self.sources.insert(pair, source);
        }
        let (endpoint, in_use) = (peer.endpoint, in_use.map(|(pair, _)| pair));
        self.input(now, Input::AddPeer { peer: key, box_key, endpoint, in_use });
        // A path that was kept is no event of the finder's.
        if let (Some(_), Some(finder)) = (in_use, &self.finder)
            && let Some(route) = finder.route(key)
            && let Some(peer) = self.peers.get_mut(&key)
        {
            peer.remember(Change { at: now, route, why: Why::First });
        }
    }

    pub(super) fn want_box_key(&mut self, wanted: For) {
        let requests = &mut self.box_requests;
        requests.next = requests.next.wrapping_add(1);
        requests.waiting.insert(requests.next, wanted);
        requests.unsent.push(requests.next);
        self.ask_for_box_keys();
    }

    /// Sends what there is room for; the rest when answers came.
    fn ask_for_box_keys(&mut self) {
        let Some(plane) = &self.plane else { return };
        let requests = &mut self.box_requests;
        while let Some(&request) = requests.unsent.last() {
            let wanted = requests.waiting.get(&request);
            let key = wanted.map(|wanted| match wanted {
                For::Peer(key) | For::Relay(key) => LinkKey(key.0),
                For::PortMapping => LinkKey(SECRET_POINT),
            });
            if let Some(key) = key
                && !matches!(plane.link.want_box_key(request, key), Ok(true))
            {
                return;
            }
            requests.unsent.pop();
        }
    }

    fn box_key(&mut self, now: Instant, answer: BoxKeyAnswer) {
        let Some(wanted) = self.box_requests.waiting.remove(&answer.request) else { return };
        if let For::PortMapping = wanted {
            match answer.key {
                Ok(key) => self.routers.set_secret(key.0),
                Err(refusal) => tracing::info!("no ports are asked for: {refusal}"),
            }
            self.look_at_routers(now);
            return;
        }
        let key = answer.key.map(|key| BoxKey::from_bytes(*key.0));
        match (wanted, key) {
            (For::PortMapping, _) => {}
            (For::Peer(peer), Ok(key)) => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.box_key = Some(key);
                }
                self.add_to_finder(now, peer);
            }
            (For::Peer(peer), Err(refusal)) => {
                tracing::warn!(?peer, "no key to talk to a peer with: {refusal}");
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.problem = Some("the data plane has no key to talk to it with");
                }
            }
            (For::Relay(relay), Ok(key)) => {
                // Not by its place in the list, which a reload may have changed.
                let wants = |client: &RelayClient| client.wants_box_key() == Some(relay);
                let waiting = self.relays.list.iter().position(|relay| wants(&relay.client));
                if let Some(at) = waiting {
                    self.relays.list[at].client.give_box_key(now, relay, key);
                    self.handle_relay(now, at);
                }
            }
            (For::Relay(relay), Err(refusal)) => {
                tracing::error!(?relay, "no key to log in at a relay with: {refusal}");
            }
        }
    }
}
