//! Replays everything that fuzzing ever found worth keeping (`bench/fuzz/corpora`).
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::path::Path;

#[test]
fn aead() {
    common::backends();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/fuzz/corpora/aead");
    let mut count = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        millrace_aead::fuzz::batch(&fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "no corpus for aead");
}
