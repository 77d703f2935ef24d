//! The files that a configuration names: the relay's key, the list of admitted keys, certificates.

use std::collections::HashSet;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use millrace_config::Exit;
use millrace_config::key::{PublicKey as ConfigKey, SecretKey as ConfigSecret};
use millrace_path::derp::MeshKey;
use millrace_path::sealed::{PublicKey, SecretKey};
use rcgen::{CertificateParams, DnType, IsCa, KeyPair, PKCS_ED25519, SerialNumber};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use zeroize::Zeroizing;

use crate::limits;
use millrace_host::failure::Failure;

/// How the certificate that names the relay's key begins its common name.
const META_CERTIFICATE_NAME: &str = "derpkey";

/// Reads the relay's private key (base64, as `wg genkey` prints it), or writes a new one, readable
/// by its owner alone.
pub fn private_key(path: &Path) -> Result<SecretKey, Failure> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => create_key(path, file),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => read_key(path),
        Err(error) => Err(Failure::from_io(format!("creating {}", path.display()), &error)),
    }
}

fn create_key(path: &Path, mut file: File) -> Result<SecretKey, Failure> {
    let secret = ConfigSecret::clamped(Zeroizing::new(rand::random()));
    let line = Zeroizing::new(format!("{}\n", *secret.to_base64()));
    file.write_all(line.as_bytes()).and_then(|()| file.sync_all()).map_err(|error| {
        // Half a key would stop the next start.
        let _ = fs::remove_file(path);
        Failure::from_io(format!("writing {}", path.display()), &error)
    })?;
    tracing::info!("a new private key was written to {}", path.display());
    Ok(SecretKey::from_bytes(*secret.bytes()))
}

/// As [`private_key`], but a missing file stays missing: for `config check`.
pub fn read_key(path: &Path) -> Result<SecretKey, Failure> {
    let text = read_secret(path)?;
    let secret = ConfigSecret::from_base64(text.trim())
        .map_err(|error| Failure::of_file(path, error, "delete it and a new one is made"))?;
    Ok(SecretKey::from_bytes(*secret.bytes()))
}

/// Reads the key that all relays of a mesh share, in hex.
pub fn mesh_key(path: &Path) -> Result<MeshKey, Failure> {
    let text = read_secret(path)?;
    let text = text.trim();
    MeshKey::from_hex(text).ok_or_else(|| {
        let seen = format!("{} characters that are not 64 hexadecimal digits", text.len());
        Failure::of_file(path, seen, "write what `openssl rand -hex 32` prints, on every relay")
    })
}

/// Reads a file that nobody but its owner may.
pub fn read_secret(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let text = Zeroizing::new(read(path)?);
    let mode = fs::metadata(path).map_or(0, |data| data.permissions().mode());
    // systemd opens its credentials to us by an ACL, which looks like a right of the group; nobody
    // else can enter that directory.
    let credential = env::var_os("CREDENTIALS_DIRECTORY").is_some_and(|at| path.starts_with(at));
    if mode & 0o077 != 0 && !credential {
        let seen = format!("mode {:04o}: others can read the secret", mode & 0o7777);
        return Err(Failure::of_file(path, seen, "chmod 0600 it"));
    }
    Ok(text)
}

/// The certificates that others' must lead to: those of a PEM file, else the system's. `key` is
/// that of the configuration which names the file.
pub fn trusted(file: Option<&Path>, key: &str) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let cure = format!("install ca-certificates, or name a PEM file in {key}");
    let trusted = match file {
        Some(path) => CertificateDer::pem_slice_iter(read(path)?.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Failure::of_file(path, error, &cure))?,
        None => rustls_native_certs::load_native_certs().certs,
    };
    if trusted.is_empty() {
        return Err(Failure::new(Exit::ConfigInvalid, "no certificates that are trusted", cure));
    }
    Ok(trusted)
}

/// TLS towards other relays.
pub fn roots(file: Option<&Path>) -> Result<Arc<ClientConfig>, Failure> {
    const KEY: &str = "mesh.ca_file";
    let mut roots = RootCertStore::empty();
    let trusted = trusted(file, KEY)?;
    let count = trusted.len();
    let (_, bad) = roots.add_parsable_certificates(trusted);
    if bad > 0 && (file.is_some() || bad == count) {
        let seen = format!("{bad} of {count} trusted certificates cannot be read");
        return Err(Failure::new(Exit::ConfigInvalid, seen, format!("mend {KEY}")));
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::new(Exit::Error, format!("TLS: {error}"), "report it"))?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Reads a list of keys: one a line, base64 or `nodekey:` and hex; `#` begins a comment.
pub fn admitted(path: &Path) -> Result<HashSet<PublicKey>, Failure> {
    let text = read(path)?;
    let mut keys = HashSet::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let key = match line.strip_prefix("nodekey:") {
            Some(hex) => ConfigKey::from_hex(hex),
            None => ConfigKey::from_base64(line),
        };
        let key = key.map_err(|error| {
            let cure = "write a key as `wg pubkey` prints it, or nodekey:… in hex";
            Failure::of_file(path, format!("line {number}: {error}"), cure)
        })?;
        keys.insert(PublicKey(key.0));
        if keys.len() > limits::ADMITTED_MAX {
            let seen = format!("more than {} keys", limits::ADMITTED_MAX);
            return Err(Failure::of_file(path, seen, "admit everybody, or use several relays"));
        }
    }
    Ok(keys)
}

