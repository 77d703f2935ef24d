//! Two gateways, each behind a network of some kind, and a relay between.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use std::net::IpAddr;
use std::time::Duration;

use millrace_lab::gateway::own_program;
use millrace_lab::nat::{Hairpin, Host, Internet, Nat, Nat64, Router, RouterOptions};
use millrace_lab::node::PORT;
use millrace_lab::{
    Capture, Daemon, Lab, Marker, Namespace, Node, NodeOptions, Pair, Relay, Result,
};

/// For everything that must happen sooner or later on a loaded machine.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Two hosts and what is between them.
pub struct World {
    pub hosts: [Host; 2],
    pub routers: Vec<Router>,
    pub options: [NodeOptions; 2],
    /// Where packets must not show the inside, beside the core.
    pub watched: Vec<Namespace>,
    /// What else runs.
    pub daemons: Vec<Daemon>,
    pub nat64: Option<Nat64>,
    /// The address at which A must reach B in the end, where the row says so.
    pub target: Option<IpAddr>,
}

impl World {
    /// Each host behind a router of its own at the core.
    pub fn apart(lab: &Lab, internet: &Internet, options: [RouterOptions; 2]) -> Result<Self> {
        let [a, b] = options;
        let routers =
            vec![internet.router(lab, "router a", a)?, internet.router(lab, "router b", b)?];
        let hosts = [routers[0].host(lab, "a")?, routers[1].host(lab, "b")?];
        Ok(Self::new(hosts, routers))
    }

    pub fn new(hosts: [Host; 2], routers: Vec<Router>) -> Self {
        Self {
            hosts,
            routers,
            options: [NodeOptions::default(), NodeOptions::default()],
            watched: Vec::new(),
            daemons: Vec::new(),
            nat64: None,
            target: None,
        }
    }
}

/// A lab in which both gateways run. Fields are dropped in this order.
pub struct Running {
    pub pair: Pair,
    pub relay: Relay,
    pub routers: Vec<Router>,
    captures: Vec<Capture>,
    pub daemons: Vec<Daemon>,
    _nat64: Option<Nat64>,
    pub target: Option<IpAddr>,
    pub internet: Internet,
    pub lab: Lab,
}

impl Running {
    /// Starts the relay, the captures and both gateways, `first` before the other.
    pub fn start(
        world: impl FnOnce(&Lab, &Internet) -> Result<World>,
        first: usize,
    ) -> Result<Self> {
        let lab = Lab::new()?;
        let internet = Internet::new(&lab)?;
        let World { hosts, routers, options, watched, daemons, nat64, target } =
            world(&lab, &internet)?;
        let relay = Relay::start(&lab, &internet)?;
        let mut captures = vec![Capture::start(&lab, &internet.core)?];
        for namespace in &watched {
            captures.push(Capture::start(&lab, namespace)?);
        }
        let pair = Pair::start(&lab, &relay, hosts, options, first)?;
        Ok(Self { pair, relay, routers, captures, daemons, _nat64: nat64, target, internet, lab })
    }

    /// Ends the captures; an error if one shows anything of the inside.
    pub fn finish(self) -> Result<()> {
        let inner = self.pair.inner_addresses();
        let markers: [Marker; 1] = [self.pair.marker];
        for capture in self.captures {
            capture.finish(&markers, &inner)?.check()?;
        }
        Ok(())
    }
}

/// What `millrace why --json` says of the only peer.
pub fn why(node: &Node) -> serde_json::Value {
    try_why(node).expect("an answer of the control process")
}

/// The same; none while no control process answers.
pub fn try_why(node: &Node) -> Option<serde_json::Value> {
    let status = node.status().unwrap();
    let key = status["peers"][0]["public_key"].as_str().unwrap();
    let mut command = node.host.namespace.command(own_program("millrace").unwrap());
    command.args(["why", key, "--json", "--interface", node.gateway.interface()]);
    serde_json::from_slice(&command.output().unwrap().stdout).ok()
}

/// Home routers with these NATs.
pub fn nats(a: Nat, b: Nat) -> [RouterOptions; 2] {
    [RouterOptions::nat(a), RouterOptions::nat(b)]
}

/// Two homes with the same addresses inside, behind one carrier's NAT: carrier, home of A, home of B.
pub fn carrier(
    lab: &Lab,
    internet: &Internet,
    hairpin: Hairpin,
    between: [u8; 3],
) -> Result<World> {
    let options =
        RouterOptions { hairpin, lan: Some(between), ..RouterOptions::nat(Nat::FULL_CONE) };
    let carrier = internet.router(lab, "carrier", options)?;
    let home = || RouterOptions { lan: Some([192, 168, 1]), ..RouterOptions::default() };
    let a = internet.router_behind(lab, "home a", home(), &carrier)?;
    let b = internet.router_behind(lab, "home b", home(), &carrier)?;
    let hosts = [a.host(lab, "a")?, b.host(lab, "b")?];
    let watched = vec![carrier.namespace().clone()];
    let mut world = World { watched, ..World::new(hosts, vec![carrier, a, b]) };
    // Equal ports at one carrier would be another row.
    world.options[0].port = PORT + 1;
    Ok(world)
}
