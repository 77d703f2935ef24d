//! Memory-mapped lines between a writer and a reader with mappings of their own. Needs root.

use std::sync::atomic::{AtomicBool, Ordering};

use millrace_ebpf::abi::{Endpoint, Observed};
use millrace_ebpf::drops::Drop;
use millrace_ebpf::load::{LoadOptions, Programs};
use millrace_ebpf::maps::{Counter, LineReader, LineWriter};
use millrace_ebpf::spec;

fn programs() -> Programs {
    let options = LoadOptions { peers_max: 8, ..LoadOptions::new(51820) };
    Programs::load(options).expect("load; run the tests as root")
}

/// Every field tells the same number, so that a mixture of two lines is seen.
fn line(number: u64) -> Observed {
    Observed {
        port: number as u16,
        address: [number as u8; 16],
        local: [number as u8; 16],
        ifindex: number as u32,
        received_ns: number,
        sent_ns: number,
        handshake_ns: number,
        received_bytes: number,
        sent_bytes: number,
        unanswered_ns: number,
        reserved3: [number; 4],
        ..Observed::default()
    }
}

#[test]
fn a_reader_never_sees_half_of_a_line() {
    let programs = programs();
    let mut writer = programs.observed().expect("writer");
    let fds = programs.shared_fds();
    let specs = spec::read_abi(fds.abi).expect("ABI");
    let reader = LineReader::<Observed>::observed(fds.observed, &specs).expect("reader");
    let done = AtomicBool::new(false);

    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !done.load(Ordering::Relaxed) {
                number += 1;
                assert!(writer.write(3, &line(number)));
            }
        });
        let mut copy = line(0);
        let (mut fresh, mut changes) = (0, 0);
        while fresh < 300_000 || changes < 1_000 {
            let before = copy.received_ns;
            if reader.refresh(3, &mut copy) {
                fresh += 1;
                assert_eq!(copy, Observed { seq: copy.seq, ..line(copy.received_ns) });
                assert_eq!(copy.seq % 2, 0);
                assert!(copy.received_ns >= before, "lines go forward only");
                changes += u64::from(copy.received_ns != before);
            } else {
                assert_eq!(copy.received_ns, before, "a torn line leaves the copy alone");
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_line_that_is_being_written_leaves_the_readers_copy() {
    let programs = programs();
    let fds = programs.shared_fds();
    let specs = spec::read_abi(fds.abi).expect("ABI");
    let mut writer = LineWriter::<Endpoint>::endpoints(fds.endpoints, &specs).expect("writer");
    let reader = programs.endpoints().expect("reader");
    assert!(writer.write(0, &Endpoint { port: 7, ..Endpoint::default() }));
    assert_eq!(reader.read(0).expect("whole").port, 7);

    // A writer that died in the middle: the number is odd. Written through the map's fd.
    let data = aya::maps::MapData::from_fd(fds.endpoints.try_clone_to_owned().expect("fd"));
    let map = aya::maps::Map::from_map_data(data.expect("map")).expect("array");
    let mut raw = aya::maps::Array::<_, [u32; 16]>::try_from(map).expect("64 bytes");
    let mut words = raw.get(&0, 0).expect("line");
    words[0] += 1;
    raw.set(0, words, 0).expect("set");
    let mut copy = Endpoint { port: 9, ..Endpoint::default() };
    assert!(!reader.refresh(0, &mut copy));
    assert_eq!(copy.port, 9);

    assert!(writer.write(0, &Endpoint { port: 8, ..Endpoint::default() }), "the next one mends it");
    assert_eq!(reader.read(0).expect("whole").port, 8);
}

#[test]
fn slots_past_the_end_do_not_exist() {
    let programs = programs();
    let reader = programs.endpoints().expect("reader");
    assert_eq!(reader.len(), 8);
    assert!(reader.read(7).is_some());
    assert!(reader.read(8).is_none());
    assert!(reader.read(u32::MAX).is_none());
    assert!(!programs.observed().expect("writer").write(8, &line(1)));
}

#[test]
fn addresses_come_back_as_they_went_in_and_nonsense_is_no_address() {
    let mut observed = Observed::default();
    assert_eq!(observed.remote(), None);
    for remote in ["192.0.2.1:7", "[2001:db8::1]:65535"] {
        let remote = remote.parse().expect("address");
        observed.set_remote(remote, None, 3);
        assert_eq!(observed.remote(), Some(remote));
    }
    let endpoint = Endpoint { kind: 9, family: 5, prefix_length: 17, ..Endpoint::default() };
    assert_eq!(endpoint.kind(), None);
    assert_eq!(endpoint.remote(), None);
    assert_eq!(endpoint.prefix(), b"");
}

#[test]
fn a_workers_counters_are_seen_by_others() {
    let programs = programs();
    let mut worker = programs.stats.worker(63).expect("the last one");
    assert!(programs.stats.worker(64).is_none());
    worker.add(Counter::ReceivedPackets, 64);
    worker.add(Counter::ReceivedPackets, 1);
    worker.set(Counter::HeartbeatNs, 99);
    worker.set_drops(Drop::RxReplayed, 5);
    let stats = programs.stats.read(63).expect("line");
    assert_eq!((stats.received_packets, stats.heartbeat_ns), (65, 99));
    assert_eq!(stats.drops[Drop::RxReplayed as usize], 5);
    assert_eq!(programs.stats.read(0).expect("line"), Default::default());
}
