//! `stages`: runs the criterion benches and prints what they measured as Markdown, in nanoseconds
//! per packet. One table per group; medians, with the 95 % confidence interval of each.
//!
//! `cargo run --release -p millrace-bench --bin stages > bench/results/stages.md`

use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::SystemTime;
use std::{env, fs, io};

use clap::Parser;
use millrace_bench::machine::Machine;
use serde::Deserialize;
use serde::de::DeserializeOwned;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Runs the benches of the data path's stages and prints nanoseconds per packet.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Only benches whose name contains this.
    #[arg(default_value = "")]
    filter: String,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stages: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut build = cargo_bench();
    build.arg("--no-run");
    succeed(build)?;
    // Read now: the benches themselves are a load of one.
    let machine = Machine::read();
    // A fresh place, so that no figure of an earlier run is among them.
    let home = tempfile::tempdir()?;
    let mut bench = cargo_bench();
    bench.args(["--", &arguments.filter]).env("CRITERION_HOME", home.path());
    succeed(bench)?;
    let mut lines = Vec::new();
    read_all(home.path(), &mut lines)?;
    if lines.is_empty() {
        return Err(format!("no bench has \"{}\" in its name", arguments.filter).into());
    }
    // In the order in which they ran: a group is together.
    lines.sort_by_key(|line| line.written);
    print_head(&machine)?;
    lines.chunk_by(|a, b| a.bench.group_id == b.bench.group_id).for_each(print_group);
    Ok(())
}

fn cargo_bench() -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["bench", "--quiet", "--package", env!("CARGO_PKG_NAME")]);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// Our standard output is the report, so the command's goes to standard error.
fn succeed(mut command: Command) -> Result<()> {
    let status = command.stdout(io::stderr()).status()?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}

/// What one criterion bench measured.
struct Line {
    bench: Bench,
    median: Estimate,
    written: SystemTime,
}

/// Of criterion's `benchmark.json`.
#[derive(Deserialize)]
struct Bench {
    group_id: String,
    function_id: String,
    value_str: Option<String>,
    throughput: Throughput,
}

/// Per iteration; all our benches count packets.
#[derive(Deserialize)]
struct Throughput {
    #[serde(rename = "Elements")]
    packets: f64,
}

/// Of criterion's `estimates.json`: nanoseconds per iteration.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
    confidence_interval: Interval,
}

#[derive(Deserialize)]
struct Interval {
    lower_bound: f64,
    upper_bound: f64,
}

/// Every measurement at or below `directory`: what criterion puts into a directory named `new`.
fn read_all(directory: &Path, lines: &mut Vec<Line>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.ends_with("new") {
            let estimates = path.join("estimates.json");
            let written = fs::metadata(&estimates)?.modified()?;
            let Estimates { median } = read_json(&estimates)?;
            lines.push(Line { bench: read_json(&path.join("benchmark.json"))?, median, written });
        } else if path.is_dir() {
            read_all(&path, lines)?;
        }
    }
    Ok(())
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path)?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn print_head(machine: &Machine) -> Result<()> {
    let Machine { cpu, cores, kernel, memory_gib, load_average_1min } = machine;
    println!("# Stages of the data path, ns per packet\n");
    println!(
        "{cpu} ({cores} cores), Linux {kernel}, {memory_gib} GiB, load {load_average_1min} before \
         the run; {}; {}. `cargo run --release -p millrace-bench --bin stages`: medians, with the \
         95 % confidence interval of each.",
        output("rustc", "--version")?,
        output("date", "+%F")?,
    );
    Ok(())
}

fn output(program: &str, argument: &str) -> Result<String> {
    let output = Command::new(program).arg(argument).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// A row for each kind, a column for each value that they were measured at.
fn print_group(lines: &[Line]) {
    let (mut kinds, mut values) = (Vec::new(), Vec::new());
    for Line { bench, .. } in lines {
        let value = bench.value_str.as_deref().unwrap_or("ns");
        if !kinds.contains(&bench.function_id.as_str()) {
            kinds.push(&bench.function_id);
        }
        if !values.contains(&value) {
            values.push(value);
        }
    }
    println!("\n## {}\n", lines[0].bench.group_id);
    println!("| | {} |", values.join(" | "));
    println!("|{}", "---|".repeat(1 + values.len()));
    for kind in kinds {
        print!("| {kind} |");
        for value in &values {
            let of_cell = |line: &&Line| {
                line.bench.function_id == kind
                    && line.bench.value_str.as_deref().unwrap_or("ns") == *value
            };
            print!(" {} |", lines.iter().find(of_cell).map_or("–".to_owned(), Line::cell));
        }
        println!();
    }
}

impl Line {
    fn cell(&self) -> String {
        let Estimate { point_estimate, confidence_interval: interval } = &self.median;
        let [median, low, high] = [*point_estimate, interval.lower_bound, interval.upper_bound]
            .map(|ns| ns / self.bench.throughput.packets);
        // Three figures are more than a shared machine can hold still.
        let digits = if median < 100.0 { 1 } else { 0 };
        format!("{median:.digits$} ({low:.digits$}–{high:.digits$})")
    }
}
