//! The conformance list of WireGuard's behaviour, row by row, under a virtual clock.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::{Arc, Weak};
use std::time::Duration;

use common::{A, B, Datagram, World, endpoint, inner_packet, inner_packet_v6, millis, secs};
use millrace_wg::data_header::DataHeader;
use millrace_wg::device::{PeerChange, PeerRefused};
use millrace_wg::limits::*;
use millrace_wg::secret::Secret;
use millrace_wg::session::TxSession;
use millrace_wg::{Drop, FastEvent, PeerSlot, PublicKey};

const INITIATION: u8 = 1;
const RESPONSE: u8 = 2;
const COOKIE: u8 = 3;
const DATA: u8 = 4;

fn handshakes(world: &World, node: usize, since: usize) -> usize {
    world.sent(node, INITIATION, since).len()
}

fn keepalives(world: &World, node: usize, since: usize) -> usize {
    let data = world.sent(node, DATA, since);
    data.iter().filter(|datagram| datagram.bytes.len() == KEEPALIVE_LEN).count()
}

fn session(world: &World, node: usize) -> Arc<TxSession> {
    world.peer(node, 1 - node).tx_session.load_full().expect("a session")
}

/// The device's answers to a datagram, which came from `source` of another world or of Eve.
fn dropped(world: &mut World, node: usize, datagram: &Datagram, reason: Drop) {
    let (before, sent) = (world.drops(node, reason), world.eve.len());
    world.inject(datagram);
    assert_eq!(world.drops(node, reason), before + 1, "{reason:?}");
    assert_eq!(world.eve.len(), sent, "dropped in silence");
}

#[test]
fn row_01_messages_have_exactly_their_lengths() {
    let mut world = World::connected(1);
    assert_eq!(world.sent(A, INITIATION, 0)[0].bytes.len(), 148);
    assert_eq!(world.sent(B, RESPONSE, 0)[0].bytes.len(), 92);
    let data = world.sent(A, DATA, 0)[0].bytes.len();
    assert_eq!(data, 16 + 112 + 16, "100 bytes, padded");
    world.keepalive(A, B, secs(5));
    assert_eq!(world.last_sent(A, DATA).bytes.len(), 32);
    for kind in [INITIATION, RESPONSE] {
        let sender = if kind == INITIATION { A } else { B };
        let good = world.last_sent(sender, kind);
        for len in [4, 31, good.bytes.len() - 1, good.bytes.len() + 1] {
            let mut bad = good.clone();
            bad.bytes.resize(len, 0);
            dropped(&mut world, 1 - sender, &bad, Drop::RxTruncated);
        }
        let mut bad = good.clone();
        bad.bytes[1] = 1;
        dropped(&mut world, 1 - sender, &bad, Drop::RxUnknownType);
    }
    for kind in [0, 5, 0xff] {
        let mut bad = world.last_sent(A, INITIATION);
        bad.bytes[0] = kind;
        dropped(&mut world, B, &bad, Drop::RxUnknownType);
    }
}

#[test]
fn row_02_messages_are_made_for_one_public_key() {
    // Labels and construction are checked against another implementation in oracle.rs.
    let mut world = World::connected(2);
    let mut elsewhere = World::empty(3, 2);
    let mut message = world.last_sent(A, INITIATION);
    message.to = elsewhere.nodes[B].address;
    dropped(&mut elsewhere, B, &message, Drop::HsMac1Invalid);
    world.run_for(secs(1));
}

#[test]
fn row_03_a_peer_key_of_low_order_never_gets_a_handshake() {
    let mut world = World::pair(4);
    let mut one = [0; 32];
    one[0] = 1;
    for key in [PublicKey([0; 32]), PublicKey(one)] {
        let change = PeerChange {
            endpoint: Some(endpoint(world.nodes[B].address)),
            keepalive: Some(secs(1)),
            add_allowed_ips: vec!["10.9.0.0/16".parse().unwrap()],
            ..PeerChange::default()
        };
        let clock = world.clock(A);
        world.nodes[A].device.set_peer(clock, key, change).unwrap();
        world.drain(A);
        let mut packet = inner_packet(A, B, 100);
        packet[16..20].copy_from_slice(&[10, 9, 0, 1]);
        world.send_packet(A, &packet);
        world.run_for(secs(30));
    }
    assert!(world.eve.is_empty(), "nothing was sent");
    assert!(world.drops(A, Drop::TxNoSession) >= 2, "what waited was counted");
    world.send(A, B, 100);
    world.run_for(secs(1));
    world.assert_connected();
}

#[test]
fn row_04_a_timestamp_must_be_newer_than_the_last() {
    let mut world = World::connected(5);
    let old = world.last_sent(A, INITIATION);
    world.run_for(secs(1));
    dropped(&mut world, B, &old, Drop::HsReplayed);
    // Removing and adding the peer forgets, which is the cure for a clock that was far ahead.
    let (clock, key) = (world.clock(B), world.nodes[A].public);
    assert!(world.nodes[B].device.remove_peer(clock, &key));
    world.introduce(A, B, None);
    let before = world.eve.len();
    world.inject(&old);
    assert_eq!(world.sent(B, RESPONSE, before).len(), 1);
}

