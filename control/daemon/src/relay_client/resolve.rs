//! The addresses of the host that is dialled, as far as a name server or memory has them.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use crate::look_up::LookUps;

/// Look-ups, and the addresses of the last that worked.
#[derive(Debug)]
pub struct Resolver {
    look_ups: LookUps,
    /// A name server may be away when its answer is needed most.
    last: Option<(String, Vec<IpAddr>)>,
}

/// What is known of a name.
#[derive(Debug)]
pub enum Found {
    /// The look-up goes on.
    NotYet,
    Addresses(Vec<IpAddr>),
    Error(String),
}

impl Resolver {
    pub fn new() -> io::Result<Self> {
        Ok(Self { look_ups: LookUps::new()?, last: None })
    }

    /// Asks for a host.
    pub fn ask(&mut self, host: &str) -> Found {
        if let Ok(address) = host.parse() {
            return Found::Addresses(vec![address]);
        }
        self.look_ups.ask(host);
        Found::NotYet
    }

    /// Takes in what was found, whether anybody still waits for it or not, and says what is known of
    /// `host` now.
    pub fn poll(&mut self, host: &str) -> Found {
        let mut known = Found::NotYet;
        while let Some(answer) = self.look_ups.next_answer() {
            let is_asked = answer.host == host;
            match answer.found {
                Ok(addresses) => {
                    self.last = Some((answer.host, addresses.clone()));
                    if is_asked {
                        known = Found::Addresses(addresses);
                    }
                }
                Err(error) if is_asked => known = Found::Error(error),
                Err(_) => {}
            }
        }
        known
    }

    /// What an earlier look-up found.
    pub fn last_known(&self, host: &str) -> Option<Vec<IpAddr>> {
        self.last.as_ref().filter(|(of, _)| of == host).map(|(_, addresses)| addresses.clone())
    }
}

impl AsFd for Resolver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.look_ups.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Also what came after everybody stopped waiting.
    #[test]
    fn what_was_found_is_remembered() {
        let mut resolver = Resolver::new().unwrap();
        assert!(matches!(resolver.ask("192.0.2.1"), Found::Addresses(_)));
        assert!(matches!(resolver.ask("localhost"), Found::NotYet));
        let start = Instant::now();
        while resolver.last_known("localhost").is_none() {
            assert!(start.elapsed() < Duration::from_secs(30), "no answer");
            assert!(matches!(resolver.poll(""), Found::NotYet));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(resolver.last_known("localhost").is_some_and(|all| all[0].is_loopback()));
        assert!(resolver.last_known("other").is_none());
        // No name server is asked for such a name.
        assert!(matches!(resolver.ask(".."), Found::NotYet));
        loop {
            match resolver.poll("..") {
                Found::NotYet => assert!(start.elapsed() < Duration::from_secs(60)),
                Found::Error(_) => break,
                Found::Addresses(found) => panic!("{found:?}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(resolver.last_known("localhost").is_some(), "better than nothing");
    }
}
