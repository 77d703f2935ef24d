//! Where each key is connected: the one table that all workers share.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use millrace_path::sealed::PublicKey;

/// Parts of the table, so that workers seldom wait for each other's lock.
const SHARDS: usize = 64;

/// A connection of a worker. The generation tells it from the next one in the same slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub worker: u16,
    pub slot: u32,
    pub generation: u32,
}

/// The connections of one key, the one that gets its packets last.
type Places = Vec<Place>;

/// All clients that are logged in.
#[derive(Debug)]
pub struct Registry {
    shards: [RwLock<HashMap<PublicKey, Places>>; SHARDS],
}

impl Default for Registry {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| RwLock::default()) }
    }
}

impl Registry {
    /// Where packets for a key go.
    pub fn find(&self, key: &PublicKey) -> Option<Place> {
        let shard = self.shard(key).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(key).and_then(|places| places.last().copied())
    }

    /// All connections of a key.
    pub fn places(&self, key: &PublicKey) -> Vec<Place> {
        let shard = self.shard(key).read().unwrap_or_else(PoisonError::into_inner);
        shard.get(key).cloned().unwrap_or_default()
    }

    /// All keys that are connected, each at some moment of the call.
    pub fn keys(&self) -> Vec<PublicKey> {
        let read = |shard: &RwLock<HashMap<_, _>>| {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            shard.keys().copied().collect::<Vec<_>>()
        };
        self.shards.iter().flat_map(read).collect()
    }

    /// Gives the key's packets to `place`, new or known. Returns who got them until now.
    pub fn activate(&self, key: PublicKey, place: Place) -> Option<Place> {
        let mut shard = self.shard(&key).write().unwrap_or_else(PoisonError::into_inner);
        let places = shard.entry(key).or_insert_with(|| Vec::with_capacity(1));
        let former = places.last().copied().filter(|&former| former != place);
        places.retain(|&known| known != place);
        places.push(place);
        former
    }

    /// Forgets a connection.
    pub fn remove(&self, key: &PublicKey, place: Place) -> Removed {
        let mut shard = self.shard(key).write().unwrap_or_else(PoisonError::into_inner);
        let Some(places) = shard.get_mut(key) else { return Removed::Unknown };
        let was_active = places.last() == Some(&place);
        places.retain(|&known| known != place);
        match places.last() {
            None => {
                shard.remove(key);
                Removed::Gone
            }
            Some(&heir) if was_active => Removed::Inherited(heir),
            Some(_) => Removed::Unknown,
        }
    }

    /// How many keys are connected.
    pub fn len(&self) -> usize {
        let len = |shard: &RwLock<HashMap<_, _>>| {
            shard.read().unwrap_or_else(PoisonError::into_inner).len()
        };
        self.shards.iter().map(len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, key: &PublicKey) -> &RwLock<HashMap<PublicKey, Places>> {
        &self.shards[usize::from(key.0[31]) % SHARDS]
    }
}

/// What the end of a connection means for its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// The key is no longer here.
    Gone,
    /// Another connection of it gets its packets from now on.
    Inherited(Place),
    /// Nothing changed for anybody.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_gets_the_packets_and_the_former_inherits() {
        let registry = Registry::default();
        let key = PublicKey([7; 32]);
        let place = |slot| Place { worker: 0, slot, generation: 0 };
        assert_eq!(registry.activate(key, place(1)), None);
        assert_eq!(registry.activate(key, place(1)), None);
        assert_eq!(registry.activate(key, place(2)), Some(place(1)));
        assert_eq!(registry.find(&key), Some(place(2)));
        assert_eq!(registry.activate(key, place(1)), Some(place(2)));
        assert_eq!(registry.remove(&key, place(1)), Removed::Inherited(place(2)));
        assert_eq!(registry.remove(&key, place(1)), Removed::Unknown);
        assert_eq!((registry.find(&key), registry.len()), (Some(place(2)), 1));
        assert_eq!(registry.remove(&key, place(2)), Removed::Gone);
        assert!(registry.is_empty());
        assert_eq!(registry.remove(&key, place(2)), Removed::Unknown);
    }
}
