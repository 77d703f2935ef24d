//! `aead`: ChaCha20-Poly1305 of packets, by every back-end of ours and by other libraries, in turn
//! on one core.
//!
//! Each run measures every contender once; figures are medians of runs. Opening works in place and
//! destroys its input, so a copy is part of what is timed; its own time, measured in the same run,
//! is taken off again.

use std::error::Error;
use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use chacha20poly1305::{AeadInPlace, ChaCha20Poly1305, KeyInit};
use clap::Parser;
use millrace_aead::{
    Backend, OpenJob, OpeningKey, SealJob, SealingKey, TAG_LEN, open_batch, seal_batch,
};
use millrace_bench::machine::Machine;
use serde::Serialize;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Measures ChaCha20-Poly1305 on packets: ns per packet, by length and batch.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Print one JSON object a row.
    #[arg(long)]
    json: bool,
    /// Shorter runs: done within 40 seconds.
    #[arg(long)]
    quick: bool,
    /// Only these lengths (bytes of text; 0 is the mix).
    #[arg(long, value_delimiter = ',', default_values_t = LENGTHS)]
    bytes: Vec<usize>,
    /// Only these batches.
    #[arg(long, value_delimiter = ',', default_values_t = BATCHES)]
    batches: Vec<usize>,
    /// The core to run on.
    #[arg(long, default_value_t = 0)]
    core: usize,
    /// Runs, whose medians are printed.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=101))]
    runs: u32,
}

/// The simple Internet mix: 7 small, 4 middle and 1 full packet.
const MIX: usize = 0;
const IMIX: [usize; 12] = [64, 576, 64, 64, 576, 64, 1420, 64, 576, 64, 64, 576];
const LENGTHS: [usize; 13] =
    [32, 64, 128, 256, 576, 1024, 1280, 1408, 1420, 1424, 4096, 16_384, MIX];
