//! Our relay beside an unmodified derper, in one run, under the same clients:
//! `cargo bench -p millrace-relay` (as root, after `scripts/setup`; minutes; `-- tls` or `-- plain` for
//! one half).
//!
//! The figures are of the server's own CPU time, so that what the clients burn on the same cores does
//! not count: payload delivered per CPU-second at full load, CPU time per packet at a load that both
//! carry, and resident memory per connection that only waits. Loopback in a network namespace: no
//! network card, no loss, and the kernel's part of TCP is in the figures of both.
#![allow(clippy::unwrap_used, reason = "a failed step must stop the run")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use millrace_lab::{Daemon, Namespace};
use millrace_path::derp::{Frame, HEADER_LEN, KEY_LEN};
use millrace_path::sealed::PublicKey;

/// What a full WireGuard packet takes in a path of 1,500 bytes.
const PACKET: usize = 1452;
const RUN: Duration = Duration::from_secs(3);
const ROUNDS: usize = 3;
const IDLE: usize = 10_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    Ours,
    Derper,
}

/// A running server and how to reach it.
struct Subject {
    namespace: Namespace,
    directory: tempfile::TempDir,
    daemon: Daemon,
    tls: bool,
}

fn main() {
    // `cargo test --benches` and `cargo bench --no-run` must not start minutes of load.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    println!(
        "| server | TLS | at most 32 under way, Gbit per CPU-s | flooded, Gbit per CPU-s | 10,000 packets/s, µs of CPU per packet | {IDLE} idle, KiB each |"
    );
    println!("|---|---|---|---|---|---|");
    let only = |word: &str| std::env::args().any(|argument| argument == word);
    for tls in [false, true] {
        if only(if tls { "plain" } else { "tls" }) {
            continue;
        }
        for server in [Server::Ours, Server::Derper] {
            let name = if server == Server::Ours { "millrace-relay" } else { "derper" };
            let full = |load| spread((0..ROUNDS).map(|_| full_load(server, tls, load)).collect());
            let (window, flood) = (full(Load::Window), full(Load::Flood));
            let paced = spread((0..ROUNDS).map(|_| paced_load(server, tls)).collect());
            let idle = idle(server, tls);
            println!("| {name} | {tls} | {window} | {flood} | {paced} | {idle:.1} |");
        }
    }
}

/// Median, least and most.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    format!("{:.2} ({least:.2}–{most:.2})", values[values.len() / 2])
}

impl Subject {
    fn start(server: Server, tls: bool) -> Self {
        let namespace = Namespace::new("bench").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let (chain, key) = certificate(at);
        let command = if server == Server::Ours {
            let more = if tls { https_of(&chain, &key) } else { String::new() };
            let config = configuration(at, &more);
            let mut command = namespace.command(PROGRAM);
            command.args(["run", "--config"]).arg(config);
            command
        } else {
            let mut command = namespace.command(lab("derper"));
            std::fs::rename(&key, at.join("relay.test.key")).unwrap();
            std::fs::copy(&chain, at.join("relay.test.crt")).unwrap();
            command.arg("-c").arg(at.join("derper.json")).args(["-stun=false", "-http-port=-1"]);
            if tls {
                command.args(["-a", HTTPS, "-hostname=relay.test", "-certmode=manual"]);
                command.arg("-certdir").arg(at);
            } else {
                command.args(["-a", HTTP]);
            }
            command
        };
        let mut daemon = Daemon::start(at, "server", command).unwrap();
        let port = if tls { HTTPS } else { HTTP };
        let answers = || namespace.run(|| std::net::TcpStream::connect(port)).ok().map(drop);
        daemon.wait_for("its port", LIMIT, answers).unwrap();
        Self { namespace, directory, daemon, tls }
    }

    fn connect(&self, number: u64) -> Peer {
        let stream: Stream = if self.tls {
            tls(&self.namespace, &self.directory.path().join("chain.pem"))
        } else {
            Box::new(tcp(&self.namespace, HTTP))
        };
        let mut secret = [7; 32];
        // Not the first byte: three of its bits do not count.
        secret[8..16].copy_from_slice(&number.to_le_bytes());
        Peer::login(stream, secret).unwrap()
    }

