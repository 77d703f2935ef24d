//! Starting, stopping and reloading a data plane and, where paths are to be found, its control
//! process.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use millrace_config::{Config, Exit, paths};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::{Problem, client};

const DAEMON: &str = "millrace-dataplane";
const CONTROL: &str = "millrace-control";
const LOGS: &str = "/var/log/millrace";
const START_TIMEOUT: Duration = Duration::from_secs(15);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Lines of the log that an error quotes.
const TAIL_LINES: usize = 12;

pub(crate) fn up(file: &Path, interface: Option<&str>, foreground: bool) -> Result<Exit, Problem> {
    let mut command = Command::new(program(DAEMON));
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
    let mut start = Start::in_background(command, DAEMON, &format!("{name}.log"))?;
    wait_until_ready(&mut start, &pid_file(&name), &name)?;
    eprintln!("millrace: {name} is up; its log is {}", start.log.display());
    if wants_control(file) {
        let mut command = Command::new(program(CONTROL));
        command.arg("--config").arg(file);
        let mut start = Start::in_background(command, CONTROL, &format!("{name}-control.log"))?;
        let what = format!("the control process of {name}");
        wait_until_ready(&mut start, &control_pid_file(&name), &what)?;
        eprintln!("millrace: it looks for paths; the log of that is {}", start.log.display());
    }
    Ok(Exit::Ok)
}

/// A program that was started in the background.
struct Start {
    child: Child,
    log: PathBuf,
    /// Bytes of the log that were there before.
    from: u64,
}

impl Start {
    fn in_background(mut command: Command, program: &str, log: &str) -> Result<Self, Problem> {
        let log = Path::new(LOGS).join(log);
        let open = fs::create_dir_all(LOGS).and_then(|()| {
            let file = File::options().create(true).append(true).open(&log)?;
            Ok((file.try_clone()?, file))
        });
        let (out, err) = open.map_err(|error| {
            Problem::new(Exit::Error, format!("opening {}: {error}", log.display()))
        })?;
        let from = fs::metadata(&log).map_or(0, |facts| facts.len());
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let child = command
            .spawn()
            .map_err(|error| Problem::new(Exit::Error, format!("starting {program}: {error}")))?;
        Ok(Self { child, log, from })
    }
}

/// Only a TOML file can ask for it.
fn wants_control(file: &Path) -> bool {
    let is_toml = file.extension().is_none_or(|ending| ending != "conf");
    let config = fs::read_to_string(file).ok().filter(|_| is_toml);
    config.and_then(|text| Config::from_toml(&text).ok()).is_some_and(|c| c.discovery.is_on())
}

pub(crate) fn down(interface: Option<&str>) -> Result<Exit, Problem> {
    let name = client::choose(interface)?;
    if let Ok(pid) = control_running(&name) {
        stop(pid, &format!("the control process of {name}"))?;
    }
    // It has no right to take them away itself.
    for left in [control_pid_file(&name), paths::socket(&name)] {
        let _ = fs::remove_file(left);
    }
    stop(running(&name)?, &name)?;
    Ok(Exit::Ok)
}

fn stop(pid: Pid, name: &str) -> Result<(), Problem> {
    signal(pid, Signal::TERM)?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    while test_kill_process(pid).is_ok() {
        if Instant::now() > deadline {
            let why = format!("{name} (pid {pid}) got SIGTERM and has not ended yet");
            return Err(Problem::new(Exit::Timeout, why));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

pub(crate) fn reload(interface: Option<&str>) -> Result<Exit, Problem> {
    let name = client::choose(interface)?;
    signal(running(&name)?, Signal::HUP)?;
    if let Ok(pid) = control_running(&name) {
        signal(pid, Signal::HUP)?;
    }
    eprintln!("millrace: {name} was asked to reload; its log says whether the file was taken over");
    Ok(Exit::Ok)
}

/// A daemon beside this program, or on the PATH.
fn program(name: &str) -> PathBuf {
    let beside = std::env::current_exe().map(|own| own.with_file_name(name));
    beside.ok().filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from(name))
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
fn wait_until_ready(start: &mut Start, pid_file: &Path, name: &str) -> Result<(), Problem> {
    let deadline = Instant::now() + START_TIMEOUT;
    let Start { child, log, from } = start;
    let from = *from;
    loop {
        let written = fs::read_to_string(pid_file).unwrap_or_default();
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

fn control_pid_file(name: &str) -> PathBuf {
    Path::new(client::PID_FILES).join(format!("{name}.control.pid"))
}

/// The pid of a running data plane. A pid file may be older than the process that has its number
/// now, so the process must be a data plane.
pub(crate) fn running(name: &str) -> Result<Pid, Problem> {
    process(&pid_file(name), DAEMON).ok_or_else(|| {
        let why = format!("no data plane runs for {name}; start it with: millrace up FILE");
        Problem::new(Exit::NotRunning, why)
    })
}

/// The file that the running data plane of an interface was given.
pub(crate) fn config_of(name: &str) -> Option<PathBuf> {
    let pid = running(name).ok()?.as_raw_pid();
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split('\0');
    let file = words.find_map(|word| match word.strip_prefix("--config") {
        Some("") => Some(None),
        Some(rest) => rest.strip_prefix('=').map(Some),
        None => None,
    })?;
    let file = file.or_else(|| words.next())?;
    // As it was meant where the process runs.
    Some(fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default().join(file))
}

fn control_running(name: &str) -> Result<Pid, Problem> {
    process(&control_pid_file(name), CONTROL).ok_or_else(|| {
        Problem::new(Exit::NotRunning, format!("no control process runs for {name}"))
    })
}

fn process(pid_file: &Path, program: &str) -> Option<Pid> {
    let text = fs::read_to_string(pid_file).ok()?;
    let number: i32 = text.trim().parse().ok()?;
    let comm = fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
    // The kernel keeps the first 15 bytes of a name.
    if comm.trim() != &program[..15] {
        return None;
    }
    Pid::from_raw(number)
}

fn signal(pid: Pid, signal: Signal) -> Result<(), Problem> {
    kill_process(pid, signal).map_err(|error| {
        let exit = if error == rustix::io::Errno::PERM { Exit::Permission } else { Exit::Error };
        Problem::new(exit, format!("signalling pid {pid}: {error}"))
    })
}
