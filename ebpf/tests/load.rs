//! The loader against the running kernel: attachment, conflicts, maps of other shapes. Needs root.

mod common;

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;

use aya::maps::{Array, IterableMap as _, MapData};
use millrace_ebpf::abi::Abi;
use millrace_ebpf::error::LoadError;
use millrace_ebpf::load::{LoadOptions, Programs};
use millrace_ebpf::spec::{self, Specs};

fn programs() -> Programs {
    Programs::load(LoadOptions::new(51820)).expect("load; run the tests as root")
}

fn ifindex(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).expect("no zero");
    // SAFETY: a string that ends in zero and lives across the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

#[test]
fn sessions_come_and_go() {
    let programs = programs();
    programs.sessions.insert(7, 3, 1).expect("insert");
    programs.sessions.insert(7, 4, 2).expect("replace");
    let session = programs.sessions.get(7).expect("get").expect("present");
    assert_eq!((session.peer_slot, session.worker), (4, 2));
    assert!(programs.sessions.remove(7).expect("remove"));
    assert!(!programs.sessions.remove(7).expect("remove"));
    assert!(programs.sessions.insert(7, 0, 64).is_err(), "there is no worker 64");
}

#[test]
fn the_place_of_a_session_is_its_low_bits_and_only_its_own_index_removes_it() {
    let options = LoadOptions { sessions_max: 5, ..LoadOptions::new(51820) };
    let programs = Programs::load(options).expect("load; run the tests as root");
    let specs = spec::read_abi(programs.shared_fds().abi).expect("our own");
    assert_eq!(specs.sessions_max, 8, "rounded up to a power of two");
    let (old, new) = (0xabcd_0003, 0x1234_0003);
    programs.sessions.insert(old, 1, 0).expect("insert");
    assert!(programs.sessions.get(new).expect("get").is_none());
    programs.sessions.insert(new, 2, 0).expect("insert");
    assert!(programs.sessions.get(old).expect("get").is_none(), "replaced");
    assert!(!programs.sessions.remove(old).expect("remove"));
    assert_eq!(programs.sessions.get(new).expect("get").expect("stays").peer_slot, 2);
    assert!(programs.sessions.get(0).expect("get").is_none(), "a free place is nobody's");
}

#[test]
fn an_occupied_interface_is_left_alone_and_its_owner_is_named() {
    common::enter_own_network();
    common::shell("ip link add mr0 type veth peer name mr1 && ip link set mr0 up");
    let interface = ifindex("mr0");
    let first = programs();
    let second = programs();
    let attachment = first.attach_xdp(interface).expect("attach");

    let error = second.attach_xdp(interface).expect_err("occupied");
    let LoadError::Occupied { interface: name, program } = &error else { panic!("{error:?}") };
    assert_eq!(name, "mr0");
    assert_eq!(program.name.as_deref(), Some("millrace_xdp"));
    let id = first.xdp().expect("xdp").info().expect("info").id();
    assert_eq!(program.id, Some(id));
    assert!(error.to_string().contains("`bpftool link` shows"), "{error}");

    let _alone = common::nobody_spawns();
    drop(attachment);
    drop(first);
    let attachment = second.attach_xdp(interface).expect("the hook is free again");
    drop(attachment);
}

/// Somebody's generic program: both modes at once are impossible, and it stays.
#[test]
fn a_generic_program_of_somebody_else_is_named_too() {
    common::enter_own_network();
    common::shell(&format!(
        "ip link add mr0 type veth peer name mr1 && ip link set mr0 up && \
         ip link set mr0 xdpgeneric obj {}/twin.bpf.o program twin_empty",
        env!("OUT_DIR")
    ));
    let error = programs().attach_xdp(ifindex("mr0")).expect_err("occupied");
    let LoadError::Occupied { program, .. } = &error else { panic!("{error:?}") };
    assert!(program.id.is_some(), "{error}");
    common::shell("ip link show mr0 | grep -q xdpgeneric");
}

#[test]
fn no_native_xdp_and_no_interface_are_told_apart() {
    common::enter_own_network();
    let error = programs().attach_xdp(ifindex("lo")).expect_err("lo has no native XDP");
    assert!(
        matches!(&error, LoadError::NoNativeXdp { interface } if interface == "lo"),
        "{error:?}"
    );
    let error = programs().attach_xdp(4_000).expect_err("no such interface");
    assert!(matches!(error, LoadError::NoInterface { ifindex: 4_000 }), "{error:?}");
}

#[test]
fn a_too_large_mtu_is_the_drivers_refusal() {
    common::enter_own_network();
    common::shell("ip link add mr0 mtu 9000 type veth peer name mr1 mtu 9000");
    let error = programs().attach_xdp(ifindex("mr0")).expect_err("9000 is too large");
    assert!(matches!(error, LoadError::DriverRefused { mtu: 9000, .. }), "{error:?}");
}

