//! A millrace gateway on a host behind a router: data plane and control process.

use std::{
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    Daemon, Error, Flow, Gateway, GatewayOptions, InnerPrefix, Lab, Marker, Peer, Relay, Result,
    gateway::own_program,
    keys::KeyPair,
    marker::random_bytes,
    nat::{Host, names_for},
    overlay, wait_for,
};

/// The UDP port of a gateway that is told none.
pub const PORT: u16 = 51820;

/// How long a control process may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What may differ between the two gateways.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// The UDP port.
    pub port: u16,
    /// More lines for `[discovery]`.
    pub discovery: String,
    /// More STUN servers than the relay's, `host:port`.
    pub stun: Vec<String>,
    /// Whether a control process runs from the start.
    pub control: bool,
    /// What its control process sees as /etc/resolv.conf.
    pub resolv_conf: Option<PathBuf>,
    /// More variables of its control process's environment.
    pub environment: Vec<(String, String)>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            port: PORT,
            discovery: "port_mapping = \"off\"\n".into(),
            stun: Vec::new(),
            control: true,
            resolv_conf: None,
            environment: Vec::new(),
        }
    }
}

/// How packets reach a peer, as `millrace status` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Path {
    /// To this address.
    Direct(SocketAddr),
    /// Through a relay.
    Relay,
    /// Not yet, or not any more.
    None,
}

/// One gateway.
#[derive(Debug)]
pub struct Node {
    /// Ended before the rest, whose files it would leave.
    control: Option<Daemon>,
    /// Where it runs.
    pub host: Host,
    /// Its data plane.
    pub gateway: Gateway,
    /// Its IPv4 address inside the tunnel.
    pub tunnel_v4: Ipv4Addr,
    /// Its IPv6 address inside the tunnel.
    pub tunnel_v6: Ipv6Addr,
    directory: PathBuf,
    resolv_conf: Option<PathBuf>,
    environment: Vec<(String, String)>,
    starts: u32,
}

/// Two gateways that know nothing of each other but the public key, and a relay.
#[derive(Debug)]
pub struct Pair {
    /// The gateways.
    pub nodes: [Node; 2],
    /// What is sent inside and must not be seen outside.
    pub marker: Marker,
}

impl Pair {
    /// Starts a gateway on each host, `first` before the other.
    pub fn start(
        lab: &Lab,
        relay: &Relay,
        hosts: [Host; 2],
        options: [NodeOptions; 2],
        first: usize,
    ) -> Result<Self> {
        let keys = [KeyPair::generate()?, KeyPair::generate()?];
        let [a, b] = random_bytes()?;
        // With its highest bit the second byte is none of a router's networks, 10.1 and on.
        let v4 = |number| Ipv4Addr::new(10, a | 0x80, b, number);
        let inside = InnerPrefix::random()?;
        let v6 = |number: u8| inside.address(77, number.into());
        let [host_a, host_b] = hosts;
        let start = |i: usize, host: Host| {
            let (near, far) = (1 + i as u8, 2 - i as u8);
            let servers = relay.discovery_and(&options[i].stun);
            let discovery = format!("\n[discovery]\n{servers}{}", options[i].discovery);
            let gateway = GatewayOptions {
                private_key: keys[i].private.clone(),
                listen_port: options[i].port,
                addresses: vec![format!("{}/24", v4(near)), format!("{}/64", v6(near))],
                peers: vec![Peer {
                    public_key: keys[1 - i].public.clone(),
                    allowed_ips: vec![format!("{}/32", v4(far)), format!("{}/128", v6(far))],
                    ..Peer::default()
                }],
                toml: discovery,
                ..GatewayOptions::default()
            };
            let gateway = Gateway::start(lab, &host.namespace, gateway)?;
            let mut node = Node {
                host,
                gateway,
                tunnel_v4: v4(near),
                tunnel_v6: v6(near),
                control: None,
                directory: lab.directory().to_owned(),
                resolv_conf: options[i].resolv_conf.clone(),
                environment: options[i].environment.clone(),
                starts: 0,
            };
            if options[i].control {
                node.start_control(lab)?;
            }
            Ok::<_, Error>(node)
        };
        let nodes = if first == 0 {
            let a = start(0, host_a)?;
            [a, start(1, host_b)?]
        } else {
            let b = start(1, host_b)?;
            [start(0, host_a)?, b]
        };
        Ok(Self { nodes, marker: Marker::random()? })
    }

    /// A stream inside the tunnel, from one gateway to the other.
    pub fn flow(&self, from: usize, interval: Duration) -> Result<Flow> {
        let [near, far] = [&self.nodes[from], &self.nodes[1 - from]];
        let to = SocketAddr::new(far.tunnel_v4.into(), 0);
        let (near, far) = (&near.host.namespace, &far.host.namespace);
        Flow::start(near, far, to, interval, self.marker)
    }

    /// The inner addresses, which must not be seen outside.
    pub fn inner_addresses(&self) -> Vec<IpAddr> {
        let both = self.nodes.iter();
        both.flat_map(|node| [node.tunnel_v4.into(), node.tunnel_v6.into()]).collect()
    }

