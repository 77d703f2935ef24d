//! Whom to ask: what the command line says, or the configuration, with names looked up.

use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use millrace_config::config::EndpointName;
use millrace_config::discovery::{Authorities, Discovery, Proxy};
use millrace_config::{Config, Exit};
use millrace_control::clock;
use millrace_control::netcheck_driver::NetcheckServer;
use millrace_control::relay_client::RelayConfig;
use millrace_path::limits::NETCHECK_SERVERS_MAX;

use super::Arguments;
use crate::{Problem, client, lifecycle};

/// Where a relay's STUN service is.
const STUN_PORT: u16 = 3478;
/// Name servers are waited for no longer.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(5);
/// Where configurations are, each named as its interface; and the one that is asked when the command
/// line names nobody.
const FILES: &str = "/etc/millrace";
const USUAL_FILE: &str = "millrace.toml";

/// Whom to ask, and whether the router may be asked for a port.
pub(super) fn find(arguments: &Arguments) -> Result<(Vec<NetcheckServer>, bool), Problem> {
    let mut discovery = match file(arguments)? {
        Some(file) => read(&file)?,
        None => Discovery { proxy: Proxy::Environment, ..Discovery::default() },
    };
    for url in &arguments.relay {
        if !discovery.relay.iter().any(|known| known.url == *url) {
            discovery.relay.push(url.clone().into());
        }
    }
    for server in &arguments.stun {
        if !discovery.stun.contains(server) {
            discovery.stun.push(server.clone());
        }
    }
    if let Some(file) = &arguments.relay_ca_file {
        discovery.authorities = Authorities::File(file.clone());
    }
    if !discovery.is_on() {
        let whom =
            "the file's [discovery] names no relay and no STUN server; give --relay or --stun";
        return Err(Problem::new(Exit::ConfigInvalid, whom));
    }
    if discovery.relay.len() + discovery.stun.len() > NETCHECK_SERVERS_MAX {
        eprintln!("millrace: only the first {NETCHECK_SERVERS_MAX} servers are asked");
    }
    let port_mapping = discovery.port_mapping && !arguments.no_port_mapping;
    Ok((look_up(&discovery), port_mapping))
}

/// The configuration that is meant; none: the command line names whom to ask.
fn file(arguments: &Arguments) -> Result<Option<PathBuf>, Problem> {
    if let Some(file) = &arguments.config {
        return Ok(Some(file.clone()));
    }
    let usual = Path::new(FILES).join(USUAL_FILE);
    if let Some(name) = &arguments.interface {
        if let Some(file) = lifecycle::config_of(name) {
            return Ok(Some(file));
        }
        let file = Path::new(FILES).join(format!("{name}.toml"));
        if file.exists() {
            return Ok(Some(file));
        }
        let is_meant =
            |text: String| Config::from_toml(&text).is_ok_and(|c| c.interface.name == *name);
        if fs::read_to_string(&usual).is_ok_and(is_meant) {
            return Ok(Some(usual));
        }
        let shown = file.display();
        let why = format!(
            "no data plane runs for {name}, and there is no {shown}; give --relay, --stun or --config"
        );
        return Err(Problem::new(Exit::Usage, why));
    }
    if !arguments.relay.is_empty() || !arguments.stun.is_empty() {
        return Ok(None);
    }
    if usual.exists() {
        return Ok(Some(usual));
    }
    let running = client::choose(None).ok().and_then(|name| lifecycle::config_of(&name));
    let whom = "nobody to ask: give an interface that runs, --relay, --stun or --config";
    running.map(Some).ok_or_else(|| Problem::new(Exit::Usage, whom))
}

fn read(file: &Path) -> Result<Discovery, Problem> {
    let shown = file.display();
    let text = fs::read_to_string(file)
        .map_err(|error| Problem::new(Exit::ConfigInvalid, format!("reading {shown}: {error}")))?;
    let config = Config::from_toml(&text)
        .map_err(|problems| Problem::new(Exit::ConfigInvalid, format!("{shown}:\n{problems}")))?;
    Ok(config.discovery)
}

/// All names at once. One that is not found is said and left out; a relay's client will look again.
fn look_up(discovery: &Discovery) -> Vec<NetcheckServer> {
    let mut servers: Vec<NetcheckServer> = Vec::new();
    let mut names = Vec::new();
    for relay in &discovery.relay {
        names.push((relay.url.host.clone(), STUN_PORT));
        // As the control process reaches it.
        let config = Some(RelayConfig::of(relay, discovery));
        let name = relay.url.to_string();
        servers.push(NetcheckServer { name, relay: config, stun: Vec::new() });
    }
    for stun in &discovery.stun {
        names.push(match stun {
            EndpointName::Address(address) => (address.ip().to_string(), address.port()),
            EndpointName::Name(name, port) => (name.clone(), *port),
        });
        servers.push(NetcheckServer { name: stun.to_string(), relay: None, stun: Vec::new() });
    }
    servers.truncate(NETCHECK_SERVERS_MAX);
    let (sender, answers) = channel();
    let mut waiting: Vec<usize> = (0..servers.len()).collect();
    for (index, (host, port)) in names.into_iter().take(servers.len()).enumerate() {
        let sender = sender.clone();
        thread::spawn(move || {
            let found = (host.as_str(), port).to_socket_addrs();
            // Whoever asked may have given up.
            let _ = sender.send((index, found.map(|found| found.collect::<Vec<SocketAddr>>())));
        });
    }
    let end = clock::now() + LOOK_UP_LIMIT;
    while !waiting.is_empty() {
        let Ok((index, found)) = answers.recv_timeout(end.since(clock::now())) else { break };
        waiting.retain(|other| *other != index);
        let server = &mut servers[index];
        match found {
            Ok(found) => server.stun = found,
            Err(error) => eprintln!("millrace: {}: looking the name up: {error}", server.name),
        }
    }
    for index in waiting {
        let limit = LOOK_UP_LIMIT.as_secs();
        eprintln!("millrace: {}: no name server answered within {limit} s", servers[index].name);
    }
    servers
}
