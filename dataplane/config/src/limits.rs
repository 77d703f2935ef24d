//! Every limit on what an operator or a tool may hand us.

/// Bytes of a configuration file. 10,000 peers with ten prefixes each fit several times.
pub const CONFIG_BYTES_MAX: usize = 16 << 20;
/// Bytes of a key file: 44 characters, a newline, some slack for editors.
pub const KEY_FILE_BYTES_MAX: usize = 256;
/// Bytes of one UAPI request; `wg syncconf` sends every peer in one.
pub const UAPI_REQUEST_BYTES_MAX: usize = 32 << 20;
/// Bytes of one line of UAPI text. The longest that we know is a warning of ours.
pub const UAPI_LINE_BYTES_MAX: usize = 4096;
/// Peers of one device: the tables of receiving sessions, which XDP shares, are made for so many.
pub const PEERS_MAX: usize = 1 << 14;
/// Peers that one UAPI request names: every old one goes, and as many new ones come.
pub const UAPI_REQUEST_PEERS_MAX: usize = 2 * PEERS_MAX;
/// Problems listed for one file; a wrong file type would otherwise list thousands.
pub const PROBLEMS_MAX: usize = 20;

/// Bytes of an interface name without the final zero (`IFNAMSIZ` - 1).
pub const INTERFACE_NAME_MAX: usize = 15;
/// Characters of a peer's name.
pub const PEER_NAME_MAX: usize = 63;
/// Relays of one configuration: each is one connection at the most, and a measurement.
pub const RELAYS_MAX: usize = 16;
/// STUN servers beside those of the relays.
pub const STUN_SERVERS_MAX: usize = 16;
/// Public addresses that the operator writes down.
pub const OWN_ADDRESSES_MAX: usize = 16;
/// Least MTU: IPv6 needs 1280 (RFC 8200), but an IPv4-only tunnel may be smaller (RFC 791).
pub const MTU_MIN: u16 = 576;
/// Greatest MTU: the longest IP packet less the tunnel's own 80 bytes.
pub const MTU_MAX: u16 = 65_455;
/// A keepalive is a 16-bit number of seconds in UAPI.
pub const KEEPALIVE_SECONDS_MAX: u64 = u16::MAX as u64;
/// Cores of one machine that a worker may be pinned to.
pub const CORE_MAX: usize = 4095;
/// Workers of one device.
pub const WORKERS_MAX: usize = 256;
