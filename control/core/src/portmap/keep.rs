//! One mapping's life: asked for, held, renewed, made again, given back.

use std::net::SocketAddr;
use std::time::Duration;

use rand::{Rng, RngCore};

use super::pcp::Map;
use super::{
    Event, Failure, Instant, Lost, MAPPING_LIFETIME_MAX, MAPPING_LIFETIME_MIN, Mapped, Mapping,
    Output, PORTMAP_CLOSE_TIME, PORTMAP_REST_MAX, PORTMAP_REST_MIN, PortMapper, Protocol,
    REBOOT_CHECK_INTERVAL, REBOOT_REMAP_INTERVAL, RENEWAL_INTERVAL_MIN, RENEWAL_JITTER_PERCENT,
    Reason, Refused, Retry, Router, SERVER_PORT, Stage, Transmit, is_public, nat_pmp, pcp, upnp,
};
use crate::limits::MAPPING_LIFETIME;

impl PortMapper {
    /// Asks for a mapping, or for the one there is once more.
    pub(super) fn request(&mut self, now: Instant, protocol: Protocol) {
        self.stage = Stage::Requesting { protocol, retry: Retry::new(now) };
        self.send_request(now, protocol, self.lifetime_s());
    }

    /// The router made or renewed a mapping.
    pub(super) fn mapped<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        protocol: Protocol,
        external: SocketAddr,
        lifetime: Option<Duration>,
    ) {
        let granted = lifetime.map(|time| time.clamp(MAPPING_LIFETIME_MIN, MAPPING_LIFETIME_MAX));
        let half = granted.unwrap_or(MAPPING_LIFETIME) / 2;
        let jitter = half * random.random_range(0..=2 * RENEWAL_JITTER_PERCENT) / 100;
        let before = self.mapping.replace(Mapping {
            protocol,
            external,
            expires_at: granted.map(|time| now + time),
            renew_at: now + half + jitter,
        });
        self.port = external.port();
        self.rest = PORTMAP_REST_MIN;
        self.stage = Stage::Holding { check_at: now + REBOOT_CHECK_INTERVAL };
        self.checking = false;
        let same =
            before.is_some_and(|before| before.protocol == protocol && before.external == external);
        if !same {
            let behind_nat = !is_public(external.ip());
            let mapped = Mapped { protocol, external, lifetime: granted, behind_nat };
            self.outputs.push_back(Output::Event(Event::Mapped(mapped)));
        }
    }

    /// The router said no, or nothing, to a request.
    pub(super) fn not_mapped(&mut self, now: Instant, protocol: Protocol, failure: Failure) {
        match (self.mapping.as_mut(), failure) {
            // It may be starting just now; until the mapping expires nothing is lost.
            (Some(mapping), Failure::Unanswered | Failure::NoExternalAddress) => {
                let left = mapping.expires_at.map_or(MAPPING_LIFETIME, |at| at.since(now));
                mapping.renew_at = now + (left / 2).min(self.rest).max(RENEWAL_INTERVAL_MIN);
                self.rest = (self.rest * 2).min(PORTMAP_REST_MAX);
                self.stage = Stage::Holding { check_at: now + REBOOT_CHECK_INTERVAL };
            }
            (Some(_), Failure::Denied(_)) => {
                self.lose(Lost::Denied);
                self.give_up(now, protocol, failure);
            }
            (None, _) => self.give_up(now, protocol, failure),
        }
    }

    pub(super) fn lose(&mut self, why: Lost) {
        if let Some(mapping) = self.mapping.take() {
            let external = mapping.external;
            self.outputs.push_back(Output::Event(Event::Lost { external, why }));
        }
    }

    /// The router lost its state, as far as its clock tells.
    pub(super) fn restarted(&mut self, now: Instant) {
        let recent = |then: Instant| now.since(then) < REBOOT_REMAP_INTERVAL;
        if self.remapped_at.is_some_and(recent) {
            return;
        }
        if let (Stage::Holding { .. }, Some(mapping)) = (self.stage, self.mapping) {
            self.remapped_at = Some(now);
            self.request(now, mapping.protocol);
        }
    }

    /// As [`Self::restarted`], on somebody else's word. One that comes too soon after another is
    /// looked at as soon as may be.
    pub(super) fn suspect(&mut self, now: Instant) {
        if let (Some(at), Some(mapping)) = (self.remapped_at, self.mapping.as_mut()) {
            mapping.renew_at = mapping.renew_at.min(now.max(at + REBOOT_REMAP_INTERVAL));
        }
        self.restarted(now);
    }

    /// Gives the mapping back; also one that was asked for and not heard of yet.
    pub(super) fn close(&mut self, now: Instant) {
        let asked = match self.stage {
            Stage::Requesting { protocol, .. } => Some(protocol),
            Stage::Closing { .. } => return,
            _ => self.mapping.map(|mapping| mapping.protocol),
        };
        self.probe = None;
        self.mapping = None;
        match asked {
            Some(protocol) => {
                let retry = Retry::new(now);
                self.stage = Stage::Closing { protocol, retry, until: now + PORTMAP_CLOSE_TIME };
                self.send_request(now, protocol, 0);
            }
            None => self.closed(),
        }
    }

    pub(super) fn closed(&mut self) {
        self.end_upnp();
        self.stage = Stage::Closed;
        self.outputs.push_back(Output::Event(Event::Closed));
    }

    pub(super) fn deadline(&self) -> Option<(Instant, Reason)> {
        let stage = match self.stage {
            Stage::Idle | Stage::Seeking | Stage::Closed => None,
            Stage::Requesting { protocol: Protocol::Upnp, .. } => None,
            Stage::Requesting { retry, .. } => Some((retry.at, Reason::Retry)),
            Stage::Holding { check_at } => Some((check_at, Reason::RebootCheck)),
            Stage::Resting { until } => Some((until, Reason::Rest)),
            Stage::Closing { protocol: Protocol::Upnp, until, .. } => Some((until, Reason::Close)),
            Stage::Closing { retry, until, .. } => Some((until.min(retry.at), Reason::Close)),
        };
        let renewal = match (self.stage, self.mapping) {
            (Stage::Holding { .. }, Some(mapping)) => Some((mapping.renew_at, Reason::Renewal)),
            _ => None,
        };
        let expiry = self.mapping.and_then(|mapping| Some((mapping.expires_at?, Reason::Expiry)));
        let http = self.upnp.as_ref().and_then(|upnp| Some((upnp.deadline()?, Reason::Http)));
        let probe = self.probe_deadline().map(|at| (at, Reason::Probe));
        [stage, renewal, expiry, http, probe].into_iter().flatten().min()
    }

    pub(super) fn timeout<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
    ) -> Result<(), Refused> {
        self.probe_timeout(now);
        if self.mapping.and_then(|mapping| mapping.expires_at).is_some_and(|at| at <= now) {
            self.lose(Lost::Expired);
            self.seek(now);
        }
        self.stage_timeout(now);
        self.upnp.as_mut().map_or(Ok(()), |upnp| upnp.timeout(now, random))
    }

    fn stage_timeout(&mut self, now: Instant) {
        match self.stage {
            Stage::Idle | Stage::Seeking | Stage::Closed => {}
            Stage::Requesting { protocol, retry } => {
                if protocol == Protocol::Upnp || retry.at > now {
                    return;
                }
                let Some(retry) = retry.next(now) else {
                    return self.not_mapped(now, protocol, Failure::Unanswered);
                };
                self.stage = Stage::Requesting { protocol, retry };
                self.send_request(now, protocol, self.lifetime_s());
            }
            Stage::Holding { check_at } => {
                let Some(mapping) = self.mapping else { return };
                if mapping.renew_at <= now {
                    self.request(now, mapping.protocol);
                } else if check_at <= now {
                    self.stage = Stage::Holding { check_at: now + REBOOT_CHECK_INTERVAL };
                    self.check(mapping.protocol);
                }
            }
            Stage::Resting { until } => {
                if until <= now {
                    self.seek(now);
                }
            }
            Stage::Closing { protocol, retry, until } => {
                if until <= now {
                    return self.closed();
                }
                if protocol != Protocol::Upnp
                    && retry.at <= now
                    && let Some(retry) = retry.next(now)
                {
                    self.stage = Stage::Closing { protocol, retry, until };
                    self.send_request(now, protocol, 0);
                }
            }
        }
    }

    /// Asks whether the router was restarted, by the least question there is.
    fn check(&mut self, protocol: Protocol) {
        let Some(router) = self.router else { return };
        self.checking = true;
        match protocol {
            Protocol::Pcp => self.send(router.at(SERVER_PORT), pcp::announce(router.own)),
            Protocol::NatPmp => self.send(router.at(SERVER_PORT), nat_pmp::probe()),
            Protocol::Upnp => {
                let [search, _] = upnp::searches();
                self.send(router.at(upnp::SEARCH_PORT), search);
            }
        }
    }

    /// `lifetime_s` of 0 deletes.
    fn send_request(&mut self, now: Instant, protocol: Protocol, lifetime_s: u32) {
        let Some(router) = self.router else { return };
        let server = router.at(SERVER_PORT);
        let internal_port = self.config.internal_port;
        match protocol {
            Protocol::Pcp => {
                let request = Map {
                    own: router.own,
                    nonce: self.config.nonce,
                    internal_port,
                    external: self.wanted(router),
                    lifetime_s,
                };
                self.send(server, request.to_bytes());
            }
            Protocol::NatPmp => {
                if lifetime_s != 0 {
                    // The address is not part of the other answer.
                    self.send(server, nat_pmp::probe());
                }
                self.send(server, nat_pmp::map(internal_port, self.port, lifetime_s));
            }
            Protocol::Upnp => {
                let renewal = self.mapping.is_some();
                let lifetime = Duration::from_secs(lifetime_s.into());
                let port = self.port;
                let Some(upnp) = &mut self.upnp else { return };
                match lifetime_s {
                    0 => upnp.delete(now, port),
                    _ => upnp.map(now, internal_port, port, lifetime, renewal),
                }
            }
        }
    }

    /// What PCP is asked to give us: what it gave before.
    fn wanted(&self, router: Router) -> SocketAddr {
        match self.mapping {
            Some(mapping) => mapping.external,
            None => SocketAddr::new(pcp::any_of_family(router.own), self.port),
        }
    }

    fn lifetime_s(&self) -> u32 {
        let lifetime = self.config.lifetime.clamp(MAPPING_LIFETIME_MIN, MAPPING_LIFETIME_MAX);
        u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX)
    }

    /// Forgets the conversation with a router, and closes its connection.
    pub(super) fn end_upnp(&mut self) {
        let Some(upnp) = self.upnp.take() else { return };
        self.upnp_exchanges = upnp.exchanges();
        if let Some(exchange) = upnp.exchange_in_flight() {
            self.outputs.push_back(Output::Transmit(Transmit::HttpEnd { exchange }));
        }
    }
}
