//! The daemon as an operator meets it: `wg`, signals, privileges, bad input, and what it costs idle.
//!
//! ```text
//!  host a ── gateway a (millrace) ── router ── gateway b (millrace) ── host b
//! ```
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{World, drop_count};
use millrace_ebpf::link::{self, LinkClient};
use millrace_lab::{
    Daemon, Gateway, GatewayOptions, HungThread, Implementation, Lab, TunnelOptions,
    keys::random_key, ping::Ping, wait_for,
};

const LIMIT: Duration = Duration::from_secs(5);

fn world() -> World {
    let world = World::new([Implementation::Millrace; 2], &TunnelOptions::default());
    world.connect();
    world
}

fn wg(gateway: &Gateway, words: &str) -> String {
    let line = format!("wg {}", words.replace("IFACE", gateway.interface()));
    gateway.namespace().exec(&line).unwrap()
}

fn config_file(world: &World, gateway: &Gateway) -> std::path::PathBuf {
    world.lab.directory().join(format!("{}.toml", gateway.interface()))
}

#[test]
fn wg_shows_and_sets_and_a_synced_equal_configuration_keeps_the_session() {
    let world = world();
    let a = &world.tunnel.a;
    let shown = wg(a, "show IFACE");
    for part in ["latest handshake:", "endpoint: 198.51.100.2:51820", "listening port: 51820"] {
        assert!(shown.contains(part), "no {part:?} in {shown}");
    }
    let handshake = a.peer().unwrap().last_handshake_s;
    let configuration = wg(a, "showconf IFACE");
    let line = format!("wg syncconf {} /dev/stdin", a.interface());
    a.namespace().exec_with_input(&line, &configuration).unwrap();
    world.ping(&world.site.a, &world.site.b, 3);
    assert_eq!(a.peer().unwrap().last_handshake_s, handshake, "the session lives on");
    assert_eq!(wg(a, "showconf IFACE"), configuration);

    let stranger = random_key().unwrap();
    a.set(&format!("peer {stranger} allowed-ips 10.3.0.0/16 persistent-keepalive 9")).unwrap();
    assert_eq!(a.peers().unwrap().len(), 2);
    // A prefix moves to the peer that took it last, as in the kernel.
    a.set(&format!("peer {stranger} allowed-ips 10.2.0.0/16")).unwrap();
    let moved = a.peers().unwrap().into_iter().find(|peer| peer.public_key == stranger).unwrap();
    assert_eq!(moved.allowed_ips, ["10.2.0.0/16"]);
    a.set(&format!("peer {stranger} remove")).unwrap();
    assert_eq!(a.peers().unwrap().len(), 1);
    assert!(a.set("listen-port 51821").is_err(), "refused, not ignored");
    world.finish();
}

#[test]
fn a_reload_takes_a_good_file_over_and_leaves_all_alone_for_a_bad_one() {
    let mut world = world();
    let file = config_file(&world, &world.tunnel.a);
    let good = fs::read_to_string(&file).unwrap();
    let handshake = world.tunnel.a.peer().unwrap().last_handshake_s;

    let stranger = random_key().unwrap();
    let more = format!(
        "{good}\n[[peer]]\nname = \"new\"\npublic_key = \"{stranger}\"\nallowed_ips = [\"10.3.0.0/16\"]\n"
    );
    fs::write(&file, more).unwrap();
    world.tunnel.a.daemon().signal(libc::SIGHUP);
    let a = &world.tunnel.a;
    wait_for("the new peer", LIMIT, || (a.peers().ok()?.len() == 2).then_some(())).unwrap();
    let route = a.namespace().exec("ip route show 10.3.0.0/16").unwrap();
    assert!(route.contains(a.interface()), "{route}");

    fs::write(&file, format!("{good}\nnonsense = 1\n")).unwrap();
    world.tunnel.a.daemon().signal(libc::SIGHUP);
    world.tunnel.a.daemon().wait_for_log("the old state stays", LIMIT).unwrap();
    assert_eq!(world.tunnel.a.peers().unwrap().len(), 2);

    fs::write(&file, good).unwrap();
    world.tunnel.a.daemon().signal(libc::SIGHUP);
    let a = &world.tunnel.a;
    wait_for("the peer to go", LIMIT, || (a.peers().ok()?.len() == 1).then_some(())).unwrap();
    world.ping(&world.site.a, &world.site.b, 3);
    assert_eq!(world.tunnel.a.peer().unwrap().last_handshake_s, handshake, "same session");
    world.finish();
}

