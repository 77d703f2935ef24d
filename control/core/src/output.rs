//! What the path finder asks of its driver and tells it.

use std::net::SocketAddr;
use std::time::Duration;

use crate::introduce::Home;
use crate::path::Pair;
use crate::sealed::PublicKey;
use crate::time::Instant;

/// One thing to do. The driver takes them until there are none, then waits for the next input or
/// for the last timeout that it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Transmit(Transmit),
    Event(Event),
    /// Call `handle` with [`crate::finder::Input::Timeout`] at this instant, for this reason.
    Timeout(Instant, Reason),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// From the tunnel's own port. `dont_fragment`: the frame proves a length.
    Udp { pair: Pair, datagram: Vec<u8>, dont_fragment: bool },
    /// Through the relay of this peer.
    Relay { peer: PublicKey, packet: Vec<u8> },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Where the peer's tunnel packets go from now on.
    Route { peer: PublicKey, route: Route, why: Why },
    /// A peer introduced itself, or moved: it is one of ours, at this home relay. `has_session`: it
    /// may send with a session that our data plane has lost.
    Introduced { peer: PublicKey, home: Home, has_session: bool },
    /// Where the peer sees us; news for the own candidates and for the NAT's classification.
    SeenAt { peer: PublicKey, pair: Pair, address: SocketAddr },
    /// The answer to [`crate::finder::Input::Ping`], along the route of that moment.
    Pinged { peer: PublicKey, number: u32, route: Route, round_trip: Duration },
    /// The path in use does not answer, yet: ask STUN servers whether we are still where we were.
    Suspected { peer: PublicKey },
    /// It could not be sent: the peer has not introduced itself, or too many are on their way.
    NotPinged { peer: PublicKey, number: u32 },
}

/// Where tunnel packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// As plain WireGuard decides: nobody introduced itself there.
    Unset,
    Relay,
    /// `frame_len` is the longest UDP payload proven to pass; 0 until the first proof on a path
    /// that was taken over.
    Direct {
        pair: Pair,
        frame_len: usize,
    },
}

/// Why a route changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No better way is known yet.
    First,
    /// The peer is one of ours.
    Introduced,
    /// A path answered and carried long frames.
    Proven,
    /// Among those that answered, this one is clearly better.
    Better,
    /// The same path; which frames it carries is now known better.
    FrameLen,
    /// Pings on the path before were not answered any more.
    Dead,
    /// Pings were answered; data, or frames as long as it, was not.
    DataLost,
    /// The uplink or the address is not there any more.
    Withdrawn,
    /// The relay says that the peer is not there: the path before is the better hope, although
    /// nobody answers its pings.
    PeerGone,
}

/// What a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Ping the path in use, or one that stands by.
    Heartbeat,
    /// A ping is overdue: ask faster.
    Suspicion,
    /// The path is dead unless it answers by then.
    Death,
    /// Send long frames.
    FrameProof,
    /// Choose among the paths that answered.
    Settle,
    /// The next pings of a search, or the next search.
    Search,
    /// Probes wait for their budget.
    Budget,
    /// Write to the peer through the relay.
    Introduce,
    /// Forget what is long past.
    Expiry,
}

/// Why something that arrived, or that was to be sent, was not used. Each is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Refused {
    NotDisco,
    UnknownDiscoKey,
    DiscoForged,
    DiscoShort,
    DiscoUnknownType,
    PingReplayed,
    PingOverBudget,
    PingIntoHole,
    PongUnmatched,
    PongFromElsewhere,
    RelayUnknownPeer,
    CallMeMaybeByUdp,
    IntroduceForged,
    IntroduceMalformed,
    IntroduceVersion,
    IntroduceReplayed,
    NeverProbed,
}

impl Refused {
    /// Each with its name in counters.
    pub const ALL: [(Self, &'static str); 17] = [
        (Self::NotDisco, "not_disco"),
        (Self::UnknownDiscoKey, "unknown_disco_key"),
        (Self::DiscoForged, "disco_forged"),
        (Self::DiscoShort, "disco_short"),
        (Self::DiscoUnknownType, "disco_unknown_type"),
        (Self::PingReplayed, "ping_replayed"),
        (Self::PingOverBudget, "ping_over_budget"),
        (Self::PingIntoHole, "ping_into_hole"),
        (Self::PongUnmatched, "pong_unmatched"),
        (Self::PongFromElsewhere, "pong_from_elsewhere"),
        (Self::RelayUnknownPeer, "relay_unknown_peer"),
        (Self::CallMeMaybeByUdp, "call_me_maybe_by_udp"),
        (Self::IntroduceForged, "introduce_forged"),
        (Self::IntroduceMalformed, "introduce_malformed"),
        (Self::IntroduceVersion, "introduce_version"),
        (Self::IntroduceReplayed, "introduce_replayed"),
        (Self::NeverProbed, "never_probed"),
    ];
}
