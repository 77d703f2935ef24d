//! Why the daemon cannot start or go on: what was seen, what to do, and the exit code of it.

use std::io;

use millrace_config::Exit;

/// One clear error that names its cure.
#[derive(Debug, thiserror::Error)]
#[error("{seen}; {cure}")]
pub struct Failure {
    pub exit: Exit,
    pub seen: String,
    pub cure: String,
}

impl Failure {
    pub fn new(exit: Exit, seen: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { exit, seen: seen.into(), cure: cure.into() }
    }

    /// A system call that failed while `doing`. Known errors get their own exit code and cure.
    pub fn from_io(doing: &str, error: &io::Error) -> Self {
        let (exit, cure) = match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => (
                Exit::Permission,
                "start as root, or give the unit the capabilities of operations.md",
            ),
            Some(libc::EADDRINUSE) => (
                Exit::Error,
                "`ss -ulpn` shows who has the port: stop it or choose another listen_port",
            ),
            Some(libc::ENODEV | libc::ENXIO) => {
                (Exit::NotSupported, "`ip link` lists the devices that exist")
            }
            Some(libc::ENOBUFS | libc::ENOMEM) => {
                (Exit::Permission, "raise LimitMEMLOCK (`ulimit -l`) or give CAP_IPC_LOCK")
            }
            Some(libc::EBUSY) => {
                (Exit::Error, "somebody else holds it: stop that program, or name another device")
            }
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPROTONOSUPPORT) => {
                (Exit::NotSupported, "this kernel lacks it: choose another back-end in [dataplane]")
            }
            _ => (Exit::Error, "see operations.md, \"when it does not start\""),
        };
        Self::new(exit, format!("{doing}: {error}"), cure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_errors_get_their_exit_code() {
        let exit = |errno| Failure::from_io("x", &io::Error::from_raw_os_error(errno)).exit;
        assert_eq!(exit(libc::EPERM), Exit::Permission);
        assert_eq!(exit(libc::ENOBUFS), Exit::Permission);
        assert_eq!(exit(libc::EADDRINUSE), Exit::Error);
        assert_eq!(exit(libc::EOPNOTSUPP), Exit::NotSupported);
    }
}
