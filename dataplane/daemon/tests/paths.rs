//! What control writes into ENDPOINTS is where packets go; without a line a peer roams. The maps are
//! those of the running daemon, found by its descriptors and written by bpftool.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use common::World;
use millrace_ebpf::abi::{Endpoint, EndpointKind};
use millrace_lab::ping::Ping;
use millrace_lab::{Implementation, TunnelOptions, wait_for};
use zerocopy::IntoBytes;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn a_line_of_endpoints_goes_before_roaming() {
    let mut world = World::new([Implementation::Millrace; 2], &TunnelOptions::default());
    world.connect();
    let map = map_of(world.tunnel.a.daemon().pid(), "ENDPOINTS");
    let to = |address: IpAddr| Endpoint {
        kind: EndpointKind::Direct as u8,
        family: 4,
        port: 51_820,
        address: match address {
            IpAddr::V4(v4) => {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&v4.octets());
                bytes
            }
            IpAddr::V6(v6) => v6.octets(),
        },
        ..Endpoint::default()
    };
    let answers = |world: &World| {
        let ping = Ping { count: 3, interval_ms: 50, ..Ping::default() };
        ping.run(&world.site.a.host, world.site.b.host_v4).is_ok_and(|report| report.complete())
    };
    // Nobody lives there, while B's packets still come from where it is: roaming would follow.
    write(map, 0, &to(Ipv4Addr::new(198, 51, 100, 99).into()));
    wait_for("no answers", LIMIT, || (!answers(&world)).then_some(())).unwrap();
    let seen = world.tunnel.a.peer().unwrap().endpoint;
    // What `wg show` tells is where packets go.
    assert_eq!(seen, Some(SocketAddr::from(([198, 51, 100, 99], 51_820))));
    // Another address of B, which answers from where it is spoken to.
    world.site.b.gateway.ip(["addr add 198.51.100.77/24 dev wan"]).unwrap();
    let second = Ipv4Addr::new(198, 51, 100, 77);
    write(map, 0, &to(second.into()));
    wait_for("answers by the second address", LIMIT, || answers(&world).then_some(())).unwrap();
    assert_eq!(
        world.tunnel.a.peer().unwrap().endpoint,
        Some(SocketAddr::new(second.into(), 51_820))
    );
    // A line that control left half written, and then none.
    write(map, 0, &Endpoint { seq: 1, ..to(Ipv4Addr::new(198, 51, 100, 99).into()) });
    wait_for("answers past a torn line", LIMIT, || answers(&world).then_some(())).unwrap();
    write(map, 0, &Endpoint::default());
    wait_for("answers by roaming", LIMIT, || answers(&world).then_some(())).unwrap();
    world.finish();
}

/// The id of a process's map. Names of maps are cut at 15 characters.
fn map_of(pid: u32, name: &str) -> u32 {
    let ids = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().flatten().filter_map(|entry| {
        let text = fs::read_to_string(entry.path()).ok()?;
        let line = text.lines().find(|line| line.starts_with("map_id:"))?;
        line.split_whitespace().nth(1)?.parse::<u32>().ok()
    });
    let is_it = |id: &u32| {
        let shown = bpftool(&["-j", "map", "show", "id", &id.to_string()]);
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        shown["name"] == name
    };
    ids.into_iter().find(is_it).expect("the daemon has such a map")
}

fn write(map: u32, slot: u32, line: &Endpoint) {
    let (map, mut words) = (map.to_string(), Vec::new());
    let bytes = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>();
    for word in ["map", "update", "id", &map, "key"] {
        words.push(word.to_owned());
    }
    words.extend(bytes(slot.as_bytes()));
    words.push("value".to_owned());
    words.extend(bytes(line.as_bytes()));
    bpftool(&words.iter().map(String::as_str).collect::<Vec<_>>());
}

fn bpftool(arguments: &[&str]) -> String {
    let output = std::process::Command::new("bpftool").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
