use proptest::prelude::*;

use super::*;

fn any_secret() -> impl Strategy<Value = Option<SecretKey>> {
    prop::option::of(any::<[u8; 32]>().prop_filter("zero", |key| *key != [0; 32]))
        .prop_map(|bytes| bytes.map(|bytes| SecretKey::new(Zeroizing::new(bytes))))
}

fn any_endpoint() -> impl Strategy<Value = Option<SocketAddr>> {
    prop::option::of((any::<std::net::IpAddr>(), 1..=u16::MAX).prop_map(SocketAddr::from))
}

fn any_net() -> impl Strategy<Value = IpNet> {
    (any::<std::net::IpAddr>(), 0..=128u8).prop_map(|(ip, len)| {
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        IpNet::new(ip, len.min(longest)).unwrap().trunc()
    })
}

prop_compose! {
    fn any_change()(
        public_key: [u8; 32], remove: bool, update_only: bool, replace_allowed_ips: bool,
        preshared_key in prop::option::of(any_secret()),
        endpoint in any_endpoint(),
        keepalive_seconds: Option<u16>,
        ips in prop::collection::vec((any_net(), any::<bool>()), 0..4),
    ) -> PeerChange {
        let allowed_ips = ips.into_iter().map(|(net, remove)| AllowedIpChange { net, remove });
        PeerChange {
            public_key: PublicKey(public_key), remove, update_only, preshared_key, endpoint,
            keepalive_seconds, replace_allowed_ips, allowed_ips: allowed_ips.collect(),
        }
    }
}

prop_compose! {
    fn any_set()(
        private_key in prop::option::of(any_secret()),
        listen_port: Option<u16>, fwmark: Option<u32>, replace_peers: bool,
        peers in prop::collection::vec(any_change(), 0..4),
    ) -> SetRequest {
        SetRequest { private_key, listen_port, fwmark, replace_peers, peers }
    }
}

prop_compose! {
    fn any_peer()(
        public_key: [u8; 32], preshared_key in any_secret(), endpoint in any_endpoint(),
        allowed_ips in prop::collection::vec(any_net(), 0..4),
        keepalive_seconds: u16, last_handshake: (u64, u32), rx_bytes: u64, tx_bytes: u64,
        facts in prop::collection::vec(("[a-z_]{1,9}", "[ -~]{0,40}"), 0..3),
    ) -> PeerState {
        PeerState {
            public_key: PublicKey(public_key), preshared_key, endpoint, allowed_ips,
            keepalive_seconds, last_handshake, rx_bytes, tx_bytes, facts,
        }
    }
}

prop_compose! {
    fn any_state()(
        private_key in any_secret(), listen_port: u16, fwmark: u32,
        peers in prop::collection::vec(any_peer(), 0..4),
        facts in prop::collection::vec(("[a-z_]{1,9}", "[ -~]{0,40}"), 0..3),
    ) -> DeviceState {
        DeviceState { private_key, listen_port, fwmark, peers, facts }
    }
}

proptest! {
    #[test]
    fn requests_read_back_equal(change in any_set()) {
        let text = change.to_text();
        prop_assert_eq!(Request::parse(text.as_bytes()), Ok(Request::Set(change)));
        prop_assert_eq!(Request::length(text.as_bytes()), Some(text.len()));
    }

    #[test]
    fn states_read_back_equal(state in any_state()) {
        prop_assert_eq!(DeviceState::parse(state.to_text().as_bytes()), Ok(state));
    }

    #[test]
    fn any_bytes_are_judged_without_panic(bytes: Vec<u8>) {
        crate::fuzz_uapi(&bytes);
    }

    #[test]
    fn any_known_lines_are_judged_without_panic(lines in prop::collection::vec(
        (prop::sample::select(vec!["get", "set", "public_key", "private_key", "listen_port",
            "fwmark", "replace_peers", "remove", "update_only", "preshared_key", "endpoint",
            "persistent_keepalive_interval", "replace_allowed_ips", "allowed_ip",
            "protocol_version", "errno", "mr_x"]), "([0-9a-f]{64}|[ -~]{0,30}|true|1)"), 0..9)
    ) {
        let text: String = lines.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        crate::fuzz_uapi(text.as_bytes());
        crate::fuzz_uapi(format!("set=1\n{text}\n").as_bytes());
    }
}

/// What wg 1.0.20210914 sends for `wg set` with a peer, byte for byte but for the keys.
#[test]
fn a_request_of_wg_is_read() {
    let key = "11".repeat(32);
    let text = format!(
        "set=1\nlisten_port=51820\nfwmark=0\npublic_key={key}\npreshared_key={}\n\
         endpoint=[2001:db8::1]:51820\npersistent_keepalive_interval=25\n\
         replace_allowed_ips=true\nallowed_ip=10.0.0.0/8\n\n",
        "0".repeat(64)
    );
    let Ok(Request::Set(change)) = Request::parse(text.as_bytes()) else { panic!("not read") };
    assert_eq!((change.listen_port, change.fwmark), (Some(51820), Some(0)));
    let peer = &change.peers[0];
    assert_eq!(peer.preshared_key, Some(None), "all zero takes the preshared key away");
    assert!(peer.replace_allowed_ips && !peer.remove && !peer.update_only);
    assert_eq!(peer.allowed_ips[0].net.to_string(), "10.0.0.0/8");
}

#[test]
fn signs_before_allowed_ips_add_and_remove() {
    let key = "11".repeat(32);
    let text = format!("set=1\npublic_key={key}\nallowed_ip=-10.1.2.3/8\nallowed_ip=+::/0\n\n");
    let Ok(Request::Set(change)) = Request::parse(text.as_bytes()) else { panic!("not read") };
    let seen: Vec<String> = change.peers[0]
        .allowed_ips
        .iter()
        .map(|change| format!("{} {}", change.remove, change.net))
        .collect();
    assert_eq!(seen, ["true 10.0.0.0/8", "false ::/0"]);
}

#[test]
fn defects_are_named_by_line_and_never_show_a_value() {
    for (text, wanted) in [
        ("", "UAPI line 1: : the request is empty"),
        ("hello\n", "line 1: : the line has no '='"),
        ("get=2\n", "line 1: get: a request begins with"),
        ("get=1\nx=1\n", "line 2: x: nothing may follow"),
        ("set=1\nprivate_key=secret\n", "line 2: private_key: a key has 64"),
        ("set=1\nlisten_port=65536\n", "line 2: listen_port: the value is no number"),
        ("set=1\nlisten_port=+1\n", "line 2: listen_port: the value is no number"),
        ("set=1\nreplace_peers=yes\n", "line 2: replace_peers: the value can only be true"),
        ("set=1\nallowed_ip=10.0.0.0/8\n", "line 2: allowed_ip: unknown key of the device"),
    ] {
        let seen = Request::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(seen.starts_with(wanted) || seen.contains(wanted), "{seen}, not {wanted}");
        assert!(!seen.contains("secret"));
    }
}

#[test]
fn facts_cannot_forge_lines() {
    let facts = vec![("warning".to_owned(), "one\nerrno=5\n\ntwo".to_owned())];
    let state = DeviceState { facts, ..DeviceState::default() };
    let text = state.to_text();
    assert_eq!(text.as_str(), "mr_warning=one errno=5  two\nerrno=0\n\n");
}

/// `wg set` says strerror(-N) of the number in the answer.
#[test]
fn error_numbers_go_out_negative() {
    assert_eq!(errno_text(Errno::Ok), "errno=0\n\n");
    assert_eq!(errno_text(Errno::NotSupported), "errno=-95\n\n");
}
