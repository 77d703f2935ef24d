//! Every limit and timeout of the control process that is not the path finder's.

/// Ways out that are probed: each multiplies the probes of a search.
pub const UPLINKS_MAX: usize = 8;
