//! Every bound and time of the relay, in one place. What an operator may change is a key of the
//! configuration, and stands here only as its default.

use std::time::Duration;

use millrace_path::derp::PACKET_FRAME_MAX;

/// Connections of all kinds, `relay.connections_max`.
pub const CONNECTIONS_DEFAULT: usize = 100_000;
/// Those of one client address, `relay.connections_per_address`: many nodes may share one.
pub const CONNECTIONS_PER_ADDRESS_DEFAULT: usize = 20_000;
/// How long clients have to leave after a SIGTERM, `relay.drain_seconds`.
pub const DRAIN_DEFAULT_S: u64 = 2;
/// A configuration asks for no more threads.
pub const WORKERS_MAX: usize = 256;

/// What a worker reads at once. Several of the largest frames, so that a partial one at the front
/// always has room to end.
pub const READ_MAX: usize = 256 << 10;
/// The head of an HTTP request.
pub const REQUEST_MAX: usize = 8 << 10;
/// Header lines of an HTTP request.
pub const HEADERS_MAX: usize = 64;
/// What a stranger may send as its introduction; real ones have some hundred bytes.
pub const CLIENT_INFO_MAX: usize = 16 << 10;
/// From the first byte to a request, and from there to a login (tailscale: 10 s).
pub const LOGIN_LIMIT: Duration = Duration::from_secs(10);
/// Added to the interval of keepalives, spread over the clients (tailscale: 5 s).
pub const KEEP_ALIVE_JITTER_S: u64 = 5;
/// Data that a client does not acknowledge for so long ends its connection (tailscale: 15 s).
pub const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(15);

/// Waiting for one client that does not read: beyond either, the oldest packet is dropped.
pub const QUEUE_BYTES_MAX: usize = 256 << 10;
pub const QUEUE_FRAMES_MAX: usize = 256;
/// The same for disco and the relay's own frames, which bulk must not push out.
pub const URGENT_BYTES_MAX: usize = 16 << 10;
/// A queue of so many bytes is written without waiting for the end of the turn.
pub const FLUSH_BYTES: usize = 64 << 10;
/// A run of packets so long goes to its client without a copy into the queue.
pub const DIRECT_BYTES: usize = 8 << 10;
/// Plain bytes that are sealed and written at once: four TLS records.
pub const SEAL_BYTES: usize = 64 << 10;
/// Waiting from one worker for another.
pub const MAIL_BYTES_MAX: usize = 8 << 20;
/// Buffers that a worker keeps for the next queue.
pub const SPARE_BUFFERS: usize = 64;
/// A larger buffer is given back to the allocator.
pub const SPARE_BYTES_MAX: usize = 128 << 10;

/// Peers of one client that hear when it goes.
pub const SENT_TO_MAX: usize = 4096;
/// `PeerGone` (not here) frames at once to one client, then one a second (tailscale: the same).
pub const NOT_HERE_BURST: u32 = 3;
/// How often at once, and then a second, a client may take back a key that two of them use.
pub const TAKE_OVER_BURST: u64 = 1;
/// A rate limit below two of the largest frames would never let one pass in time.
pub const BURST_MIN: u64 = 2 * PACKET_FRAME_MAX as u64;

/// Connections that a worker accepts in one turn: handshakes must not starve packets.
pub const ACCEPTS_PER_TURN: usize = 16;
/// Events that a worker takes in one turn.
pub const EVENTS_PER_TURN: usize = 256;
/// How often a worker looks at every connection's deadline.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// `Restarting`: how long clients shall try to come back.
pub const RESTART_TRY_MS: u32 = 60_000;
/// Other relays of a mesh, one thread each.
pub const MATES_MAX: usize = 16;
/// Clients of one mate that we know; others are not reached through it.
pub const MATE_CLIENTS_MAX: usize = 1 << 20;
/// `PeerPresent` and `PeerGone` that wait for a mate: it is ended beyond it, and asks again.
pub const MATE_BACKLOG_BYTES_MAX: usize = 64 << 20;
/// A connection to a mate, its TLS and its login.
pub const MATE_LOGIN_LIMIT: Duration = Duration::from_secs(10);
/// How often a mate is pinged, and after what silence it is lost.
pub const MATE_PING_INTERVAL: Duration = Duration::from_secs(5);
pub const MATE_SILENCE_LIMIT: Duration = Duration::from_secs(15);
/// Between two tries to reach a mate: the first, and at most.
pub const MATE_RETRY_FIRST: Duration = Duration::from_millis(500);
pub const MATE_RETRY_LAST: Duration = Duration::from_secs(10);

/// One request to an ACME server, and how much it may answer.
pub const ACME_REQUEST_LIMIT: Duration = Duration::from_secs(30);
pub const ACME_ANSWER_BYTES_MAX: u64 = 1 << 20;
/// How long an ACME server may take to look at us, or to make a certificate; how often it is asked.
pub const ACME_ORDER_LIMIT: Duration = Duration::from_secs(120);
pub const ACME_POLL: Duration = Duration::from_millis(500);
/// After a failure: five times within the first hour, which is what public servers allow.
pub const ACME_RETRY_FIRST: Duration = Duration::from_secs(10);
pub const ACME_RETRY_LAST: Duration = Duration::from_secs(6 * 3600);
/// A clock may jump: how often it is asked whether the certificate is due.
pub const ACME_LOOK: Duration = Duration::from_secs(3600);
/// Names of one certificate.
pub const ACME_NAMES_MAX: usize = 100;

/// How often the certificate's files are looked at.
pub const CERTIFICATE_LOOK: Duration = Duration::from_secs(60);
/// The certificate that names the relay's key is valid so long to both sides (tailscale: 30 days).
pub const META_CERTIFICATE_DAYS: i64 = 30;

/// Lines of a key list.
pub const ADMITTED_MAX: usize = 1 << 20;
/// Bytes of a configuration, key, list or certificate file.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
