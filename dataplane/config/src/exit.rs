//! Exit codes of every millrace program.

/// What an exit code promises to scripts. Documented by `millrace exit-codes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Error = 1,
    Usage = 2,
    Degraded = 3,
    NotConnected = 4,
    NotRunning = 5,
    Permission = 6,
    ConfigInvalid = 7,
    NotSupported = 8,
    Timeout = 124,
}

impl Exit {
    /// Every code with its meaning, in numeric order.
    pub const ALL: [(Self, &'static str); 10] = [
        (Self::Ok, "done, and everything is as asked"),
        (Self::Error, "it failed; standard error says why"),
        (Self::Usage, "the command line is not understood"),
        (Self::Degraded, "it works, but not as wished: a warning or a fallback is in effect"),
        (Self::NotConnected, "no peer is reachable, or nothing is connected yet"),
        (Self::NotRunning, "the data plane is not running"),
        (Self::Permission, "a privilege is missing"),
        (Self::ConfigInvalid, "the configuration is not valid"),
        (Self::NotSupported, "this host cannot do it"),
        (Self::Timeout, "it took too long"),
    ];

    pub fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_documented_numbers() {
        let codes: Vec<u8> = Exit::ALL.iter().map(|(exit, _)| exit.code()).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 8, 124]);
    }
}
