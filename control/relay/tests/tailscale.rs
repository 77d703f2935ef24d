//! Our relay as the only DERP node of a tailnet: two stock `tailscaled` under a stock `headscale`,
//! with no other way to each other, and a stock `tailscale netcheck`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::*;
use millrace_lab::{Daemon, Namespace, lab::link, wait_for};

/// Where relay and control server are, seen from both nodes.
const HUB: &str = "198.51.100.1";
const CONTROL: &str = "198.51.100.1:8080";
/// A registration, a map and a first path take tailscaled seconds on a busy machine.
const TAILSCALE_LIMIT: Duration = Duration::from_secs(40);
const REGION: u16 = 900;
const SINK_PORT: u16 = 7777;
/// The HTTP proxy of each tailscaled, by which its own host reaches into the tailnet.
const PROXY: &str = "127.0.0.1:1055";

/// Two nodes in namespaces of their own, joined by a router that forwards everything but UDP.
struct Tailnet {
    relay: Relay,
    nodes: [Node; 2],
    _headscale: Headscale,
}

/// The control server, which knows one relay.
struct Headscale {
    /// With it everybody may register.
    key: String,
    _daemon: Daemon,
}

struct Node {
    namespace: Namespace,
    directory: PathBuf,
    trusted: PathBuf,
    /// Its address in the tailnet.
    address: String,
    _daemon: Daemon,
}

impl Tailnet {
    fn start() -> Self {
        let hub = Namespace::new("hub").unwrap();
        hub.ip([format!("address add {HUB}/32 dev lo")]).unwrap();
        hub.sysctl("net/ipv4/ip_forward", "1").unwrap();
        hub.exec_with_input(
            "nft -f -",
            "table ip lab { chain forward { type filter hook forward priority 0; \
             meta l4proto udp counter drop; }; }",
        )
        .unwrap();
        let relay = Relay::start_at(&hub, |directory| {
            let (chain, key) = certificate(directory);
            format!(
                "[https]\nlisten = [\"{HUB}:443\"]\ncertificate_file = {chain:?}\n\
                 key_file = {key:?}\n[http]\nlisten = [\"{HUB}:80\"]\n\
                 [stun]\nlisten = [\"{HUB}:3478\"]\n"
            )
        });
        let directory = relay.directory.path();
        let headscale = Headscale::start(&hub, directory);
        let nodes = [1, 2].map(|number| Node::start(&hub, directory, &headscale.key, number));
        Self { relay, nodes, _headscale: headscale }
    }

    /// Datagrams between the nodes that the router dropped.
    fn blocked(&self) -> u64 {
        let rules = self.relay.namespace.exec("nft list table ip lab").unwrap();
        let words: Vec<&str> = rules.split_whitespace().collect();
        let at = words.iter().position(|&word| word == "packets").unwrap();
        words[at + 1].parse().unwrap()
    }
}

