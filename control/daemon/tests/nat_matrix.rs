//! Which pairs of networks reach each other, and how fast: each row with real routers, in both
//! orders of who starts and sends first. `MILLRACE_WRITE_RESULTS=1` writes the table to
//! `bench/results/nat_matrix.md`.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

mod common;

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, Running, World, carrier, nats};
use millrace_lab::capture::LEAK;
use millrace_lab::chance::tell_second_attempt;
use millrace_lab::nat::{
    Hairpin, Input, Internet, Ipv6, Nat, PROXY_PORT, Policy, PortMapping, Router, RouterOptions,
};
use millrace_lab::node::PORT;
use millrace_lab::{Lab, Path, Result};

/// Runs at a time: most of a run is waiting.
const AT_A_TIME: usize = 4;

/// How long a pair that has no direct path is given to find one after all.
const NEVER: Duration = Duration::from_secs(6);

/// Time between two datagrams of the stream inside.
const INTERVAL: Duration = Duration::from_millis(20);

/// One row of the matrix.
struct Row {
    number: &'static str,
    a: &'static str,
    b: &'static str,
    wanted: Wanted,
    world: fn(&Lab, &Internet) -> Result<World>,
}

/// What must come of it in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// A direct path of any kind.
    Direct,
    /// A direct path, over IPv6.
    DirectV6,
    /// A direct path to the address that the world names.
    DirectToTarget,
    /// A direct path or the relay: chance decides who comes first.
    Either,
    /// The relay, for good.
    Relay,
}

/// What one run has seen.
#[derive(Clone, Debug)]
struct Outcome {
    /// From the first datagram sent inside to the first that came.
    first_packet: Duration,
    /// From the first datagram sent to direct paths in both directions.
    direct: Option<(Duration, SocketAddr)>,
}