#[test]
fn an_idle_tunnel_does_not_wake_up_and_few_privileges_are_left() {
    let mut world = world();
    let pid = world.tunnel.a.daemon().pid();
    // Control sees traffic without a tick of ours.
    let _control = LinkClient::connect(&link::path(world.tunnel.a.interface())).unwrap();
    let connected =
        || common::fact(&world.tunnel.a, "control")?.strip_prefix("connected").map(drop);
    wait_for("control to be connected", LIMIT, connected).unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let capabilities = u64::from_str_radix(&field("CapEff"), 16).unwrap();
    // CAP_NET_ADMIN 12, CAP_NET_RAW 13, CAP_IPC_LOCK 14, CAP_BPF 39: and no other.
    let allowed = (1 << 12) | (1 << 13) | (1 << 14) | (1_u64 << 39);
    assert_eq!(capabilities & !allowed, 0, "effective capabilities {capabilities:#x}");
    assert_eq!(field("NoNewPrivs"), "1");

    // The last ping's passive keepalive and the last look at an active peer are over after twenty
    // seconds. The kernel's own news do not wait so long: the neighbours of the last pings get old
    // somewhere between 15 and 45 seconds, within the five that are measured or not.
    std::thread::sleep(Duration::from_secs(25));
    let before = switches(pid);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(woken(&before, &switches(pid)), [""; 0], "wake-ups in five idle seconds");
    world.finish();
}

/// What happens on every host all the time is none of an idle daemon's business: neighbours come,
/// get old and go, routes and addresses change, and a host that is no router solicits some on each
/// interface with a link-local address, at growing intervals.
#[test]
fn news_of_the_host_do_not_wake_an_idle_daemon() {
    let lab = Lab::new().unwrap();
    let (host, other) = (lab.namespace("host").unwrap(), lab.namespace("other").unwrap());
    millrace_lab::lab::link((&host, "veth0"), (&other, "veth1")).unwrap();
    host.sysctl("net/ipv6/conf/all/forwarding", "0").unwrap();
    host.ip(["addr add 192.0.2.1/24 dev veth0", "route add default via 192.0.2.2"]).unwrap();
    let options = GatewayOptions {
        private_key: random_key().unwrap(),
        addresses: vec!["10.77.0.1/24".into(), "fd77::1/64".into()],
        ..GatewayOptions::default()
    };
    let mut gateway = Gateway::start(&lab, &host, options).unwrap();
    let (pid, name) = (gateway.daemon().pid(), gateway.interface().to_owned());
    gateway.daemon().wait_for_log("ready", LIMIT).unwrap();
    let link = host.exec(&format!("ip -d link show {name}")).unwrap();
    assert!(link.contains("addrgenmode none") && !link.contains("MULTICAST"), "{link}");
    let addresses = host.exec(&format!("ip -6 addr show dev {name}")).unwrap();
    assert!(addresses.contains("fd77::1") && !addresses.contains("fe80"), "{addresses}");

    for place in ["all", &name] {
        let path = format!("/proc/sys/net/ipv4/conf/{place}/send_redirects");
        assert_eq!(host.exec(&format!("cat {path}")).unwrap().trim(), "0", "{path}");
    }

    // Ready or not, its threads still come to rest.
    let at_rest = || {
        let before = switches(pid);
        std::thread::sleep(Duration::from_millis(300));
        (before == switches(pid)).then_some(())
    };
    wait_for("all threads to rest", LIMIT, at_rest).unwrap();
    let before = switches(pid);
    // Solicitations would come one, five and thirteen seconds after the interface went up.
    for round in 0..28 {
        host.ip([
            format!("neigh replace 192.0.2.9 lladdr 02:00:00:00:00:{round:02x} dev veth0"),
            format!("addr add 192.0.2.{}/32 dev veth0", 100 + round),
            format!("route add 198.51.100.{round}/32 via 192.0.2.2"),
            "neigh del 192.0.2.9 dev veth0".into(),
        ])
        .unwrap();
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(woken(&before, &switches(pid)), [""; 0], "no packet came, and no timer runs");
}

/// Times that each thread of a process went to sleep, by its name and number. Unlike CPU time, this
/// is exact on a busy machine.
fn switches(pid: u32) -> BTreeMap<String, u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let count = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        line.to_owned()
    };
    tasks
        // A thread may end meanwhile.
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok())
        .map(|status| {
            let name = format!("{} {}", count(&status, "Name:"), count(&status, "Pid:"));
            (name, count(&status, "voluntary_ctxt_switches:").parse().unwrap())
        })
        .collect()
}

