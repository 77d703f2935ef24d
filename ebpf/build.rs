//! Generates the drop list from `bpf/drops.h` and, for the `load` feature, compiles the programs.
//!
//! `MILLRACE_CLANG` names another compiler than clang-19 or clang.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=MILLRACE_CLANG");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let out = Path::new(&out);
    drops(&fs::read_to_string("bpf/drops.h").expect("bpf/drops.h"), out);
    if env::var_os("CARGO_FEATURE_LOAD").is_some()
        && let Err(message) = compile("programs.bpf", out).and_then(|()| compile("twin.bpf", out))
    {
        println!("cargo::error=millrace-ebpf: {}", message.replace('\n', " | "));
    }
}

/// Compiles `bpf/NAME.c` to `OUT/NAME.o`. The twin is for tests; the crate embeds only the programs.
fn compile(name: &str, out: &Path) -> Result<(), String> {
    let clang = clang()?;
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let output = Command::new(&clang)
        // v3: 32-bit jumps and compare-and-swap; Linux 5.12.
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror"])
        // Debian keeps asm/ below the triplet, where a cross-compiling clang does not look.
        .arg(format!("-I/usr/include/{architecture}-linux-gnu"))
        .args(["-c", &format!("bpf/{name}.c"), "-o"])
        .arg(out.join(format!("{name}.o")))
        .output()
        .map_err(|error| format!("running {clang}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let cure = if errors.contains("file not found") {
        "A header is missing: apt-get install libbpf-dev linux-libc-dev. "
    } else {
        ""
    };
    Err(format!("{cure}{clang} failed on bpf/{name}.c:\n{errors}"))
}

fn clang() -> Result<String, String> {
    if let Ok(named) = env::var("MILLRACE_CLANG") {
        return Ok(named);
    }
    ["clang-19", "clang"]
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok())
        .map(str::to_owned)
        .ok_or_else(|| {
            "no C compiler for eBPF: apt-get install clang-19 libbpf-dev, or name a clang in \
             MILLRACE_CLANG"
                .to_owned()
        })
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
