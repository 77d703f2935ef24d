//! A thread that hangs while the rest of its process goes on: what a watchdog is there for.

use std::{fs, io, time::Duration};

use crate::{Error, Result, wait_for};

/// How long the kernel may take to stop it.
const LIMIT: Duration = Duration::from_secs(10);

/// One thread of a child of ours, stopped as by a debugger. It goes on when this is dropped, which
/// must be on the thread that stopped it.
#[derive(Debug)]
pub struct HungThread(libc::pid_t);

impl HungThread {
    /// Stops the thread of this name.
    pub fn stop(pid: u32, name: &str) -> Result<Self> {
        let directory = format!("/proc/{pid}/task");
        let tasks = fs::read_dir(&directory).map_err(Error::system(format!("read {directory}")))?;
        let is_named = |task: &std::path::PathBuf| {
            fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)
        };
        let task = tasks.flatten().map(|task| task.path()).find(is_named);
        let task = task.ok_or_else(|| Error::Unexpected(format!("{pid} has no thread {name}")))?;
        let thread = task.file_name().and_then(|name| name.to_str()?.parse().ok());
        let thread: libc::pid_t =
            thread.ok_or_else(|| Error::Unexpected(format!("no thread {}", task.display())))?;
        // SAFETY: the request takes no pointers, and the thread belongs to our own child.
        if unsafe { libc::ptrace(libc::PTRACE_ATTACH, thread, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            return Err(Error::system(format!("stop the thread {name} of {pid}"))(error));
        }
        let hung = Self(thread);
        wait_for(format!("the thread {name} to stop"), LIMIT, || {
            let status = fs::read_to_string(task.join("status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("State:\tt")).then_some(())
        })?;
        Ok(hung)
    }
}

impl Drop for HungThread {
    fn drop(&mut self) {
        // SAFETY: as above; the thread was attached by this one.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0) };
    }
}
