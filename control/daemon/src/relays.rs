//! All relays of the configuration: a connection to each, and which of them a peer is reached by.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::home_relay::{self, HomeRelay};
use millrace_path::sealed::PublicKey;

use crate::limits::HOME_REPORT_INTERVAL;
use crate::network::Address;
use crate::relay_client::{RelayClient, RelayConfig, Up};

/// One relay and how it does.
#[derive(Debug)]
pub struct Relay {
    pub url: String,
    pub client: RelayClient,
    pub state: State,
    /// What the relay says is wrong with our connection; empty: nothing.
    pub health: String,
    /// The failure that the log has; the same again is no news.
    pub told: Option<String>,
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
    choice: HomeRelay,
    /// When round trips were last given to the choice.
    measured_at: Option<Instant>,
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
                    told: None,
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

    /// Follows what the connections show: the home is left when its connection ends, or for one that
    /// is clearly nearer. Call when one of them changed. True if the home is another one now.
    pub fn choose_home(&mut self, now: Instant) -> bool {
        let names = || self.list.iter().map(|relay| relay.url.clone()).collect();
        let mut moved = None;
        for relay in &self.list {
            let relay_is = if relay.is_up() {
                home_relay::Input::Up { relay: &relay.url }
            } else {
                home_relay::Input::Down { relay: &relay.url }
            };
            moved = self.choice.handle(now, relay_is).or(moved);
        }
        // Before one is up there is none: at which is then shown by the first connection.
        if self.choice.home().is_some() || self.list.iter().any(Relay::is_up) {
            moved = self.choice.handle(now, home_relay::Input::Configured(names())).or(moved);
        }
        // Connections are watched closer than by what comes in.
        for relay in self.list.iter().filter(|relay| relay.is_up()) {
            let heard = home_relay::Input::Heard { relay: &relay.url };
            moved = self.choice.handle(now, heard).or(moved);
        }
        if self.measured_at.is_none_or(|at| now.since(at) >= HOME_REPORT_INTERVAL) {
            self.measured_at = Some(now);
            let latencies = home_relay::Input::Latencies(self.round_trips());
            moved = self.choice.handle(now, latencies).or(moved);
        }
        if let Some(moved) = moved {
            tracing::info!(from = moved.from, to = moved.to, why = ?moved.why, "home relay");
        }
        let before = self.home;
        self.home = self.choice.home().and_then(|home| self.position(home));
        for (at, relay) in self.list.iter_mut().enumerate() {
            relay.client.set_home(now, Some(at) == self.home);
        }
        self.home != before
    }

    /// Of those connections on which a question was answered already.
    fn round_trips(&self) -> BTreeMap<String, Duration> {
        let up = self.list.iter().filter(|relay| relay.is_up());
        up.filter_map(|relay| Some((relay.url.clone(), relay.client.round_trip()?))).collect()
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

    /// Whether a packet to a peer goes out at once.
    pub fn reaches(&self, home: Option<&str>, heard: Option<usize>) -> bool {
        self.of_peer(home, heard).is_some_and(|at| self.list[at].is_up())
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

    /// The network is another one, with these addresses.
    pub fn network_changed(&mut self, now: Instant, addresses: &[Address]) {
        let is_ours =
            |ip: IpAddr| ip.is_loopback() || addresses.iter().any(|address| address.ip == ip);
        for relay in &mut self.list {
            relay.client.network_changed(now, is_ours);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use millrace_config::discovery::HttpUrl;
    use millrace_path::derp::ServerInfo;

    use super::*;

    fn relays(urls: &[&str]) -> Relays {
        let config = |url: &&str| RelayConfig::new(HttpUrl::parse(url).unwrap());
        let mut relays = Relays::default();
        let configs = urls.iter().map(config).collect();
        relays.set(Instant::from_nanos(0), configs, Some(PublicKey([1; 32]))).unwrap();
        relays
    }

    fn up(relays: &mut Relays, at: usize) {
        let up = Up {
            relay_key: PublicKey([2; 32]),
            info: ServerInfo::default(),
            address: SocketAddr::from(([192, 0, 2, 1], 443)),
            proxied: false,
            tls: None,
            connect_time: Duration::from_millis(50),
        };
        relays.list[at].state = State::Up { since: Instant::from_nanos(0), up: Box::new(up) };
    }

    fn down(relays: &mut Relays, at: usize) {
        let retry_at = Instant::from_nanos(0);
        relays.list[at].state = State::Down { why: "cut".into(), retry_at };
    }

    fn home(relays: &Relays) -> Option<&str> {
        relays.home().map(|relay| relay.url.as_str())
    }

    #[test]
    fn the_home_is_the_first_that_is_up_and_is_left_with_its_connection() {
        let now = Instant::from_nanos(1);
        let mut relays = relays(&["https://a", "https://b"]);
        assert!(!relays.choose_home(now));
        assert_eq!(home(&relays), None);
        up(&mut relays, 1);
        assert!(relays.choose_home(now));
        assert_eq!(home(&relays), Some("https://b"));
        // The other one comes up: no reason to move.
        up(&mut relays, 0);
        assert!(!relays.choose_home(now + Duration::from_secs(30)));
        down(&mut relays, 1);
        assert!(relays.choose_home(now + Duration::from_secs(31)));
        assert_eq!(home(&relays), Some("https://a"));
        // Without any it is still there that peers look for us.
        down(&mut relays, 0);
        assert!(!relays.choose_home(now + Duration::from_secs(32)));
        assert_eq!(home(&relays), Some("https://a"));
    }

    #[test]
    fn a_home_that_is_not_configured_any_more_is_left() {
        let now = Instant::from_nanos(1);
        let mut relays = relays(&["https://a", "https://b"]);
        (0..2).for_each(|at| up(&mut relays, at));
        relays.choose_home(now);
        assert_eq!(home(&relays), Some("https://a"));
        relays.list.remove(0);
        assert!(relays.choose_home(now) || home(&relays) == Some("https://b"));
        assert_eq!(home(&relays), Some("https://b"));
    }
}
