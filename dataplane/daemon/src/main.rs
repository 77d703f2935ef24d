//! `millrace-dataplane`: the WireGuard data plane of one interface, in the foreground.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use millrace_config::Exit;
use millrace_dataplane::failure::Failure;
use millrace_dataplane::service;
use millrace_dataplane::settings::Settings;
use millrace_host::log::{self, LogFormat};

/// Runs the WireGuard data plane of one interface until SIGTERM.
///
/// SIGHUP reads the file again; peers that did not change keep their sessions, and a bad file
/// changes nothing. `wg` and `millrace status` talk to it through /run/wireguard/NAME.sock.
/// Exit codes: `millrace exit-codes`.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// A TOML file, or a wg0.conf (told by the ending .conf).
    #[arg(long, short)]
    config: PathBuf,
    /// Name of the interface, for a .conf file (default: the file's name).
    #[arg(long)]
    interface: Option<String>,
    /// Read the file and everything it names, say what is wrong, and end.
    #[arg(long)]
    check: bool,
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
    match run(&arguments) {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            tracing::error!("{failure}");
            failure.exit.into()
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let settings = Settings::read(&arguments.config, arguments.interface.as_deref())?;
    for note in &settings.config.notes {
        tracing::warn!("{note}");
    }
    if arguments.check {
        tracing::info!(peers = settings.config.peers.len(), "the configuration is valid");
        return Ok(());
    }
    service::run(settings)
}
