//! Generates the drop list from `bpf/drops.h`.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    drops(&fs::read_to_string("bpf/drops.h").expect("bpf/drops.h"), Path::new(&out));
}

/// One list makes the C enum, the Rust enum, the names and the sentences.
fn drops(header: &str, out: &Path) {
    let rows: Vec<(&str, &str)> = header
        .lines()
        .filter_map(|line| line.trim().strip_prefix("X(")?.split_once(", \""))
        .map(|(name, rest)| (name, rest.split('"').next().unwrap_or("")))
        .collect();
    assert!(!rows.is_empty(), "no X(name, \"sentence\") rows in bpf/drops.h");
    let mut code = String::from(
        "/// Why a packet was dropped. Numbers are the order in `bpf/drops.h`.\n\
         #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]\n#[repr(u8)]\npub enum Drop {\n",
    );
    for (number, (name, sentence)) in rows.iter().enumerate() {
        let camel: String =
            name.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
        writeln!(code, "    /// {sentence}\n    {camel} = {number},").expect("String");
    }
    writeln!(
        code,
        "}}\n\n/// How many reasons there are.\npub const COUNT: usize = {};\n",
        rows.len()
    )
    .expect("String");
    code.push_str("/// Every reason in the order of its number: variant, name, sentence.\npub const ALL: [(Drop, &str, &str); COUNT] = [\n");
    for (name, sentence) in &rows {
        let camel: String =
            name.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
        writeln!(code, "    (Drop::{camel}, \"{name}\", \"{sentence}\"),").expect("String");
    }
    code.push_str("];\n");
    fs::write(out.join("drops.rs"), code).expect("writing OUT_DIR/drops.rs");
}