const BATCHES: [usize; 4] = [1, 4, 16, 64];
const KEY: [u8; 32] = [9; 32];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("aead: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let machine = Machine::read();
    let core = core_affinity::CoreId { id: arguments.core };
    if !core_affinity::set_for_current(core) {
        return Err(format!("core {} cannot be used: see --core", arguments.core).into());
    }
    let time = Duration::from_micros(if arguments.quick { 500 } else { 3000 });
    let contenders: Vec<Contender> = Contender::all().collect();
    let mut rows = Vec::new();
    let (row_len, cells) = (2 * contenders.len(), arguments.bytes.len() * arguments.batches.len());
    for &bytes in &arguments.bytes {
        for &batch in &arguments.batches {
            eprint!(
                "\r{} B, batches of {batch}: {} of {cells}    ",
                name_of(bytes),
                rows.len() / row_len
            );
            rows.extend(measure(&contenders, bytes, batch, arguments.runs, time));
        }
    }
    for &bytes in arguments.bytes.iter().filter(|&&bytes| bytes != MIX) {
        if !arguments.quick || [64, 1420].contains(&bytes) {
            eprint!("\ropenssl speed, {bytes} B      ");
            rows.extend(openssl(bytes));
        }
    }
    eprint!("\r                                \r");
    let clock_ghz = clock_ghz();
    if arguments.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
        return Ok(());
    }
    let Machine { cpu, cores, kernel, load_average_1min, .. } = &machine;
    println!("# ChaCha20-Poly1305, ns per packet\n");
    println!(
        "{cpu}, {cores} cores, {clock_ghz:.2} GHz while this ran, Linux {kernel}, load \
         {load_average_1min} before. `cargo run --release -p millrace-bench --bin aead`{}: medians \
         of {} runs on core {}. millrace's choice: {} ({}).",
        if arguments.quick { " `-- --quick`" } else { "" },
        arguments.runs,
        arguments.core,
        millrace_aead::choice().name(),
        millrace_aead::choice().reason(),
    );
    for op in [Op::Seal, Op::Open] {
        table(op, &rows, &arguments.bytes, clock_ghz);
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Op {
    Seal,
    Open,
}

/// One figure.
#[derive(Debug, Serialize)]
struct Row {
    backend: String,
    op: Op,
    /// Of the text; 0 is the mix.
    bytes: usize,
    batch: usize,
    ns_per_packet: f64,
}

enum Contender {
    Ours(Backend),
    /// What the data plane calls: the choice that was measured at the start.
    Chosen,
    AwsLc(Box<aws_lc_rs::aead::LessSafeKey>),
    RustCrypto(Box<ChaCha20Poly1305>),
}

impl Contender {
    fn all() -> impl Iterator<Item = Self> {
        let ours = Backend::ALL.into_iter().filter(|backend| backend.is_available());
        let aws_lc = aws_lc_rs::aead::UnboundKey::new(&aws_lc_rs::aead::CHACHA20_POLY1305, &KEY)
            .map(|key| Self::AwsLc(Box::new(aws_lc_rs::aead::LessSafeKey::new(key))));
        let rust_crypto = Self::RustCrypto(Box::new(ChaCha20Poly1305::new(&KEY.into())));
        ours.map(Self::Ours).chain([Self::Chosen]).chain(aws_lc).chain([rust_crypto])
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Ours(backend) => backend.name(),
            Self::Chosen => "millrace",
            Self::AwsLc(_) => "aws-lc-rs",
            Self::RustCrypto(_) => "rustcrypto",
        }
    }

    fn seal(&self, packets: &mut [Vec<u8>], keys: &Keys) {
        let mut jobs: Vec<SealJob<'_>> = packets
            .iter_mut()
            .zip(0..)
            .map(|(packet, counter)| SealJob { key: &keys.sealing, counter, packet })
            .collect();
        match self {
            Self::Ours(backend) => backend.seal_batch(&mut jobs),
            Self::Chosen => seal_batch(&mut jobs),
            Self::AwsLc(key) => {
                for job in jobs {
                    let (text, room) = job.packet.split_at_mut(job.packet.len() - TAG_LEN);
                    let nonce = aws_lc_rs::aead::Nonce::assume_unique_for_key(nonce(job.counter));
                    let aad = aws_lc_rs::aead::Aad::empty();
                    if let Ok(tag) = key.seal_in_place_separate_tag(nonce, aad, text) {
                        room.copy_from_slice(tag.as_ref());
                    }
                }
            }
            Self::RustCrypto(key) => {
                for job in jobs {
                    let (text, room) = job.packet.split_at_mut(job.packet.len() - TAG_LEN);
                    let nonce = nonce(job.counter).into();
                    if let Ok(tag) = key.encrypt_in_place_detached(&nonce, &[], text) {
                        room.copy_from_slice(&tag);
                    }
                }
            }
        }
    }

    /// How many packets were authentic.
    fn open(&self, packets: &mut [Vec<u8>], keys: &Keys) -> usize {
        let mut jobs: Vec<OpenJob<'_>> = packets
            .iter_mut()
            .zip(0..)
            .map(|(packet, counter)| OpenJob {
                key: &keys.opening,
                counter,
                packet,
                verified: false,
            })
            .collect();
        match self {
            Self::Ours(backend) => backend.open_batch(&mut jobs),
            Self::Chosen => open_batch(&mut jobs),
            Self::AwsLc(key) => {
                for job in &mut jobs {
                    let nonce = aws_lc_rs::aead::Nonce::assume_unique_for_key(nonce(job.counter));
                    let aad = aws_lc_rs::aead::Aad::empty();
                    job.verified = key.open_in_place(nonce, aad, job.packet).is_ok();
                }
            }
            Self::RustCrypto(key) => {
                for job in &mut jobs {
                    let (text, tag) = job.packet.split_at_mut(job.packet.len() - TAG_LEN);
                    let (nonce, tag) = (nonce(job.counter).into(), (&*tag).into());
                    job.verified = key.decrypt_in_place_detached(&nonce, &[], text, tag).is_ok();
                }
            }
        }
        jobs.iter().filter(|job| job.verified).count()
    }
}

fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}

struct Keys {
    sealing: SealingKey,
    opening: OpeningKey,
}

fn measure(
    contenders: &[Contender],
    bytes: usize,
    batch: usize,
    runs: u32,
    time: Duration,
) -> Vec<Row> {
    let keys = Keys { sealing: SealingKey::new(KEY), opening: OpeningKey::new(KEY) };
    let lens = (0..batch).map(|nth| if bytes == MIX { IMIX[nth % IMIX.len()] } else { bytes });
    let mut packets: Vec<Vec<u8>> = lens.map(|len| vec![0xab; len + TAG_LEN]).collect();
    let mut sealed = packets.clone();
    Contender::Ours(Backend::Ring).seal(&mut sealed, &keys);
    let mut figures = vec![[Vec::new(), Vec::new()]; contenders.len()];
    for _ in 0..runs {
        let copy = ns_per_call(time, || restore(&mut packets, &sealed));
        for (contender, [seal, open]) in contenders.iter().zip(&mut figures) {
            seal.push(ns_per_call(time, || contender.seal(&mut packets, &keys)));
            open.push(
                ns_per_call(time, || {
                    restore(&mut packets, &sealed);
                    assert_eq!(contender.open(&mut packets, &keys), batch, "all are authentic");
                }) - copy,
            );
        }
    }
    let mut rows = Vec::new();
    for (contender, figures) in contenders.iter().zip(figures) {
        for (op, figures) in [Op::Seal, Op::Open].into_iter().zip(figures) {
            rows.push(Row {
                backend: contender.name().to_owned(),
                op,
                bytes,
                batch,
                ns_per_packet: median(figures) / batch as f64,
            });
        }
    }
    rows
}

