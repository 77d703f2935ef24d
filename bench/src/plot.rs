//! The report as an SVG: one panel a test, one bar an implementation, a whisker for its spread.

use std::fmt::Write as _;

use crate::results::{Report, Spread};

const PANEL_WIDTH: f64 = 430.0;
const BAR_HEIGHT: f64 = 20.0;
const LABEL_WIDTH: f64 = 150.0;
const VALUE_WIDTH: f64 = 70.0;
const COLUMNS: usize = 2;

pub fn svg(report: &Report) -> String {
    let tests = report.tests();
    let implementations = report.implementations();
    let panel_height = 46.0 + BAR_HEIGHT * implementations.len() as f64;
    let rows = tests.len().div_ceil(COLUMNS);
    let (width, height) = (PANEL_WIDTH * COLUMNS as f64 + 20.0, panel_height * rows as f64 + 60.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\">Through the tunnel, both ends on one machine \
         (veth: not a NIC's speed)</text>\n"
    );
    for (number, test) in tests.iter().enumerate() {
        let x = 10.0 + PANEL_WIDTH * (number % COLUMNS) as f64;
        let y = 40.0 + panel_height * (number / COLUMNS) as f64;
        panel(&mut out, report, test, &implementations, (x, y));
    }
    let machine = &report.machine;
    let _ = writeln!(
        out,
        "<text x=\"10\" y=\"{:.0}\" fill=\"#555\">{}, {} cores, Linux {}; {} rounds of {} s; bar = \
         median, whisker = smallest to largest</text>\n</svg>",
        height - 8.0,
        escape(&machine.cpu),
        machine.cores,
        escape(&machine.kernel),
        report.rounds,
        report.seconds,
    );
    out
}

/// The figure that a test is about, and its unit.
fn figure(report: &Report, implementation: &str, test: &str) -> Option<(Spread, &'static str)> {
    let cell = report.cell(implementation, test)?;
    if let Some(latency) = cell.round_trip_us {
        return Some((latency, "µs"));
    }
    if test.starts_with("udp") {
        return Some((cell.delivered_kpps?, "kpps"));
    }
    Some((cell.goodput_gbit_per_second?, "Gbit/s"))
}

fn panel(out: &mut String, report: &Report, test: &str, names: &[&str], (x, y): (f64, f64)) {
    let largest = names
        .iter()
        .filter_map(|name| figure(report, name, test))
        .map(|(spread, _)| spread.max)
        .fold(0.0, f64::max);
    let unit = names.iter().find_map(|name| figure(report, name, test)).map_or("", |f| f.1);
    let _ = writeln!(
        out,
        "<text x=\"{x}\" y=\"{:.0}\" font-weight=\"bold\">{} ({unit})</text>",
        y + 16.0,
        escape(test)
    );
    let scale = (PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH) / largest.max(f64::MIN_POSITIVE);
    for (number, name) in names.iter().enumerate() {
        let top = y + 24.0 + BAR_HEIGHT * number as f64;
        let middle = top + BAR_HEIGHT / 2.0;
        let _ = writeln!(out, "<text x=\"{x}\" y=\"{:.1}\">{}</text>", middle + 4.0, escape(name));
        let Some((spread, _)) = figure(report, name, test) else { continue };
        let left = x + LABEL_WIDTH;
        let colour = if name.starts_with("millrace") { "#2a6f97" } else { "#a9b4c2" };
        let _ = writeln!(
            out,
            "<rect x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\n\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{:.*}</text>",
            top + 2.0,
            spread.median * scale,
            BAR_HEIGHT - 4.0,
            left + spread.min * scale,
            left + spread.max * scale,
            left + largest * scale + 6.0,
            middle + 4.0,
            if unit == "Gbit/s" { 2 } else { 0 },
            spread.median,
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