/// A line for each thread that ran between two counts.
fn woken(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> Vec<String> {
    let times = |name| after[name] - before.get(name).copied().unwrap_or(0);
    let ran = after.keys().filter(|name| before.get(*name) != after.get(*name));
    ran.map(|name| format!("{name}: {} times", times(name))).collect()
}

/// As the kernel's device: down it is silent and forgets its keys, up it is as configured.
#[test]
fn an_interface_set_down_is_silent_and_works_again_once_it_is_up() {
    let options = TunnelOptions { keepalive_s: [Some(1), None], ..TunnelOptions::default() };
    let mut world = World::new([Implementation::Millrace, Implementation::WireguardGo], &options);
    world.connect();
    let (namespace, name) =
        (world.tunnel.a.namespace().clone(), world.tunnel.a.interface().to_owned());
    let sessions = || {
        let state = common::ask(&name, "get=1\n\n");
        let count = |line: &str| state.lines().filter(|text| *text == line).count();
        (count("mr_session=up"), count("mr_session=none"))
    };
    assert_eq!(sessions(), (1, 0));
    let sent = || {
        let text = namespace.exec("cat /proc/net/snmp").unwrap();
        let line = text.lines().filter(|line| line.starts_with("Udp:")).nth(1).unwrap();
        line.split(' ').nth(4).unwrap().parse::<u64>().unwrap()
    };
    let routes = || {
        let show = |family| namespace.exec(&format!("ip {family} route show dev {name}")).unwrap();
        let mut lines: Vec<String> = (show("-4") + &show("-6"))
            .replace(" proto static", "")
            .lines()
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    let routes_before = routes();
    namespace.ip([format!("link set {name} down")]).unwrap();
    wait_for("the session to go", LIMIT, || (sessions() == (0, 1)).then_some(())).unwrap();
    assert!(routes().len() < routes_before.len());
    // The keepalive would go each second. The other side, started anew, asks for a session.
    let before = sent();
    world.tunnel.b.restart().unwrap();
    let ping = Ping { count: 3, marker: Some(world.watch.marker()), ..Ping::default() };
    let report = ping.run(&world.site.b.host, world.site.a.host_v4).unwrap();
    assert!(!report.complete(), "{report:?}");
    let refused = || (drop_count(&world.tunnel.a, "interface_down") > 0).then_some(());
    wait_for("an initiation to be refused", LIMIT, refused).unwrap();
    assert_eq!(sent() - before, 0, "datagrams of an interface that is down");

    // A reload keeps it down and takes the file over.
    world.tunnel.a.daemon().signal(libc::SIGHUP);
    world.tunnel.a.daemon().wait_for_log("reloaded", LIMIT).unwrap();
    assert_eq!(sessions(), (0, 1));
    assert!(!namespace.exec(&format!("ip link show {name}")).unwrap().contains("UP"));

    namespace.ip([format!("link set {name} up")]).unwrap();
    wait_for("a session", Duration::from_secs(10), || (sessions() == (1, 0)).then_some(()))
        .unwrap();
    wait_for("its routes", LIMIT, || (routes() == routes_before).then_some(())).unwrap();
    world.ping_again(&world.site.a, &world.site.b);
    // Down and up at once: both are seen.
    let asked = |world: &mut World| {
        world.tunnel.b.daemon().log().matches("Received handshake initiation").count()
    };
    let before = asked(&mut world);
    namespace.ip([format!("link set {name} down"), format!("link set {name} up")]).unwrap();
    let anew = || (asked(&mut world) > before).then_some(());
    wait_for("a new handshake", Duration::from_secs(10), anew).unwrap();
    wait_for("its routes", LIMIT, || (routes() == routes_before).then_some(())).unwrap();
    world.finish();
}

/// A name server that is silent at first, then knows one name of a thousand and one.
#[test]
fn names_that_nobody_answers_hold_nothing_up() {
    let lab = Lab::new().unwrap();
    let host = lab.namespace("names").unwrap();
    host.ip(["link set lo up", "addr add 192.0.2.53/32 dev lo"]).unwrap();
    let server = host.run(|| UdpSocket::bind("192.0.2.53:53").unwrap());
    let (name, directory) = (lab.interface_name(), lab.directory().to_owned());
    let (file, key) = (directory.join("names.toml"), directory.join("key"));
    let resolver = directory.join("resolv.conf");
    fs::write(&resolver, "nameserver 192.0.2.53\noptions timeout:1 attempts:1\n").unwrap();
    fs::write(&key, random_key().unwrap()).unwrap();
    let head = format!(
        "schema = 1\n[interface]\nname = \"{name}\"\nprivate_key_file = \"{}\"\n",
        key.display()
    );
    let mut toml = head.clone();
    for number in 0..=1000 {
        let host = if number == 0 { "late".to_owned() } else { format!("dead-{number}") };
        let mut key = [9; 32];
        key[..4].copy_from_slice(&i32::to_le_bytes(number));
        let key = millrace_config::PublicKey(key);
        toml += &format!(
            "[[peer]]\npublic_key = \"{}\"\nendpoint = \"{host}.example.net:51820\"\n",
            key.to_base64()
        );
    }
    fs::write(&file, toml).unwrap();
    let mut command = host.command("unshare");
    let script = "mount --bind \"$1\" /etc/resolv.conf && exec \"$0\" --config \"$2\"";
    command.args(["--mount", "sh", "-c", script]);
    command.arg(Implementation::Millrace.program().unwrap()).arg(&resolver).arg(&file);
    let mut daemon = Daemon::start(&directory, &name, command).unwrap();
    daemon.wait_for_log("ready", LIMIT).unwrap();
    let pid = daemon.pid();
    let threads = || switches(pid).keys().filter(|name| name.starts_with("look-up")).count();
    assert_eq!(threads(), 4);
    daemon.wait_for_log("could not be looked up", LIMIT).unwrap();
    assert_eq!(threads(), 4);
    let noted = || {
        let state = common::ask(&name, "get=1\n\n");
        let note = state.lines().find_map(|line| line.strip_prefix("mr_note="))?;
        note.contains("names of endpoints were not found: ").then(|| note.to_owned())
    };
    wait_for("status to tell", LIMIT, noted).unwrap();

    let (stop, server_ends) = (AtomicBool::new(false), Duration::from_millis(200));
    server.set_read_timeout(Some(server_ends)).unwrap();
    let found = || {
        let state = common::ask(&name, "get=1\n\n");
        state.contains("endpoint=198.51.100.7:51820\n").then_some(())
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                answer_names(&server);
            }
        });
        let result = wait_for("the name that is found late", Duration::from_secs(20), found);
        stop.store(true, Ordering::Relaxed);
        result.unwrap();
    });
    assert_eq!(threads(), 4);
    // No name any more: no thread.
    fs::write(&file, head).unwrap();
    daemon.signal(libc::SIGHUP);
    daemon.wait_for_log("reloaded", LIMIT).unwrap();
    wait_for("the threads to end", LIMIT, || (threads() == 0).then_some(())).unwrap();
    assert_eq!(noted(), None);
}

