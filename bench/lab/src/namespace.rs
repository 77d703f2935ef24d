//! One anonymous network namespace.
//!
//! It is entered by setns(2) on the network part only, as `nsenter --net=` does: `ip netns exec`
//! would also mount a new /sys and so hide bpffs. Without a name in /run/netns it vanishes with the
//! last process and file descriptor in it, even if this process is killed.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    panic::resume_unwind,
    process::{Command, Output, Stdio},
    sync::Arc,
    thread,
};

use crate::{Error, Result};

/// A network namespace; clones share it, the last one to go removes it.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: Arc<str>,
    file: Arc<File>,
}

impl Namespace {
    /// A new namespace with loopback up, no forwarding, no source filter, and IPv6 addresses that
    /// work at once. `name` is for messages.
    pub fn new(name: &str) -> Result<Self> {
        let file = thread::spawn(unshared_namespace)
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))
            .map_err(Error::system("make a network namespace (this needs root)"))?;
        let namespace = Self { name: name.into(), file: Arc::new(file) };
        for (key, value) in [
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv6/conf/default/router_solicitations", "0"),
            // Tests provoke many errors at once and count on each of them.
            ("net/ipv4/icmp_ratelimit", "0"),
            ("net/ipv6/icmp/ratelimit", "0"),
        ] {
            namespace.sysctl(key, value)?;
        }
        namespace.ip(["link set lo up"])?;
        Ok(namespace)
    }

    /// The one that this thread is in.
    pub fn current() -> Result<Self> {
        let file = File::open("/proc/thread-self/ns/net");
        let file = file.map_err(Error::system("open this thread's network namespace"))?;
        Ok(Self { name: "current".into(), file: Arc::new(file) })
    }

    /// The name given at birth.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path that names this namespace to other programs while this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// A command that will run inside. It is killed when the *thread* that spawns it ends, so long
    /// lived ones belong to [`crate::Daemon`], which spawns on a thread that stays.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let file = Arc::clone(&self.file);
        let mut command = Command::new(program);
        let enter = move || {
            // SAFETY: both calls are async-signal-safe and take plain integers.
            let entered = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET)
            };
            if entered == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: between fork and exec `enter` allocates nothing and takes no lock.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs a command line (split at spaces) to its end and returns its standard output.
    pub fn exec(&self, line: &str) -> Result<String> {
        self.exec_with_input(line, "")
    }

    /// As [`Self::exec`], with `input` on the command's standard input.
    pub fn exec_with_input(&self, line: &str, input: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words
            .next()
            .ok_or_else(|| Error::Unexpected("an empty command line cannot run".into()))?;
        let output = self.output(self.command(program).args(words), input)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Command {
            command: line.into(),
            place: self.name.to_string(),
            status: output.status.to_string(),
            output: [output.stdout, output.stderr]
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .concat(),
        })
    }

    /// Runs a prepared command to its end, whatever its exit status.
    pub fn output(&self, command: &mut Command, input: &str) -> Result<Output> {
        let what = || format!("run {command:?} in {}", self.name);
        let what = what();
        let stdin = if input.is_empty() { Stdio::null() } else { Stdio::piped() };
        let child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(Error::system(&what))?;
        if let Some(mut stdin) = child.stdin.take() {
            let input = input.to_owned();
            // A thread, because a program may answer before it has read all; a program that stops
            // reading shows in its exit status.
            thread::spawn(move || stdin.write_all(input.as_bytes()));
        }
        child.wait_with_output().map_err(Error::system(what))
    }

    /// Runs `ip` with one command a line, in one process.
    pub fn ip<S: AsRef<str>>(&self, lines: impl IntoIterator<Item = S>) -> Result<()> {
        let batch: String = lines.into_iter().map(|line| format!("{}\n", line.as_ref())).collect();
        self.exec_with_input("ip -batch -", &batch).map(drop).map_err(|error| match error {
            Error::Command { command, place, status, output } => {
                Error::Command { command, place, status, output: format!("{batch}{output}") }
            }
            other => other,
        })
    }

    /// Writes a kernel setting, named with slashes: `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| fs::write(format!("/proc/sys/{key}"), value))
            .map_err(Error::system(format!("set {key} to {value} in {}", self.name)))
    }

    /// Runs `work` on a thread inside the namespace. Sockets made there stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            // SAFETY: takes an open descriptor and a flag, and moves only this new thread.
            let entered = unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(entered, 0, "enter {}: {}", self.name, io::Error::last_os_error());
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// Moves the calling thread into a new namespace and returns the handle of it.
fn unshared_namespace() -> io::Result<File> {
    // SAFETY: takes a flag only; file descriptors and memory stay shared.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    File::open("/proc/thread-self/ns/net")
}
