//! Certificates from a real ACME server: Let's Encrypt's own test server, pebble, and its DNS.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::*;
use millrace_lab::{Daemon, Namespace, wait_for};
use millrace_relay::acme::certificate::Certificate;

/// Certificates are valid so long: the relay renews after two thirds.
const VALID_S: u64 = 18;
/// An order, or the wait for a renewal, on a busy machine.
const ORDER_LIMIT: Duration = Duration::from_secs(45);
const NAME: &str = "relay.test";
const DIRECTORY: &str = "https://127.0.0.1:14000/dir";
const MANAGEMENT: &str = "127.0.0.1:15000";
const DNS_MANAGEMENT: &str = "127.0.0.1:8055";

/// An ACME server whose names all lead to one address.
struct Authority {
    pebble: Daemon,
    _dns: Daemon,
    /// What its own HTTPS is trusted by.
    trusted: PathBuf,
}

impl Authority {
    /// It refuses `nonces_refused` of a hundred good nonces, to try its clients.
    fn start(
        namespace: &Namespace,
        directory: &Path,
        names_lead_to: &str,
        nonces_refused: u8,
    ) -> Self {
        let mut dns = namespace.command(lab("pebble-challtestsrv"));
        dns.args(["-http01=", "-https01=", "-tlsalpn01=", "-doh=", "-defaultIPv6="])
            .args(["-dnsserver=127.0.0.1:8053", "-management=127.0.0.1:8055"])
            .arg(format!("-defaultIPv4={names_lead_to}"));
        let mut dns = Daemon::start(directory, "dns", dns).unwrap();
        let open = |at: &str| namespace.run(|| std::net::TcpStream::connect(at)).ok().map(drop);
        dns.wait_for("its port", LIMIT, || open(DNS_MANAGEMENT)).unwrap();
        let (trusted, key) = certificate(directory);
        let config = format!(
            r#"{{"pebble":{{"listenAddress":"127.0.0.1:14000","managementListenAddress":{MANAGEMENT:?},
            "certificate":{trusted:?},"privateKey":{key:?},"httpPort":80,"tlsPort":443,
            "profiles":{{"default":{{"description":"short","validityPeriod":{VALID_S}}}}}}}}}"#
        );
        let path = directory.join("pebble.json");
        fs::write(&path, config).unwrap();
        let mut pebble = namespace.command(lab("pebble"));
        pebble.args(["-strict", "-dnsserver=127.0.0.1:8053", "-config"]).arg(path);
        // It would wait some seconds, to try its clients in that, too.
        pebble.env("PEBBLE_VA_NOSLEEP", "1");
        pebble.env("PEBBLE_WFE_NONCEREJECT", nonces_refused.to_string());
        let mut pebble = Daemon::start(directory, "pebble", pebble).unwrap();
        pebble.wait_for("its port", LIMIT, || open(MANAGEMENT)).unwrap();
        Self { pebble, _dns: dns, trusted }
    }

    /// The certificate to which all that it issues lead.
    fn root(&self, namespace: &Namespace, directory: &Path) -> PathBuf {
        let mut stream = tls_to(namespace, MANAGEMENT, &self.trusted);
        write!(stream, "GET /roots/0 HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        // It does not always say goodbye in TLS.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer).unwrap();
        let path = directory.join("root.pem");
        fs::write(&path, answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        path
    }
}

/// The configuration of a relay that asks `authority`, with everything it keeps in `directory`.
fn acme(directory: &Path, authority: &Authority) -> String {
    format!(
        "[https]\nlisten = [{HTTPS:?}]\n[http]\nlisten = [\"127.0.0.1:80\"]\n\
         [acme]\nnames = [{NAME:?}]\nterms_agreed = true\ncontact = \"operator@relay.test\"\n\
         directory = {DIRECTORY:?}\nca_file = {:?}\nstate_directory = {:?}\n",
        authority.trusted,
        directory.join("acme"),
    )
}

#[test]
fn a_certificate_is_obtained_served_and_renewed_and_goes_on_when_that_fails() {
    let namespace = Namespace::new("acme").unwrap();
    let outside = tempfile::tempdir().unwrap();
    let authority = Authority::start(&namespace, outside.path(), "127.0.0.1", 5);
    let relay = Relay::start_at(&namespace, |directory| acme(directory, &authority));
    let issued = "acme_orders_total{result=\"issued\"}";
    let until = |series: &str, at_least: u64| {
        let reached = || (relay.metric(series) >= at_least).then_some(());
        wait_for(format!("{series} to reach {at_least}"), ORDER_LIMIT, reached).unwrap();
    };
    until(issued, 1);
    let root = authority.root(&namespace, outside.path());
    // Trusted clients come in as soon as the new certificate is served.
    let login = |n| {
        let login = || Peer::login(tls(&namespace, &root), [n; 32]).ok();
        wait_for("a login", ORDER_LIMIT, login).unwrap()
    };
    let (mut a, mut b) = (login(1), login(2));
    let kept = relay.directory.path().join("acme");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&kept), 0o700);
    assert_eq!(mode(&kept.join("account.json")), 0o600);
    assert_eq!(mode(&kept.join("certificate.pem")), 0o600);
    let account = fs::read(kept.join("account.json")).unwrap();
    let first = fs::read(kept.join("certificate.pem")).unwrap();

    until(issued, 2);
    assert_ne!(fs::read(kept.join("certificate.pem")).unwrap(), first);
    assert_eq!(fs::read(kept.join("account.json")).unwrap(), account);
    assert_eq!(relay.daemon.log().matches("a new account").count(), 1);
    let mut c = login(3);
    a.send(c.key, b"old to new");
    c.expect_packet(a.key, b"old to new");

    authority.pebble.kill();
    until("acme_orders_total{result=\"failed\"}", 1);
    let log = relay.daemon.log();
    let error = log.lines().find(|line| line.contains("no new certificate")).unwrap();
    assert!(error.contains(DIRECTORY) && error.contains("check acme.directory"), "{error}");
    let file = Certificate::read(&kept.join("certificate.pem")).unwrap();
    assert!(file.is_for(&[NAME.to_owned()]));
    let end = file.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(relay.metric("certificate_not_after_seconds"), end);
    assert_eq!(relay.metric("config_last_reload_successful"), 1);
    assert_eq!(fs::read_dir(&kept).unwrap().count(), 2, "nothing half written is left");
    a.send(b.key, b"goes on");
    b.expect_packet(a.key, b"goes on");
}

