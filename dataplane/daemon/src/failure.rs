//! Why a system call of the data plane failed, in the operator's words.

use std::io;

use millrace_config::Exit;
pub use millrace_host::failure::Failure;

/// A system call that failed while `doing`. Known errors get their own exit code and cure; they are
/// the data plane's, which [`Failure::from_io`] does not know.
pub fn of_io(doing: &str, error: &io::Error) -> Failure {
    let (exit, cure) = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            (Exit::Permission, "start as root, or give the unit the capabilities of operations.md")
        }
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
    Failure::new(exit, format!("{doing}: {error}"), cure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_errors_get_their_exit_code() {
        let exit = |errno| of_io("x", &io::Error::from_raw_os_error(errno)).exit;
        assert_eq!(exit(libc::EPERM), Exit::Permission);
        assert_eq!(exit(libc::ENOBUFS), Exit::Permission);
        assert_eq!(exit(libc::EADDRINUSE), Exit::Error);
        assert_eq!(exit(libc::EOPNOTSUPP), Exit::NotSupported);
    }
}
