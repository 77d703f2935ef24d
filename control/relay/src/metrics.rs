//! What is counted, and the page that Prometheus reads.
//!
//! Each thread has its own counters and is their only writer, so that counting costs no lock and no
//! shared cache line; they are added up when somebody asks.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::shared::Shared;

macro_rules! counts {
    ($($name:ident: $metric:literal, $labels:literal, $help:literal;)*) => {
        /// Everything that is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Count { $($name),* }

        /// Metric, labels, sentence; in the order of [`Count`], rows of one metric together.
        const TABLE: &[(&str, &str, &str)] = &[$(($metric, $labels, $help)),*];
        const COUNTS: usize = TABLE.len();
    };
}

counts! {
    Accepted: "connections_total", "", "Connections accepted.";
    Closed: "connections_closed_total", "", "Connections ended, by whomever.";
    Logins: "logins_total", "result=\"admitted\"", "Clients that proved their key.";
    LoginsMates: "logins_total", "result=\"mate\"", "Clients that proved their key.";
    LoginsRefused: "logins_total", "result=\"not_admitted\"", "Clients that proved their key.";
    ErrorHttp: "connection_errors_total", "reason=\"http\"", "Connections that we ended for what they sent.";
    ErrorTls: "connection_errors_total", "reason=\"tls\"", "Connections that we ended for what they sent.";
    ErrorFrame: "connection_errors_total", "reason=\"frame\"", "Connections that we ended for what they sent.";
    ErrorLogin: "connection_errors_total", "reason=\"login\"", "Connections that we ended for what they sent.";
    ErrorMeshKey: "connection_errors_total", "reason=\"mesh_key\"", "Connections that we ended for what they sent.";
    ErrorBehind: "connection_errors_total", "reason=\"mate_behind\"", "Connections that we ended for what they sent.";
    ErrorClosed: "connection_errors_total", "reason=\"mate_asked\"", "Connections that we ended for what they sent.";
    ErrorTimeout: "connection_errors_total", "reason=\"timeout\"", "Connections that we ended for what they sent.";
    ErrorFull: "connection_errors_total", "reason=\"full\"", "Connections that we ended for what they sent.";
    ErrorAddress: "connection_errors_total", "reason=\"address_full\"", "Connections that we ended for what they sent.";
    HttpRequests: "http_requests_total", "", "HTTP requests other than upgrades.";
    ReceivedPackets: "received_packets_total", "", "Packets that clients sent.";
    ReceivedBytes: "received_bytes_total", "", "Bytes of frames with packets that clients sent.";
    SentPackets: "sent_packets_total", "", "Packets queued for their destination, less those dropped there.";
    SentBytes: "sent_bytes_total", "", "Bytes of frames given to the kernel or to TLS.";
    DropNotHere: "drops_total", "reason=\"not_here\"", "Packets dropped.";
    DropQueue: "drops_total", "reason=\"queue_full\"", "Packets dropped.";
    DropMail: "drops_total", "reason=\"worker_busy\"", "Packets dropped.";
    DropGone: "drops_total", "reason=\"just_gone\"", "Packets dropped.";
    PeerGoneSent: "peer_gone_total", "", "PeerGone frames sent.";
    KeepAlives: "keep_alives_total", "", "KeepAlive frames sent.";
    Pings: "pings_total", "", "Ping frames answered.";
    TakeOvers: "take_overs_total", "", "Times that a key moved between connections that share it.";
    Forwarded: "mesh_packets_total", "direction=\"sent\"", "Packets to and from clients of other relays of the mesh.";
    ForwardedHere: "mesh_packets_total", "direction=\"received\"", "Packets to and from clients of other relays of the mesh.";
    MateConnected: "mesh_connects_total", "result=\"connected\"", "Connections to other relays of the mesh.";
    MateFailed: "mesh_connects_total", "result=\"failed\"", "Connections to other relays of the mesh.";
    Throttled: "throttled_total", "", "Times that reading from a client paused for its rate limit.";
    AcmeIssued: "acme_orders_total", "result=\"issued\"", "Certificates asked for by ACME.";
    AcmeFailed: "acme_orders_total", "result=\"failed\"", "Certificates asked for by ACME.";
    StunAnswered: "stun_requests_total", "result=\"answered\"", "STUN datagrams.";
    StunInvalid: "stun_requests_total", "result=\"invalid\"", "STUN datagrams.";
}

