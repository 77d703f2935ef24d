//! What the router says: checked, and taken to what it is about.

use std::net::{Ipv4Addr, SocketAddr};

use rand::RngCore;

use super::{
    Failure, Instant, Output, PortMapper, Protocol, Refused, SERVER_PORT, Said, Stage, Status,
    Transmit, is_usable, nat_pmp, pcp,
};

/// Result of both datagram protocols for a version that the router does not speak.
const UNSUPPORTED_VERSION: u16 = 1;

impl PortMapper {
    pub(super) fn datagram<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        from: SocketAddr,
        bytes: &[u8],
    ) -> Result<(), Refused> {
        let Some(router) = self.router else { return Err(Refused::NotTheRouter) };
        if from.ip().to_canonical() != router.address {
            return Err(Refused::NotTheRouter);
        }
        if from.port() != SERVER_PORT {
            // Some routers answer searches from another port than that which was asked.
            if !self.awaits(Protocol::Upnp) {
                return Err(Refused::Unasked);
            }
            self.checking = false;
            return self.upnp.as_mut().ok_or(Refused::Unasked)?.found(now, bytes);
        }
        match bytes.first() {
            Some(0) => self.nat_pmp(now, random, nat_pmp::parse(bytes)?),
            _ => self.pcp(now, random, pcp::parse(bytes)?),
        }
    }

    /// What the conversation with the router's UPnP has come to.
    pub(super) fn hear_upnp<R: RngCore>(&mut self, now: Instant, random: &mut R) {
        while let Some(said) = self.upnp.as_mut().and_then(super::Upnp::poll) {
            let transmit = match said {
                Said::Http { exchange, to, request } => Transmit::Http { exchange, to, request },
                Said::HttpEnd { exchange } => Transmit::HttpEnd { exchange },
                Said::Present => {
                    self.present(now, Protocol::Upnp);
                    continue;
                }
                Said::Restarted => {
                    if self.mapping.is_some_and(|mapping| mapping.protocol == Protocol::Upnp) {
                        self.restarted(now);
                    }
                    continue;
                }
                Said::Mapped { external, lifetime } => {
                    if self.requests(Protocol::Upnp) {
                        self.mapped(now, random, Protocol::Upnp, external.into(), lifetime);
                    }
                    continue;
                }
                Said::Failed(failure) => {
                    if self.requests(Protocol::Upnp) {
                        self.not_mapped(now, Protocol::Upnp, failure);
                    } else if self.closes(Protocol::Upnp) {
                        self.closed();
                    }
                    continue;
                }
                Said::Deleted => {
                    if self.closes(Protocol::Upnp) {
                        self.closed();
                    }
                    continue;
                }
            };
            self.outputs.push_back(Output::Transmit(transmit));
        }
    }

    fn nat_pmp<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        answer: nat_pmp::Answer,
    ) -> Result<(), Refused> {
        match answer {
            nat_pmp::Answer::Failed { map, status } => self.nat_pmp_failed(now, map, status),
            nat_pmp::Answer::Address { epoch_s, address } => {
                self.expect(Protocol::NatPmp)?;
                let restarted = self.nat_pmp_epoch.restarted(now, epoch_s);
                self.nat_pmp_address(now, random, address)?;
                self.alive(now, Protocol::NatPmp, restarted);
                Ok(())
            }
            nat_pmp::Answer::Mapped { epoch_s, internal_port, external_port, lifetime } => {
                if internal_port != self.config.internal_port {
                    return Err(Refused::OtherMapping);
                }
                if self.closes(Protocol::NatPmp) && lifetime.is_zero() {
                    self.closed();
                    return Ok(());
                }
                if !self.requests(Protocol::NatPmp) {
                    return Err(Refused::Unasked);
                }
                // Whatever was lost, it is there now.
                self.nat_pmp_epoch.restarted(now, epoch_s);
                // Without the address the next try asks for both again.
                let Some(address) = self.nat_pmp_address else { return Ok(()) };
                let external = SocketAddr::new(address.into(), external_port);
                if external_port == 0 || lifetime.is_zero() {
                    return Err(Refused::BadExternal);
                }
                self.mapped(now, random, Protocol::NatPmp, external, Some(lifetime));
                Ok(())
            }
        }
    }

    /// The router has another address outside than before, or the first one that we hear of.
    fn nat_pmp_address<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        address: Ipv4Addr,
    ) -> Result<(), Refused> {
        let before = self.nat_pmp_address.take();
        if !is_usable(address.into()) {
            self.present(now, Protocol::NatPmp);
            return Err(Refused::BadExternal);
        }
        self.nat_pmp_address = Some(address);
        let moved = before.is_some_and(|before| before != address);
        if let (true, Stage::Holding { .. }, Some(mapping)) = (moved, self.stage, self.mapping)
            && mapping.protocol == Protocol::NatPmp
        {
            // The port may be another one as well.
            let left = mapping.expires_at.map(|at| at.since(now));
            let external = SocketAddr::new(address.into(), mapping.external.port());
            self.mapped(now, random, Protocol::NatPmp, external, left);
            self.request(now, Protocol::NatPmp);
        }
        Ok(())
    }

    fn nat_pmp_failed(&mut self, now: Instant, map: bool, status: Status) -> Result<(), Refused> {
        if status.code == UNSUPPORTED_VERSION {
            // What a router that speaks NAT-PMP alone says to PCP (RFC 6887, appendix A).
            self.expect_any()?;
            let mut answered = self.answered_now;
            answered.pcp.get_or_insert(false);
            self.set_answered(answered);
            if self.requests(Protocol::Pcp) {
                self.not_mapped(now, Protocol::Pcp, Failure::Denied(status));
            }
            return Ok(());
        }
        if self.requests(Protocol::NatPmp) {
            // Its word on the address is as good as one on the mapping: both are needed.
            self.not_mapped(now, Protocol::NatPmp, Failure::Denied(status));
            return Ok(());
        }
        if map && self.closes(Protocol::NatPmp) {
            self.closed();
            return Ok(());
        }
        self.expect(Protocol::NatPmp)?;
        self.present(now, Protocol::NatPmp);
        Ok(())
    }

    fn pcp<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        answer: pcp::Answer,
    ) -> Result<(), Refused> {
        let Some(map) = answer.map else {
            return self.pcp_without_map(now, answer);
        };
        let ours = map.nonce == self.config.nonce && map.internal_port == self.config.internal_port;
        if !ours {
            return Err(Refused::OtherMapping);
        }
        if self.closes(Protocol::Pcp) && (map.lifetime.is_zero() || answer.failed.is_some()) {
            self.closed();
            return Ok(());
        }
        if !self.requests(Protocol::Pcp) {
            return Err(Refused::Unasked);
        }
        self.pcp_epoch.restarted(now, answer.epoch_s);
        if let Some(status) = answer.failed {
            self.not_mapped(now, Protocol::Pcp, Failure::Denied(status));
            return Ok(());
        }
        let own = self.router.map(|router| router.own);
        let same_family = own.is_some_and(|own| own.is_ipv4() == map.external.is_ipv4());
        let usable = is_usable(map.external.ip()) && map.external.port() != 0;
        if !usable || !same_family || map.lifetime.is_zero() {
            return Err(Refused::BadExternal);
        }
        self.mapped(now, random, Protocol::Pcp, map.external, Some(map.lifetime));
        Ok(())
    }

    fn pcp_without_map(&mut self, now: Instant, answer: pcp::Answer) -> Result<(), Refused> {
        if let Some(status) = answer.failed
            && self.requests(Protocol::Pcp)
        {
            self.not_mapped(now, Protocol::Pcp, Failure::Denied(status));
            return Ok(());
        }
        let version = answer.failed.is_some_and(|status| status.code == UNSUPPORTED_VERSION);
        if version {
            // To NAT-PMP, from a router that speaks PCP alone; what it says to PCP counts.
            return self.expect_any();
        }
        self.expect(Protocol::Pcp)?;
        let restarted = self.pcp_epoch.restarted(now, answer.epoch_s);
        self.alive(now, Protocol::Pcp, restarted);
        Ok(())
    }

    /// An answer to a probe or a check.
    fn alive(&mut self, now: Instant, protocol: Protocol, restarted: bool) {
        let holds = self.mapping.is_some_and(|mapping| mapping.protocol == protocol);
        if holds {
            self.checking = false;
        }
        if holds && restarted {
            self.restarted(now);
        }
        self.present(now, protocol);
    }

    fn expect(&self, protocol: Protocol) -> Result<(), Refused> {
        if self.awaits(protocol) { Ok(()) } else { Err(Refused::Unasked) }
    }

    fn expect_any(&self) -> Result<(), Refused> {
        if Protocol::ALL.into_iter().any(|protocol| self.awaits(protocol)) {
            Ok(())
        } else {
            Err(Refused::Unasked)
        }
    }

    /// Whether the router was asked something by this protocol and may still answer.
    fn awaits(&self, protocol: Protocol) -> bool {
        let holds = self.mapping.is_some_and(|mapping| mapping.protocol == protocol);
        self.probe.is_some() || self.requests(protocol) || (self.checking && holds)
    }

    fn requests(&self, of: Protocol) -> bool {
        matches!(self.stage, Stage::Requesting { protocol, .. } if protocol == of)
    }

    fn closes(&self, of: Protocol) -> bool {
        matches!(self.stage, Stage::Closing { protocol, .. } if protocol == of)
    }
}
