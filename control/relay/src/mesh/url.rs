//! Where a mate is.

use std::fmt;

/// `https://relay-b.example.net` or, in a lab, `http://192.0.2.1:3340`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayUrl {
    pub tls: bool,
    /// A name, or an address without brackets.
    pub host: String,
    pub port: u16,
}

impl RelayUrl {
    /// None for anything but scheme, host and perhaps a port; `/derp` may follow.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let (tls, usual_port) = match scheme {
            "https" => (true, 443),
            "http" => (false, 80),
            _ => return None,
        };
        let authority = rest.strip_suffix("/derp").unwrap_or(rest);
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
            let (host, port) = rest.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some(""))?)
        } else {
            authority.split_once(':').unwrap_or((authority, ""))
        };
        let port = if port.is_empty() { usual_port } else { port.parse().ok()? };
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-:".contains(c);
        let good = !host.is_empty() && host.len() <= 253 && host.chars().all(plain) && port != 0;
        good.then(|| Self { tls, host: host.to_owned(), port })
    }
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tls, host, port } = self;
        let scheme = if *tls { "https" } else { "http" };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_relays_are_read_and_others_are_not() {
        for (text, shown) in [
            ("https://relay-b.example.net", "https://relay-b.example.net:443"),
            ("https://relay-b.example.net/derp", "https://relay-b.example.net:443"),
            ("https://[2001:db8::1]:8443/", "https://[2001:db8::1]:8443"),
            ("http://192.0.2.1:3340", "http://192.0.2.1:3340"),
            ("http://192.0.2.1", "http://192.0.2.1:80"),
        ] {
            let url = RelayUrl::parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(RelayUrl::parse(shown), Some(url));
        }
        for text in [
            "relay.example.net",
            "ftp://relay.example.net",
            "https://",
            "https://a b",
            "https://user@host",
            "https://host/else",
            "https://host:0",
            "https://host:99999",
            "https://[::1",
            "https://[::1]443",
            "https://host\r\nX: y",
        ] {
            assert_eq!(RelayUrl::parse(text), None, "{text}");
        }
    }
}
