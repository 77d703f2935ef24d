//! Between the UAPI's view of a device and the device itself.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::time::Duration;

use millrace_config::key::{PublicKey, SecretKey};
use millrace_config::uapi::{DeviceState, Errno, PeerChange, PeerState, SetRequest};
use millrace_wg::Endpoint;
use millrace_wg::device::{self, Device, PeerRefused};
use millrace_wg::secret::Secret;
use millrace_wg::time::Clock;
use zeroize::Zeroizing;

use crate::control::Refusal;
use crate::facts::Facts;
use crate::link::Link;
use crate::steering::Steering;

/// Peers in the list of refused ones; further ones are only in the log.
const REFUSED_MAX: usize = 16;

/// Peers that were asked for and are not there, or are there and cannot work: for `status`, because
/// the kernel's answer, which is ours, does not tell.
#[derive(Debug, Default)]
pub struct RefusedPeers(BTreeMap<[u8; 32], String>);

impl RefusedPeers {
    fn add(&mut self, key: &millrace_wg::PublicKey, why: &dyn Display) {
        let peer = PublicKey(key.0).to_base64();
        tracing::warn!(peer, "a peer was refused: {why}");
        if self.0.len() < REFUSED_MAX {
            self.0.insert(key.0, format!("peer {peer} was refused: {why}"));
        }
    }
}

/// The answer to `get=1`.
pub fn state(
    device: &Device,
    facts: &Facts,
    refused: &RefusedPeers,
    steering: &Steering,
    link: &Link,
) -> DeviceState {
    let mut state = DeviceState {
        private_key: device.private_key().map(to_text_key),
        listen_port: facts.listen_port,
        fwmark: facts.fwmark(),
        peers: Vec::new(),
        facts: facts.lines(steering, link),
    };
    state.facts.extend(refused.0.values().map(|note| ("note".to_owned(), note.clone())));
    // Slots of peers in the order of `state.peers`, to give each prefix to its peer.
    let mut places = std::collections::HashMap::new();
    for view in device.peers() {
        places.insert(view.peer.slot, state.peers.len());
        let mut peer = peer_state(&view);
        if !view.can_handshake {
            let key = peer.public_key.to_base64();
            state.facts.push(("note".into(), format!("peer {key} cannot work: {LOW_ORDER}")));
        }
        if let Some(name) = facts.about.names.get(&peer.public_key) {
            peer.facts.push(("name".into(), name.clone()));
        }
        state.peers.push(peer);
    }
    for (net, slot) in device.allowed_ips() {
        if let Some(&place) = places.get(&slot) {
            state.peers[place].allowed_ips.push(net);
        }
    }
    state
}

/// Why a peer is there and no session ever will be.
const LOW_ORDER: &str = "its public key is a point of low order, which no private key has; ask the \
                         other side for its key";

/// Carries out `set=1`, in its order. An error leaves what was done before it, as in the kernel.
pub fn apply(
    device: &mut Device,
    refused: &mut RefusedPeers,
    clock: Clock,
    change: SetRequest,
) -> Result<(), Refusal> {
    if let Some(key) = change.private_key {
        let before: Vec<_> = device.peers().map(|view| view.peer.public_key).collect();
        device.set_private_key(clock, key.as_ref().map(to_secret));
        for key in before.iter().filter(|key| !device.has_peer(key)) {
            refused.add(key, &PeerRefused::OwnKey);
        }
    }
    if change.replace_peers {
        refused.0.clear();
        let named: std::collections::HashSet<[u8; 32]> =
            change.peers.iter().filter(|peer| !peer.remove).map(|peer| peer.public_key.0).collect();
        let gone: Vec<_> = device
            .peers()
            .map(|view| view.peer.public_key)
            .filter(|key| !named.contains(&key.0))
            .collect();
        for key in gone {
            device.remove_peer(clock, &key);
        }
    }
    change.peers.into_iter().try_for_each(|peer| apply_peer(device, refused, clock, peer))
}

fn apply_peer(
    device: &mut Device,
    refused: &mut RefusedPeers,
    clock: Clock,
    change: PeerChange,
) -> Result<(), Refusal> {
    let key = millrace_wg::PublicKey(change.public_key.0);
    if change.remove {
        refused.0.remove(&key.0);
        device.remove_peer(clock, &key);
        return Ok(());
    }
    let is_new = !device.has_peer(&key);
    if change.update_only && is_new {
        return Ok(());
    }
    let (removed, added): (Vec<_>, Vec<_>) =
        change.allowed_ips.into_iter().partition(|allowed| allowed.remove);
    let change = device::PeerChange {
        preshared_key: change.preshared_key.map(|key| key.as_ref().map_or(Secret::ZERO, to_secret)),
        endpoint: change.endpoint.map(|remote| Endpoint {
            remote: canonical(remote),
            local: None,
            ifindex: 0,
        }),
        keepalive: change.keepalive_seconds.map(|seconds| Duration::from_secs(seconds.into())),
        replace_allowed_ips: change.replace_allowed_ips,
        add_allowed_ips: added.into_iter().map(|allowed| allowed.net).collect(),
        remove_allowed_ips: removed.into_iter().map(|allowed| allowed.net).collect(),
    };
    match device.set_peer(clock, key, change) {
        Ok(()) => {
            if is_new && !device.can_handshake(&key) {
                let peer = PublicKey(key.0).to_base64();
                tracing::warn!(peer, "a peer cannot work: {LOW_ORDER}");
            }
            Ok(())
        }
        // The kernel also takes it without an error and does not add it, so that one list of peers
        // serves every device of a mesh.
        Err(why @ PeerRefused::OwnKey) => {
            refused.add(&key, &why);
            Ok(())
        }
        Err(why @ PeerRefused::TooMany { .. }) => {
            refused.add(&key, &why);
            Err(Refusal::new(Errno::NoMemory, why.to_string()))
        }
    }
}

fn peer_state(view: &device::PeerView<'_>) -> PeerState {
    let peer = view.peer;
    let mut state = PeerState::new(PublicKey(peer.public_key.0));
    state.preshared_key = (!view.preshared_key.is_zero()).then(|| to_text_key(view.preshared_key));
    let destination = peer.destination();
    let detoured = destination.is_some_and(|endpoint| endpoint.detour_slot().is_some());
    // What carries a detour has an address that means nothing to anybody.
    state.endpoint = destination.filter(|_| !detoured).map(|endpoint| endpoint.remote);
    state.keepalive_seconds = view.keepalive.map_or(0, |interval| interval.as_secs() as u16);
    state.last_handshake =
        view.handshake_at_wall.map_or((0, 0), |wall| (wall.as_secs(), wall.subsec_nanos()));
    state.rx_bytes = peer.received.bytes();
    state.tx_bytes = peer.sent.bytes();
    state.facts = vec![
        ("rx_packets".into(), peer.received.packets().to_string()),
        ("tx_packets".into(), peer.sent.packets().to_string()),
        ("staged".into(), view.staged.to_string()),
        ("session".into(), if view.has_session { "up" } else { "none" }.into()),
        ("path".into(), if detoured { "detour" } else { "direct" }.into()),
    ];
    state
}

fn canonical(address: std::net::SocketAddr) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn to_secret(key: &SecretKey) -> Secret {
    Secret::new(*key.bytes())
}

fn to_text_key(secret: &Secret) -> SecretKey {
    SecretKey::new(Zeroizing::new(*secret.expose()))
}
