//! The report as a Markdown table: one row an implementation, one column a test.

use std::fmt::Write as _;

use crate::results::{Cell, Report, Spread};

pub fn markdown(report: &Report) -> String {
    let mut out = String::new();
    let machine = &report.machine;
    let _ = writeln!(
        out,
        "{} ({} cores), Linux {}, {} GiB, load {} at the start; {} rounds of {} s. Each entry: median \
         (smallest–largest). `{}`\n",
        machine.cpu,
        machine.cores,
        machine.kernel,
        machine.memory_gib,
        machine.load_average_1min,
        report.rounds,
        report.seconds,
        report.command,
    );
    for test in report.tests() {
        let _ = writeln!(out, "### {test}\n");
        let _ = writeln!(
            out,
            "| implementation | Gbit/s | kpps delivered | CPU-s/GB, both ends | round trip µs |"
        );
        let _ = writeln!(out, "|---|---|---|---|---|");
        for implementation in report.implementations() {
            if let Some(cell) = report.cell(implementation, test) {
                row(&mut out, cell);
            }
        }
        out.push('\n');
    }
    for failure in &report.failures {
        let _ = writeln!(
            out,
            "- not measured: {} {}: {}",
            failure.implementation, failure.test, failure.reason
        );
    }
    out
}

fn row(out: &mut String, cell: &Cell) {
    let _ = writeln!(
        out,
        "| {} {} | {} | {} | {} | {} |",
        cell.implementation,
        cell.version,
        entry(cell.goodput_gbit_per_second, 2),
        entry(cell.delivered_kpps, 0),
        entry(cell.cpu_seconds_per_gb, 2),
        entry(cell.round_trip_us, 0),
    );
}

fn entry(spread: Option<Spread>, digits: usize) -> String {
    match spread {
        Some(Spread { min, median, max }) => {
            format!("{median:.digits$} ({min:.digits$}–{max:.digits$})")
        }
        None => "–".to_owned(),
    }
}
