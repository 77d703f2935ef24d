//! Relays of two makers, and clients of ours that run in a test's turn.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant as StdInstant};

use millrace_config::discovery::{Authorities, HttpUrl};
use millrace_control::relay_client::{RelayClient, RelayConfig, RelayEvent, Trust, Up};
use millrace_lab::{Daemon, Namespace, gateway, wait_for};
use millrace_path::Instant;
use millrace_path::derp::Gone;
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};

/// Far above what anything here takes, far below what a hung test may cost.
pub const LIMIT: Duration = Duration::from_secs(30);
pub const HTTP: &str = "127.0.0.1:3340";
pub const HTTPS: &str = "127.0.0.1:443";
/// The name in the certificates.
pub const NAME: &str = "relay.test";

/// A relay in the namespace of a test, of one maker or the other.
pub struct Relay {
    pub directory: tempfile::TempDir,
    pub daemon: Option<Daemon>,
    command: Box<dyn Fn() -> Command + Send + Sync>,
    ready: &'static str,
    starts: usize,
}

impl Relay {
    /// millrace-relay over plain HTTP and over TLS with a certificate of its own authority.
    pub fn ours(namespace: &Namespace, more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let made = Certificates::new(directory.path(), &[NAME, "127.0.0.1"]);
        let (key, config) = (directory.path().join("private.key"), directory.path().join("toml"));
        let text = format!(
            "schema = 1\n[relay]\nprivate_key_file = {key:?}\nworkers = 2\n{more}\n\
             [stun]\nlisten = []\n[http]\nlisten = [{HTTP:?}]\nrelay = true\n\
             [https]\nlisten = [{HTTPS:?}, \"127.0.0.2:443\"]\ncertificate_file = {:?}\nkey_file = {:?}\n",
            made.chain, made.key
        );
        fs::write(&config, text).unwrap();
        let inside = inside(namespace);
        let command = move || {
            let mut command = inside(gateway::own_program("millrace-relay").unwrap());
            command.args(["run", "--log-level", "debug", "--config"]).arg(&config);
            command
        };
        Self::start_as(directory, Box::new(command), "the relay is ready")
    }

    /// An unmodified derper over plain HTTP.
    pub fn derper(namespace: &Namespace) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (config, inside) = (directory.path().join("derper.json"), inside(namespace));
        let command = move || {
            let mut command = inside(peer("derper"));
            command.args(["-dev", "-c"]).arg(&config);
            command
        };
        Self::start_as(directory, Box::new(command), "")
    }

    /// An unmodified derper over TLS, with a certificate from files for a name or an address.
    pub fn derper_tls(namespace: &Namespace, host: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let made = Certificates::new(directory.path(), &[host]);
        let files = directory.path().join("files");
        fs::create_dir(&files).unwrap();
        fs::copy(&made.chain, files.join(format!("{host}.crt"))).unwrap();
        fs::copy(&made.key, files.join(format!("{host}.key"))).unwrap();
        let (config, inside) = (directory.path().join("derper.json"), inside(namespace));
        let command = move || {
            let mut command = inside(peer("derper"));
            command.arg("-c").arg(&config).args(["-a", HTTPS, "-http-port", "-1", "-stun=false"]);
            command.args(["-hostname", host, "-certmode", "manual", "-certdir"]).arg(&files);
            command
        };
        Self::start_as(directory, Box::new(command), "")
    }

    fn start_as(
        directory: tempfile::TempDir,
        command: Box<dyn Fn() -> Command + Send + Sync>,
        ready: &'static str,
    ) -> Self {
        let mut relay = Self { directory, daemon: None, command, ready, starts: 0 };
        relay.start();
        relay
    }

    /// Starts it, the second time with the key of the first.
    pub fn start(&mut self) {
        self.starts += 1;
        let name = format!("relay-{}", self.starts);
        let mut daemon = Daemon::start(self.directory.path(), &name, (self.command)()).unwrap();
        match self.ready {
            "" => {
                let listens = || {
                    let connects = |address| TcpStream::connect::<&str>(address).is_ok();
                    (connects(HTTP) || connects(HTTPS)).then_some(())
                };
                daemon.wait_for("its port", LIMIT, listens).unwrap();
            }
            said => daemon.wait_for_log(said, LIMIT).unwrap(),
        }
        self.daemon = Some(daemon);
    }

    pub fn kill(&mut self) {
        self.daemon.take().unwrap().kill();
    }

    pub fn log(&self) -> String {
        self.daemon.as_ref().unwrap().log()
    }

    /// The file of the authority that signed its certificate.
    pub fn authority(&self) -> PathBuf {
        self.directory.path().join("authority.pem")
    }
}

