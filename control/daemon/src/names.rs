//! Names of STUN servers, looked up beside everything else: nothing waits for a name server.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use millrace_config::config::EndpointName;
use millrace_path::time::Instant;
use rustix::event::{EventfdFlags, eventfd};

use crate::limits::{NAME_ADDRESSES_MAX, NAMES_AGAIN, NAMES_AGAIN_AFTER_FAILURE};

/// All names that are wanted, and what is known of them.
#[derive(Debug)]
pub struct Names {
    wanted: Vec<EndpointName>,
    found: BTreeMap<String, Vec<SocketAddr>>,
    failures: BTreeMap<String, String>,
    /// A thread is looking now; it ends with its list.
    busy: bool,
    look_at: Option<Instant>,
    sender: Sender<Answer>,
    answers: Receiver<Answer>,
    wake: Arc<OwnedFd>,
}

type Answer = Vec<(String, io::Result<Vec<SocketAddr>>)>;

impl Names {
    pub fn new() -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, answers) = channel();
        Ok(Self {
            wanted: Vec::new(),
            found: BTreeMap::new(),
            failures: BTreeMap::new(),
            busy: false,
            look_at: None,
            sender,
            answers,
            wake,
        })
    }

    /// Looks these up from now on, and no others.
    pub fn want(&mut self, now: Instant, names: Vec<EndpointName>) {
        self.found.retain(|name, _| names.iter().any(|wanted| wanted.to_string() == *name));
        self.failures.clear();
        self.wanted = names;
        self.look_at = Some(now);
    }

    /// Looks all up again: the network changed.
    pub fn again(&mut self, now: Instant) {
        self.look_at = Some(now);
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.look_at.filter(|_| !self.busy)
    }

    /// Starts what is due and takes in what was found. True if addresses are new.
    pub fn handle(&mut self, now: Instant) -> bool {
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut counter);
        let mut news = false;
        while let Ok(answer) = self.answers.try_recv() {
            self.busy = false;
            news |= self.take(now, answer);
        }
        if !self.busy && self.look_at.is_some_and(|at| at <= now) {
            self.look_at = None;
            self.start(now);
        }
        news
    }

    /// Every address that is known now, those given as such first.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let mut list: Vec<SocketAddr> = self.wanted.iter().filter_map(literal).collect();
        for address in self.found.values().flatten() {
            if !list.contains(address) {
                list.push(*address);
            }
        }
        list
    }

    /// Names that were not found, and why.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.failures.iter().map(|(name, why)| (name.as_str(), why.as_str()))
    }

    fn start(&mut self, now: Instant) {
        let named = |name: &EndpointName| literal(name).is_none().then(|| name.to_string());
        let names: Vec<String> = self.wanted.iter().filter_map(named).collect();
        if names.is_empty() {
            return;
        }
        let (sender, wake) = (self.sender.clone(), Arc::clone(&self.wake));
        let work = move || {
            let answer = names.into_iter().map(|name| {
                let found = name.to_socket_addrs().map(|found| found.collect());
                (name, found)
            });
            // Whoever asked may be gone.
            let _ = sender.send(answer.collect());
            let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
        };
        match thread::Builder::new().name("look-up".into()).spawn(work) {
            Ok(_) => self.busy = true,
            Err(error) => {
                tracing::error!(%error, "no thread for looking names up");
                self.look_at = Some(now + NAMES_AGAIN_AFTER_FAILURE);
            }
        }
    }

    fn take(&mut self, now: Instant, answer: Answer) -> bool {
        let before = self.addresses();
        let mut failed = false;
        for (name, found) in answer {
            if !self.wanted.iter().any(|wanted| wanted.to_string() == name) {
                continue;
            }
            match found {
                Ok(mut addresses) => {
                    addresses.truncate(NAME_ADDRESSES_MAX);
                    self.failures.remove(&name);
                    self.found.insert(name, addresses);
                }
                // What was found before is better than nothing.
                Err(error) => {
                    failed = true;
                    if self.failures.insert(name.clone(), error.to_string()).is_none() {
                        tracing::warn!(name, %error, "the name of a STUN server is not found");
                    }
                }
            }
        }
        let after = if failed { NAMES_AGAIN_AFTER_FAILURE } else { NAMES_AGAIN };
        self.look_at.get_or_insert(now + after);
        self.addresses() != before
    }
}

impl AsFd for Names {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn literal(name: &EndpointName) -> Option<SocketAddr> {
    match name {
        EndpointName::Address(address) => Some(*address),
        EndpointName::Name(..) => None,
    }
}
