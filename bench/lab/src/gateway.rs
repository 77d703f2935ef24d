//! A WireGuard device in a namespace: ours, or one that nobody here wrote.

use std::{
    env, fs,
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{Daemon, Error, Lab, Namespace, Refusal, Result, refusal};

/// How long a device may take until its UAPI socket answers.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The data plane's program.
const DATAPLANE: &str = "millrace-dataplane";

/// Where scripts/setup puts programs, in `bin`, unless MILLRACE_LAB_ROOT says otherwise.
const LAB_ROOT: &str = "/opt/millrace-lab";

/// Whose WireGuard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Implementation {
    /// millrace-dataplane of this build.
    Millrace,
    /// The current wireguard-go (with GSO and GRO).
    WireguardGo,
    /// Debian's wireguard-go of 2022 (without).
    WireguardGoDebian,
    /// boringtun-cli.
    Boringtun,
    /// gotatun-cli.
    Gotatun,
}

/// One peer of a device.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    /// Its public key, base64.
    pub public_key: String,
    /// The preshared key, base64.
    pub preshared_key: Option<String>,
    /// Where it is, if known.
    pub endpoint: Option<SocketAddr>,
    /// Prefixes behind it.
    pub allowed_ips: Vec<String>,
    /// Persistent keepalive in seconds.
    pub keepalive_s: Option<u16>,
}

/// How to start a device.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Whose.
    pub implementation: Implementation,
    /// The private key, base64.
    pub private_key: String,
    /// The UDP port.
    pub listen_port: u16,
    /// Addresses with prefix length for the tunnel interface.
    pub addresses: Vec<String>,
    /// MTU of the tunnel interface, in bytes.
    pub mtu: u32,
    /// Mark of the outgoing packets.
    pub fwmark: Option<u32>,
    /// Whether addresses outside will change: boringtun as it comes connects a socket to each peer
    /// and then never recovers (seen with 0.7.1), so that is switched off.
    pub roams: bool,
    /// The peers; routes to their allowed prefixes are installed.
    pub peers: Vec<Peer>,
    /// Lines for millrace's TOML file; other implementations ignore them.
    pub toml: String,
    /// System calls that fail in the device's process.
    pub refusals: Vec<Refusal>,
    /// Whether the log holds more than errors. Off for measurements.
    pub verbose: bool,
}

impl Default for GatewayOptions {
    fn default() -> Self {
        Self {
            implementation: Implementation::Millrace,
            private_key: String::new(),
            listen_port: 51820,
            addresses: Vec::new(),
            mtu: 1420,
            fwmark: None,
            roams: false,
            peers: Vec::new(),
            toml: String::new(),
            refusals: Vec::new(),
            verbose: true,
        }
    }
}

/// A running device.
#[derive(Debug)]
pub struct Gateway {
    /// How it was started; a restart starts it so again.
    pub options: GatewayOptions,
    namespace: Namespace,
    directory: PathBuf,
    interface: String,
    daemon: Daemon,
}

/// What `wg show` says about one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its public key, base64.
    pub public_key: String,
    /// Where packets for it go.
    pub endpoint: Option<SocketAddr>,
    /// Its prefixes.
    pub allowed_ips: Vec<String>,
    /// Unix time of the last handshake in seconds, 0 if there was none.
    pub last_handshake_s: u64,
    /// Bytes received from it.
    pub received_bytes: u64,
    /// Bytes sent to it.
    pub sent_bytes: u64,
}

impl Implementation {
    /// Those that nobody here wrote and that are current.
    pub const PEERS: [Self; 3] = [Self::WireguardGo, Self::Boringtun, Self::Gotatun];

    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Millrace => "millrace",
            Self::WireguardGo => "wireguard-go",
            Self::WireguardGoDebian => "wireguard-go (Debian)",
            Self::Boringtun => "boringtun",
            Self::Gotatun => "gotatun",
        }
    }

    /// Its program; an error that names the cure if it is not there.
    pub fn program(self) -> Result<PathBuf> {
        match self {
            Self::Millrace => own_program(DATAPLANE),
            Self::WireguardGo => installed_program("wireguard-go"),
            Self::WireguardGoDebian => installed("/usr/bin/wireguard-go".into()),
            Self::Boringtun => installed_program("boringtun-cli"),
            Self::Gotatun => installed_program("gotatun"),
        }
    }
}

impl Gateway {
    /// Starts a device in `namespace` and waits until it is configured and up.
    pub fn start(lab: &Lab, namespace: &Namespace, options: GatewayOptions) -> Result<Self> {
        let interface = lab.interface_name();
        let directory = lab.directory().to_owned();
        let daemon = launch(&directory, namespace, &interface, &options)?;
        let namespace = namespace.clone();
        let mut gateway = Self { options, namespace, directory, interface, daemon };
        gateway.configure()?;
        Ok(gateway)
    }

