//! Starting, stopping and reloading a data plane.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use millrace_config::{Config, Exit};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::{Problem, client};

const DAEMON: &str = "millrace-dataplane";
const LOGS: &str = "/var/log/millrace";
const START_TIMEOUT: Duration = Duration::from_secs(15);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Lines of the log that an error quotes.
const TAIL_LINES: usize = 12;

pub(crate) fn up(file: &Path, interface: Option<&str>, foreground: bool) -> Result<Exit, Problem> {
    let mut command = Command::new(daemon());
    command.arg("--config").arg(file);
    if let Some(name) = interface {
        command.args(["--interface", name]);
    }
    if foreground {
        let error = command.exec();
        return Err(Problem::new(Exit::Error, format!("starting {DAEMON}: {error}")));
    }
    let name = interface_of(file, interface)?;
    if client::status(&name).is_ok() {
        let why =
            format!("{name} runs already; `millrace reload {name}` takes a changed file over");
        return Err(Problem::new(Exit::Error, why));
    }
    let log = Path::new(LOGS).join(format!("{name}.log"));
    let open = fs::create_dir_all(LOGS).and_then(|()| {
        let file = File::options().create(true).append(true).open(&log)?;
        Ok((file.try_clone()?, file))
    });
    let (out, err) = open.map_err(|error| {
        Problem::new(Exit::Error, format!("opening {}: {error}", log.display()))
    })?;
    let from = fs::metadata(&log).map_or(0, |facts| facts.len());
    command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
    let mut child = command
        .spawn()
        .map_err(|error| Problem::new(Exit::Error, format!("starting {DAEMON}: {error}")))?;
    wait_until_ready(&mut child, &name, &log, from)?;
    eprintln!("millrace: {name} is up; its log is {}", log.display());
    Ok(Exit::Ok)
}

pub(crate) fn down(interface: Option<&str>) -> Result<Exit, Problem> {
    let name = client::choose(interface)?;
    let pid = running(&name)?;
    signal(pid, Signal::TERM)?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    while test_kill_process(pid).is_ok() {
        if Instant::now() > deadline {
            let why = format!("{name} (pid {pid}) got SIGTERM and has not ended yet");
            return Err(Problem::new(Exit::Timeout, why));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(Exit::Ok)
}

pub(crate) fn reload(interface: Option<&str>) -> Result<Exit, Problem> {
    let name = client::choose(interface)?;
    signal(running(&name)?, Signal::HUP)?;
    eprintln!("millrace: {name} was asked to reload; its log says whether the file was taken over");
    Ok(Exit::Ok)
}

/// The daemon beside this program, or on the PATH.
fn daemon() -> PathBuf {
    let beside = std::env::current_exe().map(|own| own.with_file_name(DAEMON));
    beside.ok().filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from(DAEMON))
}

/// The interface that the file makes. A bad file is reported by the daemon, with all its defects.
fn interface_of(file: &Path, interface: Option<&str>) -> Result<String, Problem> {
    if let Some(name) = interface {
        return Ok(name.to_owned());
    }
    let shown = file.display();
    let text = fs::read_to_string(file)
        .map_err(|error| Problem::new(Exit::ConfigInvalid, format!("reading {shown}: {error}")))?;
    if file.extension().is_some_and(|ending| ending == "conf") {
        return Ok(file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
    }
    let config = Config::from_toml(&text)
        .map_err(|problems| Problem::new(Exit::ConfigInvalid, format!("{shown}:\n{problems}")))?;
    Ok(config.interface.name)
}

/// Waits for the pid file, which the daemon writes last.
fn wait_until_ready(child: &mut Child, name: &str, log: &Path, from: u64) -> Result<(), Problem> {
    let deadline = Instant::now() + START_TIMEOUT;
    let pid_file = pid_file(name);
    loop {
        let written = fs::read_to_string(&pid_file).unwrap_or_default();
        if written.trim() == child.id().to_string() {
            return Ok(());
        }
        if let Ok(Some(status)) = child.try_wait() {
            let exit = status.code().and_then(|code| {
                Exit::ALL.iter().find(|(exit, _)| i32::from(exit.code()) == code).map(|(e, _)| *e)
            });
            let exit = exit.filter(|exit| *exit != Exit::Ok).unwrap_or(Exit::Error);
            return Err(Problem::new(exit, format!("{name} did not start:\n{}", tail(log, from))));
        }
        if Instant::now() > deadline {
            let why = format!("{name} is not ready after 15 s:\n{}", tail(log, from));
            return Err(Problem::new(Exit::Timeout, why));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// The last lines that this start wrote.
fn tail(log: &Path, from: u64) -> String {
    let text = fs::read(log).unwrap_or_default();
    let new = text.get(from as usize..).unwrap_or_default();
    let new = String::from_utf8_lossy(new);
    let lines: Vec<&str> = new.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

fn pid_file(name: &str) -> PathBuf {
    Path::new(client::PID_FILES).join(format!("{name}.pid"))
}

/// The pid of a running data plane. A pid file may be older than the process that has its number
/// now, so the process must be a data plane.
pub(crate) fn running(name: &str) -> Result<Pid, Problem> {
    let not_running = || {
        let why = format!("no data plane runs for {name}; start it with: millrace up FILE");
        Problem::new(Exit::NotRunning, why)
    };
    let text = fs::read_to_string(pid_file(name)).map_err(|_| not_running())?;
    let number: i32 = text.trim().parse().map_err(|_| not_running())?;
    let comm = fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
    // The kernel keeps the first 15 bytes of a name.
    if comm.trim() != &DAEMON[..15] {
        return Err(not_running());
    }
    Pid::from_raw(number).ok_or_else(not_running)
}

fn signal(pid: Pid, signal: Signal) -> Result<(), Problem> {
    kill_process(pid, signal).map_err(|error| {
        let exit = if error == rustix::io::Errno::PERM { Exit::Permission } else { Exit::Error };
        Problem::new(exit, format!("signalling pid {pid}: {error}"))
    })
}
