//! What is inside a tunnel and must never be seen outside: random, so that a search of a capture
//! finds it nowhere by chance.

use std::{fmt, fs::File, io::Read, net::Ipv6Addr};

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

/// A random /48 for a tunnel's inside (RFC 4193, section 3.2.2). One that is written down by hand is
/// full of zeros, as the counters of WireGuard's packets are.
#[derive(Clone, Copy, Debug)]
pub struct InnerPrefix([u16; 3]);

impl InnerPrefix {
    /// A new prefix from the kernel's generator.
    pub fn random() -> Result<Self> {
        loop {
            let [a, b, c, d, e] = random_bytes()?;
            let groups = [[0xfd, a], [b, c], [d, e]].map(u16::from_be_bytes);
            // Beside subnet 0 it would be zeros again.
            if !groups.contains(&0) {
                return Ok(Self(groups));
            }
        }
    }

    /// The address of `host` in `subnet`, a /64 of this prefix.
    pub fn address(self, subnet: u16, host: u16) -> Ipv6Addr {
        let Self([a, b, c]) = self;
        Ipv6Addr::new(a, b, c, subnet, 0, 0, 0, host)
    }
}

/// The three groups, without what follows: `{prefix}:1::2` is an address.
impl fmt::Display for InnerPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([a, b, c]) = self;
        write!(f, "{a:x}:{b:x}:{c:x}")
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
