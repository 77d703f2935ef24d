//! UPnP Internet Gateway Device, versions 1 and 2: finding a router's services, then one HTTP
//! exchange after the other with the one that maps ports. Never an event subscription.

mod http;
mod ssdp;
mod xml;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use rand::{Rng, RngCore};

use self::http::Place;
use self::http::{Answer, Reader};
pub use self::ssdp::searches;
use self::xml::{Service, ServiceKind};
use super::{Failure, Protocol, Refused, Status};
use crate::limits::{
    UPNP_ACTION_TIME, UPNP_DESCRIPTION_TIME, UPNP_DESCRIPTION_TRIES, UPNP_LOCATIONS_MAX,
    UPNP_PORT_TRIES,
};
use crate::time::Instant;

/// Where searches go besides the router itself.
pub const GROUP: SocketAddrV4 = SocketAddrV4::new(ssdp::GROUP, ssdp::PORT);
/// Where a router hears searches.
pub const SEARCH_PORT: u16 = ssdp::PORT;

/// Ports below are not asked for: routers keep them for themselves.
const PORT_MIN: u16 = 1024;

/// `errorCode` of WANIPConnection (versions 1 and 2, section 2.4).
mod error {
    pub(super) const INVALID_ACTION: u16 = 401;
    pub(super) const INVALID_ARGS: u16 = 402;
    pub(super) const NOT_IMPLEMENTED: u16 = 602;
    pub(super) const CONFLICT: u16 = 718;
    pub(super) const SAME_PORT_ONLY: u16 = 724;
    pub(super) const PERMANENT_ONLY: u16 = 725;
}

/// What the conversation wants or has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    Http {
        exchange: u32,
        to: SocketAddrV4,
        request: Vec<u8>,
    },
    HttpEnd {
        exchange: u32,
    },
    /// The router has a service that maps ports.
    Present,
    /// It was started again since it was seen last.
    Restarted,
    /// `lifetime` is what was granted; `None` for ever.
    Mapped {
        external: SocketAddrV4,
        lifetime: Option<Duration>,
    },
    Failed(Failure),
    Deleted,
}

/// What the caller wants of the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    /// `renewal`: the port is ours already.
    Map {
        internal_port: u16,
        port: u16,
        lifetime: Duration,
        renewal: bool,
    },
    Delete {
        port: u16,
    },
}

/// What the exchange in flight is for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Describe(Place),
    Address,
    Add(Add),
    Delete,
}

/// One attempt to add a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Add {
    external_address: Ipv4Addr,
    port: u16,
    /// The router may take another port.
    any: bool,
    permanent: bool,
    tries: u8,
}

#[derive(Clone, Debug)]
struct Exchange {
    number: u32,
    step: Step,
    reader: Reader,
    deadline: Instant,
}

/// The conversation with one router. It is emptied by [`Self::poll`].
#[derive(Clone, Debug)]
pub struct Upnp {
    router: Ipv4Addr,
    own: Ipv4Addr,
    /// Descriptions that answers to searches named, and how many of them were asked for.
    descriptions: Vec<Place>,
    described: usize,
    tries_left: u8,
    /// The best first; `service` is the one that is spoken to.
    services: Vec<Service>,
    service: usize,
    boot: Option<u32>,
    want: Option<Want>,
    exchange: Option<Exchange>,
    exchanges: u32,
    said: VecDeque<Said>,
}

impl Upnp {
    /// `exchanges`: how many there were before, so that late words of an old one are known as such.
    pub fn new(router: Ipv4Addr, own: Ipv4Addr, exchanges: u32) -> Self {
        Self {
            router,
            own,
            descriptions: Vec::new(),
            described: 0,
            tries_left: UPNP_DESCRIPTION_TRIES,
            services: Vec::new(),
            service: 0,
            boot: None,
            want: None,
            exchange: None,
            exchanges,
            said: VecDeque::new(),
        }
    }

