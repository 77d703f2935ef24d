//! Status as text: one line of health, a table of peers, what was dropped, what is not as wished.

use std::fmt::Write;

use millrace_config::Exit;
use millrace_config::paths::{PathKind, Paths, Relay, Trust};
use millrace_config::status::{Health, Peer, Status};
use millrace_ebpf::drops;

use crate::reach::{milliseconds, path_text};

/// `paths`: what the control process says, where one runs.
pub(crate) fn text(status: &Status, paths: Option<&Paths>, verbose: bool) -> String {
    let mut out = String::new();
    header(&mut out, status);
    peers(&mut out, &status.peers, paths);
    if let Some(paths) = paths {
        ways(&mut out, paths, &status.peers, verbose);
    }
    dropped(&mut out, status, verbose);
    if verbose {
        dataplane(&mut out, status);
    }
    for warning in &status.warnings {
        let _ = writeln!(out, "! {warning}");
    }
    out
}

/// The exit code of `status`.
pub(crate) fn exit(status: &Status) -> Exit {
    match status.health {
        Health::Healthy => Exit::Ok,
        Health::Degraded => Exit::Degraded,
        Health::Down => Exit::NotConnected,
    }
}

fn header(out: &mut String, status: &Status) {
    let health = match status.health {
        Health::Healthy => "healthy",
        Health::Degraded => "degraded",
        Health::Down => "down",
    };
    let plane = &status.dataplane;
    let workers = plane.workers.len();
    let _ = writeln!(
        out,
        "millrace {}   {}   {health}   UDP port {}   receive {}, transmit {}, inner {}   {workers} worker{}",
        status.version,
        status.interface,
        status.listen_port,
        plane.receive,
        plane.transmit,
        plane.inner,
        if workers == 1 { "" } else { "s" },
    );
    if let Some(key) = &status.public_key {
        let _ = writeln!(out, "public key {key}");
    }
}

fn peers(out: &mut String, peers: &[Peer], paths: Option<&Paths>) {
    let way = if paths.is_some() { "PATH" } else { "ENDPOINT" };
    let mut rows =
        vec![["PEER", way, "ALLOWED IPS", "HANDSHAKE", "RX", "TX", "KEEPALIVE"].map(str::to_owned)];
    rows.extend(peers.iter().map(|peer| {
        [
            peer.name
                .clone()
                .unwrap_or_else(|| peer.public_key.chars().take(10).collect::<String>() + "…"),
            way_of(peer, paths),
            peer.allowed_ips.join(", "),
            peer.last_handshake_age_seconds.map_or_else(|| "never".to_owned(), age),
            bytes(peer.rx_bytes),
            bytes(peer.tx_bytes),
            peer.keepalive_seconds.map_or_else(|| "off".to_owned(), |s| format!("{s} s")),
        ]
    }));
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(out, "{}", cells.join("   ").trim_end());
    }
}

fn endpoint(peer: &Peer) -> String {
    match (&peer.endpoint, peer.path.as_str()) {
        (Some(endpoint), _) => endpoint.clone(),
        (None, "detour") => "by control".to_owned(),
        (None, _) => "–".to_owned(),
    }
}

/// How a peer is reached: as control says, or where plain WireGuard last heard it.
fn way_of(peer: &Peer, paths: Option<&Paths>) -> String {
    let endpoint = endpoint(peer);
    let path =
        paths.and_then(|paths| paths.peers.iter().find(|path| path.public_key == peer.public_key));
    let Some(path) = path else { return endpoint };
    if path.path == PathKind::Plain {
        return format!("plain {endpoint}");
    }
    let mut text = path_text(path);
    if let Some(rtt) = path.rtt_seconds {
        let _ = write!(text, " {}", milliseconds(rtt));
    }
    let _ = write!(text, " since {}", age(path.since_seconds as u64));
    if let (true, Some(mtu)) = (path.shortened, path.mtu) {
        let _ = write!(text, ", packets up to {mtu} B");
    }
    if path.idle {
        text += ", idle";
    }
    text
}

