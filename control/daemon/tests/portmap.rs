//! Port mapping by real miniupnpd, on a router between real networks.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use millrace_control::clock;
use millrace_control::portmap_driver::PortmapDriver;
use millrace_lab::nat::{
    Host, Internet, Ipv6, PortMapping, Router as LabRouter, RouterOptions, SERVER_V4, SERVER_V6,
};
use millrace_lab::{Daemon, Lab, Namespace, second_chance, wait_for};
use millrace_path::Instant;
use millrace_path::limits::{MAPPING_LIFETIME, REBOOT_CHECK_INTERVAL};
use millrace_path::portmap::pcp::Nonce;
use millrace_path::portmap::{Answered, Config, Event, Mapped, Protocol, Router};
use rustix::event::{PollFd, PollFlags, poll};

/// Where UPnP's searches go.
const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 255, 250);
/// The tunnel's port.
const PORT: u16 = 51820;
/// Generous: the machine may be loaded.
const LIMIT: Duration = Duration::from_secs(30);

/// A host behind a router with miniupnpd.
struct Home {
    router: LabRouter,
    host: Host,
    inside: UdpSocket,
    internet: Internet,
    lab: Lab,
}

impl Home {
    fn new() -> Self {
        Self::with(RouterOptions::default())
    }

    fn with(options: RouterOptions) -> Self {
        let lab = Lab::new().unwrap();
        let internet = Internet::new(&lab).unwrap();
        let router = internet.router(&lab, "router", options).unwrap();
        let host = router.host(&lab, "host").unwrap();
        let inside = bind(&host.namespace, host.v4(0).unwrap().into(), PORT);
        Self { router, host, inside, internet, lab }
    }

    fn start(&self, protocols: PortMapping) -> Daemon {
        self.router.start_port_mapping(&self.lab, protocols).unwrap()
    }

    /// A driver that was just told of the router.
    fn driver(&self, lifetime: Duration) -> PortmapDriver {
        let (address, own) = (self.router.lan_v4(1).into(), self.host.v4(0).unwrap().into());
        self.driver_to(Router { address, own, ifindex: 0 }, lifetime)
    }

    fn driver_to(&self, router: Router, lifetime: Duration) -> PortmapDriver {
        let nonce = Nonce([7; 12]);
        let mut driver =
            PortmapDriver::new(Config { internal_port: PORT, lifetime, nonce }).unwrap();
        self.host.namespace.run(|| driver.set_router(clock::now(), Some(router)));
        driver
    }

    /// Runs the driver until `done` says so of an event or of nothing.
    fn drive<T: Send>(
        &self,
        driver: &mut PortmapDriver,
        what: &str,
        done: impl FnMut(Option<&Event>, &PortmapDriver) -> Option<T> + Send,
    ) -> T {
        self.host.namespace.run(|| drive(driver, what, done))
    }

    fn mapped(&self, driver: &mut PortmapDriver) -> Mapped {
        self.drive(driver, "a mapping", |event, _| match event {
            Some(Event::Mapped(mapped)) => Some(*mapped),
            _ => None,
        })
    }

    /// Whether a datagram from outside arrives inside. From a port that was never used: what the
    /// router's connection tracking knows of others goes on without a mapping.
    fn is_reached(&self, external: SocketAddr) -> bool {
        let from = if external.is_ipv4() { SERVER_V4[0].into() } else { SERVER_V6[0].into() };
        // Below those that the kernel gives out.
        static PORTS: AtomicU16 = AtomicU16::new(20_000);
        let server = bind(&self.internet.server, from, PORTS.fetch_add(1, Ordering::Relaxed));
        let mut buffer = [0; 16];
        self.inside.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        while self.inside.set_nonblocking(true).is_ok() && self.inside.recv(&mut buffer).is_ok() {}
        self.inside.set_nonblocking(false).unwrap();
        (0..3).any(|_| {
            server.send_to(b"knock", external).unwrap();
            self.inside.recv(&mut buffer).is_ok_and(|len| &buffer[..len] == b"knock")
        })
    }

    /// What miniupnpd has put into the kernel.
    fn rules(&self) -> String {
        self.router.namespace().exec("nft list table inet miniupnpd").unwrap()
    }

    /// Drops what the router hears of one version of the datagram protocols.
    fn deaf_to_version(&self, version: u8) {
        let rules = format!(
            "table inet deaf {{
                chain input {{
                    type filter hook input priority -20;
                    udp dport 5351 @th,64,8 {version} drop
                }}
            }}\n"
        );
        self.router.namespace().exec_with_input("nft -f -", &rules).unwrap();
    }
}

fn bind(namespace: &Namespace, ip: IpAddr, port: u16) -> UdpSocket {
    namespace.run(|| UdpSocket::bind((ip, port)).unwrap())
}

