//! The UAPI socket /run/wireguard/NAME.sock: what `wg` and `millrace status` talk to.
//!
//! One thread an open connection, at most `CLIENTS_MAX`; the device is asked through the slow
//! thread's queue, so a slow client holds up nobody.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use millrace_config::Exit;
use millrace_config::limits::UAPI_REQUEST_BYTES_MAX;
use millrace_config::uapi::{Errno, Request, errno_text};
use zeroize::Zeroizing;

use crate::control::ControlHandle;
use crate::failure::{self, Failure};

const DIRECTORY: &str = "/run/wireguard";
const CLIENTS_MAX: usize = 16;
/// A client that neither sends nor takes anything for this long is left.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// The socket's file; removed when dropped.
#[derive(Debug)]
pub struct UapiSocket {
    path: PathBuf,
}

impl UapiSocket {
    /// Listens, and serves on threads of its own.
    pub fn start(interface: &str, control: ControlHandle) -> Result<Self, Failure> {
        let path = Path::new(DIRECTORY).join(format!("{interface}.sock"));
        let failed = |e: io::Error| failure::of_io(&format!("listening on {}", path.display()), &e);
        fs::create_dir_all(DIRECTORY).map_err(failed)?;
        if UnixStream::connect(&path).is_ok() {
            return Err(Failure::new(
                Exit::Error,
                format!("another program answers on {}", path.display()),
                format!("an interface {interface} runs already: `millrace down {interface}`"),
            ));
        }
        let listener = bind(interface, &path).map_err(failed)?;
        thread::Builder::new()
            .name("uapi".into())
            .spawn(move || accept(&listener, &control))
            .map_err(failed)?;
        Ok(Self { path })
    }
}

impl Drop for UapiSocket {
    fn drop(&mut self) {
        // If somebody removed it already, there is nothing to do.
        let _ = fs::remove_file(&self.path);
    }
}

/// A socket for root alone under `path`. It is made in a directory that only root may enter and
/// moved when its mode is right, so that at no moment somebody else can connect. What a killed
/// process left under `path` is replaced.
fn bind(interface: &str, path: &Path) -> io::Result<UnixListener> {
    let directory = Path::new(DIRECTORY).join(format!(".{interface}.new"));
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(&directory)?;
    let new = directory.join("socket");
    let bound = UnixListener::bind(&new).and_then(|listener| {
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
        fs::rename(&new, path)?;
        Ok(listener)
    });
    // Empty, or of no use: the next start would remove it, too.
    let _ = fs::remove_dir_all(&directory);
    bound
}

fn accept(listener: &UnixListener, control: &ControlHandle) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors, most likely: they come back.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
            clients.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (control, count) = (control.clone(), Arc::clone(&clients));
        let served = thread::Builder::new().name("uapi-client".into()).spawn(move || {
            // A client that goes away in the middle is its own affair.
            let _ = serve(stream, &control);
            count.fetch_sub(1, Ordering::Relaxed);
        });
        if served.is_err() {
            clients.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Answers requests until the client closes. `wg` first connects and closes without a word.
fn serve(mut stream: UnixStream, control: &ControlHandle) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut pending = Zeroizing::new(Vec::new());
    let mut chunk = Zeroizing::new([0; 16 << 10]);
    loop {
        let taken = stream.read(&mut *chunk)?;
        pending.extend_from_slice(&chunk[..taken]);
        // `wg set` ends its request by closing; `wg show` by a blank line.
        while let Some(len) = Request::length(&pending) {
            let answer = answer(&pending[..len], control);
            stream.write_all(answer.as_bytes())?;
            pending.drain(..len);
        }
        if taken == 0 || pending.len() > UAPI_REQUEST_BYTES_MAX {
            if !pending.iter().all(u8::is_ascii_whitespace) {
                stream.write_all(errno_text(Errno::Invalid).as_bytes())?;
            }
            return Ok(());
        }
    }
}

fn answer(request: &[u8], control: &ControlHandle) -> Zeroizing<String> {
    let result = match Request::parse(request) {
        Ok(Request::Get) => match control.get() {
            Ok(state) => return state.to_text(),
            Err(refusal) => Err(refusal),
        },
        Ok(Request::Set(change)) => control.set(change),
        Err(error) => {
            tracing::warn!(%error, "a UAPI request was refused");
            return Zeroizing::new(errno_text(Errno::Invalid));
        }
    };
    Zeroizing::new(errno_text(match result {
        Ok(()) => Errno::Ok,
        Err(refusal) => {
            tracing::warn!(%refusal, "a change was refused");
            refusal.errno
        }
    }))
}