#[test]
fn row_04_a_replay_after_a_restart_gets_one_answer_and_no_data() {
    let mut world = World::connected(5);
    let old = world.last_sent(A, INITIATION);
    world.run_for(secs(30));
    let restarted = world.nodes[B].restarted(&mut world.rng);
    world.nodes[B] = restarted;
    world.introduce(A, B, None);
    let before = world.eve.len();
    world.inject(&old);
    assert_eq!(world.sent(B, RESPONSE, before).len(), 1, "nobody remembers: see decision 0007");
    dropped(&mut world, B, &old, Drop::HsReplayed);
    // The key of that session is unproven for ever: nothing is sent under it.
    world.send(B, A, 100);
    assert_eq!(world.sent(B, DATA, before).len(), 0);
    assert!(world.peer(B, A).tx_session.load().is_none());
    world.run_for(secs(30));
    world.assert_carries();
}

#[test]
fn row_05_initiations_of_a_peer_come_at_most_every_20_ms() {
    for (gap_ms, answers) in [(0, 1), (19, 1), (20, 2), (21, 2)] {
        let mut world = World::pair(6);
        world.wire.loss = 100;
        let mut initiations = Vec::new();
        for _ in 0..2 {
            world.send(A, B, 100);
            initiations.push(world.last_sent(A, INITIATION));
            world.run_for(secs(6));
        }
        assert_ne!(initiations[0].bytes, initiations[1].bytes);
        let before = world.eve.len();
        world.inject(&initiations[0]);
        world.now = world.now + millis(gap_ms);
        world.inject(&initiations[1]);
        assert_eq!(world.sent(B, RESPONSE, before).len(), answers, "{gap_ms} ms");
        assert_eq!(world.drops(B, Drop::HsFlood), 2 - answers as u64);
    }
}

#[test]
fn row_06_only_the_initiator_rekeys_after_120_s_of_sending() {
    let mut world = World::connected(7);
    let born = session(&world, A).born;
    let before = world.eve.len();
    while world.now.since(born) < secs(119) {
        world.send(A, B, 100);
        world.send(B, A, 100);
        world.run_for(millis(900));
    }
    assert_eq!(handshakes(&world, A, before) + handshakes(&world, B, before), 0);
    world.run_for(secs(121) - world.now.since(born));
    world.send(B, A, 100);
    assert_eq!(handshakes(&world, B, before), 0, "the responder does not rekey by age");
    world.send(A, B, 100);
    assert_eq!(handshakes(&world, A, before), 1);
    world.run_for(secs(1));
    assert_ne!(session(&world, A).born, born);
    assert!(world.agrees());
    world.assert_connected();
}

#[test]
fn row_06_the_initiator_that_only_receives_rekeys_once_at_165_s() {
    for (age_ms, expected) in [(164_900, 0), (165_000, 1), (179_900, 1)] {
        let mut world = World::connected(8);
        world.wire.latency = Duration::ZERO;
        let before = world.eve.len();
        world.run_for(millis(age_ms) - world.now.since(session(&world, A).born));
        for _ in 0..5 {
            world.send(B, A, 100);
        }
        world.wire.loss = 100;
        world.run_for(Duration::ZERO);
        assert_eq!(world.nodes[A].inner.len(), 5);
        assert_eq!(handshakes(&world, A, before), expected, "once, not once a packet");
        assert_eq!(handshakes(&world, B, before), 0);
    }
}

#[test]
fn row_06_a_tunnel_of_keepalives_rekeys_without_a_gap() {
    let mut world = World::connected(9);
    world.keepalive(A, B, secs(25));
    for _ in 0..20 {
        world.run_for(secs(25));
        let session = session(&world, B);
        assert!(session.usable(world.now), "the responder can send at any time");
    }
}

#[test]
fn row_07_message_counts_rekey_and_then_stop() {
    let mut world = World::connected(10);
    world.run_for(secs(20));
    let before = world.eve.len();
    session(&world, B).skip_to(REKEY_AFTER_MESSAGES - 1);
    world.wire.loss = 100;
    world.send(B, A, 100);
    assert_eq!(handshakes(&world, B, before), 1, "the responder, too, rekeys by count");
    let session = session(&world, B);
    session.skip_to(REJECT_AFTER_MESSAGES - 1);
    let sent = session.sent();
    let data = world.sent(B, DATA, 0).len();
    world.send(B, A, 100);
    assert_eq!(world.sent(B, DATA, 0).len(), data, "nothing is sent at the limit");
    assert_eq!(session.sent(), sent);
    world.wire.loss = 0;
    world.run_for(secs(6));
    world.assert_connected();
}

#[test]
fn row_08_keys_end_at_180_s_for_sending_and_receiving() {
    for (age_ms, arrives) in [(179_000, true), (179_999, true), (180_000, false), (181_000, false)]
    {
        let mut world = World::connected(11);
        let tx = session(&world, B);
        world.wire.latency = Duration::ZERO;
        world.wire.loss = 100;
        let late = millis(179_000) - world.now.since(tx.born);
        world.run_for(late);
        world.send(B, A, 100);
        let datagram = world.last_sent(B, DATA);
        world.run_for(millis(age_ms) - world.now.since(session(&world, A).born));
        world.inject(&datagram);
        assert_eq!(world.nodes[A].inner.len(), usize::from(arrives), "{age_ms} ms");
        assert_eq!(world.drops(A, Drop::RxSessionExpired), u64::from(!arrives));
        let data = world.sent(A, DATA, 0).len();
        world.send(A, B, 100);
        let sent = world.sent(A, DATA, 0).len() - data;
        assert_eq!(sent, usize::from(arrives), "{age_ms} ms");
    }
}

