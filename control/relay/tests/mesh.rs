//! Several relays that are one: ours among each other, and with an unmodified derper.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use common::*;
use millrace_lab::{Daemon, Namespace, wait_for};
use millrace_path::derp::{Frame, Gone, Kind, MeshKey};
use millrace_path::sealed::PublicKey;

const DISCO: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
const KEY: &str = "5aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa5";

/// The `[mesh]` of a relay; it comes last.
fn mesh(directory: &Path, key: &str, peers: &[&str], more: &str) -> String {
    let path = directory.join("mesh.key");
    fs::write(&path, key).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let http = format!("[http]\nlisten = [{HTTP:?}]\nrelay = true\n[stun]\nlisten = [{STUN:?}]\n");
    format!("{http}[mesh]\nkey_file = {path:?}\npeers = {peers:?}\n{more}")
}

fn url(number: usize) -> String {
    format!("http://127.0.0.{number}:3340")
}

/// Relays that all name all, themselves too, as one list for all hosts is the easiest to keep.
fn region(count: usize) -> Vec<Relay> {
    let namespace = Namespace::new("region").unwrap();
    let urls: Vec<String> = (1..=count).map(url).collect();
    let peers: Vec<&str> = urls.iter().map(String::as_str).collect();
    let start = |number| {
        Relay::start_beside(&namespace, &format!("127.0.0.{number}"), |directory| {
            mesh(directory, KEY, &peers, "")
        })
    };
    let relays: Vec<Relay> = (1..=count).map(start).collect();
    for relay in &relays {
        relay.wait_for_metric("mesh_mates", count as u64 - 1);
    }
    relays
}

/// Sends until it arrives: the mates learn of new clients a moment after these log in.
fn meet(from: &mut Peer, to: &mut Peer) {
    // derper says that somebody is not here to disco alone.
    let packet = [&DISCO[..], &[0; 60]].concat();
    for tries in 0.. {
        from.send(to.key, &packet);
        from.write(&Frame::Ping(*b"are you "));
        let mut told = from.receive();
        if told.kind == Kind::PeerGone {
            // Three times at once we hear of it, then once a second.
            sleep(Duration::from_millis(if tries < 2 { 50 } else { 1100 }));
            told = from.receive();
            assert_eq!(told.frame(), Frame::Pong(*b"are you "));
            continue;
        }
        assert_eq!(told.frame(), Frame::Pong(*b"are you "));
        break;
    }
    to.expect_packet(from.key, &packet);
}

#[test]
fn clients_of_all_relays_of_a_region_reach_each_other() {
    let relays = region(3);
    let mut peers: Vec<Peer> = (0..9).map(|n| relays[n % 3].connect([n as u8 + 1; 32])).collect();
    for relay in &relays {
        relay.wait_for_metric("mesh_clients", 6);
    }
    let keys: Vec<PublicKey> = peers.iter().map(|peer| peer.key).collect();
    for from in 0..peers.len() {
        for len in [0, 1, 148, 1420, 9000, 65_536] {
            for &to in &keys {
                peers[from].send(to, &vec![(from + len) as u8; len]);
            }
        }
        for peer in &mut peers {
            for len in [0, 1, 148, 1420, 9000, 65_536] {
                peer.expect_packet(keys[from], &vec![(from + len) as u8; len]);
            }
        }
    }
    // 9 senders, 6 of 9 destinations on other relays, 6 lengths: each hop once.
    let sum = |series: &str| relays.iter().map(|relay| relay.metric(series)).sum::<u64>();
    assert_eq!(sum("mesh_packets_total{direction=\"sent\"}"), 9 * 6 * 6);
    assert_eq!(sum("mesh_packets_total{direction=\"received\"}"), 9 * 6 * 6);
    assert_eq!(sum("clients"), 9);

    // A peer that leaves is gone for those who heard it, wherever they are.
    let left = peers.remove(0);
    let gone = left.key;
    drop(left);
    for peer in &mut peers {
        let why = Gone::Disconnected;
        assert_eq!(peer.receive().frame(), Frame::PeerGone { peer: gone, why });
    }
    relays[1].wait_for_metric("mesh_clients", 5);
}

