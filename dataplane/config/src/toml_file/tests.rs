use ipnet::IpNet;
use proptest::prelude::*;

use super::words::{AEAD, RECEIVE, TRANSMIT};
use super::*;
use crate::claims::Claims;
use crate::config::*;
use crate::discovery::{Discovery, HttpUrl};
use crate::key::PublicKey;
use crate::reference::{TABLES, names_in};

const KEY: &str = "AnPqrHBUF916ovweo4Po8I0uoPG3/lt3uHcTYVh5ixY=";
const OTHER_KEY: &str = "GMuIA7abyIPboMosOGzYHKl3j7wQytjjVVujTaC0Xm8=";

fn problems(text: &str) -> String {
    Config::from_toml(text).unwrap_err().to_string()
}

fn peer(lines: &str) -> String {
    format!("schema = 1\n[[peer]]\npublic_key = \"{KEY}\"\n{lines}\n")
}

#[test]
fn the_example_is_read() {
    let text = include_str!("../../../../docs/examples/gateway.toml");
    let config = Config::from_toml(text).unwrap();
    assert_eq!(config.interface.listen_port, 51820);
    assert_eq!(config.interface.address.len(), 2);
    assert!(config.peers.iter().any(|peer| peer.keepalive_seconds == 25));
}

#[test]
fn the_least_file_has_the_defaults() {
    assert_eq!(Config::from_toml("schema = 1").unwrap(), Config::named("mr0"));
}

#[test]
fn unknown_keys_are_placed_and_corrected() {
    let text = problems("schema = 1\n[interface]\nlisten-port = 5");
    assert!(
        text.starts_with("line 3, column 1: interface.listen-port: the key is unknown"),
        "{text}"
    );
    assert!(text.contains("did you mean \"listen_port\"?"), "{text}");
    let text = problems("schema = 1\n[interface]\nallowed_ips = []");
    assert!(text.contains("it belongs to [peer]"), "{text}");
    assert!(problems("schema = 1\n[interfce]").contains("did you mean \"interface\"?"));
    assert!(problems("schema = 1\n[metrics]\nlisten = 1").contains("metrics: the key is unknown"));
}

