//! Which relay is believed, as an operator configures it: pins, authorities, the environment's
//! proxy, and what is said when it is another one.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use millrace_lab::gateway::own_program;
use millrace_lab::nat::{
    DERPER_PORT, Host, Internet, PROXY_PORT, RELAY_NAME, Router, RouterOptions, SERVER_V4,
    names_for,
};
use millrace_lab::{Daemon, Lab, Node, NodeOptions, Pair, Relay, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

/// A relay with a certificate that it signed itself, and two hosts; the first is looked at.
struct World {
    pair: Pair,
    relay: Relay,
    routers: [Router; 2],
    internet: Internet,
    lab: Lab,
}

impl World {
    /// Nobody looks for paths yet.
    fn new(environment: impl Fn(&Router) -> Vec<(String, String)>) -> Self {
        let lab = Lab::new().unwrap();
        let internet = Internet::new(&lab).unwrap();
        let relay = Relay::start(&lab, &internet).unwrap();
        let router = |name: &str| internet.router(&lab, name, RouterOptions::default()).unwrap();
        let routers = [router("ra"), router("rb")];
        let hosts = [routers[0].host(&lab, "a").unwrap(), routers[1].host(&lab, "b").unwrap()];
        let options = || NodeOptions {
            control: false,
            environment: environment(&routers[0]),
            ..NodeOptions::default()
        };
        let pair = Pair::start(&lab, &relay, hosts, [options(), options()], 0).unwrap();
        Self { pair, relay, routers, internet, lab }
    }

    fn node(&self) -> &Node {
        &self.pair.nodes[0]
    }

    /// Writes the first node's `[discovery]`.
    fn configure(&self, discovery: &str) {
        let file = self.node().gateway.configuration_file();
        let text = fs::read_to_string(&file).unwrap();
        let (rest, _) = text.split_once("[discovery]").unwrap();
        let port_mapping = "port_mapping = \"off\"";
        fs::write(&file, format!("{rest}[discovery]\n{discovery}\n{port_mapping}\n")).unwrap();
    }

    fn start(&mut self) {
        self.pair.nodes[0].start_control(&self.lab).unwrap();
    }

    fn reload(&mut self, discovery: &str) {
        self.configure(discovery);
        self.pair.nodes[0].control().unwrap().signal(libc::SIGHUP);
    }

    /// The first relay of `status`, once it is as wished.
    fn relay_when(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = wait_for(what, LIMIT, || {
            last = self.node().paths().ok()?["relays"][0].clone();
            is(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|error| panic!("{error}; the relay is {last:#}"))
    }

    fn relay_when_down(&self, because: &str) -> String {
        let says = |relay: &Value| relay["state"].as_str().is_some_and(|s| s.contains(because));
        let relay = self.relay_when(because, says);
        assert_eq!(relay["up"], false, "{relay:#}");
        relay["state"].as_str().unwrap().to_owned()
    }

    fn relay_when_up(&self) -> Value {
        self.relay_when("a relay that is up", |relay| relay["up"] == true)
    }

    /// An unmodified derper without TLS.
    fn derper(&self) -> Daemon {
        self.internet.start_derper(&self.lab, false).unwrap()
    }

    /// The first server of `millrace netcheck`.
    fn netcheck(&self, adapt: impl Fn(&mut Command)) -> Value {
        let host: &Host = &self.node().host;
        let mut command = host.namespace.command(own_program("millrace").unwrap());
        let file = self.node().gateway.configuration_file();
        command.args(["netcheck", "--json", "--no-hairpin", "--config"]).arg(file);
        adapt(&mut command);
        names_for(&self.lab, &mut command).unwrap();
        let output = host.namespace.output(&mut command, "").unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        let document: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {:?}: {stderr}", output.stdout));
        document["servers"][0]["tcp"].clone()
    }
}

/// What the words before announce.
fn after<'t>(text: &'t str, words: &str) -> &'t str {
    let (_, rest) = text.split_once(words).unwrap_or_else(|| panic!("no {words:?} in {text}"));
    rest.split([' ', ';', ',']).next().unwrap()
}

#[test]
fn a_pinned_relay_is_believed_and_another_is_told_from_it() {
    let mut world = World::new(|_| Vec::new());
    let _derper = world.derper();
    let discovery = |certificate: &str, key: &str| {
        format!(
            "relay = [{{ url = \"https://{RELAY_NAME}\", certificate = \"{certificate}\"{key} }}, \
             \"http://{}:{DERPER_PORT}\"]",
            SERVER_V4[0]
        )
    };
    let wrong = format!("sha256:{}", "07".repeat(32));
    world.configure(&discovery(&wrong, ""));
    world.start();

    // What was expected, what was seen, what to do; and it is tried again.
    let state = world.relay_when_down("another than the pinned one");
    assert!(state.contains(&format!("expected {wrong}")), "{state}");
    assert!(state.contains("write either into `certificate` of this relay and reload"), "{state}");
    assert!(state.contains("; tried again in "), "{state}");
    let seen = after(&state, "seen ").to_owned();
    // As the manual asks for it on the relay's host.
    let pem = world.relay.certificate_file();
    let sha256 = |openssl: &str| {
        let line = format!("openssl x509 -in {} {openssl} | sha256sum", pem.display());
        let output = Command::new("sh").args(["-c", &line]).output().unwrap();
        assert!(output.stderr.is_empty(), "{output:?}: run scripts/setup");
        format!("sha256:{}", str::from_utf8(&output.stdout).unwrap().split(' ').next().unwrap())
    };
    let public_key = sha256("-pubkey -noout | openssl pkey -pubin -outform der");
    assert_eq!(seen, sha256("-outform der"));
    assert!(state.contains(&format!("with {public_key} (its public key)")), "{state}");
    let name = world.node().gateway.interface().to_owned();
    let mut status = world.node().host.namespace.command(own_program("millrace").unwrap());
    let text = String::from_utf8(status.args(["status", &name]).output().unwrap().stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("relay https")).unwrap();
    assert!(line.contains("(trust pinned): the certificate is another"), "{text}");
    let tcp = world.netcheck(|_| ());
    assert!(tcp["error"].as_str().is_some_and(|said| said.contains(&seen)), "{tcp:#}");
    let log = world.pair.nodes[0].control().unwrap().log();
    assert_eq!(log.matches("another than the pinned one").count(), 1, "once is enough: {log}");

    // The other relay does not notice that this one is mended.
    let is_up = || {
        let relay = world.node().paths().ok()?["relays"][1].clone();
        (relay["up"] == true).then_some(())
    };
    wait_for("the other relay", LIMIT, is_up).unwrap();
    let start = Instant::now();
    let stayed = |world: &World| {
        let at_least = start.elapsed().as_secs_f64();
        let relay = world.node().paths().unwrap()["relays"][1].clone();
        let since = relay["since_seconds"].as_f64().unwrap_or(0.0);
        assert!(since >= at_least, "left for a reload: up since {since} s, and not {at_least} s");
    };
    world.reload(&discovery(&seen, ""));
    let relay = world.relay_when_up();
    assert_eq!((&relay["trust"], &relay["key_pinned"]), (&"pinned".into(), &false.into()));
    stayed(&world);
    let tcp = world.netcheck(|_| ());
    assert!(tcp["ready_seconds"].is_number(), "{tcp:#}");

    // The same for its DERP key.
    let key = |key: &str| format!(", key = \"{key}\"");
    let own = "AnPqrHBUF916ovweo4Po8I0uoPG3/lt3uHcTYVh5ixY=";
    world.reload(&discovery(&seen, &key(own)));
    let state = world.relay_when_down("the relay's key is ");
    assert!(state.contains(&format!("expected {own}")), "{state}");
    let right = key(after(&state, "the relay's key is "));
    world.reload(&discovery(&public_key, &right));
    assert_eq!(world.relay_when_up()["key_pinned"], true);
    stayed(&world);

    // A file that is wrong changes nothing.
    world.reload(&discovery("sha256:07", &right));
    let control = world.pair.nodes[0].control().unwrap();
    control.wait_for_log("expected sha256: and 64 hex digits", LIMIT).unwrap();
    assert_eq!(world.relay_when_up()["trust"], "pinned");
}

#[test]
fn authorities_of_the_system_of_a_file_and_of_both() {
    let world = World::new(|_| Vec::new());
    let of_relay = world.relay.certificate_file();
    let made = rcgen::generate_simple_self_signed(vec!["stranger.test".to_owned()]).unwrap();
    let stranger = world.lab.directory().join("stranger.pem");
    fs::write(&stranger, made.cert.pem()).unwrap();
    let reaches = |discovery: &str, system: &std::path::Path| {
        world.configure(&format!("relay = [\"https://{RELAY_NAME}\"]\n{discovery}"));
        // The system's authorities are those of this file, as rustls-native-certs reads them.
        let tcp = world.netcheck(|command| {
            command.env("SSL_CERT_FILE", system);
        });
        let refused = tcp["error"].as_str().map(|error| {
            assert!(error.contains("signed by nobody whom we trust"), "{error}");
        });
        refused.is_none()
    };
    let file = |path: &std::path::Path| format!("relay_ca_file = {path:?}\n");
    let both = "relay_ca = \"both\"";
    assert!(reaches("", &of_relay));
    assert!(!reaches("", &stranger));
    assert!(!reaches(&file(&stranger), &of_relay), "the file stands instead of the system's");
    assert!(reaches(&(file(&stranger) + both), &of_relay));
    assert!(reaches(&(file(&of_relay) + both), &stranger));
}

#[test]
fn the_environment_names_the_proxy() {
    let proxy = |router: &Router| format!("http://{}:{PROXY_PORT}", router.lan_v4(1));
    let mut world = World::new(|router| {
        vec![("HTTPS_PROXY".into(), proxy(router)), ("NO_PROXY".into(), "inside.test".into())]
    });
    let _proxy = world.routers[0].start_proxy(&world.lab, None).unwrap();
    let relay = world.relay.discovery();
    world.configure(&format!("{relay}proxy = \"environment\""));
    world.start();
    let up = world.relay_when_up();
    assert!(up["state"].as_str().unwrap().contains("through a proxy"), "{up:#}");
    assert_eq!(up["trust"], "file");
    // Without that line the environment does not count.
    world.reload(&relay);
    let directly =
        |relay: &Value| relay["up"] == true && !relay["state"].to_string().contains("proxy");
    world.relay_when("a relay that is reached directly", directly);
}
