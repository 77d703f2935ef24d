//! Who receives what in a steered reuseport group, on loopback, with real sockets. Needs root.

mod common;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use millrace_ebpf::load::{LoadOptions, Programs};
use millrace_ebpf::tables::{SocketFamily, SocketSlot};
use socket2::{Domain, Protocol, Socket, Type};

/// Two workers, the slow thread, control; and a client that speaks to their port.
struct Group {
    programs: Programs,
    sockets: Vec<(SocketSlot, UdpSocket)>,
    client: UdpSocket,
    /// Seen behind everything else that went before it, by whoever it is meant for.
    target: SocketAddr,
}

const SLOTS: [SocketSlot; 4] =
    [SocketSlot::Worker(0), SocketSlot::Worker(1), SocketSlot::Slow, SocketSlot::Control];

fn bind(address: SocketAddr) -> UdpSocket {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .expect("socket");
    socket.set_reuse_port(true).expect("SO_REUSEPORT");
    socket.bind(&address.into()).expect("bind");
    socket.into()
}

impl Group {
    /// `bound` is where the group listens, `target` where the client sends to.
    fn new(bound: IpAddr, target: IpAddr, family: SocketFamily) -> Self {
        // One that shares its port may be given the port of another test's group.
        let alone = UdpSocket::bind(SocketAddr::new(bound, 0)).expect("bind");
        let port = alone.local_addr().expect("address").port();
        drop(alone);
        let first = bind(SocketAddr::new(bound, port));
        let options = LoadOptions { workers: 2, ..LoadOptions::new(port) };
        let programs = Programs::load(options).expect("load; run the tests as root");
        let more = (0..3).map(|_| bind(SocketAddr::new(bound, port)));
        let sockets: Vec<_> = SLOTS.into_iter().zip(std::iter::once(first).chain(more)).collect();
        for (slot, socket) in &sockets {
            socket.set_nonblocking(true).expect("nonblocking");
            programs.sockets.set(family, *slot, socket.as_fd()).expect("enter");
        }
        programs.steer(sockets[0].1.as_fd()).expect("steer");
        let client = UdpSocket::bind(SocketAddr::new(
            if target.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() },
            0,
        ))
        .expect("bind");
        Self { programs, sockets, client, target: SocketAddr::new(target, port) }
    }

    /// Sends and says who has it. Loopback delivers before `send_to` returns.
    fn receiver(&self, payload: &[u8]) -> Option<SocketSlot> {
        self.client.send_to(payload, self.target).expect("send");
        self.received(payload)
    }

    fn received(&self, payload: &[u8]) -> Option<SocketSlot> {
        let mut found = None;
        for (slot, socket) in &self.sockets {
            let mut bytes = [0; 2048];
            match socket.recv(&mut bytes) {
                Ok(length) => {
                    assert_eq!(&bytes[..length], payload);
                    assert_eq!(found, None, "received twice");
                    found = Some(*slot);
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        found
    }

    fn close(&mut self, gone: SocketSlot) {
        self.sockets.retain(|(slot, _)| *slot != gone);
    }
}

fn check_rule(group: &mut Group) {
    group.programs.sessions.insert(10, 0, 0).expect("insert");
    group.programs.sessions.insert(11, 0, 1).expect("insert");
    let worker = |slot: Option<SocketSlot>| matches!(slot, Some(SocketSlot::Worker(_)));
    assert_eq!(group.receiver(&common::data(10, 96)), Some(SocketSlot::Worker(0)));
    assert_eq!(group.receiver(&common::data(11, 96)), Some(SocketSlot::Worker(1)));
    assert!(worker(group.receiver(&common::data(12, 96))), "no session: some worker counts it");
    assert!(worker(group.receiver(&common::unknown())));
    assert!(worker(group.receiver(b"")));
    assert!(worker(group.receiver(b"\x04\0\0\0\x0b\0\0")), "too short for an index");
    assert_eq!(group.receiver(&common::initiation()), Some(SocketSlot::Slow));
    assert_eq!(group.receiver(&common::payload(&[3, 0, 0, 0], 64)), Some(SocketSlot::Slow));
    for payload in [common::stun(), common::disco(), common::geneve()] {
        assert_eq!(group.receiver(&payload), Some(SocketSlot::Control));
    }

    group.close(SocketSlot::Control);
    assert_eq!(group.receiver(&common::stun()), Some(SocketSlot::Slow), "without control");
    group.close(SocketSlot::Worker(1));
    assert_eq!(group.receiver(&common::data(11, 96)), Some(SocketSlot::Slow), "its worker is gone");
}

#[test]
fn a_group_of_ipv4_sockets_follows_the_rule() {
    let address = Ipv4Addr::LOCALHOST.into();
    check_rule(&mut Group::new(address, address, SocketFamily::Inet4));
}

#[test]
fn a_group_of_ipv6_sockets_follows_the_rule() {
    let address = Ipv6Addr::LOCALHOST.into();
    check_rule(&mut Group::new(address, address, SocketFamily::Inet6));
}

#[test]
fn a_dual_stack_group_follows_the_rule_for_ipv4_too() {
    let target = Ipv4Addr::LOCALHOST.into();
    check_rule(&mut Group::new(Ipv6Addr::UNSPECIFIED.into(), target, SocketFamily::Inet6));
}

#[test]
fn wireguard_never_reaches_control_even_when_nobody_else_is_left() {
    let address = Ipv4Addr::LOCALHOST.into();
    let mut group = Group::new(address, address, SocketFamily::Inet4);
    group.programs.sessions.insert(10, 0, 0).expect("insert");
    for slot in [SocketSlot::Worker(0), SocketSlot::Worker(1), SocketSlot::Slow] {
        group.close(slot);
    }
    assert_eq!(group.receiver(&common::stun()), Some(SocketSlot::Control));
    assert_eq!(group.receiver(&common::data(10, 96)), None);
    // Port unreachable came back, but an unconnected socket is not told.
    assert_eq!(group.receiver(&common::initiation()), None);
}

/// The kernel shows a run of datagrams to the program as one: two initiations are 296 bytes.
#[test]
fn a_run_of_handshakes_goes_to_the_slow_thread() {
    let address = Ipv4Addr::LOCALHOST.into();
    let group = Group::new(address, address, SocketFamily::Inet4);
    let segment: libc::c_int = 148;
    // SAFETY: the kernel reads four bytes of an int that lives across the call.
    let result = unsafe {
        libc::setsockopt(
            group.client.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            std::ptr::from_ref(&segment).cast(),
            size_of_val(&segment) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
    let run = [common::initiation(), common::initiation()].concat();
    group.client.send_to(&run, group.target).expect("send");
    for _ in 0..2 {
        assert_eq!(group.received(&common::initiation()), Some(SocketSlot::Slow));
    }
}

#[test]
fn a_socket_stands_in_one_slot_only() {
    let address = Ipv4Addr::LOCALHOST.into();
    let group = Group::new(address, address, SocketFamily::Inet4);
    let (_, socket) = &group.sockets[0];
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
    let again =
        group.programs.sockets.set(SocketFamily::Inet4, SocketSlot::Worker(5), socket.as_fd());
    assert!(again.is_err());
    assert!(
        group.programs.sockets.clear(SocketFamily::Inet4, SocketSlot::Worker(0)).expect("clear")
    );
    let moved =
        group.programs.sockets.set(SocketFamily::Inet4, SocketSlot::Worker(5), socket.as_fd());
    moved.expect("moved");
}
