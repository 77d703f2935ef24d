//! Both ends of the link over a real socket, in one process. Needs root for the maps.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::num::NonZeroU8;
use std::os::fd::AsFd;
use std::time::Duration;

use millrace_ebpf::abi::{Endpoint, Observed};
use millrace_ebpf::link::{
    BoxKeyAnswer, BoxKeyRefusal, Delivery, DetourSocket, LinkClient, LinkError, LinkListener,
    LinkPeer, MapHandles, Offer, PublicKey, Run, Steering, ToControl, ToDataPlane, VERSION,
    Welcome, detour,
};
use millrace_ebpf::load::{LoadOptions, Programs};
use millrace_ebpf::maps::{LineReader, LineWriter, StatsReader};
use millrace_ebpf::spec;
use millrace_ebpf::tables::Drops;
use rustix::thread::{Gid, Uid};

const NOBODY: u32 = 65_534;
const PATIENCE: Duration = Duration::from_secs(20);

struct Link {
    client: LinkClient,
    server: LinkPeer,
}

fn link() -> Link {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.link");
    let listener = LinkListener::bind(&path).unwrap();
    assert!(listener.accept().unwrap().is_none());
    let client = LinkClient::connect(&path).unwrap();
    let mut server = listener.accept().unwrap().unwrap();
    assert_eq!(server.receive().unwrap(), Some(ToDataPlane::Hello { version: VERSION }));
    Link { client, server }
}

fn welcome(steering: Steering) -> Welcome {
    Welcome {
        public_key: None,
        interface: "wg0".into(),
        ifindex: 3,
        listen_port: 51820,
        mtu: 1420,
        fwmark: 0,
        steering,
    }
}

fn unsteered() -> Welcome {
    welcome(Steering::Off { reason: "no BPF".into() })
}

#[test]
fn a_welcome_brings_maps_and_detours_that_work() {
    let programs =
        Programs::load(LoadOptions { peers_max: 8, ..LoadOptions::new(51820) }).expect("root");
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| DetourSocket::pair().unwrap()).unzip();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let Link { mut client, mut server } = link();
    let offer = Offer { maps: programs.shared_fds(), udp: udp.as_fd(), detours: &theirs };
    let steering = Steering::On { workers: NonZeroU8::new(2).unwrap() };
    server.welcome(&welcome(steering), Some(offer)).unwrap();

    let Delivery { handles: Some(handles), .. } = client.receive().unwrap().unwrap() else {
        panic!("no handles");
    };
    programs.observed().unwrap().write(7, &Observed { sent_ns: 5, ..Observed::default() });
    std::thread::scope(|scope| scope.spawn(|| use_maps(&handles.maps)).join()).unwrap();
    assert_eq!(programs.endpoints().unwrap().read(7).unwrap().kind, 3);
    let same = std::net::UdpSocket::from(handles.udp).local_addr().unwrap();
    assert_eq!(same, udp.local_addr().unwrap());

    // Data of slot 5 is the second worker's; a handshake is the slow thread's.
    let mut buffer = vec![0; detour::BUFFER_LEN];
    for (first, owner) in [(4, 2), (1, 0)] {
        handles.detours.send(5, 40, &[first; 100]).unwrap();
        for (number, end) in ours.iter().enumerate() {
            let datagram = end.receive(&mut buffer).unwrap();
            assert_eq!(datagram.is_some(), number == owner);
            let Some(datagram) = datagram else { continue };
            let run = Run::parse(datagram).unwrap();
            assert_eq!((run.slot, run.segment_len, run.bytes.len()), (5, 40, 100));
        }
    }
}

/// What control does with the maps, as nobody and without any capability.
fn use_maps(maps: &MapHandles) {
    rustix::thread::set_thread_groups(&[]).unwrap();
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    let held = rustix::thread::capabilities(None).unwrap();
    assert!(held.effective.is_empty() && held.permitted.is_empty());

    let specs = spec::read_abi(maps.abi.as_fd()).unwrap();
    let mut lines = LineWriter::<Endpoint>::endpoints(maps.endpoints.as_fd(), &specs).unwrap();
    assert!(lines.write(7, &Endpoint { kind: 3, ..Endpoint::default() }));
    let reader = LineReader::<Observed>::observed(maps.observed.as_fd(), &specs).unwrap();
    assert_eq!(reader.read(7).unwrap().sent_ns, 5);
    let stats = StatsReader::open(maps.stats.as_fd()).unwrap();
    assert_eq!(stats.read(0).unwrap().heartbeat_ns, 0);
    let drops = Drops::open(maps.drops.try_clone().unwrap()).unwrap();
    assert_eq!(drops.all().unwrap().len(), millrace_ebpf::drops::COUNT);
}

