//! The relay as its clients and its operator meet it.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use common::*;
use millrace_lab::{Daemon, HungThread, Namespace, wait_for};
use millrace_path::derp::{Frame, Gone, Kind};
use millrace_path::sealed::PublicKey;
use millrace_path::stun;
use millrace_path::transaction::TransactionId;

const DISCO: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];

/// Enough pairs that some share a worker and some do not.
#[test]
fn packets_pass_between_all_clients_in_order_and_unchanged() {
    let relay = Relay::start("");
    let mut peers: Vec<Peer> = (1..9).map(|n| relay.connect([n; 32])).collect();
    let keys: Vec<PublicKey> = peers.iter().map(|peer| peer.key).collect();
    let content = |from: usize, to: usize, n: usize| {
        let seed = from * 31 + to * 7 + n;
        (0..n * n * 3).map(|i| (seed + i) as u8).collect::<Vec<u8>>()
    };
    for from in 0..peers.len() {
        for n in 0..20 {
            for (to, &key) in keys.iter().enumerate() {
                peers[from].send(key, &content(from, to, n));
            }
        }
        for (to, peer) in peers.iter_mut().enumerate() {
            for n in 0..20 {
                peer.expect_packet(keys[from], &content(from, to, n));
            }
        }
    }
    assert_eq!(relay.metric("received_packets_total"), 8 * 8 * 20);
    assert_eq!(relay.metric("sent_packets_total"), 8 * 8 * 20);
    assert_eq!(relay.metric("clients"), 8);
}

/// One byte at a time, and the largest frames across the relay's read buffer.
#[test]
fn frames_arrive_whole_however_they_are_cut() {
    let relay = Relay::start("");
    let (mut a, mut b) = (relay.connect([1; 32]), relay.connect([2; 32]));
    let mut frame = Vec::new();
    Frame::SendPacket { to: b.key, packet: b"in pieces" }.write(&mut frame);
    for byte in &frame {
        a.stream.write_all(&[*byte]).unwrap();
    }
    b.expect_packet(a.key, b"in pieces");
    for n in 0..20_u8 {
        let packet = vec![n; 65_536 - usize::from(n)];
        a.send(b.key, &packet);
        b.expect_packet(a.key, &packet);
    }
}

/// Who reads the answer to its login is there for all others, whichever worker they are on.
#[test]
fn packets_find_a_client_from_the_moment_that_it_is_logged_in() {
    let relay = Relay::start("");
    let mut sender = relay.connect([1; 32]);
    for number in 0..300_u16 {
        let mut secret = [2; 32];
        secret[..2].copy_from_slice(&number.to_be_bytes());
        let mut new = relay.connect(secret);
        sender.send(new.key, b"welcome");
        new.expect_packet(sender.key, b"welcome");
    }
}

#[test]
fn the_ways_of_a_peer_that_leaves_are_closed() {
    let relay = Relay::start("");
    let (mut a, mut b) = (relay.connect([1; 32]), relay.connect([2; 32]));
    a.send(b.key, b"hello");
    b.expect_packet(a.key, b"hello");
    let gone = a.key;
    drop(a);
    let why = Gone::Disconnected;
    assert_eq!(b.receive().frame(), Frame::PeerGone { peer: gone, why });
    // To somebody who is not here: told at once, three times, then once a second. A run of packets
    // that arrives in one piece is told once, so that here each waits for its answer.
    let why = Gone::NotHere;
    let start = Instant::now();
    for _ in 0..3 {
        b.send(gone, b"?");
        assert_eq!(b.receive().frame(), Frame::PeerGone { peer: gone, why });
    }
    for _ in 0..47 {
        b.send(gone, b"?");
    }
    b.write(&Frame::Ping(*b"12345678"));
    let mut told = 0;
    loop {
        match b.receive().frame() {
            Frame::PeerGone { peer, why: Gone::NotHere } if peer == gone => told += 1,
            frame => {
                assert_eq!(frame, Frame::Pong(*b"12345678"));
                break;
            }
        }
    }
    assert!(told <= start.elapsed().as_secs() + 1, "told {told} times in {:?}", start.elapsed());
    assert_eq!(relay.metric("drops_total{reason=\"not_here\"}"), 50);
}

