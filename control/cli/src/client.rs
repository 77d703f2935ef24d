//! The client's side of the UAPI socket.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millrace_config::Exit;
use millrace_config::status::Status;
use millrace_config::uapi::{DeviceState, Request};
use zeroize::Zeroizing;

use crate::{Problem, lifecycle};

const SOCKETS: &str = "/run/wireguard";
pub(crate) const PID_FILES: &str = "/run/millrace";
const TIMEOUT: Duration = Duration::from_secs(10);

/// The interface that is meant: the named one, or the only one that runs.
pub(crate) fn choose(interface: Option<&str>) -> Result<String, Problem> {
    if let Some(name) = interface {
        return Ok(name.to_owned());
    }
    let mut names: Vec<String> = fs::read_dir(PID_FILES)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".pid")?.to_owned()))
        // A killed data plane leaves its file.
        .filter(|name| lifecycle::running(name).is_ok())
        .collect();
    names.sort();
    match names.as_slice() {
        [] => Err(Problem::new(
            Exit::NotRunning,
            "no data plane runs; start one with: millrace up /etc/millrace/millrace.toml",
        )),
        [only] => Ok(only.clone()),
        several => Err(Problem::new(
            Exit::Usage,
            format!("several data planes run, name one of: {}", several.join(", ")),
        )),
    }
}

/// What the data plane of `interface` says of itself.
pub(crate) fn status(interface: &str) -> Result<Status, Problem> {
    let bytes = ask(interface, b"get=1\n\n")?;
    let state = DeviceState::parse(&bytes).map_err(|error| {
        Problem::new(Exit::Error, format!("{interface} answered what is no status: {error}"))
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Status::new(interface, &state, now.as_secs()))
}

/// Sends a request and reads the whole answer. It may hold keys, so it is wiped.
fn ask(interface: &str, request: &[u8]) -> Result<Zeroizing<Vec<u8>>, Problem> {
    let path = socket_path(interface);
    let mut stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Problem::new(
            Exit::NotRunning,
            format!("no data plane runs for {interface}; start it with: millrace up FILE"),
        ),
        ErrorKind::PermissionDenied => Problem::new(
            Exit::Permission,
            format!("{} may be used by root only: run this as root", path.display()),
        ),
        _ => Problem::new(Exit::Error, format!("{}: {error}", path.display())),
    })?;
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            Problem::new(Exit::Timeout, format!("{interface} does not answer"))
        }
        _ => Problem::new(Exit::Error, format!("{}: {error}", path.display())),
    };
    stream.set_read_timeout(Some(TIMEOUT)).map_err(failed)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(failed)?;
    stream.write_all(request).map_err(failed)?;
    let mut answer = Zeroizing::new(Vec::new());
    let mut chunk = Zeroizing::new([0; 16 << 10]);
    loop {
        let taken = stream.read(&mut *chunk).map_err(failed)?;
        answer.extend_from_slice(&chunk[..taken]);
        if taken == 0 || Request::length(&answer).is_some() {
            return Ok(answer);
        }
    }
}

fn socket_path(interface: &str) -> PathBuf {
    Path::new(SOCKETS).join(format!("{interface}.sock"))
}
