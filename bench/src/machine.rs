//! The machine that a number belongs to, read from the kernel.

use std::fs;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    pub memory_gib: u64,
    /// Runnable tasks over the minute before the run: other work blurs every figure.
    pub load_average_1min: String,
}

impl Machine {
    /// Reads what is there; a file that is missing reads as "unknown".
    pub fn read() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split(": ").nth(1))
        };
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory_kib: u64 = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0);
        Self {
            // Virtual machines are told a vague name; family and model tell the generation.
            cpu: format!(
                "{} (family {} model {})",
                field("model name").unwrap_or("unknown"),
                field("cpu family").unwrap_or("?"),
                field("model\t").unwrap_or("?"),
            ),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: first_line("/proc/sys/kernel/osrelease"),
            memory_gib: memory_kib.div_ceil(1 << 20),
            load_average_1min: first_line("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or("unknown")
                .to_owned(),
        }
    }
}

fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").to_owned()
}
