//! Every limit and timeout of the protocol and of this crate, derived from each other.
//! Sources: WireGuard paper sections 5.4, 6.1 and 6.5; Linux `messages.h` for the queue lengths.

use std::time::Duration;

/// Packets that one batch holds at most.
pub const BATCH_PACKETS: usize = 64;

/// Datagrams in one UDP_SEGMENT send: every kernel that knows the option takes 64.
pub const GSO_SEGMENTS_MAX: usize = 64;
/// Bytes in one UDP_SEGMENT send: 65,535 less IPv4 and UDP headers.
pub const GSO_BYTES_MAX: usize = 65_507;
/// Bytes of datagrams in one transmit batch: one full UDP_SEGMENT send. More would be cut into a
/// full send and a short one, and what a send costs in the kernel hardly depends on its length.
/// At least one packet of the longest kind fits.
pub const TX_SLAB_LEN: usize = DATA_HEADER_LEN + u16::MAX as usize + PADDING_MULTIPLE + TAG_LEN;
/// Opened packets among which the coalescer looks for neighbours: several full receives, because
/// the runs that arrive are cut elsewhere than the super-packets that were sent.
pub const COALESCE_PACKETS: usize = 4 * BATCH_PACKETS;
/// Flows that are being merged at the same time, among those.
pub const COALESCE_FLOWS: usize = 16;
/// Packets of one merged super-packet.
pub const COALESCED_MAX: usize = 64;

/// Bytes of an inner packet that every path carries that control uses: IPv6 needs them (RFC 8200,
/// section 5).
pub const INNER_MTU_MIN: u16 = 1280;

/// ICMP errors that one worker sends: for packets without a peer, or too long for its path.
pub const ICMP_PER_SECOND: u64 = 100;
pub const ICMP_BURST: u32 = 20;

/// Bytes before the ciphertext of a data message: type, receiver index, counter.
pub const DATA_HEADER_LEN: usize = 16;
/// Bytes of the AEAD tag after it.
pub const TAG_LEN: usize = 16;
/// A data message without content: a keepalive.
pub const KEEPALIVE_LEN: usize = DATA_HEADER_LEN + TAG_LEN;
/// Inner packets are padded to a multiple of this, but never past the MTU.
pub const PADDING_MULTIPLE: usize = 16;

pub const INITIATION_LEN: usize = 148;
pub const RESPONSE_LEN: usize = 92;
pub const COOKIE_REPLY_LEN: usize = 64;

pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
pub const REPLAY_WINDOW_BITS: usize = 8192;
/// Counters that the window can tell apart: one word of it is always being cleared.
pub const REPLAY_WINDOW_USABLE: u64 = (REPLAY_WINDOW_BITS - 64) as u64;
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - REPLAY_WINDOW_BITS as u64;

pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
pub const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
pub const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Added at random to every handshake retry, so that two peers do not stay in step.
pub const REKEY_TIMEOUT_JITTER_MAX: Duration = Duration::from_millis(333);
/// A response is taken at most this long after its initiation: the retry comes no later.
pub const RESPONSE_TIME_MAX: Duration = REKEY_TIMEOUT.saturating_add(REKEY_TIMEOUT_JITTER_MAX);
/// The initiator that only receives starts a new handshake at this age of its key.
pub const REKEY_ON_RECEIVE_AGE: Duration = Duration::from_secs(
    REJECT_AFTER_TIME.as_secs() - KEEPALIVE_TIMEOUT.as_secs() - REKEY_TIMEOUT.as_secs(),
);
/// Data sent and nothing heard for this long: the peer may have lost its keys.
pub const DEAD_PEER_TIMEOUT: Duration =
    Duration::from_secs(KEEPALIVE_TIMEOUT.as_secs() + REKEY_TIMEOUT.as_secs());
/// After crossing handshakes each side sends with its own session. The side with the larger key
/// rekeys this late, so that one handshake, the other side's, ends the split.
pub const REKEY_AFTER_TIME_YIELDING: Duration =
    Duration::from_secs(REKEY_AFTER_TIME.as_secs() + DEAD_PEER_TIMEOUT.as_secs());
/// Keys are wiped this long after the last new session.
pub const ZERO_KEYS_AFTER: Duration = Duration::from_secs(3 * REJECT_AFTER_TIME.as_secs());
/// A peer's initiations closer together than this are dropped.
pub const INITIATION_INTERVAL_MIN: Duration = Duration::from_millis(20);

/// Timestamps of handshakes are rounded down to this, as Linux does (a bit under 20 ms).
pub const TIMESTAMP_STEP_NANOS: u32 = 1 << 24;
/// The mark on disk runs ahead of what was sent by this, so that it is not written every time.
pub const TIMESTAMP_LEASE: Duration = Duration::from_secs(60);
/// A wall clock further ahead of the mark than this is not believed.
pub const TIMESTAMP_JUMP_MAX: Duration = Duration::from_secs(365 * 86_400);
/// 2100-01-01: without any mark, a wall clock beyond this is not believed.
pub const TIMESTAMP_WALL_MAX: Duration = Duration::from_secs(4_102_444_800);

pub const COOKIE_SECRET_LIFETIME: Duration = Duration::from_secs(120);
/// The sender stops trusting a cookie a little before its maker does.
pub const COOKIE_TRUST_TIME: Duration = Duration::from_secs(115);
/// Under load from this many queued handshakes on, and for a second after.
pub const UNDER_LOAD_QUEUE: usize = HANDSHAKE_QUEUE / 8;
pub const UNDER_LOAD_STICKY: Duration = Duration::from_secs(1);
pub const HANDSHAKE_QUEUE: usize = 4096;
/// Token bucket per IPv4 /32 or IPv6 /64, for handshakes with a good cookie under load.
pub const HANDSHAKES_PER_SECOND: u64 = 20;
pub const HANDSHAKES_BURST: u64 = 5;

/// Prefixes whose buckets are remembered; beyond that, strangers are refused.
pub const RATE_LIMIT_SOURCES: usize = 16_384;
/// Places of the session table per peer: three keys and a handshake in flight.
pub const SESSIONS_PER_PEER: usize = 4;

/// Packets that wait for a handshake, per peer; the oldest goes first.
pub const STAGED_PACKETS: usize = 128;
/// Events from workers that wait for the slow thread.
pub const SLOW_QUEUE: usize = 4096;

/// Default inner MTU: 1500 less 80 bytes (IPv6 40, UDP 8, data header 16, tag 16).
pub const MTU_DEFAULT: u16 = 1420;

const _: () = assert!(KEEPALIVE_LEN == 32);
const _: () =
    assert!(TX_SLAB_LEN >= DATA_HEADER_LEN + u16::MAX as usize + PADDING_MULTIPLE + TAG_LEN);
const _: () = assert!(REKEY_ON_RECEIVE_AGE.as_secs() == 165);
const _: () = assert!(REKEY_AFTER_TIME_YIELDING.as_secs() < REKEY_ON_RECEIVE_AGE.as_secs());
const _: () = assert!(COOKIE_TRUST_TIME.as_secs() < COOKIE_SECRET_LIFETIME.as_secs());
// Packets in flight inside the device must never be older than the receiver's window.
const _: () = assert!((BATCH_PACKETS as u64) < REPLAY_WINDOW_USABLE);
