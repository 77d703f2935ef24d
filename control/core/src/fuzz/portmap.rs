//! A router that says whatever the input wants.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::limits::MAPPING_LIFETIME;
use crate::portmap::pcp::Nonce;
use crate::portmap::{Config, Event, Input, Output, PortMapper, Router, Transmit};
use crate::time::Instant;

const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 7);
const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 255, 255, 250), 1900);
/// Steps of one input, so that each ends in time.
const STEPS_MAX: usize = 64;
/// What one step may bring: a round of searches for all protocols, and a few events.
const OUTPUTS_MAX: usize = 24;

/// Answers of a router to the port mapper, raw or made to fit its last request, while time passes.
///
/// Must hold: no panic, nothing is due again at once, a bounded answer to each step, nothing is sent
/// elsewhere, a request is one request, and what is mapped is an address that can be reached.
pub fn portmap(mut input: &[u8]) {
    let mut side = Side::new();
    for _ in 0..STEPS_MAX {
        let Some(([step, len], rest)) = input.split_first_chunk::<2>() else { break };
        // Steps of time have their length in place of bytes.
        let bytes = if matches!(step % 10, 5 | 6) { 0 } else { usize::from(*len) };
        let (raw, rest) = rest.split_at(rest.len().min(bytes));
        input = rest;
        let exchange = side.exchange;
        match step % 10 {
            0 => side.handle(Input::Datagram { from: (ROUTER, 5351).into(), bytes: raw }),
            1 => side.handle(Input::Datagram { from: (ROUTER, 1900).into(), bytes: raw }),
            2 => side.handle(Input::HttpBytes { exchange, bytes: raw }),
            3 => side.handle(Input::HttpEnd { exchange }),
            4 => side.echo(raw),
            5 => side.pass(Duration::from_millis(u64::from(*len) * 20)),
            6 => side.pass(Duration::from_secs(u64::from(*len) * 60)),
            7 => side.handle(Input::Suspicion),
            8 => side.network(raw.len() % 3),
            _ => side.handle(Input::Shutdown),
        }
    }
}

struct Side {
    mapper: PortMapper,
    now: Instant,
    random: StdRng,
    deadline: Option<Instant>,
    last_request: Vec<u8>,
    exchange: u32,
}

impl Side {
    fn new() -> Self {
        let config =
            Config { internal_port: 51820, lifetime: MAPPING_LIFETIME, nonce: Nonce([9; 12]) };
        let mut side = Self {
            mapper: PortMapper::new(config),
            now: Instant::from_nanos(1_000_000_000),
            random: StdRng::from_seed([3; 32]),
            deadline: None,
            last_request: Vec::new(),
            exchange: 0,
        };
        side.network(1);
        side
    }

    fn network(&mut self, which: usize) {
        let own = Ipv4Addr::from_bits(OWN.to_bits() + which as u32);
        let router = Router { address: ROUTER.into(), own: own.into(), ifindex: 1 };
        self.handle(Input::Network((which > 0).then_some(router)));
    }

    /// The last request as an answer, with some bytes changed: pairs of place and value.
    fn echo(&mut self, changes: &[u8]) {
        let mut answer = self.last_request.clone();
        if let Some(opcode) = answer.get_mut(1) {
            *opcode |= 0x80;
        }
        // NAT-PMP's answers have the ports four bytes later than its requests.
        if answer.len() == 12 {
            answer.splice(4..4, [0; 4]);
        }
        for pair in changes.chunks_exact(2) {
            if let Some(byte) = answer.get_mut(usize::from(pair[0])) {
                *byte = pair[1];
            }
        }
        self.handle(Input::Datagram { from: (ROUTER, 5351).into(), bytes: &answer });
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.deadline.filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.handle(Input::Timeout);
            assert!(self.deadline.is_none_or(|next| next > self.now), "due at once again");
        }
        self.now = end;
    }

    fn handle(&mut self, input: Input<'_>) {
        self.mapper.handle(self.now, input, &mut self.random);
        self.deadline = None;
        let mut outputs = 0;
        while let Some(output) = self.mapper.poll_output() {
            outputs += 1;
            assert!(outputs <= OUTPUTS_MAX, "{output:?}");
            self.take(output);
        }
    }

    fn take(&mut self, output: Output) {
        match output {
            Output::Timeout(at, _) => self.deadline = Some(at),
            Output::Transmit(Transmit::Datagram { to, bytes }) => {
                let to_router =
                    to.ip() == IpAddr::from(ROUTER) && [1900, 5351].contains(&to.port());
                assert!(to_router || to == SocketAddr::V4(GROUP), "{to}");
                if to.port() == 5351 {
                    self.last_request = bytes;
                }
            }
            Output::Transmit(Transmit::Http { exchange, to, request }) => {
                assert_eq!(*to.ip(), ROUTER);
                let ends = request.windows(4).filter(|four| four == b"\r\n\r\n").count();
                assert_eq!(ends, 1, "{}", String::from_utf8_lossy(&request));
                self.exchange = exchange;
            }
            Output::Event(Event::Mapped(mapped)) => {
                assert!(mapped.external.port() != 0 && !mapped.external.ip().is_unspecified());
                assert!(!mapped.external.ip().is_multicast() && mapped.external.is_ipv4());
            }
            Output::Event(_) | Output::Transmit(Transmit::HttpEnd { .. }) => {}
        }
    }
}
