//! Connections to relays that are made to see how long it takes: as the tunnel's would be, through
//! its proxy and with its trust, up to the point where the relay has shown its key.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use millrace_path::Instant;
use millrace_path::netcheck::TcpReport;
use millrace_path::sealed::PublicKey;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::relay_client::{Connecting, RelayClient, RelayConfig, RelayEvent};

#[derive(Debug)]
pub(super) struct Connections {
    epoll: OwnedFd,
    open: Vec<Connection>,
    done: VecDeque<(String, TcpReport)>,
}

#[derive(Debug)]
struct Connection {
    relay: String,
    client: RelayClient,
    began: Instant,
    /// When the first SYN left, and what TCP's handshake took.
    tcp: Option<Instant>,
    connect: Option<Duration>,
}

impl Connections {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, open: Vec::new(), done: VecDeque::new() })
    }

    pub(super) fn begin(&mut self, now: Instant, relay: String, config: RelayConfig) {
        // Never used: the connection ends before it would be shown.
        let nobody = PublicKey([0; 32]);
        let client = RelayClient::new(config, nobody, now).and_then(|client| {
            epoll::add(&self.epoll, client.interest().0, EventData::new_u64(0), EventFlags::IN)?;
            Ok(client)
        });
        match client {
            Ok(client) => {
                let (tcp, connect) = (None, None);
                self.open.push(Connection { relay, client, began: now, tcp, connect });
            }
            Err(error) => self.done.push_back((relay, TcpReport::Failed(error.to_string()))),
        }
    }

    /// Ends all without a word.
    pub(super) fn clear(&mut self) {
        self.open.clear();
        self.done.clear();
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.open.iter().filter_map(|connection| connection.client.deadline()).min()
    }

    pub(super) fn handle(&mut self, now: Instant) {
        let Self { open, done, .. } = self;
        open.retain_mut(|connection| match connection.advance(now) {
            Some(report) => {
                done.push_back((connection.relay.clone(), report));
                false
            }
            None => true,
        });
    }

    pub(super) fn next(&mut self) -> Option<(String, TcpReport)> {
        self.done.pop_front()
    }
}

impl Connection {
    /// Its report, once there is one.
    fn advance(&mut self, now: Instant) -> Option<TcpReport> {
        self.client.handle(now);
        while let Some(event) = self.client.next_event() {
            match event {
                RelayEvent::Connecting(Connecting::Tcp { .. }) => self.tcp = Some(now),
                RelayEvent::Connecting(
                    Connecting::Tunnel { .. } | Connecting::Tls { .. } | Connecting::Login { .. },
                ) => {
                    let connect = now.since(self.tcp.unwrap_or(self.began));
                    self.connect.get_or_insert(connect);
                }
                RelayEvent::NeedBoxKey { .. } => {
                    let ready = now.since(self.began);
                    let connect = self.connect.unwrap_or(ready);
                    return Some(TcpReport::Connected { connect, ready });
                }
                RelayEvent::Down { failure, .. } => {
                    return Some(TcpReport::Failed(failure.to_string()));
                }
                _ => {}
            }
        }
        None
    }
}

impl AsFd for Connections {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
