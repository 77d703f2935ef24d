//! IPv4 from a host that has IPv6 alone: real tayga, and the system's resolver asking real unbound.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;
use std::{env, thread};

use millrace_control::clock;
use millrace_control::nat64_driver::Nat64Driver;
use millrace_lab::nat::{Host, Internet, Ipv6, Router, RouterOptions, SERVER_V4};
use millrace_lab::{Lab, overlay};
use millrace_path::nat64::{Event, Prefix};
use millrace_path::stun;
use millrace_path::transaction::TransactionId;
use rustix::event::{PollFd, poll};

/// Set for the process that plays the host: its resolver is another one.
const ROLE: &str = "MILLRACE_NAT64_ROLE";
const STUN_PORT: u16 = 3478;
/// Generous: the machine may be loaded.
const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_stun_server_of_ipv4_alone_is_reached() {
    if env::var_os(ROLE).is_some() {
        return host();
    }
    let (lab, internet, router) = network();
    let host = router.host_v6_only(&lab, "host").unwrap();
    let nat64 = router.start_nat64(&lab, &internet).unwrap();
    let server = internet.server.run(|| UdpSocket::bind((SERVER_V4[0], STUN_PORT)).unwrap());
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((len, from)) = server.recv_from(&mut buffer) {
            if let Ok(answer) = stun::answer(&buffer[..len], from) {
                server.send_to(&answer, from).unwrap();
            }
        }
    });
    let said = play(&host, "a_stun_server_of_ipv4_alone_is_reached", &nat64.resolv_conf);
    let prefix = format!("prefix {}/96", nat64.prefix);
    assert!(said.contains(&prefix), "no \"{prefix}\" in: {said}");
    let mapped = format!("mapped {}", router.wan_v4());
    assert!(said.contains(&mapped), "no \"{mapped}\" in: {said}");
}

#[test]
fn a_missing_resolver_is_one_clear_error() {
    if env::var_os(ROLE).is_some() {
        let mut driver = Nat64Driver::new().unwrap();
        driver.network_changed(clock::now(), true);
        let Event::NoResolver(why) = next_event(&mut driver) else { panic!() };
        println!("said: {why}");
        assert!(driver.deadline().is_some(), "it is tried again");
        return;
    }
    let (lab, _internet, router) = network();
    let host = router.host_v6_only(&lab, "host").unwrap();
    let file = lab.directory().join("resolv.conf");
    // Nobody listens there, and that is said at once.
    std::fs::write(&file, "nameserver ::1\noptions timeout:1 attempts:1\n").unwrap();
    let said = play(&host, "a_missing_resolver_is_one_clear_error", &file);
    assert!(said.contains("said: ipv4only.arpa: "), "{said}");
    assert!(said.contains("check /etc/resolv.conf"), "{said}");
}

fn network() -> (Lab, Internet, Router) {
    let lab = Lab::new().unwrap();
    let internet = Internet::new(&lab).unwrap();
    let options = RouterOptions { ipv6: Ipv6::Firewall, ..RouterOptions::default() };
    let router = internet.router(&lab, "router", options).unwrap();
    (lab, internet, router)
}

/// Runs this test once more, on the host and with its resolver; what it printed.
fn play(host: &Host, test: &str, resolv_conf: &Path) -> String {
    let mut command = host.namespace.command(env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(ROLE, "host");
    overlay::apply(&mut command, resolv_conf, Path::new("/etc/resolv.conf")).unwrap();
    let output = host.namespace.output(&mut command, "").unwrap();
    let [said, errors] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{said}{errors}");
    said
}

/// The host's part: find the prefix, and ask the STUN server by it.
fn host() {
    let mut driver = Nat64Driver::new().unwrap();
    driver.network_changed(clock::now(), true);
    let Event::Prefixes(prefixes) = next_event(&mut driver) else { panic!("no prefix") };
    let [prefix]: [Prefix; 1] = prefixes.try_into().unwrap();
    println!("prefix {}/{}", prefix.address(), prefix.length());
    let server = SocketAddr::from((SERVER_V4[0], STUN_PORT));
    let socket = UdpSocket::bind("[::]:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let transaction = TransactionId([7; 12]);
    let mut buffer = [0; 1500];
    for _ in 0..LIMIT.as_secs() {
        let wire = driver.nat64().to_wire(server).unwrap();
        socket.send_to(&stun::binding_request(transaction), wire).unwrap();
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        assert_eq!(driver.nat64().from_wire(from), Some(server));
        let answer = stun::parse_response(&buffer[..len]).unwrap();
        assert_eq!(answer.transaction, transaction);
        println!("mapped {}", answer.mapped.ip());
        assert_ne!(answer.mapped.ip(), Ipv4Addr::UNSPECIFIED);
        return;
    }
    panic!("no answer");
}

fn next_event(driver: &mut Nat64Driver) -> Event {
    let limit = clock::now() + LIMIT;
    loop {
        if let Some(event) = driver.next_event() {
            return event;
        }
        assert!(clock::now() < limit, "no answer of the resolver");
        let deadline = driver.deadline().unwrap_or(limit).min(limit);
        let (fd, flags) = driver.interest();
        poll(&mut [PollFd::new(&fd, flags)], Some(&clock::until(deadline))).unwrap();
        driver.handle(clock::now());
    }
}
