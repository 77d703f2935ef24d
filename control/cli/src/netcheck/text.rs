//! A netcheck as text: what is known, a table of servers, and what it means.

use std::fmt::Write;
use std::time::Duration;

use millrace_path::nat::{Filtering, Mapping};
use millrace_path::netcheck::{Family, MappingLifetime, Report, ServerReport, TcpReport};

/// `lifetime`: that of the mapping was to be measured.
pub(super) fn of(report: &Report, lifetime: bool) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<18}{value}");
    };
    row("UDP", yes_or_no(report.udp).into());
    row("IPv4", family(&report.ipv4));
    row("IPv6", family(&report.ipv6));
    row("NAT mapping", mapping(report));
    row("port preserved", maybe(report.port_preserved).into());
    let unknown = match report.filtering {
        None if report.udp => ": no STUN server with two addresses (RFC 5780, as coturn) showed it",
        _ => "",
    };
    row("filtering", filtering(report.filtering) + unknown);
    if report.ipv6.global.is_some() {
        row("filtering IPv6", filtering(report.filtering_ipv6));
    }
    row("hairpin", maybe(report.hairpin).into());
    row(
        "mapping lifetime",
        match &report.mapping_lifetime {
            Some(known) => lived(known),
            None if lifetime => "unknown".into(),
            None => "not measured: --lifetime does".into(),
        },
    );
    let ports = &report.port_mapping;
    let [upnp, nat_pmp, pcp] = [ports.upnp, ports.nat_pmp, ports.pcp].map(maybe);
    let opened = ports.mapped.map(|address| format!("; opened {address}")).unwrap_or_default();
    row("port mapping", format!("UPnP {upnp}, NAT-PMP {nat_pmp}, PCP {pcp}{opened}"));
    row("captive portal", maybe(report.captive_portal).into());
    let nearest = report.nearest_relay().map(|(name, rtt)| format!("{name}, {}", time(Some(rtt))));
    row("nearest relay", nearest.unwrap_or_else(|| "none answers".into()));
    out.push('\n');
    servers(&mut out, &report.servers);
    let verdict = report.verdict();
    let _ = writeln!(out, "\n{}", verdict.sentence);
    if let Some(change) = verdict.change {
        let _ = writeln!(out, "What would help: {change}");
    }
    out
}

fn servers(out: &mut String, servers: &[ServerReport]) {
    let mut rows = vec![["SERVER", "IPV4", "IPV6", "TCP", "READY"].map(str::to_owned)];
    for server in servers {
        let (tcp, ready) = match &server.tcp {
            Some(TcpReport::Connected { connect, ready }) => (Some(*connect), Some(*ready)),
            _ => (None, None),
        };
        rows.push([
            server.name.clone(),
            time(server.ipv4),
            time(server.ipv6),
            time(tcp),
            time(ready),
        ]);
    }
    let widths: [usize; 5] =
        std::array::from_fn(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0));
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  "));
        let _ = writeln!(out, "{}", cells.collect::<String>().trim_end());
    }
    for server in servers {
        if let Some(TcpReport::Failed(seen)) = &server.tcp {
            let _ = writeln!(out, "! {}: {seen}", server.name);
        }
    }
}

fn family(family: &Family) -> String {
    match (family.global, family.in_host) {
        (Some(address), _) => format!("yes, {address}"),
        (None, true) => "no, but this host has addresses of it".into(),
        (None, false) => "no".into(),
    }
}

/// In the terms of RFC 4787, and in those of other tools.
fn mapping(report: &Report) -> String {
    let kind = match report.mapping {
        Some(Mapping::None) => "no translation",
        Some(Mapping::EndpointIndependent) => "endpoint-independent",
        Some(Mapping::AddressDependent) => "address-dependent",
        Some(Mapping::AddressAndPortDependent) => "address- and port-dependent",
        Some(Mapping::Dependent) => "dependent on the destination",
        None => "unknown",
    };
    let varies = maybe(report.mapping_varies_by_dest_ip);
    format!("{kind} (MappingVariesByDestIP: {varies})")
}

fn filtering(filtering: Option<Filtering>) -> String {
    match filtering {
        Some(Filtering::EndpointIndependent) => "none: endpoint-independent",
        Some(Filtering::AddressDependent) => "address-dependent",
        Some(Filtering::AddressAndPortDependent) => "address- and port-dependent",
        None => "unknown",
    }
    .into()
}

fn lived(lifetime: &MappingLifetime) -> String {
    let at_least = lifetime.at_least.as_secs();
    match lifetime.less_than {
        Some(less_than) => format!("{at_least} s to {} s", less_than.as_secs()),
        None => format!("more than {at_least} s"),
    }
}

fn maybe(value: Option<bool>) -> &'static str {
    value.map_or("unknown", yes_or_no)
}

fn yes_or_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn time(duration: Option<Duration>) -> String {
    duration.map_or("–".into(), |duration| format!("{:.1} ms", duration.as_secs_f64() * 1e3))
}