/// One thread's counters.
#[derive(Debug)]
pub struct Counters([AtomicU64; COUNTS]);

impl Default for Counters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Counters {
    /// Only the thread that owns them may call it: a load and a store are cheaper than one atomic
    /// addition, and lose nothing with one writer.
    pub fn add(&self, count: Count, amount: u64) {
        let counter = &self.0[count as usize];
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    pub fn get(&self, count: Count) -> u64 {
        self.0[count as usize].load(Ordering::Relaxed)
    }
}

/// The page in Prometheus's text format.
pub fn page(shared: &Shared) -> String {
    let mut page = String::new();
    let version = env!("CARGO_PKG_VERSION");
    gauge(&mut page, "build_info", "What runs.", &format!("{{version=\"{version}\"}}"), 1);
    let clients = shared.registry.len() as u64;
    gauge(&mut page, "clients", "Keys that are connected.", "", clients);
    let open = shared.connections.load(Ordering::Relaxed) as u64;
    gauge(&mut page, "connections", "Connections that are open.", "", open);
    if let Some(mesh) = &shared.mesh {
        let mates = mesh.connected.load(Ordering::Relaxed) as u64;
        gauge(&mut page, "mesh_mates", "Other relays that we are connected to.", "", mates);
        let help = "Keys that are connected to other relays of the mesh.";
        gauge(&mut page, "mesh_clients", help, "", mesh.len() as u64);
    }
    if let Some(end) = shared.live.load().certificate_end {
        let seconds = end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let help = "Unix time at which the served certificate ends.";
        gauge(&mut page, "certificate_not_after_seconds", help, "", seconds);
    }
    let reloads = shared.reload_failed.load(Ordering::Relaxed);
    let (name, help) = ("config_last_reload_successful", "1 unless the last reload failed.");
    gauge(&mut page, name, help, "", u64::from(!reloads));
    let mut last = "";
    for (index, (metric, labels, help)) in TABLE.iter().enumerate() {
        if *metric != last {
            let _ = writeln!(page, "# HELP millrace_relay_{metric} {help}");
            let _ = writeln!(page, "# TYPE millrace_relay_{metric} counter");
            last = metric;
        }
        let value: u64 = shared.counters().map(|c| c.0[index].load(Ordering::Relaxed)).sum();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _ = writeln!(page, "millrace_relay_{metric}{labels} {value}");
    }
    page
}

fn gauge(page: &mut String, name: &str, help: &str, labels: &str, value: u64) {
    let _ =
        writeln!(page, "# HELP millrace_relay_{name} {help}\n# TYPE millrace_relay_{name} gauge");
    let _ = writeln!(page, "millrace_relay_{name}{labels} {value}");
}

/// Answers scrapes one after the other, until the process ends. A slow reader delays only others
/// like it.
pub fn serve(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        match stream.and_then(|stream| answer(stream, shared)) {
            Ok(()) => {}
            Err(error) => tracing::debug!("metrics: {error}"),
        }
    }
}

fn answer(mut stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(2);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = [0; 4096];
    let mut len = 0;
    while len < head.len() && !head[..len].windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut head[len..])? {
            0 => break,
            more => len += more,
        }
    }
    let target = head[..len].split(|&byte| byte == b' ').nth(1).unwrap_or_default();
    let (status, body) = match target {
        b"/metrics" => ("200 OK", page(shared)),
        b"/healthz" => ("200 OK", "alive\n".to_owned()),
        b"/readyz" if shared.draining() => ("503 Service Unavailable", "draining\n".to_owned()),
        b"/readyz" => ("200 OK", "ready\n".to_owned()),
        _ => ("404 Not Found", "/metrics, /healthz, /readyz\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}