fn inside(namespace: &Namespace) -> impl Fn(PathBuf) -> Command + Send + Sync + use<> {
    let path = namespace.path();
    move |program| {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={path}")).arg("--").arg(program);
        command
    }
}

/// A program of the lab, or what to do about it.
pub fn peer(program: &str) -> PathBuf {
    gateway::installed_program(program).unwrap_or_else(|error| panic!("{error}"))
}

/// An authority and what it signed.
pub struct Certificates {
    pub chain: PathBuf,
    pub key: PathBuf,
}

impl Certificates {
    /// Valid now.
    pub fn new(directory: &Path, names: &[&str]) -> Self {
        Self::between(directory, names, 2000, 3000)
    }

    /// Valid from the beginning of one year to that of another.
    pub fn between(directory: &Path, names: &[&str], from: i32, to: i32) -> Self {
        let path = |name: &str| directory.join(name);
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let name = "the authority of a test";
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        let authority = params.self_signed(&key).unwrap();
        let issuer = rcgen::Issuer::new(params, key);
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.not_before = rcgen::date_time_ymd(from, 1, 1);
        params.not_after = rcgen::date_time_ymd(to, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(path("authority.pem"), authority.pem()).unwrap();
        fs::write(path("chain.pem"), certificate.pem()).unwrap();
        fs::write(path("key.pem"), key.serialize_pem()).unwrap();
        Self { chain: path("chain.pem"), key: path("key.pem") }
    }
}

pub fn url(text: &str) -> HttpUrl {
    HttpUrl::parse(text).unwrap()
}

pub fn plain() -> RelayConfig {
    RelayConfig::new(url(&format!("http://{HTTP}")))
}

/// TLS to `host`, trusting one authority.
pub fn secure(host: &str, authority: PathBuf) -> RelayConfig {
    let trust = Trust::Authorities(Authorities::File(authority));
    RelayConfig { trust, ..RelayConfig::new(url(&format!("https://{host}"))) }
}

/// What a client said, kept.
#[derive(Debug)]
pub enum Said {
    Connecting(String),
    Up(Up),
    Packet(PublicKey, Vec<u8>),
    PeerGone(PublicKey, Gone),
    Health(String),
    Restarting(Duration),
    Note(&'static str),
    Down(String, Duration),
}

/// A client with its private key and a clock.
pub struct Node {
    pub client: RelayClient,
    pub key: PublicKey,
    pub said: Vec<Said>,
    /// How often the box key was asked for.
    pub asked: usize,
    secret: SecretKey,
    start: StdInstant,
}

impl Node {
    pub fn new(config: RelayConfig, secret: u8) -> Self {
        let secret = SecretKey::from_bytes([secret; 32]);
        let key = secret.public_key();
        let client = RelayClient::new(config, key, Instant::default()).unwrap();
        let start = StdInstant::now();
        Self { client, key, said: Vec::new(), asked: 0, secret, start }
    }

    /// A node that is logged in.
    pub fn up(config: RelayConfig, secret: u8) -> Self {
        let mut node = Self::new(config, secret);
        node.wait_up();
        node
    }

    pub fn now(&self) -> Instant {
        Instant::from_nanos(self.start.elapsed().as_nanos() as u64)
    }

    pub fn send(&mut self, to: PublicKey, packet: &[u8]) {
        let now = self.now();
        self.client.send(now, to, packet);
        self.client.flush(now);
    }

