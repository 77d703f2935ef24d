//! Looks the name of a host up beside everything else: the C library only knows how to wait.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

/// One look-up at a time, and the addresses of the last that worked.
#[derive(Debug)]
pub struct Resolver {
    bell: Arc<Bell>,
    running: Option<(String, Receiver<io::Result<Vec<IpAddr>>>)>,
    /// A name server may be away when its answer is needed most.
    last: Option<(String, Vec<IpAddr>)>,
}

/// How a look-up's thread wakes the owner.
#[derive(Debug)]
struct Bell {
    fd: OwnedFd,
    /// Set after the descriptor was: who sees it can silence that.
    rung: AtomicBool,
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
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = Arc::new(Bell { fd, rung: AtomicBool::new(false) });
        Ok(Self { bell, running: None, last: None })
    }

    /// Asks for a host. A question that is still on its way serves again: a dead name server costs
    /// one thread, however often we try.
    pub fn ask(&mut self, host: &str) -> Found {
        if let Ok(address) = host.parse() {
            return Found::Addresses(vec![address]);
        }
        if self.running.as_ref().is_some_and(|(asked, _)| asked == host) {
            return self.poll();
        }
        let (sender, receiver) = mpsc::channel();
        let (name, bell) = (host.to_owned(), self.bell.clone());
        let run = move || {
            let found = (name.as_str(), 0).to_socket_addrs();
            let found = found.map(|all| all.map(|address: SocketAddr| address.ip()).collect());
            // Nobody listens any more, or is awake already: both are fine.
            let _ = sender.send(found);
            let _ = rustix::io::write(&bell.fd, &1_u64.to_ne_bytes());
            bell.rung.store(true, Ordering::Release);
        };
        match thread::Builder::new().name("relay-look-up".into()).spawn(run) {
            Ok(_) => {
                self.running = Some((host.to_owned(), receiver));
                Found::NotYet
            }
            Err(error) => Found::Error(error.to_string()),
        }
    }

    /// Looks whether the answer is there.
    pub fn poll(&mut self) -> Found {
        let Some((host, receiver)) = &self.running else {
            return Found::Error("the look-up ended without an answer".into());
        };
        let found = match receiver.try_recv() {
            Err(TryRecvError::Empty) => return Found::NotYet,
            Ok(Ok(addresses)) if addresses.is_empty() => Found::Error("it has no address".into()),
            Ok(Ok(addresses)) => {
                self.last = Some((host.clone(), addresses.clone()));
                Found::Addresses(addresses)
            }
            Ok(Err(error)) => Found::Error(error.to_string()),
            Err(TryRecvError::Disconnected) => Found::Error("the look-up ended".into()),
        };
        self.running = None;
        found
    }

    /// Silences the descriptor if a look-up ended, whether anybody still waits for it or not. True
    /// if one did.
    pub fn heard(&mut self) -> bool {
        let rung = self.bell.rung.swap(false, Ordering::Acquire);
        if rung {
            let _ = rustix::io::read(&self.bell.fd, &mut [0; 8]);
        }
        rung
    }

    /// What an earlier look-up found.
    pub fn last_known(&self, host: &str) -> Option<Vec<IpAddr>> {
        self.last.as_ref().filter(|(of, _)| of == host).map(|(_, addresses)| addresses.clone())
    }
}

impl AsFd for Resolver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn readable(resolver: &Resolver, seconds: i64) -> bool {
        let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
        let mut fds = [PollFd::new(resolver, PollFlags::IN)];
        poll(&mut fds, Some(&limit)).unwrap() > 0
    }

    /// Also one that ends after everybody stopped waiting must not wake the owner for ever.
    #[test]
    fn a_look_up_wakes_once_and_is_remembered() {
        let mut resolver = Resolver::new().unwrap();
        assert!(matches!(resolver.ask("192.0.2.1"), Found::Addresses(_)));
        assert!(matches!(resolver.ask("localhost"), Found::NotYet));
        assert!(readable(&resolver, 30));
        while !resolver.heard() {}
        assert!(!readable(&resolver, 0));
        assert!(matches!(resolver.poll(), Found::Addresses(_)));
        assert!(resolver.last_known("localhost").is_some_and(|all| all[0].is_loopback()));
        assert!(resolver.last_known("other").is_none());
    }
}
