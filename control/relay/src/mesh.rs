//! Several relays that are one to their clients: each dials every other, hears which clients it
//! has, and hands it the packets for them.
//!
//! A packet passes at most two relays: what a mate forwarded goes to a connection of our own or
//! nowhere, so that no loop can form. [`mate`] is our side of a connection that we dialed, [`watch`]
//! what a mate that dialed us may ask for.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicUsize;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use millrace_path::derp::MeshKey;
use millrace_path::sealed::PublicKey;

use crate::limits;

pub mod mate;
pub mod url;
pub mod watch;
pub mod wire;

/// What all threads know of the other relays' clients.
#[derive(Debug)]
pub struct Mesh {
    pub key: MeshKey,
    /// How many mates we are connected to.
    pub connected: AtomicUsize,
    far: RwLock<HashMap<PublicKey, Far>>,
}

/// A client of other relays.
#[derive(Debug, Default)]
struct Far {
    /// The desks of the mates that have it, the first gets its packets.
    mates: Vec<u16>,
    /// Clients of ours that got packets from it, and hear when it goes.
    heard_by: HashSet<PublicKey>,
}

impl Mesh {
    pub fn new(key: MeshKey) -> Self {
        Self { key, connected: AtomicUsize::new(0), far: RwLock::default() }
    }

    /// The desk of the mate that has a client.
    pub fn find(&self, key: &PublicKey) -> Option<u16> {
        self.read().get(key).and_then(|far| far.mates.first().copied())
    }

    /// A mate has a client.
    pub fn arrive(&self, key: PublicKey, mate: u16) {
        let mut table = self.write();
        let far = table.entry(key).or_default();
        if !far.mates.contains(&mate) {
            far.mates.push(mate);
        }
    }

    /// A mate no longer has a client. When no other has it: those of ours that heard it.
    pub fn leave(&self, key: &PublicKey, mate: u16) -> Option<HashSet<PublicKey>> {
        let mut table = self.write();
        let far = table.get_mut(key)?;
        far.mates.retain(|&known| known != mate);
        if !far.mates.is_empty() {
            return None;
        }
        table.remove(key).map(|far| far.heard_by)
    }

    /// A client of ours got a packet from one of a mate. A packet that is faster than the news of its
    /// sender is not noted; the next one is.
    pub fn heard(&self, from: &PublicKey, by: PublicKey) {
        let noted =
            |far: &Far| far.heard_by.contains(&by) || far.heard_by.len() >= limits::SENT_TO_MAX;
        // Nearly always it is noted, and then no thread waits for another.
        if self.read().get(from).is_none_or(noted) {
            return;
        }
        if let Some(far) = self.write().get_mut(from) {
            far.heard_by.insert(by);
        }
    }

    /// How many keys the mates have.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<PublicKey, Far>> {
        self.far.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<PublicKey, Far>> {
        self.far.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_gone_when_the_last_mate_has_lost_it() {
        let mesh = Mesh::new(MeshKey::from_hex(&"ab".repeat(32)).unwrap());
        let (far, near) = (PublicKey([1; 32]), PublicKey([2; 32]));
        mesh.heard(&far, near);
        assert!(mesh.is_empty(), "who is nowhere is not noted");
        mesh.arrive(far, 4);
        mesh.arrive(far, 4);
        mesh.arrive(far, 5);
        mesh.heard(&far, near);
        assert_eq!((mesh.find(&far), mesh.len()), (Some(4), 1));
        assert_eq!(mesh.leave(&far, 4), None);
        assert_eq!(mesh.find(&far), Some(5));
        assert_eq!(mesh.leave(&far, 5), Some(HashSet::from([near])));
        assert_eq!((mesh.find(&far), mesh.leave(&far, 5)), (None, None));
    }
}
