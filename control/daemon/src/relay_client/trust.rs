//! Which certificates a relay may show, and what its chain says of its DERP key.

use std::sync::Arc;

use millrace_config::Fingerprint;
use millrace_config::discovery::Authorities;
use millrace_path::derp::VERSION;
use millrace_path::sealed::PublicKey;
use ring::digest::{SHA256, digest};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use super::config::Trust;
use super::failure::RelayFailure;
use super::files;

/// How the certificate that names a relay's key begins its common name.
const RELAY_KEY_NAME: &[u8] = b"derpkey";
/// A UTF8String or PrintableString of that and 64 hex digits, in DER.
const NAME_LEN: usize = RELAY_KEY_NAME.len() + 64;
const NAME_TAGS: [u8; 2] = [0x0c, 0x13];

const _: () = assert!(VERSION == 2);

/// TLS as `trust` wants it. Reads the files anew: they may have been renewed.
pub fn client_config(trust: &Trust) -> Result<Arc<ClientConfig>, RelayFailure> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let rule = match trust {
        Trust::Pinned(fingerprint) => Rule::Pinned(*fingerprint),
        Trust::Authorities(whose) => Rule::Authorities(verifier(roots(whose)?, &provider)?),
    };
    let algorithms = provider.signature_verification_algorithms;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| RelayFailure::Tls(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { rule, algorithms }))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

fn roots(whose: &Authorities) -> Result<RootCertStore, RelayFailure> {
    let (system, file) = match whose {
        Authorities::System => (true, None),
        Authorities::File(file) => (false, Some(file)),
        Authorities::Both(file) => (true, Some(file)),
    };
    let mut roots = RootCertStore::empty();
    if system {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    if let Some(path) = file {
        for certificate in files::certificates(path)? {
            roots.add(certificate).map_err(|error| RelayFailure::file(path, error))?;
        }
    }
    Ok(roots)
}

fn verifier(
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, RelayFailure> {
    if roots.is_empty() {
        let cure = "this system has no certificate authorities: install ca-certificates, or name \
                    the file of one (relay_ca_file)";
        return Err(RelayFailure::Certificate(cure.into()));
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    verifier.build().map_err(|error| RelayFailure::Certificate(error.to_string()))
}

/// The relay's key as its chain names it: a self-signed certificate behind the others.
pub fn relay_key(chain: &[CertificateDer<'_>]) -> Option<PublicKey> {
    chain.iter().skip(1).find_map(|certificate| named_key(certificate))
}

fn named_key(certificate: &[u8]) -> Option<PublicKey> {
    let name = certificate.windows(2 + NAME_LEN).find(|window| {
        NAME_TAGS.contains(&window[0])
            && usize::from(window[1]) == NAME_LEN
            && window[2..].starts_with(RELAY_KEY_NAME)
    })?;
    let hex = str::from_utf8(&name[2 + RELAY_KEY_NAME.len()..]).ok()?;
    millrace_config::PublicKey::from_hex(hex).ok().map(|key| PublicKey(key.0))
}

#[derive(Debug)]
struct Verifier {
    rule: Rule,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Debug)]
enum Rule {
    Authorities(Arc<WebPkiServerVerifier>),
    Pinned(Fingerprint),
}

/// The relay showed another certificate than the pinned one.
#[derive(Debug, thiserror::Error)]
#[error(
    "the certificate is another than the pinned one: expected {expected}, \
     seen {certificate} (the certificate) with {key} (its public key); if the relay's operator \
     says that this is its new one, write either into `certificate` of this relay and reload, \
     else somebody is between"
)]
struct Mismatch {
    expected: Fingerprint,
    certificate: Fingerprint,
    key: Fingerprint,
}

/// No authority that we trust signed it.
#[derive(Debug, thiserror::Error)]
#[error(
    "the certificate of {host} is signed by nobody whom we trust: give the file of its authority \
     (relay_ca_file), or pin its public key, if the relay's operator says that it is {key}"
)]
struct Unknown {
    host: String,
    key: Fingerprint,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.rule {
            Rule::Authorities(verifier) => {
                // The one that names the relay's key signs nobody.
                let signers: Vec<_> =
                    intermediates.iter().filter(|one| named_key(one).is_none()).cloned().collect();
                let host = server_name.to_str();
                verifier
                    .verify_server_cert(end_entity, &signers, server_name, ocsp_response, now)
                    .map_err(|error| with_its_key(error, &host, end_entity))
            }
            Rule::Pinned(expected) => pinned(*expected, end_entity),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn pinned(
    expected: Fingerprint,
    certificate: &CertificateDer<'_>,
) -> Result<ServerCertVerified, Error> {
    let key = public_key(certificate)?;
    let certificate = sha256(certificate);
    if expected == key || expected == certificate {
        return Ok(ServerCertVerified::assertion());
    }
    Err(refusal(Mismatch { expected, certificate, key }))
}

/// Where the authority is not known, or is another of the same name: what could be pinned instead.
fn with_its_key(error: Error, host: &str, certificate: &CertificateDer<'_>) -> Error {
    use CertificateError::{BadSignature, UnknownIssuer};
    match (&error, public_key(certificate)) {
        (Error::InvalidCertificate(UnknownIssuer | BadSignature), Ok(key)) => {
            refusal(Unknown { host: host.to_owned(), key })
        }
        _ => error,
    }
}

fn refusal(why: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

fn public_key(certificate: &CertificateDer<'_>) -> Result<Fingerprint, Error> {
    let bad = |_| Error::InvalidCertificate(CertificateError::BadEncoding);
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(bad)?;
    Ok(sha256(&parsed.subject_public_key_info()))
}

fn sha256(bytes: &[u8]) -> Fingerprint {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    Fingerprint(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relays_key_is_found_in_its_certificate_and_nowhere_else() {
        let hex = "0123456789abcdef".repeat(4);
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let name = format!("derpkey{hex}");
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let meta = params.self_signed(&key).unwrap().der().clone();
        let leaf = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap().cert.der().clone();
        let found = relay_key(&[leaf.clone(), meta.clone()]).unwrap();
        assert_eq!(millrace_config::PublicKey(found.0).to_hex(), hex);
        assert_eq!(relay_key(&[meta.clone(), leaf.clone()]), None);
        assert_eq!(relay_key(&[]), None);
        for cut in 0..meta.len() {
            named_key(&meta[..cut]);
        }
    }
}
