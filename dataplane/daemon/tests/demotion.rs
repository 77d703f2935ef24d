//! Offloads that the kernel refuses: at the start, as older kernels do, and in the middle of
//! traffic. The data plane goes on in the next lower form, `status` says why, and not one packet is
//! lost: what was refused goes again.
//!
//! Refusals are real where this kernel can be made to (a route that is too narrow, a program that is
//! detached); the others come from seccomp. EIO for a run, which older kernels say of devices without
//! checksum offload, depends on what a message holds: there a supervisor decides, call by call.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use common::{World, drop_count, fact, facts, subject};
use millrace_dataplane::by_socket::{BySocket, Sent};
use millrace_dataplane::io::udp::UdpOptions;
use millrace_dataplane::offload::Offloads;
use millrace_lab::refusal::{Condition, Refusal};
use millrace_lab::{Gateway, Side, TunnelOptions, iperf::Iperf, wait_for};
use millrace_wg::tx::Transmit;
use millrace_wg::{DropCounters, Endpoint, Peer, PeerSlot, PublicKey};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

const LIMIT: Duration = Duration::from_secs(15);
/// Less than a TUN device's queue holds, and several runs.
const DATAGRAMS: u32 = 400;
const TUN_F_USO: u32 = 0x60;
const TUN_F_TSO: u32 = 0x06;

/// "on" or "off", and why.
fn offload(gateway: &Gateway, name: &str) -> (String, String) {
    let all = facts(gateway, "offload");
    let rest = all.iter().find_map(|line| line.strip_prefix(&format!("{name} "))).unwrap();
    let (state, reason) = rest.split_once(' ').unwrap();
    (state.to_owned(), reason.to_owned())
}

/// A listener on one LAN host and a sender on the other.
struct Flow {
    sender: UdpSocket,
    receiver: UdpSocket,
    sent: u32,
}

impl Flow {
    fn new(from: &Side, to: &Side) -> Self {
        let bind = |side: &Side| {
            side.host.run(|| UdpSocket::bind((IpAddr::from(side.host_v4), 0)).unwrap())
        };
        let (sender, receiver) = (bind(from), bind(to));
        set_socket_recv_buffer_size_force(&receiver, 8 << 20).unwrap();
        receiver.set_read_timeout(Some(LIMIT)).unwrap();
        sender.connect(receiver.local_addr().unwrap()).unwrap();
        Self { sender, receiver, sent: 0 }
    }

    fn payload(number: u32) -> Vec<u8> {
        let mut payload: Vec<u8> = (0..1200).map(|at| (at * 7 + number) as u8).collect();
        payload[..4].copy_from_slice(&number.to_be_bytes());
        payload
    }

    /// Many at once: while the sending gateway sleeps they wait for it, and it finds whole batches.
    fn send_burst(&mut self, gateway: &mut Gateway) {
        gateway.daemon().signal(libc::SIGSTOP);
        for number in self.sent..self.sent + DATAGRAMS {
            self.sender.send(&Self::payload(number)).unwrap();
        }
        gateway.daemon().signal(libc::SIGCONT);
        self.sent += DATAGRAMS;
    }

    /// All of the last burst, whole and in order.
    fn receive_burst(&self) {
        let mut room = [0; 2000];
        for number in self.sent - DATAGRAMS..self.sent {
            let len =
                self.receiver.recv(&mut room).unwrap_or_else(|error| panic!("{number}: {error}"));
            assert_eq!(room[..4], number.to_be_bytes(), "in order");
            assert!(room[..len] == Self::payload(number));
        }
    }
}

fn refusing(a: Vec<Refusal>) -> TunnelOptions {
    TunnelOptions { refusals: [a, Vec::new()], ..TunnelOptions::default() }
}

#[test]
fn a_run_that_is_too_wide_for_its_route_goes_datagram_by_datagram() {
    let mut world = World::new([subject(), subject()], &TunnelOptions::default());
    world.connect();
    let (near, far) = (&world.site.a, &world.site.b);
    let mut flow = Flow::new(near, far);
    flow.send_burst(&mut world.tunnel.a);
    flow.receive_burst();
    assert_eq!(offload(&world.tunnel.a, "udp_gso").1, "a probe over loopback was cut as asked");
    near.gateway
        .ip([format!("route add {}/32 via {} mtu 1100", far.wan_v4, near.router_v4)])
        .unwrap();
    flow.send_burst(&mut world.tunnel.a);
    flow.receive_burst();
    let (state, reason) = offload(&world.tunnel.a, "udp_gso");
    assert_eq!(state, "on", "other peers keep it");
    let wanted =
        format!("runs to some peers, {}:51820 the first, go datagram by datagram", far.wan_v4);
    assert!(reason.contains(&wanted), "{reason}");
    // Wide again, it sends runs again.
    near.gateway.ip([format!("route del {}/32", far.wan_v4)]).unwrap();
    flow.send_burst(&mut world.tunnel.a);
    flow.receive_burst();
    for gateway in [&world.tunnel.a, &world.tunnel.b] {
        assert_eq!(drop_count(gateway, "tx_socket_error"), 0);
    }
    world.finish();
}

