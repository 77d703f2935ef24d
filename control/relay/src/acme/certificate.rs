//! For whom a certificate is, and until when.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::files;
use millrace_host::failure::Failure;

/// The first certificate of a PEM file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// DNS names in small letters, and addresses.
    pub names: BTreeSet<String>,
}

impl Certificate {
    pub fn read(path: &Path) -> Result<Self, Failure> {
        const CURE: &str = "delete it, or give a PEM file with a certificate";
        let pem = Zeroizing::new(files::read(path)?);
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| Failure::of_file(path, error, CURE))?;
        let (_, certificate) =
            X509Certificate::from_der(&der).map_err(|error| Failure::of_file(path, error, CURE))?;
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let time = |seconds: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
        };
        Ok(Self {
            not_before: time(certificate.validity().not_before.timestamp()),
            not_after: time(certificate.validity().not_after.timestamp()),
            names: names.filter_map(name).collect(),
        })
    }

    /// Whether it names these and no others.
    pub fn is_for(&self, names: &[String]) -> bool {
        names.iter().map(|name| name.to_ascii_lowercase()).collect::<BTreeSet<_>>() == self.names
    }

    /// When a third of its time is left.
    pub fn renewal(&self) -> SystemTime {
        let lifetime = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_after - lifetime / 3
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(|b| IpAddr::V4(Ipv4Addr::from(b)));
            let v6 = <[u8; 16]>::try_from(*bytes).map(|b| IpAddr::V6(Ipv6Addr::from(b)));
            v4.or(v6).ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_times_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("certificate.pem");
        let names = ["Relay.example.net", "192.0.2.1", "2001:db8::1"].map(str::to_owned);
        let mut parameters = rcgen::CertificateParams::new(names.to_vec()).unwrap();
        let time = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        parameters.not_before = time(1_800_000_000).into();
        parameters.not_after = time(1_800_000_900).into();
        let key = rcgen::KeyPair::generate().unwrap();
        std::fs::write(&path, parameters.self_signed(&key).unwrap().pem()).unwrap();
        let certificate = Certificate::read(&path).unwrap();
        assert!(certificate.is_for(&names));
        assert!(!certificate.is_for(&names[1..]));
        assert_eq!(certificate.renewal(), time(1_800_000_600));
        std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n").unwrap();
        Certificate::read(&path).unwrap_err();
    }
}