/// It reads nothing while more comes than anybody keeps; then it gets the newest, and disco.
#[test]
fn a_client_that_does_not_read_loses_the_oldest_packets_and_nobody_else_any() {
    // With two, a worker that the machine lets wait would drop some more, under another name.
    let relay = Relay::start_edited(|text| text.replace("workers = 2", "workers = 1"));
    let (mut a, mut slow) = (relay.connect([1; 32]), relay.connect([2; 32]));
    let mut fast = relay.connect([3; 32]);
    let mut sent = 0_u32;
    let mut packet = vec![0; 60_000];
    wait_for("drops", LIMIT, || {
        for _ in 0..50 {
            packet[..4].copy_from_slice(&sent.to_be_bytes());
            a.send(slow.key, &packet);
            sent += 1;
        }
        (relay.metric("drops_total{reason=\"queue_full\"}") > 200).then_some(())
    })
    .unwrap();
    a.send(slow.key, &DISCO);
    a.send(fast.key, b"passes");
    fast.expect_packet(a.key, b"passes");

    let (mut newest, mut got, mut disco) = (None, 0, false);
    while newest != Some(sent - 1) || !disco {
        let frame = slow.receive();
        let Frame::RecvPacket { packet, .. } = frame.frame() else { panic!("{frame:?}") };
        if packet == DISCO {
            disco = true;
            continue;
        }
        let number = u32::from_be_bytes(packet[..4].try_into().unwrap());
        assert!(newest < Some(number), "{number} after {newest:?}");
        newest = Some(number);
        got += 1;
    }
    let dropped = relay.metric("drops_total{reason=\"queue_full\"}");
    assert_eq!(u64::from(sent), got + dropped);
}

#[test]
fn two_connections_of_one_key_are_told_and_the_last_speaker_gets_the_packets() {
    let relay = Relay::start("");
    let mut sender = relay.connect([9; 32]);
    let mut first = relay.connect([1; 32]);
    let mut second = relay.connect([1; 32]);
    let told = first.receive();
    assert!(matches!(told.frame(), Frame::Health(text) if text.contains("same key")), "{told:?}");
    sender.send(first.key, b"to the second");
    second.expect_packet(sender.key, b"to the second");

    first.send(sender.key, b"I speak");
    sender.expect_packet(first.key, b"I speak");
    assert_eq!(first.receive().frame(), Frame::Health(""));
    assert_eq!(second.receive().kind, Kind::Health);
    sender.send(first.key, b"to the first");
    first.expect_packet(sender.key, b"to the first");

    drop(first);
    assert_eq!(second.receive().frame(), Frame::Health(""));
    sender.send(second.key, b"to the heir");
    second.expect_packet(sender.key, b"to the heir");
    assert_eq!(relay.metric("clients"), 2);
}

#[test]
fn a_list_decides_who_logs_in_and_a_reload_changes_it() {
    let list = |directory: &std::path::Path| directory.join("keys");
    let public = |n| millrace_config::PublicKey(Peer::public([n; 32]).0);
    let mut relay = Relay::start_with(|directory| {
        fs::write(list(directory), format!("{}\n{}\n", public(1), public(2))).unwrap();
        format!("[admission]\nkeys_file = {:?}\n", list(directory))
    });
    let keys = list(relay.directory.path());
    let (mut first, mut second) = (relay.connect([1; 32]), relay.connect([2; 32]));
    assert!(Peer::login(relay.plain(), [3; 32]).is_err());
    relay.wait_for_metric("logins_total{result=\"not_admitted\"}", 1);

    // A bad list changes nothing.
    fs::write(&keys, "nonsense\n").unwrap();
    relay.reload();
    assert!(relay.daemon.log().contains("not reloaded, nothing changed"));
    assert_eq!(relay.metric("config_last_reload_successful"), 0);
    first.send(second.key, b"still here");
    second.expect_packet(first.key, b"still here");

    fs::write(&keys, format!("{}\n{}\n", public(1), public(3))).unwrap();
    relay.reload();
    second.expect_end();
    // Each worker reads the list anew within a second of its own.
    let third = || Peer::login(relay.plain(), [3; 32]).ok();
    let mut third = wait_for("third is let in", LIMIT, third).unwrap();
    first.send(third.key, b"welcome");
    third.expect_packet(first.key, b"welcome");
}

