//! Every limit and timeout of the control process that is not the path finder's.

use std::time::Duration;

/// Ways out that are probed: each multiplies the probes of a search.
pub const UPLINKS_MAX: usize = 8;
/// Addresses of one STUN server's name that are asked.
pub const NAME_ADDRESSES_MAX: usize = 4;
/// Between two look-ups of names: the C library does not tell how long an answer is good for.
pub const NAMES_AGAIN: Duration = Duration::from_secs(600);
/// The same after one was not found.
pub const NAMES_AGAIN_AFTER_FAILURE: Duration = Duration::from_secs(10);
/// Between two attempts to find a data plane that is not there.
pub const CONNECT_AGAIN: Duration = Duration::from_millis(300);
/// How often the tables are looked at for traffic.
pub const TRAFFIC_INTERVAL: Duration = Duration::from_secs(1);
/// Remote addresses of which is kept which of ours they spoke to.
pub const SOURCES_MAX: usize = 4096;
/// Datagrams, or runs, that one turn takes from one descriptor before the others get theirs.
pub const TURN_MAX: usize = 64;
/// Changes of a peer's route that `why` tells.
pub const HISTORY_LEN: usize = 16;