#[test]
fn row_08_traffic_over_the_boundary_loses_nothing() {
    let mut world = World::connected(12);
    world.wire.latency = millis(40);
    let (mut sent, start) = (0, world.now);
    while world.now.since(start) < secs(400) {
        world.send(A, B, 100);
        world.send(B, A, 100);
        sent += 1;
        world.run_for(millis(97));
    }
    world.run_for(secs(1));
    for node in [A, B] {
        assert_eq!(world.nodes[node].inner.len(), sent);
    }
    assert_eq!(handshakes(&world, A, 0), 4, "one in two minutes");
}

#[test]
fn row_09_retries_every_5_s_and_gives_up_after_90_s() {
    let mut world = World::pair(13);
    world.wire.loss = 100;
    world.send(A, B, 100);
    world.run_for(secs(300));
    let times: Vec<_> = world.sent(A, INITIATION, 0).iter().map(|d| d.at).collect();
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1].since(pair[0])).collect();
    assert!(gaps.iter().all(|gap| (secs(5)..=millis(5333)).contains(gap)), "{gaps:?}");
    assert!(gaps.windows(2).any(|pair| pair[0] != pair[1]), "with jitter");
    let tried_for = times.last().unwrap().since(times[0]);
    assert!((secs(84)..secs(95)).contains(&tried_for), "{tried_for:?}");
    assert_eq!(world.drops(A, Drop::TxNoSession), 1, "what waited is purged");
    let senders: std::collections::BTreeSet<_> =
        world.sent(A, INITIATION, 0).iter().map(|d| d.bytes[4..8].to_vec()).collect();
    assert_eq!(senders.len(), times.len(), "each try has an index of its own");
    // The next packet starts anew.
    world.wire.loss = 0;
    world.send(A, B, 100);
    world.run_for(secs(1));
    assert_eq!(world.nodes[B].inner.len(), 1);
}

#[test]
fn row_10_fifteen_seconds_without_an_answer_start_a_handshake() {
    let mut world = World::connected(14);
    world.run_for(secs(20));
    let peer = world.peer(A, B);
    let local = Some("192.0.2.1".parse().unwrap());
    peer.roam(millrace_wg::Endpoint { local, ifindex: 7, ..endpoint(world.nodes[B].address) });
    world.wire.loss = 100;
    let before = world.eve.len();
    let start = world.now;
    world.send(A, B, 100);
    world.run_for(secs(20));
    let sent = world.sent(A, INITIATION, before);
    let after = sent[0].at.since(start);
    assert!((secs(15)..=millis(15_333)).contains(&after), "{after:?}");
    let endpoint = **peer.endpoint.load().as_ref().unwrap();
    assert_eq!((endpoint.local, endpoint.ifindex), (None, 0), "the source is chosen anew");
}

#[test]
fn row_10_any_answer_stops_the_dead_peer_timer() {
    let mut world = World::connected(15);
    world.run_for(secs(20));
    let before = world.eve.len();
    for _ in 0..6 {
        // B answers each with a passive keepalive after ten seconds.
        world.send(A, B, 100);
        world.run_for(secs(16));
    }
    assert_eq!(handshakes(&world, A, before) + handshakes(&world, B, before), 0);
    assert_eq!(keepalives(&world, B, before), 6);
}

#[test]
fn row_11_data_without_an_answer_is_acknowledged_after_10_s_and_only_once() {
    let mut world = World::connected(16);
    world.run_for(secs(30));
    let before = world.eve.len();
    let start = world.now;
    world.send(A, B, 100);
    world.run_for(secs(60));
    let sent = world.sent(B, DATA, before);
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].bytes.len(), KEEPALIVE_LEN);
    assert_eq!(sent[0].at.since(start), secs(10) + world.wire.latency);
    assert_eq!(keepalives(&world, A, before), 0, "a keepalive is not answered");
    // An answer in time is acknowledgement enough.
    let before = world.eve.len();
    world.send(A, B, 100);
    world.run_for(secs(5));
    world.send(B, A, 100);
    world.run_for(secs(9));
    assert_eq!(keepalives(&world, B, before), 0);
}

#[test]
fn row_12_a_persistent_keepalive_counts_from_any_authenticated_packet() {
    let mut world = World::connected(17);
    world.keepalive(A, B, secs(25));
    let before = world.eve.len();
    let start = world.now;
    world.run_for(secs(24));
    assert_eq!(keepalives(&world, A, before), 0);
    world.send(B, A, 20);
    world.run_for(secs(5));
    world.send(A, B, 20);
    let restarted = world.now;
    world.run_for(secs(24));
    assert_eq!(keepalives(&world, A, before), 0, "either direction counts");
    world.run_for(secs(12));
    let sent = world.sent(A, DATA, before);
    let keepalive = sent.iter().find(|d| d.bytes.len() == KEEPALIVE_LEN).unwrap();
    assert!(keepalive.at > start);
    // B's passive keepalive, ten seconds after the data, restarts it once more.
    assert_eq!(keepalive.at.since(restarted), secs(35) + 2 * world.wire.latency);
    world.keepalive(A, B, Duration::ZERO);
    let before = world.eve.len();
    world.run_for(secs(100));
    assert_eq!(keepalives(&world, A, before), 0, "off is off");
}

