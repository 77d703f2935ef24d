//! `millrace-control`: the control process of one gateway, in the foreground.
#![forbid(unsafe_code)]

fn main() {}
