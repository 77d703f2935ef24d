//! Under load, how many handshakes a source prefix may still start: a token bucket per IPv4
//! address or IPv6 /64, because whoever owns one address of a /64 owns them all.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::limits::{HANDSHAKES_BURST, HANDSHAKES_PER_SECOND, RATE_LIMIT_SOURCES};
use crate::peer::{Endpoint, PeerSlot};
use crate::time::Instant;

/// Bounded in memory; ordered, so that nobody can choose addresses that collide.
#[derive(Default)]
pub struct RateLimiter {
    buckets: BTreeMap<Prefix, Bucket>,
    swept_at: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Prefix {
    V4([u8; 4]),
    V6([u8; 8]),
    /// By its detour.
    Peer(PeerSlot),
}

struct Bucket {
    /// Time that can still be spent; each handshake costs [`COST`].
    credit: Duration,
    updated_at: Instant,
}

const COST: Duration = Duration::from_nanos(1_000_000_000 / HANDSHAKES_PER_SECOND);
const CREDIT_MAX: Duration = Duration::from_nanos(COST.as_nanos() as u64 * HANDSHAKES_BURST);
/// A bucket this old is full again, so it need not be remembered.
const IDLE: Duration = Duration::from_secs(1);

impl RateLimiter {
    /// Takes one token of `source`'s prefix; false if there is none.
    pub fn allow(&mut self, now: Instant, source: &Endpoint) -> bool {
        self.sweep(now);
        let prefix = Prefix::of(source);
        if let Some(bucket) = self.buckets.get_mut(&prefix) {
            bucket.credit = (bucket.credit + now.since(bucket.updated_at)).min(CREDIT_MAX);
            bucket.updated_at = now;
            let Some(rest) = bucket.credit.checked_sub(COST) else { return false };
            bucket.credit = rest;
            return true;
        }
        if self.buckets.len() >= RATE_LIMIT_SOURCES {
            return false;
        }
        self.buckets.insert(prefix, Bucket { credit: CREDIT_MAX - COST, updated_at: now });
        true
    }

    /// At most once a second, and at most [`RATE_LIMIT_SOURCES`] entries.
    fn sweep(&mut self, now: Instant) {
        if self.swept_at.is_none_or(|at| now.since(at) >= IDLE) {
            self.swept_at = Some(now);
            self.buckets.retain(|_, bucket| now.since(bucket.updated_at) < IDLE);
        }
    }
}

impl Prefix {
    fn of(source: &Endpoint) -> Self {
        if let Some(slot) = source.detour_slot() {
            return Self::Peer(slot);
        }
        match source.remote.ip().to_canonical() {
            IpAddr::V4(address) => Self::V4(address.octets()),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Self::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

const _: () = assert!(CREDIT_MAX.as_nanos() < IDLE.as_nanos());

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    impl RateLimiter {
        fn allow_ip(&mut self, now: Instant, ip: IpAddr) -> bool {
            let remote = SocketAddr::new(ip, 51820);
            self.allow(now, &Endpoint { remote, local: None, ifindex: 0 })
        }
    }

    fn at(millis: u64) -> Instant {
        Instant::from_nanos(1_000_000_000 + millis * 1_000_000)
    }

    #[test]
    fn five_at_once_then_one_every_50_ms() {
        let mut limiter = RateLimiter::default();
        let source = "192.0.2.1".parse().unwrap();
        let at_once = (0..20).filter(|_| limiter.allow_ip(at(0), source)).count();
        assert_eq!(at_once, 5);
        assert!(!limiter.allow_ip(at(49), source));
        assert!(limiter.allow_ip(at(50), source));
        assert!(!limiter.allow_ip(at(51), source));
        let in_ten_seconds = (51..10_051).filter(|&t| limiter.allow_ip(at(t), source)).count();
        assert!((199..=201).contains(&in_ten_seconds), "{in_ten_seconds}");
    }

    #[test]
    fn a_whole_slash_64_shares_one_bucket_and_ipv4_addresses_do_not() {
        let mut limiter = RateLimiter::default();
        let v6 = |host: u16| format!("2001:db8:0:1::{host:x}").parse().unwrap();
        assert_eq!((0..50).filter(|&host| limiter.allow_ip(at(0), v6(host))).count(), 5);
        assert!(limiter.allow_ip(at(0), "2001:db8:0:2::1".parse().unwrap()));
        let v4 = |host: u8| IpAddr::from([192, 0, 2, host]);
        assert_eq!((0..50).filter(|&host| limiter.allow_ip(at(0), v4(host))).count(), 50);
        assert_eq!((0..9).filter(|_| limiter.allow_ip(at(0), v4(200))).count(), 5);
        let mapped = "::ffff:192.0.2.200".parse().unwrap();
        assert!(!limiter.allow_ip(at(0), mapped), "a mapped address is the IPv4 address");
    }

    #[test]
    fn each_detour_has_a_bucket() {
        let mut limiter = RateLimiter::default();
        for slot in 0..50 {
            let detour = Endpoint::detour(PeerSlot(slot));
            assert_eq!((0..9).filter(|_| limiter.allow(at(0), &detour)).count(), 5);
        }
    }

    #[test]
    fn memory_is_bounded_and_freed() {
        let mut limiter = RateLimiter::default();
        for n in 0..RATE_LIMIT_SOURCES as u32 + 100 {
            limiter.allow_ip(at(0), IpAddr::from(n.to_be_bytes()));
        }
        assert_eq!(limiter.buckets.len(), RATE_LIMIT_SOURCES);
        assert!(!limiter.allow_ip(at(999), "2001:db8::1".parse().unwrap()));
        assert!(limiter.allow_ip(at(1000), "2001:db8::1".parse().unwrap()));
        assert_eq!(limiter.buckets.len(), 1);
    }
}
