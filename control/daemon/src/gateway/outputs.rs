//! Carries out what the path finder decides.

use std::net::SocketAddr;

use millrace_path::limits::SESSION_TIME;
use millrace_path::output::{Event, Output, Route, Transmit};
use millrace_path::path::Pair;
use millrace_path::sealed::PublicKey;
use millrace_path::{Instant, Why};

use super::{Change, Gateway, Pinged};
use crate::counters::Count;
use crate::endpoint_line;
use crate::limits::SUSPICION_INTERVAL;
use crate::udp::Source;

impl Gateway {
    pub(super) fn carry_out(&mut self, now: Instant) {
        while let Some(output) = self.finder.as_mut().and_then(|finder| finder.poll_output()) {
            match output {
                Output::Transmit(Transmit::Udp { pair, datagram, dont_fragment }) => {
                    self.kinds.wrote(now, pair.remote);
                    self.send_udp(pair, &datagram, dont_fragment);
                }
                Output::Transmit(Transmit::Relay { peer, packet }) => {
                    let known = self.peers.get(&peer);
                    let home = known.and_then(|peer| peer.home_url());
                    let heard = known.and_then(|peer| peer.heard_at);
                    self.relays.signal(now, peer, home, heard, &packet);
                }
                Output::Event(event) => self.event(now, event),
                Output::Timeout(at, reason) => self.finder_at = Some((at, reason)),
            }
        }
    }

    fn event(&mut self, now: Instant, event: Event) {
        match event {
            Event::Route { peer, route, why } => {
                let label = format!("{peer:?}");
                tracing::info!(peer = label, route = %RouteText(route), why = ?why, "route");
                if let Some(peer) = self.peers.get_mut(&peer) {
                    peer.remember(Change { at: now, route, why });
                }
                self.write_line(peer, route);
                if why == Why::Dead {
                    // A mapping that is gone looks like a dead path.
                    self.suspect_mappings(now);
                }
            }
            Event::Introduced { peer, home, has_session } => {
                tracing::info!(?peer, relay = home.url, "a peer introduced itself");
                if let Some(known) = self.peers.get_mut(&peer) {
                    known.home = Some(home);
                }
                self.send_parked(now, peer);
                if has_session {
                    self.may_have_session(peer, now + SESSION_TIME);
                }
            }
            Event::Suspected { .. } => {
                // Paths of many peers end together, and paths that lose much are suspected often.
                if self.suspected_at.is_none_or(|at| now.since(at) >= SUSPICION_INTERVAL) {
                    self.suspected_at = Some(now);
                    self.reflexive.ask(now);
                }
            }
            Event::SeenAt { .. } => {}
            Event::Pinged { number, route, round_trip, .. } => {
                self.pinged.push_back(Pinged { number, answer: Some((route, round_trip)) });
            }
            Event::NotPinged { number, .. } => {
                self.pinged.push_back(Pinged { number, answer: None });
            }
        }
    }

    /// Tells the data plane where a peer's packets go.
    pub(super) fn write_line(&mut self, peer: PublicKey, route: Route) {
        let Some(peer) = self.peers.get(&peer) else { return };
        let source = match route {
            Route::Direct { pair, .. } => self.source(pair),
            _ => Source::default(),
        };
        let route = match route {
            Route::Direct { pair, frame_len } => {
                let remote = self.wire_address(pair.remote);
                Route::Direct { pair: Pair { remote, ..pair }, frame_len }
            }
            other => other,
        };
        let line = endpoint_line::line(route, source);
        if let Some(tools) = self.plane.as_mut().and_then(|plane| plane.tools.as_mut())
            && !tools.endpoints.write(peer.slot, &line)
        {
            tracing::error!(slot = peer.slot, "the data plane has no line for a peer");
        }
    }

    /// From where a pair is sent: the interface of its uplink, and the address of ours that the
    /// other side knows.
    pub(super) fn source(&self, pair: Pair) -> Source {
        let way = self.ways.iter().find(|(id, _)| *id == pair.uplink);
        let ifindex = way.map_or(0, |(_, way)| way.ifindex);
        let ip = self.sources.get(&pair).and_then(|source| source.ip);
        Source { ip, ifindex }
    }

    fn send_udp(&mut self, pair: Pair, datagram: &[u8], dont_fragment: bool) {
        let source = self.source(pair);
        let result = self.send_datagram(pair.remote, source, datagram, dont_fragment);
        let Err(error) = result else { return };
        // Our address may be gone: the kernel knows another.
        if source.ip.is_some() {
            self.sources.remove(&pair);
            let source = Source { ip: None, ..source };
            if self.send_datagram(pair.remote, source, datagram, dont_fragment).is_ok() {
                return;
            }
        }
        self.counters.add(Count::of_send_error(&error), 1);
    }

    pub(super) fn send_datagram(
        &self,
        to: SocketAddr,
        source: Source,
        datagram: &[u8],
        dont_fragment: bool,
    ) -> std::io::Result<()> {
        match self.plane.as_ref().and_then(|plane| plane.tools.as_ref()) {
            Some(tools) => tools.udp.send(self.wire_address(to), source, datagram, dont_fragment),
            // Between two data planes: as if it were lost on the way.
            None => Ok(()),
        }
    }
}

/// A route in a log line.
struct RouteText(Route);

impl std::fmt::Display for RouteText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Route::Unset => f.write_str("plain WireGuard"),
            Route::Relay => f.write_str("relay"),
            Route::Direct { pair, .. } => write!(f, "direct {}", pair.remote),
        }
    }
}