const ROWS: &[Row] = &[
    Row {
        number: "1",
        a: "public",
        b: "easy",
        wanted: Wanted::Direct,
        world: |l, i| World::apart(l, i, nats(Nat::None, Nat::EASY)),
    },
    Row {
        number: "1",
        a: "public",
        b: "hard",
        wanted: Wanted::Direct,
        world: |l, i| World::apart(l, i, nats(Nat::None, Nat::HARD)),
    },
    Row {
        number: "2",
        a: "firewall only",
        b: "firewall only",
        wanted: Wanted::Direct,
        world: |l, i| World::apart(l, i, nats(Nat::Firewall, Nat::Firewall)),
    },
    Row {
        number: "3",
        a: "easy",
        b: "easy",
        wanted: Wanted::Direct,
        world: |l, i| World::apart(l, i, nats(Nat::EASY, Nat::EASY)),
    },
    Row {
        number: "4",
        a: "easy + host firewall",
        b: "easy + host firewall",
        wanted: Wanted::Direct,
        world: |l, i| {
            let world = World::apart(l, i, nats(Nat::EASY, Nat::EASY))?;
            world.hosts.iter().try_for_each(|host| host.firewall())?;
            Ok(world)
        },
    },
    Row {
        number: "5",
        a: "easy",
        b: "Linux, INPUT accepts",
        wanted: Wanted::Either,
        world: |l, i| {
            let linux = RouterOptions { input: Input::Accept, ..RouterOptions::nat(Nat::Linux) };
            World::apart(l, i, [RouterOptions::nat(Nat::EASY), linux])
        },
    },
    Row {
        number: "6",
        a: "full cone",
        b: "hard",
        wanted: Wanted::Direct,
        world: |l, i| World::apart(l, i, nats(Nat::FULL_CONE, Nat::HARD)),
    },
    Row {
        number: "7",
        a: "filtered by address",
        b: "hard",
        wanted: Wanted::Direct,
        world: |l, i| World::apart(l, i, nats(Nat::RESTRICTED_CONE, Nat::HARD)),
    },
    Row {
        number: "10",
        a: "hard",
        b: "hard",
        wanted: Wanted::Relay,
        world: |l, i| World::apart(l, i, nats(Nat::HARD, Nat::HARD)),
    },
    Row {
        number: "11",
        a: "hard + PCP",
        b: "hard",
        wanted: Wanted::Direct,
        world: |l, i| with_port_mapping(l, World::apart(l, i, nats(Nat::HARD, Nat::HARD))?),
    },
    // The host's firewall knows no flow from the port that the hard side comes from: it is heard past
    // the firewall, and our answer makes the flow known.
    Row {
        number: "12",
        a: "easy + PCP + host firewall",
        b: "hard",
        wanted: Wanted::Direct,
        world: |l, i| {
            let world = World::apart(l, i, nats(Nat::EASY, Nat::HARD))?;
            world.hosts[0].firewall()?;
            with_port_mapping(l, world)
        },
    },
    Row {
        number: "12",
        a: "easy + PCP + host firewall, not to be passed",
        b: "hard",
        wanted: Wanted::Relay,
        world: |l, i| {
            let world = World::apart(l, i, nats(Nat::EASY, Nat::HARD))?;
            world.hosts[0].firewall()?;
            let mut world = with_port_mapping(l, world)?;
            world.options[0].discovery += "past_firewall = \"off\"\n";
            Ok(world)
        },
    },
    Row {
        number: "13",
        a: "same LAN",
        b: "same LAN",
        wanted: Wanted::DirectToTarget,
        world: |l, i| {
            let router = i.router(l, "router", RouterOptions::default())?;
            let hosts = [router.host(l, "a")?, router.host(l, "b")?];
            let target = Some(hosts[1].v4(0)?.into());
            let watched = vec![router.namespace().clone()];
            Ok(World { target, watched, ..World::new(hosts, vec![router]) })
        },
    },
    Row {
        number: "14",
        a: "easy behind easy",
        b: "easy",
        wanted: Wanted::Direct,
        world: |l, i| {
            let outer = i.router(
                l,
                "outer",
                RouterOptions { lan: Some([100, 64, 1]), ..RouterOptions::default() },
            )?;
            let home = RouterOptions { lan: Some([192, 168, 1]), ..RouterOptions::default() };
            let inner = i.router_behind(l, "inner", home, &outer)?;
            let far = i.router(l, "far", RouterOptions::default())?;
            let hosts = [inner.host(l, "a")?, far.host(l, "b")?];
            Ok(World::new(hosts, vec![outer, inner, far]))
        },
    },
    Row {
        number: "15",
        a: "CGNAT with hairpin",
        b: "same CGNAT",
        wanted: Wanted::Direct,
        world: |l, i| carrier(l, i, Hairpin::External, [100, 64, 1]),
    },
    Row {
        number: "16",
        a: "CGNAT, no hairpin",
        b: "same CGNAT",
        wanted: Wanted::Relay,
        world: |l, i| carrier(l, i, Hairpin::Off, [100, 64, 1]),
    },
    Row {
        number: "17",
        a: "CGNAT, no hairpin",
        b: "same CGNAT, port forwarded at home",
        wanted: Wanted::DirectToTarget,
        world: |l, i| {
            let mut world = carrier(l, i, Hairpin::Off, [100, 64, 1])?;
            let between = world.routers[2].wan_v4();
            world.routers[2].forward_port(PORT, world.hosts[1].v4(0)?)?;
            world.options[1].discovery += &format!("address = [\"{between}:{PORT}\"]\n");
            world.target = Some(between.into());
            Ok(world)
        },
    },
    // Between carrier and home there are public addresses: miniupnpd takes no others.
    Row {
        number: "17",
        a: "CGNAT, no hairpin",
        b: "same CGNAT, PCP at home",
        wanted: Wanted::DirectToTarget,
        world: |l, i| {
            let mut world = carrier(l, i, Hairpin::Off, [5, 64, 1])?;
            world.daemons.push(world.routers[2].start_port_mapping(l, PortMapping::All)?);
            world.options[1].discovery = String::new();
            world.target = Some(world.routers[2].wan_v4().into());
            Ok(world)
        },
    },
    Row {
        number: "20",
        a: "one to one",
        b: "hard",
        wanted: Wanted::Direct,
        world: |l, i| World::apart(l, i, nats(Nat::OneToOne, Nat::HARD)),
    },
    Row {
        number: "21",
        a: "IPv6 firewall",
        b: "IPv6 firewall",
        wanted: Wanted::DirectV6,
        world: |l, i| {
            let [a, b] = v6_routers(l, i, [Nat::EASY, Nat::EASY])?;
            let hosts = [a.host_v6_only(l, "a")?, b.host_v6_only(l, "b")?];
            Ok(World::new(hosts, vec![a, b]))
        },
    },
    Row {
        number: "22",
        a: "dual stack, IPv4 hard",
        b: "dual stack, IPv4 hard",
        wanted: Wanted::DirectV6,
        world: |l, i| {
            let [a, b] = v6_routers(l, i, [Nat::HARD, Nat::HARD])?;
            let hosts = [a.host(l, "a")?, b.host(l, "b")?];
            Ok(World::new(hosts, vec![a, b]))
        },
    },
    Row {
        number: "23",
        a: "IPv6 only",
        b: "dual stack, IPv4 easy",
        wanted: Wanted::DirectV6,
        world: |l, i| {
            let [a, b] = v6_routers(l, i, [Nat::EASY, Nat::EASY])?;
            let hosts = [a.host_v6_only(l, "a")?, b.host(l, "b")?];
            Ok(World::new(hosts, vec![a, b]))
        },
    },
    Row {
        number: "24",
        a: "IPv6 only, NAT64",
        b: "IPv4 easy",
        wanted: Wanted::Direct,
        world: |l, i| through_nat64(l, i, Nat::EASY),
    },
    Row {
        number: "25",
        a: "IPv6 only, NAT64",
        b: "IPv4 hard",
        wanted: Wanted::Relay,
        world: |l, i| through_nat64(l, i, Nat::HARD),
    },
    Row {
        number: "26",
        a: "UDP blocked",
        b: "easy",
        wanted: Wanted::Relay,
        world: |l, i| World::apart(l, i, [with_policy(Policy::NoUdp), RouterOptions::default()]),
    },
    Row {
        number: "26",
        a: "only TCP 443",
        b: "public",
        wanted: Wanted::Relay,
        world: |l, i| {
            World::apart(l, i, [with_policy(Policy::OnlyTcp443), RouterOptions::nat(Nat::None)])
        },
    },
    Row {
        number: "27",
        a: "HTTP proxy only",
        b: "easy",
        wanted: Wanted::Relay,
        world: |l, i| {
            let mut world =
                World::apart(l, i, [with_policy(Policy::Nothing), RouterOptions::default()])?;
            let router = &world.routers[0];
            world.daemons.push(router.start_proxy(l, None)?);
            let proxy = format!("proxy = \"http://{}:{PROXY_PORT}\"\n", router.lan_v4(1));
            world.options[0].discovery += &proxy;
            Ok(world)
        },
    },
    Row {
        number: "28",
        a: "dual stack, IPv4 vanishes",
        b: "dual stack, IPv4 easy",
        wanted: Wanted::DirectV6,
        world: |l, i| {
            let broken = RouterOptions { ipv6: Ipv6::Firewall, ..with_policy(Policy::NoIpv4) };
            let well = RouterOptions { ipv6: Ipv6::Firewall, ..RouterOptions::default() };
            World::apart(l, i, [broken, well])
        },
    },
];

