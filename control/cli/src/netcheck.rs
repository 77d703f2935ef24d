//! `millrace netcheck`: what the network around this host lets through. Needs no daemon and no
//! rights; asks from a port of its own.

mod ports;
mod servers;
mod text;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use millrace_config::Exit;
use millrace_config::config::EndpointName;
use millrace_config::discovery::HttpUrl;
use millrace_control::clock;
use millrace_control::netcheck_driver::{NetcheckDriver, NetcheckEvent, NetcheckSetup};
use millrace_control::network::Network;
use millrace_path::limits::LIFETIME_MAX;
use millrace_path::netcheck::{Depth, PortMapping, Prospect, Report};
use millrace_path::time::Instant;
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, Socket, Type};

use self::ports::Ports;
use crate::{Problem, print};

/// Longer datagrams are no STUN answers.
const DATAGRAM_MAX: usize = 1500;
/// Ports that are tried until one is free for both families.
const PORTS_TRIED_MAX: usize = 16;
/// Between two lines of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);

#[derive(Args)]
pub(crate) struct Arguments {
    /// Ask the relays and STUN servers of this interface's configuration: the one that it runs with, or
    /// /etc/millrace/INTERFACE.toml.
    #[arg(conflicts_with = "config")]
    interface: Option<String>,
    /// Ask the relays and STUN servers of this file's `[discovery]`, with its proxy and certificates.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A relay to ask, like `https://relay.example.net`; may be given several times. Its STUN service
    /// is expected on UDP port 3478.
    #[arg(long, value_name = "URL", value_delimiter = ',', value_parser = relay)]
    relay: Vec<HttpUrl>,
    /// A STUN server to ask, host:port; may be given several times. One that has two addresses
    /// (RFC 5780, as coturn) shows most.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', value_parser = stun)]
    stun: Vec<EndpointName>,
    /// The file of the authority that signed the relays' certificates (default: the system's).
    #[arg(long, value_name = "FILE")]
    relay_ca_file: Option<PathBuf>,
    /// The UDP port to ask from (default: a free one). Stop what else uses it.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    port: u16,
    /// Also measure how long the NAT keeps a mapping without traffic: takes as long, at most DURATION
    /// (like 90s; default 6m).
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true,
          default_missing_value = "6m", value_parser = duration)]
    lifetime: Option<Duration>,
    /// Do not ask the router to open a port (PCP, NAT-PMP, UPnP).
    #[arg(long)]
    no_port_mapping: bool,
    /// Do not send to our own address outside, which some firewalls report as an attack.
    #[arg(long)]
    no_hairpin: bool,
    /// Give up after DURATION, with exit code 124.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    timeout: Option<Duration>,
    /// Print the document millrace.netcheck/1.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Problem> {
    let end = arguments.timeout.map(|timeout| clock::now() + timeout);
    let (servers, port_mapping) = servers::find(arguments)?;
    let network =
        Network::look().map_err(|error| system("asking the kernel for addresses", &error))?;
    let is_tunnel = |ifindex| network.links.get(ifindex).is_some_and(|link| link.is_tunnel);
    let addresses = network.addresses.iter().filter(|address| !is_tunnel(&address.ifindex));
    let port = Port::open(arguments.port)?;
    let setup = NetcheckSetup {
        servers,
        addresses: addresses.map(|address| address.ip).collect(),
        port: port.number,
        home: None,
        port_mapping: PortMapping::default(),
        depth: Depth::Diagnosis { hairpin: !arguments.no_hairpin, lifetime: arguments.lifetime },
        written_to: Vec::new(),
    };
    if let Some(lifetime) = arguments.lifetime {
        let longest = lifetime.min(LIFETIME_MAX).as_secs();
        eprintln!("millrace: measuring the mapping's lifetime takes up to {longest} s");
    }
    let ports = if port_mapping { Ports::new(clock::now(), &network) } else { Ok(None) };
    let ports = ports.map_err(|error| system("opening a port to map", &error))?;
    let report = check(&port, setup, ports, end)?;
    if arguments.json {
        let text = serde_json::to_string_pretty(&report.document());
        let text =
            text.map_err(|error| Problem::new(Exit::Error, format!("writing JSON: {error}")))?;
        print(&text)?;
    } else {
        print(text::of(&report, arguments.lifetime.is_some()).trim_end())?;
    }
    Ok(exit(&report))
}

/// Works as wished, works less well, or not at all.
fn exit(report: &Report) -> Exit {
    match report.verdict().prospect {
        Prospect::Open | Prospect::Easy | Prospect::Unknown => Exit::Ok,
        Prospect::Hard | Prospect::RelayOnly => Exit::Degraded,
        Prospect::Nothing => Exit::NotConnected,
    }
}

