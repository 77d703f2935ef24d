//! Two gateways behind NATs that know of each other a public key and a relay: how they meet, and what
//! one TCP connection and a stream of numbered datagrams inside notice while their path changes.

use std::time::{Duration, Instant};

use millrace_lab::{
    Capture, Connection, Error, Flow, Lab, NodeOptions, Pair, Path, Relay, Result,
    capture::CaptureReport,
    flow::Stretch,
    nat::{Direction, Fault, Filtering, Internet, Mapping, Nat, Router, RouterOptions},
    wait_for,
};
use serde::Serialize;

/// For everything that must happen sooner or later on a loaded machine.
const LIMIT: Duration = Duration::from_secs(20);

/// How long the traffic must be free of loss before the next step.
const QUIET: Duration = Duration::from_millis(700);

/// Time between two datagrams of the stream.
const INTERVAL: Duration = Duration::from_millis(1);

/// What the TCP connection carries, in bytes a second.
const TCP_RATE: u32 = 4 << 20;

/// A and B behind one port for all destinations that is another one after each reboot, filtered by
/// address and port: what home routers do, made hard to guess.
const NAT: Nat = Nat::Translate {
    mapping: Mapping::EndpointIndependentRandom,
    filtering: Filtering::AddressAndPortDependent,
};

/// What was done and seen.
#[derive(Clone, Default, Serialize)]
pub(crate) struct Journey {
    pub(crate) steps: Vec<Step>,
    /// Bytes that the one TCP connection delivered through all steps.
    pub(crate) tcp_bytes: u64,
    /// The longest time in which it delivered nothing.
    pub(crate) tcp_longest_pause_ms: u64,
    pub(crate) outside: CaptureReport,
}

/// One step.
#[derive(Clone, Serialize)]
pub(crate) struct Step {
    pub(crate) what: &'static str,
    pub(crate) seen: String,
    /// Datagrams sent in both directions since the step began.
    pub(crate) sent: usize,
    /// Those that were lost.
    pub(crate) lost: usize,
    /// The longest time in which all that was sent in one direction was lost.
    pub(crate) gap_ms: u64,
}

/// All that runs; dropped in this order.
struct Stage {
    connection: Connection,
    flows: [Flow; 2],
    pair: Pair,
    capture: Capture,
    router: Router,
    _others: (Router, Relay, Internet),
    lab: Lab,
}

/// Does all steps; `progress` is told of each as it begins.
pub(crate) fn run(progress: &dyn Fn(&str)) -> Result<Journey> {
    let mut journey = Journey::default();
    progress("two gateways behind NATs, a relay between; each knows the other's public key");
    let mut stage = Stage::start(&mut journey)?;
    let started = Instant::now();
    progress("router A loses all mappings");
    stage.step(&mut journey, "NAT of A flushed", |stage, _| {
        let far = &stage.pair.nodes[1];
        let (start, old) = (Instant::now(), far.path()?);
        stage.router.reboot()?;
        wait_for("a direct path to another port", LIMIT, || {
            far.path().ok().filter(|path| matches!(path, Path::Direct(_)) && *path != old)
        })?;
        stage.pair.wait_for(true, LIMIT)?;
        Ok(format!("direct to another port after {}", seconds(start.elapsed())))
    })?;
    progress("router A drops UDP");
    stage.step(&mut journey, "UDP cut at A", |stage, _| {
        stage.router.set_faults(&[Fault::CutUdp(Direction::Both)])?;
        let after = stage.pair.wait_for(false, LIMIT)?;
        Ok(format!("falls to the relay after {}", seconds(after)))
    })?;
    progress("router A passes UDP");
    stage.step(&mut journey, "UDP back", |stage, _| {
        stage.router.set_faults(&[])?;
        let after = stage.pair.wait_for(true, Duration::from_secs(60))?;
        Ok(format!("direct again after {}", seconds(after)))
    })?;
    progress("both control processes are killed, and started again");
    stage.step(&mut journey, "control restarted under load", |stage, _| {
        stage.pair.nodes.iter_mut().for_each(|node| node.kill_control());
        std::thread::sleep(Duration::from_secs(1));
        for node in &mut stage.pair.nodes {
            node.start_control(&stage.lab)?;
        }
        stage.pair.wait_until_ready(LIMIT)?;
        stage.pair.wait_for(true, LIMIT)?;
        Ok("direct as before".into())
    })?;
    stage.end(&mut journey, started)?;
    Ok(journey)
}

