//! The table of keys: one row makes the reader's suggestions, the manual and the reload's warnings.

/// When a changed value takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// At the next reload, without touching the sessions of unchanged peers.
    Live,
    /// After a restart; a reload warns.
    Restart,
}

/// One key of the TOML file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// `""` for the top level, else the name of one of [`TABLES`], or of a key whose list has tables.
    pub table: &'static str,
    pub name: &'static str,
    pub effect: Effect,
    /// What stands when the key does not; empty: the key is required.
    pub default: &'static str,
    pub meaning: &'static str,
}

const fn key(
    table: &'static str,
    name: &'static str,
    effect: Effect,
    default: &'static str,
    meaning: &'static str,
) -> Key {
    Key { table, name, effect, default, meaning }
}

use Effect::{Live, Restart};

pub const KEYS: &[Key] = &[
    key("", "schema", Restart, "", "version of this format: 1"),
    key("interface", "name", Restart, "mr0", "name of the TUN device, at most 15 characters"),
    key("interface", "private_key_file", Live, "none", "file that holds the private key in base64"),
    key("interface", "listen_port", Restart, "chosen by the kernel", "UDP port, 1 to 65535"),
    key("interface", "address", Live, "none", "addresses of the device with prefix length"),
    key("interface", "mtu", Live, "1420", "largest inner packet in bytes, 576 to 65455"),
    key("interface", "fwmark", Live, "0", "mark of the outer packets for policy routing"),
    key(
        "interface",
        "routes",
        Live,
        "auto",
        "auto: routes to allowed_ips are installed; off: they are not",
    ),
    key("dataplane", "receive", Restart, "auto", "auto, xdp-zerocopy, xdp-copy or socket"),
    key("dataplane", "transmit", Restart, "auto", "auto, xdp-zerocopy or gso"),
    key("dataplane", "aead", Restart, "auto", "auto (measured at the start), ring, avx2 or avx512"),
    key(
        "dataplane",
        "device",
        Restart,
        "device of the default route",
        "network devices whose queues XDP may take",
    ),
    key("dataplane", "workers", Restart, "auto", "auto or a list of cores, one worker on each"),
    key("offload", "udp_gso", Restart, "auto", "many datagrams per send on the outer socket"),
    key("offload", "udp_gro", Restart, "auto", "many datagrams per receive on the outer socket"),
    key("offload", "tun_tso", Restart, "auto", "large TCP segments from the TUN device"),
    key("offload", "tun_uso", Restart, "auto", "large UDP packets from the TUN device"),
    key(
        "offload",
        "coalesce_tcp",
        Restart,
        "auto",
        "TCP segments joined before they are written to the TUN device",
    ),
    key(
        "offload",
        "coalesce_udp",
        Restart,
        "auto",
        "UDP packets joined before they are written to the TUN device",
    ),
    key(
        "discovery",
        "relay",
        Live,
        "none",
        "list of relays, each an URL like https://relay.example.net or a table of the next three keys",
    ),
    key("discovery.relay", "url", Live, "", "the relay's URL"),
    key(
        "discovery.relay",
        "certificate",
        Live,
        "none",
        "sha256: and 64 hex digits: the only certificate, or public key in it, that it may show",
    ),
    key(
        "discovery.relay",
        "key",
        Live,
        "none",
        "the only DERP key that it may have, in base64 or as nodekey: and 64 hex digits",
    ),
    key("discovery", "stun", Live, "those of the relays", "more STUN servers, host:port"),
    key(
        "discovery",
        "address",
        Live,
        "found out",
        "public addresses with port that only you know, as behind a static forward",
    ),
    key(
        "discovery",
        "relay_ca_file",
        Live,
        "the system's authorities",
        "PEM file of authorities that may sign relays' certificates, instead of the system's",
    ),
    key(
        "discovery",
        "relay_ca",
        Live,
        "auto",
        "auto: relay_ca_file alone where it is given, else the system's; both: either may have signed",
    ),
    key(
        "discovery",
        "proxy",
        Live,
        "none",
        "HTTP proxy to the relays, http://host:port; environment: as https_proxy and no_proxy say",
    ),
    key(
        "discovery",
        "proxy_credentials_file",
        Live,
        "none",
        "file that holds user:password for the proxy",
    ),
    key("discovery", "port_mapping", Live, "auto", "auto: routers are asked to open the port; off"),
    key(
        "discovery",
        "past_firewall",
        Restart,
        "auto",
        "auto: peers' disco is heard although the host's firewall drops it; off",
    ),
    key("peer", "name", Live, "start of the key", "name in status and logs"),
    key("peer", "public_key", Live, "", "the peer's public key in base64"),
    key("peer", "preshared_key_file", Live, "none", "file that holds the preshared key in base64"),
    key("peer", "allowed_ips", Live, "none", "inner prefixes that live behind the peer"),
    key(
        "peer",
        "endpoint",
        Live,
        "learned from the peer",
        "host:port, with an IPv6 address in brackets",
    ),
    key("peer", "keepalive", Live, "off", "interval like 25s at which an idle tunnel is kept open"),
];

/// The tables of the file, in the order in which they are written.
pub const TABLES: [&str; 5] = ["interface", "dataplane", "offload", "discovery", "peer"];

pub(crate) fn names_in(table: &str) -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter(move |key| key.table == table).map(|key| key.name)
}
