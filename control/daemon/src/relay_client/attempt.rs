//! From nothing to a login, stage by stage.

use std::net::IpAddr;

use millrace_path::Instant;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustls::ProtocolVersion;
use rustls::pki_types::ServerName;

use super::dial::{Dial, Dialled};
use super::event::{Connecting, RelayEvent};
use super::failure::RelayFailure;
use super::link::Link;
use super::resolve::Found;
use super::tls::Session;
use super::wire::{Step, Wire};
use super::{RelayClient, Stage, Way, http, trust};
use crate::limits;

impl RelayClient {
    /// Starts an attempt.
    pub(super) fn begin(&mut self) -> Result<(), RelayFailure> {
        let url = &self.config.url;
        let proxy = self.config.proxy.find(url, |name| std::env::var(name).ok())?;
        let target = proxy.as_ref().map_or(url, |proxy| &proxy.url);
        let way = Way { host: target.host.clone(), port: target.port, proxy };
        let (began, limit) = (self.now, self.now + limits::RELAY_LOOK_UP_LIMIT);
        match self.resolver.ask(&way.host) {
            Found::Addresses(addresses) => self.dial_to(way, &addresses, began),
            Found::NotYet => {
                let host = way.host.clone();
                self.events.push_back(RelayEvent::Connecting(Connecting::LookUp { host }));
                self.stage = Stage::LookUp { way, limit, began };
                Ok(())
            }
            Found::Error(error) => self.not_found(way, began, error),
        }
    }

    pub(super) fn look_up(&mut self) -> Result<(), RelayFailure> {
        let now = self.now;
        let Stage::LookUp { way, limit, began } = &mut self.stage else { return Ok(()) };
        let found = self.resolver.poll(&way.host);
        let (host, began) = (way.host.clone(), *began);
        match found {
            Found::NotYet if now < *limit => Ok(()),
            found => {
                let way = Way { host, port: way.port, proxy: way.proxy.take() };
                match found {
                    Found::Addresses(addresses) => self.dial_to(way, &addresses, began),
                    Found::Error(error) => self.not_found(way, began, error),
                    Found::NotYet => match self.resolver.last_known(&way.host) {
                        Some(addresses) => self.dial_to(way, &addresses, began),
                        None => Err(RelayFailure::LookUpLimit {
                            host: way.host,
                            limit: limits::RELAY_LOOK_UP_LIMIT,
                        }),
                    },
                }
            }
        }
    }

    /// The name server fails: the relay is probably where it was.
    fn not_found(&mut self, way: Way, began: Instant, error: String) -> Result<(), RelayFailure> {
        match self.resolver.last_known(&way.host) {
            Some(addresses) => self.dial_to(way, &addresses, began),
            None => Err(RelayFailure::LookUp { host: way.host, error }),
        }
    }

    fn dial_to(
        &mut self,
        way: Way,
        addresses: &[IpAddr],
        began: Instant,
    ) -> Result<(), RelayFailure> {
        let dial = Dial::new(addresses, way.port, self.config.mark, self.now);
        let (addresses, port) = (addresses.to_vec(), way.port);
        self.events.push_back(RelayEvent::Connecting(Connecting::Tcp { addresses, port }));
        let limit = self.now + limits::RELAY_CONNECT_LIMIT;
        self.stage = Stage::Dial { way, dial, limit, began };
        self.dial()
    }

