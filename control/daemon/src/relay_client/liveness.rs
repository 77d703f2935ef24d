//! Whether the relay still carries our packets, without a clock: a connection may be dead without
//! an end, and a relay may answer and yet have forgotten that we are here.
//!
//! A probe is a `Ping` and a packet to ourselves. The first proves the connection, the second that
//! the relay hands us what is sent to our key.

use std::time::Duration;

use millrace_path::Instant;
use millrace_path::disco;

use crate::limits;

/// Bytes of a packet to ourselves: it looks like disco to a relay, which keeps such apart from the
/// bulk that it may drop, and is as long as the shortest of those.
pub const OWN_PACKET_LEN: usize = 62;

/// Watches one connection.
#[derive(Clone, Debug)]
pub struct Liveness {
    heard: Instant,
    /// The first packet since then.
    sent: Option<Instant>,
    probe: Option<Probe>,
    /// Probes in a row that were answered and whose packet did not come back.
    deaf: u32,
    round_trip: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    data: [u8; 8],
    sent: Instant,
    limit: Duration,
    answered: bool,
    came_back: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Nothing,
    /// Send [`own_packet`] to ourselves and a `Ping` of these bytes.
    Probe([u8; 8]),
    End(Dead),
}

/// Why a connection is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Dead {
    #[error("it is silent for {0:?}, though it was asked: the connection is dead")]
    Silent(Duration),
    #[error("it answers, but packets to us do not arrive: it has forgotten this connection")]
    Deaf,
}

impl Liveness {
    /// Of a connection that has just logged in.
    pub fn new(now: Instant) -> Self {
        Self { heard: now, sent: None, probe: None, deaf: 0, round_trip: None }
    }

    /// Bytes arrived, of whatever kind.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.sent = None;
    }

    /// A packet left.
    pub fn sent(&mut self, now: Instant) {
        self.sent.get_or_insert(now);
    }

    /// The answer to a `Ping`.
    pub fn pong(&mut self, now: Instant, data: [u8; 8]) {
        if let Some(probe) = &mut self.probe
            && probe.data == data
            && !probe.answered
        {
            probe.answered = true;
            self.round_trip = Some(now.since(probe.sent));
            self.end_probe();
        }
    }

    /// A packet from ourselves.
    pub fn own(&mut self, packet: &[u8]) {
        if let Some(probe) = &mut self.probe
            && packet == own_packet(probe.data)
        {
            probe.came_back = true;
            self.deaf = 0;
            self.end_probe();
        }
    }

    /// Probes now.
    pub fn ask(&mut self, now: Instant, data: [u8; 8]) -> Act {
        self.begin(now, data, limits::RELAY_PROBE_LIMIT)
    }

    /// Probes now, with little patience: the network has changed under the connection.
    pub fn doubt(&mut self, now: Instant, data: [u8; 8]) -> Act {
        self.begin(now, data, limits::RELAY_DOUBT_LIMIT)
    }

    /// Round trip of the last answered `Ping`.
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// When to call [`Self::poll`].
    pub fn deadline(&self) -> Instant {
        match &self.probe {
            Some(probe) => probe.sent + probe.limit,
            None => {
                let idle = self.heard + limits::RELAY_IDLE_PROBE;
                self.sent.map_or(idle, |sent| idle.min(sent + limits::RELAY_UNHEARD_PROBE))
            }
        }
    }

    /// `data` is of 8 random bytes, for the next probe.
    pub fn poll(&mut self, now: Instant, data: [u8; 8]) -> Act {
        if now < self.deadline() {
            return Act::Nothing;
        }
        match self.probe.take() {
            None => self.ask(now, data),
            // Only the `Pong` is missing, and nobody misses it.
            Some(probe) if probe.came_back => Act::Nothing,
            Some(probe) if probe.answered => {
                self.deaf += 1;
                if self.deaf >= limits::RELAY_DEAF_PROBES {
                    return Act::End(Dead::Deaf);
                }
                self.ask(now, data)
            }
            // Other bytes come: the answer stands behind them in a long queue. Asked again.
            Some(probe) if self.heard > probe.sent => self.ask(now, data),
            Some(probe) => Act::End(Dead::Silent(now.since(self.heard).max(probe.limit))),
        }
    }

    fn begin(&mut self, now: Instant, data: [u8; 8], limit: Duration) -> Act {
        self.probe = Some(Probe { data, sent: now, limit, answered: false, came_back: false });
        Act::Probe(data)
    }

    fn end_probe(&mut self) {
        self.probe = self.probe.filter(|probe| !(probe.answered && probe.came_back));
    }
}