/// TLS with the chain and key of two PEM files, and a last certificate that names the relay's key so
/// that clients may start fast.
pub fn tls(chain: &Path, key: &Path, relay: PublicKey) -> Result<Arc<ServerConfig>, Failure> {
    const CURE: &str = "give PEM files as certbot writes them (fullchain.pem, privkey.pem)";
    let pem = Zeroizing::new(read(chain)?);
    let mut certificates: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| Failure::of_file(chain, error, CURE))?;
    if certificates.is_empty() {
        return Err(Failure::of_file(chain, "no certificate", CURE));
    }
    let pem = Zeroizing::new(read(key)?);
    let private = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| Failure::of_file(key, error, CURE))?;
    certificates.push(meta_certificate(relay).map_err(|error| {
        Failure::new(Exit::Error, format!("making the relay's own certificate: {error}"), CURE)
    })?);
    serve(certificates, private)
        .map_err(|error| Failure::of_file(chain, format!("{error} (with {})", key.display()), CURE))
}

/// TLS that nobody trusts, for as long as no certificate was issued.
pub fn tls_without_certificate() -> Result<Arc<ServerConfig>, Failure> {
    let failed = |error: String| {
        Failure::new(Exit::Error, format!("making a certificate: {error}"), "report it")
    };
    let made = rcgen::generate_simple_self_signed(vec!["not-yet.invalid".to_owned()])
        .map_err(|error| failed(error.to_string()))?;
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    serve(vec![made.cert.der().clone()], key).map_err(|error| failed(error.to_string()))
}

fn serve(
    certificates: Vec<CertificateDer<'static>>,
    private: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(certificates, private))?;
    // Connections live for days: tickets would only cost a write and memory.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// A self-signed certificate whose name is the relay's key and whose serial is DERP's version
/// (tailscale, derpserver: `initMetacert`).
fn meta_certificate(relay: PublicKey) -> Result<CertificateDer<'static>, rcgen::Error> {
    let valid = Duration::from_secs(limits::META_CERTIFICATE_DAYS as u64 * 24 * 3600);
    let now = SystemTime::now();
    let hex = ConfigKey(relay.0).to_hex();
    let mut parameters = CertificateParams::default();
    parameters.serial_number = Some(SerialNumber::from(u64::from(millrace_path::derp::VERSION)));
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let name = format!("{META_CERTIFICATE_NAME}{hex}");
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.not_before = (now - valid).into();
    parameters.not_after = (now + valid).into();
    parameters.is_ca = IsCa::ExplicitNoCa;
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    Ok(parameters.self_signed(&key)?.der().clone())
}

/// When any of these files last changed, to see that one did.
pub fn changed<'p>(paths: impl IntoIterator<Item = &'p Path>) -> Option<SystemTime> {
    paths.into_iter().filter_map(|path| fs::metadata(path).ok()?.modified().ok()).max()
}

/// Reads a text file of bounded size.
pub fn read(path: &Path) -> Result<String, Failure> {
    let failed = |error| Failure {
        exit: Exit::ConfigInvalid,
        ..Failure::from_io(format!("reading {}", path.display()), &error)
    };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(limits::FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_for_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("private.key");
        let first = private_key(&path).unwrap().public_key();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(private_key(&path).unwrap().public_key(), first);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let refused = private_key(&path).unwrap_err();
        assert!(refused.seen.contains("mode 0644"), "{refused}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "no key\n").unwrap();
        let refused = private_key(&path).unwrap_err();
        assert!(refused.seen.contains("6 characters") && !refused.seen.contains("no key"));
    }

    #[test]
    fn a_list_takes_both_spellings_and_names_the_bad_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        let key = ConfigKey([7; 32]);
        let text = format!("# ours\n{} # a\n\nnodekey:{}\n", key, ConfigKey([8; 32]).to_hex());
        fs::write(&path, text).unwrap();
        let keys = admitted(&path).unwrap();
        assert_eq!(keys, HashSet::from([PublicKey([7; 32]), PublicKey([8; 32])]));
        fs::write(&path, "# x\nnodekey:12\n").unwrap();
        assert!(admitted(&path).unwrap_err().seen.contains("line 2: 2 characters"));
    }
}