    /// Exchanges begun so far.
    pub fn exchanges(&self) -> u32 {
        self.exchanges
    }

    /// The connection that is open.
    pub fn exchange_in_flight(&self) -> Option<u32> {
        self.exchange.as_ref().map(|exchange| exchange.number)
    }

    pub fn poll(&mut self) -> Option<Said> {
        self.said.pop_front()
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.exchange.as_ref().map(|exchange| exchange.deadline)
    }

    /// An answer of the router to a search.
    pub fn found(&mut self, now: Instant, bytes: &[u8]) -> Result<(), Refused> {
        let found = ssdp::parse(bytes, self.router)?;
        if let (Some(before), Some(boot)) = (self.boot, found.boot)
            && before != boot
        {
            // Its services may be elsewhere now.
            self.descriptions.clear();
            self.services.clear();
            self.described = 0;
            self.tries_left = UPNP_DESCRIPTION_TRIES;
            self.said.push_back(Said::Restarted);
        }
        self.boot = found.boot.or(self.boot);
        if self.descriptions.contains(&found.description) {
            self.describe_again(now);
            return Ok(());
        }
        if self.descriptions.len() == UPNP_LOCATIONS_MAX {
            return Err(Refused::TooManyDescriptions);
        }
        self.descriptions.push(found.description);
        self.advance(now);
        Ok(())
    }

    /// Maps `port` outside (or another) to `internal_port`; ends with [`Said::Mapped`] or
    /// [`Said::Failed`].
    pub fn map(
        &mut self,
        now: Instant,
        internal_port: u16,
        port: u16,
        lifetime: Duration,
        renewal: bool,
    ) {
        self.want(now, Want::Map { internal_port, port, lifetime, renewal });
    }

    /// Ends with [`Said::Deleted`] or [`Said::Failed`].
    pub fn delete(&mut self, now: Instant, port: u16) {
        self.want(now, Want::Delete { port });
    }

