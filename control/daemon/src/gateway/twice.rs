//! Disco has two ways in: the socket of the port, and past the host's firewall (the data plane tells
//! of it). What the firewall lets in comes both ways, and is taken once.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;

use crate::limits::TWICE_MAX;

/// One way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Socket,
    PastFirewall,
}

/// The frames that came last. A frame has a random nonce, so that equal ones are the same one; what
/// comes twice the same way was repeated by somebody, which the path finder notices.
#[derive(Debug, Default)]
pub(super) struct Twice {
    keys: RandomState,
    last: VecDeque<(u64, Way)>,
}

impl Twice {
    /// Whether this frame has come the other way before.
    pub(super) fn was_taken(&mut self, way: Way, from: SocketAddr, frame: &[u8]) -> bool {
        let hash = self.keys.hash_one((from.ip(), from.port(), frame));
        let other = self.last.iter().rposition(|&(seen, by)| seen == hash && by != way);
        if let Some(at) = other {
            self.last.remove(at);
            return true;
        }
        if self.last.len() == TWICE_MAX {
            self.last.pop_front();
        }
        self.last.push_back((hash, way));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_counts_once_whichever_way_is_first() {
        let mut twice = Twice::default();
        let from: SocketAddr = "192.0.2.1:5".parse().unwrap();
        for (first, second) in [(Way::Socket, Way::PastFirewall), (Way::PastFirewall, Way::Socket)]
        {
            assert!(!twice.was_taken(first, from, b"frame"));
            assert!(!twice.was_taken(second, from, b"another"));
            assert!(twice.was_taken(second, from, b"frame"));
            // Gone again, and each of these is the first of its kind.
            assert!(twice.was_taken(first, from, b"another"));
            assert!(twice.last.is_empty());
        }
        assert!(!twice.was_taken(Way::Socket, from, b"frame"));
        assert!(!twice.was_taken(Way::Socket, from, b"frame"), "for the path finder to say");
        let elsewhere = "192.0.2.1:6".parse().unwrap();
        assert!(!twice.was_taken(Way::PastFirewall, elsewhere, b"frame"));
        (0..2 * TWICE_MAX as u64)
            .for_each(|n| _ = twice.was_taken(Way::Socket, from, &n.to_ne_bytes()));
        assert_eq!(twice.last.len(), TWICE_MAX);
    }
}