    pub(super) fn dial(&mut self) -> Result<(), RelayFailure> {
        let Stage::Dial { way, dial, limit, began } = &mut self.stage else { return Ok(()) };
        let dialled = dial.poll(self.now, &self.epoll);
        if dial.unmarked && !std::mem::replace(&mut self.told_of_mark, true) {
            let note = "the connection to the relay has no firewall mark: \
                        that needs the capability CAP_NET_ADMIN";
            self.events.push_back(RelayEvent::Note(note));
        }
        match dialled {
            Dialled::NotYet if self.now < *limit => Ok(()),
            Dialled::NotYet => {
                let what = format!("{} port {}", way.host, way.port);
                Err(RelayFailure::ConnectLimit { what, limit: limits::RELAY_CONNECT_LIMIT })
            }
            Dialled::Failed(failure) => Err(failure),
            Dialled::Connected(stream, address) => {
                let (data, flags) = (EventData::new_u64(0), EventFlags::IN);
                let watched = epoll::modify(&self.epoll, &stream, data, flags);
                watched.map_err(|error| RelayFailure::System(error.into()))?;
                let way = Way {
                    host: std::mem::take(&mut way.host),
                    port: way.port,
                    proxy: way.proxy.take(),
                };
                let (limit, began) = (*limit, *began);
                let tunnel = way.proxy.is_some();
                self.stage = Stage::Wire(Box::new(Wire {
                    link: Link::new(stream, address),
                    step: Step::Tunnel,
                    way,
                    limit,
                    began,
                    writing: false,
                    ending: None,
                }));
                if tunnel { self.ask_tunnel() } else { self.start() }
            }
        }
    }

    fn ask_tunnel(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let (host, port) = (self.config.url.host.clone(), self.config.url.port);
        let credentials = wire.way.proxy.as_ref().and_then(|proxy| proxy.credentials.as_ref());
        let request = http::connect_request(&host, port, credentials.map(|text| text.as_str()));
        let proxy = wire.link.address;
        self.events.push_back(RelayEvent::Connecting(Connecting::Tunnel { proxy, host, port }));
        wire.link.write(&request)?;
        self.watch()
    }

    /// The connection reaches the relay: TLS, or at once the login.
    pub(super) fn start(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let url = &self.config.url;
        if !url.tls {
            return self.log_in();
        }
        let config = match &self.tls {
            Some(config) => config.clone(),
            None => self.tls.insert(trust::client_config(&self.config.trust)?).clone(),
        };
        let name = ServerName::try_from(url.host.clone())
            .map_err(|_| RelayFailure::Host(url.host.clone()))?;
        let session =
            Session::new(config, name).map_err(|error| RelayFailure::of_tls(&url.host, &error))?;
        let address = wire.link.address;
        self.events.push_back(RelayEvent::Connecting(Connecting::Tls { address }));
        wire.step = Step::Tls;
        wire.link.start_tls(url.host.clone(), session)?;
        wire.link.flush()?;
        self.watch()
    }

    /// Asks for the relay's stream. Where its certificates name its key the login goes along with
    /// the request, which saves a round trip.
    pub(super) fn log_in(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        let early = wire.link.session().and_then(|session| {
            // Before TLS 1.3 certificates travel in clear, and anybody could have put this one in.
            let safe = session.version() == Some(ProtocolVersion::TLSv1_3);
            trust::relay_key(session.certificates()).filter(|_| safe)
        });
        let url = &self.config.url;
        let usual_port = if url.tls { 443 } else { 80 };
        let mut request = http::upgrade_request(&url.host, url.port, usual_port, early.is_some());
        wire.step = Step::Login;
        let address = wire.link.address;
        self.events.push_back(RelayEvent::Connecting(Connecting::Login { address }));
        let said = self.protocol.begin(early)?;
        self.protocol.introduce(rand::random(), &mut request);
        wire.link.write(&request)?;
        self.said(said)?;
        self.watch()
    }

    /// Sends our introduction once there is a box key.
    pub(super) fn introduce(&mut self) -> Result<(), RelayFailure> {
        let Stage::Wire(wire) = &mut self.stage else { return Ok(()) };
        if !matches!(wire.step, Step::Login) {
            return Ok(());
        }
        let mut out = Vec::new();
        self.protocol.introduce(rand::random(), &mut out);
        if !out.is_empty() {
            wire.link.write(&out)?;
        }
        self.watch()
    }
}
