//! The relay client against relays of two makers, and relays that misbehave.
#![allow(clippy::unwrap_used, reason = "tests")]

mod relay;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant as StdInstant};

use millrace_config::Fingerprint;
use millrace_config::discovery::Authorities;
use millrace_control::relay_client::{Dropped, RelayConfig, Trust};
use millrace_lab::{Daemon, Namespace, second_chance};
use millrace_path::derp::{Cutter, Frame, Gone, ServerInfo};
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use relay::*;

/// Runs a test inside a namespace of its own, where every port is free.
fn inside(test: impl FnOnce(&Namespace) + Send) {
    let namespace = Namespace::new("relay-client").unwrap();
    namespace.run(|| test(&namespace));
}

/// Bytes that differ by length and number.
fn packet(len: usize, number: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + len * 7 + number) as u8).collect()
}

/// Packets of all usual lengths and many others both ways; each arrives as it was and in order.
fn exchange(a: RelayConfig, b: RelayConfig) -> (Node, Node) {
    let (mut a, mut b) = (Node::up(a, 1), Node::up(b, 2));
    let usual: Vec<usize> = (0..1_600).collect();
    for lengths in usual.chunks(8) {
        one_way(&mut a, &mut b, lengths);
        one_way(&mut b, &mut a, lengths);
    }
    // One at a time: queues are short, here and at the relay.
    for len in (1_600..65_400).step_by(331).chain(65_530..=65_536) {
        one_way(&mut a, &mut b, &[len]);
        one_way(&mut b, &mut a, &[len]);
    }
    for node in [&a, &b] {
        assert_eq!(node.client.dropped(), Dropped::default());
    }
    (a, b)
}

fn one_way(from: &mut Node, to: &mut Node, lengths: &[usize]) {
    for &len in lengths {
        from.send(to.key, &packet(len, 0));
    }
    for &len in lengths {
        until(&mut [from, to], "a packet", |nodes| nodes[1].has_packet());
        let (source, got) = to.packet();
        assert!(source == from.key && got == packet(len, 0), "{len} bytes are not what was sent");
    }
}

#[test]
fn packets_of_every_length_pass_our_relay() {
    inside(|namespace| {
        let relay = Relay::ours(namespace, "");
        exchange(plain(), secure("127.0.0.1", relay.authority()));
        assert_eq!(relay.log().matches("fast_start: true").count(), 1, "{}", relay.log());
    });
}

#[test]
fn packets_of_every_length_pass_an_unmodified_derper() {
    inside(|namespace| {
        let _relay = Relay::derper(namespace);
        let (mut a, b) = exchange(plain(), plain());
        let gone = b.key;
        drop(b);
        a.wait("PeerGone", |said| match said {
            Said::PeerGone(peer, Gone::Disconnected) if *peer == gone => Some(()),
            _ => None,
        });
        // Its own packet comes back, so that a relay that forgot us is told from one that has not.
        until(&mut [&mut a], "a round trip", |nodes| nodes[0].client.round_trip().is_some());
    });
}

#[test]
fn packets_pass_an_unmodified_derper_over_tls() {
    inside(|namespace| {
        let relay = Relay::derper_tls(namespace, "127.0.0.1");
        let config = secure("127.0.0.1", relay.authority());
        let (mut a, mut b) = (Node::new(config.clone(), 1), Node::up(config, 2));
        let up = a.wait_up();
        assert_eq!(up.tls.as_deref(), Some("TLSv1_3"));
        one_way(&mut a, &mut b, &[0, 1, 1_420, 65_536]);
        one_way(&mut b, &mut a, &[0, 1, 1_420, 65_536]);
    });
}

fn pin(relay: &Relay) -> Trust {
    let path = relay.directory.path().join("chain.pem");
    let certificate = CertificateDer::from_pem_file(path).unwrap();
    let hash = ring::digest::digest(&ring::digest::SHA256, &certificate);
    Trust::Pinned(Fingerprint(hash.as_ref().try_into().unwrap()))
}

