//! Every limit and timeout of path finding, derived from each other where they depend.
//! "Tailscale" means what its clients do (wgengine/magicsock, net/netcheck).

use std::time::Duration;

use crate::budget::Rate;

/// Addresses of one peer that are kept, sent and read (Tailscale prunes above the same number).
pub const CANDIDATES_MAX: usize = 100;
/// Of those, addresses that were not named but seen as the source of a ping.
pub const PEER_REFLEXIVE_MAX: usize = 8;
/// Bytes of a relay's URL in an introduction: its length is one byte.
pub const RELAY_URL_LEN_MAX: usize = 255;

/// Bytes of the longest UDP payload: 65,535 less IPv4 and UDP headers.
pub const DATAGRAM_LEN_MAX: usize = 65_507;
/// Bytes of UDP payload that every IPv6 link carries: 1,280 less IPv6 and UDP headers. A path that
/// does not carry these is none.
pub const FRAME_LEN_MIN: usize = 1_232;
/// Bytes of UDP payload of a full frame where the tunnel does not say: MTU 1,420 and the 32 bytes
/// of a WireGuard data message.
pub const FRAME_LEN_DEFAULT: usize = 1_452;
/// What is tried where full frames do not pass: inner MTUs 1,360, 1,280 and the least, plus 32.
pub const FRAME_LENS_SMALLER: [usize; 3] = [1_392, 1_312, FRAME_LEN_MIN];
/// Full frames that may get lost before smaller ones are tried.
pub const FULL_FRAME_TRIES: u8 = 3;
/// The same on a path that carried them before: it is not given up for chance losses.
pub const FULL_FRAME_TRIES_AGAIN: u8 = 6;
/// The path in use is asked for long frames this often, while there is traffic.
pub const RECHECK_INTERVAL: Duration = Duration::from_secs(5);
/// A path that carries only smaller frames is asked again for full ones after this: chance may have
/// taken the full ones, and then the tunnel waits at the relay.
pub const FULL_FRAME_AGAIN: Duration = Duration::from_secs(60);
/// The same for a path that carried no long frame at all: it may have died under the proof.
pub const PROOF_AGAIN: Duration = Duration::from_secs(2);

/// A path exists for a pair of an uplink and a remote address; more than this are not tried.
pub const PATHS_MAX: usize = 2 * CANDIDATES_MAX;
/// Pings of one peer that may be without an answer; of more the oldest are forgotten.
pub const PINGS_OUTSTANDING_MAX: usize = 512;
/// Pings of one peer that somebody asked for and that may be on their way.
pub const QUESTIONS_MAX: usize = 16;
/// A ping is lost after this (Tailscale: the same); later answers are not looked at.
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Transactions of pings of a peer that are remembered against replay.
pub const PINGS_REMEMBERED: usize = 64;
/// Round trips of which the best counts for choice and the worst for patience.
pub const RTT_SAMPLES: usize = 10;

/// Pings of one search, for all candidates: the first at once, then after each of these. Doubling
/// from one lost datagram's time to one that a slow relay needs.
pub const SEARCH_GAPS: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1600),
];
/// After a search that found nothing, while there is traffic: soon, then seldom, for ever. The last
/// leaves the 30 s after which Linux forgets what it refused: a NAT that takes a probe from outside
/// for its own gives the answer from inside another port until then.
pub const SEARCH_AGAIN: [Duration; 3] =
    [Duration::from_secs(5), Duration::from_secs(15), Duration::from_secs(35)];
/// By how much chance prolongs these, so that not the same side begins each time.
pub const SEARCH_JITTER_PERCENT: u32 = 25;
/// On a direct path: whether there is a better one (Tailscale: the same).
pub const UPGRADE_INTERVAL: Duration = Duration::from_secs(60);
/// Below this round trip nothing better is looked for (Tailscale: the same).
pub const RTT_GOOD_ENOUGH: Duration = Duration::from_millis(5);
/// The peer can ask us to search no more often than this.
pub const SEARCH_INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Introductions to a peer that does not answer: doubling between these.
pub const INTRODUCE_INTERVAL_MIN: Duration = Duration::from_millis(500);
pub const INTRODUCE_INTERVAL_MAX: Duration = Duration::from_secs(60);

/// News of what our NAT does, by which nobody finds a path, wait this long: until it is known as a
/// whole, and so that they take no introduction's turn.
pub const NAT_NEWS_DELAY: Duration = Duration::from_secs(4);

