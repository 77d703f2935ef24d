//! `millrace-control`: the control process of one gateway, in the foreground.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use millrace_config::Exit;
use millrace_control::service;
use millrace_host::log::{self, LogFormat};

/// Finds a path to each peer of one gateway: through NATs where it can, through a relay where it
/// must. The data plane carries the packets and goes on without it.
///
/// Reads [discovery] and the interface's name of the same file as the data plane.
///
/// Example: millrace-control --config /etc/millrace/millrace.toml
#[derive(Parser)]
#[command(version, after_help = "SIGHUP reads the file again. Exit codes: millrace exit-codes")]
struct Arguments {
    /// The TOML file of the gateway.
    #[arg(long, short)]
    config: PathBuf,
    /// How log lines look on standard error.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// What is logged: error, warn, info or debug. Never a line per packet.
    #[arg(long, default_value = "info", env = "MILLRACE_LOG")]
    log_level: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log::start(arguments.log_format, &arguments.log_level);
    match service::run(&arguments.config) {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            eprintln!("millrace-control: {failure}");
            failure.exit.into()
        }
    }
}