impl Headscale {
    fn start(hub: &Namespace, relay_directory: &Path) -> Self {
        let directory = relay_directory.join("headscale");
        std::fs::create_dir(&directory).unwrap();
        let configuration = Self::configure(&directory);
        let run = |arguments: &[&str]| {
            let mut command = hub.command(lab("headscale"));
            command.arg("--config").arg(&configuration).args(arguments).env("HOME", &directory);
            command
        };
        let mut daemon = Daemon::start(&directory, "headscale", run(&["serve"])).unwrap();
        daemon.wait_for_log("listening and serving HTTP on", TAILSCALE_LIMIT).unwrap();
        let ask = |arguments: &[&str]| {
            let output = hub.output(&mut run(arguments), "").unwrap();
            assert!(output.status.success(), "headscale {arguments:?}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        ask(&["users", "create", "lab"]);
        let key = ask(&["preauthkeys", "create", "--user", "1", "--reusable"]).trim().to_owned();
        Self { key, _daemon: daemon }
    }

    /// Writes its configuration, in which nothing is outside the lab.
    fn configure(directory: &Path) -> PathBuf {
        let map = directory.join("derp.yaml");
        let text = format!(
            "regions:
  {REGION}:
    {{regionid: {REGION}, regioncode: lab, regionname: lab, nodes: [
      {{name: lab-1, regionid: {REGION}, hostname: relay.test, ipv4: {HUB}, ipv6: none, canport80: true}}]}}
"
        );
        std::fs::write(&map, text).unwrap();
        let at = |name: &str| directory.join(name).display().to_string();
        let text = format!(
            "server_url: http://{CONTROL}
listen_addr: {CONTROL}
metrics_listen_addr: ''
unix_socket: {}
cli: {{timeout: 40s}}
disable_check_updates: true
noise: {{private_key_path: {}}}
database: {{type: sqlite, sqlite: {{path: {}}}}}
prefixes: {{v4: 100.64.0.0/10, v6: fd7a:115c:a1e0::/48}}
derp: {{server: {{enabled: false}}, urls: [], paths: [{}], auto_update_enabled: false}}
dns: {{magic_dns: false, override_local_dns: false}}
",
            at("socket"),
            at("noise.key"),
            at("database"),
            map.display(),
        );
        let configuration = directory.join("config.yaml");
        std::fs::write(&configuration, text).unwrap();
        configuration
    }
}

impl Node {
    /// A stock tailscaled, registered at the control server.
    fn start(hub: &Namespace, directory: &Path, key: &str, number: u8) -> Self {
        let namespace = Namespace::new(&format!("node {number}")).unwrap();
        link((hub, &format!("node{number}")), (&namespace, "up0")).unwrap();
        hub.ip([format!("address add 192.0.2.{}/31 dev node{number}", number * 2)]).unwrap();
        namespace
            .ip([
                format!("address add 192.0.2.{}/31 dev up0", number * 2 + 1),
                format!("route add default via 192.0.2.{}", number * 2),
            ])
            .unwrap();
        let trusted = directory.join("chain.pem");
        let directory = directory.join(format!("node{number}"));
        std::fs::create_dir(&directory).unwrap();
        let mut command = namespace.command(lab("tailscaled"));
        command
            .args(["--tun=userspace-networking", "--no-logs-no-support"])
            .arg(format!("--outbound-http-proxy-listen={PROXY}"))
            .arg(format!("--statedir={}", directory.display()))
            .arg(format!("--socket={}", directory.join("socket").display()))
            .env("SSL_CERT_FILE", &trusted)
            .env("HOME", &directory);
        let mut daemon = Daemon::start(&directory, "tailscaled", command).unwrap();
        let socket = directory.join("socket");
        daemon.wait_for("its socket", LIMIT, || socket.exists().then_some(())).unwrap();
        let mut node =
            Self { namespace, directory, trusted, address: String::new(), _daemon: daemon };
        let login = format!("--login-server=http://{CONTROL}");
        let key = format!("--auth-key={key}");
        let name = format!("--hostname=node{number}");
        node.tailscale(&["up", &login, &key, &name, "--accept-dns=false", "--timeout=40s"]);
        node.address = node.tailscale(&["ip", "-4"]).trim().to_owned();
        node
    }

    fn try_tailscale(&self, arguments: &[&str]) -> Output {
        let mut command: Command = self.namespace.command(lab("tailscale"));
        let socket = self.directory.join("socket");
        command.arg("--socket").arg(socket).args(arguments);
        command.env("SSL_CERT_FILE", &self.trusted).env("HOME", &self.directory);
        self.namespace.output(&mut command, "").unwrap()
    }

    fn tailscale(&self, arguments: &[&str]) -> String {
        let output = self.try_tailscale(arguments);
        assert!(output.status.success(), "tailscale {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a ping of another node says, once it is answered.
    fn ping(&self, other: &Self, kind: &[&str]) -> String {
        let arguments = [&["ping", "--until-direct=false", "--c=1", "--timeout=2s"], kind].concat();
        let arguments = [&arguments[..], &[&*other.address]].concat();
        wait_for(format!("an answer to {arguments:?}"), TAILSCALE_LIMIT, || {
            let output = self.try_tailscale(&arguments);
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            (output.status.success() && said.contains("pong from")).then_some(said)
        })
        .unwrap()
    }
}

/// Disco, the inner layer that tells where a path goes; then packets of WireGuard; then a stream.
#[test]
fn two_stock_tailscaled_reach_each_other_through_our_relay_alone() {
    let tailnet = Tailnet::start();
    let [a, b] = &tailnet.nodes;
    for (from, to) in [(a, b), (b, a)] {
        let said = from.ping(to, &[]);
        assert!(said.contains("via DERP(lab)"), "{said}");
        from.ping(to, &["--tsmp"]);
        from.ping(to, &["--icmp"]);
    }
    let sent = stream(a, b);

    let said = a.ping(b, &[]);
    assert!(said.contains("via DERP(lab)"), "{said}");
    assert!(tailnet.blocked() > 0, "nobody tried the direct path");
    assert_eq!(tailnet.relay.metric("clients"), 2);
    let relayed = tailnet.relay.metric("received_bytes_total");
    assert!(relayed > sent, "{relayed} bytes through the relay");
    netcheck(&tailnet);
}

/// A TCP connection inside the tunnel. Returns how many bytes it carried.
fn stream(from: &Node, to: &Node) -> u64 {
    let content = b"a stream through a relay\n".repeat(40_000);
    let listener = to.namespace.run(|| TcpListener::bind(("127.0.0.1", SINK_PORT))).unwrap();
    let mut proxy = tcp(&from.namespace, PROXY);
    write!(proxy, "CONNECT {}:{SINK_PORT} HTTP/1.1\r\n\r\n", to.address).unwrap();
    let (mut sink, _) = listener.accept().unwrap();
    sink.set_read_timeout(Some(TAILSCALE_LIMIT)).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        proxy.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&head));
    let mut got = vec![0; content.len()];
    std::thread::scope(|scope| {
        scope.spawn(|| proxy.write_all(&content).unwrap());
        sink.read_exact(&mut got).unwrap();
    });
    assert!(got == content, "the stream arrived changed");
    content.len() as u64
}

/// Once with UDP, once without: then its latency comes from HTTPS, and it looks for a portal.
fn netcheck(tailnet: &Tailnet) {
    const COMMON: [&str; 3] =
        ["\"PreferredDERP\":900", "\"RegionLatency\":{\"900\":", "\"IPv6\":false"];
    let [node, _] = &tailnet.nodes;
    let check = |expected: &[&str]| {
        let said = node.tailscale(&["netcheck", "--format=json"]);
        let plain: String = said.split_whitespace().collect();
        for part in COMMON.iter().chain(expected) {
            assert!(plain.contains(part), "no {part} in {said}");
        }
    };
    check(&[
        "\"UDP\":true",
        "\"IPv4\":true",
        "\"RegionV4Latency\":{\"900\":",
        "\"GlobalV4\":\"192.0.2.3:",
    ]);
    node.namespace
        .exec_with_input(
            "nft -f -",
            "table ip lab { chain output { type filter hook output priority 0; \
             meta l4proto udp drop; }; }",
        )
        .unwrap();
    check(&["\"UDP\":false", "\"IPv4\":true", "\"CaptivePortal\":false"]);
}