#[test]
fn a_rate_limit_is_announced_and_holds_a_sender_back_without_loss() {
    let relay = Relay::start("[rate]\nbytes_per_second = 200_000\nburst_bytes = 140_000\n");
    let (mut a, mut b) = (relay.connect([1; 32]), relay.connect([2; 32]));
    assert_eq!((a.info.bytes_per_second, a.info.burst_bytes), (200_000, 140_000));
    let start = Instant::now();
    let to = b.key;
    let sender = std::thread::spawn(move || {
        (0..40).for_each(|n| a.send(to, &[n; 20_000]));
        a
    });
    for n in 0..40 {
        assert!(
            matches!(b.receive().frame(), Frame::RecvPacket { packet, .. } if packet == [n; 20_000])
        );
    }
    // 800 kB: the burst and one read beyond it pass at once, the rest at the rate.
    let least = Duration::from_secs_f64((800_000.0 - 140_000.0 - 262_144.0) / 200_000.0);
    assert!(start.elapsed() >= least, "{:?} < {least:?}", start.elapsed());
    assert!(relay.metric("throttled_total") > 0);
    drop(sender.join().unwrap());
}

#[test]
fn a_stop_tells_the_clients_and_ends_well() {
    let relay = Relay::start("");
    let mut a = relay.connect([1; 32]);
    relay.daemon.signal(15);
    let told = a.receive();
    let Frame::Restarting { reconnect_in_ms, try_for_ms } = told.frame() else {
        panic!("{told:?}")
    };
    assert!(reconnect_in_ms < 1000 && try_for_ms == 60_000);
    drop(a);
    let status = relay.daemon.stop().unwrap();
    assert_eq!(status.code(), Some(0));
}

