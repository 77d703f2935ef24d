//! `throughput`: millrace and other WireGuards in the same topology, in turn, in the same run.
//!
//! ```text
//!  host a ── gateway a ── router ── gateway b ── host b      five network namespaces, veth links
//! ```
//! In every round each implementation gets a fresh topology and runs every test, so that slow
//! drift of a shared machine hits all alike. CPU time is that of the two gateway processes.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use millrace_bench::machine::Machine;
use millrace_bench::results::{Cell, Failure, Report, SCHEMA, Spread};
use millrace_bench::{plot, table};
use millrace_lab::iperf::{Iperf, Udp};
use millrace_lab::ping::Ping;
use millrace_lab::tunnel::{Tunnel, TunnelOptions, connect};
use millrace_lab::{Implementation, Lab, Site, SiteOptions, go_module};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Measures WireGuard implementations through the same lab and prints a table.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Which to run, in this order.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = Contender::ALL)]
    peers: Vec<Contender>,
    /// Which tests (default: all); --list names them.
    #[arg(long, value_delimiter = ',')]
    tests: Vec<String>,
    /// Seconds of traffic per test.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// How often everything is repeated.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Also write throughput.json, throughput.md and throughput.svg into this directory.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Lines for millrace's TOML file, for A/B runs of its switches.
    #[arg(long, default_value = "")]
    toml: String,
    /// List the tests and end.
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Contender {
    Millrace,
    /// millrace with ring's AEAD instead of its own.
    MillraceRing,
    WireguardGo,
    Gotatun,
    Boringtun,
    WireguardGoDebian,
}

/// One thing that is measured.
struct Test {
    name: &'static str,
    load: Load,
}

enum Load {
    Latency,
    Tcp { streams: u32, reverse: bool },
    Udp { length: u32 },
}

const TESTS: [Test; 7] = [
    Test { name: "tcp 1 stream", load: Load::Tcp { streams: 1, reverse: false } },
    Test { name: "tcp 1 stream reverse", load: Load::Tcp { streams: 1, reverse: true } },
    Test { name: "tcp 4 streams", load: Load::Tcp { streams: 4, reverse: false } },
    Test { name: "tcp 128 streams", load: Load::Tcp { streams: 128, reverse: false } },
    Test { name: "udp 64 B", load: Load::Udp { length: 64 } },
    Test { name: "udp 1392 B", load: Load::Udp { length: 1392 } },
    Test { name: "latency at low load", load: Load::Latency },
];

/// What one test of one round measured.
#[derive(Default)]
struct Sample {
    implementation: String,
    version: String,
    test: &'static str,
    gbit_per_second: Option<f64>,
    kpps: Option<f64>,
    cpu_seconds_per_gb: Option<f64>,
    round_trip_us: Option<f64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for test in &TESTS {
            println!("{}", test.name);
        }
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        // Something was measured, not all: the table says what is missing.
        Ok(false) => ExitCode::from(3),
        Err(error) => {
            eprintln!("throughput: {error}");
            ExitCode::FAILURE
        }
    }
}

/// True if everything asked for was measured.
fn run(arguments: &Arguments) -> Result<bool> {
    let tests = selected(&arguments.tests)?;
    let machine = Machine::read();
    let (mut samples, mut failures) = (Vec::new(), Vec::new());
    for round in 1..=arguments.rounds {
        for &contender in &arguments.peers {
            let name = contender.name();
            eprintln!("round {round} of {}: {name}", arguments.rounds);
            if let Err(error) = measure(arguments, contender, &tests, &mut samples, &mut failures) {
                let reason = format!("round {round}: {error}");
                failures.push(Failure { implementation: name.into(), test: "all".into(), reason });
            }
        }
    }
    let report = report(arguments, machine, &samples, failures);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table::markdown(&report));
    }
    if let Some(directory) = &arguments.out {
        write_files(directory, &report)?;
    }
    Ok(report.failures.is_empty())
}

fn selected(names: &[String]) -> Result<Vec<&'static Test>> {
    if names.is_empty() {
        return Ok(TESTS.iter().collect());
    }
    let find = |name: &String| {
        let test = TESTS.iter().find(|test| test.name == name);
        test.ok_or_else(|| format!("no test is called {name:?}; --list names them").into())
    };
    names.iter().map(find).collect()
}

