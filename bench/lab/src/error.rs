//! What can go wrong in a lab, said with the command and its output.

use std::{io, time::Duration};

/// The result of every lab operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a lab operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A command ended unsuccessfully.
    #[error("`{command}` in {place}: {status}\n{output}")]
    Command {
        /// The command line.
        command: String,
        /// The namespace's name.
        place: String,
        /// How it ended.
        status: String,
        /// What it wrote, standard error last.
        output: String,
    },
    /// A condition did not come true in time.
    #[error("waited {waited:?} in vain for {what}")]
    Timeout {
        /// The condition.
        what: String,
        /// How long it was given.
        waited: Duration,
    },
    /// The user pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Something was not as it has to be.
    #[error("{0}")]
    Unexpected(String),
}

impl Error {
    /// Names the operation that the kernel refused.
    pub fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}
