//! What the routers around us do for us: ports that they open (PCP, NAT-PMP, UPnP), and IPv4 behind
//! an IPv6-only network (NAT64).

use std::io;
use std::net::SocketAddr;

use blake2::{Blake2s256, Digest};
use millrace_path::Instant;
use millrace_path::limits::MAPPING_LIFETIME;
use millrace_path::portmap::pcp::Nonce;
use millrace_path::portmap::{self, Mapped, Router};
use millrace_path::{nat64, path::UplinkId};

use zeroize::Zeroizing;

use super::Gateway;
use crate::nat64_driver::Nat64Driver;
use crate::network::Way;
use crate::portmap_driver::PortmapDriver;

/// The "public key" whose box key with ours is the secret that PCP nonces are made of: no private
/// key of it is known to anybody, so only we have the secret, and after every restart the same.
pub(super) const SECRET_POINT: [u8; 32] = *b"millrace, PCP nonces, version 1.";

/// The drivers, and what they found.
pub struct Routers {
    /// For IPv4 and IPv6; none where it is not wanted, or before the port is known.
    pub mappers: Vec<PortmapDriver>,
    pub mapped: Vec<Mapped>,
    pub nat64: Nat64Driver,
    /// The port that the mappers open.
    port: u16,
    secret: Option<Zeroizing<[u8; 32]>>,
}

impl Routers {
    pub(super) fn new() -> io::Result<Self> {
        let nat64 = Nat64Driver::new()?;
        Ok(Self { mappers: Vec::new(), mapped: Vec::new(), nat64, port: 0, secret: None })
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let mappers = self.mappers.iter().filter_map(PortmapDriver::deadline);
        mappers.chain(self.nat64.deadline()).min()
    }

    pub(super) fn has_secret(&self) -> bool {
        self.secret.is_some()
    }

    pub(super) fn set_secret(&mut self, secret: Zeroizing<[u8; 32]>) {
        self.secret = Some(secret);
    }

    /// The same for a port after every restart: a PCP router lets only who knows it renew a mapping
    /// or take it back (RFC 6887 section 11.3).
    fn nonce(&self, port: u16, ipv6: bool) -> Option<Nonce> {
        let hash = Blake2s256::new()
            .chain_update(self.secret.as_deref()?)
            .chain_update(port.to_be_bytes())
            .chain_update([ipv6.into()]);
        hash.finalize().first_chunk().copied().map(Nonce)
    }

    /// Gives all ports back, in a second at most each.
    pub(super) fn close(&mut self) {
        self.mappers.drain(..).for_each(PortmapDriver::finish);
        self.mapped.clear();
    }
}

impl Gateway {
    /// The network, the port or the configuration changed.
    pub(super) fn look_at_routers(&mut self, now: Instant) {
        let port = self.welcome.as_ref().map_or(0, |welcome| welcome.listen_port);
        let wanted = self.discovery.port_mapping && self.discovery.is_on() && port != 0;
        if !wanted || port != self.routers.port {
            self.routers.close();
        }
        if wanted && self.routers.mappers.is_empty() {
            let (internal_port, lifetime) = (port, MAPPING_LIFETIME);
            // None before the data plane has answered: then comes the next look.
            let nonces = [false, true].map(|ipv6| self.routers.nonce(port, ipv6));
            let new =
                |nonce| PortmapDriver::new(portmap::Config { internal_port, lifetime, nonce });
            match nonces.into_iter().flatten().map(new).collect() {
                Ok(mappers) => self.routers.mappers = mappers,
                Err(error) => {
                    let error: io::Error = error;
                    tracing::error!(%error, "no ports can be asked for at the router");
                }
            }
        }
        self.routers.port = port;
        for (mapper, ipv6) in self.routers.mappers.iter_mut().zip([false, true]) {
            let router = self.network.gateway(ipv6).and_then(|(route, own)| {
                Some(Router { address: route.gateway?, own, ifindex: route.ifindex })
            });
            mapper.set_router(now, router);
        }
        let has_ipv6 = self.network.gateway(true).is_some();
        self.routers.nat64.network_changed(now, has_ipv6);
    }

    /// Lets the drivers work. Call when a descriptor of theirs is readable or their time has come.
    pub fn handle_routers(&mut self, now: Instant) {
        let mut news = false;
        for mapper in &mut self.routers.mappers {
            mapper.handle(now);
            while let Some(event) = mapper.next_event() {
                match event {
                    portmap::Event::Mapped(mapped) => {
                        tracing::info!(external = %mapped.external, by = ?mapped.protocol, "port mapped");
                        let same =
                            |known: &Mapped| known.external.is_ipv4() == mapped.external.is_ipv4();
                        self.routers.mapped.retain(|known| !same(known));
                        self.routers.mapped.push(mapped);
                        news = true;
                    }
                    portmap::Event::Lost { external, why } => {
                        tracing::info!(%external, ?why, "port mapping lost");
                        self.routers.mapped.retain(|known| known.external != external);
                        news = true;
                    }
                    portmap::Event::Failed { protocol, failure } => {
                        tracing::debug!(?protocol, ?failure, "no port mapping");
                    }
                    portmap::Event::Answered(_) | portmap::Event::Closed => {}
                }
            }
        }
        self.routers.nat64.handle(now);
        while let Some(event) = self.routers.nat64.next_event() {
            match event {
                nat64::Event::Prefixes(prefixes) => {
                    tracing::info!(?prefixes, "NAT64");
                    self.set_ways();
                    self.reflexive.ask(now);
                    news = true;
                }
                nat64::Event::NoResolver(why) => {
                    tracing::warn!("whether there is a NAT64 is not known: {why}");
                }
            }
        }
        if news {
            // A port that a router opened lets everybody in.
            self.kinds.again(now);
            self.tell_finder(now, false);
        }
    }

    /// Our mapping may be gone: paths died, or STUN sees another address.
    pub(super) fn suspect_mappings(&mut self, now: Instant) {
        self.routers.mappers.iter_mut().for_each(|mapper| mapper.suspect(now));
    }

    /// IPv4 is reached through a NAT64, because there is no other way.
    fn uses_nat64(&self) -> bool {
        !self.routers.nat64.nat64().prefixes().is_empty() && self.network.gateway(false).is_none()
    }

    /// The ways out as they are with what the routers offer.
    pub(super) fn set_ways(&mut self) {
        self.ways = self.network.ways();
        let ipv4 = UplinkId(0);
        if self.uses_nat64() && !self.ways.iter().any(|(id, _)| *id == ipv4) {
            self.ways.insert(0, (ipv4, Way { ipv6: false, ifindex: 0 }));
        }
    }

    /// Where a datagram to `remote` really goes.
    pub(super) fn wire_address(&self, remote: SocketAddr) -> SocketAddr {
        let through = || self.routers.nat64.nat64().to_wire(remote);
        if remote.is_ipv4() && self.uses_nat64() { through().unwrap_or(remote) } else { remote }
    }

    /// Whom a datagram from `from` is really from.
    pub(super) fn real_address(&self, from: SocketAddr) -> SocketAddr {
        let through = || self.routers.nat64.nat64().from_wire(from);
        if from.is_ipv6() && self.uses_nat64() { through().unwrap_or(from) } else { from }
    }

    /// At the end: what routers opened is closed again.
    pub fn close(&mut self) {
        self.routers.close();
    }
}
