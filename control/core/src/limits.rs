//! Every limit and timeout of path finding, derived from each other where they depend.
//! "Tailscale" means what its clients do (wgengine/magicsock, net/netcheck), measured or read.

/// Addresses of one peer that are kept, sent and read (Tailscale prunes above the same number).
pub const CANDIDATES_MAX: usize = 100;
/// Bytes of a relay's URL in an introduction: its length is one byte.
pub const RELAY_URL_LEN_MAX: usize = 255;

/// Bytes of the longest UDP payload: 65,535 less IPv4 and UDP headers.
pub const DATAGRAM_LEN_MAX: usize = 65_507;
