//! What the gateway knows, as documents for operators.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_config::discovery::Authorities;
use millrace_config::paths::{
    self, CandidatePair, Counter, Nat, NatKind, PathChange, PathKind, Paths, PeerPath, Pong, Relay,
    WhyPeer,
};
use millrace_path::Instant;
use millrace_path::candidate::{Candidate, CandidateKind};
use millrace_path::finder::{PathReport, PathState, Report};
use millrace_path::nat;
use millrace_path::output::{Route, Why};
use millrace_path::path::UplinkId;
use millrace_path::sealed::PublicKey;

use crate::gateway::{Gateway, Peer};
use crate::relay_client::{RelayConfig, Trust};
use crate::relays::{self, State};
use crate::verdict;

/// Headers and tag of a WireGuard data message around an inner packet.
const OVERHEAD: usize = 32;

/// `status`.
pub fn paths(gateway: &Gateway, now: Instant) -> Paths {
    let finder = gateway.finder.as_ref();
    let refused = finder.into_iter().flat_map(|finder| finder.refused());
    let refused = refused.map(|(name, count)| (name, count, "The path finder refused it."));
    // One mapper a family; what they refuse is one number.
    let mut by_name = BTreeMap::new();
    for (name, count) in gateway.routers.mappers.iter().flat_map(|mapper| mapper.counters()) {
        *by_name.entry(name).or_insert(0) += count;
    }
    let mappers = by_name.into_iter();
    let mappers = mappers.map(|(name, count)| (name, count, "The port mapping refused it."));
    let kinds = gateway.kinds.driver.refused();
    let kinds = kinds.map(|(name, count)| Counter {
        name: format!("kinds_{name}"),
        count,
        meaning: "The check of the NAT's kind refused it.".to_owned(),
    });
    let counters = gateway.counters.iter().chain(refused).chain(mappers);
    let counters = counters.map(|(name, count, meaning)| Counter {
        name: name.to_owned(),
        count,
        meaning: meaning.to_owned(),
    });
    Paths {
        schema: "millrace.paths/1".to_owned(),
        interface: gateway.interface.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        problem: problem(gateway),
        notes: gateway
            .names
            .failures()
            .map(|(name, why)| format!("the STUN server {name} is not found: {why}"))
            .collect(),
        disco_key: finder.map(|finder| base64(finder.disco_key())),
        home_relay: gateway.relays.home().map(|relay| relay.url.clone()),
        relays: gateway.relays.list.iter().map(|r| relay(r, now)).collect(),
        nat: nat(gateway, now),
        peers: gateway.peers.values().map(|peer| peer_path(gateway, peer, now)).collect(),
        counters: counters.chain(kinds).collect(),
    }
}

/// `why PEER`.
pub fn why(gateway: &Gateway, peer: &Peer, now: Instant) -> WhyPeer {
    let report = gateway.finder.as_ref().and_then(|finder| finder.report(now, peer.key));
    let path = peer_path(gateway, peer, now);
    let verdict::Verdict { sentence, advice } = verdict::of(gateway, peer, &path, report.as_ref());
    let mut pairs: Vec<CandidatePair> = Vec::new();
    let mut candidates = Vec::new();
    if let Some(report) = &report {
        pairs.extend(report.paths.iter().map(|path| pair(gateway, report, path, now)));
        candidates.extend(report.candidates.iter().map(candidate_text));
    }
    pairs.sort_by_key(|pair| (!pair.in_use, std::cmp::Reverse(pair.answered)));
    WhyPeer {
        schema: "millrace.why/1".to_owned(),
        peer: path,
        verdict: sentence,
        advice,
        nat: nat(gateway, now),
        peer_nat: report.and_then(|report| report.nat).map(nat_kind),
        peer_relay: peer.home.as_ref().map(|home| home.url.clone()),
        peer_candidates: candidates,
        pairs,
    }
}

/// `ping PEER`; no answer: none came in time.
pub fn pong(gateway: &Gateway, peer: PublicKey, answer: Option<(Route, Duration)>) -> Pong {
    let peer = gateway.peers.get(&peer);
    let route = answer.map(|(route, _)| route).or(peer.map(|peer| peer.route));
    let route = route.unwrap_or(Route::Unset);
    Pong {
        schema: "millrace.pong/1".to_owned(),
        path: if answer.is_some() { kind(route) } else { PathKind::None },
        address: address(route),
        relay: peer.filter(|_| route == Route::Relay).and_then(|peer| relay_of(gateway, peer)),
        rtt_seconds: answer.map(|(_, round_trip)| round_trip.as_secs_f64()),
    }
}

pub(crate) fn problem(gateway: &Gateway) -> Option<String> {
    if let Some(problem) = &gateway.plane_problem {
        return Some(format!("no data plane: {problem}"));
    }
    if gateway.finder.is_none() {
        return Some("the interface has no private key".to_owned());
    }
    if gateway.discovery.relay.is_empty() {
        return Some("no relay is configured, so peers cannot find each other".to_owned());
    }
    if !gateway.relays.list.iter().any(relays::Relay::is_up) {
        return Some("no relay is up".to_owned());
    }
    None
}

