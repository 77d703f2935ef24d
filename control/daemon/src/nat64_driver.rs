//! Finds the NAT64 of an IPv6-only network by the system's resolver, on a thread beside everything.
//!
//! How the owner uses it:
//!
//! 1. `Nat64Driver::new()`, then `network_changed(now, has_ipv6)` at the start and after each change
//!    of the network; `has_ipv6`: there is a default route for it.
//! 2. In the event loop: wait for `interest()` and `deadline()`, call `handle(now)`, then take
//!    `next_event()` until there is none.
//! 3. With `Prefixes` that are not empty and no IPv4 default route, declare one more uplink to the
//!    finder, of family IPv4: what it sends there leaves by the IPv6 socket to
//!    `nat64().to_wire(address)`, and what arrives from an address for which
//!    `nat64().from_wire(address)` is something is from there, on that uplink. The same for what goes
//!    into the data plane's table, for relays' and for STUN servers' addresses.
//! 4. `NoResolver` is one clear error for the log; everything else goes on.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use millrace_path::Instant;
use millrace_path::nat64::{Event, Input, NAME, Nat64, Output};
use rustix::event::{EventfdFlags, PollFlags, eventfd};

type Answers = Result<Vec<IpAddr>, String>;

/// The finder of prefixes with its thread.
#[derive(Debug)]
pub struct Nat64Driver {
    nat64: Nat64,
    deadline: Option<Instant>,
    events: VecDeque<Event>,
    sender: Sender<Answers>,
    answers: Receiver<Answers>,
    /// Readable when an answer is there.
    wake: Arc<OwnedFd>,
}

impl Nat64Driver {
    pub fn new() -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, answers) = channel();
        Ok(Self {
            nat64: Nat64::default(),
            deadline: None,
            events: VecDeque::new(),
            sender,
            answers,
            wake,
        })
    }

    /// Looks the prefix up, or forgets it where there is no IPv6.
    pub fn network_changed(&mut self, now: Instant, has_ipv6: bool) {
        self.input(now, Input::Network { has_ipv6 });
    }

    /// What to wait for: the same descriptor for as long as the driver lives.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.wake.as_fd(), PollFlags::IN)
    }

    /// When [`Self::handle`] must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Does what is due. Then take [`Self::next_event`] until there is none.
    pub fn handle(&mut self, now: Instant) {
        let mut counter = [0; 8];
        // Nothing to read: nobody called.
        let _ = rustix::io::read(&self.wake, &mut counter);
        while let Ok(answers) = self.answers.try_recv() {
            self.input(now, Input::Answers(answers));
        }
        if self.deadline.is_some_and(|at| at <= now) {
            self.input(now, Input::Timeout);
        }
    }

    /// What happened, oldest first.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The prefixes, and the translation by them.
    pub fn nat64(&self) -> &Nat64 {
        &self.nat64
    }

    fn input(&mut self, now: Instant, input: Input) {
        self.nat64.handle(now, input);
        self.deadline = None;
        while let Some(output) = self.nat64.poll_output() {
            match output {
                Output::LookUp => self.look_up(),
                Output::Event(event) => self.events.push_back(event),
                Output::Timeout(at) => self.deadline = Some(at),
            }
        }
    }

    /// One at a time: the core asks for the next when this one has ended.
    fn look_up(&self) {
        let (sender, wake) = (self.sender.clone(), Arc::clone(&self.wake));
        let tell = move |answers: Answers| {
            // Whoever asked may be gone.
            let _ = sender.send(answers);
            let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
        };
        let told = tell.clone();
        let look = move || {
            let found = (NAME, 0).to_socket_addrs();
            told(found.map(|found| found.map(|address: SocketAddr| address.ip()).collect()).map_err(
                |error| {
                    format!(
                        "{NAME}: {error}; check /etc/resolv.conf: without a name server this host \
                         does not learn how its network reaches IPv4"
                    )
                },
            ));
        };
        if let Err(error) = thread::Builder::new().name("nat64".into()).spawn(look) {
            tell(Err(format!("no thread to look {NAME} up: {error}")));
        }
    }
}