#[test]
fn a_slow_reader_gets_everything_in_order() {
    let Link { mut client, mut server } = link();
    server.welcome(&unsteered(), None).unwrap();
    assert!(client.receive().unwrap().unwrap().handles.is_none());
    for slot in 0..10_000 {
        server.send(ToControl::PeerDown { slot }).unwrap();
    }
    assert!(server.wants_write(), "more than the socket's buffer holds");
    let mut next = 0;
    let start = std::time::Instant::now();
    while next < 10_000 {
        assert!(start.elapsed() < PATIENCE);
        match client.receive().unwrap() {
            Some(Delivery { message: ToControl::PeerDown { slot }, .. }) => {
                assert_eq!(slot, next);
                next += 1;
            }
            Some(other) => panic!("{other:?}"),
            None => server.flush().unwrap(),
        }
    }
    assert!(!server.wants_write());
}

#[test]
fn a_reader_that_stopped_is_left() {
    let Link { client: _client, mut server } = link();
    server.welcome(&unsteered(), None).unwrap();
    let error = (0..100_000).find_map(|slot| server.send(ToControl::PeerDown { slot }).err());
    assert!(matches!(error, Some(LinkError::Slow { .. })), "{error:?}");
}

#[test]
fn questions_are_answered_until_the_end() {
    let Link { mut client, mut server } = link();
    server.welcome(&unsteered(), None).unwrap();
    client.receive().unwrap().unwrap();
    let peer = PublicKey([7; 32]);
    assert!(client.want_box_key(11, peer).unwrap());
    let question = ToDataPlane::WantBoxKey { request: 11, peer };
    assert_eq!(server.receive().unwrap(), Some(question));
    let answer = BoxKeyAnswer { request: 11, key: Err(BoxKeyRefusal::NoPrivateKey) };
    server.send(ToControl::BoxKey(answer.clone())).unwrap();
    let delivery = client.receive().unwrap().unwrap();
    assert_eq!(delivery.message, ToControl::BoxKey(answer));
    drop(server);
    assert!(matches!(client.receive(), Err(LinkError::Closed)));
    assert!(matches!(client.want_box_key(12, peer), Err(LinkError::Closed)));
}

/// Says to the other end what the typed ends never would.
fn raw(path: &std::path::Path) -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let fd = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&fd, &SocketAddrUnix::new(path).unwrap()).unwrap();
    fd
}

#[test]
fn whoever_breaks_the_protocol_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.link");
    let listener = LinkListener::bind(&path).unwrap();
    let hello = ToDataPlane::Hello { version: VERSION }.encode();
    let question = ToDataPlane::WantBoxKey { request: 1, peer: PublicKey([7; 32]) }.encode();
    let endless = vec![1; 5000];
    let cases: [&[&[u8]]; 5] =
        [&[&question], &[&hello, &hello], &[&hello, b"\xff"], &[b"\x01"], &[&hello, &endless]];
    for said in cases {
        let client = raw(&path);
        let mut server = listener.accept().unwrap().unwrap();
        for message in said {
            rustix::io::write(&client, message).unwrap();
        }
        let error = (0..=said.len()).find_map(|_| server.receive().err());
        let broken = matches!(error, Some(LinkError::Message(_) | LinkError::Protocol { .. }));
        assert!(broken, "{said:?}: {error:?}");
    }
}

#[test]
fn another_version_is_told_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.link");
    let listener = LinkListener::bind(&path).unwrap();
    let client = raw(&path);
    let mut server = listener.accept().unwrap().unwrap();
    let hello = ToDataPlane::Hello { version: VERSION + 1 }.encode();
    rustix::io::write(&client, &hello).unwrap();
    server.receive().unwrap_err();
    drop(server);
    let mut bytes = [0; 2048];
    let len = rustix::io::read(&client, &mut bytes).unwrap();
    let ToControl::Refused { reason } = ToControl::parse(&bytes[..len]).unwrap() else { panic!() };
    assert!(reason.contains("version"), "{reason}");
    assert_eq!(rustix::io::read(&client, &mut bytes), Ok(0));
}

#[test]
fn an_address_with_a_zone_survives() {
    let Link { mut client, mut server } = link();
    server.welcome(&unsteered(), None).unwrap();
    client.receive().unwrap().unwrap();
    let endpoint: SocketAddr = "[fe80::1%3]:51820".parse().unwrap();
    let peer = millrace_ebpf::link::Peer {
        slot: 1,
        public_key: PublicKey([1; 32]),
        endpoint: Some(endpoint),
        keepalive_s: 25,
        allowed_ips: vec!["192.0.2.0/24".parse().unwrap()],
    };
    server.send(ToControl::PeerUp(peer.clone())).unwrap();
    assert_eq!(client.receive().unwrap().unwrap().message, ToControl::PeerUp(peer));
}