    /// Bytes of the answer to an exchange.
    pub fn http_bytes<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        number: u32,
        bytes: &[u8],
    ) -> Result<(), Refused> {
        let exchange = self.exchange.as_mut().filter(|exchange| exchange.number == number);
        let exchange = exchange.ok_or(Refused::Unasked)?;
        let read = exchange.reader.push(bytes);
        match read {
            Ok(None) => Ok(()),
            Ok(Some(answer)) => self.finish(now, random, Ok(answer)),
            Err(refused) => self.finish(now, random, Err(refused)),
        }
    }

    /// The connection of an exchange ended, or never began.
    pub fn http_end<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        number: u32,
    ) -> Result<(), Refused> {
        let exchange = self.exchange.as_ref().filter(|exchange| exchange.number == number);
        // Of one that we ended ourselves we hear this late: nothing is wrong.
        let Some(exchange) = exchange else { return Ok(()) };
        let answer = exchange.reader.end();
        self.finish(now, random, answer)
    }

    pub fn timeout<R: RngCore>(&mut self, now: Instant, random: &mut R) -> Result<(), Refused> {
        match self.deadline() {
            Some(deadline) if deadline <= now => self.finish(now, random, Err(Refused::HttpLate)),
            _ => Ok(()),
        }
    }

    fn want(&mut self, now: Instant, want: Want) {
        self.want = Some(want);
        let describing = |exchange: &Exchange| matches!(exchange.step, Step::Describe(_));
        if self.exchange.as_ref().is_some_and(|exchange| !describing(exchange)) {
            self.end_exchange();
        }
        self.advance(now);
    }

    /// A router that is busy answers late; the next search brings another try.
    fn describe_again(&mut self, now: Instant) {
        let none_left = self.described == self.descriptions.len();
        if self.services.is_empty() && self.exchange.is_none() && none_left && self.tries_left > 0 {
            self.tries_left -= 1;
            self.described = 0;
            self.advance(now);
        }
    }

    /// Begins the next exchange, if none is in flight and one is wanted.
    fn advance(&mut self, now: Instant) {
        if self.exchange.is_some() {
            return;
        }
        if (self.want.is_none() || self.services.is_empty())
            && let Some(place) = self.descriptions.get(self.described).cloned()
        {
            self.described += 1;
            let request = place.get();
            let at = place.at;
            return self.begin(now, Step::Describe(place), at, request);
        }
        match self.want {
            None => {}
            Some(_) if self.services.is_empty() => self.fail(Failure::Unanswered),
            Some(Want::Map { .. }) => self.act(now, Step::Address, "GetExternalIPAddress", ""),
            Some(Want::Delete { port }) => {
                let arguments = mapping_key(port);
                self.act(now, Step::Delete, "DeletePortMapping", &arguments);
            }
        }
    }

    fn act(&mut self, now: Instant, step: Step, action: &str, arguments: &str) {
        let Some(service) = self.services.get(self.service) else { return };
        let urn = service.kind.urn();
        let body = format!(
            "<?xml version=\"1.0\"?>\r\n\
             <s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
             s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body>\
             <u:{action} xmlns:u=\"{urn}\">{arguments}</u:{action}></s:Body></s:Envelope>\r\n"
        );
        let request = service.control.post(&format!("{urn}#{action}"), &body);
        let at = service.control.at;
        self.begin(now, step, at, request);
    }

    fn begin(&mut self, now: Instant, step: Step, to: SocketAddrV4, request: Vec<u8>) {
        self.exchanges = self.exchanges.wrapping_add(1);
        let number = self.exchanges;
        let describes = matches!(step, Step::Describe(_));
        let limit = if describes { UPNP_DESCRIPTION_TIME } else { UPNP_ACTION_TIME };
        let deadline = now + limit;
        self.exchange = Some(Exchange { number, step, reader: Reader::default(), deadline });
        self.said.push_back(Said::Http { exchange: number, to, request });
    }

    fn end_exchange(&mut self) -> Option<Step> {
        let exchange = self.exchange.take()?;
        self.said.push_back(Said::HttpEnd { exchange: exchange.number });
        Some(exchange.step)
    }

    fn finish<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        answer: Result<Answer, Refused>,
    ) -> Result<(), Refused> {
        let Some(step) = self.end_exchange() else { return Ok(()) };
        let result = match step {
            Step::Describe(place) => answer.and_then(|answer| self.describe(&place, &answer)),
            Step::Address | Step::Add(_) | Step::Delete => match answer.and_then(read_action) {
                Ok(answer) => self.acted(now, random, step, answer),
                Err(refused) => {
                    self.try_next_service(Failure::Unanswered);
                    Err(refused)
                }
            },
        };
        self.advance(now);
        result
    }

    fn describe(&mut self, place: &Place, answer: &Answer) -> Result<(), Refused> {
        if answer.status != 200 {
            return Err(Refused::HttpStatus);
        }
        let services = xml::services(&answer.body, place)?;
        let first = self.services.is_empty() && !services.is_empty();
        for service in services {
            if !self.services.contains(&service) {
                self.services.push(service);
            }
        }
        if first {
            self.service = 0;
            self.said.push_back(Said::Present);
        }
        Ok(())
    }

    fn acted<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
        step: Step,
        answer: xml::ActionAnswer,
    ) -> Result<(), Refused> {
        match (step, self.want) {
            (Step::Address, Some(Want::Map { port, renewal, .. })) => {
                let Some(external_address) = answer.external_address else {
                    self.try_next_service(failure(answer.error));
                    return Ok(());
                };
                if !super::is_usable(external_address.into()) {
                    self.try_next_service(Failure::NoExternalAddress);
                    return Err(Refused::BadExternal);
                }
                let service = self.services.get(self.service);
                let any = !renewal && service.is_some_and(|s| s.kind == ServiceKind::WanIp2);
                let port = if port < PORT_MIN { other_port(random) } else { port };
                self.add(now, Add { external_address, port, any, permanent: false, tries: 1 });
            }
            (Step::Add(add), Some(Want::Map { .. })) => match answer.error {
                None => self.added(add, answer.reserved_port),
                Some(code) => self.not_added(now, random, add, code),
            },
            (Step::Delete, _) => {
                self.want = None;
                self.said.push_back(match answer.error {
                    None => Said::Deleted,
                    code => Said::Failed(failure(code)),
                });
            }
            // The want changed; `advance` begins anew.
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, now: Instant, add: Add) {
        let Some(Want::Map { internal_port, lifetime, .. }) = self.want else { return };
        let action = if add.any { "AddAnyPortMapping" } else { "AddPortMapping" };
        let lease_s = if add.permanent { 0 } else { lifetime.as_secs() };
        let arguments = format!(
            "{}<NewInternalPort>{internal_port}</NewInternalPort>\
             <NewInternalClient>{}</NewInternalClient><NewEnabled>1</NewEnabled>\
             <NewPortMappingDescription>millrace</NewPortMappingDescription>\
             <NewLeaseDuration>{lease_s}</NewLeaseDuration>",
            mapping_key(add.port),
            self.own
        );
        self.act(now, Step::Add(add), action, &arguments);
    }

    fn added(&mut self, add: Add, reserved_port: Option<u16>) {
        let Some(Want::Map { lifetime, .. }) = self.want.take() else { return };
        let port = reserved_port.filter(|port| add.any && *port != 0).unwrap_or(add.port);
        let external = SocketAddrV4::new(add.external_address, port);
        let lifetime = (!add.permanent).then_some(lifetime);
        self.said.push_back(Said::Mapped { external, lifetime });
    }

    fn not_added<R: RngCore>(&mut self, now: Instant, random: &mut R, add: Add, code: u16) {
        let Some(Want::Map { internal_port, .. }) = self.want else { return };
        let again = add.tries < UPNP_PORT_TRIES;
        let next = match code {
            error::INVALID_ACTION | error::NOT_IMPLEMENTED if add.any => Add { any: false, ..add },
            error::PERMANENT_ONLY | error::INVALID_ARGS if !add.permanent => {
                Add { permanent: true, ..add }
            }
            error::SAME_PORT_ONLY if add.port != internal_port => {
                Add { port: internal_port, ..add }
            }
            error::CONFLICT if again => {
                Add { port: other_port(random), tries: add.tries + 1, ..add }
            }
            _ => return self.try_next_service(failure(Some(code))),
        };
        self.add(now, next);
    }

    /// A router has a service for each uplink; the first may be the one that is not connected.
    fn try_next_service(&mut self, failure: Failure) {
        if self.service + 1 < self.services.len() {
            self.service += 1;
        } else {
            self.service = 0;
            self.fail(failure);
        }
    }

    fn fail(&mut self, failure: Failure) {
        if self.want.take().is_some() {
            self.said.push_back(Said::Failed(failure));
        }
    }
}

/// A whole answer says what was done, or is a fault, which comes with status 500.
fn read_action(answer: Answer) -> Result<xml::ActionAnswer, Refused> {
    let read = match answer.status {
        200 | 500 => xml::action_answer(&answer.body)?,
        _ => return Err(Refused::HttpStatus),
    };
    if answer.status == 500 && read.error.is_none() {
        return Err(Refused::HttpStatus);
    }
    Ok(read)
}

/// What names a mapping, as the arguments of an action.
fn mapping_key(port: u16) -> String {
    format!(
        "<NewRemoteHost></NewRemoteHost><NewExternalPort>{port}</NewExternalPort>\
         <NewProtocol>UDP</NewProtocol>"
    )
}

fn failure(code: Option<u16>) -> Failure {
    match code {
        Some(code) => Failure::Denied(Status { protocol: Protocol::Upnp, code }),
        None => Failure::NoExternalAddress,
    }
}

fn other_port<R: RngCore>(random: &mut R) -> u16 {
    random.random_range(PORT_MIN..=u16::MAX)
}
