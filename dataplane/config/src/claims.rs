//! What the peers of one file claim for themselves alone.

use std::collections::HashMap;

use ipnet::IpNet;

use crate::config::Peer;
use crate::key::PublicKey;

/// What peers may not share.
#[derive(Default)]
pub(crate) struct Claims {
    keys: HashMap<PublicKey, String>,
    names: HashMap<String, String>,
    nets: HashMap<IpNet, String>,
}

impl Claims {
    /// Takes a peer in. Returns the key and the sentence of each clash with an earlier peer.
    pub(crate) fn add(&mut self, peer: &Peer, label: &str) -> Vec<(&'static str, String)> {
        let mut clashes = Vec::new();
        if let Some(other) = self.keys.insert(peer.public_key, label.to_owned()) {
            clashes.push(("public_key", format!("{other} has the same key")));
        }
        if let Some(name) = &peer.name
            && let Some(other) = self.names.insert(name.clone(), label.to_owned())
        {
            clashes.push(("name", format!("{other} has the same name")));
        }
        for net in &peer.allowed_ips {
            if let Some(other) = self.nets.insert(*net, label.to_owned()) {
                clashes.push(("allowed_ips", format!("{net} is also at {other}")));
            }
        }
        clashes
    }
}
