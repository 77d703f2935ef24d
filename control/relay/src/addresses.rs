//! How many connections each client address has, so that one cannot take all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};

/// The connections of each IPv4 address and each IPv6 /64, which is what one customer has.
#[derive(Debug)]
pub struct Addresses {
    most: usize,
    counts: Mutex<HashMap<IpAddr, usize>>,
}

impl Addresses {
    pub fn new(most: usize) -> Self {
        Self { most, counts: Mutex::default() }
    }

    /// Counts one more, unless that were too many.
    pub fn enter(&self, address: IpAddr) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(customer(address)).or_insert(0);
        let room = *count < self.most;
        *count += usize::from(room);
        room
    }

    /// One that entered has gone.
    pub fn leave(&self, address: IpAddr) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let address = customer(address);
        if let Some(count) = counts.get_mut(&address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(&address);
            }
        }
    }
}

fn customer(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_customer_has_its_share() {
        let addresses = Addresses::new(2);
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(addresses.enter(ip("192.0.2.1")) && addresses.enter(ip("::ffff:192.0.2.1")));
        assert!(!addresses.enter(ip("192.0.2.1")) && addresses.enter(ip("192.0.2.2")));
        addresses.leave(ip("192.0.2.1"));
        assert!(addresses.enter(ip("192.0.2.1")) && !addresses.enter(ip("192.0.2.1")));
        assert!(addresses.enter(ip("2001:db8::1")) && addresses.enter(ip("2001:db8::2")));
        assert!(!addresses.enter(ip("2001:db8::3")) && addresses.enter(ip("2001:db8:0:1::3")));
        for address in ["192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::9", "2001:db8::9"] {
            addresses.leave(ip(address));
        }
        addresses.leave(ip("2001:db8:0:1::3"));
        assert!(addresses.counts.lock().unwrap().is_empty());
    }
}
