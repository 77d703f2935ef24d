//! Which protocols the router answers, and which of them is used.

use std::net::SocketAddr;

use super::{
    Answered, Epoch, Event, Failure, Instant, IpAddr, Lost, Output, PORTMAP_GATHER_TIME,
    PORTMAP_PROBE_TIME, PORTMAP_REST_MAX, PORTMAP_REST_MIN, PortMapper, Probe, Protocol, Retry,
    Router, SERVER_PORT, Stage, Transmit, Upnp, nat_pmp, pcp, upnp,
};

/// Probes of one round; the last waits for its answer until [`PORTMAP_PROBE_TIME`].
const PROBES: usize = 3;

impl PortMapper {
    /// Another network: nothing that was known holds, and what was mapped is out of reach.
    pub(super) fn network(&mut self, now: Instant, router: Option<Router>) {
        if matches!(self.stage, Stage::Closing { .. }) {
            return;
        }
        let usable = |router: &Router| router.address.is_ipv4() == router.own.is_ipv4();
        let router = router.filter(usable);
        if router == self.router && self.mapping.is_some() {
            // Something else changed; it may have been the router itself.
            return self.suspect(now);
        }
        if router != self.router {
            self.lose(Lost::Network);
            self.port = self.config.internal_port;
        }
        self.end_upnp();
        self.router = router;
        self.pcp_epoch = Epoch::default();
        self.nat_pmp_epoch = Epoch::default();
        self.nat_pmp_address = None;
        self.rest = PORTMAP_REST_MIN;
        self.probe = None;
        self.stage = Stage::Idle;
        self.answered_now = Answered::default();
        self.tell_answered(Answered::default());
        if router.is_some() {
            self.seek(now);
        }
    }

    /// Asks all protocols.
    pub(super) fn seek(&mut self, now: Instant) {
        let Some(router) = self.router else { return };
        self.end_upnp();
        if let (IpAddr::V4(address), IpAddr::V4(own)) = (router.address, router.own) {
            self.upnp = Some(Upnp::new(address, own, self.upnp_exchanges));
        }
        self.failed = [false; Protocol::ALL.len()];
        self.answered_now = Answered::default();
        self.probe = Some(Probe { started_at: now, retry: Retry::new(now), gathered: false });
        self.stage = Stage::Seeking;
        self.send_probes(router);
    }

    /// Probes again, or ends the round.
    pub(super) fn probe_timeout(&mut self, now: Instant) {
        let (Some(mut probe), Some(router)) = (self.probe, self.router) else { return };
        let age = now.since(probe.started_at);
        if age >= PORTMAP_PROBE_TIME {
            self.probe = None;
            let mut answered = self.answered_now;
            for protocol in self.protocols() {
                answered.get_mut(*protocol).get_or_insert(false);
            }
            self.set_answered(answered);
            return self.choose(now);
        }
        if probe.retry.at <= now && probe.retry.sent < PROBES {
            if let Some(next) = probe.retry.next(now) {
                probe.retry = next;
            }
            self.send_probes(router);
        }
        probe.gathered |= age >= PORTMAP_GATHER_TIME;
        self.probe = Some(probe);
        self.choose(now);
    }

    /// When [`Self::probe_timeout`] has something to do.
    pub(super) fn probe_deadline(&self) -> Option<Instant> {
        let probe = self.probe?;
        let mut at = probe.started_at + PORTMAP_PROBE_TIME;
        if !probe.gathered {
            at = at.min(probe.started_at + PORTMAP_GATHER_TIME);
        }
        if probe.retry.sent < PROBES {
            at = at.min(probe.retry.at);
        }
        Some(at)
    }

    /// A protocol is there.
    pub(super) fn present(&mut self, now: Instant, protocol: Protocol) {
        let mut answered = self.answered_now;
        *answered.get_mut(protocol) = Some(true);
        self.set_answered(answered);
        self.choose(now);
    }

    /// Asks the best protocol that answered for a mapping, or rests where there is none.
    pub(super) fn choose(&mut self, now: Instant) {
        if self.stage != Stage::Seeking {
            return;
        }
        let gathered = self.probe.is_none_or(|probe| probe.gathered);
        for protocol in self.protocols() {
            match self.answered_now.get(*protocol) {
                Some(true) if !self.failed[*protocol as usize] => {
                    return self.request(now, *protocol);
                }
                None if !gathered => return,
                _ => {}
            }
        }
        if self.probe.is_none() {
            self.stage = Stage::Resting { until: now + self.rest };
            self.rest = (self.rest * 2).min(PORTMAP_REST_MAX);
        }
    }

    /// A protocol made no mapping, nor keeps one: the next one is tried.
    pub(super) fn give_up(&mut self, now: Instant, protocol: Protocol, failure: Failure) {
        self.outputs.push_back(Output::Event(Event::Failed { protocol, failure }));
        self.failed[protocol as usize] = true;
        self.stage = Stage::Seeking;
        self.choose(now);
    }

    pub(super) fn set_answered(&mut self, answered: Answered) {
        self.answered_now = answered;
        self.tell_answered(answered.or(self.answered));
    }

    fn tell_answered(&mut self, answered: Answered) {
        if answered != self.answered {
            self.answered = answered;
            self.outputs.push_back(Output::Event(Event::Answered(answered)));
        }
    }

    pub(super) fn send(&mut self, to: SocketAddr, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        self.outputs.push_back(Output::Transmit(Transmit::Datagram { to, bytes }));
    }

    /// An IPv6 firewall is opened by PCP alone.
    fn protocols(&self) -> &'static [Protocol] {
        match self.router {
            Some(Router { own: IpAddr::V6(_), .. }) => &[Protocol::Pcp],
            _ => &Protocol::ALL,
        }
    }

    fn send_probes(&mut self, router: Router) {
        let server = router.at(SERVER_PORT);
        if self.answered_now.pcp.is_none() {
            self.send(server, pcp::announce(router.own));
        }
        if router.own.is_ipv6() {
            return;
        }
        if self.answered_now.nat_pmp.is_none() {
            self.send(server, nat_pmp::probe());
        }
        if self.answered_now.upnp.is_none() {
            for search in upnp::searches() {
                self.send(router.at(upnp::SEARCH_PORT), search.clone());
                self.send(upnp::GROUP.into(), search);
            }
        }
    }
}
