//! The client's side of the control process's socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use millrace_config::Exit;
use millrace_config::paths::{self, Refusal, Request};
use serde_json::Value;

use crate::Problem;

/// A little more than the control process gives a ping.
const TIMEOUT: Duration = Duration::from_secs(7);

/// Asks the control process of `interface`, and returns its answer as it is.
pub(crate) fn ask(interface: &str, request: &Request) -> Result<Value, Problem> {
    let path = paths::socket(interface);
    let shown = path.display();
    let stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Problem::new(
            Exit::NotRunning,
            format!(
                "no control process runs for {interface}: it starts with `millrace up` where the \
                 file has a relay in [discovery], or as millrace-control --config FILE"
            ),
        ),
        ErrorKind::PermissionDenied => Problem::new(
            Exit::Permission,
            format!("{shown} may be used by root and the group millrace only: run this as root"),
        ),
        _ => Problem::new(Exit::Error, format!("{shown}: {error}")),
    })?;
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            Problem::new(Exit::Timeout, format!("the control process of {interface} is silent"))
        }
        _ => Problem::new(Exit::Error, format!("{shown}: {error}")),
    };
    stream.set_read_timeout(Some(TIMEOUT)).map_err(failed)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(failed)?;
    let mut line = serde_json::to_string(request)
        .map_err(|error| Problem::new(Exit::Error, format!("writing JSON: {error}")))?;
    line.push('\n');
    (&stream).write_all(line.as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).map_err(failed)?;
    let answer: Value = serde_json::from_str(&answer).map_err(|error| {
        Problem::new(Exit::Error, format!("{shown} answered what is no document: {error}"))
    })?;
    match serde_json::from_value::<Refusal>(answer.clone()) {
        Ok(refusal) => Err(Problem::new(Exit::NotConnected, refusal.error)),
        Err(_) => Ok(answer),
    }
}
