//! A long-lived child with its log in a file and an end that is certain.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};

use crate::{Error, Result, wait_for};

/// How long a daemon may take to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Lines of log that an error message quotes.
const TAIL_LINES: usize = 30;

/// A running program. Dropped, it is killed; in a panic it also prints the end of its log.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` with both outputs appended to `directory/name.log`.
    pub fn start(directory: &Path, name: &str, mut command: Command) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.map_err(Error::system(format!("open {}", log.display())))?;
        let copy = file.try_clone().map_err(Error::system("copy the log's descriptor"))?;
        command.stdin(Stdio::null()).stdout(file).stderr(copy);
        // Ctrl-C at the terminal is for us; we end our children in order.
        command.process_group(0);
        let child = spawn(command).map_err(Error::system(format!("start {name}")))?;
        Ok(Self { name: name.into(), child, log })
    }

    /// The name given at start.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has written so far.
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until `ready` yields a value; an early end of the process is an error with its log.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let mut ended = None;
        let found = wait_for(what, limit, || {
            ended = self.ended();
            ready().map(Some).or_else(|| ended.map(|_| None))
        });
        match found {
            Ok(Some(value)) => Ok(value),
            Ok(None) => Err(Error::Unexpected(format!(
                "{} ended ({}) before {what}:\n{}",
                self.name,
                ended.map(|status| status.to_string()).unwrap_or_default(),
                self.log_tail()
            ))),
            Err(Error::Timeout { what, waited }) => Err(Error::Timeout {
                what: format!("{what} of {}:\n{}", self.name, self.log_tail()),
                waited,
            }),
            Err(other) => Err(other),
        }
    }

    /// Waits until the log holds `text`.
    pub fn wait_for_log(&mut self, text: &str, limit: Duration) -> Result<()> {
        let log = self.log.clone();
        let holds = || fs::read_to_string(&log).is_ok_and(|log| log.contains(text)).then_some(());
        self.wait_for(&format!("\"{text}\" in the log"), limit, holds)
    }

    /// User and system time of all its threads so far.
    pub fn cpu_time(&self) -> Duration {
        cpu_time(self.pid())
    }

    /// Sends a signal to it.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: the child is not reaped while we own it, so the pid is still its own.
        unsafe { libc::kill(self.pid() as libc::pid_t, signal) };
    }

    /// Asks it to end with SIGTERM and returns how it ended; killed if it does not.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM);
        let name = self.name.clone();
        wait_for(format!("{name} to end after SIGTERM"), STOP_LIMIT, || self.ended())
    }

    /// Kills it with SIGKILL and waits until the kernel has taken it down.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
        if thread::panicking() {
            eprintln!("--- end of the log of {}:\n{}", self.name, self.log_tail());
        }
    }
}

/// User and system time that a process and its threads have used.
pub fn cpu_time(pid: u32) -> Duration {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to live locals of the right type.
    let result = unsafe {
        match libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) {
            0 => libc::clock_gettime(clock, &mut time),
            error => error,
        }
    };
    if result != 0 {
        return Duration::ZERO;
    }
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Starts children on one thread that lives as long as this process: they are to die with the
/// process, but the kernel ties the death signal to the spawning thread.
fn spawn(command: Command) -> io::Result<Child> {
    type Request = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        thread::spawn(move || {
            for (mut command, reply) in requests {
                // The receiver waits below, so it is there.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let (reply, child) = mpsc::channel();
    let gone = |_| io::Error::other("the spawning thread has ended");
    spawner.send((command, reply)).map_err(|_| gone(mpsc::RecvError))?;
    child.recv().map_err(gone)?
}
