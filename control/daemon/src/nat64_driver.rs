//! Finds the NAT64 of an IPv6-only network by the system's resolver.
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
use std::os::fd::{AsFd, BorrowedFd};

use millrace_path::Instant;
use millrace_path::nat64::{Event, Input, NAME, Nat64, Output};
use rustix::event::PollFlags;

use crate::look_up::LookUps;

/// The finder of prefixes with its look-ups.
#[derive(Debug)]
pub struct Nat64Driver {
    nat64: Nat64,
    deadline: Option<Instant>,
    events: VecDeque<Event>,
    look_ups: LookUps,
}

impl Nat64Driver {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            nat64: Nat64::default(),
            deadline: None,
            events: VecDeque::new(),
            look_ups: LookUps::new()?,
        })
    }

    /// Looks the prefix up, or forgets it where there is no IPv6.
    pub fn network_changed(&mut self, now: Instant, has_ipv6: bool) {
        self.input(now, Input::Network { has_ipv6 });
    }

    /// What to wait for: the same descriptor for as long as the driver lives.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        (self.look_ups.as_fd(), PollFlags::IN)
    }

    /// When [`Self::handle`] must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Does what is due. Then take [`Self::next_event`] until there is none.
    pub fn handle(&mut self, now: Instant) {
        while let Some(answer) = self.look_ups.next_answer() {
            let found = answer.found.map_err(|error| {
                format!(
                    "{NAME}: {error}; check /etc/resolv.conf: without a name server this host does \
                     not learn how its network reaches IPv4"
                )
            });
            self.input(now, Input::Answers(found));
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
                Output::LookUp => self.look_ups.ask(NAME),
                Output::Event(event) => self.events.push_back(event),
                Output::Timeout(at) => self.deadline = Some(at),
            }
        }
    }
}