    /// Waits until both gateways say the same kind of path; how long that took.
    pub fn wait_for(&self, direct: bool, limit: Duration) -> Result<Duration> {
        let start = Instant::now();
        let mut paths = [Path::None, Path::None];
        let what = if direct { "direct paths" } else { "paths through the relay" };
        let reached = wait_for(what, limit, || {
            for (path, node) in paths.iter_mut().zip(&self.nodes) {
                *path = node.path().unwrap_or(Path::None);
            }
            let is = |path: &Path| match path {
                Path::Direct(_) => direct,
                Path::Relay => !direct,
                Path::None => false,
            };
            paths.iter().all(is).then(|| start.elapsed())
        });
        reached.map_err(|error| {
            let whys = self.nodes.each_ref().map(|node| match node.why() {
                Ok(why) => format!("{why:#}"),
                Err(error) => error.to_string(),
            });
            Error::Unexpected(format!("{error}; there are {paths:?}\n{}", whys.join("\n")))
        })
    }

    /// Waits until both control processes have a relay, before which nothing can be asked of them.
    pub fn wait_until_ready(&mut self, limit: Duration) -> Result<()> {
        for node in &mut self.nodes {
            let mut last = Value::Null;
            let up = wait_for("a control process to be at the relay", limit, || {
                last = node.paths().unwrap_or_default();
                let relays = last["relays"].as_array()?;
                relays.iter().any(|relay| relay["up"] == true).then_some(())
            });
            let log = node.control.as_ref().map(Daemon::log_tail).unwrap_or_default();
            up.map_err(|error| Error::Unexpected(format!("{error}; it says {last:#}\n{log}")))?;
        }
        Ok(())
    }
}

impl Drop for Node {
    /// What a control process leaves: it may not take it away itself.
    fn drop(&mut self) {
        for ending in ["control", "control.pid"] {
            let left = format!("/run/millrace/{}.{ending}", self.gateway.interface());
            let _ = std::fs::remove_file(left);
        }
    }
}

impl Node {
    /// Starts the control process, again or for the first time.
    pub fn start_control(&mut self, lab: &Lab) -> Result<()> {
        self.starts += 1;
        let name = format!("{}-control-{}", self.gateway.interface(), self.starts);
        let mut command = self.host.namespace.command(own_program("millrace-control")?);
        command.arg("--config").arg(self.gateway.configuration_file());
        command.envs(self.environment.iter().cloned());
        names_for(lab, &mut command)?;
        if let Some(file) = &self.resolv_conf {
            overlay::apply(&mut command, file, "/etc/resolv.conf".as_ref())?;
        }
        self.control = Some(Daemon::start(&self.directory, &name, command)?);
        Ok(())
    }

    /// Kills the control process with SIGKILL.
    pub fn kill_control(&mut self) {
        if let Some(control) = self.control.take() {
            control.kill();
        }
    }

    /// The control process, while it runs.
    pub fn control(&mut self) -> Option<&mut Daemon> {
        self.control.as_mut()
    }

    /// What `millrace status --json` says: the data plane, and below `paths` the control process.
    pub fn status(&self) -> Result<Value> {
        let program = own_program("millrace")?;
        let line = format!("{} status {} --json", program.display(), self.gateway.interface());
        let text = self.host.namespace.exec(&line)?;
        serde_json::from_str(&text)
            .map_err(|error| Error::Unexpected(format!("`{line}` wrote {text:?}: {error}")))
    }

    /// What the control process says of relays, NAT and paths: `millrace.paths/1`.
    pub fn paths(&self) -> Result<Value> {
        self.ask(r#"{"request":"status"}"#)
    }

    /// Why the other gateway is reached as it is: `millrace.why/1`.
    pub fn why(&self) -> Result<Value> {
        let key = &self.gateway.options.peers[0].public_key;
        self.ask(&format!(r#"{{"request":"why","peer":"{key}"}}"#))
    }

    /// How packets reach the other gateway.
    pub fn path(&self) -> Result<Path> {
        let paths = self.paths()?;
        let peer = &paths["peers"][0];
        match peer["path"].as_str() {
            Some("direct") => {
                let address = peer["address"].as_str().and_then(|text| text.parse().ok());
                let bad = || Error::Unexpected(format!("a direct path without address: {peer}"));
                address.map(Path::Direct).ok_or_else(bad)
            }
            Some("relay") => Ok(Path::Relay),
            _ => Ok(Path::None),
        }
    }

    /// One request to the control process's socket, one answer.
    fn ask(&self, request: &str) -> Result<Value> {
        let path = format!("/run/millrace/{}.control", self.gateway.interface());
        let ask = || {
            let mut stream = UnixStream::connect(&path)?;
            stream.set_read_timeout(Some(ANSWER_LIMIT))?;
            writeln!(stream, "{request}")?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(serde_json::from_str(&answer)?)
        };
        ask().map_err(Error::system(format!("ask {path}")))
    }
}