#[test]
fn one_peer_more_than_fits_is_an_error() {
    let text = |peers: usize| {
        let tables = (0..peers).map(|number| {
            let mut key = [9; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            format!("[[peer]]\npublic_key = \"{}\"\n", PublicKey(key).to_base64())
        });
        "schema = 1\n".to_owned() + &tables.collect::<String>()
    };
    let most = Config::from_toml(&text(limits::PEERS_MAX)).unwrap();
    assert_eq!(most.peers.len(), limits::PEERS_MAX);
    let said = problems(&text(limits::PEERS_MAX + 1));
    assert!(said.contains("peer: 16385 peers; expected at most 16384; use several"), "{said}");
}

#[test]
fn values_out_of_shape_name_what_was_seen_and_the_cure() {
    for (text, wanted) in [
        ("schema = 2".to_owned(), "schema: \"2\"; expected the format version 1"),
        ("[interface]".to_owned(), "schema: the key is missing"),
        ("schema = 1\n[interface]\nlisten_port = 70000".to_owned(), "expected a port from 1"),
        ("schema = 1\n[interface]\nname = \"a/b\"".to_owned(), "without '/'"),
        ("schema = 1\n[interface]\nmtu = \"auto\"".to_owned(), "expected bytes from 576 to 65455"),
        ("schema = 1\n[interface]\naddress = \"10.0.0.1/24\"".to_owned(), "a list of strings"),
        (
            "schema = 1\n[dataplane]\nreceive = \"xdp-zero-copy\"".to_owned(),
            "did you mean \"xdp-zerocopy\"?",
        ),
        ("schema = 1\n[dataplane]\nworkers = [1, 1]".to_owned(), "different cores"),
        ("schema = 1\n[offload]\nudp_gso = true".to_owned(), "expected a string"),
        ("schema = 1\n[[peer]]\nname = \"x\"".to_owned(), "peer[1].public_key: the key is missing"),
        (
            "schema = 1\n[[peer]]\npublic_key = \"abc\"".to_owned(),
            "3 characters where a key has 44",
        ),
        (peer("allowed_ips = [\"10.0.0.0/33\"]"), "prefix length from 0 to 32"),
        (peer("allowed_ips = [\"fd00::/129\"]"), "prefix length from 0 to 128"),
        (peer("allowed_ips = [\"10.2.3.4/16\"]"), "write \"10.2.0.0/16\""),
        (peer("endpoint = \"2001:db8::1:51820\""), "IPv6 address in brackets"),
        (peer("endpoint = \"b.example.net\""), "host:port"),
        (peer("endpoint = \"b.example.net:0\""), "a port from 1"),
        (peer("endpoint = \"10.0.0.256:1\""), "a host name or an IP address"),
        (peer("keepalive = \"25\""), "like \"25s\""),
        (peer("keepalive = 25"), "expected a string"),
        ("schema = 1\n[interface]\nname = mr0".to_owned(), "line 3"),
    ] {
        let seen = problems(&text);
        assert!(seen.contains(wanted), "{text}\n  gave {seen}\n  and not {wanted}");
    }
}

#[test]
fn a_key_in_place_of_a_path_is_not_repeated() {
    let text = problems(&format!("schema = 1\n[interface]\nprivate_key_file = \"{OTHER_KEY}\""));
    assert!(text.contains("no absolute path") && !text.contains(OTHER_KEY), "{text}");
}

#[test]
fn peers_may_not_share_prefix_key_or_name() {
    let two = |second_key: &str, lines: &str| {
        format!(
            "schema = 1\n[[peer]]\nname = \"a\"\npublic_key = \"{KEY}\"\nallowed_ips = [\"10.0.0.0/8\"]\n\
             [[peer]]\npublic_key = \"{second_key}\"\n{lines}"
        )
    };
    let text = problems(&two(OTHER_KEY, "allowed_ips = [\"10.0.0.0/8\"]"));
    assert!(text.contains("peer[2].allowed_ips: 10.0.0.0/8 is also at peer[1]"), "{text}");
    assert!(problems(&two(KEY, "")).contains("peer[1] has the same key"));
    assert!(problems(&two(OTHER_KEY, "name = \"a\"")).contains("peer[1] has the same name"));
    // A longer prefix inside another's is how longest match is used.
    assert!(Config::from_toml(&two(OTHER_KEY, "allowed_ips = [\"10.1.0.0/16\"]")).is_ok());
}

#[test]
fn a_peer_may_not_be_this_device() {
    let config = Config::from_toml(&peer("")).unwrap();
    let own = PublicKey::from_base64(KEY).unwrap();
    assert!(config.check_own_key(&own).unwrap_err().to_string().contains("key of this device"));
    assert!(config.check_own_key(&PublicKey([9; 32])).is_ok());
}

#[test]
fn all_problems_come_at_once_in_the_order_of_the_file() {
    let text = problems("schema = 3\n[interface]\nmtu = 1\nlisten_port = 0\n[offload]\nx = 1");
    let lines: Vec<&str> = text.lines().map(|line| &line[..6]).collect();
    assert_eq!(lines, ["line 1", "line 3", "line 4", "line 6"], "{text}");
}

#[test]
fn every_known_key_is_read_and_no_other() {
    for table in TABLES {
        for name in names_in(table) {
            let header = if table == "peer" { "[[peer]]".to_owned() } else { format!("[{table}]") };
            let text = problems(&format!("schema = 1\n{header}\n{name} = 1979-05-27\n"));
            assert!(!text.contains("unknown"), "{table}.{name} stands in the table only: {text}");
            assert!(text.contains(&format!("{name}: ")), "{table}.{name} is not read: {text}");
        }
    }
}

fn any_net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<[u8; 4]>(), 0..=32u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len).unwrap()),
        (any::<[u8; 16]>(), 0..=128u8).prop_map(|(ip, len)| IpNet::new(ip.into(), len).unwrap()),
    ]
}

fn any_endpoint() -> impl Strategy<Value = EndpointName> {
    prop_oneof![
        (any::<std::net::IpAddr>(), 1..=u16::MAX)
            .prop_map(|(ip, port)| EndpointName::Address((ip, port).into())),
        ("[a-z][a-z0-9]{0,20}(\\.[a-z][a-z0-9]{0,9}){0,3}", 1..=u16::MAX)
            .prop_map(|(host, port)| EndpointName::Name(host, port)),
    ]
}

fn any_file() -> impl Strategy<Value = KeySource> {
    "/[ -~]{1,40}".prop_map(|path| KeySource::File(path.into()))
}

prop_compose! {
    fn any_interface()(
        name in "[a-z][a-z0-9._-]{0,14}",
        private_key in prop::option::of(any_file()),
        listen_port: u16,
        mut address in prop::collection::vec(any_net(), 0..4),
        mtu in prop::option::of(576..=65_455u16),
        fwmark: u32,
        off: bool,
    ) -> Interface {
        address.sort();
        address.dedup();
        let routes = if off { Routes::Off } else { Routes::Auto };
        Interface { name, private_key, listen_port, address, mtu, fwmark, routes }
    }
}

