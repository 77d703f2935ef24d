//! Why a peer is reached as it is, in a sentence, and the one change that would help.

use std::net::IpAddr;

use millrace_config::paths::{PathKind, PeerPath};
use millrace_path::candidate::CandidateKind;
use millrace_path::finder::{PathState, Report};
use millrace_path::nat::{Filtering, Mapping, Nat};

use crate::answers::problem;
use crate::gateway::{Gateway, Peer};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) sentence: String,
    /// Empty: nothing need be changed.
    pub(crate) advice: String,
}

/// What `why` says of a peer.
pub(crate) fn of(
    gateway: &Gateway,
    peer: &Peer,
    path: &PeerPath,
    report: Option<&Report>,
) -> Verdict {
    if let Some(problem) = problem(gateway) {
        return say(&format!("Paths cannot be found: {problem}."), "");
    }
    if let Some(problem) = peer.problem {
        return say(&format!("The peer cannot be asked: {problem}."), "");
    }
    let Some(report) = report else {
        return say("The data plane was not asked for the peer's key yet.", "");
    };
    match path.path {
        PathKind::Direct if path.shortened => {
            let advice =
                "Senders are told how long packets may be; an MTU as small saves them that.";
            say("Direct, for shorter packets than the tunnel's longest.", advice)
        }
        PathKind::Direct => say("Direct: a proven path is in use.", ""),
        PathKind::Plain => say(
            "The peer never introduced itself: it is reached as plain WireGuard does.",
            "If it runs millrace, give both sides a relay that both can reach.",
        ),
        PathKind::None => {
            say("No relay leads to the peer.", "See the relays in `millrace status`.")
        }
        PathKind::Relay => of_relayed(gateway, report),
    }
}

fn of_relayed(gateway: &Gateway, report: &Report) -> Verdict {
    let any = |state| report.paths.iter().any(|path| path.state == state);
    if report.disco_key.is_none() {
        return say(
            "The peer has not introduced itself: nobody answers at the relay.",
            "Check that its control process runs and that it uses the same relay.",
        );
    }
    if gateway.seen.addresses.is_empty() && report.paths.iter().all(|path| path.answered == 0) {
        return say(
            "No STUN server answers: UDP from here is blocked.",
            "Let UDP out from the tunnel's port.",
        );
    }
    if any(PathState::LosesLongFrames) {
        return say(
            "Short pings pass and frames as long as the tunnel's do not.",
            "Lower the MTU of the tunnel on both sides.",
        );
    }
    if any(PathState::Unproven) {
        return say("A path just answered and is being proven.", "");
    }
    if any(PathState::Quarantined) {
        return say("The path died too often and rests for a while.", "");
    }
    if any(PathState::OneWay) {
        return say(
            "The peer's pings arrive and ours do not: something on its side lets none in.",
            "Open the tunnel's UDP port in the peer's firewall.",
        );
    }
    if !report.active {
        return say("There is no traffic, so no path is searched for.", "Send something.");
    }
    if is_behind_same_nat(gateway, report) {
        return say(
            "Both sides are seen at the same address, and their NAT does not lead from inside to \
             itself (no hairpin).",
            "Turn on hairpin (NAT loopback) on that router, or give both sides IPv6.",
        );
    }
    of_nats(gateway.nat(), report.nat.unwrap_or_default())
}

/// Why two NATs, of which nothing answers, let no direct path be.
fn of_nats(ours: Nat, theirs: Nat) -> Verdict {
    match (ours.is_hard(), theirs.is_hard()) {
        (Some(true), Some(true)) => say(
            "Both NATs map anew for each destination: there is no direct path without a port \
             mapping or IPv6.",
            "Turn on endpoint-independent mapping, PCP, NAT-PMP or UPnP on one of the two routers, \
             or forward the tunnel's UDP port there.",
        ),
        (Some(true), known) => say(
            &format!(
                "Our NAT maps anew for each destination, and {}.",
                one_of_two("the peer's", known, theirs.filtering)
            ),
            "Open or map the tunnel's UDP port on the peer's side, or turn on endpoint-independent \
             mapping on our router.",
        ),
        (known, Some(true)) => say(
            &format!(
                "The peer's NAT maps anew for each destination, and {}.",
                one_of_two("ours", known, ours.filtering)
            ),
            "Open or map the tunnel's UDP port on our side, or turn on endpoint-independent \
             mapping on the peer's router.",
        ),
        (Some(false), Some(false)) => say(
            "Both NATs are easy, and no candidate of the peer answers: a firewall on the way or on \
             one of the hosts lets nothing in.",
            "Let UDP in to the tunnel's port on both hosts, and out to any port.",
        ),
        _ => say(
            "No candidate of the peer answers: its NAT or firewall lets nothing in.",
            "Open or map the tunnel's UDP port on one of the two sides.",
        ),
    }
}

/// What the NAT that faces a hard one does about it.
fn one_of_two(whose: &str, is_hard: Option<bool>, filtering: Option<Filtering>) -> String {
    match (is_hard, filtering) {
        (_, Some(Filtering::AddressAndPortDependent)) => {
            format!("{whose} lets in only the very port that it wrote to")
        }
        (_, Some(Filtering::AddressDependent)) => {
            format!("{whose}, which filters by address only, still gets no answer")
        }
        (_, Some(Filtering::EndpointIndependent)) => {
            format!(
                "{whose}, which lets everybody in, still gets no answer: a firewall is behind it"
            )
        }
        (None, None) => format!("of {whose} it is not known what it does"),
        (_, None) => format!("{whose} lets nothing in"),
    }
}

/// Whether the peer says that it is seen where we are, and neither can be told so by a router.
fn is_behind_same_nat(gateway: &Gateway, report: &Report) -> bool {
    let named = report.candidates.iter().filter(|c| c.kind == CandidateKind::Reflexive);
    let mut named = named.map(|candidate| candidate.address.ip()).filter(IpAddr::is_ipv4);
    let ours = |ip: IpAddr| gateway.seen.addresses.iter().any(|seen| seen.ip() == ip);
    named.any(ours) && gateway.nat().mapping != Some(Mapping::None)
}

fn say(sentence: &str, advice: &str) -> Verdict {
    Verdict { sentence: sentence.to_owned(), advice: advice.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nat(mapping: Mapping, filtering: Filtering) -> Nat {
        Nat { mapping: Some(mapping), filtering: Some(filtering), ..Nat::default() }
    }

    #[test]
    fn the_sentence_names_what_both_nats_do() {
        use {Filtering as F, Mapping as M};
        let easy = nat(M::EndpointIndependent, F::AddressAndPortDependent);
        let hard = nat(M::AddressAndPortDependent, F::AddressAndPortDependent);
        let part = |ours, theirs, part: &str| {
            let Verdict { sentence, advice } = of_nats(ours, theirs);
            assert!(sentence.contains(part) && sentence.ends_with('.'), "{part:?} in {sentence}");
            assert!(!advice.is_empty());
        };
        part(hard, hard, "Both NATs map anew for each destination");
        part(easy, easy, "Both NATs are easy");
        part(hard, easy, "Our NAT maps anew for each destination, and the peer's lets in only the");
        part(
            easy,
            hard,
            "The peer's NAT maps anew for each destination, and ours lets in only the",
        );
        part(hard, Nat::default(), "of the peer's it is not known");
        part(Nat::default(), hard, "of ours it is not known");
        part(Nat::default(), Nat::default(), "lets nothing in");
        part(hard, nat(M::EndpointIndependent, F::EndpointIndependent), "lets everybody in");
    }
}
