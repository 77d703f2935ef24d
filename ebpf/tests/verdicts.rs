//! What XDP does with each kind of frame, by BPF_PROG_TEST_RUN: verdict, the frame afterwards
//! (always as before), and the counter. Needs root.

mod common;

use std::net::IpAddr;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use common::{
    Frame, XDP_DROP, XDP_PASS, XDP_REDIRECT, data, disco, geneve, initiation, payload, stun,
    unknown,
};
use millrace_ebpf::abi::{DropCount, HANDSHAKE_SETS, HANDSHAKE_WAYS};
use millrace_ebpf::drops::Drop;
use millrace_ebpf::load::{LoadOptions, Programs};

const INDEX: u32 = 0x1234_5678;
const STRANGER: u32 = 0x1234_5679;

fn programs() -> Programs {
    let programs = Programs::load(LoadOptions::new(common::PORT)).expect("run the tests as root");
    programs.sessions.insert(INDEX, 0, 0).expect("insert");
    programs
}

/// Runs the frame and checks everything that a run can show.
fn check(programs: &Programs, name: &str, frame: &[u8], verdict: u32, counter: Option<Drop>) {
    let before = programs.drops.all().expect("drops");
    let (seen, out) = common::run(programs.xdp().expect("xdp"), frame);
    assert_eq!(seen, verdict, "{name}: verdict");
    assert_eq!(out, frame, "{name}: the frame must not change");
    for ((reason, before), (_, after)) in before.iter().zip(programs.drops.all().expect("drops")) {
        let expected = u64::from(Some(*reason) == counter);
        assert_eq!(after.packets - before.packets, expected, "{name}: packets of {reason:?}");
        let bytes = expected * frame.len() as u64;
        assert_eq!(after.bytes - before.bytes, bytes, "{name}: bytes of {reason:?}");
    }
}