/// Every test of one implementation in a topology of its own.
fn measure(
    arguments: &Arguments,
    contender: Contender,
    tests: &[&'static Test],
    samples: &mut Vec<Sample>,
    failures: &mut Vec<Failure>,
) -> Result<()> {
    let implementation = contender.implementation();
    let lab = Lab::new()?;
    let site = Site::new(&lab, &SiteOptions::default())?;
    let options = TunnelOptions {
        verbose: false,
        toml: arguments.toml.clone(),
        // Both gateways are on this machine: pinned workers must not meet on one core.
        side_toml: [0, 1].map(|core| {
            format!("[dataplane]\nworkers = [{core}]\naead = \"{}\"\n", contender.aead())
        }),
        ..TunnelOptions::default()
    };
    let mut tunnel = Tunnel::start(&lab, &site, [implementation; 2], &options)?;
    connect(&site.a, &site.b, Duration::from_secs(10))?;
    let version = contender.version();
    for &test in tests {
        match sample(arguments.seconds, &lab, &site, &mut tunnel, test) {
            Ok(measured) => samples.push(Sample {
                implementation: contender.name().into(),
                version: version.clone(),
                test: test.name,
                ..measured
            }),
            Err(error) => failures.push(Failure {
                implementation: contender.name().into(),
                test: test.name.into(),
                reason: error.to_string(),
            }),
        }
    }
    Ok(())
}

fn sample(
    seconds: u32,
    lab: &Lab,
    site: &Site,
    tunnel: &mut Tunnel,
    test: &Test,
) -> Result<Sample> {
    let iperf = match test.load {
        Load::Latency => {
            let ping = Ping { count: 200, interval_ms: 5, ..Ping::default() };
            let report = ping.run(&site.a.host, site.b.host_v4)?;
            let round_trip_us = Some(report.rtt_avg_ms * 1000.0);
            return Ok(Sample { round_trip_us, ..Sample::default() });
        }
        Load::Tcp { streams, reverse } => Iperf { seconds, streams, reverse, ..Iperf::default() },
        Load::Udp { length } => {
            let udp = Some(Udp { bits_per_second: 0, length });
            Iperf { seconds, udp, ..Iperf::default() }
        }
    };
    let mut cpu = || (tunnel.a.daemon().cpu_time() + tunnel.b.daemon().cpu_time()).as_secs_f64();
    let before = cpu();
    let report = iperf.run(lab.directory(), &site.b.host, site.b.host_v4, &site.a.host)?;
    let cpu_seconds = cpu() - before;
    let delivered = report.packets.saturating_sub(report.lost_packets);
    Ok(Sample {
        gbit_per_second: Some(report.bits_per_second / 1e9),
        kpps: (report.packets > 0).then(|| delivered as f64 / report.seconds / 1e3),
        cpu_seconds_per_gb: (report.bytes > 0).then(|| cpu_seconds / (report.bytes as f64 / 1e9)),
        ..Sample::default()
    })
}

/// Gathers the samples of all rounds into one cell an implementation and test.
fn report(
    arguments: &Arguments,
    machine: Machine,
    samples: &[Sample],
    failures: Vec<Failure>,
) -> Report {
    let mut cells: Vec<Cell> = Vec::new();
    for first in samples {
        let same = |s: &Sample| s.implementation == first.implementation && s.test == first.test;
        if cells.iter().any(|c| c.implementation == first.implementation && c.test == first.test) {
            continue;
        }
        let spread = |value: fn(&Sample) -> Option<f64>| {
            let values: Vec<f64> = samples.iter().filter(|s| same(s)).filter_map(value).collect();
            Spread::of(&values)
        };
        cells.push(Cell {
            implementation: first.implementation.clone(),
            version: first.version.clone(),
            test: first.test.into(),
            goodput_gbit_per_second: spread(|s| s.gbit_per_second),
            delivered_kpps: spread(|s| s.kpps),
            cpu_seconds_per_gb: spread(|s| s.cpu_seconds_per_gb),
            round_trip_us: spread(|s| s.round_trip_us),
        });
    }
    let command =
        std::env::args().skip(1).fold("throughput".into(), |line, word| line + " " + word.as_str());
    Report {
        schema: SCHEMA,
        machine,
        command,
        seconds: arguments.seconds.into(),
        rounds: arguments.rounds as usize,
        cells,
        failures,
    }
}

fn write_files(directory: &Path, report: &Report) -> Result<()> {
    fs::create_dir_all(directory)?;
    fs::write(directory.join("throughput.json"), serde_json::to_string_pretty(report)? + "\n")?;
    fs::write(directory.join("throughput.md"), table::markdown(report))?;
    fs::write(directory.join("throughput.svg"), plot::svg(report))?;
    Ok(())
}

impl Contender {
    /// What is compared by default; the variant with ring's AEAD is for looking at ours alone.
    const ALL: [Self; 5] = [
        Self::Millrace,
        Self::WireguardGo,
        Self::Gotatun,
        Self::Boringtun,
        Self::WireguardGoDebian,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::MillraceRing => "millrace, aead = ring",
            _ => self.implementation().name(),
        }
    }

    fn aead(self) -> &'static str {
        if self == Self::MillraceRing { "ring" } else { "auto" }
    }

    fn implementation(self) -> Implementation {
        match self {
            Self::Boringtun => Implementation::Boringtun,
            Self::Gotatun => Implementation::Gotatun,
            Self::Millrace | Self::MillraceRing => Implementation::Millrace,
            Self::WireguardGo => Implementation::WireguardGo,
            Self::WireguardGoDebian => Implementation::WireguardGoDebian,
        }
    }

    /// The version that the program states, or the module version it was built from.
    fn version(self) -> String {
        let Ok(program) = self.implementation().program() else { return String::new() };
        let output = |command: &mut Command| {
            let output = command.output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let found = match self {
            Self::WireguardGo => go_module::version(&program, "golang.zx2c4.com/wireguard").ok(),
            Self::WireguardGoDebian => {
                output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "wireguard-go"]))
            }
            Self::Boringtun | Self::Gotatun | Self::Millrace | Self::MillraceRing => {
                output(Command::new(&program).arg("--version")).and_then(|text| {
                    let is_version = |word: &&str| word.contains('.');
                    text.split_whitespace().find(is_version).map(str::to_owned)
                })
            }
        };
        found.unwrap_or_default()
    }
}
