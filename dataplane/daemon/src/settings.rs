//! A configuration file with the key files that it names.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use millrace_config::config::{EndpointName, KeySource, Peer};
use millrace_config::uapi::{AllowedIpChange, PeerChange, SetRequest};
use millrace_config::{Config, Exit, PublicKey, SecretKey};
use zeroize::Zeroizing;

use crate::failure::Failure;
use crate::look_up::NamedEndpoint;

/// What a file says, ready to be applied.
pub struct Settings {
    pub path: PathBuf,
    pub interface: Option<String>,
    pub config: Config,
    private_key: Option<SecretKey>,
    /// In the order of the peers.
    preshared_keys: Vec<Option<SecretKey>>,
}

impl Settings {
    /// Reads the file and the keys that it names. Every defect of the file is in the failure.
    pub fn read(path: &Path, interface: Option<&str>) -> Result<Self, Failure> {
        let shown = path.display();
        let bytes = fs::read(path).map(Zeroizing::new).map_err(|error| {
            Failure::new(
                Exit::ConfigInvalid,
                format!("reading {shown}: {error}"),
                "name a file that exists and that this user may read",
            )
        })?;
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            Failure::new(
                Exit::ConfigInvalid,
                format!("{shown} is no UTF-8 text: {error}"),
                "save it as plain text",
            )
        })?;
        let is_wg_quick = path.extension().is_some_and(|ending| ending == "conf");
        let parsed = if is_wg_quick {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            Config::from_wg_quick(text, interface.unwrap_or(&stem.unwrap_or_default()))
        } else {
            Config::from_toml(text)
        };
        let invalid = |problems: millrace_config::Problems| {
            Failure::new(
                Exit::ConfigInvalid,
                format!("{shown} is not valid:\n{problems}"),
                "nothing was changed",
            )
        };
        let config = parsed.map_err(invalid)?;
        let private_key = config.interface.private_key.as_ref().map(read_key).transpose()?;
        if let Some(key) = &private_key {
            config.check_own_key(&key.public_key()).map_err(invalid)?;
        }
        let preshared_keys = config
            .peers
            .iter()
            .map(|peer| peer.preshared_key.as_ref().map(read_key).transpose())
            .collect::<Result<_, _>>()?;
        let interface = interface.map(str::to_owned);
        Ok(Self { path: path.to_owned(), interface, config, private_key, preshared_keys })
    }

    /// Names of peers, for `status`.
    pub fn names(&self) -> HashMap<PublicKey, String> {
        let named = |peer: &Peer| Some((peer.public_key, peer.name.clone()?));
        self.config.peers.iter().filter_map(named).collect()
    }

    /// The same file again, as it is now.
    pub fn read_again(&self) -> Result<Self, Failure> {
        Self::read(&self.path, self.interface.as_deref())
    }

    /// The change that makes a device what the file says, but for endpoints that are names: those
    /// are to be looked up. Applied to a device that is so already, it changes nothing.
    pub fn to_change(&self) -> SetRequest {
        let peers = self.config.peers.iter().zip(&self.preshared_keys).map(|(peer, preshared)| {
            let endpoint = match &peer.endpoint {
                Some(EndpointName::Address(address)) => Some(*address),
                Some(EndpointName::Name(..)) | None => None,
            };
            peer_change(peer, preshared.clone(), endpoint)
        });
        SetRequest {
            private_key: Some(self.private_key.clone()),
            listen_port: None,
            fwmark: Some(self.config.interface.fwmark),
            replace_peers: true,
            peers: peers.collect(),
        }
    }

    /// The endpoints that are names.
    pub fn named_endpoints(&self) -> Vec<NamedEndpoint> {
        let named = |peer: &Peer| match &peer.endpoint {
            Some(EndpointName::Name(host, port)) => {
                Some(NamedEndpoint { peer: peer.public_key, host: host.clone(), port: *port })
            }
            _ => None,
        };
        self.config.peers.iter().filter_map(named).collect()
    }
}

fn peer_change(
    peer: &Peer,
    preshared: Option<SecretKey>,
    endpoint: Option<SocketAddr>,
) -> PeerChange {
    let allowed = |&net| AllowedIpChange { net, remove: false };
    PeerChange {
        preshared_key: Some(preshared),
        endpoint,
        keepalive_seconds: Some(peer.keepalive_seconds),
        replace_allowed_ips: true,
        allowed_ips: peer.allowed_ips.iter().map(allowed).collect(),
        ..PeerChange::new(peer.public_key)
    }
}

fn read_key(source: &KeySource) -> Result<SecretKey, Failure> {
    let path = match source {
        KeySource::Inline(key) => return Ok(key.clone()),
        KeySource::File(path) => path,
    };
    let failed = |seen: String, cure: &str| Failure::new(Exit::ConfigInvalid, seen, cure);
    let text = fs::read_to_string(path).map(Zeroizing::new).map_err(|error| {
        let cure = "make one with `millrace genkey` (keys) or `millrace genpsk` (preshared keys)";
        failed(format!("reading the key file {}: {error}", path.display()), cure)
    })?;
    SecretKey::from_base64(text.trim()).map_err(|error| {
        let cure = "a key file holds one line of 44 characters, as `millrace genkey` prints it";
        failed(format!("the key file {}: {error}", path.display()), cure)
    })
}