    /// The tunnel interface's name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The configuration file that millrace runs with.
    pub fn configuration_file(&self) -> PathBuf {
        self.directory.join(format!("{}.toml", self.interface))
    }

    /// The namespace it runs in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Runs `wg set INTERFACE` with more words.
    pub fn set(&self, words: &str) -> Result<()> {
        self.namespace.exec(&format!("wg set {} {words}", self.interface)).map(drop)
    }

    /// Replaces the whole configuration by `wg setconf`, with text as in `wg0.conf`.
    pub fn set_configuration(&self, text: &str) -> Result<()> {
        let line = format!("wg setconf {} /dev/stdin", self.interface);
        self.namespace.exec_with_input(&line, text).map(drop)
    }

    /// What `wg show` says about the peers.
    pub fn peers(&self) -> Result<Vec<PeerStatus>> {
        let dump = self.namespace.exec(&format!("wg show {} dump", self.interface))?;
        dump.lines().skip(1).map(parse_peer).collect()
    }

    /// The status of the first peer.
    pub fn peer(&self) -> Result<PeerStatus> {
        let none = || Error::Unexpected(format!("{} has no peer", self.interface));
        self.peers()?.into_iter().next().ok_or_else(none)
    }

    /// Kills the process with SIGKILL and starts it again with the same options.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.signal(libc::SIGKILL);
        let gone = || self.daemon.ended();
        crate::wait_for("a killed device to end", START_LIMIT, gone)?;
        self.daemon = launch(&self.directory, &self.namespace, &self.interface, &self.options)?;
        self.configure()
    }

    fn configure(&mut self) -> Result<()> {
        let line = format!("wg show {} listen-port", self.interface);
        let namespace = self.namespace.clone();
        let socket = socket_path(&self.interface);
        self.daemon.wait_for("its UAPI socket answers", START_LIMIT, || {
            // `wg` removes a socket that is bound and does not listen yet.
            UnixStream::connect(&socket).ok()?;
            namespace.exec(&line).ok().filter(|port| !port.trim().is_empty())
        })?;
        if self.options.implementation != Implementation::Millrace {
            self.set_configuration(&configuration(&self.options))?;
            let interface = &self.interface;
            let mut lines = vec![format!("link set {interface} mtu {} up", self.options.mtu)];
            for address in &self.options.addresses {
                lines.push(format!("addr replace {address} dev {interface} nodad"));
            }
            self.namespace.ip(lines)?;
        }
        let routes = self.options.peers.iter().flat_map(|peer| &peer.allowed_ips);
        let routes = routes.map(|prefix| format!("route replace {prefix} dev {}", self.interface));
        self.namespace.ip(routes)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // A killed device leaves its socket; `wg show` would list it for ever.
        let _ = fs::remove_file(socket_path(&self.interface));
        if self.options.implementation == Implementation::Millrace {
            for suffix in ["pid", "link", "control", "control.pid"] {
                let _ = fs::remove_file(format!("/run/millrace/{}.{suffix}", self.interface));
            }
            let _ = fs::remove_file(format!("/var/lib/millrace/{}.timestamp", self.interface));
        }
    }
}

/// The text of `wg0.conf` for these options.
pub fn configuration(options: &GatewayOptions) -> String {
    let mut text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = {}\n",
        options.private_key, options.listen_port
    );
    if let Some(mark) = options.fwmark {
        text += &format!("FwMark = {mark}\n");
    }
    for peer in &options.peers {
        text += &format!("[Peer]\nPublicKey = {}\n", peer.public_key);
        if let Some(key) = &peer.preshared_key {
            text += &format!("PresharedKey = {key}\n");
        }
        if let Some(endpoint) = peer.endpoint {
            text += &format!("Endpoint = {endpoint}\n");
        }
        if let Some(seconds) = peer.keepalive_s {
            text += &format!("PersistentKeepalive = {seconds}\n");
        }
        if !peer.allowed_ips.is_empty() {
            text += &format!("AllowedIPs = {}\n", peer.allowed_ips.join(", "));
        }
    }
    text
}

fn launch(
    directory: &Path,
    namespace: &Namespace,
    interface: &str,
    options: &GatewayOptions,
) -> Result<Daemon> {
    // Some implementations remove the directory of their sockets when they end.
    fs::create_dir_all("/run/wireguard").map_err(Error::system("make /run/wireguard"))?;
    let mut command = namespace.command(options.implementation.program()?);
    let verbosity = |more, less| if options.verbose { more } else { less };
    match options.implementation {
        Implementation::Millrace => {
            let file = write_toml(directory, interface, options)?;
            command.arg("--config").arg(file);
        }
        Implementation::WireguardGo | Implementation::WireguardGoDebian => {
            command.args(["-f", interface]).env("LOG_LEVEL", verbosity("verbose", "error"));
            command.env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
        }
        Implementation::Boringtun | Implementation::Gotatun => {
            command.args(["-f", "--disable-drop-privileges", "-v", verbosity("debug", "error")]);
            if options.roams && options.implementation == Implementation::Boringtun {
                command.arg("--disable-connected-udp");
            }
            command.arg(interface);
        }
    }
    refusal::apply(&mut command, &options.refusals);
    Daemon::start(directory, interface, command)
}