    pub fn wait_up(&mut self) -> Up {
        self.wait("a login", |said| match said {
            Said::Up(up) => Some(up.clone()),
            _ => None,
        })
    }

    pub fn wait_down(&mut self) -> String {
        self.wait("a failure", |said| match said {
            Said::Down(failure, _) => Some(failure.clone()),
            _ => None,
        })
    }

    /// Runs alone until it has said something, which is forgotten with all before.
    pub fn wait<T>(&mut self, what: &str, wanted: impl Fn(&Said) -> Option<T>) -> T {
        let start = StdInstant::now();
        loop {
            let found = self.said.iter().enumerate();
            if let Some((at, found)) =
                found.filter_map(|(at, said)| Some((at, wanted(said)?))).next()
            {
                self.said.drain(..=at);
                return found;
            }
            assert!(start.elapsed() < LIMIT, "no {what}: {:?}", self.said);
            turn(&mut [self], Duration::from_millis(100));
        }
    }

    pub fn has_packet(&self) -> bool {
        self.packets() > 0
    }

    /// Packets that were not looked at yet.
    pub fn packets(&self) -> usize {
        self.said.iter().filter(|said| matches!(said, Said::Packet(..))).count()
    }

    /// The next packet.
    pub fn packet(&mut self) -> (PublicKey, Vec<u8>) {
        self.wait("packet", |said| match said {
            Said::Packet(from, packet) => Some((*from, packet.clone())),
            _ => None,
        })
    }

    fn work(&mut self) {
        let now = self.now();
        self.client.handle(now);
        let mut wanted = None;
        while let Some(event) = self.client.next_event() {
            self.said.push(match event {
                RelayEvent::Connecting(what) => Said::Connecting(what.to_string()),
                RelayEvent::NeedBoxKey { relay_key } => {
                    self.asked += 1;
                    wanted = Some(relay_key);
                    continue;
                }
                RelayEvent::Up(up) => Said::Up(up),
                RelayEvent::Packets(packets) => {
                    for (from, packet) in packets {
                        self.said.push(Said::Packet(from, packet.to_vec()));
                    }
                    continue;
                }
                RelayEvent::PeerGone { peer, why } => Said::PeerGone(peer, why),
                RelayEvent::Health(text) => Said::Health(text),
                RelayEvent::Restarting { reconnect_in, .. } => Said::Restarting(reconnect_in),
                RelayEvent::Note(note) => Said::Note(note),
                RelayEvent::Down { failure, retry_at } => {
                    Said::Down(failure.to_string(), retry_at.since(now))
                }
            });
        }
        if let Some(relay_key) = wanted {
            let key = BoxKey::agree(&self.secret, relay_key).unwrap();
            self.client.give_box_key(now, relay_key, key);
        }
    }
}

/// Waits until one of the nodes has something to do, or for `longest`, and lets it.
pub fn turn(nodes: &mut [&mut Node], longest: Duration) {
    use rustix::event::{PollFd, Timespec, poll};
    let mut wait = longest;
    for node in &*nodes {
        if let Some(deadline) = node.client.deadline() {
            wait = wait.min(deadline.since(node.now()));
        }
    }
    let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
    let interest = nodes.iter().map(|node| node.client.interest());
    let mut fds: Vec<_> = interest.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
    poll(&mut fds, Some(&wait)).unwrap();
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    for (node, ready) in nodes.iter_mut().zip(ready) {
        if ready || node.client.deadline().is_some_and(|deadline| deadline <= node.now()) {
            node.work();
        }
    }
}

/// Lets all nodes run until something holds.
pub fn until(nodes: &mut [&mut Node], what: &str, mut holds: impl FnMut(&[&mut Node]) -> bool) {
    let start = StdInstant::now();
    while !holds(nodes) {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        turn(nodes, Duration::from_millis(100));
    }
}

/// Waits for a TCP port of this namespace.
pub fn wait_for_port(address: SocketAddr) {
    let connects = || TcpStream::connect(address).ok().map(drop);
    wait_for(format!("port {address}"), LIMIT, connects).unwrap();
}
