//! Certificates that the relay gets by itself (ACME, RFC 8555): it proves by an answer on port 80
//! that a name is its own (HTTP-01), and renews when a third of the time is left.
//!
//! One thread does all of it, waiting for each answer. A certificate that could not be had changes
//! nothing: the old one goes on until it is replaced. [`order`] is one certificate from end to end,
//! [`http`] its way to the server, [`certificate`] what a file holds.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::files;
use crate::limits;
use crate::metrics::Count;
use crate::settings::AcmeSettings;
use crate::shared::Shared;
use certificate::Certificate;
use millrace_host::failure::Failure;

pub mod certificate;
pub mod http;
pub mod order;

/// What the server asks for under `/.well-known/acme-challenge/`, while an order is open.
#[derive(Debug, Default)]
pub struct Challenges(RwLock<HashMap<String, String>>);

impl Challenges {
    /// The answer to a token.
    pub fn answer(&self, token: &str) -> Option<String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(token).cloned()
    }

    fn set(&self, token: String, answer: String) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(token, answer);
    }

    fn clear(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Keeps a certificate for the configured names.
#[derive(Debug)]
pub struct Acme {
    pub settings: AcmeSettings,
    pub shared: Arc<Shared>,
}

impl Acme {
    /// Waits until the certificate has to be renewed, renews it, and so on until the relay stops.
    pub fn run(self) {
        let mut retry = limits::ACME_RETRY_FIRST;
        loop {
            let wait = self.due().duration_since(SystemTime::now()).unwrap_or_default();
            if !self.sleep(wait) {
                return;
            }
            if !self.due().duration_since(SystemTime::now()).unwrap_or_default().is_zero() {
                continue;
            }
            match self.renew() {
                Ok(()) => {
                    self.shared.acme.add(Count::AcmeIssued, 1);
                    self.shared.renewed.store(true, Ordering::Release);
                    tracing::info!("a new certificate for {}", self.settings.names.join(", "));
                    retry = limits::ACME_RETRY_FIRST;
                }
                Err(failure) => {
                    self.shared.acme.add(Count::AcmeFailed, 1);
                    tracing::error!("no new certificate, trying again in {retry:?}: {failure}");
                    if !self.sleep(retry) {
                        return;
                    }
                    retry = (retry * 4).min(limits::ACME_RETRY_LAST);
                }
            }
        }
    }

    /// When a third of the certificate's time is left; at once when there is none that fits.
    fn due(&self) -> SystemTime {
        match Certificate::read(&self.settings.certificate_file()) {
            Ok(certificate) if certificate.is_for(&self.settings.names) => certificate.renewal(),
            _ => SystemTime::UNIX_EPOCH,
        }
    }

    fn renew(&self) -> Result<(), Failure> {
        let pem = order::certificate(&self.settings, &self.shared.challenges);
        self.shared.challenges.clear();
        let path = self.settings.certificate_file();
        replace(&path, pem?.as_bytes(), |new| {
            // It may be useless, and then the old one goes on.
            files::tls(new, new, self.shared.public).map(drop)
        })
    }

    /// False when the relay stops meanwhile.
    fn sleep(&self, time: Duration) -> bool {
        let end = SystemTime::now() + time.min(limits::ACME_LOOK);
        while SystemTime::now() < end {
            if self.shared.stopped() {
                return false;
            }
            let left = end.duration_since(SystemTime::now()).unwrap_or_default();
            thread::sleep(left.min(Duration::from_millis(200)));
        }
        !self.shared.stopped()
    }
}

/// Makes the directory of account and certificate, for its owner alone.
pub fn directory(path: &Path) -> Result<(), Failure> {
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(Failure::from_io(format!("making {}", path.display()), &error))
        }
        _ => Ok(()),
    }
}

/// Writes a secret file whole or not at all. `check` looks at the new one before it counts.
fn replace(
    path: &Path,
    content: &[u8],
    check: impl FnOnce(&Path) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let new = PathBuf::from(format!("{}.new", path.display()));
    let write = || {
        // One that a crash left may have another mode.
        let _ = fs::remove_file(&new);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(content)?;
        file.sync_all()
    };
    let written =
        write().map_err(|error| Failure::from_io(format!("writing {}", new.display()), &error));
    let moved = written.and_then(|()| check(&new)).and_then(|()| {
        fs::rename(&new, path)
            .map_err(|error| Failure::from_io(format!("replacing {}", path.display()), &error))
    });
    if moved.is_err() {
        let _ = fs::remove_file(&new);
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("certificate.pem");
        replace(&path, b"one", |_| Ok(())).unwrap();
        let refuse = |_: &Path| Err(Failure::new(millrace_config::Exit::Error, "bad", "none"));
        replace(&path, b"two", refuse).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        replace(&directory.path().join("no/where"), b"", |_| Ok(())).unwrap_err();
    }
}