prop_compose! {
    fn any_peer()(
        name in prop::option::of("[^;\\p{C}]{1,60}"),
        public_key in any::<[u8; 32]>().prop_filter("zero", |key| *key != [0; 32]),
        preshared_key in prop::option::of(any_file()),
        nets in prop::collection::btree_set(any_net(), 0..5),
        endpoint in prop::option::of(any_endpoint()),
        keepalive_seconds: u16,
    ) -> Peer {
        let allowed_ips = nets.iter().map(IpNet::trunc).collect::<std::collections::BTreeSet<_>>();
        let allowed_ips = allowed_ips.into_iter().collect();
        let public_key = PublicKey(public_key);
        Peer { name, public_key, preshared_key, allowed_ips, endpoint, keepalive_seconds }
    }
}

prop_compose! {
    fn any_discovery()(
        relay in prop::collection::btree_set("(http|https)://[a-z][a-z0-9]{0,9}(:8443)?", 0..4),
        stun in prop::collection::btree_set("[a-z][a-z0-9]{0,9}:[1-9][0-9]{0,3}", 0..4),
        address in prop::collection::btree_set(any::<std::net::SocketAddr>(), 0..3),
        paths in (prop::option::of("/[ -~]{0,20}"), prop::option::of("/[ -~]{0,20}")),
        proxy in prop::option::of("http://[a-z][a-z0-9]{0,9}:3128"),
        port_mapping: bool,
    ) -> Discovery {
        let with_port = |a: &std::net::SocketAddr| a.port() != 0;
        // A scope is no part of an address elsewhere.
        let plain = |a: std::net::SocketAddr| std::net::SocketAddr::new(a.ip(), a.port());
        let address = address.into_iter().filter(with_port).map(plain);
        let address: std::collections::BTreeSet<_> = address.collect();
        Discovery {
            relay: relay.iter().map(|url| HttpUrl::parse(url).unwrap()).collect(),
            stun: stun.iter().map(|name| EndpointName::parse(name).unwrap()).collect(),
            relay_ca_file: paths.0.map(Into::into),
            proxy: proxy.map(|url| HttpUrl::parse(&url).unwrap()),
            proxy_credentials_file: paths.1.map(Into::into),
            port_mapping,
            address: address.into_iter().collect(),
        }
    }
}

prop_compose! {
    fn any_config()(
        interface in any_interface(),
        peers in prop::collection::vec(any_peer(), 0..4),
        receive in prop::sample::select(RECEIVE.map(|(_, value)| value).to_vec()),
        transmit in prop::sample::select(TRANSMIT.map(|(_, value)| value).to_vec()),
        aead in prop::sample::select(AEAD.map(|(_, value)| value).to_vec()),
        device in prop::collection::btree_set("[a-z][a-z0-9]{0,9}", 0..3),
        cores in prop::option::of(prop::collection::btree_set(0..64usize, 1..5)),
        switches: [bool; 6],
        discovery in any_discovery(),
    ) -> Config {
        let workers = cores.map_or(Workers::Auto, |set| Workers::Cores(set.into_iter().collect()));
        let device = device.into_iter().collect();
        let [udp_gso, udp_gro, tun_tso, tun_uso, coalesce_tcp, coalesce_udp] = switches;
        let offload = Offload { udp_gso, udp_gro, tun_tso, tun_uso, coalesce_tcp, coalesce_udp };
        let dataplane = Dataplane { receive, transmit, aead, device, workers };
        Config { interface, dataplane, offload, discovery, peers, notes: Vec::new() }
    }
}

proptest! {
    #[test]
    fn what_is_written_reads_back_equal(mut config in any_config()) {
        let mut claims = Claims::default();
        config.peers.retain(|peer| claims.add(peer, "").is_empty());
        let text = config.to_toml();
        prop_assert_eq!(Config::from_toml(&text).map_err(|e| format!("{e}\n{text}")), Ok(config));
    }

    #[test]
    fn any_text_is_judged_without_panic(text: String) {
        crate::fuzz_config(&text);
    }

    #[test]
    fn any_damage_to_a_good_file_is_judged_without_panic(
        config in any_config(), at: prop::sample::Index, with in "[ -~\\n]{0,6}"
    ) {
        let mut text = config.to_toml();
        let at = at.index(text.len());
        let at = (0..=at).rev().find(|&at| text.is_char_boundary(at)).unwrap();
        text.insert_str(at, &with);
        crate::fuzz_config(&text);
    }
}