fn drive<T>(
    driver: &mut PortmapDriver,
    what: &str,
    mut done: impl FnMut(Option<&Event>, &PortmapDriver) -> Option<T>,
) -> T {
    let limit = clock::now() + LIMIT;
    let mut seen = Vec::new();
    loop {
        while let Some(event) = driver.next_event() {
            if let Some(found) = done(Some(&event), driver) {
                return found;
            }
            seen.push(event);
        }
        if let Some(found) = done(None, driver) {
            return found;
        }
        let counters: Vec<_> = driver.counters().filter(|(_, count)| *count > 0).collect();
        assert!(clock::now() < limit, "no {what}: {seen:?} {counters:?}");
        wait(driver, limit);
        driver.handle(clock::now());
    }
}

fn wait(driver: &PortmapDriver, limit: Instant) {
    // Not longer than this, as `done` may look at other things than events.
    let soon = clock::now() + Duration::from_millis(100);
    let deadline = driver.deadline().unwrap_or(limit).min(limit).min(soon);
    let (fd, flags) = driver.interest();
    let mut fds = [PollFd::new(&fd, flags | PollFlags::ERR)];
    poll(&mut fds, Some(&clock::until(deadline))).unwrap();
}

fn counter(driver: &PortmapDriver, name: &str) -> u64 {
    driver.counters().collect::<BTreeMap<_, _>>()[name]
}

/// One protocol, or the best of several: mapped, reached from outside, given back at the end.
fn maps(home: &Home, protocol: Protocol, answered: Answered) {
    let external = SocketAddr::from((home.router.wan_v4(), PORT));
    assert!(!home.is_reached(external), "open before");
    let mut driver = home.driver(MAPPING_LIFETIME);
    let mapped = home.mapped(&mut driver);
    let lifetime = Some(MAPPING_LIFETIME);
    assert_eq!(mapped, Mapped { protocol, external, lifetime, behind_nat: false });
    assert!(home.is_reached(external), "{}", home.rules());
    home.drive(&mut driver, "all protocols' answers", |_, driver| {
        (driver.answered() == answered).then_some(())
    });
    home.host.namespace.run(|| driver.finish());
    // It answers before it has taken its rules away.
    wait_for("the rules to go", LIMIT, || (!home.rules().contains("51820")).then_some(())).unwrap();
    assert!(!home.is_reached(external), "open afterwards");
}

#[test]
fn all_protocols_are_seen_and_pcp_is_used() {
    let home = Home::new();
    let _daemon = home.start(PortMapping::All);
    let all = Answered { pcp: Some(true), nat_pmp: Some(true), upnp: Some(true) };
    maps(&home, Protocol::Pcp, all);
}

#[test]
fn pcp_alone() {
    let home = Home::new();
    let _daemon = home.start(PortMapping::PmpAndPcp);
    home.deaf_to_version(0);
    let answered = Answered { pcp: Some(true), nat_pmp: Some(false), upnp: Some(false) };
    maps(&home, Protocol::Pcp, answered);
}

#[test]
fn nat_pmp_alone() {
    let home = Home::new();
    let _daemon = home.start(PortMapping::PmpAndPcp);
    home.deaf_to_version(2);
    let answered = Answered { pcp: Some(false), nat_pmp: Some(true), upnp: Some(false) };
    maps(&home, Protocol::NatPmp, answered);
}

#[test]
fn upnp_alone() {
    let home = Home::new();
    let _daemon = home.start(PortMapping::Upnp);
    let answered = Answered { pcp: Some(false), nat_pmp: Some(false), upnp: Some(true) };
    maps(&home, Protocol::Upnp, answered);
}

/// Renewed in time and with the same port; without us it ends by itself.
#[test]
fn a_short_mapping_is_renewed() {
    // A machine that stands still for two seconds renews too late.
    second_chance(renewed);
}

fn renewed() {
    let home = Home::new();
    let _daemon = home.start(PortMapping::PmpAndPcp);
    let lifetime = Duration::from_secs(4);
    let mut driver = home.driver(lifetime);
    let mapped = home.mapped(&mut driver);
    assert_eq!(mapped.lifetime, Some(lifetime));
    let end = clock::now() + lifetime * 2;
    home.drive(&mut driver, "two lifetimes", |event, _| {
        assert!(!matches!(event, Some(Event::Mapped(_) | Event::Lost { .. })), "{event:?}");
        (clock::now() >= end).then_some(())
    });
    assert!(home.is_reached(mapped.external), "{}", home.rules());
    drop(driver);
    wait_for("the mapping to end", LIMIT, || (!home.rules().contains("51820")).then_some(()))
        .unwrap();
    assert!(!home.is_reached(mapped.external));
}