/// Tailscale's own Rust client, which sends everything back.
#[test]
fn packets_pass_our_relay_to_the_official_rust_client_and_back() {
    inside(|namespace| {
        let relay = Relay::ours(namespace, "");
        let mut command = namespace.command(peer("ts-derp-peer"));
        command.args(["127.0.0.1", "443"]);
        let directory = relay.directory.path();
        let mut echo = Daemon::start(directory, "ts-derp-peer", command).unwrap();
        echo.wait_for_log("key ", LIMIT).unwrap();
        let log = echo.log();
        let hex = log.lines().find_map(|line| line.strip_prefix("key ")).unwrap();
        let key = PublicKey(millrace_config::PublicKey::from_hex(hex).unwrap().0);
        let mut ours = Node::up(secure("127.0.0.1", relay.authority()), 1);
        // It takes 32 bytes less than the protocol allows.
        for len in [0, 1, 32, 148, 1_420, 16_384, 65_504] {
            ours.send(key, &packet(len, 0));
            let (from, got) = ours.packet();
            assert!(from == key && got == packet(len, 0), "{len} bytes");
        }
    });
}

/// More than any queue holds, so that the sender waits for the receiver.
#[test]
fn ten_thousand_packets_arrive_in_order() {
    // A machine that stands still for a tenth of a second makes some too old to be sent.
    second_chance(ten_thousand_packets);
}

fn ten_thousand_packets() {
    inside(|namespace| {
        let relay = Relay::ours(namespace, "");
        let mut a = Node::up(secure("127.0.0.1", relay.authority()), 1);
        let mut b = Node::up(secure("127.0.0.1", relay.authority()), 2);
        let mut data = vec![0; 1_452];
        data[0] = 4;
        let mut expected: u32 = 0;
        for number in 0..10_000_u32 {
            data[4..8].copy_from_slice(&number.to_be_bytes());
            let now = a.now();
            a.client.send(now, b.key, &data);
            // As a batch of the data plane.
            if number % 64 == 63 || number == 9_999 {
                a.client.flush(now);
                until(&mut [&mut a, &mut b], "a batch", |nodes| {
                    expected as usize + nodes[1].packets() > number as usize
                });
                for said in b.said.drain(..) {
                    if let Said::Packet(_, packet) = said {
                        assert_eq!(packet[4..8], expected.to_be_bytes());
                        expected += 1;
                    }
                }
            }
        }
        assert_eq!(expected, 10_000);
        assert_eq!(b.client.counts().received_packets, 10_000);
        assert_eq!(b.client.counts().received_bytes, 14_520_000);
    });
}

#[test]
fn a_peer_that_is_not_there_and_a_key_that_two_use_are_told() {
    inside(|namespace| {
        let _relay = Relay::ours(namespace, "");
        let mut a = Node::up(plain(), 1);
        let stranger = PublicKey([9; 32]);
        a.send(stranger, b"anybody?");
        a.wait("PeerGone", |said| match said {
            Said::PeerGone(peer, Gone::NotHere) if *peer == stranger => Some(()),
            _ => None,
        });
        let _second = Node::up(plain(), 1);
        let health = a.wait("health", |said| match said {
            Said::Health(text) => Some(text.clone()),
            _ => None,
        });
        assert!(health.contains("same key"), "{health}");
    });
}

#[test]
fn our_relay_is_found_again_after_it_was_killed() {
    inside(|namespace| {
        let asked = killed_and_started(Relay::ours(namespace, ""));
        // The key is the same, so that the data plane is not asked again.
        assert_eq!(asked, 1);
    });
}

#[test]
fn a_derper_is_found_again_after_it_was_killed() {
    inside(|namespace| {
        // In its mode without TLS it makes itself a new key.
        assert_eq!(killed_and_started(Relay::derper(namespace)), 2);
    });
}