#[test]
fn row_12_a_persistent_keepalive_connects_by_itself_and_never_gives_up() {
    let mut world = World::pair(18);
    world.wire.loss = 100;
    world.keepalive(A, B, secs(25));
    assert_eq!(handshakes(&world, A, 0), 1, "at once");
    world.run_for(secs(3600));
    world.wire.loss = 0;
    world.run_for(secs(31));
    world.assert_connected();
}

#[test]
fn an_endpoint_that_is_found_late_is_called_at_once() {
    let mut world = World::pair(43);
    let keepalive = PeerChange { keepalive: Some(secs(25)), ..PeerChange::default() };
    world.change_peer(B, A, keepalive);
    world.run_for(secs(1));
    assert!(world.eve.is_empty(), "whom should it call?");
    let found = Some(endpoint(world.nodes[A].address));
    world.change_peer(B, A, PeerChange { endpoint: found, ..PeerChange::default() });
    world.run_for(millis(100));
    world.assert_connected();
}

#[test]
fn row_13_keys_are_wiped_540_s_after_the_last_session() {
    let mut world = World::connected(19);
    let keys: Vec<Weak<TxSession>> =
        [A, B].iter().map(|&node| Arc::downgrade(&session(&world, node))).collect();
    world.run_for(secs(530));
    assert!(keys.iter().all(|key| key.upgrade().is_some()));
    world.run_for(secs(12));
    assert!(keys.iter().all(|key| key.upgrade().is_none()), "wiped");
    assert!(world.nodes.iter().all(|node| node.up.is_empty()));
    for node in &world.nodes {
        assert_eq!(node.device.poll_timeout(), None, "an idle device never wakes");
    }
}

#[test]
fn row_13_interface_down_and_suspend_wipe_at_once() {
    let mut world = World::connected(20);
    let key = Arc::downgrade(&session(&world, A));
    world.wire.loss = 100;
    world.run_for(secs(200));
    world.send(A, B, 100);
    let clock = world.clock(A);
    world.nodes[A].device.wipe_all(clock);
    world.drain(A);
    assert!(key.upgrade().is_none() && world.nodes[A].up.is_empty());
    assert_eq!(world.drops(A, Drop::TxNoSession), 1, "what waited goes, too");
    let before = world.eve.len();
    world.run_for(secs(600));
    assert_eq!(handshakes(&world, A, before), 0, "no tries go on");
    world.wire.loss = 0;
    world.send(A, B, 100);
    world.run_for(secs(1));
    world.assert_connected();
}

#[test]
fn row_13_a_device_that_is_down_is_silent_until_it_is_up() {
    let mut world = World::connected(20);
    let change = PeerChange { keepalive: Some(secs(25)), ..PeerChange::default() };
    world.change_peer(A, B, change);
    world.run_for(millis(100));
    let key = Arc::downgrade(&session(&world, A));
    let clock = world.clock(A);
    world.nodes[A].device.set_up(clock, false);
    world.drain(A);
    assert!(key.upgrade().is_none() && world.nodes[A].up.is_empty());
    assert_eq!(world.nodes[A].device.poll_timeout(), None, "down, it never wakes");
    let before = world.eve.len();
    world.send(A, B, 100);
    // B misses A, and asks for a new session until it gives up.
    world.send(B, A, 100);
    world.run_for(secs(60));
    assert!(world.eve[before..].iter().all(|datagram| datagram.from == B), "A says nothing");
    let refused = handshakes(&world, B, before) as u64;
    assert!(refused > 0);
    assert_eq!(world.drops(A, Drop::InterfaceDown), refused + 1, "one packet, all initiations");
    let clock = world.clock(A);
    world.nodes[A].device.set_up(clock, true);
    world.drain(A);
    world.run_for(millis(100));
    world.assert_connected();
}

#[test]
fn row_13_removing_a_peer_wipes_it() {
    let mut world = World::connected(21);
    let key = Arc::downgrade(&session(&world, A));
    let peer = world.peer(A, B);
    let (clock, public) = (world.clock(A), world.nodes[B].public);
    assert!(world.nodes[A].device.remove_peer(clock, &public));
    assert!(!world.nodes[A].device.remove_peer(clock, &public));
    world.drain(A);
    assert!(key.upgrade().is_none() && world.nodes[A].up.is_empty());
    assert!(peer.gone.load(std::sync::atomic::Ordering::Relaxed));
    assert_eq!(world.nodes[A].device.poll_timeout(), None);
    let late = world.last_sent(B, RESPONSE);
    dropped(&mut world, A, &late, Drop::HsUnexpected);
}

#[test]
fn row_14_the_responder_sends_nothing_before_the_first_packet_under_the_key() {
    let mut world = World::pair(22);
    world.send(A, B, 100);
    world.run_until(secs(1), |world| !world.sent(B, RESPONSE, 0).is_empty());
    // The response is under way; the responder has data to send, and must hold it.
    world.send(B, A, 100);
    assert!(world.sent(B, DATA, 0).is_empty());
    world.run_for(secs(1));
    assert_eq!(world.nodes[A].inner.len(), 1, "it was kept until the key was confirmed");
    assert_eq!(handshakes(&world, B, 0), 0);
}

