//! What both halves know of a peer. Fields are facts published one by one or records swapped whole.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use crossbeam::utils::CachePadded;

use crate::session::TxSession;
use crate::time::AtomicInstant;

/// Position of a peer in every table of this device. Reused only after the peer is gone everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerSlot(pub u32);

/// A Curve25519 public key, 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PublicKey({:02x}{:02x}{:02x}{:02x}..)",
            self.0[0], self.0[1], self.0[2], self.0[3]
        )
    }
}

/// Where a peer's packets go: one record, replaced as a whole, never field by field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Canonical: an IPv4-mapped IPv6 address is written as IPv4.
    pub remote: SocketAddr,
    /// Our address that the peer last used, so that answers leave from it ("sticky source").
    pub local: Option<IpAddr>,
    /// Interface that the peer's last packet came in on; 0 = not known.
    pub ifindex: u32,
}

/// Flow label of a detour's address. No packet and no configuration makes one: who receives leaves
/// it zero, whatever was on the wire. So only [`Endpoint::detour`] makes a detour.
const DETOUR_LABEL: u32 = 0xd7_0e2;
/// 100::/64, where every router throws packets away (RFC 6666): should a detour ever be taken for
/// an address, nobody gets the packet.
const DETOUR_PREFIX: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0);

impl Endpoint {
    /// Not by UDP: handed, still sealed, to whoever carries messages to and from this peer by some
    /// other way. To everybody but the one who sends, an endpoint as any other.
    pub fn detour(peer: PeerSlot) -> Self {
        let ip = Ipv6Addr::from(u128::from(DETOUR_PREFIX) | u128::from(peer.0));
        let remote = SocketAddrV6::new(ip, 0, DETOUR_LABEL, 0).into();
        Self { remote, local: None, ifindex: 0 }
    }

    /// Whose detour it is; none for an address on the network.
    pub fn detour_slot(&self) -> Option<PeerSlot> {
        match self.remote {
            SocketAddr::V6(v6) if v6.flowinfo() == DETOUR_LABEL => {
                Some(PeerSlot(u128::from(*v6.ip()) as u32))
            }
            _ => None,
        }
    }
}

/// The way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    pub endpoint: Endpoint,
    /// Bytes of the longest inner packet, padding included, that passes; none: not known.
    pub inner_len_max: Option<u16>,
}

/// Decides where packets go, instead of the place that a peer last spoke from.
pub trait Paths: Send + Sync {
    /// None leaves it to roaming, as in the WireGuard paper, section 2.1. Asked once for every run of
    /// packets, so it must neither wait nor allocate.
    fn path(&self, peer: PeerSlot) -> Option<Path>;
}

/// One peer as the workers see it.
pub struct Peer {
    pub slot: PeerSlot,
    pub public_key: PublicKey,
    /// The session to send with; none until a handshake finished, or after it expired.
    pub tx_session: ArcSwapOption<TxSession>,
    /// Written by roaming (workers, handshakes) and by configuration.
    pub endpoint: ArcSwapOption<Endpoint>,
    pub activity: CachePadded<Activity>,
    pub received: CachePadded<Traffic>,
    pub sent: CachePadded<Traffic>,
    /// The peer was removed: workers drop what they still hold of it.
    pub gone: AtomicBool,
    paths: Option<Arc<dyn Paths>>,
}

/// What happened last, for the timers of the WireGuard paper, section 6. Workers write once a
/// batch; the slow thread derives each timer's deadline from these.
#[derive(Debug, Default)]
pub struct Activity {
    /// First data packet sent since anything authenticated was last received: plus
    /// `DEAD_PEER_TIMEOUT` is a new handshake.
    pub unanswered_since: AtomicInstant,
    /// First data packet received since anything was last sent: plus `KEEPALIVE_TIMEOUT` is a
    /// passive keepalive.
    pub unacknowledged_since: AtomicInstant,
    /// Any authenticated packet, either direction: persistent keepalive counts from here.
    pub authenticated_at: AtomicInstant,
    pub received_at: AtomicInstant,
    pub sent_at: AtomicInstant,
    /// The slow thread has a deadline for this peer and will look here by itself; while false, the
    /// first activity must send [`crate::FastEvent::Activity`].
    pub watched: AtomicBool,
    /// A handshake was asked for and not yet started: ask once, not once a packet.
    pub handshake_wanted: AtomicBool,
}

/// Packets and bytes of one direction. Bytes count whole data messages (header and tag
/// included), as `wg show` does.
#[derive(Debug, Default)]
pub struct Traffic {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Traffic {
    pub fn add(&self, packets: u64, bytes: u64) {
        self.packets.fetch_add(packets, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn packets(&self) -> u64 {
        self.packets.load(Ordering::Relaxed)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Peer {
    pub fn new(slot: PeerSlot, public_key: PublicKey, endpoint: Option<Endpoint>) -> Self {
        Self {
            slot,
            public_key,
            tx_session: ArcSwapOption::empty(),
            endpoint: ArcSwapOption::new(endpoint.map(Arc::new)),
            activity: CachePadded::default(),
            received: CachePadded::default(),
            sent: CachePadded::default(),
            gone: AtomicBool::new(false),
            paths: None,
        }
    }

    /// The same peer, whose packets go where `paths` says.
    pub fn with_paths(self, paths: Option<Arc<dyn Paths>>) -> Self {
        Self { paths, ..self }
    }

    /// How packets to the peer go now.
    pub fn path(&self) -> Option<Path> {
        let roamed = || {
            let endpoint = *self.endpoint.load().as_deref()?;
            Some(Path { endpoint, inner_len_max: None })
        };
        self.paths.as_ref().and_then(|paths| paths.path(self.slot)).or_else(roamed)
    }

    /// Where packets to the peer go now.
    pub fn destination(&self) -> Option<Endpoint> {
        self.path().map(|path| path.endpoint)
    }

    /// Takes `endpoint` over if it differs from the current one; true if it did. Call only for
    /// packets that verified and passed the replay check, or for valid handshakes. Another peer's
    /// detour is never taken over: whoever carries for that one must not get this one's packets.
    pub fn roam(&self, endpoint: Endpoint) -> bool {
        let same = self.endpoint.load().as_deref() == Some(&endpoint)
            || endpoint.detour_slot().is_some_and(|slot| slot != self.slot);
        if !same {
            self.endpoint.store(Some(Arc::new(endpoint)));
        }
        !same
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_detour_is_a_detour() {
        let detour = Endpoint::detour(PeerSlot(u32::MAX));
        assert_eq!(detour.detour_slot(), Some(PeerSlot(u32::MAX)));
        // The same address as a packet, a configuration file or `wg set` would give it.
        let text = format!("[{}]:0", detour.remote.ip());
        let remote: SocketAddr = text.parse().unwrap();
        assert_eq!(remote.ip(), detour.remote.ip());
        assert_eq!(Endpoint { remote, ..detour }.detour_slot(), None);
    }

    #[test]
    fn a_peer_roams_to_its_own_detour_and_to_no_other() {
        let peer = Peer::new(PeerSlot(3), PublicKey([1; 32]), None);
        assert!(!peer.roam(Endpoint::detour(PeerSlot(4))));
        assert_eq!(peer.destination(), None);
        assert!(peer.roam(Endpoint::detour(PeerSlot(3))));
        assert!(!peer.roam(Endpoint::detour(PeerSlot(3))));
        assert_eq!(peer.destination(), Some(Endpoint::detour(PeerSlot(3))));
    }
}