/// The packet to ourselves that belongs to a probe.
pub fn own_packet(data: [u8; 8]) -> [u8; OWN_PACKET_LEN] {
    let mut packet = [0; OWN_PACKET_LEN];
    packet[..disco::MAGIC.len()].copy_from_slice(&disco::MAGIC);
    packet[OWN_PACKET_LEN - data.len()..].copy_from_slice(&data);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_nanos(ms * 1_000_000)
    }

    fn ms(duration: Duration) -> u64 {
        duration.as_millis() as u64
    }

    /// Runs until `end_ms`; `answer` says what a probe brings: (pong, packet).
    fn run(sent: bool, end_ms: u64, answer: (bool, bool)) -> (Vec<u64>, Option<(u64, Dead)>) {
        let mut liveness = Liveness::new(at(0));
        if sent {
            liveness.sent(at(0));
        }
        let mut probes = Vec::new();
        for now in 0..end_ms {
            match liveness.poll(at(now), [now as u8; 8]) {
                Act::Nothing => {}
                Act::Probe(data) => {
                    probes.push(now);
                    if answer.0 {
                        liveness.heard(at(now));
                        liveness.pong(at(now), data);
                    }
                    if answer.1 {
                        liveness.own(&own_packet(data));
                    }
                }
                Act::End(dead) => return (probes, Some((now, dead))),
            }
        }
        (probes, None)
    }

    #[test]
    fn an_idle_connection_is_asked_seldom_and_a_busy_one_soon() {
        let idle = ms(limits::RELAY_IDLE_PROBE);
        assert_eq!(run(false, 3 * idle + 1, (true, true)), (vec![idle, 2 * idle, 3 * idle], None));
        let unheard = ms(limits::RELAY_UNHEARD_PROBE);
        assert_eq!(run(true, unheard + 1, (true, true)).0, [unheard]);
    }

    #[test]
    fn a_dead_connection_and_a_deaf_relay_are_found_in_bounded_time() {
        let (probes, end) = run(true, 60_000, (false, false));
        assert_eq!(probes.len(), 1);
        let (when, dead) = end.unwrap();
        assert_eq!(when, ms(limits::RELAY_UNHEARD_PROBE + limits::RELAY_PROBE_LIMIT));
        assert!(matches!(dead, Dead::Silent(_)));
        let (probes, end) = run(true, 60_000, (true, false));
        assert_eq!(probes.len() as u32, limits::RELAY_DEAF_PROBES);
        assert_eq!(end.unwrap().1, Dead::Deaf);
    }

    #[test]
    fn answers_behind_a_long_queue_are_waited_for() {
        let mut liveness = Liveness::new(at(0));
        let Act::Probe(_) = liveness.doubt(at(10), [1; 8]) else { panic!() };
        let limit = ms(limits::RELAY_DOUBT_LIMIT);
        liveness.heard(at(11));
        assert_eq!(liveness.poll(at(10 + limit), [2; 8]), Act::Probe([2; 8]));
        liveness.pong(at(11 + limit), [1; 8]);
        assert_eq!(liveness.round_trip(), None);
        liveness.pong(at(13 + limit), [2; 8]);
        assert_eq!(liveness.round_trip(), Some(Duration::from_millis(3)));
        liveness.own(&own_packet([2; 8]));
        assert_eq!(liveness.deadline(), at(11) + limits::RELAY_IDLE_PROBE);
    }
}
