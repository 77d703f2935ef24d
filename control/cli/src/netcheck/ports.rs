//! Which port-mapping protocols the router speaks, and whether a port that it opens leads in from
//! outside: by opening one, not the one that is asked from, and giving it back.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use millrace_control::network::Network;
use millrace_control::portmap_driver::PortmapDriver;
use millrace_path::limits::MAPPING_LIFETIME;
use millrace_path::netcheck::PortMapping;
use millrace_path::portmap::pcp::Nonce;
use millrace_path::portmap::{Answered, Config, Event, Router};
use millrace_path::time::Instant;

/// A router that answered has this long to open the port; one that did not is given up sooner.
const LIMIT: Duration = Duration::from_secs(4);

pub(super) struct Ports {
    driver: PortmapDriver,
    /// Keeps the number from others.
    _port: UdpSocket,
    end: Instant,
    mapped: Option<SocketAddr>,
    /// A protocol answered and opened nothing.
    failed: bool,
}

impl Ports {
    /// None where there is no router to ask.
    pub(super) fn new(now: Instant, network: &Network) -> io::Result<Option<Self>> {
        let Some((route, own)) = network.gateway(false) else { return Ok(None) };
        let Some(address) = route.gateway else { return Ok(None) };
        let router = Router { address, own, ifindex: route.ifindex };
        let port = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let config = Config {
            internal_port: port.local_addr()?.port(),
            lifetime: MAPPING_LIFETIME,
            nonce: Nonce(rand::random()),
        };
        let mut driver = PortmapDriver::new(config)?;
        driver.set_router(now, Some(router));
        let end = now + LIMIT;
        Ok(Some(Self { driver, _port: port, end, mapped: None, failed: false }))
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.driver.interest().0
    }

    pub(super) fn deadline(&self) -> Instant {
        self.driver.deadline().map_or(self.end, |at| at.min(self.end))
    }

    pub(super) fn handle(&mut self, now: Instant) {
        self.driver.handle(now);
        while let Some(event) = self.driver.next_event() {
            match event {
                Event::Mapped(mapped) => {
                    self.mapped = (!mapped.behind_nat).then_some(mapped.external);
                    self.failed = mapped.behind_nat;
                }
                Event::Lost { .. } => self.mapped = None,
                Event::Failed { .. } => self.failed = true,
                Event::Answered(_) | Event::Closed => {}
            }
        }
    }

    /// Nothing more is to be learned.
    pub(super) fn is_settled(&self, now: Instant) -> bool {
        let Answered { pcp, nat_pmp, upnp } = self.driver.answered();
        let all = [pcp, nat_pmp, upnp];
        let some = all.contains(&Some(true));
        let known = all.iter().all(Option::is_some);
        now >= self.end || known && (!some || self.mapped.is_some() || self.failed)
    }

    /// What is known now; gives the port back.
    pub(super) fn finish(self) -> PortMapping {
        let Answered { pcp, nat_pmp, upnp } = self.driver.answered();
        self.driver.finish();
        PortMapping { upnp, nat_pmp, pcp, mapped: self.mapped }
    }
}