/// Answers one question (RFC 1035, section 4.1): `late.example.net` has one IPv4 address, others do
/// not exist.
fn answer_names(server: &UdpSocket) {
    let mut question = [0; 512];
    let Ok((len, from)) = server.recv_from(&mut question) else { return };
    // Header, labels up to the empty one, type, class; what follows (EDNS) is left out.
    let labels_end = 12 + question[12..len].iter().position(|byte| *byte == 0).unwrap() + 1;
    let is_known = question[12..len].starts_with(b"\x04late");
    let wants_v4 = question[labels_end..labels_end + 2] == [0, 1];
    let mut answer = question[..labels_end + 4].to_vec();
    let (code, answers) = (if is_known { 0 } else { 3 }, u8::from(is_known && wants_v4));
    answer[2..12].copy_from_slice(&[0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, 0]);
    if answers == 1 {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, 7]);
    }
    server.send_to(&answer, from).unwrap();
}

/// As systemd would: its socket, its variables, and a thread that hangs.
#[test]
fn systemd_is_told_of_reloads_and_of_threads_that_hang() {
    const LIMIT_US: u64 = 2_000_000;
    let lab = Lab::new().unwrap();
    let namespace = lab.namespace("systemd").unwrap();
    let (name, path) = (lab.interface_name(), lab.directory().join("notify"));
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let hear = || {
        let mut bytes = [0; 4096];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    let (file, key) = (lab.directory().join("unit.toml"), lab.directory().join("key"));
    fs::write(&key, random_key().unwrap()).unwrap();
    let toml = "schema = 1\n[interface]\nname = \"NAME\"\nprivate_key_file = \"KEY\"\n";
    let toml = toml.replace("NAME", &name).replace("KEY", &key.display().to_string());
    fs::write(&file, toml).unwrap();
    let mut command = namespace.command("/bin/sh");
    let script = "WATCHDOG_PID=$$ exec \"$0\" --config \"$1\"";
    command.args(["-c", script]).arg(Implementation::Millrace.program().unwrap()).arg(&file);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", LIMIT_US.to_string());
    let mut daemon = Daemon::start(lab.directory(), &name, command).unwrap();
    let ready = hear();
    assert!(ready.starts_with("READY=1\n") && ready.contains("STATUS=0 peers"), "{ready}");

    let start = Instant::now();
    for _ in 0..4 {
        assert_eq!(hear(), "WATCHDOG=1\n");
    }
    let took = start.elapsed();
    assert!(took > Duration::from_millis(1200) && took < Duration::from_secs(6), "{took:?}");

    let monotonic_us = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        time.tv_sec * 1_000_000 + time.tv_nsec / 1000
    };
    let before = monotonic_us();
    daemon.signal(libc::SIGHUP);
    let heard = || std::iter::repeat_with(hear).find(|text| text != "WATCHDOG=1\n").unwrap();
    let reloading = heard();
    let stamp = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    let stamp: i64 = stamp.trim().parse().unwrap();
    assert!((before..=monotonic_us()).contains(&stamp), "{before} {stamp}");
    assert_eq!(heard(), "READY=1\n");

    for thread in ["slow", "worker-0"] {
        let hung = HungThread::stop(daemon.pid(), thread).unwrap();
        daemon.wait_for_log(&format!("the thread {thread} does not"), LIMIT).unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.recv(&mut [0; 4096]).is_ok() {}
        std::thread::sleep(Duration::from_micros(LIMIT_US));
        let said = socket.recv(&mut [0; 4096]).map_err(|error| error.kind());
        assert_eq!(said, Err(ErrorKind::WouldBlock), "{thread} hangs");
        socket.set_nonblocking(false).unwrap();
        drop(hung);
        assert_eq!(hear(), "WATCHDOG=1\n", "{thread} goes on");
    }
    daemon.signal(libc::SIGTERM);
    assert_eq!(heard(), "STOPPING=1\n");
}

