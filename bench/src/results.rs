//! What one run of the throughput benchmark measured. Serialised as `millrace.throughput/1`.

use serde::Serialize;

use crate::machine::Machine;

/// The name and version of the JSON form.
pub const SCHEMA: &str = "millrace.throughput/1";

#[derive(Debug, Serialize)]
pub struct Report {
    pub schema: &'static str,
    pub machine: Machine,
    /// The command line that made the report.
    pub command: String,
    /// Seconds of traffic per cell and round.
    pub seconds: u64,
    /// Rounds; in each, every implementation runs every test in turn.
    pub rounds: usize,
    pub cells: Vec<Cell>,
    /// What could not be run, and why. Never empty silently.
    pub failures: Vec<Failure>,
}

/// All rounds of one implementation at one test.
#[derive(Debug, Serialize)]
pub struct Cell {
    pub implementation: String,
    pub version: String,
    pub test: String,
    pub goodput_gbit_per_second: Option<Spread>,
    /// Packets that reached the receiver, per second.
    pub delivered_kpps: Option<Spread>,
    /// User and system seconds of both gateway processes per 10^9 bytes delivered.
    pub cpu_seconds_per_gb: Option<Spread>,
    pub round_trip_us: Option<Spread>,
}

#[derive(Debug, Serialize)]
pub struct Failure {
    pub implementation: String,
    pub test: String,
    pub reason: String,
}

/// Smallest, middle and largest of the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

impl Spread {
    /// None if there is no value. The median of an even count is the mean of the middle two.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[half]
        } else {
            f64::midpoint(sorted[half - 1], sorted[half])
        };
        Some(Self { min, median, max })
    }
}

impl Report {
    pub fn cell(&self, implementation: &str, test: &str) -> Option<&Cell> {
        self.cells.iter().find(|c| c.implementation == implementation && c.test == test)
    }

    /// Implementations in the order of their first cell.
    pub fn implementations(&self) -> Vec<&str> {
        distinct(self.cells.iter().map(|cell| cell.implementation.as_str()))
    }

    /// Tests in the order of their first cell.
    pub fn tests(&self) -> Vec<&str> {
        distinct(self.cells.iter().map(|cell| cell.test.as_str()))
    }
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_of_nothing_is_none_and_the_median_of_two_lies_between() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0, 1.0]), Some(Spread { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(Spread::of(&[9.0, 1.0, 4.0]), Some(Spread { min: 1.0, median: 4.0, max: 9.0 }));
    }
}
