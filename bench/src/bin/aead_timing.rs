//! `aead_timing`: whether the time of the AEAD's back-ends depends on keys, texts or tags. Prints
//! |t| of Welch's test for each back-end and operation; see [`millrace_bench::timing`].

use std::process::ExitCode;

use clap::Parser;
use millrace_aead::Backend;
use millrace_bench::machine::Machine;
use millrace_bench::timing::{Experiment, Figure, LEAK, SUSPICIOUS, Shape, leaky_comparison};

/// Measures whether the AEAD takes constant time: |t| below 4.5 is nothing, from 10 on a leak.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Calls of each experiment.
    #[arg(long, default_value_t = 300_000, value_parser = clap::value_parser!(u32).range(1000..))]
    calls: u32,
    /// Repetitions, each with other random inputs: a leak is there in all, chance is not.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    runs: u64,
    /// Only these back-ends.
    #[arg(long, value_delimiter = ',', default_values = Backend::ALL.map(Backend::name))]
    backends: Vec<String>,
    /// The core to run on.
    #[arg(long, default_value_t = 0)]
    core: usize,
}

fn main() -> ExitCode {
    let Arguments { calls, runs, backends, core } = Arguments::parse();
    let Machine { cpu, cores, kernel, load_average_1min, .. } = Machine::read();
    if !core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
        eprintln!("aead_timing: core {core} cannot be used: see --core");
        return ExitCode::FAILURE;
    }
    let calls = calls as usize;
    println!(
        "# |t| of {calls} calls, {runs} runs\n\n{cpu}, {cores} cores, Linux {kernel}, load \
         {load_average_1min} before. Below {SUSPICIOUS}: nothing found. From {LEAK} on: a leak. Visible: \
         the difference in time that would have given {SUSPICIOUS}.\n"
    );
    println!(
        "| back-end | operation | packets | |t| of each run | visible, ns |\n|---|---|---|---|---|"
    );
    let print = |name: &str, operation: &str, packets: &str, run: &dyn Fn(u64) -> Figure| {
        let figures: Vec<Figure> = (0..runs).map(run).collect();
        let ts: Vec<String> = figures.iter().map(|figure| format!("{:.1}", figure.t)).collect();
        let visible_ns = figures.iter().map(|figure| figure.visible_ns).fold(0.0, f64::max);
        println!("| {name} | {operation} | {packets} | {} | {visible_ns:.2} |", ts.join(", "));
        figures.iter().all(|figure| figure.t >= LEAK)
    };
    let seen = print("none", "a comparison that leaks", "–", &|run| leaky_comparison(calls, run));
    let mut leaks = false;
    for backend in Backend::ALL.into_iter().filter(|b| backends.iter().any(|n| n == b.name())) {
        if !backend.is_available() {
            println!("| {backend} | not measured: this CPU lacks it | | | |");
            continue;
        }
        for (experiment, shape) in
            Experiment::ALL.into_iter().flat_map(|e| Shape::ALL.map(|shape| (e, shape)))
        {
            let packets = format!("{} of {} B", shape.packets, shape.bytes);
            leaks |= print(backend.name(), experiment.name(), &packets, &|run| {
                experiment.run(backend, shape, calls, run)
            });
        }
    }
    if !seen {
        eprintln!("aead_timing: not even the comparison that leaks was seen to leak: more --calls");
    }
    if leaks {
        eprintln!("aead_timing: a back-end's time depends on secrets");
    }
    if leaks || !seen { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