#[test]
fn row_14_the_previous_key_still_opens_after_a_rotation() {
    let mut world = World::connected(23);
    let born = session(&world, A).born;
    world.run_for(secs(121) - world.now.since(born));
    world.wire.loss = 100;
    world.send(B, A, 300);
    let late = world.last_sent(B, DATA);
    world.wire.loss = 0;
    world.send(A, B, 100);
    world.run_for(secs(1));
    assert!(session(&world, A).born > born && world.agrees());
    world.inject(&late);
    assert_eq!(world.nodes[A].inner.last().unwrap().len(), 300);
    assert!(world.nodes.iter().all(|node| node.up.len() <= 3));
}

#[test]
fn row_15_the_window_takes_each_counter_once_and_8128_late_ones() {
    let mut world = World::connected(24);
    world.wire.loss = 100;
    let count = 9000;
    for _ in 0..count {
        world.send(A, B, 40);
    }
    let sent: Vec<_> = world.sent(A, DATA, 0).into_iter().cloned().collect();
    let sent = &sent[sent.len() - count..];
    world.inject(&sent[count - 1]);
    world.inject(&sent[count - 1]);
    assert_eq!(world.drops(B, Drop::RxReplayed), 1);
    // As in Linux: the newest counter and 8,128 before it.
    world.inject(&sent[count - 8129]);
    assert_eq!(world.nodes[B].inner.len(), 2, "8,128 counters late");
    world.inject(&sent[count - 8130]);
    world.inject(&sent[0]);
    assert_eq!(world.nodes[B].inner.len(), 2);
    assert_eq!(world.drops(B, Drop::RxReplayed), 3);
    let mut forged = sent[count - 5].clone();
    forged.bytes[20] ^= 1;
    world.inject(&forged);
    assert_eq!(world.drops(B, Drop::RxAuthFailed), 1);
    world.inject(&sent[count - 5]);
    assert_eq!(world.nodes[B].inner.len(), 3, "a forged packet does not use its counter up");
}

#[test]
fn row_16_mac1_comes_first_always_and_mac2_only_under_load() {
    let mut world = World::pair(25);
    world.wire.loss = 100;
    world.send(A, B, 100);
    let good = world.last_sent(A, INITIATION);
    let mut no_mac1 = good.clone();
    no_mac1.bytes[116] ^= 1;
    dropped(&mut world, B, &no_mac1, Drop::HsMac1Invalid);
    world.nodes[B].waiting = UNDER_LOAD_QUEUE;
    dropped(&mut world, B, &no_mac1, Drop::HsMac1Invalid);
    world.nodes[B].waiting = 0;
    world.run_for(secs(2));
    let mut strange_mac2 = good;
    strange_mac2.bytes[140] ^= 1;
    let before = world.eve.len();
    world.inject(&strange_mac2);
    assert_eq!(world.sent(B, RESPONSE, before).len(), 1, "not looked at without load");
}

#[test]
fn row_17_under_load_begins_at_512_waiting_and_sticks_for_a_second() {
    for (waiting, cookies) in [(511, 0), (512, 1), (4096, 1)] {
        let mut world = World::pair(26);
        world.nodes[B].waiting = waiting;
        world.send(A, B, 100);
        world.run_for(millis(15));
        assert_eq!(world.sent(B, COOKIE, 0).len(), cookies, "{waiting} waiting");
        assert_eq!(world.drops(B, Drop::HsMac2Needed), cookies as u64);
    }
    for (wait_ms, cookies) in [(999, 1), (1001, 0)] {
        let mut world = World::pair(27);
        world.wire.loss = 100;
        world.send(A, B, 100);
        let initiation = world.last_sent(A, INITIATION);
        world.nodes[B].waiting = 512;
        world.inject(&initiation);
        world.nodes[B].waiting = 0;
        world.run_for(millis(wait_ms));
        let before = world.eve.len();
        world.inject(&initiation);
        assert_eq!(world.sent(B, COOKIE, before).len(), cookies, "after {wait_ms} ms");
    }
}

#[test]
fn row_18_a_cookie_gets_the_next_initiation_through() {
    let mut world = World::pair(28);
    world.nodes[B].waiting = 4096;
    world.send(A, B, 100);
    world.run_for(millis(100));
    assert_eq!(world.sent(B, COOKIE, 0)[0].bytes.len(), 64);
    assert!(world.sent(B, RESPONSE, 0).is_empty());
    world.run_for(secs(6));
    assert_eq!(world.sent(B, RESPONSE, 0).len(), 1, "the retry carries mac2");
    assert_eq!(handshakes(&world, A, 0), 2);
    world.assert_connected();
    // The same initiation from another port has no valid mac2.
    let mut moved = world.last_sent(A, INITIATION);
    moved.source.set_port(1024);
    let before = world.eve.len();
    world.inject(&moved);
    assert_eq!(world.sent(B, COOKIE, before).len(), 1);
    let mut cookie = world.last_sent(B, COOKIE);
    cookie.to = world.nodes[A].address;
    cookie.bytes[40] ^= 1;
    dropped(&mut world, A, &cookie, Drop::HsUnexpected);
}

