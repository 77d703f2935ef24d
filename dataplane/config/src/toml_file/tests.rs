use ipnet::IpNet;
use proptest::prelude::*;

use super::words::{AEAD, RECEIVE, TRANSMIT};
use super::*;
use crate::claims::Claims;
use crate::config::*;
use crate::discovery::{Authorities, Discovery, HttpUrl, Proxy, Relay};
use crate::fingerprint::Fingerprint;
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

/// A relay's table with these lines, and its `[discovery]` with more.
fn relay(table: &str, more: &str) -> String {
    format!("schema = 1\n[discovery]\nrelay = [{{ {table} }}]\n{more}\n")
}

#[test]
fn a_relay_is_an_url_or_a_table_with_pins() {
    let pin = format!("sha256:{}", "0a".repeat(32));
    let text = format!(
        "schema = 1\n[discovery]\nrelay = [\"https://a\", {{ url = \"https://b\", \
         certificate = \"{pin}\", key = \"{KEY}\" }}]\nrelay_ca_file = \"/ca\"\nproxy = \"environment\""
    );
    let discovery = Config::from_toml(&text).unwrap().discovery;
    let url = |text| HttpUrl::parse(text).unwrap();
    let key = PublicKey::from_base64(KEY).unwrap();
    let pinned =
        Relay { url: url("https://b"), certificate: Some(Fingerprint([10; 32])), key: Some(key) };
    assert_eq!(discovery.relay, [url("https://a").into(), pinned.clone()]);
    assert_eq!(discovery.authorities, Authorities::File("/ca".into()));
    assert_eq!(discovery.proxy, Proxy::Environment);
    // The same as a table of tables, and the key as Tailscale writes it.
    let text = format!(
        "schema = 1\n[[discovery.relay]]\nurl = \"https://b\"\ncertificate = \"{pin}\"\n\
         key = \"nodekey:{}\"\n",
        key.to_hex()
    );
    assert_eq!(Config::from_toml(&text).unwrap().discovery.relay, [pinned]);
    let text = relay("url = \"https://b\"", "relay_ca_file = \"/ca\"\nrelay_ca = \"both\"");
    let discovery = Config::from_toml(&text).unwrap().discovery;
    assert_eq!(discovery.authorities, Authorities::Both("/ca".into()));
}

#[test]
fn what_is_wrong_with_a_relay_is_placed_and_named() {
    let (https, pin) = ("url = \"https://b\"", format!("sha256:{}", "0a".repeat(32)));
    for (text, wanted) in [
        (relay("key = \"x\"", ""), "line 3, column 10: discovery.relay[1].url: the key is missing"),
        (
            relay("url = \"b\"", ""),
            "line 3, column 18: discovery.relay[1].url: \"b\"; expected https",
        ),
        (
            relay(&format!("{https}, certificate = \"{}\"", &pin[..70]), ""),
            "line 3, column 45: discovery.relay[1].certificate: \"sha256:0a",
        ),
        (relay(&format!("{https}, certificate = 7"), ""), "certificate: \"7\"; expected a string"),
        (
            relay(&format!("{https}, key = \"abc\""), ""),
            "relay[1].key: \"abc\"; expected a public key",
        ),
        (relay(&format!("{https}, pin = \"x\""), ""), "discovery.relay[1].pin: the key is unknown"),
        (relay(&format!("{https}, certifcate = \"x\""), ""), "did you mean \"certificate\"?"),
        (
            relay(&format!("url = \"http://b\", certificate = \"{pin}\""), ""),
            "certificate: at a relay without TLS; expected an https:// URL",
        ),
        ("schema = 1\n[discovery]\nrelay = \"https://a\"".into(), "a list of URLs or tables"),
        (
            "schema = 1\n[discovery]\nrelay = [7]".into(),
            "line 3, column 10: discovery.relay: \"7\"",
        ),
        (
            "schema = 1\n[discovery]\nrelay = [\"https://a\", { url = \"https://a:443\" }]".into(),
            "line 3, column 23: discovery.relay: https://a twice",
        ),
        (
            relay(https, "relay_ca = \"both\""),
            "line 4, column 12: discovery.relay_ca: \"both\" without",
        ),
        (
            relay(https, "proxy = \"https://p\""),
            "line 4, column 9: discovery.proxy: no URL of a proxy",
        ),
        (
            relay(https, "proxy = \"environment\"\nproxy_credentials_file = \"/p\""),
            "line 5, column 26: discovery.proxy_credentials_file: proxy = \"environment\"",
        ),
    ] {
        let seen = problems(&text);
        assert!(seen.contains(wanted), "{text}\n  gave {seen}\n  and not {wanted}");
    }
    let many: Vec<String> =
        (0..=limits::RELAYS_MAX).map(|number| format!("\"https://r{number}\"")).collect();
    let said = problems(&format!("schema = 1\n[discovery]\nrelay = [{}]", many.join(", ")));
    assert!(said.contains("discovery.relay: too many; expected at most 16"), "{said}");
}

#[test]
fn every_key_of_the_tables_in_lists_is_read_and_no_other() {
    for name in names_in("discovery.relay") {
        let text = problems(&relay(&format!("{name} = 1979-05-27"), ""));
        assert!(!text.contains("unknown"), "{name} stands in the table only: {text}");
        assert!(text.contains(&format!("{name}: ")), "{name} is not read: {text}");
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
    fn any_relay()(
        url in "(http|https)://[a-z][a-z0-9]{0,9}(:8443)?",
        certificate: Option<[u8; 32]>,
        key in prop::option::of(any::<[u8; 32]>().prop_filter("zero", |key| *key != [0; 32])),
    ) -> Relay {
        let url = HttpUrl::parse(&url).unwrap();
        let certificate = certificate.filter(|_| url.tls).map(Fingerprint);
        Relay { url, certificate, key: key.map(PublicKey) }
    }
}

prop_compose! {
    fn any_discovery()(
        mut relay in prop::collection::vec(any_relay(), 0..4),
        stun in prop::collection::btree_set("[a-z][a-z0-9]{0,9}:[1-9][0-9]{0,3}", 0..4),
        address in prop::collection::btree_set(any::<std::net::SocketAddr>(), 0..3),
        authorities in prop_oneof![
            Just(Authorities::System),
            "/[ -~]{0,20}".prop_map(|path| Authorities::File(path.into())),
            "/[ -~]{0,20}".prop_map(|path| Authorities::Both(path.into())),
        ],
        proxy in prop_oneof![
            Just(Proxy::None),
            Just(Proxy::Environment),
            "http://[a-z][a-z0-9]{0,9}:3128".prop_map(|url| Proxy::Server(HttpUrl::parse(&url).unwrap())),
        ],
        credentials in prop::option::of("/[ -~]{0,20}"),
        port_mapping: bool,
        past_firewall: bool,
    ) -> Discovery {
        let with_port = |a: &std::net::SocketAddr| a.port() != 0;
        // A scope is no part of an address elsewhere.
        let plain = |a: std::net::SocketAddr| std::net::SocketAddr::new(a.ip(), a.port());
        let address = address.into_iter().filter(with_port).map(plain);
        let address: std::collections::BTreeSet<_> = address.collect();
        relay.sort_by_key(|relay| relay.url.to_string());
        relay.dedup_by_key(|relay| relay.url.to_string());
        let credentials = credentials.filter(|_| proxy != Proxy::Environment);
        Discovery {
            relay,
            stun: stun.iter().map(|name| EndpointName::parse(name).unwrap()).collect(),
            authorities,
            proxy,
            proxy_credentials_file: credentials.map(Into::into),
            port_mapping,
            past_firewall,
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
