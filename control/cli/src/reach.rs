//! `ping` and `why`: how a peer is reached, and the reason.

use std::fmt::Write;
use std::thread;
use std::time::{Duration, Instant};

use millrace_config::Exit;
use millrace_config::paths::{PathKind, PeerPath, Pong, Request, WhyPeer};
use millrace_config::status::Status;
use serde_json::Value;

use crate::control_client::ask;
use crate::{Problem, client, print};

/// Between two pings.
const INTERVAL: Duration = Duration::from_secs(1);

/// What `ping` is asked for.
pub(crate) struct PingOptions {
    pub(crate) count: u32,
    pub(crate) until_direct: bool,
    pub(crate) timeout: Option<Duration>,
    pub(crate) json: bool,
}

/// The key of a peer that is named by its name, its key, or the start of its key.
fn key_of(status: &Status, peer: &str) -> Result<String, Problem> {
    let named = status.peers.iter().filter(|known| known.name.as_deref() == Some(peer));
    let keyed = status.peers.iter().filter(|known| known.public_key.starts_with(peer));
    let mut found: Vec<&str> = named.chain(keyed).map(|peer| peer.public_key.as_str()).collect();
    found.dedup();
    match found.as_slice() {
        [only] => Ok((*only).to_owned()),
        [] => {
            let label = |peer: &millrace_config::status::Peer| {
                peer.name.clone().unwrap_or_else(|| peer.public_key.clone())
            };
            let known: Vec<String> = status.peers.iter().map(label).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            Err(Problem::new(Exit::Usage, format!("no peer {peer:?}; there are: {known}")))
        }
        _ => Err(Problem::new(Exit::Usage, format!("several peers are {peer:?}: write more"))),
    }
}

/// Exit code 0: the last answer came directly; 3: through a relay; 4: there was none.
pub(crate) fn ping(
    interface: Option<&str>,
    peer: &str,
    options: &PingOptions,
) -> Result<Exit, Problem> {
    let interface = client::choose(interface)?;
    let key = key_of(&client::status(&interface)?, peer)?;
    let start = Instant::now();
    let mut last;
    let mut number = 0_u32;
    loop {
        let began = Instant::now();
        match ask(&interface, &Request::Ping { peer: key.clone() }) {
            Ok(answer) => {
                let pong = read::<Pong>(answer.clone())?;
                last = exit_of(&pong);
                let line = if options.json { answer.to_string() } else { pong_text(peer, &pong) };
                print(&line)?;
            }
            // Not introduced yet: with patience it may be soon.
            Err(problem) if problem.exit == Exit::NotConnected => {
                last = Exit::NotConnected;
                eprintln!("millrace: {}", problem.sentence);
            }
            Err(problem) => return Err(problem),
        }
        number += 1;
        let over = options.timeout.is_some_and(|timeout| start.elapsed() >= timeout);
        if options.until_direct {
            if last == Exit::Ok {
                return Ok(last);
            }
            if over {
                eprintln!("millrace: not direct after {} s", start.elapsed().as_secs());
                return Ok(last);
            }
        } else if number == options.count || over {
            return Ok(last);
        }
        thread::sleep(INTERVAL.saturating_sub(began.elapsed()));
    }
}

/// Exit code 0: direct; 3: relayed, or plain WireGuard; 4: not reached.
pub(crate) fn why(interface: Option<&str>, peer: &str, json: bool) -> Result<Exit, Problem> {
    let interface = client::choose(interface)?;
    let key = key_of(&client::status(&interface)?, peer)?;
    let answer = ask(&interface, &Request::Why { peer: key })?;
    let why = read::<WhyPeer>(answer.clone())?;
    if json {
        print(&serde_json::to_string_pretty(&answer).unwrap_or_default())?;
    } else {
        print(why_text(peer, &why).trim_end())?;
    }
    Ok(match why.peer.path {
        PathKind::Direct => Exit::Ok,
        PathKind::Relay | PathKind::Plain => Exit::Degraded,
        PathKind::None => Exit::NotConnected,
    })
}