#[test]
fn bad_input_is_one_clear_error_with_its_exit_code() {
    let lab = Lab::new().unwrap();
    let namespace = lab.namespace("bad").unwrap();
    let program = Implementation::Millrace.program().unwrap();
    let key = lab.directory().join("key");
    fs::write(&key, random_key().unwrap()).unwrap();
    let name = lab.interface_name();
    let start = |toml: String| {
        let file = lab.directory().join("bad.toml");
        fs::write(&file, toml).unwrap();
        let mut command = namespace.command(&program);
        command.arg("--config").arg(&file);
        let output = namespace.output(&mut command, "").unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let head = |name: &str, port: u16| {
        format!(
            "schema = 1\n[interface]\nname = \"{name}\"\nlisten_port = {port}\n\
             private_key_file = \"{}\"\n",
            key.display()
        )
    };
    // An occupied port.
    let socket = namespace.run(|| UdpSocket::bind("0.0.0.0:51820").unwrap());
    let (code, said) = start(head(&name, 51820));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("51820") && said.contains("ss -ulpn"), "{said}");
    drop(socket);
    // A name that is taken.
    namespace.ip([format!("link add {name} type veth peer name other")]).unwrap();
    let (code, said) = start(head(&name, 51821));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&name) && said.contains("another name"), "{said}");
    // Two peers with one prefix.
    let peer = || {
        let key = random_key().unwrap();
        format!("[[peer]]\npublic_key = \"{key}\"\nallowed_ips = [\"10.9.0.0/16\"]\n")
    };
    let (code, said) = start(head("mrbad1", 51821) + &peer() + &peer());
    assert_eq!(code, Some(7), "{said}");
    assert!(said.contains("10.9.0.0/16"), "{said}");
    // Somebody else's route.
    namespace.ip(["route add blackhole 10.9.0.0/16"]).unwrap();
    let (code, said) = start(head("mrbad3", 51821) + &peer());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("10.9.0.0/16") && said.contains("routes = "), "{said}");
    assert!(namespace.exec("ip route show 10.9.0.0/16").unwrap().contains("blackhole"));
    // A missing key file.
    fs::remove_file(&key).unwrap();
    let (code, said) = start(head("mrbad2", 51821));
    assert_eq!(code, Some(7), "{said}");
    assert!(said.contains("genkey"), "{said}");
    assert!(!Path::new("/run/wireguard/mrbad2.sock").exists());
}

