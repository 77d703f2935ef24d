//! `millrace-relay`: the relay server, in the foreground.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use millrace_config::Exit;
use millrace_host::failure::Failure;
use millrace_host::log::{self, LogFormat};
use millrace_relay::{service, settings};

/// A relay for WireGuard nodes behind NATs: DERP version 2 over HTTPS, and STUN.
///
/// It sees who talks to whom and never what: packets pass sealed. Stock Tailscale clients can use it
/// as a DERP node.
#[derive(Parser)]
#[command(version, disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run until SIGTERM. SIGHUP reads the file, certificates and lists again; a bad file changes
    /// nothing.
    ///
    /// Example: millrace-relay run --config /etc/millrace/relay.toml
    Run {
        /// The TOML file.
        #[arg(long, short)]
        config: PathBuf,
        /// How log lines look on standard error.
        #[arg(long, value_enum, default_value_t = LogFormat::Text)]
        log_format: LogFormat,
        /// What is logged: error, warn, info or debug. Never a line per packet.
        #[arg(long, default_value = "info", env = "MILLRACE_LOG")]
        log_level: String,
    },
    /// Look at configuration files.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print every exit code and its meaning.
    ExitCodes,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Say every defect of a file and of the files it names. Exit code 7 if there is one.
    Check {
        /// The TOML file.
        file: PathBuf,
    },
    /// Print every key, what it means, its default, and whether a reload takes it over.
    Keys,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run { config, log_format, log_level } => {
            log::start(log_format, &log_level);
            service::run(&config)
        }
        Command::Config { command: ConfigCommand::Check { file } } => {
            service::check(&file).and_then(|_| print(&format!("{}: valid", file.display())))
        }
        Command::Config { command: ConfigCommand::Keys } => keys(),
        Command::ExitCodes => Exit::ALL
            .iter()
            .try_for_each(|(exit, meaning)| print(&format!("{:>3}  {meaning}", exit.code()))),
    };
    match result {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            eprintln!("millrace-relay: {failure}");
            failure.exit.into()
        }
    }
}

fn keys() -> Result<(), Failure> {
    for (table, key, live, default, sentence) in settings::KEYS {
        let taken = if *live { "reload" } else { "restart" };
        let default = if default.is_empty() { "required" } else { default };
        print(&format!("[{table}] {key}: {sentence} (default: {default}; {taken})"))?;
    }
    Ok(())
}

/// One line to standard output. A reader that went away is no error of ours.
fn print(line: &str) -> Result<(), Failure> {
    use std::io::Write;
    let mut out = std::io::stdout();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::from_io("writing to standard output", &error))
        }
        _ => Ok(()),
    }
}
