//! The newest handshake timestamp that this device sent, kept over restarts.
//!
//! A peer accepts only timestamps newer than the last (WireGuard paper, section 5.1). After a
//! restart with a clock that stands earlier, every handshake would be refused; with the mark it
//! goes on from where it was. Written ahead, so that not every handshake waits for the disk.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use crate::failure::{self, Failure};

/// TAI64N: eight bytes of seconds, four of nanoseconds, big-endian.
pub type Timestamp = [u8; 12];

/// The file, or only memory where there is no place for one.
#[derive(Debug)]
pub struct TimestampFile {
    path: Option<PathBuf>,
    newest: Option<Timestamp>,
    /// The last write failed and the log says so already.
    complained: bool,
}

impl TimestampFile {
    /// Reads the mark. A file that is not ours is an error: overwriting it could lose something.
    pub fn open(path: Option<PathBuf>) -> Result<Self, Failure> {
        let newest = match path.as_deref().map(fs::read) {
            None => None,
            Some(Ok(bytes)) => Some(Timestamp::try_from(bytes.as_slice()).map_err(|_| {
                let shown = path.as_deref().map(|p| p.display().to_string()).unwrap_or_default();
                Failure::new(
                    millrace_config::Exit::Error,
                    format!("{shown} holds {} bytes, a timestamp has 12", bytes.len()),
                    "if it is a damaged timestamp file, remove it",
                )
            })?),
            Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Some(Err(error)) => {
                return Err(failure::of_io("reading the newest handshake timestamp", &error));
            }
        };
        Ok(Self { path, newest, complained: false })
    }

    pub fn newest(&self) -> Option<Timestamp> {
        self.newest
    }

    /// Keeps `timestamp`. A disk that is full or read-only is logged once and does not stop
    /// anything: the mark matters only after a restart with a wrong clock.
    pub fn store(&mut self, timestamp: Timestamp) {
        self.newest = Some(timestamp);
        match self.write(&timestamp) {
            Ok(()) => self.complained = false,
            Err(_) if self.complained => {}
            Err(error) => {
                self.complained = true;
                tracing::warn!(%error, "the newest handshake timestamp could not be kept on disk");
            }
        }
    }

    /// Replaces the file as a whole: a crash leaves the old or the new mark.
    fn write(&self, timestamp: &Timestamp) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(timestamp)?;
        // Before the name: else a power cut could leave an empty file under it.
        file.sync_data()?;
        fs::rename(&new, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_survives_and_a_strange_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("timestamp");
        let mut file = TimestampFile::open(Some(path.clone())).unwrap();
        assert_eq!(file.newest(), None);
        file.store([7; 12]);
        assert_eq!(TimestampFile::open(Some(path.clone())).unwrap().newest(), Some([7; 12]));
        fs::write(&path, b"precious").unwrap();
        TimestampFile::open(Some(path.clone())).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
