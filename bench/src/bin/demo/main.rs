//! `demo`: millrace between two sites, in less than a minute.
//!
//! First two gateways behind NATs, which meet through a relay and then directly, while their paths are
//! broken under traffic. Then the speed of a plain tunnel, with wireguard-go in the same namespaces.
//! Captures of the outside links prove that nothing of the inside shows there. Everything is removed.

mod journey;

use std::{
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use journey::Journey;
use millrace_lab::{
    Error, Implementation, Lab, Result, Site, SiteOptions, Tunnel, TunnelOptions,
    capture::CaptureReport,
    gateway::own_program,
    interrupt,
    iperf::Iperf,
    ping::{Ping, PingReport},
    probe::{Echo, every_length},
    tunnel::{Watch, connect},
};
use serde::Serialize;

/// Limit for the first ping through a new tunnel.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Runs of the whole measurement; the parties take turns, so that drift of the machine hits both.
const ROUNDS: u32 = 2;

/// Shows millrace between two sites, with another WireGuard beside it.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Print the figures as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Seconds of each iperf3 run.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Who takes part, the first one first.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Party::Millrace, Party::WireguardGo])]
    parties: Vec<Party>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Party {
    Millrace,
    WireguardGo,
    Boringtun,
    Gotatun,
}

/// Everything that was seen, as `--json` prints it.
#[derive(Serialize)]
struct Report {
    schema: &'static str,
    version: &'static str,
    /// What the link is, because it decides what the figures mean.
    lab: &'static str,
    seconds_in_all: f64,
    journey: Journey,
    parties: Vec<Figures>,
}

/// One party's figures.
#[derive(Clone, Default, Serialize)]
struct Figures {
    name: &'static str,
    ping_v4: PingReport,
    ping_v6: PingReport,
    /// Payload lengths 0 to 1500 that came back unchanged.
    lengths_passed: u32,
    outside: CaptureReport,
    /// Gbit/s of one TCP stream from A to B, one entry a round.
    forward_gigabits_per_second: Vec<f64>,
    /// The same from B to A.
    reverse_gigabits_per_second: Vec<f64>,
    /// CPU seconds of both gateway processes for each 10⁹ bytes carried.
    cpu_seconds_per_gigabyte: Vec<f64>,
    /// What the party itself says about its state, if it can.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    interrupt::install();
    match show(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    let journey = journey::run(&|what| progress(arguments, what))?;
    if !arguments.json {
        journey.print();
        println!();
    }
    let mut figures: Vec<Figures> = Vec::new();
    for round in 0..ROUNDS {
        for (i, party) in arguments.parties.iter().enumerate() {
            if round == 0 {
                figures.push(Figures { name: party.implementation().name(), ..Figures::default() });
            }
            let Some(figures) = figures.get_mut(i) else { continue };
            progress(arguments, &format!("round {} of {ROUNDS}: {}", round + 1, figures.name));
            run(*party, arguments, round == 0, figures)?;
        }
    }
    progress(arguments, "everything is removed");
    let report = Report {
        schema: "millrace.demo/1",
        version: env!("CARGO_PKG_VERSION"),
        journey,
        lab: "five network namespaces joined by veth: not the speed of a network card",
        seconds_in_all: start.elapsed().as_secs_f64(),
        parties: figures,
    };
    if arguments.json {
        let text = serde_json::to_string_pretty(&report);
        println!("{}", text.map_err(|error| Error::Unexpected(error.to_string()))?);
    } else {
        print(&report);
    }
    Ok(())
}

/// One party once: a fresh lab, the proof (in the first round), the measurement.
fn run(party: Party, arguments: &Arguments, prove: bool, figures: &mut Figures) -> Result<()> {
    let lab = Lab::new()?;
    let site = Site::new(&lab, &SiteOptions::default())?;
    let watch = if prove { Some(Watch::start(&lab, &site)?) } else { None };
    let options = TunnelOptions { verbose: false, ..TunnelOptions::default() };
    let mut tunnel = Tunnel::start(&lab, &site, [party.implementation(); 2], &options)?;
    let outcome = (|| {
        connect(&site.a, &site.b, CONNECT_LIMIT)?;
        if let Some(watch) = watch {
            check(&site, watch, figures)?;
        }
        measure(&lab, &site, &mut tunnel, arguments.seconds, figures)?;
        if prove && party == Party::Millrace {
            figures.status = Some(status(&tunnel)?);
        }
        Ok(())
    })();
    outcome.map_err(|error: Error| {
        let logs = [&mut tunnel.a, &mut tunnel.b].map(|gateway| {
            format!(
                "\n--- its log on {}:\n{}",
                gateway.namespace().name().to_owned(),
                gateway.daemon().log_tail()
            )
        });
        Error::Unexpected(format!("{}: {error}{}", figures.name, logs.concat()))
    })
}

/// What must hold whatever the speed: both families, every length, nothing of it visible outside.
fn check(site: &Site, watch: Watch, figures: &mut Figures) -> Result<()> {
    let marker = watch.marker();
    let ping = Ping { count: 10, interval_ms: 20, marker: Some(marker), ..Ping::default() };
    figures.ping_v4 = ping.run(&site.a.host, site.b.host_v4)?;
    figures.ping_v6 = ping.run(&site.a.host, site.b.host_v6)?;
    for report in [figures.ping_v4, figures.ping_v6] {
        if !report.complete() {
            let PingReport { count, received, .. } = report;
            return Err(Error::Unexpected(format!("{received} of {count} pings were answered")));
        }
    }
    let echo = Echo::start(&site.b.host, SocketAddr::new(IpAddr::from(site.b.host_v4), 0))?;
    let lengths = every_length(&site.a.host, echo.address(), 0..=1500, marker)?;
    echo.stop();
    if !lengths.lost.is_empty() {
        return Err(Error::Unexpected(format!("these lengths were lost: {:?}", lengths.lost)));
    }
    figures.lengths_passed = lengths.passed;
    figures.outside = watch.finish()?;
    Ok(())
}

fn measure(
    lab: &Lab,
    site: &Site,
    tunnel: &mut Tunnel,
    seconds: u32,
    figures: &mut Figures,
) -> Result<()> {
    let before = cpu_time(tunnel);
    let mut bytes = 0;
    for reverse in [false, true] {
        let iperf = Iperf { seconds, reverse, ..Iperf::default() };
        let report = iperf.run(lab.directory(), &site.b.host, site.b.host_v4, &site.a.host)?;
        let rates = if reverse {
            &mut figures.reverse_gigabits_per_second
        } else {
            &mut figures.forward_gigabits_per_second
        };
        rates.push(report.bits_per_second / 1e9);
        bytes += report.bytes;
    }
    let used = (cpu_time(tunnel) - before).as_secs_f64();
    figures.cpu_seconds_per_gigabyte.push(used / (bytes as f64 / 1e9));
    Ok(())
}

fn cpu_time(tunnel: &mut Tunnel) -> Duration {
    tunnel.a.daemon().cpu_time() + tunnel.b.daemon().cpu_time()
}

/// `millrace status` on gateway A.
fn status(tunnel: &Tunnel) -> Result<String> {
    let program = own_program("millrace")?;
    let line = format!("{} status {}", program.display(), tunnel.a.interface());
    let status = tunnel.a.namespace().exec(&line)?;
    if status.trim().is_empty() {
        return Err(Error::Unexpected(format!("`{line}` printed nothing")));
    }
    Ok(status)
}

fn progress(arguments: &Arguments, what: &str) {
    if !arguments.json {
        println!("  {what}");
    }
}

fn print(report: &Report) {
    println!("\n  host A ── gateway A ══ router ══ gateway B ── host B     {}\n", report.lab);
    let row = |label: &str, cell: &dyn Fn(&Figures) -> String| {
        print!("  {label:<34}");
        for figures in &report.parties {
            print!("{:>22}", cell(figures));
        }
        println!();
    };
    row("", &|figures| figures.name.to_owned());
    let time = |ping: &PingReport| format!("{:.2} ms", ping.rtt_avg_ms);
    row("ping inside, IPv4", &|figures| time(&figures.ping_v4));
    row("ping inside, IPv6", &|figures| time(&figures.ping_v6));
    row("UDP of 0 to 1500 bytes, unchanged", &|figures| {
        format!("{} of 1501", figures.lengths_passed)
    });
    row("TCP, 1 stream, A to B", &|figures| gigabits(&figures.forward_gigabits_per_second));
    row("TCP, 1 stream, B to A", &|figures| gigabits(&figures.reverse_gigabits_per_second));
    row("CPU of both gateways for 1 GB", &|figures| {
        format!("{:.2} s", mean(&figures.cpu_seconds_per_gigabyte))
    });
    row("packets captured outside", &|figures| figures.outside.packets.to_string());
    row("  that show an inside", &|figures| figures.outside.leaks.len().to_string());
    row("  that the capture missed", &|figures| figures.outside.missed.to_string());
    if let [first, second, ..] = report.parties.as_slice() {
        let ratio =
            mean(&first.forward_gigabits_per_second) / mean(&second.forward_gigabits_per_second);
        println!("\n  {} carries {ratio:.2} times what {} does, A to B", first.name, second.name);
    }
    for figures in &report.parties {
        if let Some(status) = &figures.status {
            println!("\n  millrace status, gateway A:\n");
            status.lines().for_each(|line| println!("    {line}"));
        }
    }
    println!("\n  {:.0} seconds in all", report.seconds_in_all);
}

/// The mean of the rounds, and half of what lies between them.
fn gigabits(rounds: &[f64]) -> String {
    let (low, high) =
        rounds.iter().fold((f64::MAX, 0f64), |(low, high), &rate| (low.min(rate), high.max(rate)));
    format!("{:.2} ± {:.2} Gbit/s", mean(rounds), (high - low) / 2.0)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

impl Party {
    fn implementation(self) -> Implementation {
        match self {
            Self::Millrace => Implementation::Millrace,
            Self::WireguardGo => Implementation::WireguardGo,
            Self::Boringtun => Implementation::Boringtun,
            Self::Gotatun => Implementation::Gotatun,
        }
    }
}
