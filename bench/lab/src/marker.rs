//! Random 64-bit patterns that are sent inside a tunnel and must never be seen outside.

use std::{fs::File, io::Read};

use crate::{Error, Result};

/// A pattern that chance produces once in 2⁶⁴ positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marker(pub [u8; 8]);

impl Marker {
    /// A new pattern from the kernel's generator.
    pub fn random() -> Result<Self> {
        random_bytes().map(Self)
    }

    /// `len` bytes of the pattern over and over: a cut anywhere still shows it.
    pub fn fill(&self, len: usize) -> Vec<u8> {
        self.0.iter().copied().cycle().take(len).collect()
    }

    /// As `ping -p` wants it.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// `N` bytes from the kernel's generator.
pub fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(Error::system("read /dev/urandom"))?;
    Ok(bytes)
}
