//! Every limit and timeout of the control process that is not the path finder's.

use std::time::Duration;

use millrace_config::limits::{RELAYS_MAX, STUN_SERVERS_MAX};
use millrace_path::budget::Rate;
use millrace_path::derp::PACKET_FRAME_MAX;

/// Ways out that are probed: each multiplies the probes of a search.
pub const UPLINKS_MAX: usize = 8;
/// Names of hosts that wait to be looked up: all that one configuration can name.
pub const LOOK_UPS_MAX: usize = RELAYS_MAX + STUN_SERVERS_MAX;
/// Addresses of one STUN server's name that are asked.
pub const NAME_ADDRESSES_MAX: usize = 4;
/// Between two look-ups of names: the C library does not tell how long an answer is good for.
pub const NAMES_AGAIN: Duration = Duration::from_secs(600);
/// The same after one was not found.
pub const NAMES_AGAIN_AFTER_FAILURE: Duration = Duration::from_secs(10);
/// Between two attempts to find a data plane that is not there.
pub const CONNECT_AGAIN: Duration = Duration::from_millis(300);
/// Handshakes that a new data plane is asked for. A hub has its 1,000 peers back in 9 s, before
/// WireGuard's own timers (15 s) would begin, for some 200 µs of processor and 300 bytes each.
pub const CONNECTS: Rate = Rate { burst: 100, per_second: 100 };
/// Those over the rate are asked for together after this.
pub const CONNECTS_PAUSE: Duration = Duration::from_millis(100);
/// How often the tables are looked at for traffic: often enough to see a tunnel go on while the
/// peer's control process is away, before its path counts as dead.
pub const TRAFFIC_INTERVAL: Duration = Duration::from_millis(250);
/// Between two questions to STUN servers because paths do not answer.
pub const SUSPICION_INTERVAL: Duration = Duration::from_secs(1);
/// Looks after a relayed packet at which what came may have come by the relay.
pub const RELAYED_LOOKS: u8 = 3;
/// Remote addresses of which is kept which of ours they spoke to.
pub const SOURCES_MAX: usize = 4096;
/// Frames that are remembered, because they may come by another way, too: those of 50 ms (the data
/// plane waits so long when they are many) at 1,000 peers with a ping and an answer each 400 ms.
pub const TWICE_MAX: usize = 512;
/// Datagrams, or runs, that one turn takes from one descriptor before the others get theirs.
pub const TURN_MAX: usize = 64;
/// Who may be connected to the operators' socket at a time.
pub const API_CLIENTS_MAX: usize = 32;
/// Bytes of one question there.
pub const API_LINE_LEN_MAX: usize = 4096;
/// A ping that somebody asked for is given up after this.
pub const PING_ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// WireGuard's REKEY_TIMEOUT: after it there is a newer initiation.
pub const PARKED_AGE_MAX: Duration = Duration::from_secs(5);
/// The tables are left alone when nobody had traffic for this long: longer than the 10 s after which
/// the data plane tells who speaks again.
pub const TRAFFIC_QUIET: Duration = Duration::from_secs(30);
/// Changes of a peer's route that `why` tells.
pub const HISTORY_LEN: usize = 16;

// The relay client.

/// What is read from a relay at once.
pub const RELAY_READ_MAX: usize = 128 << 10;
/// Larger frames of a relay end the connection. The largest that carries a packet fits; infos, which
/// the protocol allows a mebibyte, have a hundred bytes.
pub const RELAY_FRAME_MAX: usize = PACKET_FRAME_MAX;
/// What a relay may send before it has heard us; a frame that has begun is shorter.
pub const RELAY_UNREAD_MAX: usize = 128 << 10;
/// Bytes of TCP payload of a packet to or from a relay: what every IPv6 link carries, 1,280 less
/// headers. The relay is for networks in which longer packets vanish without a word.
pub const RELAY_SEGMENT_LEN: u32 = 1_208;
/// Bytes that are handed to the kernel at once: four TLS records.
pub const RELAY_WRITE_MAX: usize = 64 << 10;
/// Data that the kernel keeps unsent: what is there cannot be dropped any more.
pub const RELAY_UNSENT_MAX: u32 = 128 << 10;
/// Waiting data for a relay, in bytes and in age: a queue above a long round trip only adds delay.
pub const RELAY_QUEUE_BYTES_MAX: usize = 1 << 20;
pub const RELAY_DATA_AGE_MAX: Duration = Duration::from_millis(100);
/// The same for disco, introductions and handshakes, which wait for a connection that comes up.
pub const RELAY_URGENT_BYTES_MAX: usize = 128 << 10;
pub const RELAY_URGENT_AGE_MAX: Duration = Duration::from_secs(2);
/// A relay whose burst is smaller than the largest frame could never be sent one.
pub const RELAY_BURST_MIN: u64 = PACKET_FRAME_MAX as u64;