#[test]
fn every_pair_ends_on_its_path_in_both_orders() {
    let runs: Vec<(usize, usize)> = (0..ROWS.len())
        .flat_map(|row| [(row, 0), (row, 1)])
        .filter(|(row, _)| chosen(*row))
        .collect();
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(vec![[const { None }; 2]; ROWS.len()]);
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(&(row, first)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = run(&ROWS[row], first).map_err(|error| error.to_string());
                    outcomes.lock().unwrap()[row][first] = Some(outcome);
                }
            });
        }
    });
    let mut outcomes = outcomes.into_inner().unwrap();
    // Deadlines of a second are missed on a machine that starves a daemon for one: what fails gets a
    // second chance by itself, and the first failure is told. A leak gets none.
    for (row, outcomes) in ROWS.iter().zip(&mut outcomes) {
        let Some(first) = failure(row, outcomes).filter(|why| !why.contains(LEAK)) else {
            continue;
        };
        if outcomes.iter().all(Option::is_some) {
            tell_second_attempt(&first);
            for (order, outcome) in outcomes.iter_mut().enumerate() {
                *outcome = Some(run(row, order).map_err(|error| error.to_string()));
            }
        }
    }
    let table = table(&outcomes);
    println!("{table}");
    let failures: Vec<String> = ROWS
        .iter()
        .zip(&outcomes)
        .enumerate()
        .filter(|(row, _)| chosen(*row))
        .filter_map(|(_, (row, outcomes))| failure(row, outcomes))
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    if std::env::var_os("MILLRACE_WRITE_RESULTS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../bench/results/nat_matrix.md");
        std::fs::write(path, table).unwrap();
    }
}

