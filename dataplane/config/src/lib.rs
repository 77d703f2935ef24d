//! The operator's surface as pure code: configuration files, the UAPI text that `wg` speaks, the
//! status document and the exit codes. No file is opened here and no clock is read, so that the
//! daemon, the CLI, property tests and fuzzers all run the same code.
#![forbid(unsafe_code)]

mod claims;
pub mod config;
pub mod discovery;
pub mod exit;
pub mod fingerprint;
pub mod key;
pub mod limits;
pub mod paths;
pub mod problem;
pub mod reference;
pub mod status;
pub mod toml_file;
pub mod uapi;
pub mod wg_quick;

pub use config::Config;
pub use exit::Exit;
pub use fingerprint::Fingerprint;
pub use key::{KeyError, PublicKey, SecretKey};
pub use problem::{Problem, Problems};

/// Fuzz target: any text as TOML and as wg0.conf. What parses must print and parse again.
pub fn fuzz_config(text: &str) {
    if let Ok(config) = Config::from_toml(text) {
        let printed = config.to_toml();
        let again = Config::from_toml(&printed);
        assert_eq!(again.as_ref().ok(), Some(&config), "printed: {printed}");
    }
    drop(Config::from_wg_quick(text, "wg0"));
}

/// Fuzz target: any bytes as a UAPI request and as an answer to `get=1`.
pub fn fuzz_uapi(bytes: &[u8]) {
    if let Ok(uapi::Request::Set(change)) = uapi::Request::parse(bytes) {
        let printed = change.to_text();
        match uapi::Request::parse(printed.as_bytes()) {
            Ok(uapi::Request::Set(again)) => assert_eq!(again, change),
            other => panic!("printed request does not parse: {other:?}"),
        }
    }
    drop(uapi::DeviceState::parse(bytes));
}