/// An answer to an introduction that took longer proves nothing.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Without traffic for this long a peer is idle (Tailscale: the same).
pub const ACTIVE_TIME: Duration = Duration::from_secs(45);
/// WireGuard's REJECT_AFTER_TIME: who had no traffic for this long has no session.
pub const SESSION_TIME: Duration = Duration::from_secs(180);
/// Pings on the path in use while there is traffic. With [`PATIENCE_MAX`], [`SUSPECT_INTERVAL`] and
/// [`PINGS_LOST`] a dead path is left in 0.2 + 2 × 0.45 + 3 × 0.05 = 1.25 s.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(200);
/// The same from the end of the traffic until the peer is idle.
pub const HEARTBEAT_INTERVAL_PAUSE: Duration = Duration::from_millis(400);
/// Traffic that was not seen for so long has ended.
pub const PAUSE_TIME: Duration = Duration::from_millis(1500);
/// The same without traffic: below the 10 s after which the shortest known NAT forgets
/// (RFC 4787 asks for 120 s, home routers give 30, some carriers 10).
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(8);
/// Pings on the other paths that are known to work, while there is traffic.
pub const ALTERNATE_INTERVAL: Duration = Duration::from_secs(5);
/// How many of those are kept.
pub const ALTERNATES_MAX: usize = 3;
/// Pings on the path in use from the moment that one is overdue: enough of them that a line that
/// loses one datagram in thirty, each way, is not taken for a dead one in days.
pub const SUSPECT_INTERVAL: Duration = Duration::from_millis(50);
/// A ping is overdue after three round trips within these bounds, but never before one and a half
/// and [`PATIENCE_EXTRA`].
pub const PATIENCE_MIN: Duration = Duration::from_millis(100);
pub const PATIENCE_MAX: Duration = Duration::from_millis(450);
pub const PATIENCE_EXTRA: Duration = Duration::from_millis(50);
/// A path is dead when this many pings are overdue and no later one was answered; one, where there
/// is another sign that it died.
pub const PINGS_LOST: usize = 5;
/// But not so soon after the first of them: links lose everything for half a second and go on.
pub const DEATH_TIME_MIN: Duration = Duration::from_millis(700);
/// A path without an answer for this long is not known to work: two pings of an alternate.
pub const FRESH_TIME: Duration = Duration::from_secs(12);
/// A path without an answer for this long is forgotten (Tailscale: 5 min 10 s).
pub const FORGET_TIME: Duration = Duration::from_secs(310);

/// From the first path that works to the choice among those that answered by then.
pub const SETTLE_TIME: Duration = Duration::from_millis(300);
/// Between two changes from one working path to another.
pub const SWITCH_INTERVAL_MIN: Duration = Duration::from_secs(5);
/// By how much another path must be better than the one in use: both.
pub const HYSTERESIS_PERCENT: u32 = 5;
pub const HYSTERESIS_MIN: Duration = Duration::from_micros(300);
/// Percent of its round trip that a path is given for IPv6 and for staying in private networks
/// (Tailscale: the same).
pub const BONUS_IPV6_PERCENT: u32 = 10;
pub const BONUS_PRIVATE_PERCENT: u32 = 20;