/// All rows, or those whose number `MILLRACE_ROW` names.
fn chosen(row: usize) -> bool {
    std::env::var("MILLRACE_ROW").map_or(true, |number| ROWS[row].number == number)
}

type Outcomes = [Option<std::result::Result<Outcome, String>>; 2];

/// One row in one order.
fn run(row: &Row, first: usize) -> Result<Outcome> {
    let mut running = Running::start(row.world, first)?;
    running.pair.wait_until_ready(LIMIT)?;
    let pair = &running.pair;
    let flow = pair.flow(first, INTERVAL)?;
    let start = Instant::now();
    let first_packet = flow.first_arrival(LIMIT)?;
    let limit = match row.wanted {
        Wanted::Relay | Wanted::Either => NEVER,
        _ => LIMIT,
    };
    let direct = match pair.wait_for(true, limit) {
        Ok(_) => {
            let since = start.elapsed();
            let Path::Direct(address) = pair.nodes[0].path()? else {
                return Err(millrace_lab::Error::Unexpected(
                    "the direct path is gone again".into(),
                ));
            };
            Some((since, address))
        }
        Err(error) if limit == LIMIT => return Err(error),
        Err(_) => None,
    };
    let history = pair.nodes[first].paths()?["peers"][0]["history"].take();
    if history[0]["path"] != "relay" {
        let what = format!("the first path was not the relay: {history}");
        return Err(millrace_lab::Error::Unexpected(what));
    }
    // It stays so, and nothing is lost any more.
    let settled = Instant::now();
    thread::sleep(Duration::from_secs(1));
    pair.wait_for(direct.is_some(), LIMIT)?;
    let lost = flow.finish().since(settled);
    if lost.lost > 0 || lost.sent == 0 {
        let what = format!("a settled path lost datagrams: {lost:?}");
        return Err(millrace_lab::Error::Unexpected(what));
    }
    let outcome = Outcome { first_packet, direct };
    check(row, &running, &outcome)?;
    running.finish()?;
    Ok(outcome)
}

/// Whether one run ended as the row wants it.
fn check(row: &Row, running: &Running, outcome: &Outcome) -> Result<()> {
    let address = outcome.direct.map(|(_, address)| address.ip());
    let fine = match row.wanted {
        Wanted::Direct => address.is_some(),
        Wanted::DirectV6 => address.is_some_and(|address| address.is_ipv6()),
        Wanted::DirectToTarget => address.is_some() && address == running.target,
        Wanted::Either => true,
        Wanted::Relay => address.is_none(),
    };
    if fine {
        return Ok(());
    }
    let what = format!("wanted {:?} (to {:?}), got {outcome:?}", row.wanted, running.target);
    Err(millrace_lab::Error::Unexpected(what))
}

