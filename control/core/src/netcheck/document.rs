//! The report as the document `millrace.netcheck/1`.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Family, Report, ServerReport, TcpReport};
use crate::nat::{Filtering, Mapping};

impl Report {
    /// As the schema says. Null always means that it is not known.
    pub fn document(&self) -> Value {
        let verdict = self.verdict();
        let nearest = self
            .nearest_relay()
            .map(|(name, latency)| json!({ "relay": name, "latency_seconds": seconds(latency) }));
        json!({
            "schema": "millrace.netcheck/1",
            "took_seconds": seconds(self.took),
            "udp": self.udp,
            "ipv4": family(&self.ipv4),
            "ipv6": family(&self.ipv6),
            "mapping_varies_by_dest_ip": self.mapping_varies_by_dest_ip,
            "mapping": self.mapping.map(Mapping::word),
            "filtering": self.filtering.map(Filtering::word),
            "filtering_ipv6": self.filtering_ipv6.map(Filtering::word),
            "hairpin": self.hairpin,
            "port_preserved": self.port_preserved,
            "mapping_lifetime": self.mapping_lifetime.map(|lifetime| json!({
                "at_least_seconds": seconds(lifetime.at_least),
                "less_than_seconds": lifetime.less_than.map(seconds),
            })),
            "port_mapping": {
                "upnp": self.port_mapping.upnp,
                "nat_pmp": self.port_mapping.nat_pmp,
                "pcp": self.port_mapping.pcp,
                "mapped": self.port_mapping.mapped.as_ref().map(SocketAddr::to_string),
            },
            "captive_portal": self.captive_portal,
            "nearest_relay": nearest,
            "servers": self.servers.iter().map(server).collect::<Vec<_>>(),
            "verdict": {
                "prospect": verdict.prospect.word(),
                "sentence": verdict.sentence,
                "change": verdict.change,
            },
        })
    }
}

impl Family {
    /// The three values: somebody outside answered, or the host could if somebody did, or not.
    pub fn word(&self) -> &'static str {
        match (self.global, self.in_host) {
            (Some(_), _) => "yes",
            (None, true) => "no_connectivity",
            (None, false) => "no",
        }
    }
}

fn family(family: &Family) -> Value {
    json!({ "state": family.word(), "address": family.global.as_ref().map(SocketAddr::to_string) })
}

fn server(server: &ServerReport) -> Value {
    let tcp = server.tcp.as_ref().map(|tcp| match tcp {
        TcpReport::Connected { connect, ready } => json!({
            "connect_seconds": seconds(*connect),
            "ready_seconds": seconds(*ready),
            "error": null,
        }),
        TcpReport::Failed(error) => json!({
            "connect_seconds": null,
            "ready_seconds": null,
            "error": error,
        }),
    });
    json!({
        "name": server.name,
        "kind": if server.is_relay { "relay" } else { "stun" },
        "ipv4_latency_seconds": server.ipv4.map(seconds),
        "ipv6_latency_seconds": server.ipv6.map(seconds),
        "tcp": tcp,
    })
}

/// Whole microseconds: more is noise.
fn seconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e6
}
