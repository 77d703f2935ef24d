//! IPv4 from a network that has only IPv6: the prefix of its NAT64 (RFC 7050) and the addresses that
//! it makes of IPv4's (RFC 6052).
//!
//! A host in such a network treats NAT64 as one more uplink, for IPv4: what the path finder sends to
//! an IPv4 address leaves as IPv6 by [`Nat64::to_wire`], and what comes from a synthesised address is
//! from the IPv4 one by [`Nat64::from_wire`]. So candidates, relays and STUN servers need no change.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::limits::{
    NAT64_ANSWERS_MAX, NAT64_LOOK_UP_INTERVAL, NAT64_PREFIXES_MAX, NAT64_RETRY_MIN,
};
use crate::portmap::is_public;
use crate::time::Instant;

/// The name that has only these IPv4 addresses: whatever IPv6 address it has was synthesised.
pub const NAME: &str = "ipv4only.arpa";
const WELL_KNOWN_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 0, 170), Ipv4Addr::new(192, 0, 0, 171)];
/// 64:ff9b::/96, which must not carry private addresses (RFC 6052, section 3.1).
const WELL_KNOWN_PREFIX: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);

/// Where a prefix of each length has the IPv4 address (RFC 6052, section 2.2): around byte 8, which
/// is zero.
const LENGTHS: [(u8, [usize; 4]); 6] = [
    (96, [12, 13, 14, 15]),
    (64, [9, 10, 11, 12]),
    (56, [7, 9, 10, 11]),
    (48, [6, 7, 9, 10]),
    (40, [5, 6, 7, 9]),
    (32, [4, 5, 6, 7]),
];
/// Bits 64 to 71 of an address whose prefix is shorter than 96.
const ZERO_BYTE: usize = 8;

/// Under which a network has all IPv4 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    /// Zero behind `length`.
    address: Ipv6Addr,
    /// 32, 40, 48, 56, 64 or 96.
    length: u8,
}

impl Prefix {
    /// `None` if the length is none of RFC 6052's, or bits 64 to 71 are not zero.
    pub fn new(address: Ipv6Addr, length: u8) -> Option<Self> {
        positions(length)?;
        let address = Ipv6Addr::from_bits(address.to_bits() & mask(length));
        (address.octets()[ZERO_BYTE] == 0).then_some(Self { address, length })
    }

    pub fn address(&self) -> Ipv6Addr {
        self.address
    }

    pub fn length(&self) -> u8 {
        self.length
    }

    /// The IPv6 address by which `ip` is reached.
    pub fn synthesise(&self, ip: Ipv4Addr) -> Ipv6Addr {
        let mut octets = self.address.octets();
        for (at, byte) in positions(self.length).into_iter().flatten().zip(ip.octets()) {
            octets[at] = byte;
        }
        octets.into()
    }

    /// The IPv4 address that `ip` was made of; what follows it is not looked at, as RFC 6052 wants.
    pub fn extract(&self, ip: Ipv6Addr) -> Option<Ipv4Addr> {
        if ip.to_bits() & mask(self.length) != self.address.to_bits() {
            return None;
        }
        let octets = ip.octets();
        if self.length != 96 && octets[ZERO_BYTE] != 0 {
            return None;
        }
        positions(self.length).map(|positions| positions.map(|at| octets[at]).into())
    }
}

fn positions(length: u8) -> Option<[usize; 4]> {
    LENGTHS.into_iter().find(|known| known.0 == length).map(|known| known.1)
}

fn mask(length: u8) -> u128 {
    u128::MAX << (128 - u32::from(length.clamp(1, 128)))
}

