//! The daemon's surface in depth, beside `service.rs`: every verb of `wg`, hostile clients of the
//! UAPI socket, what a reload tells and keeps, privileges of every thread, and SIGKILL.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use common::{World, ask};
use millrace_config::SecretKey;
use millrace_config::limits::PEERS_MAX;
use millrace_config::status::{Health, Status};
use millrace_config::uapi::DeviceState;
use millrace_lab::{Gateway, Implementation, Lab, Namespace, TunnelOptions, wait_for};
use rustix::fs::inotify::{self, WatchFlags};

const LIMIT: Duration = Duration::from_secs(15);
/// A public key that belongs to nobody here.
const STRANGER: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

fn connected_world() -> World {
    let pair = [Implementation::Millrace, Implementation::WireguardGo];
    let world = World::new(pair, &TunnelOptions::default());
    world.connect();
    world
}

/// Sends packets and checks that they went under the session that was there before.
fn session_is_kept(world: &World, handshake_s: u64) {
    world.ping(&world.site.a, &world.site.b, 2);
    assert_eq!(world.tunnel.a.peer().unwrap().last_handshake_s, handshake_s, "a new handshake");
}

#[test]
fn every_verb_of_wg_keeps_the_session() {
    let world = connected_world();
    let gateway = &world.tunnel.a;
    let (name, namespace) = (gateway.interface(), gateway.namespace());
    let wg = |words: &str| namespace.exec(&format!("wg {words}")).unwrap();
    let before = gateway.peer().unwrap();
    assert!(before.last_handshake_s > 0 && before.received_bytes > 0 && before.sent_bytes > 0);
    let text = wg(&format!("showconf {name}"));
    assert!(text.contains("PresharedKey = ") && text.contains("AllowedIPs = "), "{text}");
    for verb in ["syncconf", "setconf"] {
        let line = format!("wg {verb} {name} /dev/stdin");
        namespace.exec_with_input(&line, &text).unwrap();
        assert_eq!(wg(&format!("showconf {name}")), text, "after {verb}");
        session_is_kept(&world, before.last_handshake_s);
    }

    gateway
        .set(&format!("peer {STRANGER} allowed-ips 192.0.2.0/24 persistent-keepalive 7"))
        .unwrap();
    gateway.set("fwmark 0x10").unwrap();
    let dump = wg(&format!("show {name} dump"));
    let row = dump.lines().find(|line| line.starts_with(STRANGER)).unwrap();
    assert!(row.contains("192.0.2.0/24") && row.ends_with("\t7"), "{row}");
    assert!(dump.lines().next().unwrap().ends_with("0x10"), "{dump}");
    // An allowed prefix belongs to one peer: the later owner takes it.
    gateway.set(&format!("peer {} allowed-ips 192.0.2.0/24", before.public_key)).unwrap();
    let peers = gateway.peers().unwrap();
    let stranger = peers.iter().find(|peer| peer.public_key == STRANGER).unwrap();
    assert!(stranger.allowed_ips.is_empty(), "{stranger:?}");
    // syncconf removes the stranger, gives the prefixes back, and the session is still the same.
    let line = format!("wg syncconf {name} /dev/stdin");
    namespace.exec_with_input(&line, &text).unwrap();
    assert_eq!(gateway.peers().unwrap().len(), 1);
    gateway.set("fwmark 0").unwrap();
    session_is_kept(&world, before.last_handshake_s);

    let refused = gateway.set("listen-port 40000").unwrap_err().to_string();
    assert!(refused.contains("Operation not supported"), "{refused}");
    session_is_kept(&world, before.last_handshake_s);
    world.finish();
}

