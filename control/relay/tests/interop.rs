//! Against parties that nobody here wrote: Tailscale's client through our relay, our client through
//! an unmodified derper, and both at once.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::path::Path;

use common::*;
use millrace_config::PublicKey as HexKey;
use millrace_lab::{Daemon, Namespace, go_module};
use millrace_path::derp::{Frame, Gone};
use millrace_path::sealed::PublicKey;
use millrace_path::stun;
use millrace_path::transaction::TransactionId;

const DISCO: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];

/// Runs the stock client's checks; each prints a line, the last says that all hold.
fn check(namespace: &Namespace, arguments: &[&str]) {
    let mut command = namespace.command(lab("derp-peer"));
    let output = namespace.output(command.arg("check").args(arguments), "").unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.ends_with("all ok\n"), "{said}{output:?}");
    assert_eq!(said.lines().filter(|line| line.starts_with("ok: ")).count(), 8, "{said}");
}

/// A stock client that sends everything back, and its key.
fn echo(namespace: &Namespace, directory: &Path, url: &str) -> (Daemon, PublicKey) {
    let mut command = namespace.command(lab("derp-peer"));
    command.args(["echo", url]);
    let mut daemon = Daemon::start(directory, "echo", command).unwrap();
    daemon.wait_for_log("key ", LIMIT).unwrap();
    let log = daemon.log();
    let hex = log.lines().find_map(|line| line.strip_prefix("key ")).unwrap();
    (daemon, PublicKey(HexKey::from_hex(hex).unwrap().0))
}

/// An unmodified derper on the ports of our own relay.
fn derper(namespace: &Namespace, directory: &Path) -> Daemon {
    let mut command = namespace.command(lab("derper"));
    command.args(["-dev", "-c"]).arg(directory.join("derper.json"));
    let mut daemon = Daemon::start(directory, "derper", command).unwrap();
    let listens = || {
        let connected = namespace.run(|| std::net::TcpStream::connect(HTTP));
        connected.ok().map(drop)
    };
    daemon.wait_for("its port", LIMIT, listens).unwrap();
    daemon
}

#[test]
fn stock_clients_meet_through_our_relay() {
    let relay = Relay::start("");
    check(&relay.namespace, &["-stun", STUN, &format!("http://{HTTP}/derp")]);
    assert_eq!(relay.metric("stun_requests_total{result=\"answered\"}"), 1);
}

#[test]
fn stock_clients_start_fast_over_tls() {
    let relay = Relay::start_with(https);
    let chain = relay.directory.path().join("chain.pem");
    let chain = chain.to_str().unwrap();
    check(&relay.namespace, &["-ca", chain, "-stun", STUN, &format!("https://{HTTPS}/derp")]);
    let log = relay.daemon.log();
    assert_eq!(log.matches("fast_start: true").count(), 2, "{log}");
}

#[test]
fn our_client_and_a_stock_one_exchange_packets_through_our_relay() {
    let relay = Relay::start("");
    let url = format!("http://{HTTP}/derp");
    let (stock, key) = echo(&relay.namespace, relay.directory.path(), &url);
    let mut ours = relay.connect([1; 32]);
    exchange(&mut ours, key);
    // It hears of a second connection's end, and of the relay's.
    relay.daemon.signal(15);
    let mut stock = stock;
    stock.wait_for_log("restarting true 1m0s", LIMIT).unwrap();
}

#[test]
fn our_clients_meet_through_an_unmodified_derper() {
    let namespace = Namespace::new("derper").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let _derper = derper(&namespace, directory.path());
    let login = |n| Peer::login(Box::new(tcp(&namespace, HTTP)), [n; 32]).unwrap();
    let (mut a, mut b) = (login(1), login(2));
    assert_eq!(a.info.version, 2);
    for len in [0, 1, 148, 1420, 9000, 65_536] {
        let packet = vec![len as u8; len];
        a.send(b.key, &packet);
        b.expect_packet(a.key, &packet);
        b.send(a.key, &packet);
        a.expect_packet(b.key, &packet);
    }
    a.write(&Frame::NotePreferred(true));
    a.write(&Frame::Ping(*b"12345678"));
    assert_eq!(a.receive().frame(), Frame::Pong(*b"12345678"));
    let stranger = Peer::public([9; 32]);
    let disco = [&DISCO[..], &[0; 60]].concat();
    a.send(stranger, &disco);
    assert_eq!(a.receive().frame(), Frame::PeerGone { peer: stranger, why: Gone::NotHere });

    let (stock, key) = echo(&namespace, directory.path(), &format!("http://{HTTP}/derp"));
    exchange(&mut a, key);
    stock.kill();
    assert_eq!(a.receive().frame(), Frame::PeerGone { peer: key, why: Gone::Disconnected });

    let gone = b.key;
    drop(b);
    assert_eq!(a.receive().frame(), Frame::PeerGone { peer: gone, why: Gone::Disconnected });
    ask_stun(&namespace);
}

/// Packets of all sizes come back from the other side as they were.
fn exchange(ours: &mut Peer, echo: PublicKey) {
    for len in [0, 1, 32, 148, 1420, 16_384, 65_536] {
        let packet: Vec<u8> = (0..len).map(|i: usize| (i * 7 + len) as u8).collect();
        ours.send(echo, &packet);
        ours.expect_packet(echo, &packet);
    }
}

/// The answer to our 40 bytes names our own address.
fn ask_stun(namespace: &Namespace) {
    let socket = namespace.run(|| std::net::UdpSocket::bind("127.0.0.1:0")).unwrap();
    socket.connect(STUN).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let transaction = TransactionId([8; 12]);
    let request = stun::binding_request(transaction);
    assert_eq!(request.len(), 40);
    socket.send(&request).unwrap();
    let mut answer = [0; 1500];
    let len = socket.recv(&mut answer).unwrap();
    let response = stun::parse_response(&answer[..len]).unwrap();
    assert_eq!(response.transaction, transaction);
    assert_eq!(response.mapped, socket.local_addr().unwrap());
}

/// The versions in our go.mod files are the ones that setup installed.
#[test]
fn the_foreign_parties_are_of_the_pinned_version() {
    let pinned = |directory: &str, module: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(directory);
        let text = fs::read_to_string(path.join("go.mod")).unwrap();
        let lines = text.lines().map(|line| line.trim_start_matches("require "));
        let mut versions =
            lines.filter_map(|line| line.trim().strip_prefix(module)?.strip_prefix(' '));
        versions.next().unwrap().split(' ').next().unwrap().to_owned()
    };
    let check = |program: &str, directory: &str, module: &str| {
        let found = go_module::version(&lab(program), module).unwrap();
        assert_eq!(found, pinned(directory, module), "{program}: run scripts/setup");
    };
    for program in ["derper", "tailscaled", "tailscale", "derp-peer"] {
        check(program, "derp-peer", "tailscale.com");
    }
    check("headscale", "headscale", "github.com/juanfont/headscale");
}
