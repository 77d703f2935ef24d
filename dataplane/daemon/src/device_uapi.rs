//! Between the UAPI's view of a device and the device itself.

use std::time::Duration;

use millrace_config::key::{PublicKey, SecretKey};
use millrace_config::uapi::{DeviceState, PeerChange, PeerState, SetRequest};
use millrace_wg::Endpoint;
use millrace_wg::device::{self, Device};
use millrace_wg::secret::Secret;
use millrace_wg::time::Clock;
use zeroize::Zeroizing;

use crate::control::Refusal;
use crate::facts::Facts;
use crate::steering::Steering;

/// The answer to `get=1`.
pub fn state(device: &Device, facts: &Facts, steering: &Steering) -> DeviceState {
    let mut state = DeviceState {
        private_key: device.private_key().map(to_text_key),
        listen_port: facts.listen_port,
        fwmark: facts.fwmark(),
        peers: Vec::new(),
        facts: facts.lines(steering),
    };
    // Slots of peers in the order of `state.peers`, to give each prefix to its peer.
    let mut places = std::collections::HashMap::new();
    for view in device.peers() {
        places.insert(view.peer.slot, state.peers.len());
        let mut peer = peer_state(&view);
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

/// Carries out `set=1`, in its order. An error leaves what was done before it, as in the kernel.
pub fn apply(device: &mut Device, clock: Clock, change: SetRequest) -> Result<(), Refusal> {
    if let Some(key) = change.private_key {
        device.set_private_key(clock, key.as_ref().map(to_secret));
    }
    if change.replace_peers {
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
    change.peers.into_iter().try_for_each(|peer| apply_peer(device, clock, peer))
}

fn apply_peer(device: &mut Device, clock: Clock, change: PeerChange) -> Result<(), Refusal> {
    let key = millrace_wg::PublicKey(change.public_key.0);
    if change.remove {
        device.remove_peer(clock, &key);
        return Ok(());
    }
    if change.update_only && !device.has_peer(&key) {
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
    // The kernel also takes a peer with its own key without a word, and does not add it.
    let _added = device.set_peer(clock, key, change);
    Ok(())
}

fn peer_state(view: &device::PeerView<'_>) -> PeerState {
    let peer = view.peer;
    let mut state = PeerState::new(PublicKey(peer.public_key.0));
    state.preshared_key = (!view.preshared_key.is_zero()).then(|| to_text_key(view.preshared_key));
    state.endpoint = peer.endpoint.load().as_deref().map(|endpoint| endpoint.remote);
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