fn relay(relay: &relays::Relay, now: Instant) -> Relay {
    let (state, since) = match &relay.state {
        State::Connecting { stage } => (stage.clone(), None),
        State::Up { since, up } => {
            let way = if up.proxied { " through a proxy" } else { "" };
            let tls = up.tls.as_deref().unwrap_or("without TLS");
            (format!("up at {}{way}, {tls}", up.address), Some(*since))
        }
        State::Down { why, retry_at } => {
            let left = retry_at.since(now).as_secs_f64();
            (format!("{why}; tried again in {left:.1} s"), None)
        }
    };
    let (counts, dropped) = (relay.client.counts(), relay.client.dropped());
    Relay {
        url: relay.url.clone(),
        up: relay.is_up(),
        state,
        trust: trust(relay.client.config()),
        key_pinned: relay.client.config().relay_key.is_some(),
        since_seconds: since.map(|since| seconds(now, since)),
        rtt_seconds: relay.client.round_trip().map(|rtt| rtt.as_secs_f64()),
        health: relay.health.clone(),
        sent_bytes: counts.sent_bytes,
        received_bytes: counts.received_bytes,
        dropped_packets: dropped.total(),
    }
}

fn trust(config: &RelayConfig) -> paths::Trust {
    match &config.trust {
        _ if !config.url.tls => paths::Trust::None,
        Trust::Pinned(_) => paths::Trust::Pinned,
        Trust::Authorities(Authorities::System) => paths::Trust::System,
        Trust::Authorities(Authorities::File(_)) => paths::Trust::File,
        Trust::Authorities(Authorities::Both(_)) => paths::Trust::SystemOrFile,
    }
}

fn nat(gateway: &Gateway, now: Instant) -> Nat {
    let known = gateway.nat();
    let port = gateway.welcome.as_ref().map_or(0, |welcome| welcome.listen_port);
    Nat {
        seen: gateway.seen.addresses.iter().map(|address| address.to_string()).collect(),
        mapping_varies: known.is_hard(),
        kind: nat_kind(known),
        filtering_unknown: gateway.filtering_unknown(now).map(str::to_owned),
        port_mapping: gateway.routers.mapped.first().map(|mapped| {
            let beyond = if mapped.behind_nat { ", another NAT is outside" } else { "" };
            format!("{:?} {}{beyond}", mapped.protocol, mapped.external)
        }),
        candidates: gateway.candidates(port).iter().map(candidate_text).collect(),
    }
}

fn nat_kind(nat: nat::Nat) -> NatKind {
    let word = |filtering: Option<nat::Filtering>| filtering.map(|f| f.word().to_owned());
    NatKind {
        mapping: nat.mapping.map(|mapping| mapping.word().to_owned()),
        filtering: word(nat.filtering),
        filtering_ipv6: word(nat.filtering_ipv6),
        port_preserved: nat.port_preserved,
    }
}

fn peer_path(gateway: &Gateway, peer: &Peer, now: Instant) -> PeerPath {
    let report = gateway.finder.as_ref().and_then(|finder| finder.report(now, peer.key));
    let used = report.as_ref().and_then(|report| {
        let Route::Direct { pair, .. } = report.route else { return None };
        report.paths.iter().find(|path| path.pair == pair)
    });
    let relay = (peer.route == Route::Relay).then(|| relay_of(gateway, peer)).flatten();
    let path = match kind(peer.route) {
        PathKind::Relay if relay.is_none() => PathKind::None,
        kind => kind,
    };
    let relay_rtt = relay.as_ref().and_then(|url| {
        let at = gateway.relays.position(url)?;
        gateway.relays.list[at].client.round_trip()
    });
    let tunnel_mtu = gateway.welcome.as_ref().map_or(0, |welcome| usize::from(welcome.mtu));
    let mtu = match peer.route {
        Route::Direct { frame_len, .. } if frame_len > 0 => {
            Some(frame_len.saturating_sub(OVERHEAD).min(tunnel_mtu))
        }
        _ => None,
    };
    let handshake_ns = peer.traffic.line().handshake_ns;
    let change = |change: &crate::gateway::Change| PathChange {
        age_seconds: seconds(now, change.at),
        path: route_text(change.route),
        reason: why_text(change.why).to_owned(),
    };
    PeerPath {
        public_key: base64(peer.key),
        path,
        address: address(peer.route),
        relay,
        since_seconds: seconds(now, peer.since),
        reason: peer.history.back().map_or("", |change| why_text(change.why)).to_owned(),
        introduced: report.as_ref().is_some_and(|report| report.disco_key.is_some()),
        idle: report.as_ref().is_none_or(|report| !report.active),
        rtt_seconds: used
            .and_then(|path| path.round_trip)
            .or(relay_rtt.filter(|_| used.is_none()))
            .map(|rtt| rtt.as_secs_f64()),
        loss_ratio: used
            .filter(|path| path.sent > 0)
            .map(|path| 1.0 - path.answered.min(path.sent) as f64 / path.sent as f64),
        mtu,
        shortened: mtu.is_some_and(|mtu| mtu < tunnel_mtu),
        handshake_age_seconds: (handshake_ns > 0)
            .then(|| seconds(now, Instant::from_nanos(handshake_ns))),
        relayed_sent_bytes: peer.relayed_sent_bytes,
        relayed_received_bytes: peer.relayed_received_bytes,
        history: peer.history.iter().map(change).collect(),
    }
}