#[test]
fn row_18_the_initiator_under_load_gives_cookies_to_responders_too() {
    let mut world = World::pair(29);
    world.nodes[A].waiting = 4096;
    world.send(A, B, 100);
    world.run_for(secs(7));
    assert_eq!(world.sent(A, COOKIE, 0).len(), 1);
    assert_eq!(world.sent(B, RESPONSE, 0).len(), 2);
    world.assert_connected();
}

#[test]
fn row_19_a_good_cookie_is_worth_20_handshakes_a_second_and_a_64_shares_them() {
    let mut world = World::pair(30);
    world.nodes[B].waiting = 4096;
    world.nodes[A].address = "[2001:db8::1]:51820".parse().unwrap();
    world.send(A, B, 100);
    world.run_for(secs(6));
    assert_eq!(world.sent(B, RESPONSE, 0).len(), 1);
    // The cookie binds address and port; another host of the /64 gets its own, and shares the
    // bucket. Replays still cost tokens: the limiter stands before all public-key work.
    let initiation = world.last_sent(A, INITIATION);
    world.run_for(secs(2));
    for _ in 0..10 {
        world.inject(&initiation);
    }
    assert_eq!(world.drops(B, Drop::HsReplayed), 5);
    assert_eq!(world.drops(B, Drop::HsRateLimited), 5);
    world.now = world.now + millis(50);
    world.inject(&initiation);
    assert_eq!(world.drops(B, Drop::HsReplayed), 6);
}

#[test]
fn row_20_strangers_hear_nothing() {
    let mut world = World::connected(31);
    let mut stranger = World::empty(32, 2);
    let mut initiation = world.last_sent(A, INITIATION);
    initiation.source = "198.51.100.7:9".parse().unwrap();
    let before = world.eve.len();
    let mut probes = vec![vec![], vec![0], vec![1, 0, 0, 0], vec![4, 0, 0, 0], vec![0; 1500]];
    for (kind, len) in [(1, 148), (2, 92), (3, 64), (4, 32), (4, 1000)] {
        let mut probe = vec![0x5a; len];
        probe[..4].copy_from_slice(&[kind, 0, 0, 0]);
        probes.push(probe);
    }
    for bytes in probes {
        for waiting in [0, 4096] {
            world.nodes[B].waiting = waiting;
            let probe = Datagram { bytes: bytes.clone(), ..initiation.clone() };
            if !probe.bytes.is_empty() {
                world.inject(&probe);
            }
        }
    }
    assert_eq!(world.eve.len(), before, "silence");
    // A stranger who knows our public key, but is no peer.
    world.nodes[B].waiting = 0;
    world.run_for(secs(2));
    let before = world.eve.len();
    let key = world.nodes[B].public;
    let clock = stranger.clock(A);
    let change = PeerChange {
        endpoint: Some(endpoint(world.nodes[B].address)),
        keepalive: Some(secs(9)),
        ..PeerChange::default()
    };
    stranger.nodes[A].device.set_peer(clock, key, change).unwrap();
    stranger.drain(A);
    dropped(&mut world, B, &stranger.last_sent(A, INITIATION), Drop::HsUnknownPeer);
    assert_eq!(world.eve.len(), before);
}

#[test]
fn row_21_roaming_follows_authentic_new_packets_and_handshakes_only() {
    let mut world = World::connected(33);
    let peer = world.peer(B, A);
    let at = |world: &World| {
        let _ = world;
        peer.endpoint.load().as_ref().unwrap().remote
    };
    let home = world.nodes[A].address;
    assert_eq!(at(&world), home);
    let elsewhere: std::net::SocketAddr = "[2001:db8::77]:4000".parse().unwrap();
    let mut replay = world.last_sent(A, DATA);
    replay.source = elsewhere;
    world.inject(&replay);
    assert_eq!(at(&world), home, "a replay moves nothing");
    let mut old = world.last_sent(A, INITIATION);
    old.source = elsewhere;
    world.inject(&old);
    assert_eq!(at(&world), home, "an old initiation neither");
    world.nodes[A].address = elsewhere;
    world.send(A, B, 100);
    world.run_for(secs(1));
    assert_eq!(at(&world), elsewhere, "data that authenticated does");
    world.assert_connected();
    let next: std::net::SocketAddr = "203.0.113.5:6000".parse().unwrap();
    world.nodes[A].address = next;
    world.run_for(secs(200));
    world.send(A, B, 100);
    world.run_for(secs(1));
    assert_eq!(at(&world), next, "a handshake does");
    world.assert_connected();
}

#[test]
fn row_22_inner_sources_and_destinations_belong_to_their_peer() {
    let mut world = World::empty(34, 3);
    world.introduce(A, B, None);
    world.introduce(A, 2, None);
    world.send(A, B, 100);
    world.send(A, 2, 100);
    world.run_for(secs(1));
    assert_eq!((world.nodes[B].inner.len(), world.nodes[2].inner.len()), (1, 1));
    // B sends with the inner address of the third node, in A's tunnel.
    world.send_packet(B, &inner_packet(2, A, 100));
    world.run_for(secs(1));
    assert_eq!(world.drops(A, Drop::RxSourceNotAllowed), 1);
    assert!(world.nodes[A].inner.is_empty());
    // No route at all.
    world.send(B, 2, 100);
    assert_eq!(world.drops(B, Drop::TxNoRoute), 1);
    // A longer prefix moves one address to the other peer.
    let change = PeerChange {
        add_allowed_ips: vec![std::net::IpAddr::from(common::v4(B)).into()],
        ..PeerChange::default()
    };
    world.change_peer(A, 2, change);
    world.send(A, B, 100);
    world.run_for(secs(1));
    assert_eq!(world.nodes[B].inner.len(), 1);
    assert_eq!(world.drops(2, Drop::RxSourceNotAllowed), 0);
}