fn killed_and_started(mut relay: Relay) -> usize {
    let (mut a, mut b) = (Node::up(plain(), 1), Node::up(plain(), 2));
    relay.kill();
    a.wait_down();
    let refused = a.wait_down();
    assert!(refused.contains("could not connect to 127.0.0.1:3340"), "{refused}");
    relay.start();
    until(&mut [&mut a, &mut b], "both back", |nodes| nodes.iter().all(|node| node.client.is_up()));
    one_way(&mut a, &mut b, &[100, 1_000]);
    a.asked
}

#[test]
fn a_relay_that_restarts_says_when_to_come_back() {
    inside(|namespace| {
        let mut relay = Relay::ours(namespace, "");
        let mut a = Node::up(plain(), 1);
        relay.daemon.take().unwrap().stop().unwrap();
        a.wait("Restarting", |said| match said {
            Said::Restarting(_) => Some(()),
            _ => None,
        });
        a.wait_down();
        thread::sleep(Duration::from_millis(1_500));
        relay.start();
        let begin = StdInstant::now();
        a.wait_up();
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    });
}

/// Each is one sentence that names what is wrong; then the client waits and tries again.
#[test]
fn wrong_certificates_are_told_apart() {
    inside(|namespace| {
        let relay = Relay::ours(namespace, "");
        let other = tempfile::tempdir().unwrap();
        Certificates::new(other.path(), &[NAME]);
        let config = |trust| RelayConfig { trust, ..secure("127.0.0.1", relay.authority()) };
        let failure = |config| Node::new(config, 1).wait_down();
        let authority = |file| Trust::Authorities(Authorities::File(file));
        let said = failure(config(authority(other.path().join("authority.pem"))));
        assert!(said.contains("signed by nobody whom we trust"), "{said}");
        let said = failure(config(Trust::default()));
        assert!(said.contains("signed by nobody whom we trust"), "{said}");
        let said = failure(secure("127.0.0.2", relay.authority()));
        assert!(said.contains("not for 127.0.0.2, but for") && said.contains(NAME), "{said}");
        let said = failure(config(authority("/nowhere/ca.pem".into())));
        assert!(said.starts_with("/nowhere/ca.pem: No such file"), "{said}");
        let said = failure(config(Trust::Pinned(Fingerprint([7; 32]))));
        assert!(said.contains("another than the pinned one: expected sha256:0707"), "{said}");
        Node::up(config(pin(&relay)), 1);
        // As the sentence above names it, an operator may copy the key's fingerprint.
        let key = said.split(" with ").nth(1).unwrap().split(' ').next().unwrap();
        Node::up(config(Trust::Pinned(Fingerprint::parse(key).unwrap())), 1);
    });
}

#[test]
fn dates_of_certificates_are_compared_with_the_clock() {
    for (from, to, expected) in [
        (2000, 2020, "ended at 2020-01-01 00:00:00 UTC"),
        (2900, 3000, "the clock is probably wrong"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let made = Certificates::between(directory.path(), &["127.0.0.1"], from, to);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let chain = vec![CertificateDer::from_pem_file(made.chain).unwrap()];
            let key = rustls::pki_types::PrivateKeyDer::from_pem_file(made.key).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let config = rustls::ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(chain, key)
                .unwrap();
            let session = rustls::ServerConnection::new(Arc::new(config)).unwrap();
            let mut stream = rustls::StreamOwned::new(session, listener.accept().unwrap().0);
            let _ = stream.read(&mut [0]);
        });
        let authority = directory.path().join("authority.pem");
        let said = Node::new(secure(&address.to_string(), authority), 1).wait_down();
        assert!(said.contains(expected) && said.contains("this machine's clock says 20"), "{said}");
        server.join().unwrap();
    }
}

