//! What the namespace tests share. Each test file uses a part of it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test program compiles this module and uses its own part"
)]

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, UdpSocket},
    os::unix::net::UnixStream,
    time::Duration,
};

use millrace_lab::{
    Gateway, Implementation, Lab, Namespace, Side, Site, SiteOptions, Tunnel, TunnelOptions,
    ping::Ping,
    probe::{Echo, every_length},
    tunnel::{Watch, connect},
};

/// Long enough for a first handshake with one lost initiation (5 s) on a loaded machine.
pub const CONNECT: Duration = Duration::from_secs(15);

/// Whose device is tested: ours. MILLRACE_TEST_SUBJECT puts a foreign one in its place, which tests
/// the tests: what fails there too is no fault of ours.
pub fn subject() -> Implementation {
    match std::env::var("MILLRACE_TEST_SUBJECT").as_deref() {
        Err(_) => Implementation::Millrace,
        Ok("wireguard-go") => Implementation::WireguardGo,
        Ok("boringtun") => Implementation::Boringtun,
        Ok("gotatun") => Implementation::Gotatun,
        Ok(other) => panic!("MILLRACE_TEST_SUBJECT names {other:?}, which is not in the lab"),
    }
}

/// A site with a tunnel and a capture of its outside links.
pub struct World {
    // Dropped in this order: the devices, the capture, the namespaces, the directory.
    pub tunnel: Tunnel,
    pub watch: Watch,
    pub site: Site,
    pub lab: Lab,
}

impl World {
    /// Devices configured, no packet sent.
    pub fn new(implementations: [Implementation; 2], options: &TunnelOptions) -> Self {
        Self::on(&SiteOptions::default(), implementations, options)
    }

    /// The same on other links.
    pub fn on(
        site: &SiteOptions,
        implementations: [Implementation; 2],
        options: &TunnelOptions,
    ) -> Self {
        let lab = Lab::new().unwrap();
        let site = Site::new(&lab, site).unwrap();
        let watch = Watch::start(&lab, &site).unwrap();
        let tunnel = Tunnel::start(&lab, &site, implementations, options).unwrap();
        Self { tunnel, watch, site, lab }
    }

    /// Brings the tunnel up from A, which then is the initiator.
    pub fn connect(&self) {
        connect(&self.site.a, &self.site.b, CONNECT).unwrap();
    }

    /// Every payload length from 0 to 1500, from `from` to `to`, over the inner family asked for.
    pub fn every_length(&self, from: &Side, to: &Side, inner_v6: bool) {
        let address: IpAddr = if inner_v6 { to.host_v6.into() } else { to.host_v4.into() };
        let echo = Echo::start(&to.host, SocketAddr::new(address, 0)).unwrap();
        let lengths =
            every_length(&from.host, echo.address(), 0..=1500, self.watch.marker()).unwrap();
        echo.stop();
        assert_eq!((lengths.passed, lengths.lost.as_slice()), (1501, &[][..]));
        // Only the lengths above the tunnel's MTU may teach the host the path MTU by a loss.
        let early: Vec<_> = lengths.retried.iter().filter(|(len, _)| *len < 1300).collect();
        assert!(early.is_empty(), "lost at first: {early:?}");
    }

    /// Shows the capture one datagram, where all others go another way: an empty one proves nothing.
    pub fn be_seen_outside(&self) {
        /// RFC 863: nobody answers.
        const DISCARD_PORT: u16 = 9;
        let a = &self.site.a;
        let send = || UdpSocket::bind("0.0.0.0:0")?.send_to(b"seen", (a.router_v4, DISCARD_PORT));
        a.gateway.run(send).unwrap();
    }

    /// All of `count` pings from one host to the other are answered. Returns how many were sent over
    /// IPv4 and IPv6: more, where an answer was late.
    pub fn ping(&self, from: &Side, to: &Side, count: u32) -> [u64; 2] {
        let ping = Ping { count, marker: Some(self.watch.marker()), ..Ping::default() };
        [IpAddr::from(to.host_v4), to.host_v6.into()].map(|address| {
            let report = ping.run(&from.host, address).unwrap();
            assert!(report.complete(), "{report:?} from {} to {address}", from.host.name());
            report.sent.into()
        })
    }

    /// As [`Self::ping`], right after a restart: packets of the lost session may go missing before the
    /// new one carries all three.
    pub fn ping_again(&self, from: &Side, to: &Side) {
        for address in [IpAddr::from(to.host_v4), to.host_v6.into()] {
            let ping = Ping { count: 3, marker: Some(self.watch.marker()), ..Ping::default() };
            let whole = || ping.run(&from.host, address).unwrap().complete().then_some(());
            millrace_lab::wait_for("three answered pings", CONNECT, whole).unwrap();
        }
    }

    /// Checks that nothing leaked. The last act of every test.
    pub fn finish(self) {
        // While the tunnel still is there: without its routes, what the hosts' connections still say
        // would leave in the clear by the default route, as with any WireGuard.
        let report = self.watch.finish().unwrap();
        drop(self.tunnel);
        assert_eq!(report.missed, 0, "the capture is incomplete: {report:?}");
    }
}

/// How many packets a device dropped for the reason `name`, as `millrace status` counts them.
pub fn drop_count(gateway: &Gateway, name: &str) -> u64 {
    let prefix = format!("{name} ");
    let counts = facts(gateway, "drop");
    counts.iter().find_map(|line| line.strip_prefix(&prefix)?.parse().ok()).unwrap_or(0)
}

/// The value of one `mr_` line of the status.
pub fn fact(gateway: &Gateway, key: &str) -> Option<String> {
    facts(gateway, key).into_iter().next()
}

/// The values of all `mr_` lines with the key; none while it does not answer.
pub fn facts(gateway: &Gateway, key: &str) -> Vec<String> {
    let start = format!("mr_{key}=");
    let text = try_ask(gateway.interface(), "get=1\n\n").unwrap_or_default();
    text.lines().filter_map(|line| line.strip_prefix(&start).map(str::to_owned)).collect()
}

/// One answer of the UAPI socket to `request`.
pub fn ask(interface: &str, request: &str) -> String {
    try_ask(interface, request).unwrap()
}

/// An error: nobody answers.
fn try_ask(interface: &str, request: &str) -> io::Result<String> {
    let mut socket = UnixStream::connect(format!("/run/wireguard/{interface}.sock"))?;
    socket.set_read_timeout(Some(CONNECT))?;
    socket.write_all(request.as_bytes())?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Detaches the XDP program of a gateway's outside interface, as an administrator could.
pub fn detach_xdp(gateway: &Namespace) {
    // Of all links on this machine, that of the program on this interface.
    let shown = gateway.exec("ip -d link show dev wan").unwrap();
    let program = shown.split("prog/xdp id ").nth(1).unwrap().split(' ').next().unwrap();
    // It fails while another test is attaching.
    let links = || gateway.exec("bpftool link show").ok();
    let links = millrace_lab::wait_for("the list of links", CONNECT, links).unwrap();
    let ours =
        |line: &&str| line.contains(": xdp") && line.trim().ends_with(&format!("prog {program}"));
    let line = links.lines().find(ours).unwrap_or_else(|| panic!("no {program} in {links}"));
    let number = line.split(':').next().unwrap();
    gateway.exec(&format!("bpftool link detach id {number}")).unwrap();
}
