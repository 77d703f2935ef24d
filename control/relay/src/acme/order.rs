//! One certificate, from the account to the PEM file.

use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::thread;
use std::time::Instant;

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Error, Identifier, NewAccount,
    NewOrder, Order, OrderStatus,
};
use millrace_config::Exit;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::http::{Blocking, wait};
use super::{Challenges, replace};
use crate::files;
use crate::limits;
use crate::settings::AcmeSettings;
use millrace_host::failure::Failure;

/// The file of our account. Its key must be lost to nobody: with it one may revoke certificates.
#[derive(Serialize, Deserialize)]
struct Stored {
    /// Another server knows nothing of the account.
    directory: String,
    credentials: AccountCredentials,
}

/// Key and chain for the configured names.
pub fn certificate(
    settings: &AcmeSettings,
    challenges: &Challenges,
) -> Result<Zeroizing<String>, Failure> {
    super::directory(&settings.state_directory)?;
    let account = account(settings)?;
    let named = |name: &String| match name.parse() {
        Ok(address) => Identifier::Ip(address),
        Err(_) => Identifier::Dns(name.clone()),
    };
    let names: Vec<_> = settings.names.iter().map(named).collect();
    let mut order = wait(account.new_order(&NewOrder::new(&names)))
        .map_err(|error| failure(settings, "asking for a certificate", &error))?;
    prove(settings, &mut order, challenges)?;
    let key = KeyPair::generate().map_err(|error| ours(&error))?;
    let mut parameters =
        CertificateParams::new(settings.names.clone()).map_err(|error| ours(&error))?;
    parameters.distinguished_name = DistinguishedName::new();
    let request = parameters.serialize_request(&key).map_err(|error| ours(&error))?;
    wait(order.finalize_csr(request.der()))
        .map_err(|error| failure(settings, "sending the certificate's key", &error))?;
    let start = Instant::now();
    let chain = loop {
        let doing = "fetching the certificate";
        match wait(order.certificate()).map_err(|error| failure(settings, doing, &error))? {
            Some(chain) => break chain,
            None if start.elapsed() >= limits::ACME_ORDER_LIMIT => return Err(late(settings)),
            None => thread::sleep(limits::ACME_POLL),
        }
    };
    let mut pem = Zeroizing::new(key.serialize_pem());
    pem.push_str(&chain);
    Ok(pem)
}

/// Our account at the server: the one of the file, or a new one that is kept there.
fn account(settings: &AcmeSettings) -> Result<Account, Failure> {
    let http = Box::new(Blocking::new(settings.ca_file.as_deref())?);
    let builder = Account::builder_with_http(http);
    let path = settings.state_directory.join("account.json");
    if let Some(stored) = stored(&path)?.filter(|s| s.directory == settings.directory) {
        return wait(builder.from_credentials(stored.credentials))
            .map_err(|error| failure(settings, "reaching the server", &error));
    }
    let contact: Vec<String> =
        settings.contact.iter().map(|mail| format!("mailto:{mail}")).collect();
    let contact: Vec<&str> = contact.iter().map(String::as_str).collect();
    let new = NewAccount {
        contact: &contact,
        terms_of_service_agreed: true,
        only_return_existing: false,
    };
    let (account, credentials) = wait(builder.create(&new, settings.directory.clone(), None))
        .map_err(|error| failure(settings, "making an account", &error))?;
    let stored = Stored { directory: settings.directory.clone(), credentials };
    let text = serde_json::to_string(&stored).map_err(|error| ours(&error))?;
    replace(&path, Zeroizing::new(text).as_bytes(), |_| Ok(()))?;
    tracing::info!("a new account at {}, kept in {}", settings.directory, path.display());
    Ok(account)
}

fn stored(path: &Path) -> Result<Option<Stored>, Failure> {
    match fs::exists(path) {
        Ok(true) => {}
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(Failure::from_io(format!("reading {}", path.display()), &error));
        }
        _ => return Ok(None),
    }
    let text = files::read_secret(path)?;
    let cure = "restore it, or delete it and a new account is made";
    serde_json::from_str(&text).map(Some).map_err(|error| {
        Failure::of_file(path, format!("not an account (line {})", error.line()), cure)
    })
}

/// Shows the server for each name that it is ours.
fn prove(
    settings: &AcmeSettings,
    order: &mut Order,
    challenges: &Challenges,
) -> Result<(), Failure> {
    let doing = "answering the server's challenge";
    let failed = |error: Error| failure(settings, doing, &error);
    let mut open = order.authorizations();
    while let Some(authorization) = wait(open.next()) {
        let mut authorization = authorization.map_err(failed)?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let mut challenge = authorization.challenge(ChallengeType::Http01).ok_or_else(|| {
            let seen = format!("{} offers no HTTP-01 challenge", settings.directory);
            Failure::new(Exit::Error, seen, "names with * need DNS-01, which the relay has not")
        })?;
        let answer = challenge.key_authorization().as_str().to_owned();
        challenges.set(challenge.token.clone(), answer);
        wait(challenge.set_ready()).map_err(failed)?;
    }
    let start = Instant::now();
    loop {
        match wait(order.refresh()).map_err(failed)?.status {
            OrderStatus::Ready | OrderStatus::Valid => return Ok(()),
            OrderStatus::Invalid => return Err(refused(settings, order)),
            _ if start.elapsed() >= limits::ACME_ORDER_LIMIT => return Err(late(settings)),
            _ => thread::sleep(limits::ACME_POLL),
        }
    }
}

/// The server's own words about each name that it did not believe us.
fn refused(settings: &AcmeSettings, order: &mut Order) -> Failure {
    let mut seen = format!("{} did not find us by HTTP-01:", settings.directory);
    let mut authorizations = order.authorizations();
    while let Some(authorization) = wait(authorizations.next()) {
        let asked = authorization.and_then(|mut authorization| {
            let state = wait(authorization.refresh())?;
            let problems = state.challenges.iter().filter_map(|c| c.error.as_ref());
            Ok(problems.map(ToString::to_string).collect::<Vec<_>>().join(", "))
        });
        let _ = match asked {
            Ok(problems) => write!(seen, " {problems}"),
            Err(error) => write!(seen, " (and does not say why: {error})"),
        };
    }
    let cure = "each of acme.names must lead to this host, and its port 80 to http.listen";
    Failure::new(Exit::Error, seen, cure)
}

fn late(settings: &AcmeSettings) -> Failure {
    let limit = limits::ACME_ORDER_LIMIT.as_secs();
    let seen = format!("{} has not decided within {limit} s", settings.directory);
    Failure::new(Exit::Error, seen, "nothing, it will be tried again")
}

fn failure(settings: &AcmeSettings, doing: &str, error: &Error) -> Failure {
    let seen = format!("{doing} ({}): {error}", settings.directory);
    Failure::new(Exit::Error, seen, "check acme.directory, the host's resolver and its clock")
}

fn ours(error: &dyn std::error::Error) -> Failure {
    Failure::new(Exit::Error, format!("preparing a certificate: {error}"), "report it")
}