#[test]
fn the_uapi_socket_bears_every_client() {
    let world = connected_world();
    let name = world.tunnel.a.interface();
    let path = format!("/run/wireguard/{name}.sock");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(ask(name, ""), "", "an empty connection is how wg looks whether we live");
    assert!(ask(name, "get=1\n\n").ends_with("\nerrno=0\n\n"));
    let key = "11".repeat(32);
    for bad in ["hello\n\n", "get=2\n\n", "set=1\nlisten_port=x\n\n", "\u{1}\n\n", "get=1"] {
        assert_eq!(ask(name, bad), "errno=-22\n\n", "{bad:?}");
    }
    // What stands before a bad line was not done: a request is read whole first.
    assert_eq!(ask(name, &format!("set=1\npublic_key={key}\nendpoint=x\n\n")), "errno=-22\n\n");
    assert_eq!(world.tunnel.a.peers().unwrap().len(), 1);
    // Two requests on one connection, and silent clients beside it.
    let silent: Vec<_> = (0..4).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let twice = ask(name, "get=1\n\nget=1\n\n");
    assert_eq!(twice.matches("errno=0").count(), 2, "{twice}");
    drop(silent);
    world.finish();
}

/// No moment between making the socket and closing it to others.
#[test]
fn the_uapi_socket_appears_with_its_mode() {
    fs::create_dir_all("/run/wireguard").unwrap();
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    let flags = WatchFlags::CREATE | WatchFlags::ATTRIB | WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, "/run/wireguard", flags).unwrap();
    let mut world = connected_world();
    let name = world.tunnel.a.interface().to_owned();
    // What a killed one left is replaced in the same way.
    world.tunnel.a.restart().unwrap();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let mut seen = Vec::new();
    while let Ok(event) = events.next() {
        if event.file_name().is_some_and(|file| *file == *c_name(&name)) {
            seen.push(event.events());
        }
    }
    assert_eq!(seen, [inotify::ReadFlags::MOVED_TO; 2]);
    let path = format!("/run/wireguard/{name}.sock");
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!fs::exists(format!("/run/wireguard/.{name}.new")).unwrap());
    world.finish();
}

fn c_name(interface: &str) -> CString {
    CString::new(format!("{interface}.sock")).unwrap()
}

/// The answers are the kernel's, which says nothing of a peer that is ignored; log and status do.
#[test]
fn peers_that_cannot_be_are_told_of() {
    let mut world = connected_world();
    let name = world.tunnel.a.interface().to_owned();
    let own = ask(&name, "get=1\n\n");
    let own = own.lines().find_map(|line| line.strip_prefix("private_key=")).unwrap().to_owned();
    let own = SecretKey::from_hex(&own).unwrap().public_key();
    let notes = |world: &World| common::facts(&world.tunnel.a, "note");
    let count = |world: &World| world.tunnel.a.peers().unwrap().len();
    assert_eq!(notes(&world), [""; 0]);

    let set = |key: &str, more: &str| ask(&name, &format!("set=1\npublic_key={key}\n{more}\n"));
    assert_eq!(set(&own.to_hex(), ""), "errno=0\n\n");
    assert_eq!(count(&world), 1);
    let seen = notes(&world);
    assert!(seen.len() == 1 && seen[0].contains(&own.to_base64()), "{seen:?}");
    world.tunnel.a.daemon().wait_for_log("the public key is our own", LIMIT).unwrap();

    // A point of order eight; the kernel takes it, too.
    let low = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800";
    let more = "endpoint=198.51.100.99:1\npersistent_keepalive_interval=1\n";
    assert_eq!(set(low, more), "errno=0\n\n");
    assert_eq!(count(&world), 2);
    assert!(notes(&world).iter().any(|note| note.contains("low order")), "{:?}", notes(&world));
    world.tunnel.a.daemon().wait_for_log("low order", LIMIT).unwrap();
    let state = DeviceState::parse(ask(&name, "get=1\n\n").as_bytes()).unwrap();
    let status = Status::new(&name, &state, 0);
    assert_eq!((status.health, status.warnings.len()), (Health::Degraded, 2));

    assert_eq!(set(low, "remove=true\n"), "errno=0\n\n");
    assert_eq!(set(&own.to_hex(), "remove=true\n"), "errno=0\n\n");
    assert_eq!(notes(&world), [""; 0]);

    // More than the session table bears: what stands before stays, as in the kernel.
    let peers = |kind: u8, count: usize, remove: bool| -> String {
        let lines = (0..count).map(|number| match remove {
            true => format!("public_key={number:062x}{kind:02x}\nremove=true\n"),
            false => format!(
                "public_key={number:062x}{kind:02x}\nallowed_ip=fd05:{kind:x}::{number:x}/128\n\
                 allowed_ip=fd06:{kind:x}::{number:x}/128\nallowed_ip=fd07:{kind:x}::{number:x}/128\n"
            ),
        });
        lines.collect()
    };
    assert_eq!(ask(&name, &format!("set=1\n{}\n", peers(5, 17_000, false))), "errno=-12\n\n");
    assert_eq!(count(&world), PEERS_MAX);
    assert!(notes(&world).iter().any(|note| note.contains("room for no more")));
    // All of them give way to as many others within the time that an answer may take.
    let others = PEERS_MAX - 1;
    let change = format!("set=1\n{}{}\n", peers(5, others, true), peers(6, others, false));
    assert_eq!(ask(&name, &change), "errno=0\n\n");
    assert_eq!(count(&world), PEERS_MAX);
    assert_eq!(ask(&name, &format!("set=1\n{}\n", peers(6, others, true))), "errno=0\n\n");
    assert_eq!(count(&world), 1);
    world.ping(&world.site.a, &world.site.b, 2);
    world.finish();
}

