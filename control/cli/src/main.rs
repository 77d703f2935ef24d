//! `millrace`: the command of the operator. Data goes to standard output and nothing else does;
//! every error says what was seen and what to do, and its exit code is documented.
#![forbid(unsafe_code)]

mod client;
mod control_client;
mod keys;
mod lifecycle;
mod nat;
mod netcheck;
mod reach;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use millrace_config::paths::Request;
use millrace_config::{Config, Exit};

/// Runs and looks at WireGuard gateways of millrace.
#[derive(Parser)]
#[command(version, after_help = "Exit codes: millrace exit-codes", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the data plane of a configuration file and wait until it is ready.
    ///
    /// Example: millrace up /etc/millrace/millrace.toml
    Up {
        /// A TOML file, or a wg0.conf.
        file: PathBuf,
        /// Name of the interface, for a .conf file (default: the file's name).
        #[arg(long)]
        interface: Option<String>,
        /// Stay in the foreground, as under systemd.
        #[arg(long)]
        foreground: bool,
    },
    /// Stop a data plane.
    Down {
        /// The interface; needed only if several run.
        interface: Option<String>,
    },
    /// Let a data plane read its file again. Peers that did not change keep their sessions.
    Reload {
        /// The interface; needed only if several run.
        interface: Option<String>,
    },
    /// Say what runs, how, and why so.
    ///
    /// Exit code 0 healthy, 3 degraded, 4 down, 5 not running.
    Status {
        /// The interface; needed only if several run.
        interface: Option<String>,
        /// Print the document millrace.status/1.
        #[arg(long)]
        json: bool,
        /// Also what is usual: offloads that are on, drops that never happened.
        #[arg(long, short)]
        verbose: bool,
        /// Print nothing; exit 0 if it is live (it answers) or ready (traffic can pass), else 4.
        #[arg(long, value_enum)]
        check: Option<Check>,
    },
    /// Say what the network around this host lets through, and what that means for peers.
    ///
    /// Needs no daemon and no rights. Exit code 0 as wished, 3 if peers will often be reached only by
    /// relay, 4 if nobody answers. Example:
    /// `millrace netcheck --relay https://relay.example.net`
    Netcheck(netcheck::Arguments),
    /// Ping a peer along the path that the tunnel takes now, and say which that is.
    ///
    /// Exit code 0 direct, 3 through a relay, 4 no answer.
    ///
    /// Example: millrace ping site-b --until-direct
    Ping {
        /// Name of the peer, its public key, or the start of that.
        peer: String,
        /// The interface; needed only if several run.
        #[arg(long, short)]
        interface: Option<String>,
        /// How many pings, one a second.
        #[arg(long, short, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
        count: u32,
        /// Stop at the first direct answer, however many it takes.
        #[arg(long)]
        until_direct: bool,
        /// Seconds after which it ends (with --until-direct: 60).
        #[arg(long)]
        timeout: Option<u64>,
        /// Print documents millrace.pong/1, one a line.
        #[arg(long)]
        json: bool,
    },
    /// Say why a peer is reached as it is: every way that was tried, and what would help.
    ///
    /// Exit code 0 direct, 3 through a relay, 4 not reached.
    Why {
        /// Name of the peer, its public key, or the start of that.
        peer: String,
        /// The interface; needed only if several run.
        #[arg(long, short)]
        interface: Option<String>,
        /// Print the document millrace.why/1.
        #[arg(long)]
        json: bool,
    },
    /// Print a new private key.
    ///
    /// Example: (umask 077; millrace genkey > private.key)
    Genkey,
    /// Read a private key from standard input, print its public key.
    Pubkey,
    /// Print a new preshared key.
    Genpsk,
    /// Look at configuration files.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print the version.
    Version {
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print every exit code and its meaning.
    ExitCodes,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Say every defect of a file, with line and column. Exit code 7 if there is one.
    Check {
        /// A TOML file, or a wg0.conf.
        file: PathBuf,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Check {
    Live,
    Ready,
}

/// Why a command did not do what it was asked for.
struct Problem {
    exit: Exit,
    sentence: String,
}

impl Problem {
    fn new(exit: Exit, sentence: impl Into<String>) -> Self {
        Self { exit, sentence: sentence.into() }
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Up { file, interface, foreground } => {
            lifecycle::up(&file, interface.as_deref(), foreground)
        }
        Command::Down { interface } => lifecycle::down(interface.as_deref()),
        Command::Reload { interface } => lifecycle::reload(interface.as_deref()),
        Command::Status { interface, json, verbose, check } => {
            status(interface.as_deref(), json, verbose, check)
        }
        Command::Netcheck(arguments) => netcheck::run(&arguments),
        Command::Ping { peer, interface, count, until_direct, timeout, json } => {
            let timeout = timeout.or(until_direct.then_some(60)).map(Duration::from_secs);
            let options = reach::PingOptions { count, until_direct, timeout, json };
            reach::ping(interface.as_deref(), &peer, &options)
        }
        Command::Why { peer, interface, json } => reach::why(interface.as_deref(), &peer, json),
        Command::Genkey => print(&keys::private_key().to_base64()),
        Command::Pubkey => keys::public_key_of_stdin().and_then(|key| print(&key)),
        Command::Genpsk => print(&keys::preshared_key().to_base64()),
        Command::Config { command: ConfigCommand::Check { file } } => check_file(&file),
        Command::Version { json } => version(json),
        Command::ExitCodes => exit_codes(),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(problem) => {
            eprintln!("millrace: {}", problem.sentence);
            problem.exit.into()
        }
    }
}

/// One line to standard output. A reader that went away is no error of ours.
fn print(line: &str) -> Result<Exit, Problem> {
    use std::io::Write;
    let mut out = std::io::stdout();
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Problem::new(Exit::Error, format!("writing to standard output: {error}")))
        }
        _ => Ok(Exit::Ok),
    }
}