/// As `wg-quick`: a route that is there is never taken over.
#[test]
fn the_routes_of_others_stay() {
    let mut world = world();
    let (namespace, name) =
        (world.tunnel.a.namespace().clone(), world.tunnel.a.interface().to_owned());
    let file = config_file(&world, &world.tunnel.a);
    let good = fs::read_to_string(&file).unwrap();
    let shown = |net: &str| {
        let family = if net.contains(':') { "-6" } else { "-4" };
        namespace.exec(&format!("ip {family} route show {net}")).unwrap()
    };
    // By the tunnel itself, whoever made it: it stays as it is.
    namespace.ip([format!("route change 10.2.0.0/24 dev {name} mtu 1300")]).unwrap();
    for (net, foreign) in [
        ("10.3.0.0/16", "10.3.0.0/16 via 192.0.2.9 dev wan"),
        ("10.3.0.0/16", "blackhole 10.3.0.0/16"),
        ("fd03::/64", "fd03::/64 dev wan"),
    ] {
        namespace.ip([format!("route add {foreign}")]).unwrap();
        let before = shown(net);
        let stranger = random_key().unwrap();
        let more = format!(
            "{good}\n[[peer]]\npublic_key = \"{stranger}\"\nallowed_ips = [\"10.4.0.0/16\", \"{net}\"]\n"
        );
        fs::write(&file, more).unwrap();
        let refused = |world: &mut World| world.tunnel.a.daemon().log().matches(net).count();
        let said = refused(&mut world);
        world.tunnel.a.daemon().signal(libc::SIGHUP);
        wait_for("a refusal", LIMIT, || (refused(&mut world) > said).then_some(())).unwrap();
        let status = || common::fact(&world.tunnel.a, "config_error");
        let why = wait_for("status to tell", LIMIT, status).unwrap();
        assert!(why.contains(net) && why.contains("routes = "), "{why}");
        assert_eq!((shown(net), shown("10.4.0.0/16")), (before.clone(), String::new()));
        assert_eq!(world.tunnel.a.peers().unwrap().len(), 1);
        assert!(shown("10.2.0.0/24").contains("mtu 1300"));
        world.ping(&world.site.a, &world.site.b, 1);
        namespace.ip([format!("route del {foreign}")]).unwrap();
    }
    world.tunnel.a.daemon().signal(libc::SIGHUP);
    let taken = || shown("fd03::/64").contains(&name).then_some(());
    wait_for("the route that nobody has any more", LIMIT, taken).unwrap();
    world.finish();
}

#[test]
fn a_vanished_interface_ends_the_daemon_with_a_clear_error() {
    let mut world = world();
    let (namespace, name) =
        (world.tunnel.b.namespace().clone(), world.tunnel.b.interface().to_owned());
    namespace.ip([format!("link del {name}")]).unwrap();
    let daemon = world.tunnel.b.daemon();
    let ended = wait_for("the daemon to end", LIMIT, || daemon.ended()).unwrap();
    assert_eq!(ended.code(), Some(1));
    assert!(daemon.log().contains("is gone"), "{}", daemon.log_tail());
    world.finish();
}