/// Why a row has failed.
fn failure(row: &Row, outcomes: &Outcomes) -> Option<String> {
    let name = format!("row {}: {} and {}", row.number, row.a, row.b);
    for (order, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                return Some(format!("{name}, {} first: {error}", ["A", "B"][order]));
            }
            None => return Some(format!("{name} did not run")),
        }
    }
    None
}

fn table(outcomes: &[Outcomes]) -> String {
    let mut text = String::from(
        "# NAT pairs, with real routers\n\n\
         Each pair ran in two orders of who starts and sends first, in network namespaces without delay,\n\
         several at a time. The first packet goes through the relay; times are from the first packet sent\n\
         inside the tunnel. Rows are numbered as the matrix that the project was planned with.\n\n\
         | | A | B | outcome, A first | B first | first packet | direct, median |\n|---|---|---|---|---|---|---|\n",
    );
    for (row, outcomes) in ROWS.iter().zip(outcomes) {
        let cell = |order: usize| match &outcomes[order] {
            Some(Ok(Outcome { direct: Some((_, address)), .. })) => {
                format!("direct, {}", if address.is_ipv6() { "IPv6" } else { "IPv4" })
            }
            Some(Ok(_)) => "relay".into(),
            Some(Err(_)) => "failed".into(),
            None => "not run".into(),
        };
        let runs = || outcomes.iter().flatten().flatten();
        let first = median(runs().map(|outcome| outcome.first_packet).collect());
        let direct = median(runs().filter_map(|outcome| Some(outcome.direct?.0)).collect());
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {first} | {direct} |",
            row.number,
            row.a,
            row.b,
            cell(0),
            cell(1)
        );
    }
    text
}

/// The mean of the two in the middle, in words.
fn median(mut times: Vec<Duration>) -> String {
    times.sort();
    let middle = times.len() / 2;
    match times.len() {
        0 => "".into(),
        len if len % 2 == 1 => format!("{} ms", times[middle].as_millis()),
        _ => format!("{} ms", (times[middle - 1] + times[middle]).as_millis() / 2),
    }
}

fn with_policy(policy: Policy) -> RouterOptions {
    RouterOptions { policy, ..RouterOptions::default() }
}

/// A's router speaks all protocols for port mapping.
fn with_port_mapping(lab: &Lab, mut world: World) -> Result<World> {
    world.daemons.push(world.routers[0].start_port_mapping(lab, PortMapping::All)?);
    world.options[0].discovery = String::new();
    Ok(world)
}

fn v6_routers(lab: &Lab, internet: &Internet, nats: [Nat; 2]) -> Result<[Router; 2]> {
    let router = |nat| {
        let options = RouterOptions { ipv6: Ipv6::Firewall, ..RouterOptions::nat(nat) };
        internet.router(lab, "router", options)
    };
    let [a, b] = nats;
    Ok([router(a)?, router(b)?])
}

/// A has IPv6 alone and a NAT64, B has IPv4 alone.
fn through_nat64(lab: &Lab, internet: &Internet, far: Nat) -> Result<World> {
    let near = RouterOptions { ipv6: Ipv6::Firewall, ..RouterOptions::default() };
    let a = internet.router(lab, "router a", near)?;
    let b = internet.router(lab, "router b", RouterOptions::nat(far))?;
    let nat64 = a.start_nat64(lab, internet)?;
    let mut world = World::new([a.host_v6_only(lab, "a")?, b.host(lab, "b")?], vec![a, b]);
    world.options[0].resolv_conf = Some(nat64.resolv_conf.clone());
    world.nat64 = Some(nat64);
    Ok(world)
}