#[test]
fn a_socket_without_a_group_cannot_be_steered() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let error = programs().steer(socket.as_fd()).expect_err("no SO_REUSEPORT");
    assert!(matches!(error, LoadError::Steer { .. }), "{error:?}");
}

#[test]
fn more_local_addresses_than_fit_are_an_error_and_the_old_rule_stays() {
    let programs = programs();
    let many: Vec<IpAddr> =
        (0..5000u32).map(|number| Ipv4Addr::from_bits(0x0a00_0000 + number).into()).collect();
    let error = programs.set_local_addresses(&many).expect_err("4096 fit");
    assert!(error.to_string().starts_with("map LOCAL_ADDRESSES"), "{error}");
    assert_eq!(programs.flags.get().local_addresses, 0);
}

#[test]
fn maps_of_another_shape_are_refused_and_the_difference_is_named() {
    let specs = Specs { peers_max: 16, sessions_max: 16 };
    let wrong_value = Array::<MapData, u32>::create(16, spec::MMAPABLE).expect("run as root");
    let wrong_count = Array::<MapData, [u8; 64]>::create(15, spec::MMAPABLE).expect("map");
    let wrong_flags = Array::<MapData, [u8; 64]>::create(16, 0).expect("map");
    let right = Array::<MapData, [u8; 64]>::create(16, spec::MMAPABLE).expect("map");
    let wrong_type = aya::maps::HashMap::<MapData, u32, [u8; 64]>::create(16, 0).expect("map");

    let directory = tempfile::tempdir().expect("directory");
    let _mount = Mount::new(directory.path());
    let path = |name: &str| directory.path().join(name);
    wrong_value.pin(path("value")).expect("pin");
    wrong_count.pin(path("count")).expect("pin");
    wrong_flags.pin(path("flags")).expect("pin");
    wrong_type.pin(path("type")).expect("pin");
    right.pin(path("right")).expect("pin");

    let expected = [
        ("value", "value size", 4, 64),
        ("count", "max entries", 15, 16),
        ("flags", "flags", 0, spec::MMAPABLE),
        ("type", "type", spec::HASH, spec::ARRAY),
    ];
    for (name, difference, was, wanted) in expected {
        let error = specs.endpoints().open(&path(name)).expect_err("refused");
        let LoadError::MapMismatch { field, seen, expected, .. } = error else { panic!("{error}") };
        assert_eq!((field, seen, expected), (difference, was, wanted), "{name}");
    }
    specs.endpoints().open(&path("right")).expect("accepted");
    let error = specs.endpoints().open(&path("absent")).expect_err("no such pin");
    assert!(error.to_string().contains("opening the pin"), "{error}");
}

#[test]
fn maps_of_another_version_are_refused() {
    let programs = programs();
    let specs = spec::read_abi(programs.shared_fds().abi).expect("our own");
    assert_eq!((specs.peers_max, specs.sessions_max), (1024, 8192));

    let mut other = Array::<MapData, [u32; 12]>::create(1, 0).expect("map");
    let ours: [u32; 12] = zerocopy::transmute!(Abi::new(1024, 8192));
    let refused = |map: &Array<MapData, [u32; 12]>| {
        let fd = map_fd(map);
        match spec::read_abi(fd.as_fd()).expect_err("refused") {
            LoadError::Abi { field, .. } => field,
            error => panic!("{error:?}"),
        }
    };
    assert_eq!(refused(&other), "magic", "an empty map");
    for (word, field) in [(1, "version"), (2, "endpoint size"), (11, "drop reasons")] {
        let mut changed = ours;
        changed[word] += 1;
        other.set(0, changed, 0).expect("set");
        assert_eq!(refused(&other), field);
    }
    other.set(0, ours, 0).expect("set");
    spec::read_abi(map_fd(&other).as_fd()).expect("accepted");
}

fn map_fd(map: &Array<MapData, [u32; 12]>) -> std::os::fd::OwnedFd {
    map.map().fd().as_fd().try_clone_to_owned().expect("fd")
}

/// A bpffs that only this thread sees, so that nothing stays on the machine.
struct Mount<'a>(&'a std::path::Path);

impl<'a> Mount<'a> {
    fn new(directory: &'a std::path::Path) -> Self {
        // SAFETY: a system call without pointers; it changes this thread only.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
        assert_eq!(result, 0, "unshare: {}", std::io::Error::last_os_error());
        common::shell("mount --make-rprivate /");
        common::shell(&format!("mount -t bpf bpf {}", directory.display()));
        Self(directory)
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        common::shell(&format!("umount {}", self.0.display()));
    }
}
