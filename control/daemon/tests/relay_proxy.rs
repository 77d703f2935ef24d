//! The ways to a relay: through a real proxy, by several addresses, with a firewall mark.
#![allow(clippy::unwrap_used, reason = "tests")]

mod relay;

use std::fs;
use std::io::Read;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant as StdInstant};

use millrace_control::limits;
use millrace_control::relay_client::dial::{Dial, Dialled};
use millrace_control::relay_client::{Proxy, RelayConfig};
use millrace_lab::{Daemon, Namespace, overlay};
use millrace_path::Instant;
use rustix::event::epoll::{self, CreateFlags};

use relay::*;

const PROXY: &str = "127.0.0.1:8888";
const PASSWORD: &str = "open sesame";

/// Runs a test inside a namespace of its own, where every port is free.
fn inside(test: impl FnOnce(&Namespace) + Send) {
    let namespace = Namespace::new("relay-proxy").unwrap();
    namespace.run(|| test(&namespace));
}

/// A tinyproxy that knows the relay's name and opens tunnels to port 443 alone.
fn tinyproxy(namespace: &Namespace, directory: &Path, more: &str) -> Daemon {
    let program = Path::new("/usr/bin/tinyproxy");
    assert!(program.exists(), "{} is missing: run scripts/setup", program.display());
    let (config, hosts) = (directory.join("tinyproxy.conf"), directory.join("hosts"));
    fs::write(&hosts, format!("127.0.0.1 localhost {NAME}\n")).unwrap();
    let text = "Port 8888\nListen 127.0.0.1\nTimeout 600\nMaxClients 20\nConnectPort 443\n";
    fs::write(&config, format!("{text}{more}\n")).unwrap();
    let mut command = namespace.command(program);
    command.arg("-d").arg("-c").arg(&config);
    overlay::apply(&mut command, &hosts, Path::new("/etc/hosts")).unwrap();
    let daemon = Daemon::start(directory, "tinyproxy", command).unwrap();
    wait_for_port(PROXY.parse().unwrap());
    daemon
}

/// To a relay whose name only the proxy knows.
fn through_proxy(authority: PathBuf, credentials: Option<PathBuf>) -> RelayConfig {
    let server =
        Proxy::Server { url: url(&format!("http://{PROXY}")), credentials_file: credentials };
    RelayConfig { proxy: server, ..secure(NAME, authority) }
}

fn carries(config: &RelayConfig) {
    let (mut a, mut b) = (Node::new(config.clone(), 1), Node::up(config.clone(), 2));
    let up = a.wait_up();
    assert!(up.proxied && up.address.to_string() == PROXY, "{up:?}");
    for len in [0, 100, 1_420, 65_536] {
        let packet = vec![7; len];
        a.send(b.key, &packet);
        until(&mut [&mut a, &mut b], "a packet", |nodes| nodes[1].has_packet());
        assert_eq!(b.packet(), (a.key, packet));
    }
}

#[test]
fn relays_of_both_makers_are_reached_through_a_proxy_that_alone_knows_their_name() {
    inside(|namespace| {
        let directory = tempfile::tempdir().unwrap();
        let proxy = tinyproxy(namespace, directory.path(), "");
        for start in
            [|n: &Namespace| Relay::ours(n, ""), |n: &Namespace| Relay::derper_tls(n, NAME)]
        {
            let mut relay = start(namespace);
            carries(&through_proxy(relay.authority(), None));
            relay.kill();
            let said = Node::new(through_proxy(relay.authority(), None), 1).wait_down();
            assert!(
                said.contains("the proxy answers 50") && said.contains("does not reach"),
                "{said}"
            );
        }
        // Another port than 443.
        let relay = Relay::ours(namespace, "");
        let plain = url(&format!("http://{NAME}:3340"));
        let config = RelayConfig { url: plain, ..through_proxy(relay.authority(), None) };
        let said = Node::new(config, 1).wait_down();
        assert!(said.contains("answers 403") && said.contains("does not allow"), "{said}");
        let said = Node::new(secure(NAME, relay.authority()), 1).wait_down();
        assert!(said.contains("relay.test could not be looked up"), "{said}");
        drop(proxy);
    });
}

