//! Writes a configuration as the operator would: a table each, defaults left out.

use std::fmt::{Display, Write};
use std::path::Path;

use ipnet::IpNet;

use crate::config::{Dataplane, Interface, KeySource, Offload, Peer, Routes, Workers};
use crate::discovery::{Authorities, Discovery, Proxy, Relay};

pub(super) fn interface(out: &mut String, interface: &Interface) {
    line(out, format_args!("\n[interface]"));
    line(out, format_args!("name = {}", string(&interface.name)));
    write_key(out, "private_key_file", interface.private_key.as_ref());
    if interface.listen_port != 0 {
        line(out, format_args!("listen_port = {}", interface.listen_port));
    }
    write_nets(out, "address", &interface.address);
    if let Some(mtu) = interface.mtu {
        line(out, format_args!("mtu = {mtu}"));
    }
    if interface.fwmark != 0 {
        line(out, format_args!("fwmark = {}", interface.fwmark));
    }
    if interface.routes == Routes::Off {
        line(out, format_args!("routes = \"off\""));
    }
}

pub(super) fn dataplane(out: &mut String, dataplane: &Dataplane) {
    if *dataplane == Dataplane::default() {
        return;
    }
    line(out, format_args!("\n[dataplane]"));
    line(out, format_args!("receive = {}", string(dataplane.receive.word())));
    line(out, format_args!("transmit = {}", string(dataplane.transmit.word())));
    line(out, format_args!("aead = {}", string(dataplane.aead.word())));
    if !dataplane.device.is_empty() {
        let list: Vec<String> = dataplane.device.iter().map(|name| string(name)).collect();
        line(out, format_args!("device = [{}]", list.join(", ")));
    }
    if let Workers::Cores(cores) = &dataplane.workers {
        line(out, format_args!("workers = {cores:?}"));
    }
}

pub(super) fn offload(out: &mut String, offload: &Offload) {
    if *offload == Offload::default() {
        return;
    }
    line(out, format_args!("\n[offload]"));
    for (key, on) in [
        ("udp_gso", offload.udp_gso),
        ("udp_gro", offload.udp_gro),
        ("tun_tso", offload.tun_tso),
        ("tun_uso", offload.tun_uso),
        ("coalesce_tcp", offload.coalesce_tcp),
        ("coalesce_udp", offload.coalesce_udp),
    ] {
        line(out, format_args!("{key} = \"{}\"", if on { "auto" } else { "off" }));
    }
}

pub(super) fn discovery(out: &mut String, discovery: &Discovery) {
    if *discovery == Discovery::default() {
        return;
    }
    line(out, format_args!("\n[discovery]"));
    relays(out, &discovery.relay);
    write_list(out, "stun", &discovery.stun);
    write_list(out, "address", &discovery.address);
    match &discovery.authorities {
        Authorities::System => {}
        Authorities::File(file) => write_path(out, "relay_ca_file", Some(file)),
        Authorities::Both(file) => {
            write_path(out, "relay_ca_file", Some(file));
            line(out, format_args!("relay_ca = \"both\""));
        }
    }
    match &discovery.proxy {
        Proxy::None => {}
        Proxy::Environment => line(out, format_args!("proxy = \"environment\"")),
        Proxy::Server(url) => line(out, format_args!("proxy = {}", string(&url.to_string()))),
    }
    write_path(out, "proxy_credentials_file", discovery.proxy_credentials_file.as_deref());
    if !discovery.port_mapping {
        line(out, format_args!("port_mapping = \"off\""));
    }
    if !discovery.past_firewall {
        line(out, format_args!("past_firewall = \"off\""));
    }
}

/// Those of which nothing is pinned as URLs, on one line if all are.
fn relays(out: &mut String, relays: &[Relay]) {
    let is_plain = |relay: &Relay| relay.certificate.is_none() && relay.key.is_none();
    if relays.iter().all(is_plain) {
        let urls: Vec<_> = relays.iter().map(|relay| &relay.url).collect();
        return write_list(out, "relay", &urls);
    }
    line(out, format_args!("relay = ["));
    for relay in relays {
        let url = string(&relay.url.to_string());
        if is_plain(relay) {
            line(out, format_args!("    {url},"));
            continue;
        }
        let mut table = format!("url = {url}");
        if let Some(certificate) = relay.certificate {
            let _ = write!(table, ", certificate = {}", string(&certificate.to_string()));
        }
        if let Some(key) = relay.key {
            let _ = write!(table, ", key = {}", string(&key.to_base64()));
        }
        line(out, format_args!("    {{ {table} }},"));
    }
    line(out, format_args!("]"));
}

pub(super) fn peer(out: &mut String, peer: &Peer) {
    line(out, format_args!("\n[[peer]]"));
    if let Some(name) = &peer.name {
        line(out, format_args!("name = {}", string(name)));
    }
    line(out, format_args!("public_key = {}", string(&peer.public_key.to_base64())));
    write_key(out, "preshared_key_file", peer.preshared_key.as_ref());
    write_nets(out, "allowed_ips", &peer.allowed_ips);
    if let Some(endpoint) = &peer.endpoint {
        line(out, format_args!("endpoint = {}", string(&endpoint.to_string())));
    }
    if peer.keepalive_seconds != 0 {
        line(out, format_args!("keepalive = \"{}s\"", peer.keepalive_seconds));
    }
}

fn write_key(out: &mut String, key: &str, source: Option<&KeySource>) {
    match source {
        None => {}
        Some(KeySource::File(path)) => write_path(out, key, Some(path)),
        Some(KeySource::Inline(_)) => {
            line(out, format_args!("# {key} = put the key into a file of mode 0600"));
        }
    }
}

fn write_path(out: &mut String, key: &str, path: Option<&Path>) {
    if let Some(path) = path {
        line(out, format_args!("{key} = {}", string(&path.to_string_lossy())));
    }
}

fn write_list(out: &mut String, key: &str, values: &[impl Display]) {
    if !values.is_empty() {
        let list: Vec<String> = values.iter().map(|value| string(&value.to_string())).collect();
        line(out, format_args!("{key} = [{}]", list.join(", ")));
    }
}

fn write_nets(out: &mut String, key: &str, nets: &[IpNet]) {
    write_list(out, key, nets);
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{text}");
}

fn string(text: &str) -> String {
    toml::Value::from(text).to_string()
}
