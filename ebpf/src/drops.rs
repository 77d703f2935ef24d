//! The drop list, generated from `bpf/drops.h`: each reason's number, name and sentence.

include!(concat!(env!("OUT_DIR"), "/drops.rs"));

impl Drop {
    /// The counter's name, as in `status --json` and metrics.
    pub fn name(self) -> &'static str {
        ALL[self as usize].1
    }

    /// One sentence for the operator.
    pub fn sentence(self) -> &'static str {
        ALL[self as usize].2
    }
}