/// WireGuard answers data within its keepalive timeout of 10 s: who sends for this long and hears
/// nothing sends into a hole, whatever pings say. Before the 15 s after which it tries a handshake,
/// whose answer may pass where data does not.
pub const DATA_SILENCE_MAX: Duration = Duration::from_secs(12);
/// Where only those keepalives came, one may be lost by chance: so many silences in a row are none.
pub const SILENCES_MAX: u32 = 3;
/// From the end of one to the next, in a row.
pub const SILENCES_APART_MAX: Duration = Duration::from_secs(30);
/// A peer whose packets come more often than this sends more than keepalives.
pub const TALK_INTERVAL_MAX: Duration = Duration::from_secs(5);
/// A peer reports that it received nothing although this many looks at the tunnel's counters saw data
/// leave: a hole, and no reason to wait for [`DATA_SILENCE_MAX`].
pub const VANISHED_LOOKS: usize = 8;
/// Looks shortly before or after such a silence do not count: the data planes tell of packets from
/// time to time only, and packets take their time.
pub const REPORT_AGE_MAX: Duration = Duration::from_secs(1);
/// Looks that are remembered, a few a second.
pub const SENT_REMEMBERED: usize = 32;
/// A path into which data vanished is not used for this long, and twice as long each further time:
/// every attempt costs [`DATA_SILENCE_MAX`] of the tunnel.
pub const HOLE_TIME_MIN: Duration = Duration::from_secs(60);
pub const HOLE_TIME_MAX: Duration = Duration::from_secs(3600);
/// A path that died twice is not used for this long, three times: twice as long, and so on up to
/// [`COMEBACK_PAUSE_MAX`].
pub const COMEBACK_PAUSE: Duration = Duration::from_secs(2);
pub const COMEBACK_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Probes to one peer: one search of all candidates at once, then as many as a port scan's alarm
/// bears. Heartbeats come out of their own timers.
///
/// What a hostile peer can do with our pings to addresses that it names: 120 at once (15 kB), then
/// 20 a second (2.5 kB/s), all peers together 1,000 and 100 a second. One introduction of a hundred
/// addresses (2 kB) brings about six times its bytes, once; a flood of them brings less than it
/// costs. Nobody without a configured key brings any.
pub const PROBES_PER_PEER: Rate = Rate { burst: 120, per_second: 20 };
/// Probes to all peers: what the session table of a home router bears (a few thousand entries that
/// live for half a minute).
pub const PROBES_IN_ALL: Rate = Rate { burst: 1_000, per_second: 100 };
/// Introductions and calls to one peer: a handful as a start-up learns address after address.
pub const SIGNALS_PER_PEER: Rate = Rate { burst: 6, per_second: 1 };
/// Answers to one peer's pings.
pub const PONGS_PER_PEER: Rate = Rate { burst: 200, per_second: 50 };

/// Between two rounds of STUN questions: below the 30 s after which many home routers forget a
/// mapping, with time for the answers.
pub const STUN_INTERVAL: Duration = Duration::from_secs(22);
/// A question is sent again after each of these; then the server is silent until the next round.
pub const STUN_RETRIES: [Duration; 3] =
    [Duration::from_millis(300), Duration::from_millis(600), Duration::from_millis(1200)];
/// An answer older than this is none: two rounds were silent.
pub const STUN_ANSWER_MAX_AGE: Duration = Duration::from_secs(50);

/// Servers of one netcheck; the rest is not asked.
pub const NETCHECK_SERVERS_MAX: usize = 64;
/// A netcheck reports after this, whatever is missing (Tailscale: the same).
pub const NETCHECK_TIME: Duration = Duration::from_secs(5);
/// A question without an answer for this long, from its first datagram, has none (Tailscale: the
/// same).
pub const STUN_TIME: Duration = Duration::from_secs(3);
/// The same where silence is an answer: of what a NAT lets in.
pub const FILTERED_TIME: Duration = Duration::from_millis(1200);
/// Datagrams of one question (Tailscale: the same).
pub const STUN_TRIES: usize = 3;
/// Those for the home relay while only the nearest are asked (Tailscale: the same).
pub const STUN_TRIES_HOME: usize = 4;
/// Between them, when no round trip is known yet (Tailscale: the same).
pub const STUN_GAP: Duration = Duration::from_millis(100);
/// Between them afterwards, and for each further one more (Tailscale: the same).
pub const STUN_GAP_AGAIN: Duration = Duration::from_millis(200);
pub const STUN_GAP_STEP: Duration = Duration::from_millis(50);
/// A relay that did not answer STUN by then is asked by TCP: UDP may be blocked.
pub const RELAY_BY_TCP_AFTER: Duration = Duration::from_secs(1);
/// Relays that are asked between full checks (Tailscale: the same).
pub const NEAREST_RELAYS: usize = 3;
/// Between full checks (Tailscale: the same).
pub const FULL_CHECK_INTERVAL: Duration = Duration::from_secs(300);
/// Datagrams each way between two of our sockets, by their addresses outside, and their pause.
pub const HAIRPIN_TRIES: usize = 3;
pub const HAIRPIN_GAP: Duration = Duration::from_millis(200);
/// Seconds of silence after which a NAT is asked whether it still knows a mapping, all at once on a
/// socket each. From the shortest known (10) past what RFC 4787 wants at least (120 and 300).
pub const LIFETIME_STEPS_S: [u16; 15] =
    [5, 8, 12, 18, 25, 32, 45, 62, 90, 125, 155, 190, 245, 305, 360];
/// The longest silence that is waited for unless the caller says less.
pub const LIFETIME_MAX: Duration = Duration::from_secs(360);

