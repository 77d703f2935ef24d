//! Where STUN servers see the tunnel's port: asked again and again from that port itself, which
//! also keeps the NAT's mapping alive.

use std::net::SocketAddr;
use std::time::Duration;

use rand::RngCore;

use crate::limits::{STUN_ANSWER_MAX_AGE, STUN_INTERVAL, STUN_RETRIES};
use crate::nat;
use crate::netcheck::is_believable;
use crate::stun::{self, REQUEST_LEN, StunError};
use crate::time::Instant;
use crate::transaction::TransactionId;

/// Sans-IO: what [`Self::poll_transmit`] says goes to the wire, what comes from it to
/// [`Self::handle`]; again at [`Self::deadline`].
#[derive(Debug, Default)]
pub struct Reflexive {
    servers: Vec<Server>,
    /// None: nothing is asked for.
    next_round_at: Option<Instant>,
}

#[derive(Debug)]
struct Server {
    address: SocketAddr,
    question: Option<Question>,
    answer: Option<Answer>,
}

/// A question of this round that was not answered yet.
#[derive(Debug)]
struct Question {
    transaction: TransactionId,
    sent: usize,
    first_at: Instant,
    next_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Answer {
    mapped: SocketAddr,
    /// From where it can answer besides (RFC 5780).
    other: Option<SocketAddr>,
    at: Instant,
    round_trip: Duration,
}

/// What all servers together say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Each address once, the most often seen first.
    pub addresses: Vec<SocketAddr>,
    /// Whether an IPv4 mapping depends on whom we send to: a NAT through which nobody reaches us by
    /// it. None while servers at fewer than two addresses answered.
    pub varies: Option<bool>,
}

/// Why a datagram that looks like STUN was not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReflexiveError {
    #[error("STUN from somebody who was not asked")]
    Stranger,
    #[error("an answer to no question of ours")]
    Unmatched,
    #[error(transparent)]
    Stun(#[from] StunError),
}

impl Reflexive {
    /// Asks these from now on; what is known of those that stay is kept. A new one is asked at
    /// once.
    pub fn set_servers(&mut self, now: Instant, addresses: &[SocketAddr]) {
        self.servers.retain(|server| addresses.contains(&server.address));
        let mut new = false;
        for &address in addresses {
            if !self.servers.iter().any(|server| server.address == address) {
                self.servers.push(Server { address, question: None, answer: None });
                new = true;
            }
        }
        if self.servers.is_empty() {
            self.next_round_at = None;
        } else if new {
            self.next_round_at = Some(now);
        }
    }

    /// Asks all servers now: the network changed, or a path died, and with it perhaps the mapping.
    pub fn ask(&mut self, now: Instant) {
        if !self.servers.is_empty() {
            self.next_round_at = Some(now);
        }
    }

    /// Forgets all answers: they were those of another network.
    pub fn forget(&mut self) {
        for server in &mut self.servers {
            (server.question, server.answer) = (None, None);
        }
    }

    /// The next request that is due, and to whom.
    pub fn poll_transmit<R: RngCore>(
        &mut self,
        now: Instant,
        random: &mut R,
    ) -> Option<(SocketAddr, [u8; REQUEST_LEN])> {
        if self.next_round_at.is_some_and(|at| at <= now) {
            self.begin(now, random);
        }
        for server in &mut self.servers {
            let Some(question) = &mut server.question else { continue };
            let Some(at) = question.next_at.filter(|at| *at <= now) else { continue };
            question.next_at = STUN_RETRIES.get(question.sent).map(|after| at + *after);
            question.sent += 1;
            return Some((server.address, stun::binding_request(question.transaction)));
        }
        None
    }

    /// Takes an answer in. True if it says something new.
    pub fn handle(
        &mut self,
        now: Instant,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Result<bool, ReflexiveError> {
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        let server = self.servers.iter_mut().find(|server| server.address == from);
        let server = server.ok_or(ReflexiveError::Stranger)?;
        let response = stun::parse_response(datagram)?;
        let question = server.question.as_ref();
        let question = question.filter(|question| question.transaction == response.transaction);
        let question = question.ok_or(ReflexiveError::Unmatched)?;
        // After a retry nobody knows which of them was answered: the worst case counts.
        let round_trip = now.since(question.first_at);
        let new = server.answer.is_none_or(|answer| answer.mapped != response.mapped);
        let (mapped, other) = (response.mapped, response.other);
        server.answer = Some(Answer { mapped, other, at: now, round_trip });
        server.question = None;
        Ok(new)
    }

    /// When to call [`Self::poll_transmit`] again.
    pub fn deadline(&self) -> Option<Instant> {
        let retries = self.servers.iter().filter_map(|server| server.question.as_ref()?.next_at);
        retries.chain(self.next_round_at).min()
    }

    /// What is known now; old answers are not.
    pub fn seen(&self, now: Instant) -> Seen {
        let fresh = |answer: &Answer| now.since(answer.at) < STUN_ANSWER_MAX_AGE;
        let answer = |server: &Server| Some((server.address, server.answer.filter(fresh)?.mapped));
        let mut answers: Vec<(SocketAddr, SocketAddr)> =
            self.servers.iter().filter_map(answer).collect();
        let mapped: Vec<SocketAddr> = answers.iter().map(|(_, mapped)| *mapped).collect();
        let count = |address: &SocketAddr| mapped.iter().filter(|other| *other == address).count();
        let mut addresses = mapped.clone();
        addresses.sort_by_key(|address| (std::cmp::Reverse(count(address)), *address));
        addresses.dedup();
        answers.retain(|(from, _)| from.is_ipv4());
        Seen { addresses, varies: nat::varies(&answers) }
    }

    /// Servers that answered lately and can show what a NAT filters, each with its other address.
    pub fn showing(&self, now: Instant) -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
        let showing = move |server: &Server| {
            let answer = server.answer.filter(|known| now.since(known.at) < STUN_ANSWER_MAX_AGE)?;
            Some((server.address, answer.other?))
        };
        let showing = self.servers.iter().filter_map(showing);
        showing.filter(|(server, other)| is_believable(*server, *other))
    }