/// A prefix leads to the peer that took it last, whatever becomes of the one that had it.
#[test]
fn a_prefix_that_moved_stays_where_it_is() {
    let world = connected_world();
    let name = world.tunnel.a.interface().to_owned();
    let set = |peer: u8, more: &str| {
        let text = format!("set=1\npublic_key={:062x}{peer:02x}\n{more}\n", 7);
        assert_eq!(ask(&name, &text), "errno=0\n\n");
    };
    let owners = |net: &str| {
        let state = DeviceState::parse(ask(&name, "get=1\n\n").as_bytes()).unwrap();
        let has = |nets: &[ipnet::IpNet]| nets.iter().any(|shown| shown.to_string() == net);
        let owners = state.peers.iter().filter(|peer| has(&peer.allowed_ips));
        owners.map(|peer| peer.public_key.to_hex()[62..].to_owned()).collect::<Vec<_>>()
    };
    set(1, "allowed_ip=10.9.7.7/16\nallowed_ip=fd09::/64\n");
    assert_eq!(
        (owners("10.9.0.0/16"), owners("fd09::/64")),
        (vec!["01".into()], vec!["01".into()])
    );
    set(2, "allowed_ip=10.9.0.0/16\n");
    assert_eq!(owners("10.9.0.0/16"), ["02"]);
    set(1, "allowed_ip=-10.9.0.0/16\n");
    assert_eq!(owners("10.9.0.0/16"), ["02"], "another peer's is not taken");
    set(1, "replace_allowed_ips=true\nallowed_ip=10.8.0.0/16\n");
    assert_eq!((owners("10.9.0.0/16"), owners("fd09::/64")), (vec!["02".into()], vec![]));
    set(1, "allowed_ip=10.9.0.0/16\n");
    set(2, "remove=true\n");
    assert_eq!(
        (owners("10.9.0.0/16"), owners("10.8.0.0/16")),
        (vec!["01".into()], vec!["01".into()])
    );
    set(1, "allowed_ip=-10.9.0.0/16\n");
    assert_eq!(owners("10.9.0.0/16"), [""; 0]);
    world.finish();
}

fn config_file(world: &World) -> PathBuf {
    world.lab.directory().join(format!("{}.toml", world.tunnel.a.interface()))
}

