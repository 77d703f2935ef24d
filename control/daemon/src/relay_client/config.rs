//! What an operator says about one relay.

use std::path::PathBuf;

use millrace_config::Fingerprint;
use millrace_config::discovery::{self, Authorities, Discovery, HttpUrl, Relay};
use millrace_path::sealed::PublicKey;
use zeroize::Zeroizing;

use super::failure::RelayFailure;
use super::{files, http};

/// How one relay is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayConfig {
    pub url: HttpUrl,
    /// The only key that the relay may have.
    pub relay_key: Option<PublicKey>,
    pub trust: Trust,
    pub proxy: Proxy,
    /// Mark of the connection's packets, for policy routing.
    pub mark: Option<u32>,
}

impl RelayConfig {
    /// As `[discovery]` has it.
    pub fn of(relay: &Relay, discovery: &Discovery) -> Self {
        Self {
            url: relay.url.clone(),
            relay_key: relay.key.map(|key| PublicKey(key.0)),
            trust: match relay.certificate {
                Some(certificate) => Trust::Pinned(certificate),
                None => Trust::Authorities(discovery.authorities.clone()),
            },
            proxy: match &discovery.proxy {
                discovery::Proxy::None => Proxy::None,
                discovery::Proxy::Environment => Proxy::Environment,
                discovery::Proxy::Server(url) => Proxy::Server {
                    url: url.clone(),
                    credentials_file: discovery.proxy_credentials_file.clone(),
                },
            },
            mark: None,
        }
    }

    /// Without a proxy, trusting the authorities of the system.
    pub fn new(url: HttpUrl) -> Self {
        Self { url, relay_key: None, trust: Trust::default(), proxy: Proxy::None, mark: None }
    }
}

/// Whose certificates a relay may show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Signed by one of these, valid now and for the name.
    Authorities(Authorities),
    /// This one, whatever name and dates it has.
    Pinned(Fingerprint),
}

impl Default for Trust {
    fn default() -> Self {
        Self::Authorities(Authorities::System)
    }
}

/// An HTTP proxy that opens tunnels (CONNECT).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proxy {
    None,
    /// `https_proxy` for https relays, `http_proxy` for http ones, `all_proxy`; `no_proxy`.
    Environment,
    Server {
        url: HttpUrl,
        /// A file with one line `user:password`.
        credentials_file: Option<PathBuf>,
    },
}

/// A proxy that is to be used now.
pub struct ProxyServer {
    pub url: HttpUrl,
    /// `user:password`.
    pub credentials: Option<Zeroizing<String>>,
}

impl Proxy {
    /// The proxy on the way to `relay`, if any. `variable` reads the environment.
    pub fn find(
        &self,
        relay: &HttpUrl,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<ProxyServer>, RelayFailure> {
        let (url, credentials) = match self {
            Self::None => return Ok(None),
            Self::Server { url, credentials_file } => {
                let credentials =
                    credentials_file.as_deref().map(files::credentials).transpose()?;
                (url.clone(), credentials)
            }
            Self::Environment => {
                let either = |name: &str| variable(name).or_else(|| variable(&name.to_uppercase()));
                let set = |name: &str| either(name).filter(|value| !value.is_empty());
                let name = if relay.tls { "https_proxy" } else { "http_proxy" };
                if set("no_proxy").is_some_and(|list| is_excepted(&list, relay)) {
                    return Ok(None);
                }
                let Some(value) = set(name).or_else(|| set("all_proxy")) else { return Ok(None) };
                from_variable(name, &Zeroizing::new(value))?
            }
        };
        if url.tls {
            return Err(RelayFailure::ProxyScheme);
        }
        Ok(Some(ProxyServer { url, credentials }))
    }
}

type UrlAndCredentials = (HttpUrl, Option<Zeroizing<String>>);

/// Reads `[http://][user:password@]host[:port][/]`.
fn from_variable(name: &str, value: &str) -> Result<UrlAndCredentials, RelayFailure> {
    let (scheme, rest) = value.split_once("://").unwrap_or(("http", value));
    let (credentials, host) = match rest.rsplit_once('@') {
        Some((credentials, host)) => (Some(http::percent_decoded(credentials)), host),
        None => (None, rest),
    };
    // The value may hold a password and is not repeated.
    let url = HttpUrl::parse(&format!("{scheme}://{host}"))
        .map_err(|_| RelayFailure::ProxyVariable(name.to_owned()))?;
    Ok((url, credentials))
}

/// `no_proxy`: a list of names with all that ends in them, addresses, address/length, or `*`.
fn is_excepted(list: &str, relay: &HttpUrl) -> bool {
    let host = relay.host.to_ascii_lowercase();
    let address: Option<std::net::IpAddr> = host.parse().ok();
    list.split([',', ' ']).map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
        let entry = entry.to_ascii_lowercase();
        let (entry, port) = match entry.rsplit_once(':') {
            Some((name, port)) if !name.contains(':') => (name.to_owned(), port.parse().ok()),
            _ => (entry, None::<u16>),
        };
        if entry == "*" {
            return true;
        }
        if port.is_some_and(|port| port != relay.port) {
            return false;
        }
        if let Some(address) = address {
            let net = entry.parse::<ipnet::IpNet>().ok();
            return entry.parse() == Ok(address) || net.is_some_and(|net| net.contains(&address));
        }
        let name = entry.trim_start_matches("*.").trim_start_matches('.');
        host.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay(url: &str) -> HttpUrl {
        HttpUrl::parse(url).unwrap()
    }

    #[test]
    fn no_proxy_means_names_with_what_ends_in_them_and_networks() {
        for (list, url, excepted) in [
            ("example.net", "https://example.net", true),
            ("example.net", "https://a.Example.net", true),
            (".example.net", "https://a.example.net", true),
            ("*.example.net", "https://a.example.net", true),
            ("example.net", "https://badexample.net", false),
            ("example.net:8443", "https://example.net", false),
            ("example.net:443", "https://example.net", true),
            ("a, *", "https://b", true),
            ("192.0.2.0/24", "https://192.0.2.7", true),
            ("192.0.2.0/24", "https://198.51.100.7", false),
            ("2001:db8::/32", "https://[2001:db8::1]", true),
            ("2001:db8::1", "https://[2001:db8::1]", true),
            ("", "https://b", false),
        ] {
            assert_eq!(is_excepted(list, &relay(url)), excepted, "{list} {url}");
        }
    }

    #[test]
    fn the_environment_names_a_proxy_by_the_scheme_of_the_relay() {
        let find = |url: &str| {
            let variable = |name: &str| match name {
                "https_proxy" => Some("http://us%65r:p%40ss@proxy.test:3128/".to_owned()),
                "HTTP_PROXY" => Some("other.test:8080".to_owned()),
                "no_proxy" => Some("inside.test".to_owned()),
                _ => None,
            };
            Proxy::Environment.find(&relay(url), variable).unwrap()
        };
        let https = find("https://relay.test").unwrap();
        assert_eq!((&*https.url.host, https.url.port), ("proxy.test", 3128));
        assert_eq!(**https.credentials.as_ref().unwrap(), "user:p@ss");
        let http = find("http://relay.test").unwrap();
        assert_eq!((&*http.url.host, http.url.port, http.credentials), ("other.test", 8080, None));
        assert!(find("https://inside.test").is_none());
        let bad = |_: &str| Some("ftp://secret@x".to_owned());
        let error = Proxy::Environment.find(&relay("https://b"), bad).err().unwrap();
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
