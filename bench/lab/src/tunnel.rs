//! A tunnel between the two gateways of a site.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::{
    Capture, Error, Gateway, GatewayOptions, Implementation, Lab, Marker, Peer, Refusal, Result,
    Side, Site,
    capture::CaptureReport,
    keys::{KeyPair, random_key},
    ping::Ping,
    wait_for,
};

/// The UDP port of both gateways.
const PORT: u16 = 51820;

/// What may differ between tunnels.
#[derive(Clone, Debug)]
pub struct TunnelOptions {
    /// Whether the outer packets are IPv6.
    pub outer_v6: bool,
    /// Whether there is a preshared key.
    pub preshared_key: bool,
    /// Persistent keepalive of A and of B, in seconds.
    pub keepalive_s: [Option<u16>; 2],
    /// Whether A knows B's endpoint, and B knows A's. One that does not cannot be the initiator.
    pub knows_endpoint: [bool; 2],
    /// Whether the gateways' addresses will change.
    pub roams: bool,
    /// MTU of both tunnel interfaces, in bytes.
    pub mtu: u32,
    /// Lines for millrace's TOML file.
    pub toml: String,
    /// More such lines, for A alone and for B alone.
    pub side_toml: [String; 2],
    /// System calls that fail in A's and in B's process.
    pub refusals: [Vec<Refusal>; 2],
    /// Whether logs hold more than errors.
    pub verbose: bool,
}

impl Default for TunnelOptions {
    fn default() -> Self {
        Self {
            outer_v6: false,
            preshared_key: true,
            keepalive_s: [None; 2],
            knows_endpoint: [true; 2],
            roams: false,
            mtu: 1420,
            toml: String::new(),
            side_toml: [const { String::new() }; 2],
            refusals: [const { Vec::new() }; 2],
            verbose: true,
        }
    }
}

/// Two configured gateways; no handshake has happened yet.
#[derive(Debug)]
pub struct Tunnel {
    /// The device on gateway A.
    pub a: Gateway,
    /// The device on gateway B.
    pub b: Gateway,
}

impl Tunnel {
    /// Starts `implementations` on the gateways A and B of `site`, each as the other's peer.
    pub fn start(
        lab: &Lab,
        site: &Site,
        implementations: [Implementation; 2],
        options: &TunnelOptions,
    ) -> Result<Self> {
        let keys = [KeyPair::generate()?, KeyPair::generate()?];
        let preshared_key = options.preshared_key.then(random_key).transpose()?;
        let sides = [&site.a, &site.b];
        let start = |i: usize| {
            let (near, far) = (sides[i], sides[1 - i]);
            let peer = Peer {
                public_key: keys[1 - i].public.clone(),
                preshared_key: preshared_key.clone(),
                endpoint: options.knows_endpoint[i].then(|| endpoint(far, options.outer_v6)),
                allowed_ips: far.allowed_ips(),
                keepalive_s: options.keepalive_s[i],
            };
            let options = GatewayOptions {
                implementation: implementations[i],
                private_key: keys[i].private.clone(),
                listen_port: PORT,
                addresses: near.tunnel_addresses(),
                mtu: options.mtu,
                fwmark: None,
                roams: options.roams,
                peers: vec![peer],
                toml: format!("{}\n{}", options.toml, options.side_toml[i]),
                refusals: options.refusals[i].clone(),
                verbose: options.verbose,
            };
            Gateway::start(lab, &near.gateway, options)
        };
        Ok(Self { a: start(0)?, b: start(1)? })
    }
}

/// Where a side's gateway is reached from outside.
pub fn endpoint(side: &Side, v6: bool) -> SocketAddr {
    let address: IpAddr = if v6 { side.wan_v6.into() } else { side.wan_v4.into() };
    SocketAddr::new(address, PORT)
}

/// Pings from `from`'s host to `to`'s until the first answer comes; the way to bring a tunnel up.
pub fn connect(from: &Side, to: &Side, limit: Duration) -> Result<()> {
    let ping = Ping { count: 1, ..Ping::default() };
    let mut failure = None;
    let connected = wait_for("the first ping through the tunnel", limit, || {
        match ping.run(&from.host, to.host_v4) {
            Ok(report) => report.complete().then_some(()),
            Err(error) => {
                failure = Some(error);
                None
            }
        }
    });
    connected.map_err(|error| match (error, failure) {
        (Error::Timeout { what, waited }, Some(failure)) => {
            Error::Timeout { what: format!("{what} ({failure})"), waited }
        }
        (error, _) => error,
    })
}

/// A capture of a site's outside links, with the markers that must not be found in it.
#[derive(Debug)]
pub struct Watch {
    capture: Capture,
    inner: Vec<IpAddr>,
    marker: Marker,
}

impl Watch {
    /// Starts to record everything that passes the router.
    pub fn start(lab: &Lab, site: &Site) -> Result<Self> {
        Ok(Self {
            capture: Capture::start(lab, &site.router)?,
            inner: site.inner_addresses(),
            marker: Marker::random()?,
        })
    }

    /// The pattern to send inside.
    pub fn marker(&self) -> Marker {
        self.marker
    }

    /// Ends the capture; an error if anything of the inside was seen, or nothing at all.
    pub fn finish(self) -> Result<CaptureReport> {
        let report = self.capture.finish(&[self.marker], &self.inner)?;
        report.check()?;
        Ok(report)
    }
}