#[test]
fn a_relay_with_another_key_than_the_pinned_one_is_refused() {
    inside(|namespace| {
        let relay = Relay::ours(namespace, "");
        let up = Node::new(plain(), 1).wait_up();
        for config in [plain(), secure("127.0.0.1", relay.authority())] {
            Node::up(RelayConfig { relay_key: Some(up.relay_key), ..config.clone() }, 1);
            let other = Some(SecretKey::from_bytes([3; 32]).public_key());
            let said = Node::new(RelayConfig { relay_key: other, ..config }, 1).wait_down();
            assert!(said.contains("the relay's key is"), "{said}");
        }
    });
}

/// A wire whose halves can be cut without an end: bytes go nowhere, and nobody is told.
struct Wire {
    address: std::net::SocketAddr,
    cut: Arc<AtomicBool>,
}

impl Wire {
    /// Before the relay at [`HTTP`].
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, cut) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
        let swallow = cut.clone();
        thread::Builder::new()
            .spawn(move || {
                for client in listener.incoming() {
                    let (client, relay) = (client.unwrap(), TcpStream::connect(HTTP).unwrap());
                    let (up, down) = (client.try_clone().unwrap(), relay.try_clone().unwrap());
                    thread::spawn(move || pass(up, relay, None));
                    let swallow = swallow.clone();
                    thread::spawn(move || pass(down, client, Some(swallow)));
                }
            })
            .unwrap();
        Self { address, cut }
    }

    fn config(&self) -> RelayConfig {
        RelayConfig::new(url(&format!("http://{}", self.address)))
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, swallow: Option<Arc<AtomicBool>>) {
    let mut bytes = vec![0; 65_536];
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        if swallow.as_ref().is_some_and(|swallow| swallow.load(Ordering::Relaxed)) {
            continue;
        }
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[test]
fn a_connection_that_is_dead_one_way_is_left_in_bounded_time() {
    inside(|namespace| {
        let _relay = Relay::ours(namespace, "");
        let wire = Wire::new();
        let (mut a, mut b) = (Node::up(wire.config(), 1), Node::up(plain(), 2));
        one_way(&mut a, &mut b, &[100]);
        wire.cut.store(true, Ordering::Relaxed);
        let begin = StdInstant::now();
        a.send(b.key, b"does this arrive?");
        let said = a.wait_down();
        println!("{said} after {:?}", begin.elapsed());
        assert!(said.contains("the connection is dead"), "{said}");
        // 2 s without a word, 5 s for an answer, and what a loaded machine adds.
        assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
        wire.cut.store(false, Ordering::Relaxed);
        a.wait_up();
        // The other way was open all the time.
        assert_eq!(b.packet().1, b"does this arrive?");
        one_way(&mut a, &mut b, &[100]);
        one_way(&mut b, &mut a, &[100]);
    });
}

/// Answers every ping and hands nobody a packet.
fn deaf_relay(listener: &TcpListener) {
    let secret = SecretKey::from_bytes([8; 32]);
    let mut stream = listener.accept().unwrap().0;
    let mut out = b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec();
    Frame::ServerKey(secret.public_key()).write(&mut out);
    stream.write_all(&out).unwrap();
    let (mut bytes, mut buffer, mut cutter) = (Vec::new(), [0; 4096], Cutter::default());
    let mut http = true;
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..len]);
        if http {
            let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            bytes.drain(..end + 4);
            http = false;
        }
        let mut rest = &bytes[..];
        let mut out = Vec::new();
        while let Some(raw) = cutter.next(&mut rest).unwrap() {
            match Frame::parse(raw.kind, raw.payload).unwrap() {
                Frame::ClientInfo { from, .. } => {
                    let key = BoxKey::agree(&secret, from).unwrap();
                    ServerInfo::default().write(&key, [1; 24], &mut out);
                }
                Frame::Ping(data) => Frame::Pong(data).write(&mut out),
                _ => {}
            }
        }
        bytes = rest.to_vec();
        stream.write_all(&out).unwrap();
    }
}

