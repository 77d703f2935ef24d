//! NATs as RFC 4787 sorts them: how they map, what they let in, how long they remember.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::nat64::Prefix;

/// RFC 4787, section 4.1; `None` is a firewall that translates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    None,
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
    /// One entry for each destination, all with the port of inside as long as no entry to the same
    /// destination has it: Linux. Easy, until two hosts have the same port or `poisoned`.
    Linux,
}

/// RFC 4787, section 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// Where one is: inside this NAT, or on the Internet.
pub type Segment = Option<usize>;

#[derive(Clone, Debug)]
pub struct Nat {
    pub mapping: Mapping,
    pub filtering: Filtering,
    pub hairpin: bool,
    /// Keeps the port of inside where nobody else has it.
    pub keeps_ports: bool,
    /// What comes in keeps an entry as well (RFC 4787, REQ-6: may).
    pub refreshed_inwards: bool,
    /// What comes in unasked makes an entry of the router itself, so that an answer from inside with
    /// the same port gets another: Linux with an open INPUT chain.
    pub poisoned: bool,
    /// Of an entry without a packet (RFC 4787, REQ-5).
    pub timeout: Duration,
    pub public_ip: IpAddr,
    /// Where its outside is.
    pub outer: Segment,
    /// Inside is IPv6 only, and has IPv4 under this prefix (RFC 6146); IPv6 passes as it is.
    pub nat64: Option<Prefix>,
    /// Ports that are open to all and go to one host inside.
    pub forwards: BTreeMap<u16, SocketAddr>,
    entries: BTreeMap<Key, Entry>,
    /// Outside address and destination to the inside address of the entry.
    back: BTreeMap<Key, SocketAddr>,
    poison: BTreeMap<Key, Instant>,
    /// What came in through a forwarded port: from inside to there answers leave by that port.
    forwarded: BTreeMap<(SocketAddr, SocketAddr), (SocketAddr, Instant)>,
    swept_at: Instant,
    next_port: u16,
}

/// One of our addresses and, where it matters, one of theirs.
type Key = (SocketAddr, Option<SocketAddr>);

#[derive(Clone, Debug)]
struct Entry {
    outside: SocketAddr,
    used_at: Instant,
    /// To whom was sent, and when last.
    sent: BTreeMap<SocketAddr, Instant>,
}

impl Nat {
    pub fn new(mapping: Mapping, filtering: Filtering, public_ip: &str, outer: Segment) -> Self {
        Self {
            mapping,
            filtering,
            hairpin: false,
            keeps_ports: false,
            refreshed_inwards: false,
            poisoned: false,
            timeout: Duration::from_secs(30),
            public_ip: public_ip.parse().unwrap(),
            outer,
            nat64: None,
            forwards: BTreeMap::new(),
            entries: BTreeMap::new(),
            back: BTreeMap::new(),
            poison: BTreeMap::new(),
            forwarded: BTreeMap::new(),
            swept_at: Instant::default(),
            next_port: 40_000,
        }
    }

    /// Forgets every mapping, as after a reboot, and hands out other ports from now on.
    pub fn flush(&mut self) {
        self.entries.clear();
        self.back.clear();
        self.poison.clear();
        self.forwarded.clear();
        self.next_port = 40_000 + (self.next_port + 777) % 20_000;
    }

    pub fn outbound(&mut self, now: Instant, inside: SocketAddr, to: SocketAddr) -> SocketAddr {
        self.sweep(now);
        if let Some((outside, at)) = self.forwarded.get_mut(&(inside, to))
            && now.since(*at) < self.timeout
        {
            *at = now;
            return *outside;
        }
        let destination = match self.mapping {
            Mapping::None | Mapping::EndpointIndependent => None,
            Mapping::AddressDependent => Some(SocketAddr::new(to.ip(), 0)),
            Mapping::AddressAndPortDependent | Mapping::Linux => Some(to),
        };
        let key = (inside, destination);
        let timeout = self.timeout;
        if self.entries.get(&key).is_some_and(|entry| now.since(entry.used_at) >= timeout) {
            self.remove(key);
        }
        if !self.entries.contains_key(&key) {
            let outside = self.outside(now, inside, destination);
            self.back.insert((outside, destination), inside);
            self.entries.insert(key, Entry { outside, used_at: now, sent: BTreeMap::new() });
        }
        let entry = self.entries.get_mut(&key).unwrap();
        entry.used_at = now;
        entry.sent.insert(to, now);
        entry.outside
    }

