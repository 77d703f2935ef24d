//! What the data plane tells of the tunnel's own packets: whether data arrives where pings do.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use super::{Context, Peer};
use crate::limits::{
    DATA_SILENCE_MAX, REPORT_AGE_MAX, SENT_REMEMBERED, SILENCES_APART_MAX, SILENCES_MAX,
    TALK_INTERVAL_MAX, VANISHED_LOOKS,
};
use crate::output::{Route, Why};
use crate::path::Pair;
use crate::time::Instant;

/// The tunnel's packets, as seen by looking at their counters now and then.
#[derive(Default)]
pub(super) struct Tunnel {
    /// From where the last packet came without a relay, and when.
    pub(super) received_directly: Option<(SocketAddr, Instant)>,
    /// When the last packet came, whichever way.
    received_at: Option<Instant>,
    /// Looks that saw data leave, the newest last.
    sent: VecDeque<Instant>,
    /// Packets come soon one after the other: the peer does not only acknowledge.
    talks: bool,
    /// Data sent since then was not answered in time, as seen then.
    silence: Option<Silence>,
}

/// Times in a row in which data had no answer.
#[derive(Clone, Copy)]
struct Silence {
    /// The last one.
    since: Instant,
    seen_at: Instant,
    count: u32,
}

impl Peer {
    /// A look saw data leave for the peer.
    pub(crate) fn sent(&mut self, now: Instant) {
        let sent = &mut self.tunnel.sent;
        if sent.len() == SENT_REMEMBERED {
            sent.pop_front();
        }
        sent.push_back(now);
    }

    /// When an authenticated packet last came from the peer.
    pub(crate) fn received(&mut self, at: Option<Instant>) {
        self.tunnel.received_at = at;
    }

    /// What the peer is told of that, in ms.
    pub(super) fn received_age_ms(&self, now: Instant) -> Option<u32> {
        let age = now.since(self.tunnel.received_at?);
        Some(u32::try_from(age.as_millis()).unwrap_or(u32::MAX))
    }

    /// Where the tunnel's packets come from. A place that is new says that the peer may have lost
    /// the one before, as every WireGuard would take it; pings find out.
    pub(crate) fn received_directly(
        &mut self,
        context: &mut Context<'_>,
        from: SocketAddr,
        at: Instant,
    ) {
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        let before = self.tunnel.received_directly.replace((from, at));
        let Some((place, before)) = before else { return };
        let apart = at.since(before);
        // A silence says nothing of what the peer would have sent.
        if !apart.is_zero() && apart < DATA_SILENCE_MAX {
            self.tunnel.talks = apart < TALK_INTERVAL_MAX;
        }
        if place != from {
            self.doubt_for(context, from);
        }
    }

    /// What the data plane saw last: data sent since when without anything authenticated back.
    pub(crate) fn unanswered_data(&mut self, context: &mut Context<'_>, since: Instant) {
        let Route::Direct { pair, .. } = self.route else { return };
        let since = since.max(self.switched_at);
        if context.now.since(since) < DATA_SILENCE_MAX {
            return;
        }
        if self.is_hole_likely(context.now, since) {
            self.leave_hole(context, pair);
        }
    }

    /// The pong to a ping that was sent then by `pair`: the peer last received from the tunnel so
    /// long ago.
    pub(super) fn reported(
        &mut self,
        context: &mut Context<'_>,
        pair: Pair,
        ping_sent_at: Instant,
        received_age: Duration,
    ) {
        if !matches!(self.route, Route::Direct { pair: used, .. } if used == pair) {
            return;
        }
        // By our clock, and no earlier than it was.
        let age = u64::try_from(received_age.as_nanos()).unwrap_or(u64::MAX);
        let received_at = Instant::from_nanos(context.now.as_nanos().saturating_sub(age));
        let from = received_at.max(self.switched_at) + REPORT_AGE_MAX;
        let is_missed = |at: &&Instant| from < **at && **at + REPORT_AGE_MAX < ping_sent_at;
        if self.tunnel.sent.iter().filter(is_missed).count() < VANISHED_LOOKS {
            return;
        }
        let Some(path) = self.paths.get_mut(&pair) else { return };
        // It may have become narrow: that is no hole, and ends otherwise.
        if path.is_proven_since(from) {
            self.leave_hole(context, pair);
        } else {
            path.prove_again();
        }
    }

    /// Data vanishes on the path in use, whatever pings say.
    fn leave_hole(&mut self, context: &mut Context<'_>, pair: Pair) {
        self.tunnel.silence = None;
        let another = self.paths.values().any(|path| path.is_hole(context.now));
        if another {
            // Two of them: what stands in the way stands before all. Once is enough for each.
            let others = self.paths.values_mut().filter(|path| !path.is_hole(context.now));
            others.for_each(|path| path.swallowed(context.now));
        } else if let Some(path) = self.paths.get_mut(&pair) {
            path.swallowed(context.now);
        }
        // Other paths promise no more than this one did: the relay, until one answers anew.
        self.set_route(context, Route::Relay, Why::DataLost);
        self.settle_at = None;
        self.start_search(context.now, true);
    }

    /// Whether this silence is more than one lost keepalive.
    fn is_hole_likely(&mut self, now: Instant, since: Instant) -> bool {
        let count = match self.tunnel.silence {
            Some(last) if last.since == since => last.count,
            Some(last) if since.since(last.seen_at) < SILENCES_APART_MAX => last.count + 1,
            _ => 1,
        };
        self.tunnel.silence = Some(Silence { since, seen_at: now, count });
        // One that no handshake ended, either, is as long as several.
        let long = now.since(since) >= SILENCES_MAX * DATA_SILENCE_MAX;
        self.tunnel.talks || count >= SILENCES_MAX || long
    }
}