#[test]
fn row_23_inner_packets_are_checked_and_trimmed() {
    let mut world = World::connected(35);
    for len in [20, 21, 35, 36, 100, 1419, 1420] {
        world.send(A, B, len);
        world.run_for(millis(50));
        let arrived = world.nodes[B].inner.pop().unwrap();
        assert_eq!(arrived, inner_packet(A, B, len), "padding is gone");
    }
    world.send_packet(A, &inner_packet_v6(A, B, 333));
    world.run_for(millis(50));
    assert_eq!(world.nodes[B].inner.pop().unwrap(), inner_packet_v6(A, B, 333));
}

#[test]
fn row_24_handshakes_are_af41_and_data_shows_only_its_ecn() {
    let mut world = World::connected(36);
    for datagram in &world.eve {
        let expected = if datagram.is_data() { 0 } else { 0x88 };
        assert_eq!(datagram.tos, expected, "type {}", datagram.kind());
    }
    for ecn in 0..4u8 {
        let mut packet = inner_packet(A, B, 100);
        packet[1] = 0xb8 | ecn;
        world.send_packet(A, &packet);
        assert_eq!(world.last_sent(A, DATA).tos, ecn, "no DSCP outside");
        world.run_for(millis(50));
        assert_eq!(world.nodes[B].inner.pop().unwrap()[1], 0xb8 | ecn);
    }
    // Congestion on the way reaches the inner header (RFC 6040).
    let mut packet = inner_packet(A, B, 100);
    packet[1] = 2;
    world.wire.loss = 100;
    world.send_packet(A, &packet);
    let mut marked = world.last_sent(A, DATA);
    marked.tos = 3;
    world.inject(&marked);
    assert_eq!(world.nodes[B].inner.pop().unwrap()[1], 3);
}

#[test]
fn row_25_padding_is_to_16_and_never_past_the_mtu() {
    let mut world = World::connected(37);
    for (len, on_wire) in [(20, 32), (32, 32), (33, 48), (1408, 1408), (1409, 1420), (1420, 1420)] {
        world.send(A, B, len);
        assert_eq!(world.last_sent(A, DATA).bytes.len(), 16 + on_wire + 16, "{len} bytes");
    }
}

#[test]
fn row_26_128_packets_wait_and_the_oldest_goes_first() {
    let mut world = World::pair(38);
    world.wire.loss = 100;
    for len in 0..200 {
        world.send(A, B, 100 + len);
    }
    assert_eq!(world.drops(A, Drop::TxNoSession), 200 - 128);
    assert_eq!(handshakes(&world, A, 0), 1);
    world.wire.loss = 0;
    world.run_for(secs(6));
    let lens: Vec<_> = world.nodes[B].inner.iter().map(Vec::len).collect();
    assert_eq!(lens, (172..300).collect::<Vec<_>>(), "the newest 128, in order");
    assert_eq!(keepalives(&world, A, 0), 0, "data confirms the key as well as a keepalive");
}

#[test]
fn row_27_a_new_private_key_ends_all_sessions_and_connects_at_once() {
    let mut world = World::connected(39);
    let new = Secret::generate_private_key(&mut world.rng);
    let (old_public, new_public) = (world.nodes[A].public, new.public_key());
    let clock = world.clock(A);
    world.nodes[A].device.set_private_key(clock, Some(new.clone()));
    world.drain(A);
    assert!(world.nodes[A].up.is_empty());
    world.nodes[A].public = new_public;
    world.nodes[B].device.remove_peer(clock, &old_public);
    world.drain(B);
    world.introduce(A, B, None);
    world.send(A, B, 100);
    world.run_for(millis(100));
    world.assert_connected();
    // The same key again changes nothing.
    let clock = world.clock(A);
    world.nodes[A].device.set_private_key(clock, Some(new));
    world.assert_connected();
    // Without a key nothing is said or answered.
    world.nodes[A].device.set_private_key(clock, None);
    world.drain(A);
    let before = world.eve.len();
    world.send(A, B, 100);
    world.run_for(secs(100));
    assert!(world.sent(A, INITIATION, before).is_empty());
}

#[test]
fn row_27_a_peer_with_our_own_key_is_refused_and_vanishes() {
    let mut world = World::pair(40);
    let (clock, own) = (world.clock(A), world.nodes[A].public);
    let change = PeerChange::default();
    assert_eq!(world.nodes[A].device.set_peer(clock, own, change), Err(PeerRefused::OwnKey));
    let key = world.nodes[B].private.clone();
    world.nodes[A].device.set_private_key(clock, Some(key));
    assert_eq!(world.nodes[A].device.peers().count(), 0);
    let tables_empty = |world: &mut World| {
        world.drain(A);
        world.nodes[A].shared.tables.load().allowed_ips.is_empty()
    };
    assert!(tables_empty(&mut world));
}

