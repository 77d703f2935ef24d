//! Pings that somebody asked for: along the path that the tunnel takes now, the relay included.

use super::{Context, Peer};
use crate::disco::{self, Message};
use crate::limits::{PING_TIMEOUT, QUESTIONS_MAX};
use crate::output::{Event, Refused, Route, Transmit};
use crate::time::Instant;
use crate::transaction::TransactionId;

/// A ping that somebody waits for.
pub(super) struct Question {
    transaction: TransactionId,
    number: u32,
    sent_at: Instant,
    route: Route,
}

impl Peer {
    /// Sends it; the answer is [`Event::Pinged`]. False if it cannot be: the peer has not introduced
    /// itself, or too many are on their way.
    pub(crate) fn ask(&mut self, context: &mut Context<'_>, number: u32) -> bool {
        let now = context.now;
        self.questions.retain(|question| now.since(question.sent_at) < PING_TIMEOUT);
        if self.questions.len() == QUESTIONS_MAX {
            return false;
        }
        let route = self.route;
        let transaction = match route {
            Route::Direct { pair, .. } => self.send_ping(context, pair, disco::PING_LEN),
            Route::Relay => self.ping_through_relay(context),
            Route::Unset => None,
        };
        let Some(transaction) = transaction else { return false };
        self.questions.push(Question { transaction, number, sent_at: now, route });
        true
    }

    /// A pong that arrived anywhere, if it is the answer to a question.
    pub(super) fn answered(
        &mut self,
        context: &mut Context<'_>,
        transaction: TransactionId,
    ) -> bool {
        let at = self.questions.iter().position(|asked| asked.transaction == transaction);
        let Some(at) = at else { return false };
        let Question { number, sent_at, route, .. } = self.questions.remove(at);
        let (peer, round_trip) = (self.key, context.now.since(sent_at));
        context.event(Event::Pinged { peer, number, route, round_trip });
        true
    }

    /// A ping through the relay says nothing of paths; it is answered the way it came.
    pub(crate) fn relayed_ping(
        &mut self,
        context: &mut Context<'_>,
        transaction: TransactionId,
    ) -> Result<(), Refused> {
        self.fresh_ping(context.now, transaction)?;
        let source = context.own.relay_address();
        let pong = Message::Pong { transaction, source, received_age_ms: None };
        self.send_through_relay(context, &pong);
        Ok(())
    }

    pub(crate) fn relayed_pong(
        &mut self,
        context: &mut Context<'_>,
        transaction: TransactionId,
    ) -> Result<(), Refused> {
        self.answered(context, transaction).then_some(()).ok_or(Refused::PongUnmatched)
    }

    fn ping_through_relay(&mut self, context: &mut Context<'_>) -> Option<TransactionId> {
        let transaction = TransactionId(context.random());
        let message = Message::ping_of_len(transaction, context.own.node_key, disco::PING_LEN);
        self.send_through_relay(context, &message).then_some(transaction)
    }

    fn send_through_relay(&mut self, context: &mut Context<'_>, message: &Message) -> bool {
        let Some(packet) = self.sealed(context, message) else { return false };
        context.transmit(Transmit::Relay { peer: self.key, packet });
        true
    }
}
