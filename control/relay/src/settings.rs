//! The configuration file of the relay.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::limits;
use crate::mesh::url::RelayUrl;

mod reader;

/// All keys with their defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub private_key_file: PathBuf,
    pub workers: usize,
    pub connections_max: usize,
    pub connections_per_address: usize,
    pub drain_seconds: u64,
    pub https: Option<Https>,
    pub http: Http,
    pub acme: Option<AcmeSettings>,
    pub stun: Vec<SocketAddr>,
    /// None: everybody may use the relay.
    pub keys_file: Option<PathBuf>,
    pub mesh: Option<MeshSettings>,
    /// 0: no limit.
    pub bytes_per_second: u64,
    pub burst_bytes: u64,
    pub metrics: Option<SocketAddr>,
}

/// `[https]`:
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Https {
    pub listen: Vec<SocketAddr>,
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
}

/// `[acme]`:
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcmeSettings {
    /// DNS names and addresses of the certificate.
    pub names: Vec<String>,
    /// A mail address that the server may warn.
    pub contact: Option<String>,
    /// The URL of the server's directory.
    pub directory: String,
    pub ca_file: Option<PathBuf>,
    /// Account and certificate are kept here.
    pub state_directory: PathBuf,
}

impl AcmeSettings {
    /// Private key and chain, in one file so that the two are always of one order.
    pub fn certificate_file(&self) -> PathBuf {
        self.state_directory.join("certificate.pem")
    }
}

/// `[http]`:
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Http {
    pub listen: Vec<SocketAddr>,
    /// /derp also without TLS: for labs, and behind a proxy that ends TLS.
    pub relay: bool,
}

/// `[mesh]`:
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    pub key_file: PathBuf,
    pub peers: Vec<RelayUrl>,
    pub ca_file: Option<PathBuf>,
}

/// Table, key, whether a reload takes it over, default, sentence.
pub const KEYS: &[(&str, &str, bool, &str, &str)] = &[
    (
        "relay",
        "private_key_file",
        false,
        "/var/lib/millrace-relay/private.key",
        "the relay's own key; made on the first start",
    ),
    ("relay", "workers", false, "one for each core", "threads that carry packets"),
    ("relay", "connections_max", false, "100000", "connections beyond it are closed at once"),
    (
        "relay",
        "connections_per_address",
        false,
        "20000",
        "the same for one client address (IPv6: /64); all are one behind a proxy",
    ),
    ("relay", "drain_seconds", true, "2", "how long clients have to leave after SIGTERM"),
    ("https", "listen", false, "", "addresses with ports, usually [\"[::]:443\"]"),
    ("https", "certificate_file", true, "", "PEM chain, the server's certificate first"),
    ("https", "key_file", true, "", "PEM private key of the certificate"),
    (
        "http",
        "listen",
        false,
        "none",
        "addresses with ports for /generate_204, usually [\"[::]:80\"]",
    ),
    ("http", "relay", false, "false", "serve /derp without TLS too: for labs"),
    (
        "acme",
        "names",
        false,
        "",
        "names (or addresses) of a certificate that the relay gets itself",
    ),
    ("acme", "terms_agreed", false, "", "true: you agree to the terms of the ACME server"),
    ("acme", "contact", false, "none", "a mail address that the server may write to"),
    ("acme", "directory", false, ACME_DIRECTORY, "the URL of the ACME server's directory"),
    ("acme", "ca_file", false, "the system's", "PEM certificates that the server's must lead to"),
    ("acme", "state_directory", false, ACME_STATE, "where account and certificate are kept"),
    ("stun", "listen", false, "none", "UDP addresses with ports, usually [\"[::]:3478\"]"),
    ("admission", "keys_file", true, "everybody", "public keys that may log in, one a line"),
    ("mesh", "key_file", false, "", "64 hexadecimal digits that all relays of the mesh share"),
    (
        "mesh",
        "peers",
        false,
        "none",
        "the other relays, like [\"https://relay-b.example.net\"]; each must name this one too",
    ),
    ("mesh", "ca_file", false, "the system's", "PEM certificates that the others' must lead to"),
    ("rate", "bytes_per_second", true, "no limit", "what one client may send"),
    ("rate", "burst_bytes", true, "two of the largest packets", "what it may send at once"),
    ("metrics", "listen", false, "none", "address of /metrics, /healthz and /readyz"),
];

/// The tables of the file.
pub const TABLES: [&str; 9] =
    ["relay", "https", "acme", "http", "stun", "admission", "mesh", "rate", "metrics"];

pub(crate) const ACME_DIRECTORY: &str = "https://acme-v02.api.letsencrypt.org/directory";
pub(crate) const ACME_STATE: &str = "/var/lib/millrace-relay/acme";

impl Default for Settings {
    fn default() -> Self {
        Self {
            private_key_file: "/var/lib/millrace-relay/private.key".into(),
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            connections_max: limits::CONNECTIONS_DEFAULT,
            connections_per_address: limits::CONNECTIONS_PER_ADDRESS_DEFAULT,
            drain_seconds: limits::DRAIN_DEFAULT_S,
            https: None,
            http: Http::default(),
            acme: None,
            stun: Vec::new(),
            keys_file: None,
            mesh: None,
            bytes_per_second: 0,
            burst_bytes: limits::BURST_MIN,
            metrics: None,
        }
    }
}

impl Settings {
    /// Reads the TOML text. All problems of it come back, not only the first.
    pub fn from_toml(text: &str) -> Result<Self, millrace_config::Problems> {
        reader::read(text)
    }

    /// The other relays of the mesh.
    pub fn mates(&self) -> &[RelayUrl] {
        self.mesh.as_ref().map_or(&[], |mesh| &mesh.peers)
    }

    /// Whether everything that only a restart takes over is the same.
    pub fn same_after_reload(&self, new: &Self) -> bool {
        let Self { private_key_file, workers, acme, http, stun, mesh, metrics, .. } = self;
        let listen = |settings: &Self| settings.https.as_ref().map(|https| https.listen.clone());
        let limits = |settings: &Self| (settings.connections_max, settings.connections_per_address);
        (private_key_file, workers, acme, http, stun, mesh, metrics)
            == (
                &new.private_key_file,
                &new.workers,
                &new.acme,
                &new.http,
                &new.stun,
                &new.mesh,
                &new.metrics,
            )
            && limits(self) == limits(new)
            && listen(self) == listen(new)
    }
}
