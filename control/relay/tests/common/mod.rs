//! A relay of our own, started as an operator would, and a client made of our codec alone.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_lab::gateway::installed_program;
use millrace_lab::{Daemon, Namespace};
use millrace_path::derp::{ClientInfo, Cutter, Frame, Kind, MeshKey, ServerInfo};
use millrace_path::sealed::{BoxKey, PublicKey, SecretKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};

/// Far above what anything here takes, far below what a hung test may cost.
pub const LIMIT: Duration = Duration::from_secs(10);
pub const HTTP: &str = "127.0.0.1:3340";
pub const HTTPS: &str = "127.0.0.1:443";
pub const STUN: &str = "127.0.0.1:3478";
pub const METRICS: &str = "127.0.0.1:9589";
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_millrace-relay");

/// A relay in a network namespace of its own.
pub struct Relay {
    pub namespace: Namespace,
    pub directory: tempfile::TempDir,
    pub daemon: Daemon,
    /// Its address; all of its ports are there.
    host: String,
}

impl Relay {
    /// Plain HTTP, STUN and metrics; `more` is added to the configuration.
    pub fn start(more: &str) -> Self {
        Self::start_with(|_| more.to_owned())
    }

    /// As [`Self::start`]; `more` may put files into the directory it is given.
    pub fn start_with(more: impl FnOnce(&Path) -> String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let more = more(directory.path());
        configuration(directory.path(), &more);
        Self::start_in(Namespace::new("relay").unwrap(), directory)
    }

    /// As [`Self::start_with`], in a namespace that is already there.
    pub fn start_at(namespace: &Namespace, more: impl FnOnce(&Path) -> String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let more = more(directory.path());
        configuration(directory.path(), &more);
        Self::start_in(namespace.clone(), directory)
    }

    /// With the usual configuration, changed.
    pub fn start_edited(edit: impl FnOnce(String) -> String) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = configuration(directory.path(), "");
        fs::write(&path, edit(fs::read_to_string(&path).unwrap())).unwrap();
        Self::start_in(Namespace::new("relay").unwrap(), directory)
    }

    /// Beside another relay: on an address of its own. `more` is as in [`Self::start_with`].
    pub fn start_beside(
        namespace: &Namespace,
        host: &str,
        more: impl FnOnce(&Path) -> String,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let more = more(directory.path());
        let path = configuration(directory.path(), &more);
        let text = fs::read_to_string(&path).unwrap();
        let (first, mesh) = text.split_once("[mesh]").unwrap_or((&text, ""));
        fs::write(&path, first.replace("127.0.0.1", host) + "[mesh]" + mesh).unwrap();
        let host = host.to_owned();
        Self { host, ..Self::start_in(namespace.clone(), directory) }
    }

    fn start_in(namespace: Namespace, directory: tempfile::TempDir) -> Self {
        let config = directory.path().join("relay.toml");
        let mut command = namespace.command(PROGRAM);
        command.args(["run", "--log-level", "debug", "--config"]).arg(config);
        let mut daemon = Daemon::start(directory.path(), "relay", command).unwrap();
        daemon.wait_for_log("the relay is ready", LIMIT).unwrap();
        Self { namespace, directory, daemon, host: "127.0.0.1".to_owned() }
    }

    pub fn connect(&self, secret: [u8; 32]) -> Peer {
        Peer::login(self.plain(), secret).unwrap()
    }

    /// A connection that has said nothing yet.
    pub fn plain(&self) -> Stream {
        Box::new(tcp(&self.namespace, &self.at(HTTP)))
    }

    /// One of the addresses above, of this relay.
    pub fn at(&self, address: &str) -> String {
        address.replace("127.0.0.1", &self.host)
    }

    /// The value of one series of the metrics page.
    pub fn metric(&self, series: &str) -> u64 {
        let page = get(&self.namespace, &self.at(METRICS), "/metrics");
        let prefix = format!("millrace_relay_{series} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&prefix));
        line.unwrap_or_else(|| panic!("no {series} in\n{page}")).parse().unwrap()
    }

    /// Waits until a series has at least this value.
    pub fn wait_for_metric(&self, series: &str, at_least: u64) {
        let reached = || (self.metric(series) >= at_least).then_some(());
        millrace_lab::wait_for(format!("{series} to reach {at_least}"), LIMIT, reached).unwrap();
    }

    pub fn reload(&mut self) {
        let before = self.daemon.log().matches("reloaded").count();
        self.daemon.signal(1);
        let log = |daemon: &Daemon| daemon.log().matches("reloaded").count();
        let daemon = &self.daemon;
        millrace_lab::wait_for("a reload", LIMIT, || (log(daemon) > before).then_some(())).unwrap();
    }
}

/// Writes the configuration file of [`Relay::start`].
pub fn configuration(directory: &Path, more: &str) -> PathBuf {
    let path = directory.join("relay.toml");
    let key = directory.join("private.key");
    let text = format!(
        "schema = 1\n[relay]\nprivate_key_file = {key:?}\nworkers = 2\n\
         [metrics]\nlisten = {METRICS:?}\n{more}\n"
    );
    let http = format!("[http]\nlisten = [{HTTP:?}]\nrelay = true\n");
    let text = if more.contains("[http]") { text } else { text + &http };
    let stun = format!("[stun]\nlisten = [{STUN:?}]\n");
    let text = if more.contains("[stun]") { text } else { text + &stun };
    fs::write(&path, text).unwrap();
    path
}

/// Runs the program to its end.
pub fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