/// Each ends its own connection, is counted, and disturbs nobody.
#[test]
fn bad_streams_end_and_are_counted() {
    let relay = Relay::start("");
    let (mut a, mut b) = (relay.connect([1; 32]), relay.connect([2; 32]));
    let error = |reason: &str| format!("connection_errors_total{{reason={reason:?}}}");

    let mut stream = relay.plain();
    stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n").unwrap();
    assert_eq!(stream.read(&mut [0; 10]).unwrap_or(0), 0);
    relay.wait_for_metric(&error("http"), 1);

    let mut oversized = relay.connect([3; 32]);
    oversized.stream.write_all(&[Kind::SendPacket as u8, 0, 1, 0, 0x21]).unwrap();
    oversized.expect_end();
    relay.wait_for_metric(&error("frame"), 1);

    let mut wrong_way = relay.connect([3; 32]);
    wrong_way.write(&Frame::Restarting { reconnect_in_ms: 0, try_for_ms: 0 });
    wrong_way.expect_end();
    relay.wait_for_metric(&error("frame"), 2);

    // Somebody who names a key that it does not hold.
    let mut forger = relay.plain();
    forger.write_all(b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n").unwrap();
    let mut out = Vec::new();
    Frame::ClientInfo { from: a.key, nonce: [0; 24], sealed: &[0; 40] }.write(&mut out);
    forger.write_all(&out).unwrap();
    let mut rest = Vec::new();
    let _ = forger.read_to_end(&mut rest);
    assert_eq!(rest.first(), Some(&(Kind::ServerKey as u8)));
    relay.wait_for_metric(&error("login"), 1);

    // An introduction larger than any real one.
    let mut large = relay.plain();
    large.write_all(b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n").unwrap();
    large.write_all(&[Kind::ClientInfo as u8, 0, 3, 0, 0]).unwrap();
    let _ = large.read_to_end(&mut rest);
    relay.wait_for_metric(&error("frame"), 3);

    a.send(b.key, b"unmoved");
    b.expect_packet(a.key, b"unmoved");
    assert_eq!(relay.metric("connections"), 2);
}

/// Whoever says nothing, or a byte now and then, to hold a place: in HTTP, in TLS, in the login.
#[test]
fn who_does_not_come_further_is_ended_after_ten_seconds() {
    let relay = Relay::start_with(|directory| {
        https(directory) + &format!("[http]\nlisten = [{HTTP:?}]\nrelay = true\n")
    });
    // The head of a TLS record that would hold a ClientHello.
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec();
    let upgrade = b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n";
    let info = [&upgrade[..], &[Kind::ClientInfo as u8, 0, 0, 1]].concat();
    let slow = [
        (HTTP, b"GET /derp HTT".to_vec(), false),
        (HTTP, b"GET /derp HTTP/1.1\r\nX: ".to_vec(), true),
        (HTTPS, Vec::new(), false),
        (HTTPS, hello, true),
        (HTTP, info, true),
    ];
    let waited = std::thread::scope(|scope| {
        let relay = &relay;
        let threads = slow.map(|(address, start, drips)| {
            scope.spawn(move || hold(tcp(&relay.namespace, address), &start, drips))
        });
        threads.map(|thread| thread.join().unwrap())
    });
    for waited in waited {
        assert!((9.0..20.0).contains(&waited.as_secs_f32()), "{waited:?}");
    }
    assert_eq!(relay.metric("connection_errors_total{reason=\"timeout\"}"), 5);
}

/// Says the start of something, then perhaps a byte each half second. How long it is borne.
fn hold(mut stream: std::net::TcpStream, start: &[u8], drips: bool) -> Duration {
    let begin = Instant::now();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    stream.write_all(start).unwrap();
    loop {
        let ended = match stream.read(&mut [0; 100]) {
            Ok(len) => len == 0,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        };
        if ended || begin.elapsed() > 3 * LIMIT || drips && stream.write_all(b"a").is_err() {
            return begin.elapsed();
        }
    }
}

#[test]
fn connections_beyond_the_limit_are_closed() {
    let relay = Relay::start_edited(|text| text.replace("workers = 2", "connections_max = 2"));
    let connect = |n| Peer::login(relay.plain(), [n; 32]);
    let (mut a, b) = (connect(1).unwrap(), connect(2).unwrap());
    assert!(connect(3).is_err());
    drop(b);
    let mut again = wait_for("a free place", LIMIT, || connect(4).ok()).unwrap();
    a.send(again.key, b"in");
    again.expect_packet(a.key, b"in");
}

#[test]
fn one_address_takes_no_more_than_its_share() {
    let relay =
        Relay::start_edited(|text| text.replace("workers = 2", "connections_per_address = 2"));
    let connect = |n| Peer::login(relay.plain(), [n; 32]);
    let (mut a, b) = (connect(1).unwrap(), connect(2).unwrap());
    assert!(connect(3).is_err());
    // Others are not concerned.
    let bind = || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&"127.0.0.2:0".parse::<std::net::SocketAddr>().unwrap().into())?;
        socket.connect(&HTTP.parse::<std::net::SocketAddr>().unwrap().into())?;
        socket.set_read_timeout(Some(LIMIT))?;
        std::io::Result::Ok(std::net::TcpStream::from(socket))
    };
    let mut other = Peer::login(Box::new(relay.namespace.run(bind).unwrap()), [4; 32]).unwrap();
    a.send(other.key, b"in");
    other.expect_packet(a.key, b"in");
    assert_eq!(relay.metric("connection_errors_total{reason=\"address_full\"}"), 1);
    drop(b);
    wait_for("a free place", LIMIT, || connect(5).ok()).unwrap();
}

#[test]
fn tls_serves_the_same_and_takes_a_new_certificate_without_ending_old_connections() {
    let mut relay =
        Relay::start_with(|directory| https(directory) + "[http]\nlisten = [\"127.0.0.1:80\"]\n");
    let directory = relay.directory.path().to_owned();
    let chain = directory.join("chain.pem");
    let login = |n| Peer::login(tls(&relay.namespace, &chain), [n; 32]).unwrap();
    let (mut a, mut b) = (login(1), login(2));
    for len in [0, 1, 1400, 16_384, 16_385, 65_536] {
        let packet = vec![len as u8; len];
        a.send(b.key, &packet);
        b.expect_packet(a.key, &packet);
    }
    // Without TLS only the portal check is served here.
    let plain = get(&relay.namespace, "127.0.0.1:80", "/generate_204");
    assert!(plain.starts_with("HTTP/1.1 204 "), "{plain}");
    let mut stream = tcp(&relay.namespace, "127.0.0.1:80");
    stream.write_all(b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\n\r\n").unwrap();
    let mut head = [0; 12];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 426");

    let old = fs::read(&chain).unwrap();
    certificate(&directory);
    assert_ne!(fs::read(&chain).unwrap(), old);
    relay.reload();
    let mut c = wait_for("the new certificate", LIMIT, || {
        Peer::login(tls(&relay.namespace, &chain), [3; 32]).ok()
    })
    .unwrap();
    a.send(c.key, b"old to new");
    c.expect_packet(a.key, b"old to new");
}

#[test]
fn stun_says_where_the_asker_is() {
    let relay = Relay::start("");
    let (socket, own) = relay.namespace.run(|| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(STUN).unwrap();
        let own = socket.local_addr().unwrap();
        (socket, own)
    });
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.send(b"noise").unwrap();
    let transaction = TransactionId([5; 12]);
    let request = stun::binding_request(transaction);
    socket.send(&request).unwrap();
    let mut answer = [0; 1500];
    let len = socket.recv(&mut answer).unwrap();
    assert!(len <= request.len());
    let response = stun::parse_response(&answer[..len]).unwrap();
    assert_eq!((response.transaction, response.mapped), (transaction, own));
    assert_eq!(relay.metric("stun_requests_total{result=\"invalid\"}"), 1);
}

