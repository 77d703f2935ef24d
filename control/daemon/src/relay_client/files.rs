//! The files that a relay's configuration names: the proxy's credentials, certificates.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::failure::RelayFailure;
use crate::limits;

/// The one line `user:password` of a file.
pub(super) fn credentials(path: &Path) -> Result<Zeroizing<String>, RelayFailure> {
    let text = read(path, limits::CREDENTIALS_FILE_MAX)?;
    let line = str::from_utf8(&text).unwrap_or_default().trim_end_matches(['\r', '\n']);
    if !line.contains(':') || line.contains(char::is_control) {
        return Err(RelayFailure::file(path, "it is not one line user:password"));
    }
    Ok(Zeroizing::new(line.to_owned()))
}

/// The certificates of a PEM file; there is at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, RelayFailure> {
    let text = read(path, limits::CERTIFICATE_FILE_MAX)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(RelayFailure::file(path, "there is no certificate in it (PEM is expected)")),
        Err(error) => Err(RelayFailure::file(path, error)),
    }
}

fn read(path: &Path, len_max: u64) -> Result<Zeroizing<Vec<u8>>, RelayFailure> {
    // Never grown, so that no copy of a secret stays behind.
    let mut text = Zeroizing::new(Vec::new());
    let file = File::open(path).map_err(|error| RelayFailure::file(path, error))?;
    let len = file.metadata().map_or(len_max, |data| data.len().min(len_max));
    text.reserve_exact(len as usize + 2);
    let read = file.take(len_max + 1).read_to_end(&mut text);
    read.map_err(|error| RelayFailure::file(path, error))?;
    if text.len() as u64 > len_max {
        return Err(RelayFailure::file(path, format!("it is longer than {len_max} bytes")));
    }
    Ok(text)
}
