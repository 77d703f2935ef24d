//! How long the NAT keeps a mapping: many mappings at once, each asked for after another silence.
//! The question goes out from one more socket and the answer is to come in by the mapping, so that
//! asking does not keep it alive (RFC 5780, section 4.6, with a ladder instead of a search).

use std::net::SocketAddr;
use std::time::Duration;

use super::probe::{Probe, Purpose};
use super::{MappingLifetime, Socket};
use crate::limits::{LIFETIME_MAX, LIFETIME_STEPS_S};
use crate::time::Instant;

#[derive(Clone, Debug, Default)]
pub(super) struct Lifetimes {
    /// Per step: whether its mapping was still there; none while not known.
    alive: Vec<Option<bool>>,
    /// A server could not do what was asked.
    unable: bool,
}

impl Lifetimes {
    /// Questions that make a mapping for each step.
    pub(super) fn open(
        &mut self,
        longest: Duration,
        server: SocketAddr,
        now: Instant,
    ) -> Vec<Probe> {
        let longest = longest.min(LIFETIME_MAX);
        let steps = (0..LIFETIME_STEPS_S.len()).take_while(|step| silence(*step) <= longest);
        let steps: Vec<u8> = steps.filter_map(|step| u8::try_from(step).ok()).collect();
        self.alive = vec![None; steps.len()];
        let probe =
            |step| Probe::new(Purpose::LifetimeOpen { step }, Socket::Lifetime(step), server, now);
        steps.into_iter().map(probe).collect()
    }

    /// The question after the silence of a step.
    pub(super) fn ask(step: u8, server: SocketAddr, mapped: SocketAddr, now: Instant) -> Probe {
        let at = now + silence(usize::from(step));
        Probe::new(Purpose::LifetimeAsk { step }, Socket::Asker, server, now).answered_to(
            mapped.port(),
            Socket::Lifetime(step),
            at,
        )
    }

    pub(super) fn note(&mut self, step: u8, alive: Option<bool>) {
        self.unable |= alive.is_none();
        if let Some(known) = self.alive.get_mut(usize::from(step)) {
            *known = alive;
        }
    }

    /// What a shorter silence ended, or no server can tell, a longer one need not show.
    pub(super) fn is_moot(&self, step: u8) -> bool {
        self.unable || self.alive.iter().take(usize::from(step)).any(|alive| *alive == Some(false))
    }

    /// Nothing more is waited for.
    pub(super) fn is_over(&self) -> bool {
        let known = self.alive.iter().take_while(|alive| **alive != Some(false));
        self.unable || (!self.alive.is_empty() && known.into_iter().all(Option::is_some))
    }

    pub(super) fn result(&self) -> Option<MappingLifetime> {
        if self.unable {
            return None;
        }
        let gone = self.alive.iter().position(|alive| *alive == Some(false));
        let end = gone.unwrap_or(self.alive.len());
        let lived = self.alive.iter().take(end).rposition(|alive| *alive == Some(true));
        if gone.is_none() && lived.is_none() {
            return None;
        }
        Some(MappingLifetime {
            at_least: lived.map_or(Duration::ZERO, silence),
            less_than: gone.map(silence),
        })
    }
}

fn silence(step: usize) -> Duration {
    Duration::from_secs(LIFETIME_STEPS_S.get(step).copied().unwrap_or(u16::MAX).into())
}