fn restore(packets: &mut [Vec<u8>], sealed: &[Vec<u8>]) {
    for (packet, sealed) in packets.iter_mut().zip(sealed) {
        packet.copy_from_slice(black_box(sealed));
    }
}

/// Calls `work` for about `time`.
fn ns_per_call(time: Duration, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    work();
    let once = start.elapsed().max(Duration::from_nanos(20));
    let calls = (time.as_nanos() / once.as_nanos()).clamp(1, 1 << 20) as u32;
    let start = Instant::now();
    for _ in 0..calls {
        work();
    }
    start.elapsed().as_nanos() as f64 / f64::from(calls)
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// What OpenSSL's own benchmark says, one packet after the other. Nothing if it is not installed.
fn openssl(bytes: usize) -> Vec<Row> {
    let rows = [(Op::Seal, None), (Op::Open, Some("-decrypt"))].into_iter().map(|(op, flag)| {
        let mut command = Command::new("openssl");
        command.args(["speed", "-mr", "-seconds", "1", "-evp", "chacha20-poly1305"]);
        command.args(["-aead", "-bytes", &bytes.to_string()]).args(flag);
        let output = command.output().ok()?;
        // "+F:22:ChaCha20-Poly1305:BYTES_PER_SECOND"
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text.lines().find(|line| line.starts_with("+F:"))?;
        let bytes_per_second: f64 = line.rsplit(':').next()?.trim().parse().ok()?;
        Some(Row {
            backend: "openssl".to_owned(),
            op,
            bytes,
            batch: 1,
            ns_per_packet: 1e9 * bytes as f64 / bytes_per_second,
        })
    });
    rows.flatten().collect()
}

/// By a chain of multiplications, each of which takes three cycles on every x86-64 and aarch64 CPU
/// of this decade.
fn clock_ghz() -> f64 {
    const COUNT: u32 = 300_000;
    let runs = (0..70).map(|_| {
        let start = Instant::now();
        let mut value = black_box(3_u64);
        for _ in 0..COUNT {
            value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(9);
        }
        black_box(value);
        // The rotation is one cycle more.
        4.0 * f64::from(COUNT) / start.elapsed().as_nanos() as f64
    });
    // Other work on the machine only ever adds time.
    runs.fold(0.0, f64::max)
}

fn name_of(bytes: usize) -> String {
    if bytes == MIX { "IMIX".to_owned() } else { bytes.to_string() }
}

fn table(op: Op, rows: &[Row], lengths: &[usize], clock_ghz: f64) {
    let mut backends: Vec<&str> = Vec::new();
    for row in rows {
        if !backends.contains(&row.backend.as_str()) {
            backends.push(&row.backend);
        }
    }
    println!("\n## {op:?}\n");
    println!("| bytes | batch | {} | millrace / ring | cycles/B |", backends.join(" | "));
    println!("|---|---|{}---|---|", "---|".repeat(backends.len()));
    let figure = |bytes: usize, batch: usize, backend: &str| {
        let mut rows = rows.iter().filter(|row| row.op == op && row.backend == backend);
        let row = rows.find(|row| row.bytes == bytes && row.batch == batch)?;
        Some(row.ns_per_packet)
    };
    let mut batches: Vec<usize> = rows.iter().map(|row| row.batch).collect();
    batches.sort_unstable();
    batches.dedup();
    for &bytes in lengths {
        for &batch in &batches {
            let cells = backends.iter().map(|backend| {
                figure(bytes, batch, backend).map_or("–".to_owned(), |ns| format!("{ns:.0}"))
            });
            let cells: Vec<String> = cells.collect();
            let ours = figure(bytes, batch, "millrace");
            let ratio = figure(bytes, batch, "ring").zip(ours).map(|(ring, ours)| ring / ours);
            let mean = if bytes == MIX {
                let lens = (0..batch).map(|nth| IMIX[nth % IMIX.len()]);
                lens.sum::<usize>() as f64 / batch as f64
            } else {
                bytes as f64
            };
            println!(
                "| {} | {batch} | {} | {} | {} |",
                name_of(bytes),
                cells.join(" | "),
                ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2} ×")),
                ours.map_or("–".to_owned(), |ns| format!("{:.2}", ns * clock_ghz / mean)),
            );
        }
    }
}