#[test]
fn row_28_what_comes_back_ends_there() {
    // The endpoint is routed into the tunnel, and each datagram comes back as an inner packet.
    let mut world = World::connected(41);
    world.send(A, B, 100);
    let datagram = world.last_sent(A, DATA).bytes;
    let wrapped = |datagram: &[u8]| {
        let mut packet = inner_packet(A, B, 28 + datagram.len());
        packet[9] = 17;
        packet[20..28].fill(0);
        packet[28..].copy_from_slice(datagram);
        packet
    };
    let loops = |world: &World| world.drops(A, Drop::TxLoop);
    let before = world.eve.len();
    world.send_packet(A, &wrapped(&datagram));
    assert_eq!((world.eve.len(), loops(&world)), (before, 1));
    // A tunnel inside the tunnel has a session of its own, and passes.
    let mut other = datagram.clone();
    other[4] ^= 1;
    world.send_packet(A, &wrapped(&other));
    assert_eq!((world.eve.len(), loops(&world)), (before + 1, 1));
    // So does a fragment that only looks like it.
    let mut fragment = wrapped(&datagram);
    fragment[7] = 1;
    world.send_packet(A, &fragment);
    assert_eq!((world.eve.len(), loops(&world)), (before + 2, 1));
}

#[test]
fn row_29_secrets_print_nothing_and_sessions_leave_nothing_behind() {
    let mut world = World::connected(42);
    assert_eq!(format!("{:?}", world.nodes[A].private), "Secret(..)");
    let keys = Arc::downgrade(&session(&world, A));
    for _ in 0..4 {
        world.run_for(secs(121));
        world.send(A, B, 100);
        world.run_for(secs(1));
    }
    assert!(keys.upgrade().is_none(), "rotated out and dropped");
    let places = world.nodes[A].shared.sessions.capacity() as u32;
    let taken = (0..places).filter(|&i| world.nodes[A].shared.sessions.is_taken(i)).count();
    assert_eq!(taken, world.nodes[A].up.len());
}

#[test]
fn row_30_timestamps_grow_although_the_clock_goes_back_over_a_restart() {
    let mut world = World::connected(43);
    let mark = world.nodes[A].mark;
    let first = session(&world, B);
    let mut restarted = world.nodes[A].restarted(&mut world.rng);
    restarted.wall_error_secs = -86_400;
    world.nodes[A] = restarted;
    world.introduce(A, B, None);
    world.send(A, B, 100);
    world.run_for(secs(1));
    world.assert_connected();
    assert!(world.nodes[A].mark > mark, "the disk stays ahead of what was sent");
    assert_ne!(session(&world, B).receiver_index, first.receiver_index, "and B took it");
}

#[test]
fn row_30_a_clock_far_ahead_does_not_burn_the_key() {
    let mut world = World::connected(44);
    let restarted = world.nodes[A].restarted(&mut world.rng);
    world.nodes[A] = restarted;
    world.nodes[A].wall_error_secs = 20 * 365 * 86_400;
    world.introduce(A, B, None);
    world.send(A, B, 100);
    world.run_for(secs(1));
    world.assert_connected();
    // The clock is set right, and even the disk is lost: the key still works.
    let mut restarted = world.nodes[A].restarted(&mut world.rng);
    restarted.wall_error_secs = 120;
    restarted.mark = None;
    world.nodes[A] = restarted;
    world.introduce(A, B, None);
    world.run_for(secs(120));
    world.send(A, B, 100);
    world.run_for(secs(1));
    world.assert_connected();
}

#[test]
fn a_stale_wish_for_a_handshake_is_not_granted() {
    let mut world = World::connected(45);
    let (before, slot) = (world.eve.len(), world.peer(A, B).slot);
    world.run_for(secs(10));
    world.tell(A, vec![FastEvent::HandshakeWanted(slot)]);
    assert_eq!(handshakes(&world, A, before), 0);
    let header = DataHeader::parse(&world.last_sent(A, DATA).bytes).unwrap();
    assert_eq!(header.receiver_index, session(&world, A).receiver_index);
}

/// B was started anew and says so by shaking hands, which ends the packets that it cannot open.
#[test]
fn who_lost_a_session_connects_when_told_and_at_the_protocol_s_own_rate() {
    let mut world = World::connected(46);
    let mut rng = world.rng.clone();
    world.nodes[B] = world.nodes[B].restarted(&mut rng);
    let known = PeerChange {
        endpoint: Some(endpoint(world.nodes[A].address)),
        add_allowed_ips: vec!["10.0.0.0/8".parse().unwrap()],
        ..PeerChange::default()
    };
    world.change_peer(B, A, known);
    let (before, slot) = (world.eve.len(), world.peer(B, A).slot);
    let clock = world.clock(B);
    assert!(world.nodes[B].device.connect(clock, slot));
    assert!(!world.nodes[B].device.connect(clock, slot), "it is under way");
    assert!(!world.nodes[B].device.connect(clock, PeerSlot(7)), "there is no such peer");
    world.drain(B);
    world.run_for(secs(1));
    assert_eq!(handshakes(&world, B, before), 1);
    world.send(A, B, 100);
    world.run_for(millis(100));
    assert_eq!(world.nodes[B].inner.len(), 1, "A sends with the new session");
    let clock = world.clock(B);
    assert!(!world.nodes[B].device.connect(clock, slot), "there is a session");
}