#[test]
fn without_runs_from_the_socket_everything_arrives() {
    let no_gro = Refusal {
        call: libc::SYS_setsockopt,
        when: [
            Condition::Equals(1, libc::SOL_UDP as u32),
            Condition::Equals(2, libc::UDP_GRO as u32),
        ],
        errno: libc::ENOPROTOOPT,
    };
    let mut world = World::new([subject(), subject()], &refusing(vec![no_gro]));
    world.connect();
    let (state, reason) = offload(&world.tunnel.a, "udp_gro");
    assert_eq!(state, "off");
    assert!(reason.starts_with("the kernel refused UDP_GRO: Protocol not available"), "{reason}");
    assert_eq!(offload(&world.tunnel.a, "udp_gso").0, "on", "the other one is not concerned");
    let mut flow = Flow::new(&world.site.b, &world.site.a);
    flow.send_burst(&mut world.tunnel.b);
    flow.receive_burst();
    world.finish();
}

#[test]
fn a_tun_device_of_an_older_kernel_is_asked_for_less() {
    let refuse = |flags| Refusal {
        call: libc::SYS_ioctl,
        when: [Condition::Equals(1, libc::TUNSETOFFLOAD as u32), Condition::Has(2, flags)],
        errno: libc::EINVAL,
    };
    for (refused, off) in [
        (vec![refuse(TUN_F_USO)], vec!["tun_uso"]),
        (vec![refuse(TUN_F_USO), refuse(TUN_F_TSO)], vec!["tun_uso", "tun_tso"]),
    ] {
        let mut world = World::new([subject(), subject()], &refusing(refused));
        world.connect();
        for name in ["tun_uso", "tun_tso"] {
            let (state, reason) = offload(&world.tunnel.a, name);
            assert_eq!(state, if off.contains(&name) { "off" } else { "on" }, "{name}: {reason}");
            let refusal = "the TUN device refused: Invalid argument";
            assert_eq!(reason.starts_with(refusal), off.contains(&name), "{name}: {reason}");
        }
        let mut flow = Flow::new(&world.site.a, &world.site.b);
        flow.send_burst(&mut world.tunnel.a);
        flow.receive_burst();
        carry_tcp(&world, &world.site.a, &world.site.b);
    }
}

#[test]
fn super_packets_that_the_tun_device_refuses_are_written_in_pieces() {
    // A packet alone is a header and one slice; what is merged has one slice a packet.
    let no_super_packets = Refusal {
        call: libc::SYS_writev,
        when: [Condition::AtLeast(2, 3), Condition::AtLeast(2, 3)],
        errno: libc::EINVAL,
    };
    let mut world = World::new([subject(), subject()], &refusing(vec![no_super_packets]));
    world.connect();
    assert_eq!(offload(&world.tunnel.a, "coalesce_udp").0, "on");
    let mut flow = Flow::new(&world.site.b, &world.site.a);
    for _ in 0..2 {
        flow.send_burst(&mut world.tunnel.b);
        flow.receive_burst();
    }
    let given_up = |name| {
        let (state, reason) = offload(&world.tunnel.a, name);
        assert!(reason.starts_with("the TUN device refused a super-packet: Invalid"), "{reason}");
        assert_eq!(state, "off");
    };
    given_up("coalesce_udp");
    assert_eq!(offload(&world.tunnel.a, "coalesce_tcp").0, "on", "not tried yet");
    carry_tcp(&world, &world.site.b, &world.site.a);
    given_up("coalesce_tcp");
    assert_eq!(drop_count(&world.tunnel.a, "tun_write_failed"), 0);
}

#[test]
fn a_program_that_is_detached_under_load_costs_no_packet() {
    let toml = "[dataplane]\nreceive = \"xdp-copy\"\ndevice = [\"wan\"]\n".into();
    let mut world =
        World::new([subject(), subject()], &TunnelOptions { toml, ..TunnelOptions::default() });
    let gateway = world.site.a.gateway.clone();
    let runs = |world: &World| (fact(&world.tunnel.a, "receive")? == "xdp-copy").then_some(());
    wait_for("AF_XDP", LIMIT, || runs(&world)).unwrap();
    world.connect();
    let mut flow = Flow::new(&world.site.b, &world.site.a);
    // The ring is full of packets when the program goes.
    world.tunnel.a.daemon().signal(libc::SIGSTOP);
    flow.send_burst(&mut world.tunnel.b);
    let arrived =
        || (fact(&world.tunnel.b, "tx_packets")?.parse::<u32>().ok()? > DATAGRAMS).then_some(());
    wait_for("B to send all", LIMIT, arrived).unwrap();
    common::detach_xdp(&gateway);
    world.tunnel.a.daemon().signal(libc::SIGCONT);
    flow.receive_burst();
    flow.send_burst(&mut world.tunnel.b);
    flow.receive_burst();
    assert_eq!(drop_count(&world.tunnel.a, "xdp_ring_closed"), 0);
    world.finish();
}