/// Relays, and what is between us and the others.
fn ways(out: &mut String, paths: &Paths, peers: &[Peer], verbose: bool) {
    for relay in &paths.relays {
        let facts = relay_facts(relay, paths.home_relay.as_ref() == Some(&relay.url));
        let rtt = relay.rtt_seconds.map(milliseconds).unwrap_or_default();
        let _ = writeln!(out, "relay {}{facts}: {} {rtt}", relay.url, relay.state);
        if !relay.health.is_empty() {
            let _ = writeln!(out, "! relay {} says: {}", relay.url, relay.health);
        }
    }
    let nat = &paths.nat;
    let seen =
        if nat.seen.is_empty() { "by no STUN server".to_owned() } else { nat.seen.join(", ") };
    let kind = crate::nat::text(&nat.kind, nat.filtering_unknown.as_deref());
    let _ = writeln!(out, "seen {seen}\nNAT {kind}");
    if let Some(mapping) = &nat.port_mapping {
        let _ = writeln!(out, "port mapping {mapping}");
    }
    for note in paths.problem.iter().chain(&paths.notes) {
        let _ = writeln!(out, "! {note}");
    }
    for peer in paths.peers.iter().filter(|peer| peer.path != PathKind::Direct && !peer.idle) {
        if peer.path != PathKind::Plain {
            let known = peers.iter().find(|known| known.public_key == peer.public_key);
            let name = known.and_then(|known| known.name.as_ref()).unwrap_or(&peer.public_key);
            let _ = writeln!(out, "! {name} is not reached directly: millrace why {name}");
        }
    }
    if verbose {
        for counter in paths.counters.iter().filter(|counter| counter.count > 0) {
            let _ =
                writeln!(out, "  {:>10}  {:<22}  {}", counter.count, counter.name, counter.meaning);
        }
    }
}

/// As " (home, trust pinned)".
fn relay_facts(relay: &Relay, is_home: bool) -> String {
    let trust = match relay.trust {
        Trust::None => None,
        Trust::System => Some("trust system"),
        Trust::File => Some("trust file"),
        Trust::SystemOrFile => Some("trust system or file"),
        Trust::Pinned => Some("trust pinned"),
    };
    let key = relay.key_pinned.then_some("key pinned");
    let facts: Vec<&str> = is_home.then_some("home").into_iter().chain(trust).chain(key).collect();
    if facts.is_empty() { String::new() } else { format!(" ({})", facts.join(", ")) }
}

fn dropped(out: &mut String, status: &Status, verbose: bool) {
    let rows: Vec<_> = status.drops.iter().filter(|count| verbose || count.packets > 0).collect();
    if rows.is_empty() {
        let _ = writeln!(out, "nothing dropped");
        return;
    }
    let _ = writeln!(out, "dropped:");
    for row in rows {
        let known = drops::ALL.iter().find(|(_, name, _)| *name == row.reason);
        let sentence = known.map_or("", |(.., sentence)| sentence);
        let _ = writeln!(out, "  {:>10}  {:<22}  {sentence}", row.packets, row.reason);
    }
}

fn dataplane(out: &mut String, status: &Status) {
    let plane = &status.dataplane;
    let cores: Vec<String> = plane.workers.iter().map(u32::to_string).collect();
    let _ = writeln!(out, "receive   {}: {}", plane.receive, plane.receive_reason);
    let _ = writeln!(out, "transmit  {}: {}", plane.transmit, plane.transmit_reason);
    let rings = &plane.af_xdp;
    if !rings.device.is_empty() {
        let _ = writeln!(
            out,
            "af_xdp    {} on {} queues: {} received, {} sent, {} passed to the kernel; fill ring \
             empty {} times",
            rings.device,
            rings.queues,
            rings.frames_received,
            rings.frames_sent,
            rings.frames_passed,
            rings.fill_ring_empty,
        );
    }
    let _ = writeln!(out, "steering  {}", plane.steering);
    let _ = writeln!(out, "control   {}", status.control.state);
    let _ = writeln!(out, "workers   on cores {}", cores.join(", "));
    let _ = writeln!(out, "aead      {}: {}", plane.aead, plane.aead_reason);
    for offload in &plane.offloads {
        let state = if offload.on { "on" } else { "off" };
        let _ = writeln!(out, "offload   {} {state}: {}", offload.name, offload.reason);
    }
}

fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} m {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_sizes_read_as_people_say_them() {
        assert_eq!(
            ["59 s", "1 m 1 s", "2 h 0 m", "1 d 1 h"].map(str::to_owned),
            [age(59), age(61), age(7200), age(90_000)]
        );
        assert_eq!([bytes(1023), bytes(1536), bytes(5 << 30)], ["1023 B", "1.5 KiB", "5.0 GiB"]);
    }
}
