//! Why a daemon cannot start or reload: what was seen, what to do, and the exit code of it.

use std::io;
use std::path::Path;

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

    /// Something about a file that the configuration names.
    pub fn of_file(path: &Path, seen: impl std::fmt::Display, cure: &str) -> Self {
        Self::new(Exit::ConfigInvalid, format!("{}: {seen}", path.display()), cure)
    }

    /// A system call that failed while `doing`.
    pub fn from_io(doing: impl std::fmt::Display, error: &io::Error) -> Self {
        let (exit, cure) = match error.kind() {
            io::ErrorKind::PermissionDenied => (
                Exit::Permission,
                "run as a user that may do it; ports below 1024 need CAP_NET_BIND_SERVICE",
            ),
            io::ErrorKind::AddrInUse => {
                (Exit::Error, "`ss -tulpn` shows who has the port: stop it or choose another")
            }
            io::ErrorKind::AddrNotAvailable => {
                (Exit::Error, "`ip address` lists the addresses of this host")
            }
            io::ErrorKind::NotFound => (Exit::Error, "check the path"),
            _ => (Exit::Error, "see the system's log"),
        };
        Self::new(exit, format!("{doing}: {error}"), cure)
    }
}
