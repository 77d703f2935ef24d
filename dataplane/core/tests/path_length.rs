//! What happens to packets that are longer than the path to their peer carries.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use millrace_wg::tx::{Push, TxBatch};
use millrace_wg::vnet::VnetHdr;
use millrace_wg::{Drop, DropCounters, Endpoint, Path, Paths, Peer, PeerSlot, PublicKey, Tables};

/// Bytes of the longest inner packet; 0: not known.
struct Limit(AtomicU16);

impl Paths for Limit {
    fn path(&self, _peer: PeerSlot) -> Option<Path> {
        let remote = "192.0.2.1:51820".parse().unwrap();
        let inner_len_max = Some(self.0.load(Ordering::Relaxed)).filter(|len| *len > 0);
        Some(Path { endpoint: Endpoint { remote, local: None, ifindex: 0 }, inner_len_max })
    }
}

struct World {
    limit: Arc<Limit>,
    tables: Tables,
    batch: TxBatch,
    drops: DropCounters,
}

impl World {
    fn new(limit: u16) -> Self {
        let limit = Arc::new(Limit(limit.into()));
        let peer = Peer::new(PeerSlot(0), PublicKey([1; 32]), None);
        let peer = Arc::new(peer.with_paths(Some(limit.clone())));
        let mut tables = Tables::default();
        for net in ["10.2.0.0/16", "fd02::/16"] {
            tables.allowed_ips.insert(net.parse().unwrap(), peer.clone());
        }
        Self { limit, tables, batch: TxBatch::new(), drops: DropCounters::default() }
    }

    fn push(&mut self, packet: &[u8]) -> Push {
        self.batch.push(&self.tables, VnetHdr::default(), packet, 0, &self.drops)
    }
}

fn v4(len: u16, dont_fragment: bool) -> Vec<u8> {
    let mut packet = vec![0; len.into()];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[6] = if dont_fragment { 0x40 } else { 0 };
    packet[9] = 17;
    packet[12..16].copy_from_slice(&Ipv4Addr::new(10, 1, 0, 2).octets());
    packet[16..20].copy_from_slice(&Ipv4Addr::new(10, 2, 0, 2).octets());
    packet
}

fn v6(len: u16) -> Vec<u8> {
    let mut packet = vec![0; len.into()];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
    packet[6] = 17;
    packet[8..24].copy_from_slice(&"fd01::2".parse::<Ipv6Addr>().unwrap().octets());
    packet[24..40].copy_from_slice(&"fd02::2".parse::<Ipv6Addr>().unwrap().octets());
    packet
}

#[test]
fn what_may_not_be_cut_is_refused_above_the_paths_limit_and_nothing_else_is() {
    // No multiple of 16: padding must fit, too.
    let mut world = World::new(1370);
    let told = Push::TooLong { mtu: 1360 };
    // A train to one destination, short and long, first and later.
    for _ in 0..3 {
        assert_eq!(world.push(&v4(1361, true)), told);
        assert_eq!(world.push(&v4(1360, true)), Push::Done);
        assert_eq!(world.push(&v6(1361)), told);
        assert_eq!(world.push(&v6(1360)), Push::Done);
        assert_eq!(world.push(&v4(1420, false)), Push::Done);
    }
    assert_eq!(world.drops.get(Drop::TxTooLong), 6);
    assert!(!world.batch.is_empty());
}

#[test]
fn a_path_for_the_longest_packets_has_no_limit() {
    for limit in [0, 1420, 1500] {
        let mut world = World::new(limit);
        assert_eq!(world.push(&v4(1420, true)), Push::Done, "{limit}");
        // As after a change of the tunnel's MTU: nothing was said about those.
        assert_eq!(world.push(&v6(1500)), Push::Done, "{limit}");
        assert_eq!(world.drops.get(Drop::TxTooLong), 0);
    }
}

#[test]
fn a_changed_limit_counts_from_the_next_batch() {
    let mut world = World::new(0);
    assert_eq!(world.push(&v4(1420, true)), Push::Done);
    world.limit.0.store(1312, Ordering::Relaxed);
    world.batch.clear();
    assert_eq!(world.push(&v4(1420, true)), Push::TooLong { mtu: 1312 });
    let destination: IpAddr = [10, 2, 0, 2].into();
    assert!(world.tables.allowed_ips.lookup(destination).is_some());
}
