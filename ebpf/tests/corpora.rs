//! Replays everything that fuzzing ever found worth keeping (`bench/fuzz/corpora`).
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;

use millrace_ebpf::fuzz;

#[test]
fn link() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/fuzz/corpora/link");
    let mut count = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        fuzz::link(&fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "no corpus for link");
}
