//! Keys as `wg genkey`, `wg pubkey` and `wg genpsk` make them.

use std::io::{IsTerminal, Read};

use millrace_config::{Exit, SecretKey};
use rand::TryRngCore;
use rand::rngs::OsRng;
use zeroize::Zeroizing;

use crate::Problem;

pub(crate) fn private_key() -> SecretKey {
    SecretKey::clamped(random())
}

pub(crate) fn preshared_key() -> SecretKey {
    SecretKey::new(random())
}

/// The public key of the private key on standard input.
pub(crate) fn public_key_of_stdin() -> Result<String, Problem> {
    let usage = "millrace pubkey < private.key";
    let input = std::io::stdin();
    if input.is_terminal() {
        let why = format!("a key typed here would stay on the screen; use: {usage}");
        return Err(Problem::new(Exit::Usage, why));
    }
    let mut text = Zeroizing::new(String::new());
    // A key is 44 characters; whatever is much longer is something else.
    input
        .take(4096)
        .read_to_string(&mut text)
        .map_err(|error| Problem::new(Exit::Error, format!("reading standard input: {error}")))?;
    let key = SecretKey::from_base64(text.trim()).map_err(|error| {
        Problem::new(
            Exit::Error,
            format!("standard input is no private key: {error}; use: {usage}"),
        )
    })?;
    Ok(key.public_key().to_base64())
}

fn random() -> Zeroizing<[u8; 32]> {
    let mut bytes = Zeroizing::new([0; 32]);
    // A system without randomness must not make keys.
    if let Err(error) = OsRng.try_fill_bytes(&mut *bytes) {
        eprintln!("millrace: the system gives no randomness: {error}");
        std::process::exit(Exit::Error.code().into());
    }
    bytes
}
