//! NATs as RFC 4787 sorts them: how they map, what they let in, how long they remember.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use millrace_path::Instant;

use super::{Gateway, STUN_SERVERS};

/// RFC 4787, section 4.1; `None` is a firewall that translates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    None,
    EndpointIndependent,
    AddressAndPortDependent,
}

/// RFC 4787, section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

#[derive(Debug)]
pub struct Nat {
    pub mapping: Mapping,
    pub filtering: Filtering,
    pub hairpin: bool,
    /// Of an entry without an outgoing packet (RFC 4787, REQ-6).
    pub timeout: Duration,
    pub public_ip: IpAddr,
    /// The NATs between this one and the Internet.
    pub outer: Vec<usize>,
    entries: Vec<Entry>,
    next_port: u16,
}

#[derive(Debug)]
struct Entry {
    inside: SocketAddr,
    /// The only destination of this mapping, where it depends on it.
    destination: Option<SocketAddr>,
    outside: SocketAddr,
    /// To whom was sent, and when last.
    sent: BTreeMap<SocketAddr, Instant>,
}

impl Nat {
    pub fn new(mapping: Mapping, filtering: Filtering, public_ip: &str, outer: Vec<usize>) -> Self {
        Self {
            mapping,
            filtering,
            hairpin: false,
            timeout: Duration::from_secs(30),
            public_ip: public_ip.parse().unwrap(),
            outer,
            entries: Vec::new(),
            next_port: 40_000,
        }
    }

    /// Forgets every mapping, as after a reboot, and hands out other ports from now on.
    pub fn flush(&mut self) {
        self.entries.clear();
        self.next_port += 777;
    }

    pub fn entries(&self) -> usize {
        self.entries.len()
    }

    fn outbound(&mut self, now: Instant, inside: SocketAddr, to: SocketAddr) -> SocketAddr {
        self.expire(now);
        let destination = match self.mapping {
            Mapping::AddressAndPortDependent => Some(to),
            _ => None,
        };
        let known = self
            .entries
            .iter()
            .position(|entry| entry.inside == inside && entry.destination == destination);
        let at = known.unwrap_or_else(|| {
            let outside = if self.mapping == Mapping::None {
                inside
            } else {
                self.next_port += 1;
                SocketAddr::new(self.public_ip, self.next_port)
            };
            self.entries.push(Entry { inside, destination, outside, sent: BTreeMap::new() });
            self.entries.len() - 1
        });
        self.entries[at].sent.insert(to, now);
        self.entries[at].outside
    }

    fn inbound(&mut self, now: Instant, to: SocketAddr, from: SocketAddr) -> Option<SocketAddr> {
        self.expire(now);
        let entry = self.entries.iter().find(|entry| {
            entry.outside == to
                && match self.filtering {
                    Filtering::EndpointIndependent => true,
                    Filtering::AddressDependent => {
                        entry.sent.keys().any(|sent| sent.ip() == from.ip())
                    }
                    Filtering::AddressAndPortDependent => entry.sent.contains_key(&from),
                }
        });
        Some(entry?.inside)
    }

    fn expire(&mut self, now: Instant) {
        let timeout = self.timeout;
        for entry in &mut self.entries {
            entry.sent.retain(|_, at| now.since(*at) < timeout);
        }
        self.entries.retain(|entry| !entry.sent.is_empty());
    }
}

/// Where a datagram came out.
pub struct Arrival {
    /// As the receiver sees it.
    pub source: SocketAddr,
    /// None: a server on the Internet.
    pub gateway: Option<usize>,
    /// It passed a NAT on its way.
    pub crossed: bool,
}

/// Carries a datagram from a gateway outwards until its destination is found. None: dropped.
pub fn carry(
    nats: &mut [Nat],
    gateways: &[Gateway],
    now: Instant,
    from: SocketAddr,
    chain: &[usize],
    to: SocketAddr,
) -> Option<Arrival> {
    let mut source = from;
    for level in 0..=chain.len() {
        let segment = &chain[level..];
        let came_through = level.checked_sub(1).map(|before| chain[before]);
        if let Some(gateway) = find(nats, gateways, now, segment, to, source, came_through)? {
            return Some(Arrival { source, gateway: Some(gateway), crossed: level > 0 });
        }
        if let Some(nat) = segment.first() {
            source = nats[*nat].outbound(now, source, to);
        }
    }
    let server = STUN_SERVERS.iter().any(|server| to == server.parse().unwrap());
    server.then_some(Arrival { source, gateway: None, crossed: true })
}

/// Carries a datagram of a server on the Internet inwards.
pub fn arrive(
    nats: &mut [Nat],
    gateways: &[Gateway],
    now: Instant,
    from: SocketAddr,
    to: SocketAddr,
) -> Option<usize> {
    find(nats, gateways, now, &[], to, from, None)?
}

/// Who has this address in this segment, behind however many NATs. `Some(None)`: nobody, look
/// further out; `None`: the datagram was dropped.
fn find(
    nats: &mut [Nat],
    gateways: &[Gateway],
    now: Instant,
    segment: &[usize],
    to: SocketAddr,
    from: SocketAddr,
    came_through: Option<usize>,
) -> Option<Option<usize>> {
    let here = |gateway: &Gateway| gateway.chain == segment && gateway.socket == to;
    if let Some(gateway) = gateways.iter().position(here) {
        return Some(Some(gateway));
    }
    let nat = nats.iter().enumerate().position(|(at, nat)| {
        let firewalled = || {
            let inside = |gateway: &Gateway| gateway.chain.first() == Some(&at);
            gateways.iter().any(|gateway| inside(gateway) && gateway.socket == to)
        };
        nat.outer == segment
            && match nat.mapping {
                Mapping::None => firewalled(),
                _ => nat.public_ip == to.ip(),
            }
    });
    let Some(at) = nat else { return Some(None) };
    if came_through == Some(at) && !nats[at].hairpin {
        return None;
    }
    let inside = nats[at].inbound(now, to, from)?;
    let mut inner = vec![at];
    inner.extend(segment);
    find(nats, gateways, now, &inner, inside, from, None)?.map(Some)
}