fn pair(gateway: &Gateway, report: &Report, path: &PathReport, now: Instant) -> CandidatePair {
    let remote = path.pair.remote;
    let kind = report.candidates.iter().find(|candidate| candidate.address == remote);
    let in_use = matches!(report.route, Route::Direct { pair, .. } if pair == path.pair);
    let (state, meaning) = state_text(path.state);
    CandidatePair {
        from: uplink_name(gateway, path.pair.uplink),
        to: remote.to_string(),
        kind: kind.map_or("no longer named", |candidate| kind_text(candidate.kind)).to_owned(),
        in_use,
        state: state.to_owned(),
        meaning: meaning.to_owned(),
        sent: path.sent,
        answered: path.answered,
        asked_age_seconds: path.asked_at.map(|at| seconds(now, at)),
        rtt_seconds: path.round_trip.map(|rtt| rtt.as_secs_f64()),
    }
}

fn relay_of(gateway: &Gateway, peer: &Peer) -> Option<String> {
    let home = peer.home.as_ref().map(|home| home.url.as_str());
    let relay = &gateway.relays.list[gateway.relays.of_peer(home, peer.heard_at)?];
    relay.is_up().then(|| relay.url.clone())
}

fn uplink_name(gateway: &Gateway, uplink: UplinkId) -> String {
    let ways = gateway.network.ways();
    let ifindex = ways.iter().find(|(id, _)| *id == uplink).map_or(0, |(_, way)| way.ifindex);
    let link = gateway.network.links.get(&ifindex);
    link.map_or_else(|| "any".to_owned(), |link| link.name.clone())
}

fn kind(route: Route) -> PathKind {
    match route {
        Route::Unset => PathKind::Plain,
        Route::Relay => PathKind::Relay,
        Route::Direct { .. } => PathKind::Direct,
    }
}

fn address(route: Route) -> Option<String> {
    match route {
        Route::Direct { pair, .. } => Some(pair.remote.to_string()),
        _ => None,
    }
}

fn route_text(route: Route) -> String {
    match route {
        Route::Unset => "plain WireGuard".to_owned(),
        Route::Relay => "relay".to_owned(),
        Route::Direct { pair, .. } => format!("direct {}", pair.remote),
    }
}

fn candidate_text(candidate: &Candidate) -> String {
    format!("{} ({})", candidate.address, kind_text(candidate.kind))
}

fn kind_text(kind: CandidateKind) -> &'static str {
    match kind {
        CandidateKind::PeerReflexive => "its ping came from there",
        CandidateKind::Configured => "configured",
        CandidateKind::PortMapped => "port mapping",
        CandidateKind::Interface => "interface",
        CandidateKind::Reflexive => "STUN",
        CandidateKind::ReflexiveLocalPort => "STUN with the local port",
        CandidateKind::Other => "named by the peer",
    }
}

fn state_text(state: PathState) -> (&'static str, &'static str) {
    match state {
        PathState::Works => ("works", "answers, long packets too"),
        PathState::Unproven => ("unproven", "answers; long packets are being tried"),
        PathState::LosesLongFrames => {
            ("loses_long_frames", "answers, but not to packets of 1280 bytes")
        }
        PathState::OneWay => ("one_way", "the peer's pings arrive, ours are not answered"),
        PathState::Silent => ("silent", "answered before and does not any more"),
        PathState::NeverAnswered => ("never_answered", "never answered: filtered, or not there"),
        PathState::Quarantined => ("quarantined", "not used for a while: it died, or lost data"),
    }
}

fn why_text(why: Why) -> &'static str {
    match why {
        Why::First => "nothing better is known yet",
        Why::Introduced => "the peer introduced itself",
        Why::Proven => "the path answered and carried long packets",
        Why::Better => "it is clearly better than the one before",
        Why::FrameLen => "it is better known which packets it carries",
        Why::Dead => "the path before did not answer any more",
        Why::DataLost => "the path before lost data or long packets",
        Why::Withdrawn => "the address or interface before is gone",
        Why::PeerGone => "the relay does not have the peer; the path before is the better hope",
    }
}

fn seconds(now: Instant, at: Instant) -> f64 {
    now.since(at).as_secs_f64()
}

fn base64(key: PublicKey) -> String {
    millrace_config::PublicKey(key.0).to_base64()
}