/// Reports that count for the choice of the home relay (Tailscale: the same).
pub const HOME_WINDOW: Duration = Duration::from_secs(300);
/// A frame of the home relay proves for this long that it lives (Tailscale: the same).
pub const HOME_FRAME_FRESH: Duration = Duration::from_secs(8);
/// A relay that is not nearer by this, or takes more than [`HOME_GAIN_MAX_PERCENT`] of the time, is
/// no reason to move (Tailscale: the same).
pub const HOME_GAIN_MIN: Duration = Duration::from_millis(10);
pub const HOME_GAIN_MAX_PERCENT: u32 = 67;
/// A relay to which the connection failed is no home for this long.
pub const HOME_AWAY: Duration = Duration::from_secs(60);
/// What a router is asked to keep a port open for (RFC 6886, section 3.3, recommends it).
pub const MAPPING_LIFETIME: Duration = Duration::from_secs(7200);
/// A router that grants less is taken to grant this: it must not make us ask without end.
pub const MAPPING_LIFETIME_MIN: Duration = Duration::from_secs(2);
/// A router that grants more is asked again as if it granted this.
pub const MAPPING_LIFETIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Between a renewal that nobody answered and the next (RFC 6887, section 11.2.1: at least 4 s).
pub const RENEWAL_INTERVAL_MIN: Duration = Duration::from_secs(4);
/// A renewal comes this much, in percent of the lifetime, after half of it, at most: so that the
/// hosts of a network do not ask together.
pub const RENEWAL_JITTER_PERCENT: u32 = 5;
/// NAT-PMP and PCP requests, and searches for UPnP: the first at once, then after each of these
/// (RFC 6886, section 3.1, begins so; RFC 6887's 3 s are too long to wait for a candidate).
pub const PORTMAP_GAPS: [Duration; 4] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_millis(1000),
    Duration::from_millis(2000),
];
/// Protocols that did not answer the probes by then are not there: after three of them, and a
/// second for the last answer.
pub const PORTMAP_PROBE_TIME: Duration = Duration::from_millis(1750);
/// A protocol that we like less waits this long for one that we like more (Tailscale: the same).
pub const PORTMAP_GATHER_TIME: Duration = Duration::from_millis(250);
/// How often a router that holds our mapping is asked whether it has restarted.
pub const REBOOT_CHECK_INTERVAL: Duration = Duration::from_secs(8);
/// A router whose clock makes no sense is not asked for the mapping again more often than this.
pub const REBOOT_REMAP_INTERVAL: Duration = Duration::from_secs(30);
/// After nobody answered, or everybody refused: doubling between these.
pub const PORTMAP_REST_MIN: Duration = Duration::from_secs(30);
pub const PORTMAP_REST_MAX: Duration = Duration::from_secs(600);
/// How long the mapping's deletion may hold up the end of the process.
pub const PORTMAP_CLOSE_TIME: Duration = Duration::from_secs(1);

/// Descriptions of a router that are read: some routers have one for each version of UPnP.
pub const UPNP_LOCATIONS_MAX: usize = 4;
/// Services of a router that are asked: one for each of its uplinks and versions.
pub const UPNP_SERVICES_MAX: usize = 8;
/// Bytes of an HTTP answer, head and body. Descriptions of real routers have 3 to 20 KiB.
pub const UPNP_ANSWER_LEN_MAX: usize = 32 * 1024;
/// Header lines of an HTTP answer.
pub const UPNP_HEADERS_MAX: usize = 32;
/// Bytes of a path on a router.
pub const UPNP_PATH_LEN_MAX: usize = 256;
/// Elements and texts of a description.
pub const UPNP_NODES_MAX: u32 = 4096;
/// A router's description must be there by then (Tailscale: the same).
pub const UPNP_DESCRIPTION_TIME: Duration = Duration::from_secs(1);
/// How often descriptions that did not come, or were none, are asked for again.
pub const UPNP_DESCRIPTION_TRIES: u8 = 2;
/// What a router is asked to do must be done by then (Tailscale: the same).
pub const UPNP_ACTION_TIME: Duration = Duration::from_secs(5);
/// External ports that are tried where one is taken.
pub const UPNP_PORT_TRIES: u8 = 4;

/// How often the NAT64 prefix is looked up again: the network may change without a change of links.
pub const NAT64_LOOK_UP_INTERVAL: Duration = Duration::from_secs(600);
/// After a look-up that failed: doubling from this to [`NAT64_LOOK_UP_INTERVAL`].
pub const NAT64_RETRY_MIN: Duration = Duration::from_secs(5);
/// Prefixes of a network: several translators may share its load.
pub const NAT64_PREFIXES_MAX: usize = 4;
/// Addresses of one answer that are read.
pub const NAT64_ANSWERS_MAX: usize = 32;
