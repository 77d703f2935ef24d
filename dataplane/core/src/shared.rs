//! What the fast and the slow half share, and the events that go from fast to slow.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::allowed_ips::AllowedIps;
use crate::limits;
use crate::peer::{Peer, PeerSlot};
use crate::session::SessionTable;

/// One per device. Workers hold an `Arc` of it; nobody locks it.
pub struct Shared {
    /// Replaced as a whole on every change of configuration.
    pub tables: ArcSwap<Tables>,
    pub sessions: SessionTable,
}

impl Shared {
    /// `sessions_max`: three per peer plus handshakes in flight; rounded up to a power of two.
    pub fn new(sessions_max: usize) -> Self {
        Self {
            tables: ArcSwap::from_pointee(Tables::default()),
            sessions: SessionTable::new(sessions_max),
        }
    }
}

/// An immutable snapshot of the configuration that the packet path needs.
pub struct Tables {
    pub allowed_ips: AllowedIps<Arc<Peer>>,
    /// Inner MTU: padding never goes past it.
    pub mtu: u16,
}

impl Default for Tables {
    fn default() -> Self {
        Self { allowed_ips: AllowedIps::default(), mtu: limits::MTU_DEFAULT }
    }
}

/// What a worker tells the slow thread. All but staged packets are rare: flags in
/// [`crate::peer::Activity`] make the fast half say a thing once, so that none may be lost.
#[derive(Debug)]
pub enum FastEvent {
    /// First activity of a peer that the slow thread does not watch: look at its timers.
    Activity(PeerSlot),
    /// The first packet under the responder's newest key arrived (key confirmation).
    Confirmed { peer: PeerSlot, local_index: u32 },
    /// The session is old or worn: the initiator should make a new one.
    HandshakeWanted(PeerSlot),
    /// No usable session: keep this inner packet until there is one.
    Stage { peer: PeerSlot, packet: Box<[u8]> },
}