/// Runs both to their end: the check, and what is asked of the router.
fn check(
    port: &Port,
    setup: NetcheckSetup,
    mut ports: Option<Ports>,
    end: Option<Instant>,
) -> Result<Report, Problem> {
    let mut driver = NetcheckDriver::new().map_err(|error| system("making descriptors", &error))?;
    let started = clock::now();
    let mut progress_at = started + PROGRESS_INTERVAL;
    driver.start(started, setup);
    let mut done = None;
    loop {
        while let Some(event) = driver.next_event() {
            match event {
                NetcheckEvent::Send { to, datagram } => {
                    if port.send(to, &datagram).is_err() {
                        driver.unsendable(clock::now(), to);
                    }
                }
                NetcheckEvent::Mapped { .. } => {}
                NetcheckEvent::Done(report) => done = Some(*report),
            }
        }
        let now = clock::now();
        if ports.as_ref().is_none_or(|ports| ports.is_settled(now))
            && let Some(mut report) = done
        {
            report.port_mapping = ports.map(Ports::finish).unwrap_or_default();
            return Ok(report);
        }
        if end.is_some_and(|end| end <= now) {
            return Err(Problem::new(Exit::Timeout, "no report within the time of --timeout"));
        }
        if progress_at <= now {
            progress_at = now + PROGRESS_INTERVAL;
            eprintln!("millrace: {} s ...", now.since(started).as_secs());
        }
        let deadlines = driver.deadline().into_iter().chain(ports.as_ref().map(Ports::deadline));
        let next = deadlines.chain(end).fold(progress_at, Instant::min);
        let mut descriptors = vec![PollFd::from_borrowed_fd(driver.interest().0, PollFlags::IN)];
        let router = ports.iter().map(|ports| ports.descriptor());
        descriptors.extend(router.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        descriptors.extend(port.sockets().map(|socket| PollFd::new(socket, PollFlags::IN)));
        match poll(&mut descriptors, Some(&clock::until(next))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(system("waiting", &error.into())),
        }
        port.receive(|from, bytes| driver.datagram(clock::now(), from, bytes));
        driver.handle(clock::now());
        if let Some(ports) = &mut ports {
            ports.handle(clock::now());
        }
    }
}

/// One port number, of both families where the host has both.
struct Port {
    number: u16,
    ipv4: Option<UdpSocket>,
    ipv6: Option<UdpSocket>,
}

impl Port {
    fn open(wanted: u16) -> Result<Self, Problem> {
        let mut last = None;
        for _ in 0..PORTS_TRIED_MAX {
            match Self::try_open(wanted) {
                Ok(port) => return Ok(port),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && wanted == 0 => {
                    last = Some(error);
                }
                Err(error) => {
                    last = Some(error);
                    break;
                }
            }
        }
        let error = last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into());
        Err(system(&format!("opening UDP port {wanted}"), &error))
    }

    fn try_open(wanted: u16) -> io::Result<Self> {
        let ipv4 = if_supported(bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, wanted))))?;
        let known =
            ipv4.as_ref().map(UdpSocket::local_addr).transpose()?.map_or(wanted, |a| a.port());
        let ipv6 = if_supported(bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, known))))?;
        let number = match (&ipv4, &ipv6) {
            (None, Some(ipv6)) => ipv6.local_addr()?.port(),
            (None, None) => return Err(io::ErrorKind::Unsupported.into()),
            _ => known,
        };
        Ok(Self { number, ipv4, ipv6 })
    }

    fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        self.ipv4.iter().chain(&self.ipv6)
    }

    fn send(&self, to: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        let socket = if to.is_ipv4() { &self.ipv4 } else { &self.ipv6 };
        let Some(socket) = socket else { return Err(io::ErrorKind::Unsupported.into()) };
        match socket.send_to(datagram, to) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    fn receive(&self, mut take: impl FnMut(SocketAddr, &[u8])) {
        let mut buffer = [0; DATAGRAM_MAX];
        for socket in self.sockets() {
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                take(from, &buffer[..len]);
            }
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A host without one of the families is no error.
fn if_supported(socket: io::Result<UdpSocket>) -> io::Result<Option<UdpSocket>> {
    match socket {
        Ok(socket) => Ok(Some(socket)),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn system(doing: &str, error: &io::Error) -> Problem {
    let (exit, cure) = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            (Exit::Permission, "ports below 1024 need root or CAP_NET_BIND_SERVICE")
        }
        io::ErrorKind::AddrInUse => (Exit::Error, "`ss -ulpn` shows who has the port"),
        _ => (Exit::Error, "see `ip address` and `ulimit -n`"),
    };
    Problem::new(exit, format!("{doing}: {error}; {cure}"))
}

fn relay(text: &str) -> Result<HttpUrl, String> {
    HttpUrl::parse(text).map_err(|expected| format!("expected {expected}"))
}

fn stun(text: &str) -> Result<EndpointName, String> {
    EndpointName::parse(text).map_err(|_| "expected host:port, like stun.example.net:3478".into())
}

/// `250ms`, `90s`, `6m`.
fn duration(text: &str) -> Result<Duration, String> {
    const EXPECTED: &str = "expected a duration like 500ms, 90s or 6m, at most a day";
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| EXPECTED.to_owned())?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => return Err(EXPECTED.into()),
    };
    let longest = Duration::from_secs(86_400);
    let duration = number.checked_mul(milliseconds).map(Duration::from_millis);
    duration.filter(|d| *d <= longest && !d.is_zero()).ok_or_else(|| EXPECTED.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit_and_a_bound() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("6m"), Ok(LIFETIME_MAX));
        for bad in ["", "5", "s", "0s", "-1s", "1.5s", "1441m", "99999999999999999999s", "5h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
