//! `[discovery]`: how the control process finds paths to peers. The data plane reads one key of it.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::EndpointName;
use crate::fingerprint::Fingerprint;
use crate::key::PublicKey;

/// `[discovery]`. Without a relay and a STUN server nothing is searched for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovery {
    /// Relays at which peers and we can meet, each URL once.
    pub relay: Vec<Relay>,
    /// STUN servers beside those of the relays, each once.
    pub stun: Vec<EndpointName>,
    /// Who may sign the certificate of a relay that has none pinned.
    pub authorities: Authorities,
    /// On the way to all relays.
    pub proxy: Proxy,
    /// A file with one line `user:password` for a proxy that is named here.
    pub proxy_credentials_file: Option<PathBuf>,
    /// Whether routers are asked to open the port (PCP, NAT-PMP, UPnP).
    pub port_mapping: bool,
    /// Whether disco is heard that the host's firewall drops. The data plane reads this.
    pub past_firewall: bool,
    /// Public addresses of this gateway that nothing could find out, as behind a static forward.
    pub address: Vec<SocketAddr>,
}

impl Default for Discovery {
    fn default() -> Self {
        Self {
            relay: Vec::new(),
            stun: Vec::new(),
            authorities: Authorities::default(),
            proxy: Proxy::default(),
            proxy_credentials_file: None,
            port_mapping: true,
            past_firewall: true,
            address: Vec::new(),
        }
    }
}

impl Discovery {
    /// Whether there is anything for a control process to do.
    pub fn is_on(&self) -> bool {
        !self.relay.is_empty() || !self.stun.is_empty()
    }
}

/// A relay, and what it alone may show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relay {
    pub url: HttpUrl,
    /// The certificate or its public key; then names, dates and authorities do not matter.
    pub certificate: Option<Fingerprint>,
    /// The key with which it speaks DERP.
    pub key: Option<PublicKey>,
}

impl From<HttpUrl> for Relay {
    /// Nothing is pinned.
    fn from(url: HttpUrl) -> Self {
        Self { url, certificate: None, key: None }
    }
}

/// Whose signature under a relay's certificate counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Authorities {
    #[default]
    System,
    /// Only those of this PEM file.
    File(PathBuf),
    /// Those of the system and those of this PEM file.
    Both(PathBuf),
}

/// HTTP proxy that opens tunnels (CONNECT).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Proxy {
    #[default]
    None,
    /// As the process's environment says: `https_proxy`, `no_proxy` and their like.
    Environment,
    /// `http://` alone: TLS runs inside the tunnel.
    Server(HttpUrl),
}

/// `http://host[:port]` or `https://host[:port]`, without path, user or query.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HttpUrl {
    pub tls: bool,
    /// A name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    pub port: u16,
}

impl HttpUrl {
    /// The error says what was expected.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const SHAPE: &str =
            "https://host or https://host:port, without path (http:// only in labs)";
        let (scheme, rest) = text.split_once("://").ok_or(SHAPE)?;
        let (tls, usual) = match scheme {
            "https" => (true, 443),
            "http" => (false, 80),
            _ => return Err(SHAPE),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let has_port = match authority.strip_prefix('[') {
            Some(bracketed) => !bracketed.ends_with(']'),
            None => authority.contains(':'),
        };
        let with_port =
            if has_port { authority.to_owned() } else { format!("{authority}:{usual}") };
        let (host, port) = match EndpointName::parse(&with_port).map_err(|_| SHAPE)? {
            EndpointName::Address(address) => (address.ip().to_string(), address.port()),
            EndpointName::Name(name, port) => (name, port),
        };
        Ok(Self { tls, host, port })
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, usual) = if self.tls { ("https", 443) } else { ("http", 80) };
        let brackets = self.host.contains(':');
        let (open, close) = if brackets { ("[", "]") } else { ("", "") };
        write!(f, "{scheme}://{open}{}{close}", self.host)?;
        if self.port == usual { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written() {
        for (text, tls, host, port) in [
            ("https://relay.example.net", true, "relay.example.net", 443),
            ("https://relay.example.net:8443", true, "relay.example.net", 8443),
            ("http://192.0.2.1", false, "192.0.2.1", 80),
            ("http://192.0.2.1:8080", false, "192.0.2.1", 8080),
            ("https://[2001:db8::1]", true, "2001:db8::1", 443),
            ("https://[2001:db8::1]:444", true, "2001:db8::1", 444),
        ] {
            let url = HttpUrl::parse(text).unwrap();
            assert_eq!((url.tls, &*url.host, url.port), (tls, host, port));
            assert_eq!(url.to_string(), text);
        }
        assert_eq!(HttpUrl::parse("https://a/").unwrap().to_string(), "https://a");
        for bad in ["a", "ftp://a", "https://", "https://a/derp", "https://a:0", "https://u@a", ""]
        {
            assert!(HttpUrl::parse(bad).is_err(), "{bad}");
        }
    }
}