#[test]
fn a_proxy_that_wants_a_password_gets_it_and_nobody_else_sees_it() {
    inside(|namespace| {
        let directory = tempfile::tempdir().unwrap();
        let _proxy = tinyproxy(
            namespace,
            directory.path(),
            &format!("BasicAuth user {}", PASSWORD.replace(' ', "_")),
        );
        let relay = Relay::ours(namespace, "");
        let file = |text: &str| {
            let path = directory.path().join("credentials");
            fs::write(&path, text).unwrap();
            Some(path)
        };
        let said = Node::new(through_proxy(relay.authority(), None), 1).wait_down();
        assert!(said.contains("answers 40") && said.contains("proxy_credentials_file"), "{said}");
        let wrong = through_proxy(relay.authority(), file("user:wrong\n"));
        let said = Node::new(wrong, 1).wait_down();
        assert!(said.contains("does not take this user and password"), "{said}");
        let said = Node::new(through_proxy(relay.authority(), file("nonsense")), 1).wait_down();
        assert!(said.contains("is not one line user:password"), "{said}");
        let config = through_proxy(relay.authority(), file("user:open_sesame\n"));
        carries(&config);
        let mut node = Node::new(config, 1);
        node.wait_up();
        let printed = format!("{:?} {:?}", node.client, node.said);
        assert!(!printed.contains("sesame"), "{printed}");
    });
}

/// Each is left after its limit, and told as what it is.
#[test]
fn a_proxy_that_hangs_or_is_none_ends_in_a_sentence() {
    inside(|namespace| {
        let relay = Relay::ours(namespace, "");
        let listener = TcpListener::bind(PROXY).unwrap();
        let config = through_proxy(relay.authority(), None);
        let begin = StdInstant::now();
        let said = Node::new(config.clone(), 1).wait_down();
        assert!(said.contains("no answer from 127.0.0.1:8888 while asking for a tunnel"), "{said}");
        assert!(begin.elapsed() >= limits::RELAY_CONNECT_LIMIT);
        let mut request = [0; 200];
        let len = listener.accept().unwrap().0.read(&mut request).unwrap();
        let request = str::from_utf8(&request[..len]).unwrap();
        assert_eq!(request, "CONNECT relay.test:443 HTTP/1.1\r\nHost: relay.test:443\r\n\r\n");
        let tls = Proxy::Server { url: url("https://127.0.0.1:1"), credentials_file: None };
        let said = Node::new(RelayConfig { proxy: tls, ..config }, 1).wait_down();
        assert!(said.contains("give its URL as http://"), "{said}");
    });
}

/// Dials until there is an outcome.
fn dial(addresses: &[&str], port: u16) -> (Dialled, Duration) {
    let epoll = epoll::create(CreateFlags::CLOEXEC).unwrap();
    let addresses: Vec<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
    let start = StdInstant::now();
    let now = || Instant::from_nanos(start.elapsed().as_nanos() as u64);
    let mut dial = Dial::new(&addresses, port, None, now());
    loop {
        match dial.poll(now(), &epoll) {
            Dialled::NotYet => std::thread::sleep(Duration::from_millis(1)),
            outcome => return (outcome, start.elapsed()),
        }
        assert!(start.elapsed() < LIMIT);
    }
}

#[test]
fn an_address_that_does_not_answer_costs_a_quarter_of_a_second() {
    inside(|namespace| {
        // Out by the loopback, where it belongs to nobody: no answer at all.
        namespace.exec("ip route add 192.0.2.0/24 dev lo").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (outcome, took) = dial(&["192.0.2.1", "127.0.0.1"], port);
        assert!(
            matches!(outcome, Dialled::Connected(_, to) if to.ip().is_loopback()),
            "{outcome:?}"
        );
        assert!(took >= limits::RELAY_ATTEMPT_GAP && took < Duration::from_secs(5), "{took:?}");
        // Who refuses costs nothing.
        let (outcome, _) = dial(&["::1", "192.0.2.1", "127.0.0.1"], port);
        assert!(matches!(outcome, Dialled::Connected(..)), "{outcome:?}");
        drop(listener);
        let (outcome, _) = dial(&["::1", "127.0.0.1"], port);
        assert!(matches!(outcome, Dialled::Failed(_)), "{outcome:?}");
    });
}

#[test]
fn a_mark_that_may_not_be_set_is_told_and_ends_nothing() {
    inside(|namespace| {
        let _relay = Relay::ours(namespace, "");
        let marked = || RelayConfig { mark: Some(51_820), ..plain() };
        let notes =
            |node: &Node| node.said.iter().filter(|said| matches!(said, Said::Note(_))).count();
        let mut node = Node::new(marked(), 1);
        until(&mut [&mut node], "a login", |nodes| nodes[0].client.is_up());
        assert_eq!(notes(&node), 0);
        std::thread::spawn(move || {
            for capability in [caps::Capability::CAP_NET_ADMIN, caps::Capability::CAP_NET_RAW] {
                caps::drop(None, caps::CapSet::Effective, capability).unwrap();
            }
            let mut node = Node::new(marked(), 1);
            until(&mut [&mut node], "a login", |nodes| nodes[0].client.is_up());
            assert_eq!(notes(&node), 1);
        })
        .join()
        .unwrap();
    });
}
