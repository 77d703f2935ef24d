//! All relays of the configuration: a connection to each, and which of them a peer is reached by.

use std::io;

use millrace_path::Instant;
use millrace_path::sealed::PublicKey;

use crate::relay_client::{RelayClient, RelayConfig, Up};

/// One relay and how it does.
#[derive(Debug)]
pub struct Relay {
    pub url: String,
    pub client: RelayClient,
    pub state: State,
    /// What the relay says is wrong with our connection; empty: nothing.
    pub health: String,
    config: RelayConfig,
}

/// How the connection to a relay is.
#[derive(Debug)]
pub enum State {
    Connecting { stage: String },
    Up { since: Instant, up: Box<Up> },
    Down { why: String, retry_at: Instant },
}

impl Relay {
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }
}

/// The relays in the order of the configuration.
#[derive(Debug, Default)]
pub struct Relays {
    pub list: Vec<Relay>,
    home: Option<usize>,
}

impl Relays {
    /// Uses these from now on. A connection whose configuration is as it was goes on.
    pub fn set(
        &mut self,
        now: Instant,
        configs: Vec<RelayConfig>,
        node_key: Option<PublicKey>,
    ) -> io::Result<()> {
        let mut old = std::mem::take(&mut self.list);
        let home = self.home.take().map(|at| old[at].url.clone());
        let Some(node_key) = node_key else { return Ok(()) };
        for config in configs {
            let same = old
                .iter()
                .position(|relay| relay.config == config && relay.client.node_key() == node_key);
            let relay = match same {
                Some(at) => old.swap_remove(at),
                None => Relay {
                    url: config.url.to_string(),
                    client: RelayClient::new(config.clone(), node_key, now)?,
                    state: State::Connecting { stage: "about to begin".to_owned() },
                    health: String::new(),
                    config,
                },
            };
            self.list.push(relay);
        }
        self.home = home.and_then(|home| self.position(&home));
        Ok(())
    }

    /// The relay at which peers find us.
    pub fn home(&self) -> Option<&Relay> {
        self.home.map(|at| &self.list[at])
    }

    /// Stays where it is while that relay is up, else takes the one that was reached soonest. True
    /// if it is another one now.
    pub fn choose_home(&mut self, now: Instant) -> bool {
        if self.home().is_some_and(Relay::is_up) {
            return false;
        }
        let soonest = |(at, relay): (usize, &Relay)| match &relay.state {
            State::Up { up, .. } => Some((up.connect_time, at)),
            _ => None,
        };
        let best = self.list.iter().enumerate().filter_map(soonest).min().map(|(_, at)| at);
        // Without any it is still there that peers look for us.
        let Some(best) = best.filter(|best| Some(*best) != self.home) else { return false };
        if let Some(before) = self.home {
            self.list[before].client.set_home(now, false);
        }
        self.list[best].client.set_home(now, true);
        self.home = Some(best);
        true
    }

    pub fn position(&self, url: &str) -> Option<usize> {
        self.list.iter().position(|relay| relay.url == url)
    }

    /// The one relay for tunnel packets to a peer: where it is at home, else where it was last
    /// heard, else our own; and if none of them is up, that of them which may be soon, because a
    /// handshake can wait there. None only without any relay.
    pub fn of_peer(&self, home: Option<&str>, heard: Option<usize>) -> Option<usize> {
        let theirs = home.and_then(|url| self.position(url));
        let wanted = [theirs, heard, self.home, Some(0)];
        let mut known = wanted.into_iter().flatten().filter(|at| *at < self.list.len());
        known.clone().find(|at| self.list[*at].is_up()).or_else(|| known.next())
    }

    /// Sends a signal (disco, an introduction): to where the peer is, or everywhere while nobody
    /// knows.
    pub fn signal(
        &mut self,
        now: Instant,
        to: PublicKey,
        home: Option<&str>,
        heard: Option<usize>,
        packet: &[u8],
    ) {
        let known = home.is_some() || heard.is_some();
        match self.of_peer(home, heard).filter(|_| known) {
            Some(at) => self.list[at].client.send(now, to, packet),
            None => {
                for relay in &mut self.list {
                    relay.client.send(now, to, packet);
                }
            }
        }
    }

    /// Writes what is queued everywhere.
    pub fn flush(&mut self, now: Instant) {
        for relay in &mut self.list {
            relay.client.flush(now);
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.list.iter().filter_map(|relay| relay.client.deadline()).min()
    }

    /// The network is another one.
    pub fn network_changed(&mut self, now: Instant) {
        for relay in &mut self.list {
            relay.client.network_changed(now);
        }
    }
}