    /// Resident memory in bytes.
    fn resident(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.daemon.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

fn https_of(chain: &Path, key: &Path) -> String {
    format!("[https]\nlisten = [{HTTPS:?}]\ncertificate_file = {chain:?}\nkey_file = {key:?}\n")
}

/// Two pairs send bursts of 16. Gbit of payload that arrived, per CPU-second of the server.
fn full_load(server: Server, tls: bool, how: Load) -> f64 {
    let subject = Subject::start(server, tls);
    let (packets, cpu) = load(&subject, 2, 16, how);
    packets as f64 * PACKET as f64 * 8.0 / 1e9 / cpu.as_secs_f64()
}

/// 20 pairs, 500 packets a second each, one at a time. µs of the server's CPU time per packet.
fn paced_load(server: Server, tls: bool) -> f64 {
    let subject = Subject::start(server, tls);
    let (packets, cpu) = load(&subject, 20, 1, Load::Paced);
    cpu.as_secs_f64() * 1e6 / packets as f64
}

/// How much a pair sends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    /// No more than [`WINDOW`] packets that have not arrived: what a good transport does, and what
    /// fits into derper's queue.
    Window,
    /// As much as the server reads.
    Flood,
    /// A packet each 2 ms.
    Paced,
}

const WINDOW: u64 = 32;

/// What has arrived at the far end of one pair.
#[derive(Default)]
struct Arrived {
    packets: Mutex<u64>,
    more: Condvar,
}

impl Arrived {
    fn add(&self, packets: u64) {
        *self.packets.lock().unwrap() += packets;
        self.more.notify_one();
    }

    /// Waits until `packets` have arrived; false if some are lost.
    fn reaches(&self, packets: u64) -> bool {
        let limit = Duration::from_millis(100);
        let arrived = self.packets.lock().unwrap();
        let result = self.more.wait_timeout_while(arrived, limit, |arrived| *arrived < packets);
        !result.unwrap().1.timed_out()
    }
}

/// Packets that arrived and CPU time of the server within [`RUN`].
fn load(subject: &Subject, pairs: u64, burst: u64, how: Load) -> (u64, Duration) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    let mut ends = Vec::new();
    for pair in 0..pairs {
        let (from, to) = (subject.connect(2 * pair), subject.connect(2 * pair + 1));
        let (stopped, arrived) = (Arc::clone(&stop), Arc::new(Arrived::default()));
        ends.push(Arc::clone(&arrived));
        let (key, seen) = (to.key, Arc::clone(&arrived));
        threads.push(thread::spawn(move || send(from, key, burst, how, &stopped, &seen)));
        threads.push(thread::spawn(move || receive(to, &arrived)));
    }
    let total = || ends.iter().map(|end| *end.packets.lock().unwrap()).sum::<u64>();
    thread::sleep(Duration::from_millis(500));
    let before = (total(), subject.daemon.cpu_time(), Instant::now());
    thread::sleep(RUN);
    let packets = total() - before.0;
    let cpu = subject.daemon.cpu_time() - before.1;
    eprintln!(
        "    {:.0} packets/s delivered, {:.2} CPU-s of {:.2} s",
        packets as f64 / before.2.elapsed().as_secs_f64(),
        cpu.as_secs_f64(),
        before.2.elapsed().as_secs_f64()
    );
    stop.store(true, Ordering::Relaxed);
    subject.daemon.signal(9);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    (packets, cpu)
}

fn send(
    mut from: Peer,
    to: PublicKey,
    burst: u64,
    how: Load,
    stop: &AtomicBool,
    arrived: &Arrived,
) {
    let mut frames = Vec::new();
    for _ in 0..burst {
        Frame::SendPacket { to, packet: &[5; PACKET] }.write(&mut frames);
    }
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) && from.stream.write_all(&frames).is_ok() {
        sent += burst;
        match how {
            Load::Flood => {}
            Load::Paced => thread::sleep(Duration::from_millis(2)),
            Load::Window if arrived.reaches((sent + burst).saturating_sub(WINDOW)) => {}
            // Some are lost: count from what has arrived.
            Load::Window => sent = *arrived.packets.lock().unwrap(),
        }
    }
}

/// Frames are of one size here, so bytes say how many.
fn receive(mut to: Peer, arrived: &Arrived) {
    const FRAME: usize = HEADER_LEN + KEY_LEN + PACKET;
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    while let Ok(read @ 1..) = to.stream.read(&mut buffer) {
        bytes += read;
        arrived.add((bytes / FRAME) as u64);
        bytes %= FRAME;
    }
}

/// KiB of resident memory per connection that is logged in and silent.
fn idle(server: Server, tls: bool) -> f64 {
    let subject = Subject::start(server, tls);
    drop(subject.connect(u64::MAX));
    let before = subject.resident();
    let peers: Vec<Peer> = (0..IDLE as u64).map(|number| subject.connect(number)).collect();
    // Go's collector gives memory back by and by; both get the same time.
    thread::sleep(Duration::from_secs(10));
    let each = (subject.resident() - before) as f64 / 1024.0 / IDLE as f64;
    drop(peers);
    each
}