    /// Who is asked.
    pub fn servers(&self) -> impl Iterator<Item = SocketAddr> {
        self.servers.iter().map(|server| server.address)
    }

    /// The round trip to a server at its last answer.
    pub fn round_trip(&self, server: SocketAddr) -> Option<Duration> {
        let known = self.servers.iter().find(|known| known.address == server)?;
        known.answer.map(|answer| answer.round_trip)
    }

    fn begin<R: RngCore>(&mut self, now: Instant, random: &mut R) {
        self.next_round_at = Some(now + STUN_INTERVAL);
        for server in &mut self.servers {
            let mut transaction = TransactionId([0; 12]);
            random.fill_bytes(&mut transaction.0);
            let (sent, next_at) = (0, Some(now));
            server.question = Some(Question { transaction, sent, first_at: now, next_at });
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_nanos(seconds * 1_000_000_000)
    }

    fn server(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 3478))
    }

    /// Answers all that is asked at `now` as a NAT with these ports would make it look.
    fn answer_all(this: &mut Reflexive, now: Instant, ports: &[u16]) {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut asked = Vec::new();
        while let Some(transmit) = this.poll_transmit(now, &mut random) {
            asked.push(transmit);
        }
        for (number, (from, request)) in asked.into_iter().enumerate() {
            let port = ports[number % ports.len()];
            let source = SocketAddr::from(([198, 51, 100, 1], port));
            let answer = stun::answer(&request, source).unwrap();
            this.handle(now, from, &answer).unwrap();
        }
    }

    #[test]
    fn two_servers_tell_whether_the_mapping_varies() {
        let mut this = Reflexive::default();
        assert_eq!(this.deadline(), None);
        this.set_servers(at(1), &[server(1), server(2)]);
        assert_eq!(this.deadline(), Some(at(1)));
        answer_all(&mut this, at(1), &[7]);
        let address = SocketAddr::from(([198, 51, 100, 1], 7));
        assert_eq!(this.seen(at(1)), Seen { addresses: vec![address], varies: Some(false) });
        this.ask(at(2));
        answer_all(&mut this, at(2), &[7, 8]);
        assert_eq!(this.seen(at(2)).varies, Some(true));
        assert_eq!(this.seen(at(2)).addresses.len(), 2);
        assert_eq!(this.seen(at(2) + STUN_ANSWER_MAX_AGE), Seen::default());
    }

    #[test]
    fn silence_is_asked_again_a_few_times_and_then_next_round() {
        let mut this = Reflexive::default();
        let mut random = ChaCha8Rng::seed_from_u64(1);
        this.set_servers(at(1), &[server(1)]);
        let mut sent = 0;
        while let Some(deadline) = this.deadline().filter(|at_| *at_ < at(1) + STUN_INTERVAL) {
            while this.poll_transmit(deadline, &mut random).is_some() {
                sent += 1;
            }
        }
        assert_eq!(sent, 1 + STUN_RETRIES.len());
        assert_eq!(this.deadline(), Some(at(1) + STUN_INTERVAL));
    }

    #[test]
    fn a_server_shows_more_only_from_a_believable_other_address() {
        let mut this = Reflexive::default();
        let mut random = ChaCha8Rng::seed_from_u64(1);
        this.set_servers(at(1), &[server(1), server(2)]);
        let asked: Vec<_> = std::iter::from_fn(|| this.poll_transmit(at(1), &mut random)).collect();
        for (from, request) in asked {
            let mut answer = stun::answer(&request, server(9)).unwrap().to_vec();
            // OTHER-ADDRESS 192.0.2.2:3479: for one that is the same address.
            answer.extend([0x80, 0x2c, 0, 8, 0, 1, 0x0d, 0x97, 192, 0, 2, 2]);
            answer[3] += 12;
            this.handle(at(1), from, &answer).unwrap();
        }
        let other = SocketAddr::new(server(2).ip(), 3479);
        assert_eq!(this.showing(at(1)).collect::<Vec<_>>(), [(server(1), other)]);
        assert_eq!(this.showing(at(1) + STUN_ANSWER_MAX_AGE).count(), 0);
    }

    #[test]
    fn strangers_and_late_answers_change_nothing() {
        let mut this = Reflexive::default();
        let mut random = ChaCha8Rng::seed_from_u64(1);
        this.set_servers(at(1), &[server(1)]);
        let (_, request) = this.poll_transmit(at(1), &mut random).unwrap();
        let answer = stun::answer(&request, server(9)).unwrap();
        assert_eq!(this.handle(at(1), server(2), &answer), Err(ReflexiveError::Stranger));
        let other = stun::binding_request(TransactionId([9; 12]));
        let foreign = stun::answer(&other, server(9)).unwrap();
        assert_eq!(this.handle(at(1), server(1), &foreign), Err(ReflexiveError::Unmatched));
        assert_eq!(this.seen(at(1)), Seen::default());
        assert_eq!(this.handle(at(1), server(1), &answer), Ok(true));
        assert_eq!(this.handle(at(1), server(1), &answer), Err(ReflexiveError::Unmatched));
    }
}