fn status(
    interface: Option<&str>,
    json: bool,
    verbose: bool,
    check: Option<Check>,
) -> Result<Exit, Problem> {
    let interface = client::choose(interface)?;
    let status = client::status(&interface)?;
    match check {
        Some(Check::Live) => return Ok(Exit::Ok),
        Some(Check::Ready) if status.is_ready() => return Ok(Exit::Ok),
        Some(Check::Ready) => return Ok(Exit::NotConnected),
        None => {}
    }
    let paths = match control_client::ask(&interface, &Request::Status) {
        Ok(answer) => Some(answer),
        // Plain WireGuard is no fault; a control process that cannot answer is one.
        Err(problem) if problem.exit == Exit::NotRunning => None,
        Err(problem) => {
            eprintln!("millrace: {}", problem.sentence);
            None
        }
    };
    let failed = |error| Problem::new(Exit::Error, format!("writing JSON: {error}"));
    let text = if json {
        let mut document = serde_json::to_value(&status).map_err(failed)?;
        document["paths"] = paths.unwrap_or(serde_json::Value::Null);
        serde_json::to_string_pretty(&document).map_err(failed)?
    } else {
        let paths = paths.and_then(|paths| serde_json::from_value(paths).ok());
        show::text(&status, paths.as_ref(), verbose)
    };
    print(text.trim_end())?;
    Ok(show::exit(&status))
}

fn check_file(file: &std::path::Path) -> Result<Exit, Problem> {
    let shown = file.display();
    let text = std::fs::read_to_string(file)
        .map_err(|error| Problem::new(Exit::ConfigInvalid, format!("reading {shown}: {error}")))?;
    let parsed = if file.extension().is_some_and(|ending| ending == "conf") {
        let stem = file.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        Config::from_wg_quick(&text, &stem.unwrap_or_default())
    } else {
        Config::from_toml(&text)
    };
    let config = parsed
        .map_err(|problems| Problem::new(Exit::ConfigInvalid, format!("{shown}:\n{problems}")))?;
    for note in &config.notes {
        eprintln!("millrace: {shown}: {note}");
    }
    print(&format!("{shown}: valid, {} peers", config.peers.len()))
}

fn version(json: bool) -> Result<Exit, Problem> {
    let version = env!("CARGO_PKG_VERSION");
    if json {
        let document = serde_json::json!({ "schema": "millrace.version/1", "version": version });
        return print(&document.to_string());
    }
    print(&format!("millrace {version}"))
}

fn exit_codes() -> Result<Exit, Problem> {
    for (exit, meaning) in Exit::ALL {
        print(&format!("{:>3}  {meaning}", exit.code()))?;
    }
    Ok(Exit::Ok)
}