#[test]
fn a_name_that_leads_elsewhere_is_said_and_tried_again() {
    let namespace = Namespace::new("acme").unwrap();
    let outside = tempfile::tempdir().unwrap();
    // Nobody listens there. No nonce is refused: an order that fails for that is tried again too late.
    let authority = Authority::start(&namespace, outside.path(), "127.0.0.9", 0);
    let mut relay = Relay::start_at(&namespace, |directory| acme(directory, &authority));
    relay.daemon.wait_for_log("did not find us by HTTP-01", ORDER_LIMIT).unwrap();
    let log = relay.daemon.log();
    let error = log.lines().find(|line| line.contains("did not find us")).unwrap();
    assert!(error.contains("127.0.0.9") && error.contains("its port 80"), "{error}");
    // The rest works: HTTPS speaks TLS, though with a certificate that nobody trusts.
    let unknown = get(&namespace, "127.0.0.1:80", "/.well-known/acme-challenge/none");
    assert!(unknown.starts_with("HTTP/1.1 404 "), "{unknown}");
    assert!(Peer::login(tls(&namespace, &authority.trusted), [1; 32]).is_err());
    relay.wait_for_metric("connection_errors_total{reason=\"tls\"}", 1);

    let mut dns = tcp(&namespace, DNS_MANAGEMENT);
    let body = r#"{"ip":"127.0.0.1"}"#;
    write!(dns, "POST /set-default-ipv4 HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    dns.read_to_end(&mut Vec::new()).unwrap();
    relay.daemon.wait_for_log("a new certificate for relay.test", ORDER_LIMIT).unwrap();
    let root = authority.root(&namespace, outside.path());
    wait_for("a login", ORDER_LIMIT, || Peer::login(tls(&namespace, &root), [1; 32]).ok()).unwrap();
}