#[test]
fn a_reload_tells_status_and_keeps_what_needs_a_restart() {
    let mut world = connected_world();
    let handshake_s = world.tunnel.a.peer().unwrap().last_handshake_s;
    let (name, path) = (world.tunnel.a.interface().to_owned(), config_file(&world));
    let good = fs::read_to_string(&path).unwrap();
    let reload = |world: &mut World, text: &str, sign: Option<&str>| {
        fs::write(&path, text).unwrap();
        world.tunnel.a.daemon().signal(libc::SIGHUP);
        if let Some(sign) = sign {
            world.tunnel.a.daemon().wait_for_log(sign, LIMIT).unwrap();
        }
    };

    reload(&mut world, &good.replace("listen_port", "listen_prt"), Some("did you mean"));
    let error = || {
        let answer = ask(&name, "get=1\n\n");
        answer.lines().find_map(|line| line.strip_prefix("mr_config_error=").map(str::to_owned))
    };
    let shown = wait_for("the error in status", LIMIT, error).unwrap();
    assert!(shown.contains("listen_prt") && shown.contains("did you mean"), "{shown}");
    session_is_kept(&world, handshake_s);

    // The missing file of a secret is as bad as a bad line.
    let lost = good.replace(".key\"", ".gone\"");
    reload(&mut world, &lost, Some("millrace genkey"));
    session_is_kept(&world, handshake_s);

    let more = format!(
        "{good}\n[[peer]]\nname = \"new\"\npublic_key = \"{STRANGER}\"\n\
         allowed_ips = [\"203.0.113.0/24\"]\n"
    );
    let more = more.replace("mtu = 1420", "mtu = 1400\nroutes = \"auto\"");
    reload(&mut world, &more, None);
    let two = || (world.tunnel.a.peers().unwrap().len() == 2).then_some(());
    wait_for("the second peer", LIMIT, two).unwrap();
    wait_for("the error to go", LIMIT, || error().is_none().then_some(())).unwrap();
    let gateway = world.tunnel.a.namespace().clone();
    assert!(gateway.exec("ip route show 203.0.113.0/24").unwrap().contains(&name));
    assert!(gateway.exec(&format!("ip link show {name}")).unwrap().contains("mtu 1400"));
    assert!(ask(&name, "get=1\n\n").contains("mr_name=new\n"));
    session_is_kept(&world, handshake_s);

    // A key that needs a restart is named at each reload, until the restart.
    let other = good.replace("[interface]", "[offload]\nudp_gso = \"off\"\n[interface]");
    for times in 1..=2 {
        reload(&mut world, &other, None);
        let daemon = world.tunnel.a.daemon();
        let named = || (daemon.log().matches("offload.udp_gso").count() == times).then_some(());
        wait_for("the warning", LIMIT, named).unwrap();
    }
    let one = || (world.tunnel.a.peers().unwrap().len() == 1).then_some(());
    wait_for("the second peer to go", LIMIT, one).unwrap();
    let gone = || gateway.exec("ip route show 203.0.113.0/24").unwrap().is_empty().then_some(());
    wait_for("its route to go", LIMIT, gone).unwrap();
    session_is_kept(&world, handshake_s);
    world.finish();
}

#[test]
fn privileges_are_given_up_and_secrets_stay_inside() {
    let mut world = connected_world();
    let private_key = world.tunnel.a.options.private_key.clone();
    let preshared_key = world.tunnel.a.options.peers[0].preshared_key.clone().unwrap();
    let daemon = world.tunnel.a.daemon();
    let proc = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", daemon.pid())).unwrap();
    // The first thread and every other one: capabilities belong to threads.
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let mut threads = 0;
    for task in tasks {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
        };
        let set = |name: &str| u64::from_str_radix(&field(name), 16).unwrap();
        // NET_ADMIN 12, NET_RAW 13, IPC_LOCK 14, BPF 39.
        let kept = 1 << 12 | 1 << 13 | 1 << 14 | 1 << 39;
        for name in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(set(name) & !kept, 0, "{name} {:x} of {}", set(name), field("Name:"));
        }
        assert_eq!(set("CapInh:") | set("CapAmb:"), 0);
        assert_eq!(field("NoNewPrivs:"), "1", "{}", field("Name:"));
        threads += 1;
    }
    assert!(threads >= 3, "workers, slow thread, UAPI: {threads}");
    assert!(proc("limits").lines().any(|line| {
        line.starts_with("Max core file size") && line.split_whitespace().nth(4) == Some("0")
    }));
    let (arguments, environment, log) = (proc("cmdline"), proc("environ"), daemon.log());
    for secret in [private_key, preshared_key] {
        for place in [&arguments, &environment, &log] {
            assert!(!place.contains(&secret), "a secret in {place}");
        }
    }
    world.finish();
}