/// The prefixes of a network, from the IPv6 addresses that [`NAME`] has there, in their order.
///
/// An address can be read with more than one length where the prefix itself holds bytes of the
/// well-known addresses. A prefix under which both of them were answered is right (RFC 7050, section
/// 3); else one whose answers have nothing behind the IPv4 address.
pub fn discover(answers: &[Ipv6Addr]) -> Vec<Prefix> {
    let mut found: Vec<(Prefix, [bool; 2], bool)> = Vec::new();
    for answer in answers.iter().take(NAT64_ANSWERS_MAX) {
        for (length, _) in LENGTHS {
            let Some(prefix) = Prefix::new(*answer, length) else { continue };
            let Some(ip) = prefix.extract(*answer) else { continue };
            let Some(which) = WELL_KNOWN_V4.iter().position(|known| *known == ip) else { continue };
            let bare = prefix.synthesise(ip) == *answer;
            let at = found.iter().position(|(known, ..)| *known == prefix).unwrap_or_else(|| {
                found.push((prefix, [false; 2], true));
                found.len() - 1
            });
            found[at].1[which] = true;
            found[at].2 &= bare;
        }
    }
    let best = |(_, seen, bare): &(Prefix, [bool; 2], bool)| (*seen == [true; 2], *bare);
    let Some(level) = found.iter().map(best).max() else { return Vec::new() };
    found.retain(|entry| best(entry) == level);
    found.truncate(NAT64_PREFIXES_MAX);
    found.into_iter().map(|(prefix, ..)| prefix).collect()
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The network changed, or the process started. Where there is no IPv6 there is no NAT64.
    Network { has_ipv6: bool },
    /// What [`Output::LookUp`] found, or why nothing.
    Answers(Result<Vec<IpAddr>, String>),
    /// The instant of the last [`Output::Timeout`] is here.
    Timeout,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Look [`NAME`] up and hand in all its addresses. One at a time.
    LookUp,
    Event(Event),
    Timeout(Instant),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The prefixes from now on, the first for new addresses; empty: there is no NAT64.
    Prefixes(Vec<Prefix>),
    /// The name server does not answer; told once until it does.
    NoResolver(String),
}

/// Keeps the prefixes of the network known. Sans-IO: [`Self::handle`] what happened, then do what
/// [`Self::poll_output`] says until it says nothing more.
#[derive(Debug, Default)]
pub struct Nat64 {
    prefixes: Vec<Prefix>,
    has_ipv6: bool,
    /// A look-up was asked for and has not ended; one of an older network is repeated.
    busy: bool,
    stale: bool,
    look_at: Option<Instant>,
    retry: Option<Duration>,
    outputs: VecDeque<Output>,
    told: bool,
}