fn xsk() -> OwnedFd {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "AF_XDP socket: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made this fd.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// All the ways to write a frame that is for us, around a payload.
fn carriers(payload: &[u8]) -> Vec<(&'static str, Frame)> {
    let v4 = Frame::ipv4(payload.to_vec());
    let v6 = Frame::ipv6(payload.to_vec());
    vec![
        ("IPv4", v4.clone()),
        ("IPv6", v6.clone()),
        ("IPv4 with a tag", v4.clone().with(|frame| frame.tags = vec![0x8100])),
        ("IPv6 with a tag", v6.clone().with(|frame| frame.tags = vec![0x8100])),
        ("IPv4 with Ethernet padding", v4.clone().with(|frame| frame.padding = 18)),
        ("IPv6 with Ethernet padding", v6.with(|frame| frame.padding = 3)),
        ("IPv4 that must not be fragmented", v4.with(|frame| frame.fragment = 0x4000)),
    ]
}

#[test]
fn each_class_gets_its_verdict_however_it_is_carried() {
    let programs = programs();
    let unknown_class = (XDP_DROP, Some(Drop::XdpUnknownClass));
    let pass = (XDP_PASS, None);
    let classes = [
        ("data without a ring", data(INDEX, 96), pass),
        ("keepalive without a ring", data(INDEX, 32), pass),
        ("initiation", initiation(), pass),
        ("response", payload(&[2, 0, 0, 0], 92), pass),
        ("cookie reply", payload(&[3, 0, 0, 0], 64), pass),
        ("STUN", stun(), pass),
        ("disco", disco(), pass),
        ("Geneve", geneve(), pass),
        ("data, too short", data(INDEX, 31), unknown_class),
        ("initiation, too long", payload(&[1, 0, 0, 0], 149), unknown_class),
        ("response, too short", payload(&[2, 0, 0, 0], 91), unknown_class),
        ("type 5", payload(&[5, 0, 0, 0], 148), unknown_class),
        ("reserved bytes not zero", payload(&[4, 0, 1, 0], 148), unknown_class),
        ("other text", unknown(), unknown_class),
        ("7 bytes", payload(&[4, 0, 0, 0], 7), unknown_class),
        ("empty", vec![], unknown_class),
    ];
    for (class, payload, (verdict, counter)) in classes {
        for (carrier, frame) in carriers(&payload) {
            check(&programs, &format!("{class}, {carrier}"), &frame.bytes(), verdict, counter);
        }
    }
}

#[test]
fn data_of_a_session_goes_to_the_ring_and_of_no_session_only_while_the_table_decides() {
    let programs = programs();
    let ring = xsk();
    programs.xsks.set(0, ring.as_fd()).expect("ring");
    for length in [32, 33, 1452] {
        for (carrier, frame) in carriers(&data(INDEX, length)) {
            check(&programs, carrier, &frame.bytes(), XDP_REDIRECT, None);
        }
    }
    let stranger = Frame::ipv4(data(STRANGER, 96)).bytes();
    check(&programs, "not authoritative", &stranger, XDP_PASS, None);
    programs.flags.set_authoritative(true);
    check(&programs, "authoritative", &stranger, XDP_DROP, Some(Drop::XdpUnknownIndex));
    let zero = Frame::ipv4(data(0, 96)).bytes();
    check(&programs, "a free place", &zero, XDP_DROP, Some(Drop::XdpUnknownIndex));
    let neighbour = Frame::ipv4(data(INDEX ^ 0x8000_0000, 96)).bytes();
    check(&programs, "same place", &neighbour, XDP_DROP, Some(Drop::XdpUnknownIndex));
    let known = Frame::ipv4(data(INDEX, 96)).bytes();
    check(&programs, "authoritative, known", &known, XDP_REDIRECT, None);

    programs.sessions.remove(INDEX).expect("remove");
    check(&programs, "session gone", &known, XDP_DROP, Some(Drop::XdpUnknownIndex));
    programs.sessions.insert(INDEX, 0, 0).expect("insert");
    programs.flags.set_authoritative(false);
    check(&programs, "not authoritative again", &stranger, XDP_PASS, None);
    let passed = || programs.passed.get().expect("passed");
    assert_eq!(passed().packets, 0);
    assert!(programs.xsks.clear(0).expect("clear"));
    check(&programs, "no ring", &known, XDP_PASS, None);
    assert_eq!(passed(), DropCount { packets: 1, bytes: known.len() as u64 });

    programs.xsks.set(0, ring.as_fd()).expect("ring");
    check(&programs, "ring back", &known, XDP_REDIRECT, None);
    drop(ring);
    // The socket leaves the map when it is released, which the kernel does at once on close.
    check(&programs, "ring closed", &known, XDP_PASS, None);
}

/// Everything here would be dropped, redirected or rate-limited if the program took it for ours.
#[test]
fn what_is_not_provably_ours_passes() {
    let programs = programs();
    let ring = xsk();
    programs.xsks.set(0, ring.as_fd()).expect("ring");
    programs.flags.set_authoritative(true);
    let v4 = || Frame::ipv4(data(INDEX, 96));
    let v6 = || Frame::ipv6(data(INDEX, 96));
    let bent = [
        ("foreign port", v4().with(|frame| frame.port = 51821)),
        ("foreign port, IPv6", v6().with(|frame| frame.port = 443)),
        ("port with its bytes swapped", v4().with(|frame| frame.port = common::PORT.swap_bytes())),
        ("TCP", v4().with(|frame| frame.protocol = 6)),
        ("IPv6 hop-by-hop header", v6().with(|frame| frame.protocol = 0)),
        ("IPv6 fragment header", v6().with(|frame| frame.protocol = 44)),
        ("two tags", v4().with(|frame| frame.tags = vec![0x8100, 0x8100])),
        ("service tag", v4().with(|frame| frame.tags = vec![0x88a8])),
        ("service tag and tag", v4().with(|frame| frame.tags = vec![0x88a8, 0x8100])),
        ("ARP", v4().with(|frame| frame.ethertype = Some(0x0806))),
        ("IPv4 said to be IPv6", v4().with(|frame| frame.ethertype = Some(0x86dd))),
        ("IPv6 said to be IPv4", v6().with(|frame| frame.ethertype = Some(0x0800))),
        ("IPv4 options", v4().with(|frame| frame.version_ihl = 0x46)),
        ("all IPv4 options", v4().with(|frame| frame.version_ihl = 0x4f)),
        ("IPv4 header too short", v4().with(|frame| frame.version_ihl = 0x44)),
        ("IPv4 version 5", v4().with(|frame| frame.version_ihl = 0x55)),
        ("IPv6 version 4", v6().with(|frame| frame.version_ihl = 0x40)),
        ("first fragment", v4().with(|frame| frame.fragment = 0x2000)),
        ("middle fragment", v4().with(|frame| frame.fragment = 0x2001)),
        ("last fragment", v4().with(|frame| frame.fragment = 0x00b9)),
        ("UDP longer than IP", v4().with(|frame| frame.udp_length_lie = 1)),
        ("UDP shorter than IP", v4().with(|frame| frame.udp_length_lie = -1)),
        ("UDP length 7", v4().with(|frame| frame.udp_length_lie = -97)),
        ("UDP length 0", v4().with(|frame| frame.udp_length_lie = -104)),
        ("UDP longer than IP, IPv6", v6().with(|frame| frame.udp_length_lie = 1)),
        ("UDP shorter than IP, IPv6", v6().with(|frame| frame.udp_length_lie = -1)),
        ("UDP length 0, IPv6", v6().with(|frame| frame.udp_length_lie = -104)),
        ("IP longer than the frame", v4().with(|frame| frame.ip_length_lie = 1)),
        (
            "IP and UDP longer than the frame",
            v4().with(|frame| (frame.ip_length_lie, frame.udp_length_lie) = (1, 1)),
        ),
        (
            "IP and UDP longer than the frame, IPv6",
            v6().with(|frame| (frame.ip_length_lie, frame.udp_length_lie) = (1, 1)),
        ),
        ("IP length 0", v4().with(|frame| frame.ip_length_lie = -124)),
        (
            "IP length 27",
            v4().with(|frame| (frame.ip_length_lie, frame.udp_length_lie) = (-97, -97)),
        ),
        ("jumbogram", v6().with(|frame| frame.ip_length_lie = -104)),
    ];
    for (name, frame) in bent {
        check(&programs, name, &frame.bytes(), XDP_PASS, None);
    }
    let straight = v4().bytes();
    check(&programs, "unbent", &straight, XDP_REDIRECT, None);
}

#[test]
fn frames_cut_off_anywhere_pass() {
    let programs = programs();
    let ring = xsk();
    programs.xsks.set(0, ring.as_fd()).expect("ring");
    for (carrier, frame) in carriers(&data(INDEX, 96)) {
        let whole = Frame { padding: 0, ..frame }.bytes();
        // The kernel takes no test frame that is shorter than an Ethernet header.
        for length in 14..whole.len() {
            check(
                &programs,
                &format!("{carrier}, {length} bytes"),
                &whole[..length],
                XDP_PASS,
                None,
            );
        }
        check(&programs, carrier, &whole, XDP_REDIRECT, None);
    }
}

#[test]
fn oversize_frames_are_judged_like_others() {
    let programs = programs();
    let ring = xsk();
    programs.xsks.set(0, ring.as_fd()).expect("ring");
    for length in [1473, 2048, 3300] {
        let frame = Frame::ipv4(data(INDEX, length)).bytes();
        check(&programs, "oversize data", &frame, XDP_REDIRECT, None);
        let frame = Frame::ipv6(payload(b"GET / HTTP/1.1", length)).bytes();
        check(&programs, "oversize text", &frame, XDP_DROP, Some(Drop::XdpUnknownClass));
        let frame = Frame::ipv4(initiation()).with(|frame| frame.padding = length).bytes();
        check(&programs, "much padding", &frame, XDP_PASS, None);
    }
}

#[test]
fn what_the_host_only_forwards_passes() {
    let programs = programs();
    let ring = xsk();
    programs.xsks.set(0, ring.as_fd()).expect("ring");
    programs.flags.set_authoritative(true);
    let ours: [IpAddr; 2] =
        ["198.51.100.7".parse().expect("v4"), "2001:db8:2::7".parse().expect("v6")];
    programs.set_local_addresses(&ours).expect("addresses");
    let dropped = (XDP_DROP, Some(Drop::XdpUnknownClass));
    for (payload, (verdict, counter)) in
        [(data(INDEX, 96), (XDP_REDIRECT, None)), (unknown(), dropped)]
    {
        for (carrier, frame) in carriers(&payload) {
            check(&programs, carrier, &frame.bytes(), verdict, counter);
            let elsewhere = frame.with(|frame| {
                let last = if frame.ipv6 { 15 } else { 3 };
                frame.destination[last] ^= 1;
            });
            check(&programs, carrier, &elsewhere.bytes(), XDP_PASS, None);
        }
    }
    programs.set_local_addresses(&ours[1..]).expect("addresses");
    check(&programs, "gone", &Frame::ipv4(unknown()).bytes(), XDP_PASS, None);
    programs.set_local_addresses(&[]).expect("addresses");
    check(&programs, "any", &Frame::ipv4(unknown()).bytes(), XDP_DROP, dropped.1);
}

#[test]
fn a_prefix_that_used_up_its_handshakes_is_dropped_and_others_are_not() {
    let options = LoadOptions {
        handshake_burst: 4,
        handshake_interval_ns: 3_600_000_000_000,
        ..LoadOptions::new(common::PORT)
    };
    let programs = Programs::load(options).expect("run the tests as root");
    let limited = Some(Drop::XdpHandshakeRate);
    for frame in [Frame::ipv4(initiation()), Frame::ipv6(initiation())] {
        for _ in 0..4 {
            check(&programs, "in the burst", &frame.bytes(), XDP_PASS, None);
        }
        check(&programs, "past the burst", &frame.bytes(), XDP_DROP, limited);
        let response = Frame { payload: payload(&[2, 0, 0, 0], 92), ..frame.clone() };
        check(&programs, "all types share a bucket", &response.bytes(), XDP_DROP, limited);

        // The next /32; the next address of the /64, and the next /64.
        let next = frame.clone().with(|frame| frame.source[3] ^= 1);
        check(&programs, "another prefix", &next.bytes(), XDP_PASS, None);
        let next = frame.clone().with(|frame| frame.source[7] ^= 1);
        let (verdict, counter) = if frame.ipv6 { (XDP_PASS, None) } else { (XDP_DROP, limited) };
        check(&programs, "another /64", &next.bytes(), verdict, counter);
        let next = frame.clone().with(|frame| frame.source[15] ^= 1);
        check(&programs, "same /64", &next.bytes(), XDP_DROP, limited);

        let other = Frame { payload: stun(), ..frame.clone() };
        check(&programs, "STUN is not limited", &other.bytes(), XDP_PASS, None);
    }
}

#[test]
fn a_bucket_fills_again() {
    let interval = Duration::from_millis(50);
    let options = LoadOptions {
        handshake_burst: 2,
        handshake_interval_ns: interval.as_nanos() as u64,
        ..LoadOptions::new(common::PORT)
    };
    let programs = Programs::load(options).expect("run the tests as root");
    let frame = Frame::ipv4(initiation()).bytes();
    let xdp = programs.xdp().expect("xdp");
    let start = Instant::now();
    let mut passed = 0;
    while passed < 6 {
        passed += u32::from(common::run(xdp, &frame).0 == XDP_PASS);
        assert!(start.elapsed() < Duration::from_secs(10), "only {passed} passed");
    }
    // Two at once, then four intervals; the coarse clock may be a tick (10 ms at most) behind, and some
    // more while the CPU that keeps it stands still.
    assert!(start.elapsed() > 4 * interval - Duration::from_millis(40), "{:?}", start.elapsed());
}

#[test]
fn a_flood_of_sources_neither_pays_anothers_debt_nor_takes_anothers_tokens() {
    let options = LoadOptions {
        handshake_burst: 8,
        handshake_interval_ns: 60_000_000_000,
        ..LoadOptions::new(common::PORT)
    };
    let programs = Programs::load(options).expect("run the tests as root");
    let xdp = programs.xdp().expect("xdp");
    let indebted = Frame::ipv4(initiation());
    for _ in 0..8 {
        assert_eq!(common::run(xdp, &indebted.bytes()).0, XDP_PASS);
    }
    // Twice as many as there are buckets, each once: all pass, none for another one's account.
    for number in 0..2 * HANDSHAKE_SETS * HANDSHAKE_WAYS as u32 {
        let frame = indebted.clone().with(|frame| {
            frame.source[..4].copy_from_slice(&(0x0a00_0000 + number).to_be_bytes());
        });
        assert_eq!(common::run(xdp, &frame.bytes()).0, XDP_PASS, "source {number}");
    }
    assert_eq!(common::run(xdp, &indebted.bytes()).0, XDP_DROP, "the flood paid its debt");
}

#[test]
fn addresses_beyond_the_near_ones_are_found_too() {
    let programs = Programs::load(LoadOptions::new(common::PORT)).expect("run the tests as root");
    let mut ours: Vec<IpAddr> = (1..=40).map(|last| [203, 0, 113, last].into()).collect();
    ours.extend((1..=40).map(|last| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 1, last])));
    programs.set_local_addresses(&ours).expect("addresses");
    for _ in 0..2 {
        for address in &ours {
            let mut frame = match address {
                IpAddr::V4(v4) => Frame::ipv4(unknown())
                    .with(|frame| frame.destination[..4].copy_from_slice(&v4.octets())),
                IpAddr::V6(v6) => {
                    Frame::ipv6(unknown()).with(|frame| frame.destination = v6.octets())
                }
            };
            let counter = Some(Drop::XdpUnknownClass);
            check(&programs, "ours", &frame.bytes(), XDP_DROP, counter);
            frame.destination[if frame.ipv6 { 0 } else { 2 }] ^= 1;
            check(&programs, "somebody else's", &frame.bytes(), XDP_PASS, None);
        }
        // The same again with others in front.
        ours.reverse();
        programs.set_local_addresses(&ours).expect("addresses");
    }
}