impl Stage {
    /// The lab, the first packet and the first direct path.
    fn start(journey: &mut Journey) -> Result<Self> {
        let lab = Lab::new()?;
        let internet = Internet::new(&lab)?;
        let relay = Relay::start(&lab, &internet)?;
        let [router, far] = ["router a", "router b"]
            .map(|name| internet.router(&lab, name, RouterOptions::nat(NAT)));
        let (router, far) = (router?, far?);
        let hosts = [router.host(&lab, "a")?, far.host(&lab, "b")?];
        let capture = Capture::start(&lab, &internet.core)?;
        let options = [NodeOptions::default(), NodeOptions::default()];
        let mut pair = Pair::start(&lab, &relay, hosts, options, 0)?;
        pair.wait_until_ready(LIMIT)?;

        let start = Instant::now();
        let flows = [pair.flow(0, INTERVAL)?, pair.flow(1, INTERVAL)?];
        let first = flows[0].first_arrival(LIMIT)?;
        let [near, far_node] = &pair.nodes;
        let (from, to) = (&near.host.namespace, &far_node.host.namespace);
        let address = (far_node.tunnel_v4, 0).into();
        let connection = Connection::start(from, to, address, TCP_RATE, pair.marker)?;
        pair.wait_for(true, LIMIT)?;
        let direct = start.elapsed();
        let history = near.paths()?["peers"][0]["history"].clone();
        if history[0]["path"] != "relay" {
            return Err(Error::Unexpected(format!("the first path was no relay: {history}")));
        }
        let Path::Direct(address) = near.path()? else {
            return Err(Error::Unexpected("the direct path is gone at once".into()));
        };
        let mut stage =
            Self { connection, flows, pair, capture, router, _others: (far, relay, internet), lab };
        let stretch = stage.quiet(start)?;
        journey.note(
            "first datagram",
            format!("through the relay, after {} ms", first.as_millis()),
            None,
        );
        let seen = format!("after {}, to {address}", seconds(direct));
        journey.note("upgrade to a direct path", seen, Some(stretch));
        Ok(stage)
    }

    /// Does one thing, waits until nothing is lost any more, and notes what was lost by it.
    fn step(
        &mut self,
        journey: &mut Journey,
        what: &'static str,
        act: impl FnOnce(&mut Self, &Journey) -> Result<String>,
    ) -> Result<()> {
        let since = Instant::now();
        let seen = act(self, journey)?;
        let stretch = self.quiet(since)?;
        // An error here if the connection has not lived through it.
        self.connection.seen()?;
        journey.note(what, seen, Some(stretch));
        Ok(())
    }

    /// Waits for a time without loss in both directions; what was lost since `since`.
    fn quiet(&mut self, since: Instant) -> Result<Stretch> {
        wait_for("an end of loss", LIMIT, || {
            let begin = Instant::now();
            std::thread::sleep(QUIET);
            let end = Instant::now();
            // What was sent last is still under way.
            std::thread::sleep(Duration::from_millis(100));
            let lost = |flow: &Flow| flow.record().between(begin, Some(end)).lost;
            (self.flows.iter().map(lost).sum::<usize>() == 0).then_some(())
        })?;
        let until = Some(Instant::now() - Duration::from_millis(100));
        let [a, b] = self.flows.each_ref().map(|flow| flow.record().between(since, until));
        Ok(Stretch { sent: a.sent + b.sent, lost: a.lost + b.lost, gap: a.gap.max(b.gap) })
    }

    /// What the TCP connection has lived through, and what was seen outside.
    fn end(self, journey: &mut Journey, started: Instant) -> Result<()> {
        let seen = self.connection.seen()?;
        journey.tcp_bytes = seen.bytes;
        journey.tcp_longest_pause_ms = self.connection.longest_pause(started).as_millis() as u64;
        drop(self.connection);
        drop(self.flows);
        let inner = self.pair.inner_addresses();
        journey.outside = self.capture.finish(&[self.pair.marker], &inner)?;
        journey.outside.check()
    }
}

impl Journey {
    fn note(&mut self, what: &'static str, seen: String, stretch: Option<Stretch>) {
        let Stretch { sent, lost, gap } = stretch.unwrap_or_default();
        self.steps.push(Step { what, seen, sent, lost, gap_ms: gap.as_millis() as u64 });
    }

    /// As lines for a terminal.
    pub(crate) fn print(&self) {
        println!(
            "\n  gateway A ── NAT ══╗\n                     ╠══ internet ── relay      \
             1,000 datagrams a second each way, and one TCP connection inside\n  \
             gateway B ── NAT ══╝\n"
        );
        println!("  {:<36}{:<44}{:>14}{:>12}", "", "", "lost of sent", "longest gap");
        for Step { what, seen, sent, lost, gap_ms } in &self.steps {
            let (loss, gap) = match sent {
                0 => (String::new(), String::new()),
                _ => (format!("{lost} of {sent}"), format!("{gap_ms} ms")),
            };
            println!("  {what:<36}{seen:<44}{loss:>14}{gap:>12}");
        }
        println!(
            "  {:<36}{:<44}{:>14}{:>12}",
            "one TCP connection through it all",
            format!("open, {:.1} MB unchanged", self.tcp_bytes as f64 / 1e6),
            "",
            format!("{} ms", self.tcp_longest_pause_ms)
        );
        let CaptureReport { packets, leaks, missed, .. } = &self.outside;
        println!(
            "  {:<36}{packets} captured, {} show the inside, {missed} missed",
            "packets outside",
            leaks.len()
        );
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}