/// Writes millrace's configuration file and the key files it names.
fn write_toml(directory: &Path, interface: &str, options: &GatewayOptions) -> Result<PathBuf> {
    let write_key = |name: String, key: &str| {
        let path = directory.join(name);
        write_secret(&path, key)?;
        Ok::<_, Error>(path.display().to_string())
    };
    let quote = |texts: &[String]| {
        texts.iter().map(|text| format!("{text:?}")).collect::<Vec<_>>().join(", ")
    };
    let key = write_key(format!("{interface}.key"), &options.private_key)?;
    let mut toml = format!(
        "schema = 1\n\n[interface]\nname = \"{interface}\"\nprivate_key_file = \"{key}\"\n\
         listen_port = {}\naddress = [{}]\nmtu = {}\n",
        options.listen_port,
        quote(&options.addresses),
        options.mtu
    );
    if let Some(mark) = options.fwmark {
        toml += &format!("fwmark = {mark}\n");
    }
    toml += &options.toml;
    for (i, peer) in options.peers.iter().enumerate() {
        toml += &format!("\n[[peer]]\nname = \"peer-{i}\"\npublic_key = \"{}\"\n", peer.public_key);
        if let Some(key) = &peer.preshared_key {
            let key = write_key(format!("{interface}-{i}.psk"), key)?;
            toml += &format!("preshared_key_file = \"{key}\"\n");
        }
        if let Some(endpoint) = peer.endpoint {
            toml += &format!("endpoint = \"{endpoint}\"\n");
        }
        if let Some(seconds) = peer.keepalive_s {
            toml += &format!("keepalive = \"{seconds}s\"\n");
        }
        toml += &format!("allowed_ips = [{}]\n", quote(&peer.allowed_ips));
    }
    let path = directory.join(format!("{interface}.toml"));
    fs::write(&path, toml).map_err(Error::system(format!("write {}", path.display())))?;
    Ok(path)
}

fn write_secret(path: &Path, key: &str) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| writeln!(file, "{key}"))
        .map_err(Error::system(format!("write {}", path.display())))
}

fn socket_path(interface: &str) -> PathBuf {
    Path::new("/run/wireguard").join(format!("{interface}.sock"))
}

/// A program of the lab; an error that names the cure if it is not there.
pub fn installed_program(name: &str) -> Result<PathBuf> {
    let root = env::var_os("MILLRACE_LAB_ROOT").unwrap_or_else(|| LAB_ROOT.into());
    installed(Path::new(&root).join("bin").join(name))
}

fn installed(path: PathBuf) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path);
    }
    Err(Error::Unexpected(format!("{} does not exist; run scripts/setup", path.display())))
}

/// A program of this build: beside MILLRACE_DATAPLANE, or beside the running executable.
pub fn own_program(name: &str) -> Result<PathBuf> {
    let path = match env::var_os("MILLRACE_DATAPLANE") {
        Some(path) if name == DATAPLANE => path.into(),
        Some(path) => Path::new(&path).with_file_name(name),
        None => {
            let own = env::current_exe().map_err(Error::system("find the running executable"))?;
            let beside = own.with_file_name(name);
            // A test's executable is one directory further down, in target/PROFILE/deps.
            let above = own.parent().and_then(Path::parent).map(|parent| parent.join(name));
            if beside.exists() { beside } else { above.unwrap_or(beside) }
        }
    };
    if path.exists() {
        return Ok(path);
    }
    let what = format!("{} does not exist; run cargo build -p {name}", path.display());
    Err(Error::Unexpected(what))
}

/// One line of `wg show INTERFACE dump`.
fn parse_peer(line: &str) -> Result<PeerStatus> {
    let fields: Vec<&str> = line.split('\t').collect();
    let &[public_key, _, endpoint, allowed_ips, handshake, received, sent, _] = fields.as_slice()
    else {
        return Err(Error::Unexpected(format!("`wg show dump` wrote the line {line:?}")));
    };
    let number = |text: &str| {
        let bad = |_| Error::Unexpected(format!("{text:?} in `wg show dump` is no number"));
        text.parse().map_err(bad)
    };
    let listed = |text: &str| text.split(',').map(str::to_owned).collect();
    Ok(PeerStatus {
        public_key: public_key.into(),
        endpoint: endpoint.parse().ok(),
        allowed_ips: if allowed_ips == "(none)" { Vec::new() } else { listed(allowed_ips) },
        last_handshake_s: number(handshake)?,
        received_bytes: number(received)?,
        sent_bytes: number(sent)?,
    })
}
