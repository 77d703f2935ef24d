//! Nanoseconds per verdict of the XDP program, by BPF_PROG_TEST_RUN: the median of 7 runs of a
//! million. The empty program shows what a test run itself costs. Needs root.
//!
//! `cargo run --release -p millrace-ebpf --example verdict_ns`

use std::error::Error;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};

use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use common::Frame;
use millrace_ebpf::load::{LoadOptions, Programs};

#[path = "../tests/common/mod.rs"]
mod common;

const RUNS: usize = 7;
const REPEAT: u32 = 1_000_000;
const INDEX: u32 = 4242;

fn main() -> Result<(), Box<dyn Error>> {
    // A handshake must pass each time, so that the bucket's own cost is seen, not the drop's.
    let endless = LoadOptions { handshake_interval_ns: 0, ..LoadOptions::new(common::PORT) };
    let programs = Programs::load(endless)?;
    programs.sessions.insert(INDEX, 0, 0)?;
    let ring = xsk()?;

    println!("{:<44} {:>6} {:>6} {:>6}", "verdict (ns, median of 7 x 1 M)", "median", "min", "max");
    let twin = common::twin("twin_empty");
    let empty = common::twin_program(&twin, "twin_empty");
    measure("empty program: the test run itself", empty, &Frame::ipv4(common::stun()))?;

    let xdp = programs.xdp()?;
    let v4 = |payload: Vec<u8>| Frame::ipv4(payload);
    let data = |index: u32| common::data(index, 1452);
    measure("foreign port: PASS", xdp, &v4(data(INDEX)).with(|frame| frame.port = 53))?;
    measure("TCP: PASS", xdp, &v4(data(INDEX)).with(|frame| frame.protocol = 6))?;
    measure("data, session, no ring: PASS", xdp, &v4(data(INDEX)))?;
    programs.xsks.set(0, ring.as_fd())?;
    measure("data, session, ring: REDIRECT", xdp, &v4(data(INDEX)))?;
    measure("data, session, ring, IPv6: REDIRECT", xdp, &Frame::ipv6(data(INDEX)))?;
    measure("data, no session: PASS", xdp, &v4(data(INDEX ^ 1)))?;
    programs.flags.set_authoritative(true);
    measure("data, no session, authoritative: DROP", xdp, &v4(data(INDEX ^ 1)))?;
    measure("handshake: PASS", xdp, &v4(common::initiation()))?;
    measure("STUN: PASS", xdp, &v4(common::stun()))?;
    measure("disco: PASS", xdp, &v4(common::disco()))?;
    measure("unknown: DROP", xdp, &v4(common::unknown()))?;
    programs.set_local_addresses(&["198.51.100.7".parse()?])?;
    measure("data, session, ring, local address: REDIRECT", xdp, &v4(data(INDEX)))?;
    Ok(())
}

fn measure(name: &str, program: &Xdp, frame: &Frame) -> Result<(), Box<dyn Error>> {
    let frame = frame.bytes();
    let mut runs = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let result = program.test_run(TestRunOptions {
            data_in: Some(&frame),
            repeat: REPEAT,
            ..TestRunOptions::new()
        })?;
        // The kernel divides by the repetitions.
        runs.push(result.duration.as_nanos());
    }
    runs.sort_unstable();
    println!("{name:<44} {:>6} {:>6} {:>6}", runs[RUNS / 2], runs[0], runs[RUNS - 1]);
    Ok(())
}

fn xsk() -> Result<OwnedFd, Box<dyn Error>> {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the kernel has just made this fd.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