#[test]
fn a_mate_that_dies_takes_its_clients_away_and_brings_them_back() {
    let mut relays = region(2);
    let mut a = relays[0].connect([1; 32]);
    let mut b = relays[1].connect([2; 32]);
    // Who hears a packet before its sender is known is not told when that goes.
    relays[0].wait_for_metric("mesh_clients", 1);
    meet(&mut b, &mut a);
    meet(&mut a, &mut b);
    let second = relays.pop().unwrap();
    let namespace = second.namespace.clone();
    second.daemon.kill();
    let why = Gone::Disconnected;
    assert_eq!(a.receive().frame(), Frame::PeerGone { peer: b.key, why });
    a.send(b.key, b"?");
    let why = Gone::NotHere;
    assert_eq!(a.receive().frame(), Frame::PeerGone { peer: b.key, why });
    assert_eq!(relays[0].metric("mesh_mates"), 0);
    assert_eq!(relays[0].metric("mesh_clients"), 0);

    let urls = [url(1), url(2)];
    let peers = [&*urls[0], &*urls[1]];
    let second =
        Relay::start_beside(&namespace, "127.0.0.2", |directory| mesh(directory, KEY, &peers, ""));
    let mut b = second.connect([2; 32]);
    second.wait_for_metric("mesh_mates", 1);
    relays[0].wait_for_metric("mesh_clients", 1);
    meet(&mut a, &mut b);
    meet(&mut b, &mut a);
}

/// From one relay to the other and back.
#[test]
fn a_client_that_moves_is_found_where_it_is() {
    let relays = region(2);
    let mut sender = relays[0].connect([1; 32]);
    for round in 0..20 {
        let mut moving = relays[round % 2].connect([2; 32]);
        let known = || relays[0].metric("clients") + relays[0].metric("mesh_clients");
        wait_for("the mate to know of it", LIMIT, || (known() == 2).then_some(())).unwrap();
        meet(&mut sender, &mut moving);
        meet(&mut moving, &mut sender);
        drop(moving);
        // Wherever it was: nobody has it now.
        let (here, far) = ("clients", "mesh_clients");
        wait_for("the end of it", LIMIT, || {
            let left = (relays[0].metric(here), relays[0].metric(far), relays[1].metric(here));
            (left == (1, 0, 0)).then_some(())
        })
        .unwrap();
        let told = sender.receive();
        assert!(matches!(told.frame(), Frame::PeerGone { .. }), "{told:?}");
    }
}

#[test]
fn only_the_key_makes_a_mate() {
    let relay = region(1).remove(0);
    let error = |reason: &str| format!("connection_errors_total{{reason={reason:?}}}");
    // Without it, what mates may do ends the connection.
    let victim = relay.connect([9; 32]);
    let (from, to) = (Peer::public([7; 32]), victim.key);
    for (number, frame) in (1..).zip([
        Frame::WatchConns,
        Frame::ClosePeer(victim.key),
        Frame::ForwardPacket { from, to, packet: b"forged" },
        Frame::PeerPresent { peer: from, at: None, flags: 1 },
    ]) {
        let mut client = relay.connect([3; 32]);
        client.write(&frame);
        client.expect_end();
        relay.wait_for_metric(&error("frame"), number);
    }
    let wrong = MeshKey::from_hex(&KEY.replace("5a", "5b"));
    assert!(Peer::login_as(relay.plain(), [4; 32], wrong).is_err());
    relay.wait_for_metric(&error("mesh_key"), 1);

    // With it: everybody who is there, then each change; packets; the end of a client.
    let mut victim = victim;
    let mut mate = Peer::login_as(relay.plain(), [5; 32], MeshKey::from_hex(KEY)).unwrap();
    mate.write(&Frame::WatchConns);
    let present = |peer| Frame::PeerPresent { peer, at: None, flags: 1 };
    assert_eq!(mate.receive().frame(), present(victim.key));
    let new = relay.connect([6; 32]);
    assert_eq!(mate.receive().frame(), present(new.key));
    mate.write(&Frame::ForwardPacket { from, to: victim.key, packet: b"from afar" });
    victim.expect_packet(from, b"from afar");
    mate.write(&Frame::ForwardPacket { from, to: from, packet: b"to nobody" });
    assert_eq!(mate.receive().frame(), Frame::PeerGone { peer: from, why: Gone::NotHere });
    mate.write(&Frame::ClosePeer(victim.key));
    victim.expect_end();
    let why = Gone::Disconnected;
    assert_eq!(mate.receive().frame(), Frame::PeerGone { peer: victim.key, why });
    assert_eq!(relay.metric("clients"), 1);
    assert!(!relay.daemon.log().contains("5aa55aa5"), "the mesh key is in the log");
}

