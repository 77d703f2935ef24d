//! Replays everything that fuzzing ever found worth keeping (`bench/fuzz/corpora`).
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;

use millrace_path::fuzz;

fn replay(target: &str, run: fn(&[u8])) {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/fuzz/corpora");
    let mut count = 0;
    for entry in fs::read_dir(corpora.join(target)).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        run(&fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "no corpus for {target}");
}

#[test]
fn disco() {
    replay("disco", fuzz::disco);
}

#[test]
fn finder() {
    replay("finder", fuzz::finder);
}

/// As a fuzzer without feedback: what a few thousand random inputs do.
#[test]
fn random_steps() {
    use rand::{RngCore, SeedableRng};
    for seed in 0..500 {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut input = [0; 160];
        random.fill_bytes(&mut input);
        println!("seed {seed}");
        fuzz::finder(&input);
        fuzz::portmap(&input);
    }
}

#[test]
fn introduce() {
    replay("introduce", fuzz::introduce);
}

#[test]
fn stun() {
    replay("stun", fuzz::stun);
}

#[test]
fn netcheck() {
    replay("netcheck", fuzz::netcheck);
}

#[test]
fn random_answers() {
    use rand::{RngCore, SeedableRng};
    for seed in 0..2_000 {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut input = [0; 120];
        random.fill_bytes(&mut input);
        println!("seed {seed}");
        fuzz::netcheck(&input);
    }
}

#[test]
fn derp() {
    replay("derp", fuzz::derp);
}

#[test]
fn portmap() {
    replay("portmap", fuzz::portmap);
}