#[test]
fn killed_it_leaves_nothing_that_blocks_the_next_start() {
    let mut world = connected_world();
    let name = world.tunnel.a.interface().to_owned();
    let socket = format!("/run/wireguard/{name}.sock");
    world.tunnel.a.daemon().signal(libc::SIGKILL);
    let gateway = world.tunnel.a.namespace().clone();
    let gone = || gateway.exec(&format!("ip link show {name}")).is_err().then_some(());
    wait_for("the interface to vanish with its owner", LIMIT, gone).unwrap();
    assert!(fs::exists(&socket).unwrap(), "nobody was there to remove it");
    world.tunnel.a.restart().unwrap();
    world.connect();

    // Asked to stop, it takes everything along.
    world.tunnel.a.daemon().signal(libc::SIGTERM);
    let daemon = world.tunnel.a.daemon();
    let end = wait_for("the end", LIMIT, || daemon.ended()).unwrap();
    assert!(end.success(), "{end}");
    assert!(!fs::exists(&socket).unwrap());
    assert!(!fs::exists(format!("/run/millrace/{name}.pid")).unwrap());
    world.finish();
}

/// A place to start a data plane that is to fail.
struct Host {
    namespace: Namespace,
    interface: String,
    lab: Lab,
}

impl Host {
    fn new() -> Self {
        let lab = Lab::new().unwrap();
        let namespace = lab.namespace("host").unwrap();
        let interface = lab.interface_name();
        Self { namespace, interface, lab }
    }

    /// Runs it under `wrapper` until it ends: exit code and log.
    fn run(&self, wrapper: &str) -> (Option<i32>, String) {
        let path = self.lab.directory().join("host.toml");
        fs::write(&path, format!("schema = 1\n[interface]\nname = \"{}\"\n", self.interface))
            .unwrap();
        // Readable by the user that has no privileges.
        fs::set_permissions(self.lab.directory(), fs::Permissions::from_mode(0o755)).unwrap();
        let program = Implementation::Millrace.program().unwrap();
        let mut words = wrapper.split_whitespace();
        let mut command = match words.next() {
            None => self.namespace.command(&program),
            Some(first) => {
                let mut command = self.namespace.command(first);
                command.args(words).arg(&program);
                command
            }
        };
        let output = self.namespace.output(command.arg("--config").arg(&path), "").unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Exactly one error line, and it names the cure.
fn one_error(seen: &(Option<i32>, String), code: i32, words: [&str; 2]) {
    let (status, log) = seen;
    assert_eq!(*status, Some(code), "{log}");
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{log}");
    for word in words {
        assert!(log.contains(word), "no {word:?} in {log}");
    }
}

#[test]
fn without_privileges_it_says_which() {
    let host = Host::new();
    let wrapper = "setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all";
    let seen = host.run(wrapper);
    one_error(&seen, 6, ["ermi", "root"]);
}

/// Two devices of one name in two namespaces would share the socket's path.
#[test]
fn a_second_device_of_the_same_name_is_refused_and_the_first_stays() {
    let world = connected_world();
    let other = Host::new();
    let host = Host { interface: world.tunnel.a.interface().to_owned(), ..other };
    one_error(&host.run(""), 1, ["answers on /run/wireguard", "millrace down"]);
    let gateway: &Gateway = &world.tunnel.a;
    assert_eq!(gateway.peers().unwrap().len(), 1);
    world.ping(&world.site.a, &world.site.b, 1);
    world.finish();
}
