//! What is broken on purpose, in a core or in the world around it, so that it shows that the check
//! for it can fail.

use std::net::SocketAddr;

use super::World;

/// One fault, and the check that must find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Pings never arrive: nobody meets.
    Deaf,
    /// NATs let in whatever comes: who cannot meet meets.
    OpenNats,
    /// Every twenty seconds nothing passes for two: paths come and go.
    Flapping,
    /// The same for the tunnel's packets only, which have a gap.
    Gaps,
    /// Every probe goes out four times, all the time.
    ProbesTooMany,
    /// Every probe goes out a hundred times.
    ProbeStorm,
    /// Five messages for one through the relay.
    SignalStorm,
    /// The core wants to be woken every millisecond.
    RestlessTimer,
    /// The core wants to be woken in the past.
    TimerInThePast,
    /// The core never stops having something to do.
    Endless,
    /// The core says nothing of a change of its route.
    EventLost,
    /// A relay carries two copies.
    RelayTwice,
    /// A message to the relay has an address in it.
    Plaintext,
    /// A probe goes to the core's own address.
    ToItself,
    /// A probe goes into the tunnel.
    IntoTunnel,
    /// A probe goes to the loopback interface.
    ToLoopback,
    /// A datagram has its own source as destination.
    Land,
    /// A restart forgets the path in use.
    PathForgotten,
}

impl Sabotage {
    /// Each, and a part of what the check says.
    pub const ALL: [(Self, &str); 18] = [
        (Self::Deaf, "at the start"),
        (Self::OpenNats, "at the start"),
        (Self::Flapping, "changes of a quiet path"),
        (Self::Gaps, "quiet: nothing from"),
        (Self::ProbesTooMany, "datagrams a second"),
        (Self::ProbeStorm, "datagrams in a second"),
        (Self::SignalStorm, "messages through the relay in"),
        (Self::RestlessTimer, "timeouts in a second"),
        (Self::TimerInThePast, "is due again at once"),
        (Self::Endless, "does not come to an end"),
        (Self::EventLost, "events say what is"),
        (Self::RelayTwice, "two copies through the relay"),
        (Self::Plaintext, "in the clear"),
        (Self::ToItself, "sent to itself"),
        (Self::IntoTunnel, "sent into the tunnel"),
        (Self::ToLoopback, "sent to nobody"),
        (Self::Land, "its own source as destination"),
        (Self::PathForgotten, "moved by a restart"),
    ];
}

impl World {
    /// How often something is done: once, unless it is broken in this way.
    pub(super) fn times(&self, sabotage: Sabotage, broken: usize) -> usize {
        if self.sabotage == Some(sabotage) { broken } else { 1 }
    }

    pub(super) fn is(&self, sabotage: Sabotage) -> bool {
        self.sabotage == Some(sabotage)
    }

    /// Where a probe goes that is broken in one of these ways.
    pub(super) fn diverted(&self, at: usize, to: SocketAddr) -> SocketAddr {
        let port = to.port();
        match self.sabotage {
            Some(Sabotage::ToItself) => self.gateways[at].legs[0].socket,
            Some(Sabotage::IntoTunnel) => SocketAddr::from(([10, 99, 0, 1], port)),
            Some(Sabotage::ToLoopback) => SocketAddr::from(([127, 0, 0, 1], port)),
            _ => to,
        }
    }

    /// Two seconds of twenty, from the tenth on.
    pub(super) fn is_interrupted(&self) -> bool {
        let second = self.now.as_nanos() / 1_000_000_000 % 20;
        (10..12).contains(&second)
    }
}