/// TCP from one LAN host to the other: more than the capture of a world may keep up with.
fn carry_tcp(world: &World, from: &Side, to: &Side) {
    let iperf = Iperf { seconds: 1, streams: 1, ..Iperf::default() };
    let report = iperf.run(world.lab.directory(), &to.host, to.host_v4, &from.host).unwrap();
    assert!(report.bytes > 1 << 20, "{report:?}");
}

/// A thread whose sends of runs end with EIO, and no others.
#[test]
fn a_device_that_takes_no_runs_gets_datagrams_from_then_on() {
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    receiver.set_read_timeout(Some(LIMIT)).unwrap();
    let remote = receiver.local_addr().unwrap();
    let (listener, supervisor) = mpsc::channel();
    let supervisor = thread::spawn(move || supervise(&supervisor.recv().unwrap()));
    let offloads = Offloads::new(&Default::default());
    let drops = DropCounters::default();
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let socket =
                millrace_dataplane::io::udp::UdpSocket::bind(UdpOptions { port: 0, fwmark: 0 })
                    .unwrap();
            // Given away at once: the supervisor ends when this thread, the last to use it, does.
            listener.send(refuse_runs()).unwrap();
            let by_socket = BySocket { socket: &socket, gso: &offloads.udp_gso, drops: &drops };
            let peer = Arc::new(Peer::new(PeerSlot(0), PublicKey([0; 32]), None));
            let endpoint = Endpoint { remote, local: None, ifindex: 0 };
            for round in 0..3 {
                let bytes: Vec<u8> = (0..4900).map(|at| (at / 500 + round) as u8).collect();
                let transmit =
                    Transmit { peer: &peer, endpoint, ecn: 0, bytes: &bytes, segment_len: 500 };
                assert_eq!(by_socket.send(&transmit, 0), Sent::All);
            }
        });
        sender.join().unwrap();
    });
    let mut room = [0; 2000];
    for round in 0..3 {
        for number in 0..10 {
            let len = receiver.recv(&mut room).unwrap();
            assert_eq!(len, if number == 9 { 400 } else { 500 });
            assert!(room[..len].iter().all(|&byte| byte == number + round), "whole and in order");
        }
    }
    assert!(!offloads.udp_gso.is_on());
    let wanted = format!("the kernel refused a UDP_SEGMENT send to {remote}: Input/output error");
    assert!(offloads.udp_gso.reason().starts_with(&wanted), "{}", offloads.udp_gso.reason());
    assert_eq!(drops.iter().map(|(_, count)| count).sum::<u64>(), 0);
    assert_eq!(supervisor.join().unwrap(), (1, 30), "tried once, then 30 datagrams");
}

/// Gives the calling thread's sendmsg calls into the hands of whoever has the descriptor.
fn refuse_runs() -> OwnedFd {
    let code = |class: u32| class as u16;
    let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
    let mut filter = [
        libc::sock_filter { code: load, jt: 0, jf: 0, k: 0 },
        libc::sock_filter {
            code: code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K),
            jt: 0,
            jf: 1,
            k: libc::SYS_sendmsg as u32,
        },
        libc::sock_filter {
            code: code(libc::BPF_RET),
            jt: 0,
            jf: 0,
            k: libc::SECCOMP_RET_USER_NOTIF,
        },
        libc::sock_filter { code: code(libc::BPF_RET), jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its instructions outlive the call, which copies them.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: a fresh descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Answers until the thread is gone: EIO for a run, the kernel's own answer for the rest. How many
/// there were of each.
fn supervise(listener: &OwnedFd) -> (u32, u32) {
    const RECEIVE: libc::c_ulong = 0xc050_2100;
    const ANSWER: libc::c_ulong = 0xc018_2101;
    let (mut refused, mut passed) = (0, 0);
    loop {
        let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        if !fds[0].revents().contains(PollFlags::IN) {
            return (refused, passed);
        }
        // SAFETY: zero bytes are a valid value of both; the kernel writes whole structures.
        let (mut call, mut answer): (libc::seccomp_notif, libc::seccomp_notif_resp) =
            unsafe { std::mem::zeroed() };
        // SAFETY: the structure is the one of this command and outlives the call.
        if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut call) } < 0 {
            continue;
        }
        // SAFETY: the argument of sendmsg, in this process; the thread that gave it waits for us.
        let message = unsafe { &*(call.data.args[1] as *const libc::msghdr) };
        // SAFETY: as above; the header says how long its control messages are.
        let is_run = unsafe {
            let first = libc::CMSG_FIRSTHDR(message);
            !first.is_null()
                && (*first).cmsg_level == libc::SOL_UDP
                && (*first).cmsg_type == libc::UDP_SEGMENT
        };
        answer.id = call.id;
        if is_run {
            answer.error = -libc::EIO;
            refused += 1;
        } else {
            answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
            passed += 1;
        }
        // SAFETY: as for the first command.
        let done = unsafe { libc::ioctl(listener.as_raw_fd(), ANSWER, &raw mut answer) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
}
