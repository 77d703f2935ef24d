//! The standing invariant: nothing of the inside is ever seen outside.
//!
//! `tcpdump` records all outside links into a file; afterwards every packet is searched for the
//! markers that were sent inside and for the inner addresses. It needs no parsing of headers, so no
//! encapsulation can hide a leak.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    net::{IpAddr, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use crate::{Daemon, Error, Lab, Marker, Namespace, Result, wait_for};

/// In what [`CaptureReport::check`] says of a leak, for those who must tell it from other failures.
pub const LEAK: &str = "show the inside";

/// How long tcpdump may take to start, and to write its file out.
const LIMIT: Duration = Duration::from_secs(10);

/// How far from its end the file is searched for the last packet, in bytes. Others may follow it.
const TAIL: u64 = 1 << 20;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    namespace: Namespace,
    file: PathBuf,
    daemon: Daemon,
}

/// What a capture holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CaptureReport {
    /// Packets recorded, each once on each link.
    pub packets: u64,
    /// Bytes recorded.
    pub bytes: u64,
    /// Packets that the kernel could not hand over; the proof does not cover these.
    pub missed: u64,
    /// What leaked: the packet's number from 1, and what was found in it.
    pub leaks: Vec<(u64, String)>,
}

impl Capture {
    /// Records all interfaces of `namespace` until [`Self::finish`].
    pub fn start(lab: &Lab, namespace: &Namespace) -> Result<Self> {
        let name = lab.interface_name();
        let file = lab.directory().join(format!("{name}.pcap"));
        let mut command = namespace.command("tcpdump");
        // As root, because it would otherwise lose the right to write the file. Without immediate mode,
        // in which every packet takes a slot of the snapshot length: 64 MiB would hold 256 packets.
        command.args(["-i", "any", "-Z", "root", "-B", "65536", "-U", "-n"]);
        command.arg("-w").arg(&file);
        let mut daemon = Daemon::start(lab.directory(), &format!("tcpdump-{name}"), command)?;
        daemon.wait_for_log("listening on", LIMIT)?;
        Ok(Self { namespace: namespace.clone(), file, daemon })
    }

    /// Ends the recording and searches it.
    pub fn finish(mut self, markers: &[Marker], inner: &[IpAddr]) -> Result<CaptureReport> {
        let last = self.pass_last_packet()?;
        self.daemon.signal(libc::SIGINT);
        let ended = || self.daemon.ended();
        wait_for("tcpdump to write its file", LIMIT, ended)?;
        let missed = dropped_by_kernel(&self.daemon.log())?;
        let file =
            fs::read(&self.file).map_err(Error::system(format!("read {}", self.file.display())))?;
        // It can be large, and the search is over when it is removed.
        let _ = fs::remove_file(&self.file);
        let mut report = search(&file, last, &Patterns::new(markers, inner)?)?;
        report.missed = missed;
        Ok(report)
    }

    /// tcpdump throws away what it has not read yet when it is told to end: sends a packet of our
    /// own over loopback and waits until the file holds it, and so everything before it.
    fn pass_last_packet(&mut self) -> Result<Marker> {
        let last = Marker::random()?;
        let sent = self.namespace.run(|| {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            // To itself, so that no ICMP error follows.
            socket.send_to(&last.0, socket.local_addr()?)
        });
        sent.map_err(Error::system("send the capture's last packet"))?;
        let path = self.file.clone();
        self.daemon.wait_for("the capture's last packet is written", LIMIT, || {
            let mut file = File::open(&path).ok()?;
            let len = file.metadata().ok()?.len();
            file.seek(SeekFrom::Start(len.saturating_sub(TAIL))).ok()?;
            let mut tail = Vec::new();
            file.read_to_end(&mut tail).ok()?;
            tail.windows(8).any(|window| window == last.0).then_some(last)
        })
    }
}

impl CaptureReport {
    /// An error that says what leaked, or that nothing was recorded: an empty proof is none.
    pub fn check(&self) -> Result<()> {
        if let Some((packet, what)) = self.leaks.first() {
            return Err(Error::Unexpected(format!(
                "{} of {} packets outside {LEAK}; packet {packet} holds {what}",
                self.leaks.len(),
                self.packets
            )));
        }
        if self.packets == 0 {
            return Err(Error::Unexpected("the capture outside is empty".into()));
        }
        Ok(())
    }
}

