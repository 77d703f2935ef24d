//! Longest-prefix match from inner address to peer, IPv4 and IPv6.

use std::marker::PhantomData;

/// Filled by configuration, read by every packet.
pub struct AllowedIps<V>(PhantomData<V>);

impl<V> Default for AllowedIps<V> {
    fn default() -> Self {
        Self(PhantomData)
    }
}