#[test]
fn a_relay_that_answers_and_is_deaf_is_left_in_bounded_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = url(&format!("http://{}", listener.local_addr().unwrap()));
    let server = thread::spawn(move || deaf_relay(&listener));
    let mut node = Node::up(RelayConfig::new(url), 1);
    let begin = StdInstant::now();
    let said = node.wait_down();
    assert!(said.contains("packets to us do not arrive"), "{said}");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    drop(node);
    server.join().unwrap();
}

#[test]
fn a_changed_network_is_asked_at_once() {
    inside(|namespace| {
        let _relay = Relay::ours(namespace, "");
        let wire = Wire::new();
        let mut a = Node::up(wire.config(), 1);
        until(&mut [&mut a], "a round trip", |nodes| nodes[0].client.round_trip().is_some());
        wire.cut.store(true, Ordering::Relaxed);
        let begin = StdInstant::now();
        let now = a.now();
        a.client.network_changed(now, |_| true);
        a.wait_down();
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        // While nothing answers: tried at once when the network changes again.
        wire.cut.store(false, Ordering::Relaxed);
        a.wait_up();
        let now = a.now();
        a.client.network_changed(now, |_| true);
        turn(&mut [&mut a], Duration::ZERO);
        assert!(a.client.is_up());
        // From an address that is gone nothing comes any more, and nobody needs to be asked.
        a.client.network_changed(now, |_| false);
        assert!(!a.client.is_up());
    });
}

/// What is no relay ends in a sentence that says so, soon, and the client goes on.
#[test]
fn strangers_at_the_relays_port_are_told_apart() {
    for (answer, expected) in [
        (
            &b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"[..],
            "answers /derp with 404 Not Found",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK", "unknown type 0x48"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x03\x00\x10\x00\x00", "ServerInfo"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x06\x00\x00\x00\x00", "KeepAlive"),
        (b"", "closed the connection"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = url(&format!("http://{}", listener.local_addr().unwrap()));
        let server = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            assert!(stream.read(&mut [0; 2_000]).unwrap() > 0);
            stream.write_all(answer).unwrap();
        });
        let said = Node::new(RelayConfig::new(url), 1).wait_down();
        assert!(said.contains(expected), "{said}");
        server.join().unwrap();
    }
    // Who listens and says nothing is left after the limit; nobody listens: at once.
    let url = url("https://127.0.0.1:1");
    let said = Node::new(RelayConfig::new(url), 1).wait_down();
    assert!(said.contains("could not connect to 127.0.0.1:1: Connection refused"), "{said}");
}

/// A relay that announces a rate gets no more, but what is urgent passes.
#[test]
fn the_rate_of_a_relay_is_kept() {
    // A machine that stands still for a second at the end has that much less sent.
    second_chance(rate_is_kept);
}

fn rate_is_kept() {
    inside(|namespace| {
        let limit = "[rate]\nbytes_per_second = 200000\nburst_bytes = 200000";
        let _relay = Relay::ours(namespace, limit);
        let (mut a, mut b) = (Node::new(plain(), 1), Node::up(plain(), 2));
        let up = a.wait_up();
        assert_eq!((up.info.bytes_per_second, up.info.burst_bytes), (200_000, 200_000));
        let mut data = packet(1_000, 0);
        data[..4].copy_from_slice(&[4, 0, 0, 0]);
        let begin = StdInstant::now();
        while begin.elapsed() < Duration::from_secs(2) {
            let now = a.now();
            for _ in 0..20 {
                a.client.send(now, b.key, &data);
            }
            a.client.flush(now);
            turn(&mut [&mut a, &mut b], Duration::from_millis(5));
        }
        let seconds = begin.elapsed().as_secs_f64();
        let sent = a.client.counts().sent_bytes as f64;
        assert!(sent < 200_000.0 * (seconds + 1.0) + 70_000.0, "{sent} bytes in {seconds} s");
        assert!(sent > 200_000.0 * seconds, "{sent} bytes in {seconds} s");
        assert!(a.client.dropped().late > 0, "{:?}", a.client.dropped());
        assert!(a.client.is_up());
    });
}