#[test]
fn systemd_is_told_of_start_reload_stop_and_of_a_worker_that_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let (config, path) = (configuration(directory.path(), ""), directory.path().join("notify"));
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let hear = || {
        let mut bytes = [0; 4096];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    let namespace = Namespace::new("relay").unwrap();
    let mut command = namespace.command(PROGRAM);
    command.args(["run", "--config"]).arg(config).env("NOTIFY_SOCKET", &path);
    let mut daemon = Daemon::start(directory.path(), "relay", command).unwrap();
    assert_eq!(hear(), "READY=1\n");
    let alive = "WATCHDOG=1\nSTATUS=0 clients\n";
    assert_eq!(hear(), alive);
    daemon.signal(1);
    let heard = || std::iter::repeat_with(hear).find(|text| text != alive).unwrap();
    let reloading = heard();
    let stamp = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    assert!(stamp.trim().parse::<u64>().unwrap() > 0);
    assert_eq!(heard(), "READY=1\n");

    let hung = HungThread::stop(daemon.pid(), "relay-1").unwrap();
    daemon.wait_for_log("worker 1 takes no turns", 2 * LIMIT).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.recv(&mut [0; 4096]).is_ok() {}
    std::thread::sleep(Duration::from_secs(2));
    let said = socket.recv(&mut [0; 4096]).map_err(|error| error.kind());
    assert_eq!(said, Err(ErrorKind::WouldBlock));
    socket.set_nonblocking(false).unwrap();
    drop(hung);
    assert_eq!(hear(), alive);
    daemon.signal(15);
    assert_eq!(heard(), "STOPPING=1\n");
}

#[test]
fn the_command_line_says_what_is_wrong_and_exits_as_documented() {
    let directory = tempfile::tempdir().unwrap();
    let config = configuration(directory.path(), "[admision]\nkeys_file = \"/x\"\n");
    let path = config.to_str().unwrap();
    let checked = run(&["config", "check", path]);
    let said = String::from_utf8(checked.stderr).unwrap();
    assert_eq!(checked.status.code(), Some(7), "{said}");
    assert!(said.contains("did you mean \"admission\"?"), "{said}");
    assert_eq!(run(&["run", "--config", path]).status.code(), Some(7));
    assert_eq!(run(&["run", "--config", "/nowhere"]).status.code(), Some(7));
    assert_eq!(run(&["walk"]).status.code(), Some(2));
    assert_eq!(run(&["--help"]).status.code(), Some(0));

    let no_key = "[https]\nlisten = [\"127.0.0.1:443\"]\ncertificate_file = \"/nowhere\"\n\
                  key_file = \"/nowhere\"\n";
    let config = configuration(directory.path(), no_key);
    let checked = run(&["config", "check", config.to_str().unwrap()]);
    let said = String::from_utf8(checked.stderr).unwrap();
    assert_eq!(checked.status.code(), Some(7), "{said}");
    assert!(said.contains("reading /nowhere"), "{said}");

    let config = configuration(directory.path(), "");
    let checked = run(&["config", "check", config.to_str().unwrap()]);
    assert_eq!(checked.status.code(), Some(0), "{checked:?}");
    assert!(!directory.path().join("private.key").exists(), "a check makes no key");
}