/// With more zero bytes in a row a pattern is one that outer headers hold too: of a counter's eight
/// bytes the last four are always zero.
const ZEROS_MAX: usize = 3;

/// Eight-byte patterns and their names, with a filter that makes the search linear.
struct Patterns {
    named: Vec<(u64, String)>,
    /// One bit for each value of a pattern's last two bytes.
    filter: Vec<bool>,
}

impl Patterns {
    /// Markers; for IPv4 each pair of inner addresses as source and destination stand side by side
    /// (four bytes alone appear by chance in a gigabyte); for IPv6 the random prefix. An error for what
    /// is not random enough.
    fn new(markers: &[Marker], inner: &[IpAddr]) -> Result<Self> {
        let mut named = Vec::new();
        for marker in markers {
            named.push((u64::from_be_bytes(marker.0), format!("the marker {}", marker.hex())));
        }
        let v4 = inner.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        });
        let v4: Vec<_> = v4.collect();
        for source in &v4 {
            for target in v4.iter().filter(|target| *target != source) {
                let pair = u64::from(u32::from(*source)) << 32 | u64::from(u32::from(*target));
                named.push((pair, format!("the inner addresses {source} and {target}")));
            }
        }
        for address in inner {
            if let IpAddr::V6(address) = address {
                let prefix = (u128::from(*address) >> 64) as u64;
                named.push((prefix, format!("the inner prefix of {address}")));
            }
        }
        for (pattern, name) in &named {
            let bytes = pattern.to_be_bytes();
            if bytes.windows(ZEROS_MAX + 1).any(|run| run.iter().all(|&byte| byte == 0)) {
                return Err(Error::Unexpected(format!(
                    "{name} is {pattern:016x}, which headers outside hold too; use a random prefix"
                )));
            }
        }
        let mut filter = vec![false; 1 << 16];
        for (pattern, _) in &named {
            filter[(pattern & 0xffff) as usize] = true;
        }
        Ok(Self { named, filter })
    }

    /// The first pattern that `bytes` hold.
    fn find(&self, bytes: &[u8]) -> Option<&str> {
        let mut window = 0u64;
        for (i, &byte) in bytes.iter().enumerate() {
            window = window << 8 | u64::from(byte);
            if i >= 7 && self.filter[(window & 0xffff) as usize] {
                let named = self.named.iter().find(|(pattern, _)| *pattern == window);
                if let Some((_, name)) = named {
                    return Some(name);
                }
            }
        }
        None
    }
}

/// Walks a pcap file of this machine's byte order; our own `last` packet does not count.
fn search(file: &[u8], last: Marker, patterns: &Patterns) -> Result<CaptureReport> {
    const HEADER: usize = 24;
    const RECORD: usize = 16;
    let magic = file.first_chunk::<4>().map(|bytes| u32::from_ne_bytes(*bytes));
    if !matches!(magic, Some(0xa1b2_c3d4 | 0xa1b2_3c4d)) || file.len() < HEADER {
        return Err(Error::Unexpected("tcpdump wrote something that is no pcap file".into()));
    }
    let mut report = CaptureReport::default();
    let mut rest = &file[HEADER..];
    while let Some((record, after)) = rest.split_at_checked(RECORD) {
        let len = u32::from_ne_bytes([record[8], record[9], record[10], record[11]]) as usize;
        let Some((packet, next)) = after.split_at_checked(len) else {
            return Err(Error::Unexpected("the capture ends within a packet".into()));
        };
        rest = next;
        if packet.ends_with(&last.0) {
            continue;
        }
        report.packets += 1;
        report.bytes += len as u64;
        if let Some(found) = patterns.find(packet) {
            report.leaks.push((report.packets, found.into()));
        }
    }
    Ok(report)
}

/// The number in tcpdump's last line, "N packets dropped by kernel".
fn dropped_by_kernel(log: &str) -> Result<u64> {
    let line = log.lines().find(|line| line.contains("dropped by kernel"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| Error::Unexpected(format!("tcpdump did not count its losses:\n{log}")))
}
