//! One question by STUN: asked a few times, answered by who was asked or by nobody.

use std::net::SocketAddr;
use std::time::Duration;

use crate::limits::{
    FILTERED_TIME, STUN_GAP, STUN_GAP_AGAIN, STUN_GAP_STEP, STUN_TIME, STUN_TRIES, STUN_TRIES_HOME,
};
use crate::netcheck::{Reason, Socket};
use crate::stun::Ask;
use crate::time::Instant;
use crate::transaction::TransactionId;

/// What an answer will tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Round trip to a server, and our address as it sees it.
    Server {
        index: usize,
    },
    /// Our address as the server's other address sees it: at the same port, at the other port.
    OtherAddress,
    OtherAddressAndPort,
    /// Opens the NAT for one server on a socket that talks to nobody else; then whether its other
    /// addresses get in.
    FilterOpen,
    FilterAddressAndPort,
    FilterPort,
    /// The address of a second socket, for the hairpin.
    Neighbour,
    /// Makes a mapping; asks much later whether it is still there.
    LifetimeOpen {
        step: u8,
    },
    LifetimeAsk {
        step: u8,
    },
}

/// How a question ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered {
        mapped: SocketAddr,
        other: Option<SocketAddr>,
        rtt: Duration,
    },
    Silent,
    /// The server cannot do what it was asked for.
    Unable,
}

/// How often and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    tries: usize,
    gap: Duration,
    gap_step: Duration,
    patience: Duration,
}

impl Plan {
    pub(super) const FIRST: Self =
        Self { tries: STUN_TRIES, gap: STUN_GAP, gap_step: Duration::ZERO, patience: STUN_TIME };
    pub(super) const AGAIN: Self =
        Self { gap: STUN_GAP_AGAIN, gap_step: STUN_GAP_STEP, ..Self::FIRST };
    pub(super) const HOME: Self = Self { tries: STUN_TRIES_HOME, ..Self::AGAIN };
    /// For questions to which silence is an answer.
    pub(super) const FILTERED: Self =
        Self { gap: STUN_GAP_AGAIN, patience: FILTERED_TIME, ..Self::FIRST };
}

#[derive(Clone, Debug)]
pub(super) struct Probe {
    pub(super) purpose: Purpose,
    pub(super) ask: Ask,
    pub(super) socket: Socket,
    /// Where the answer is to arrive.
    pub(super) heard_on: Socket,
    pub(super) to: SocketAddr,
    /// Who is to answer.
    pub(super) from: SocketAddr,
    pub(super) outcome: Option<Outcome>,
    plan: Plan,
    start: Instant,
    sent: Vec<(TransactionId, Instant)>,
}

impl Probe {
    /// Asks for nothing special, from `socket`, at once.
    pub(super) fn new(purpose: Purpose, socket: Socket, to: SocketAddr, now: Instant) -> Self {
        Self {
            purpose,
            ask: Ask::Plain,
            socket,
            heard_on: socket,
            to,
            from: to,
            outcome: None,
            plan: Plan::FIRST,
            start: now,
            sent: Vec::new(),
        }
    }

    pub(super) fn with_plan(self, plan: Plan) -> Self {
        Self { plan, ..self }
    }

    /// Asks for an answer from `from`, and for nothing where silence says as much.
    pub(super) fn answered_from(self, ask: Ask, from: SocketAddr) -> Self {
        Self { ask, from, plan: Plan::FILTERED, ..self }
    }

    /// Asks at `start` for an answer to another socket's port.
    pub(super) fn answered_to(self, port: u16, heard_on: Socket, start: Instant) -> Self {
        Self { ask: Ask::ToPort(port), heard_on, start, plan: Plan::FILTERED, ..self }
    }

    /// What is due next, and why; none once it ended.
    pub(super) fn deadline(&self) -> Option<(Instant, Reason)> {
        if self.outcome.is_some() {
            return None;
        }
        let Some((_, last)) = self.sent.last() else { return Some((self.start, Reason::Ask)) };
        if self.sent.len() >= self.plan.tries {
            return Some((self.start + self.plan.patience, Reason::Silence));
        }
        let steps = u32::try_from(self.sent.len() - 1).unwrap_or(u32::MAX);
        Some((*last + self.plan.gap + self.plan.gap_step * steps, Reason::Ask))
    }

    /// It is asked once more under this transaction.
    pub(super) fn sent(&mut self, transaction: TransactionId, now: Instant) {
        if self.sent.is_empty() {
            // A late driver must not take the answer's time.
            self.start = now;
        }
        self.sent.push((transaction, now));
    }

    /// When it was asked under this transaction.
    pub(super) fn asked_at(&self, transaction: TransactionId) -> Option<Instant> {
        self.sent.iter().find(|(sent, _)| *sent == transaction).map(|(_, at)| *at)
    }

    pub(super) fn mapped(&self) -> Option<SocketAddr> {
        match self.outcome {
            Some(Outcome::Answered { mapped, .. }) => Some(mapped),
            _ => None,
        }
    }
}
