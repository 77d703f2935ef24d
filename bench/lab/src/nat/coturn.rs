//! coturn at the server site: a STUN server that nobody here wrote, which can answer from two
//! addresses and two ports of each family (RFC 5780).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use super::Internet;
use crate::{Daemon, Error, Lab, Result};

/// Its addresses: none of the relay's, so that nobody writes to the second one unless it is asked to.
pub const STUN_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(2, 255, 1, 20), Ipv4Addr::new(2, 255, 2, 20)];

/// The same of IPv6.
pub const STUN_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 0x20),
    Ipv6Addr::new(0x2001, 0xdb8, 5, 0, 0, 0, 0, 0x21),
];

/// Its first port; the other is the next.
pub const STUN_PORT: u16 = 3480;

/// A loaded machine starts it within this.
const START_LIMIT: Duration = Duration::from_secs(20);

impl Internet {
    /// Starts coturn at [`STUN_V4`] and [`STUN_V6`], and waits until it answers.
    pub fn start_coturn(&self, lab: &Lab) -> Result<Daemon> {
        self.server.ip(STUN_V4.map(|address| format!("addr add {address}/24 dev wan")))?;
        self.server.ip(STUN_V6.map(|address| format!("addr add {address}/64 dev wan nodad")))?;
        let mut command = self.server.command("turnserver");
        command.args(["-n", "--stun-only", "--no-cli", "--no-tls", "--no-dtls"]);
        for address in STUN_V4.map(IpAddr::from).into_iter().chain(STUN_V6.map(IpAddr::from)) {
            command.arg("-L").arg(address.to_string());
        }
        command.arg(format!("--listening-port={STUN_PORT}"));
        command.arg(format!("--alt-listening-port={}", STUN_PORT + 1));
        let pid = lab.directory().join("coturn.pid");
        command.arg("--log-file=stdout").arg("--pidfile").arg(pid);
        let mut coturn = Daemon::start(lab.directory(), "coturn", command).map_err(|error| {
            Error::Unexpected(format!("{error}; scripts/setup installs coturn"))
        })?;
        // The socket that it opens last.
        let to = SocketAddr::from((STUN_V4[1], STUN_PORT + 1));
        let ask = || {
            self.server.run(|| {
                let socket = UdpSocket::bind((STUN_V4[1], 0)).ok()?;
                socket.set_read_timeout(Some(Duration::from_millis(100))).ok()?;
                socket.send_to(b"\0\x01\0\0\x21\x12\xa4\x42coturn-there", to).ok()?;
                socket.recv(&mut [0; 100]).ok().map(drop)
            })
        };
        coturn.wait_for("an answer", START_LIMIT, ask)?;
        Ok(coturn)
    }
}
