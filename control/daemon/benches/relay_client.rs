//! One stream through a relay, client to client on loopback:
//! `cargo build --release -p millrace-relay && cargo bench -p millrace-control --bench relay_client`
//! (as root, half a minute).
//!
//! Full WireGuard packets in batches of 64, as many as the sender's connection takes. Said are the
//! payload that arrived, what was dropped on the way, and CPU time per gigabyte that arrived: of
//! each client's thread and of the relay.
#![allow(clippy::unwrap_used, reason = "a failed step must stop the run")]

#[path = "../tests/relay/mod.rs"]
mod relay;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use millrace_control::relay_client::{RelayConfig, RelayEvent};
use millrace_lab::Namespace;
use millrace_path::sealed::PublicKey;
use rustix::event::{PollFd, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};

use relay::*;

/// What a full packet takes in a path of 1,500 bytes.
const PACKET: usize = 1452;
const BATCH: usize = 64;
const RUN: Duration = Duration::from_secs(4);

fn main() {
    // `cargo test --benches` and `cargo bench --no-run` must not start load.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    println!(
        "| TLS | Gbit/s | sent, lost | sender CPU-s/GB | receiver CPU-s/GB | relay CPU-s/GB |"
    );
    println!("|---|---|---|---|---|---|");
    let namespace = Namespace::new("bench").unwrap();
    for tls in [false, true] {
        for _ in 0..3 {
            namespace.run(|| measure(&namespace, tls));
        }
    }
}

fn measure(namespace: &Namespace, tls: bool) {
    let mut server = Relay::ours(namespace, "");
    let config: RelayConfig = if tls { secure("127.0.0.1", server.authority()) } else { plain() };
    let (stop, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut a, b) = (Node::up(config.clone(), 1), Node::up(config, 2));
    let to = b.key;
    let relay_cpu = || server.daemon.as_ref().unwrap().cpu_time();
    let before = (relay_cpu(), Instant::now());
    let (sender, receiver) = thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(b, &stop, &arrived));
        let sender = scope.spawn(|| {
            send(&mut a, to, Instant::now() + RUN);
            own_cpu()
        });
        let sender = sender.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        (sender, receiver.join().unwrap())
    });
    let seconds = before.1.elapsed().as_secs_f64();
    let relay_seconds = (relay_cpu() - before.0).as_secs_f64();
    let packets = arrived.into_inner();
    let gigabytes = packets as f64 * PACKET as f64 / 1e9;
    let sent = a.client.counts().sent_packets;
    println!(
        "| {tls} | {:.2} | {sent}, {:.1} % | {:.2} | {:.2} | {:.2} |",
        gigabytes * 8.0 / seconds,
        100.0 * (1.0 - packets as f64 / sent as f64),
        sender.as_secs_f64() / gigabytes,
        receiver.as_secs_f64() / gigabytes,
        relay_seconds / gigabytes,
    );
    server.kill();
}

/// A batch whenever nothing waits.
fn send(node: &mut Node, to: PublicKey, end: Instant) {
    let mut packet = vec![9; PACKET];
    packet[..4].copy_from_slice(&[4, 0, 0, 0]);
    while Instant::now() < end {
        let now = node.now();
        if node.client.queued_bytes() == 0 {
            for _ in 0..BATCH {
                node.client.send(now, to, &packet);
            }
            node.client.flush(now);
        } else {
            wait(node);
            node.client.handle(now);
        }
        while node.client.next_event().is_some() {}
    }
}

/// CPU time of the thread.
fn receive(mut node: Node, stop: &AtomicBool, arrived: &AtomicU64) -> Duration {
    while !stop.load(Ordering::Relaxed) {
        wait(&node);
        let now = node.now();
        node.client.handle(now);
        while let Some(event) = node.client.next_event() {
            if let RelayEvent::Packets(packets) = event {
                let count = packets.inspect(|(_, packet)| assert_eq!(packet.len(), PACKET)).count();
                arrived.fetch_add(count as u64, Ordering::Relaxed);
            }
        }
    }
    own_cpu()
}

fn wait(node: &Node) {
    let (fd, flags) = node.client.interest();
    let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&limit)).unwrap();
}

fn own_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
