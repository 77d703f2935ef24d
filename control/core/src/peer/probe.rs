//! Pings: to keep a path alive, to see whether it is, to prove how long its frames may be.

use super::{Context, Peer};
use crate::disco::{self, Message};
use crate::limits::{FORGET_TIME, PATHS_MAX, PINGS_OUTSTANDING_MAX};
use crate::output::{Route, Transmit};
use crate::path::{Pair, Path};
use crate::time::Instant;
use crate::transaction::TransactionId;

/// A ping of ours on its way.
pub(super) struct Ping {
    pub(super) transaction: TransactionId,
    pub(super) pair: Pair,
    pub(super) sent_at: Instant,
    pub(super) len: usize,
}

impl Peer {
    pub(super) fn heartbeats(&mut self, context: &mut Context<'_>) {
        for (pair, interval) in self.watched(context) {
            let due = self.paths.get(&pair).and_then(|path| path.ping_due_at(interval));
            if due.is_none_or(|at| at <= context.now) {
                self.send_ping(context, pair, disco::PING_LEN);
            }
        }
        if let Route::Direct { pair, .. } = self.route
            && self.is_active(context.now)
            && let Some(path) = self.paths.get_mut(&pair)
        {
            path.recheck(context.now);
        }
    }

    pub(super) fn prove_frames(&mut self, context: &mut Context<'_>) {
        let (now, full_len) = (context.now, context.own.frame_len);
        let due =
            self.paths.values_mut().filter(|path| path.proof_at().is_some_and(|at| at <= now));
        let due = due.map(|path| (path.pair, path.next_proof(now, full_len))).collect::<Vec<_>>();
        for (pair, lens) in due {
            for len in lens {
                self.send_ping(context, pair, len);
            }
        }
    }

    /// Its transaction, if it was sent.
    pub(super) fn send_ping(
        &mut self,
        context: &mut Context<'_>,
        pair: Pair,
        len: usize,
    ) -> Option<TransactionId> {
        let transaction = TransactionId(context.random());
        let message = Message::ping_of_len(transaction, context.own.node_key, len);
        let proof = len > disco::PING_LEN;
        if !self.send(context, pair, &message, proof) {
            return None;
        }
        if self.pings.len() == PINGS_OUTSTANDING_MAX {
            self.pings.pop_front();
        }
        self.pings.push_back(Ping { transaction, pair, sent_at: context.now, len });
        if !self.paths.contains_key(&pair) && self.paths.len() >= PATHS_MAX {
            // The one that was silent for longest makes room.
            let silent = self.paths.values().min_by_key(|path| (path.pong_at, path.ping_at));
            if let Some(pair) = silent.map(|path| path.pair) {
                self.paths.remove(&pair);
            }
        }
        let path = self.paths.entry(pair).or_insert_with(|| Path::new(pair));
        path.sent += 1;
        if !proof {
            path.pinged(context.now);
        }
        Some(transaction)
    }

    /// False if the peer has not introduced itself, so that nothing can be sealed.
    pub(super) fn send(
        &mut self,
        context: &mut Context<'_>,
        pair: Pair,
        message: &Message,
        dont_fragment: bool,
    ) -> bool {
        let Some(datagram) = self.sealed(context, message) else { return false };
        context.transmit(Transmit::Udp { pair, datagram, dont_fragment });
        true
    }

    pub(super) fn sealed(&self, context: &mut Context<'_>, message: &Message) -> Option<Vec<u8>> {
        let (_, key) = self.disco.as_ref()?;
        Some(disco::seal(message, context.own.disco_key, context.random(), key))
    }

    pub(super) fn forget_paths(&mut self, now: Instant) {
        let used = match self.route {
            Route::Direct { pair, .. } => Some(pair),
            _ => None,
        };
        self.paths.retain(|pair, path| {
            let last = path.pong_at.max(path.ping_at);
            Some(*pair) == used || last.is_none_or(|at| now.since(at) < FORGET_TIME)
        });
    }
}