/// From the start of a look-up to its answer; after that the last known addresses are tried.
pub const RELAY_LOOK_UP_LIMIT: Duration = Duration::from_secs(5);
/// From the first SYN to a login (tailscale: the same).
pub const RELAY_CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// From one address to the next while none answers (RFC 8305 section 5).
pub const RELAY_ATTEMPT_GAP: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried.
pub const RELAY_ADDRESSES_MAX: usize = 8;
/// The head of an HTTP answer, and its lines.
pub const HTTP_HEAD_MAX: usize = 16 << 10;
pub const HTTP_HEADERS_MAX: usize = 64;

/// Data that a relay does not acknowledge for so long ends the connection (tailscale: 15 s).
pub const RELAY_UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(15);
/// A relay that said nothing for this long is asked whether it lives; it also keeps a NAT's entry.
pub const RELAY_IDLE_PROBE: Duration = Duration::from_secs(20);
/// The same while we send.
pub const RELAY_UNHEARD_PROBE: Duration = Duration::from_secs(2);
/// How long an answer may take; shorter after the network has changed (tailscale: 3 s).
pub const RELAY_PROBE_LIMIT: Duration = Duration::from_secs(5);
pub const RELAY_DOUBT_LIMIT: Duration = Duration::from_secs(2);
/// A relay that answers so often in a row without handing us our own packet is deaf.
pub const RELAY_DEAF_PROBES: u32 = 2;

/// Between attempts, doubling with jitter. A failure that only an operator can end (a wrong
/// certificate) reaches a higher one.
pub const RELAY_RETRY_MIN: Duration = Duration::from_millis(250);
pub const RELAY_RETRY_MAX: Duration = Duration::from_secs(10);
pub const RELAY_RETRY_LASTING_MAX: Duration = Duration::from_secs(60);
/// A connection that lived so long makes the next failure the first one again.
pub const RELAY_STABLE_TIME: Duration = Duration::from_secs(10);
/// While a relay restarts: the longest wait between attempts, and how far we believe its times.
pub const RELAY_RESTART_RETRY_MAX: Duration = Duration::from_secs(1);
pub const RELAY_RESTART_WAIT_MAX: Duration = Duration::from_secs(30);
pub const RELAY_RESTART_TRY_MAX: Duration = Duration::from_secs(120);
/// Characters of a relay's complaint that are kept.
pub const RELAY_HEALTH_CHARS_MAX: usize = 300;
/// Bytes of a file with the proxy's user and password, and of one with certificates.
pub const CREDENTIALS_FILE_MAX: u64 = 4 << 10;
pub const CERTIFICATE_FILE_MAX: u64 = 4 << 20;
/// TCP's own keepalive, for the time when neither side says anything.
pub const RELAY_KEEPALIVE_INTERVAL_S: u64 = 30;

/// Bytes of a data message that carries 1,280 bytes: what does not carry IPv6's least MTU (RFC 8200
/// section 5) is no path, because nobody inside can send less.
pub const LEAST_FRAME_LEN: usize = 1_280 + 32;

/// Between two looks at the relays' round trips, for the choice of the home (tailscale: its
/// netchecks are 20 to 26 s apart).
pub const HOME_REPORT_INTERVAL: Duration = Duration::from_secs(20);

// Netcheck.

/// How often it is found out of what kind the NAT is, unless the network changes.
pub const KINDS_INTERVAL: Duration = Duration::from_secs(3600);
/// However often the network changes.
pub const KINDS_INTERVAL_MIN: Duration = Duration::from_secs(15);
/// STUN servers that are asked for it.
pub const KINDS_SERVERS_MAX: usize = 4;
/// After this a filter that was opened by writing is shut: RFC 4787 wants NATs to use five minutes,
/// none is known to take ten.
pub const FILTER_OPEN_TIME_MAX: Duration = Duration::from_secs(600);
/// Addresses that are remembered as written to in that time: a full table of candidates for each of
/// forty peers.
pub const WRITTEN_TO_MAX: usize = 4096;

/// What one step of looking for a captive portal may take: a look-up and a connection, an answer.
pub const PORTAL_STEP_LIMIT: Duration = Duration::from_secs(2);
/// Addresses of a relay that are asked for a captive portal.
pub const PORTAL_ADDRESSES_MAX: usize = 2;
/// Bytes of the answer that are read: its head is all that counts.
pub const PORTAL_ANSWER_MAX: usize = 8 << 10;
/// Datagrams that one turn takes from one socket.
pub const NETCHECK_TURN_MAX: usize = 64;

// Port mapping.

/// What is read of a router at once. Answers to searches have some hundred bytes, and PCP messages
/// at most 1,100; a longer datagram is cut, and then refused.
pub const PORTMAP_DATAGRAM_LEN_MAX: usize = 4096;