/// All of the router's state goes; it is noticed by its clock, or the number of its start.
fn maps_again(home: &Home, protocols: PortMapping, protocol: Protocol) {
    let daemon = home.start(protocols);
    let mut driver = home.driver(MAPPING_LIFETIME);
    let mapped = home.mapped(&mut driver);
    assert_eq!(mapped.protocol, protocol);
    assert!(home.is_reached(mapped.external));
    // A router that has just started looks the same after another start.
    let aged = clock::now() + Duration::from_secs(4);
    home.drive(&mut driver, "time to pass", |_, _| (clock::now() >= aged).then_some(()));
    daemon.kill();
    home.router.reboot().unwrap();
    let _daemon = home.start(protocols);
    assert!(!home.is_reached(mapped.external), "{}", home.rules());
    let started = clock::now();
    home.drive(&mut driver, "the mapping again", |_, _| {
        home.rules().contains("51820").then_some(())
    });
    let took = clock::now().since(started);
    assert!(home.is_reached(mapped.external), "{}", home.rules());
    // One interval of checks, and what a loaded machine needs.
    assert!(took < REBOOT_CHECK_INTERVAL + Duration::from_secs(10), "{took:?}");
}

#[test]
fn pcp_maps_again_after_a_reboot() {
    maps_again(&Home::new(), PortMapping::PmpAndPcp, Protocol::Pcp);
}

#[test]
fn nat_pmp_maps_again_after_a_reboot() {
    let home = Home::new();
    home.deaf_to_version(2);
    maps_again(&home, PortMapping::PmpAndPcp, Protocol::NatPmp);
}

#[test]
fn upnp_maps_again_after_a_reboot() {
    maps_again(&Home::new(), PortMapping::Upnp, Protocol::Upnp);
}

/// Another host answers each search at once, in all protocols, and leads to itself.
#[test]
fn a_rogue_on_the_lan_is_ignored() {
    let home = Home::new();
    let rogue = home.router.host(&home.lab, "rogue").unwrap();
    let own = rogue.v4(0).unwrap();
    let searches = bind(&rogue.namespace, Ipv4Addr::UNSPECIFIED.into(), 1900);
    rogue.namespace.run(|| searches.join_multicast_v4(&GROUP, &own).unwrap());
    let answers = bind(&rogue.namespace, own.into(), 5351);
    let web = rogue.namespace.run(|| TcpListener::bind((own, 80)).unwrap());
    web.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((_, from)) = searches.recv_from(&mut buffer) {
            let ssdp = format!("HTTP/1.1 200 OK\r\nLOCATION: http://{own}:80/x\r\n\r\n");
            let address = [0, 0x80, 0, 0, 0, 0, 0, 1, 6, 6, 6, 6];
            let mapped = [0, 0x81, 0, 0, 0, 0, 0, 1, 0xca, 0x6c, 0xca, 0x6c, 0, 0, 0x1c, 0x20];
            searches.send_to(ssdp.as_bytes(), from).unwrap();
            answers.send_to(&address, from).unwrap();
            answers.send_to(&mapped, from).unwrap();
        }
    });
    let mut driver = home.driver(MAPPING_LIFETIME);
    home.drive(&mut driver, "the rogue's answers", |_, driver| {
        (counter(driver, "not_the_router") >= 3).then_some(())
    });
    let _daemon = home.start(PortMapping::Upnp);
    let router = Router {
        address: home.router.lan_v4(1).into(),
        own: home.host.v4(0).unwrap().into(),
        ifindex: 0,
    };
    home.host.namespace.run(|| driver.set_router(clock::now(), Some(router)));
    let mapped = home.mapped(&mut driver);
    assert_eq!(mapped.external, SocketAddr::from((home.router.wan_v4(), PORT)));
    let never = web.accept().map(|(_, from)| from).map_err(|error| error.kind());
    assert_eq!(never, Err(ErrorKind::WouldBlock));
}

#[test]
fn an_ipv6_firewall_is_opened() {
    let home = Home::with(RouterOptions { ipv6: Ipv6::Open, ..RouterOptions::default() });
    let _daemon = home.start(PortMapping::PmpAndPcp);
    // Behind miniupnpd's own rules: in a chain of its own it would drop what those accept.
    let firewall =
        "nft add rule inet miniupnpd forward iifname wan meta nfproto ipv6 ct state new drop";
    home.router.namespace().exec(firewall).unwrap();
    let own = home.host.v6(0).unwrap();
    let inside = bind(&home.host.namespace, own.into(), PORT);
    let home = Home { inside, ..home };
    let external = SocketAddr::from((own, PORT));
    assert!(!home.is_reached(external), "open before");
    let address = home.router.lan_v6(1).unwrap().into();
    let router = Router { address, own: own.into(), ifindex: 0 };
    let mut driver = home.driver_to(router, MAPPING_LIFETIME);
    let mapped = home.mapped(&mut driver);
    assert_eq!((mapped.protocol, mapped.external), (Protocol::Pcp, external));
    assert!(home.is_reached(external), "{}", home.rules());
    home.host.namespace.run(|| driver.finish());
    wait_for("the pinhole to close", LIMIT, || (!home.is_reached(external)).then_some(())).unwrap();
}
