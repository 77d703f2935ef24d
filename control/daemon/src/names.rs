//! Addresses of STUN servers, which may be given by names: looked up again from time to time.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use millrace_config::config::EndpointName;
use millrace_path::time::Instant;

use crate::limits::{NAME_ADDRESSES_MAX, NAMES_AGAIN, NAMES_AGAIN_AFTER_FAILURE};
use crate::look_up::{Answer, LookUps};

/// All servers that are wanted, and what is known of their hosts.
#[derive(Debug)]
pub struct Names {
    wanted: Vec<EndpointName>,
    found: BTreeMap<String, Vec<IpAddr>>,
    failures: BTreeMap<String, String>,
    look_ups: LookUps,
    look_at: Option<Instant>,
}

impl Names {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            wanted: Vec::new(),
            found: BTreeMap::new(),
            failures: BTreeMap::new(),
            look_ups: LookUps::new()?,
            look_at: None,
        })
    }

    /// Looks these up from now on, and no others.
    pub fn want(&mut self, now: Instant, names: Vec<EndpointName>) {
        self.wanted = names;
        let wanted = &self.wanted;
        self.found.retain(|host, _| hosts(wanted).any(|wanted| wanted == host));
        self.failures.clear();
        self.look_ups.clear();
        self.look_at = Some(now);
    }

    /// Looks all up again: the network changed.
    pub fn again(&mut self, now: Instant) {
        self.look_at = Some(now);
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.look_at.filter(|_| self.look_ups.is_idle())
    }

    /// Starts what is due and takes in what was found. True if addresses are new.
    pub fn handle(&mut self, now: Instant) -> bool {
        let (mut answered, mut news) = (false, false);
        while let Some(answer) = self.look_ups.next_answer() {
            answered = true;
            news |= self.take(answer);
        }
        if answered && self.look_ups.is_idle() {
            let failed = !self.failures.is_empty();
            let after = if failed { NAMES_AGAIN_AFTER_FAILURE } else { NAMES_AGAIN };
            self.look_at.get_or_insert(now + after);
        }
        if self.deadline().is_some_and(|at| at <= now) {
            self.look_at = None;
            hosts(&self.wanted).for_each(|host| self.look_ups.ask(host));
        }
        news
    }

    /// Every address that is known now, those given as such first.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let literal = self.wanted.iter().filter_map(|name| match name {
            EndpointName::Address(address) => Some(*address),
            EndpointName::Name(..) => None,
        });
        let mut list: Vec<SocketAddr> = literal.collect();
        for name in &self.wanted {
            let EndpointName::Name(host, port) = name else { continue };
            for ip in self.found.get(host).into_iter().flatten() {
                let address = SocketAddr::new(*ip, *port);
                if !list.contains(&address) {
                    list.push(address);
                }
            }
        }
        list
    }

    /// Hosts that were not found, and why.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.failures.iter().map(|(host, why)| (host.as_str(), why.as_str()))
    }

    fn take(&mut self, Answer { host, found }: Answer) -> bool {
        if !hosts(&self.wanted).any(|wanted| wanted == host) {
            return false;
        }
        match found {
            Ok(mut addresses) => {
                addresses.truncate(NAME_ADDRESSES_MAX);
                self.failures.remove(&host);
                let before = self.found.insert(host, addresses.clone());
                before != Some(addresses)
            }
            // What was found before is better than nothing.
            Err(error) => {
                if self.failures.insert(host.clone(), error.clone()).is_none() {
                    tracing::warn!(host, error, "the name of a STUN server is not found");
                }
                false
            }
        }
    }
}

impl AsFd for Names {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.look_ups.as_fd()
    }
}

fn hosts(names: &[EndpointName]) -> impl Iterator<Item = &str> {
    names.iter().filter_map(|name| match name {
        EndpointName::Address(_) => None,
        EndpointName::Name(host, _) => Some(host.as_str()),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn settle(names: &mut Names, now: Instant) {
        names.handle(now);
        while !names.look_ups.is_idle() {
            let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
            let woken = poll(&mut [PollFd::new(&*names, PollFlags::IN)], Some(&limit)).unwrap();
            assert_eq!(woken, 1, "no answer");
            names.handle(now);
        }
    }

    #[test]
    fn names_are_looked_up_again_the_sooner_if_one_failed() {
        let (mut names, now) = (Names::new().unwrap(), Instant::default());
        let localhost = |port| EndpointName::Name("localhost".to_owned(), port);
        let literal = EndpointName::Address(SocketAddr::from(([192, 0, 2, 1], 3478)));
        // No name server is asked for such a name.
        let bad = EndpointName::Name("..".to_owned(), 3478);
        names.want(now, vec![localhost(3478), bad, literal, localhost(3480)]);
        assert_eq!(names.deadline(), Some(now));
        settle(&mut names, now);
        let addresses = names.addresses();
        assert_eq!(addresses[0], SocketAddr::from(([192, 0, 2, 1], 3478)));
        for port in [3478, 3480] {
            assert!(addresses[1..].iter().any(|a| a.ip().is_loopback() && a.port() == port));
        }
        assert_eq!(names.failures().map(|(host, _)| host).collect::<Vec<_>>(), [".."]);
        assert_eq!(names.deadline(), Some(now + NAMES_AGAIN_AFTER_FAILURE));
        // What is not wanted any more is no failure either.
        let later = now + Duration::from_secs(1);
        names.want(later, vec![localhost(3478)]);
        assert!(names.addresses().iter().all(|address| address.port() == 3478));
        settle(&mut names, later);
        assert_eq!(names.failures().count(), 0);
        assert_eq!(names.deadline(), Some(later + NAMES_AGAIN));
    }
}