/// The path of a peer in a few words.
pub(crate) fn path_text(path: &PeerPath) -> String {
    match path.path {
        PathKind::Direct => format!("direct {}", path.address.as_deref().unwrap_or("?")),
        PathKind::Relay => format!("relay {}", path.relay.as_deref().unwrap_or("?")),
        PathKind::Plain => "plain".to_owned(),
        PathKind::None => "none".to_owned(),
    }
}

pub(crate) fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1000.0)
}

fn pong_text(peer: &str, pong: &Pong) -> String {
    let path = match pong.path {
        PathKind::Direct => format!("direct {}", pong.address.as_deref().unwrap_or("?")),
        PathKind::Relay => format!("relay {}", pong.relay.as_deref().unwrap_or("?")),
        PathKind::Plain | PathKind::None => "no answer".to_owned(),
    };
    match pong.rtt_seconds {
        Some(rtt) => format!("{peer}: {path} in {}", milliseconds(rtt)),
        None => format!("{peer}: no answer within 5 s"),
    }
}

fn exit_of(pong: &Pong) -> Exit {
    match (pong.rtt_seconds, pong.path) {
        (Some(_), PathKind::Direct) => Exit::Ok,
        (Some(_), _) => Exit::Degraded,
        (None, _) => Exit::NotConnected,
    }
}

fn why_text(name: &str, why: &WhyPeer) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{name}: {}", path_text(&why.peer));
    let _ = writeln!(out, "{}", why.verdict);
    if !why.advice.is_empty() {
        let _ = writeln!(out, "What would help: {}", why.advice);
    }
    let nat = &why.nat;
    let kind = crate::nat::text(&nat.kind, nat.filtering_unknown.as_deref());
    let seen = if nat.seen.is_empty() { "nowhere".to_owned() } else { nat.seen.join(", ") };
    let _ = writeln!(out, "\nour side\n  seen at     {seen}\n  NAT         {kind}");
    if let Some(mapping) = &nat.port_mapping {
        let _ = writeln!(out, "  port opened {mapping}");
    }
    let _ = writeln!(out, "  candidates  {}", list(&nat.candidates));
    let relay = why.peer_relay.as_deref().filter(|url| !url.is_empty()).unwrap_or("not known");
    let _ = writeln!(out, "the peer\n  relay       {relay}");
    let kind = why.peer_nat.as_ref().map(|kind| crate::nat::text(kind, None));
    let kind = kind.unwrap_or_else(|| "it does not say".to_owned());
    let _ = writeln!(out, "  NAT         {kind}");
    let _ = writeln!(out, "  candidates  {}", list(&why.peer_candidates));
    if !why.pairs.is_empty() {
        let _ = writeln!(out, "\nevery way that was tried");
    }
    for pair in &why.pairs {
        let used = if pair.in_use { "*" } else { " " };
        let rtt = pair.rtt_seconds.map_or_else(|| "–".to_owned(), milliseconds);
        let _ = writeln!(
            out,
            "{used} {:<24} {:<18} sent {:<4} answered {:<4} {rtt:<9} {}",
            pair.to, pair.kind, pair.sent, pair.answered, pair.meaning
        );
    }
    if !why.peer.history.is_empty() {
        let _ = writeln!(out, "\nchanges");
    }
    for change in &why.peer.history {
        let age = change.age_seconds;
        let _ = writeln!(out, "  {age:>8.1} s ago  {}: {}", change.path, change.reason);
    }
    out
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}

fn read<T: serde::de::DeserializeOwned>(answer: Value) -> Result<T, Problem> {
    serde_json::from_value(answer).map_err(|error| {
        let why = format!("the control process is of another version: {error}");
        Problem::new(Exit::Error, why)
    })
}