/// A self-signed certificate for `relay.test` and 127.0.0.1, and its key.
pub fn certificate(directory: &Path) -> (PathBuf, PathBuf) {
    let names = vec!["relay.test".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let (chain, key) = (directory.join("chain.pem"), directory.join("key.pem"));
    fs::write(&chain, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    (chain, key)
}

/// The [https] of a certificate.
pub fn https(directory: &Path) -> String {
    let (chain, key) = certificate(directory);
    format!("[https]\nlisten = [{HTTPS:?}]\ncertificate_file = {chain:?}\nkey_file = {key:?}\n")
}

pub trait ReadWrite: Read + Write + Send {}
impl<T: Read + Write + Send> ReadWrite for T {}
pub type Stream = Box<dyn ReadWrite>;

pub fn tcp(namespace: &Namespace, address: &str) -> TcpStream {
    let address: SocketAddr = address.parse().unwrap();
    let stream = namespace.run(|| TcpStream::connect_timeout(&address, LIMIT)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    // A login is two small writes: Nagle would wait between them.
    stream.set_nodelay(true).unwrap();
    stream
}

/// TLS that trusts one certificate.
pub fn tls(namespace: &Namespace, trusted: &Path) -> Stream {
    tls_to(namespace, HTTPS, trusted)
}

/// The same to another address; the name of the other side is always `relay.test`.
pub fn tls_to(namespace: &Namespace, address: &str, trusted: &Path) -> Stream {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(trusted).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("relay.test").unwrap();
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    Box::new(rustls::StreamOwned::new(session, tcp(namespace, address)))
}

/// One HTTP request; the whole answer.
pub fn get(namespace: &Namespace, address: &str, path: &str) -> String {
    let mut stream = tcp(namespace, address);
    write!(stream, "GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A frame with bytes of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    pub kind: Kind,
    pub payload: Vec<u8>,
}

impl Owned {
    pub fn frame(&self) -> Frame<'_> {
        Frame::parse(self.kind, &self.payload).unwrap()
    }
}

/// A client that is logged in.
pub struct Peer {
    pub stream: Stream,
    pub key: PublicKey,
    pub info: ServerInfo,
    bytes: Vec<u8>,
    cutter: Cutter,
    frames: VecDeque<Owned>,
}

impl Peer {
    /// The public key of a secret.
    pub fn public(secret: [u8; 32]) -> PublicKey {
        SecretKey::from_bytes(secret).public_key()
    }

    /// HTTP upgrade, the relay's key, our introduction, its answer.
    pub fn login(stream: Stream, secret: [u8; 32]) -> std::io::Result<Self> {
        Self::login_as(stream, secret, None)
    }

    /// As [`Self::login`], perhaps as another relay.
    pub fn login_as(
        mut stream: Stream,
        secret: [u8; 32],
        mesh_key: Option<MeshKey>,
    ) -> std::io::Result<Self> {
        let request =
            "GET /derp HTTP/1.1\r\nHost: r\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n";
        stream.write_all(request.as_bytes())?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        let info = ClientInfo { mesh_key, ..ClientInfo::default() };
        Self::introduce(stream, SecretKey::from_bytes(secret), &info)
    }

    fn introduce(stream: Stream, secret: SecretKey, info: &ClientInfo) -> std::io::Result<Self> {
        let mut peer = Self {
            stream,
            key: secret.public_key(),
            info: ServerInfo::default(),
            bytes: Vec::new(),
            cutter: Cutter::default(),
            frames: VecDeque::new(),
        };
        let first = peer.try_receive()?;
        let Frame::ServerKey(relay) = first.frame() else { panic!("{first:?}") };
        let key = BoxKey::agree(&secret, relay).unwrap();
        let mut out = Vec::new();
        info.write(peer.key, &key, rand::random(), &mut out);
        peer.stream.write_all(&out)?;
        let second = peer.try_receive()?;
        let Frame::ServerInfo { nonce, sealed } = second.frame() else { panic!("{second:?}") };
        peer.info = ServerInfo::open(&key, &nonce, sealed).unwrap();
        Ok(peer)
    }

    pub fn write(&mut self, frame: &Frame<'_>) {
        let mut out = Vec::new();
        frame.write(&mut out);
        self.stream.write_all(&out).unwrap();
    }

    pub fn send(&mut self, to: PublicKey, packet: &[u8]) {
        self.write(&Frame::SendPacket { to, packet });
    }

    /// The next frame, or the error that ended the stream.
    pub fn try_receive(&mut self) -> std::io::Result<Owned> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Ok(frame);
            }
            let mut buffer = vec![0; 65_536];
            let read = self.stream.read(&mut buffer)?;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            self.bytes.extend_from_slice(&buffer[..read]);
            let mut rest = &self.bytes[..];
            while let Some(raw) = self.cutter.next(&mut rest).unwrap() {
                self.frames.push_back(Owned { kind: raw.kind, payload: raw.payload.to_vec() });
            }
            self.bytes = rest.to_vec();
        }
    }

    pub fn receive(&mut self) -> Owned {
        self.try_receive().unwrap()
    }

    /// The next packet must be this one.
    pub fn expect_packet(&mut self, from: PublicKey, packet: &[u8]) {
        let got = self.receive();
        assert_eq!(got.frame(), Frame::RecvPacket { from, packet });
    }

    /// Waits until the relay ends the connection.
    pub fn expect_end(&mut self) {
        let start = Instant::now();
        while self.try_receive().is_ok() {
            assert!(start.elapsed() < LIMIT, "the connection goes on");
        }
    }
}

/// A program of the lab, or what to do about it.
pub fn lab(program: &str) -> PathBuf {
    installed_program(program).unwrap_or_else(|error| panic!("{error}"))
}
