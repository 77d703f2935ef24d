//! Why a relay cannot be used right now: one sentence that says what was seen and what to do.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use rustls::{CertificateError, Error as TlsError, InvalidMessage};

use super::http::Answer;
use super::liveness::Dead;
use super::protocol::ProtocolError;

/// Each is told once, then the relay is tried again.
#[derive(Debug, thiserror::Error)]
pub enum RelayFailure {
    #[error("{0}")]
    File(String),
    #[error("the name {host} could not be looked up: {error}; see /etc/resolv.conf")]
    LookUp { host: String, error: String },
    #[error("no name server answered within {limit:?} for {host}; see /etc/resolv.conf")]
    LookUpLimit { host: String, limit: Duration },
    #[error("could not connect to {address}: {error}")]
    Connect { address: SocketAddr, error: io::Error },
    #[error("no answer from {what} within {limit:?}")]
    ConnectLimit { what: String, limit: Duration },
    #[error("a proxy is spoken to in plain HTTP: give its URL as http://")]
    ProxyScheme,
    #[error("the environment variable {0} is no URL of a proxy, as http://proxy.example.net:3128")]
    ProxyVariable(String),
    #[error("{0}")]
    ProxyRefused(String),
    #[error("the proxy does not speak HTTP: {0}")]
    ProxyAnswer(super::http::AnswerError),
    #[error("{0}")]
    Certificate(String),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("the host {0} of the relay's URL cannot stand in a certificate")]
    Host(String),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("the data plane gave no box key within {0:?}")]
    BoxKeyLimit(Duration),
    #[error(transparent)]
    Dead(#[from] Dead),
    #[error("it sends on and on while it should wait for our login")]
    TooMuch,
    #[error("it closed the connection{0}")]
    Closed(&'static str),
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    #[error("the network has changed")]
    Network,
    #[error("out of the operating system's means: {0}")]
    System(io::Error),
}

impl RelayFailure {
    pub(crate) fn file(path: &Path, error: impl std::fmt::Display) -> Self {
        Self::File(format!("{}: {error}", path.display()))
    }

    /// Whether only an operator can end it, so that there is no hurry to try again.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::File(_)
            | Self::ProxyScheme
            | Self::ProxyVariable(_)
            | Self::ProxyRefused(_)
            | Self::Certificate(_)
            | Self::Host(_) => true,
            Self::Protocol(error) => matches!(
                error,
                ProtocolError::NoUpgrade(_)
                    | ProtocolError::RelayKey(..)
                    | ProtocolError::WeakKey(_)
            ),
            _ => false,
        }
    }

    /// A proxy that opens no tunnel to the relay.
    pub(crate) fn of_proxy(answer: &Answer, sent_credentials: bool) -> Self {
        let Answer { status, reason, authenticate, .. } = answer;
        let said = format!("the proxy answers {status} {reason}");
        Self::ProxyRefused(match status {
            // Some proxies say 401 though they are none of the origin's servers (tinyproxy).
            401 | 407 if sent_credentials => {
                format!("{said}: it does not take this user and password")
            }
            401 | 407 if authenticate.to_ascii_lowercase().contains("basic") => {
                format!("{said}: it wants a user and a password (proxy_credentials_file)")
            }
            401 | 407 => format!("{said}: it wants {authenticate}, and only Basic can be given"),
            403 | 405 => format!("{said}: it does not allow tunnels to this host and port"),
            500 | 502..=504 => format!("{said}: it does not reach the relay"),
            _ => said,
        })
    }

    /// What TLS does not like about `host`.
    pub(crate) fn of_tls(host: &str, error: &TlsError) -> Self {
        let TlsError::InvalidCertificate(certificate) = error else {
            return Self::Tls(match error {
                TlsError::InvalidMessage(InvalidMessage::InvalidContentType) => {
                    "what it answers is not TLS; is this a relay for http://?".into()
                }
                error => error.to_string(),
            });
        };
        Self::Certificate(match certificate {
            CertificateError::ExpiredContext { time, not_after } => format!(
                "the certificate of {host} ended at {}, and this machine's clock says {}: \
                 renew the certificate, or set the clock",
                utc(*not_after),
                utc(*time)
            ),
            CertificateError::NotValidYetContext { time, not_before } => format!(
                "the certificate of {host} begins at {}, and this machine's clock says {}: \
                 the clock is probably wrong",
                utc(*not_before),
                utc(*time)
            ),
            CertificateError::NotValidForNameContext { presented, .. } => format!(
                "the certificate is not for {host}, but for {}",
                if presented.is_empty() { "no name".into() } else { presented.join(", ") }
            ),
            CertificateError::Other(other) => other.to_string(),
            other => format!("the certificate of {host}: {other}"),
        })
    }
}

/// A second as `2026-11-21 11:30:00 UTC`.
fn utc(time: UnixTime) -> String {
    let (days, second) = (time.as_secs() / 86_400, time.as_secs() % 86_400);
    // Howard Hinnant's civil_from_days, from 1970 on: years begin in March.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use millrace_path::sealed::PublicKey;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // As `date -u -d @SECONDS` prints them.
        for (second, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_795_260_600, "2026-11-21 11:30:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            let time = UnixTime::since_unix_epoch(Duration::from_secs(second));
            assert_eq!(utc(time), text);
        }
    }

    #[test]
    fn what_only_an_operator_can_end_is_not_hurried() {
        let keys = (PublicKey([1; 32]), PublicKey([2; 32]));
        assert!(RelayFailure::Certificate(String::new()).is_lasting());
        assert!(RelayFailure::Protocol(ProtocolError::RelayKey(keys.0, keys.1)).is_lasting());
        assert!(!RelayFailure::Closed("").is_lasting());
    }

    #[test]
    fn a_proxy_that_refuses_is_told_with_its_cure() {
        let answer = |status, authenticate: &str| Answer {
            status,
            reason: "No".into(),
            authenticate: authenticate.into(),
            location: String::new(),
        };
        let said = |status, authenticate, sent| {
            RelayFailure::of_proxy(&answer(status, authenticate), sent).to_string()
        };
        assert!(said(407, "Basic realm=x", false).contains("proxy_credentials_file"));
        assert!(said(407, "Basic realm=x", true).contains("does not take this user"));
        assert!(said(407, "Negotiate", false).contains("only Basic"));
        assert!(said(403, "", false).contains("does not allow"));
    }
}