#[test]
fn a_mate_with_another_key_is_said_and_nobody_is_shown_to_it() {
    let namespace = Namespace::new("region").unwrap();
    let other = KEY.replace("5a", "5b");
    let (first, second) = (url(1), url(2));
    let one = Relay::start_beside(&namespace, "127.0.0.1", |directory| {
        mesh(directory, KEY, &[&second], "")
    });
    let mut two = Relay::start_beside(&namespace, "127.0.0.2", |directory| {
        mesh(directory, &other, &[&first], "")
    });
    let _client = one.connect([1; 32]);
    two.daemon.wait_for_log("does it have the same mesh key?", LIMIT).unwrap();
    one.wait_for_metric("connection_errors_total{reason=\"mesh_key\"}", 1);
    assert_eq!((two.metric("mesh_mates"), two.metric("mesh_clients")), (0, 0));
}

/// TLS both ways, with certificates that both check.
#[test]
fn an_unmodified_derper_is_a_mate() {
    let namespace = Namespace::new("region").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (chain, key) = certificate(directory);
    fs::copy(&chain, directory.join("relay.test.crt")).unwrap();
    fs::copy(&key, directory.join("relay.test.key")).unwrap();
    // Its certificate is for 127.0.0.1 and relay.test: derper is at the one, we are the other.
    let relay = Relay::start_beside(&namespace, "127.0.0.2", |own| {
        let https = format!(
            "[https]\nlisten = [{HTTPS:?}]\ncertificate_file = {chain:?}\nkey_file = {key:?}\n"
        );
        https + &mesh(own, KEY, &["https://127.0.0.1"], &format!("ca_file = {chain:?}\n"))
    });
    fs::write(directory.join("mesh.key"), KEY).unwrap();
    let mut command = namespace.command(lab("derper"));
    command
        .env("SSL_CERT_FILE", &chain)
        .args(["-a", "127.0.0.1:443", "-http-port=-1", "-stun=false", "-hostname=127.0.0.1"])
        .args(["-certmode=manual", "-mesh-with=relay.test/127.0.0.2"])
        .args([format!("-certdir={}", directory.display())])
        .args([format!("-c={}", directory.join("derper.json").display())])
        .args([format!("-mesh-psk-file={}", directory.join("mesh.key").display())]);
    fs::copy(&chain, directory.join("127.0.0.1.crt")).unwrap();
    fs::copy(&key, directory.join("127.0.0.1.key")).unwrap();
    let _derper = Daemon::start(directory, "derper", command).unwrap();
    relay.wait_for_metric("mesh_mates", 1);
    relay.wait_for_metric("logins_total{result=\"mate\"}", 1);

    let mut ours = relay.connect([1; 32]);
    let mut theirs = Peer::login(tls(&namespace, &chain), [2; 32]).unwrap();
    relay.wait_for_metric("mesh_clients", 1);
    meet(&mut ours, &mut theirs);
    for len in [0, 1, 148, 1420, 9000, 65_536] {
        let packet = vec![len as u8; len];
        ours.send(theirs.key, &packet);
        theirs.expect_packet(ours.key, &packet);
        theirs.send(ours.key, &packet);
        ours.expect_packet(theirs.key, &packet);
    }
    let gone = theirs.key;
    drop(theirs);
    let why = Gone::Disconnected;
    assert_eq!(ours.receive().frame(), Frame::PeerGone { peer: gone, why });
    let mut theirs = Peer::login(tls(&namespace, &chain), [2; 32]).unwrap();
    relay.wait_for_metric("mesh_clients", 1);
    meet(&mut ours, &mut theirs);
    let gone = ours.key;
    drop(ours);
    assert_eq!(theirs.receive().frame(), Frame::PeerGone { peer: gone, why });
}