impl Nat64 {
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.told = false;
        match input {
            Input::Network { has_ipv6 } => {
                self.has_ipv6 = has_ipv6;
                self.stale = self.busy;
                self.retry = None;
                self.look_at = has_ipv6.then_some(now);
                if !has_ipv6 {
                    self.set(Vec::new());
                }
            }
            Input::Answers(answers) => {
                self.busy = false;
                let stale = std::mem::take(&mut self.stale);
                if self.has_ipv6 && !stale {
                    self.answered(now, answers);
                }
            }
            Input::Timeout => {}
        }
        if !self.busy && self.look_at.is_some_and(|at| at <= now) {
            self.look_at = None;
            self.busy = true;
            self.outputs.push_back(Output::LookUp);
        }
    }

    /// What to do next; after the last [`Output::Timeout`], nothing.
    pub fn poll_output(&mut self) -> Option<Output> {
        if let Some(output) = self.outputs.pop_front() {
            return Some(output);
        }
        if self.told || self.busy {
            return None;
        }
        self.told = true;
        self.look_at.map(Output::Timeout)
    }

    /// The prefixes of this network.
    pub fn prefixes(&self) -> &[Prefix] {
        &self.prefixes
    }

    /// Where a datagram to an IPv4 address goes; `None` without NAT64, and for private addresses
    /// under the well-known prefix, which must not carry them.
    pub fn to_wire(&self, address: SocketAddr) -> Option<SocketAddr> {
        let IpAddr::V4(ip) = address.ip().to_canonical() else { return None };
        let prefix = self.prefixes.first()?;
        let carries = prefix.address != WELL_KNOWN_PREFIX || is_public(ip.into());
        carries.then(|| SocketAddr::new(prefix.synthesise(ip).into(), address.port()))
    }

    /// Which IPv4 address a datagram is from, if it came through a NAT64.
    pub fn from_wire(&self, address: SocketAddr) -> Option<SocketAddr> {
        let IpAddr::V6(ip) = address.ip() else { return None };
        let ip = self.prefixes.iter().find_map(|prefix| prefix.extract(ip))?;
        Some(SocketAddr::new(ip.into(), address.port()))
    }

    fn answered(&mut self, now: Instant, answers: Result<Vec<IpAddr>, String>) {
        match answers {
            Ok(addresses) => {
                let v6 = addresses.iter().filter_map(|address| match address {
                    IpAddr::V6(address) => Some(*address),
                    IpAddr::V4(_) => None,
                });
                self.retry = None;
                self.look_at = Some(now + NAT64_LOOK_UP_INTERVAL);
                let prefixes = discover(&v6.take(NAT64_ANSWERS_MAX).collect::<Vec<_>>());
                self.set(prefixes);
            }
            // What is known stays: a name server that is away says nothing about the NAT64.
            Err(why) => {
                if self.retry.is_none() {
                    self.outputs.push_back(Output::Event(Event::NoResolver(why)));
                }
                let pause = self.retry.unwrap_or(NAT64_RETRY_MIN);
                self.retry = Some((pause * 2).min(NAT64_LOOK_UP_INTERVAL));
                self.look_at = Some(now + pause);
            }
        }
    }

    fn set(&mut self, prefixes: Vec<Prefix>) {
        if prefixes != self.prefixes {
            self.prefixes.clone_from(&prefixes);
            self.outputs.push_back(Output::Event(Event::Prefixes(prefixes)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefix(address: &str, length: u8) -> Prefix {
        Prefix::new(address.parse().unwrap(), length).unwrap()
    }

    fn outputs(nat64: &mut Nat64) -> Vec<Output> {
        std::iter::from_fn(|| nat64.poll_output()).collect()
    }

    #[test]
    fn addresses_are_those_of_rfc_6052() {
        // The table of section 2.4.
        let ip = Ipv4Addr::new(192, 0, 2, 33);
        for (address, length, expected) in [
            ("2001:db8::", 32, "2001:db8:c000:221::"),
            ("2001:db8:100::", 40, "2001:db8:1c0:2:21::"),
            ("2001:db8:122::", 48, "2001:db8:122:c000:2:2100::"),
            ("2001:db8:122:300::", 56, "2001:db8:122:3c0:0:221::"),
            ("2001:db8:122:344::", 64, "2001:db8:122:344:c0:2:2100::"),
            ("2001:db8:122:344::", 96, "2001:db8:122:344::192.0.2.33"),
            ("64:ff9b::", 96, "64:ff9b::192.0.2.33"),
        ] {
            let prefix = prefix(address, length);
            let synthesised: Ipv6Addr = expected.parse().unwrap();
            assert_eq!(prefix.synthesise(ip), synthesised);
            assert_eq!(prefix.extract(synthesised), Some(ip));
            let answers = WELL_KNOWN_V4.map(|known| prefix.synthesise(known));
            assert_eq!(discover(&answers), [prefix], "{length}");
            assert_eq!(discover(&answers[1..]), [prefix], "{length}, one answer");
        }
    }

    #[test]
    fn what_is_no_prefix_is_none() {
        assert_eq!(Prefix::new("2001:db8::".parse().unwrap(), 33), None);
        assert_eq!(Prefix::new("2001:db8::".parse().unwrap(), 0), None);
        assert_eq!(Prefix::new("2001:db8:0:0:100::".parse().unwrap(), 96), None);
        assert_eq!(discover(&[]), []);
        // A resolver that answers with its own page.
        assert_eq!(discover(&["2001:db8::1".parse().unwrap()]), []);
        // Bits 64 to 71 are not zero.
        assert_eq!(discover(&["2001:db8:c000:aa:100::".parse().unwrap()]), []);
    }

    #[test]
    fn a_prefix_that_holds_the_well_known_address_is_told_from_it() {
        // The /96's own bytes look like an answer under a /32.
        let right = prefix("2001:db8:c000:aa::", 96);
        let answers = WELL_KNOWN_V4.map(|known| right.synthesise(known));
        assert_eq!(discover(&answers), [right]);
    }

    #[test]
    fn private_addresses_do_not_go_under_the_well_known_prefix() {
        let mut nat64 = Nat64 { prefixes: vec![prefix("64:ff9b::", 96)], ..Nat64::default() };
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(nat64.to_wire(address("10.0.0.1:1")), None);
        assert_eq!(nat64.to_wire(address("[2001:db8::1]:1")), None);
        let there = address("[64:ff9b::808:808]:3478");
        assert_eq!(nat64.to_wire(address("8.8.8.8:3478")), Some(there));
        assert_eq!(nat64.from_wire(there), Some(address("8.8.8.8:3478")));
        assert_eq!(nat64.from_wire(address("[2001:db8::1]:1")), None);
        nat64.prefixes = vec![prefix("2001:db8:64::", 96)];
        assert!(nat64.to_wire(address("10.0.0.1:1")).is_some());
    }

    #[test]
    fn prefixes_follow_the_network() {
        let mut now = Instant::default();
        let mut nat64 = Nat64::default();
        nat64.handle(now, Input::Network { has_ipv6: true });
        assert_eq!(outputs(&mut nat64), [Output::LookUp]);
        // The network changes while the look-up is on its way: it is repeated, its answer not used.
        nat64.handle(now, Input::Network { has_ipv6: true });
        assert_eq!(outputs(&mut nat64), []);
        let of_before = prefix("64:ff9b::", 96).synthesise(WELL_KNOWN_V4[0]);
        nat64.handle(now, Input::Answers(Ok(vec![of_before.into()])));
        assert_eq!(outputs(&mut nat64), [Output::LookUp]);
        // No name server: said once, tried again.
        for pause in [NAT64_RETRY_MIN, NAT64_RETRY_MIN * 2] {
            nat64.handle(now, Input::Answers(Err("no".into())));
            let mut expected = vec![Output::Timeout(now + pause)];
            if pause == NAT64_RETRY_MIN {
                expected.insert(0, Output::Event(Event::NoResolver("no".into())));
            }
            assert_eq!(outputs(&mut nat64), expected);
            now = now + pause;
            nat64.handle(now, Input::Timeout);
            assert_eq!(outputs(&mut nat64), [Output::LookUp]);
        }
        let right = prefix("2001:db8:64::", 96);
        let addresses = vec![WELL_KNOWN_V4[0].into(), right.synthesise(WELL_KNOWN_V4[0]).into()];
        nat64.handle(now, Input::Answers(Ok(addresses)));
        let again = Output::Timeout(now + NAT64_LOOK_UP_INTERVAL);
        assert_eq!(outputs(&mut nat64), [Output::Event(Event::Prefixes(vec![right])), again]);
        nat64.handle(now, Input::Network { has_ipv6: false });
        assert_eq!(outputs(&mut nat64), [Output::Event(Event::Prefixes(vec![]))]);
    }

    proptest! {
        #[test]
        fn any_prefix_is_found_and_carries_any_address(
            bits: u128,
            length in prop::sample::select(LENGTHS.map(|known| known.0).to_vec()),
            ip: Ipv4Addr,
        ) {
            let bits = bits & !(0xff << (8 * (15 - ZERO_BYTE)));
            let prefix = Prefix::new(Ipv6Addr::from_bits(bits), length).unwrap();
            prop_assert_eq!(prefix.extract(prefix.synthesise(ip)), Some(ip));
            let answers = WELL_KNOWN_V4.map(|known| prefix.synthesise(known));
            prop_assert_eq!(discover(&answers), [prefix]);
        }

        #[test]
        fn no_list_of_answers_does_harm(answers: Vec<u128>) {
            let answers: Vec<Ipv6Addr> = answers.into_iter().map(Ipv6Addr::from_bits).collect();
            prop_assert!(discover(&answers).len() <= NAT64_PREFIXES_MAX);
        }
    }
}