    pub fn inbound(
        &mut self,
        now: Instant,
        to: SocketAddr,
        from: SocketAddr,
    ) -> Option<SocketAddr> {
        if let Some(inside) = self.forwards.get(&to.port()).copied() {
            self.forwarded.insert((inside, from), (to, now));
            return Some(inside);
        }
        let Some((inside, destination)) = self.admitting(now, to, from) else {
            if self.poisoned {
                self.poison.insert((to, Some(from)), now);
            }
            return None;
        };
        let entry = self.entries.get_mut(&(inside, destination)).unwrap();
        if self.refreshed_inwards {
            entry.used_at = now;
            entry.sent.insert(from, now);
        }
        Some(inside)
    }

    /// The entry that lets this in.
    fn admitting(&self, now: Instant, to: SocketAddr, from: SocketAddr) -> Option<Key> {
        let candidates =
            self.back.range((to, None)..).take_while(|((outside, _), _)| *outside == to);
        let keys = candidates.map(|((_, destination), inside)| (*inside, *destination));
        let fresh = |at: &Instant| now.since(*at) < self.timeout;
        let exact = self.back.get(&(to, Some(from))).map(|inside| (*inside, Some(from)));
        exact.into_iter().chain(keys).find(|key| {
            let entry = &self.entries[key];
            match self.filtering {
                Filtering::EndpointIndependent => fresh(&entry.used_at),
                Filtering::AddressDependent => {
                    let ports = SocketAddr::new(from.ip(), 0)..=SocketAddr::new(from.ip(), 65_535);
                    entry.sent.range(ports).any(|(_, at)| fresh(at))
                }
                Filtering::AddressAndPortDependent => entry.sent.get(&from).is_some_and(fresh),
            }
        })
    }

    /// Address and port for a new entry.
    fn outside(
        &mut self,
        now: Instant,
        inside: SocketAddr,
        destination: Option<SocketAddr>,
    ) -> SocketAddr {
        if self.mapping == Mapping::None {
            return inside;
        }
        let linux = self.mapping == Mapping::Linux;
        let kept = SocketAddr::new(self.public_ip, inside.port());
        let poisoned = self.poison.get(&(kept, destination));
        let poisoned = poisoned.is_some_and(|at| now.since(*at) < self.timeout);
        let taken = |back: &BTreeMap<Key, SocketAddr>, outside: SocketAddr| {
            let other_host = |key: Key| back.get(&key).is_some_and(|host| *host != inside);
            if linux { other_host((outside, destination)) } else { other_host((outside, None)) }
        };
        if (linux || self.keeps_ports)
            && !poisoned
            && !taken(&self.back, kept)
            && (linux || destination.is_none())
        {
            return kept;
        }
        loop {
            self.next_port = 40_000 + (self.next_port - 40_000 + 1) % 20_000;
            let outside = SocketAddr::new(self.public_ip, self.next_port);
            if self.back.range((outside, None)..).next().is_none_or(|((at, _), _)| *at != outside) {
                return outside;
            }
        }
    }

    fn remove(&mut self, key: Key) {
        if let Some(entry) = self.entries.remove(&key) {
            self.back.remove(&(entry.outside, key.1));
        }
    }

    /// Forgets, now and then, what is too old to be looked at.
    fn sweep(&mut self, now: Instant) {
        let timeout = self.timeout;
        if now.since(self.swept_at) < timeout {
            return;
        }
        self.swept_at = now;
        self.poison.retain(|_, at| now.since(*at) < timeout);
        self.forwarded.retain(|_, (_, at)| now.since(*at) < timeout);
        let old = self.entries.iter().filter(|(_, entry)| now.since(entry.used_at) >= timeout);
        for key in old.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.remove(key);
        }
        for entry in self.entries.values_mut() {
            entry.sent.retain(|_, at| now.since(*at) < timeout);
        }
    }
}
