//! `[discovery]`.

use std::net::SocketAddr;

use toml::Spanned;
use toml::de::DeValue;

use super::{Reader, Section};
use crate::config::EndpointName;
use crate::discovery::{Authorities, Discovery, HttpUrl, Proxy, Relay};
use crate::fingerprint::Fingerprint;
use crate::key::PublicKey;
use crate::limits;
use crate::problem::quoted;

const RELAY_URL: &str = "write it like \"https://relay.example.net\"";

impl Reader<'_> {
    pub(super) fn discovery(&mut self, section: &Section<'_>, discovery: &mut Discovery) {
        self.unknown_keys(section, "discovery", &[]);
        discovery.relay = self.relays(section);
        let (servers, addresses) = (limits::STUN_SERVERS_MAX, limits::OWN_ADDRESSES_MAX);
        let like = "write it like \"stun.example.net:3478\"";
        discovery.stun = self.parsed(section, "stun", servers, like, EndpointName::parse);
        let like = "write it like \"198.51.100.7:51820\" or \"[2001:db8::1]:51820\"";
        discovery.address = self.parsed(section, "address", addresses, like, |text| {
            text.parse::<SocketAddr>()
                .ok()
                .filter(|address| address.port() != 0)
                .ok_or("an address and a port")
        });
        discovery.authorities = self.authorities(section);
        self.proxy(section, discovery);
        let words = [("auto", true), ("off", false)];
        discovery.port_mapping = self.word(section, "port_mapping", &words).unwrap_or(true);
        discovery.past_firewall = self.word(section, "past_firewall", &words).unwrap_or(true);
    }

    fn relays(&mut self, section: &Section<'_>) -> Vec<Relay> {
        let mut relays: Vec<Relay> = Vec::new();
        let Some(value) = section.get("relay") else { return relays };
        let DeValue::Array(items) = value.get_ref() else {
            let seen = self.source(value.span());
            let cure = "write it like [\"https://relay.example.net\"]";
            self.wrong(section, "relay", &seen, "a list of URLs or tables", cure);
            return relays;
        };
        for (index, item) in items.iter().enumerate() {
            let Some(relay) = self.relay(section, item, index) else { continue };
            let span = item.span();
            if relays.iter().any(|known| known.url == relay.url) {
                let seen = format!("{} twice", relay.url);
                self.wrong_at(span, section, "relay", &seen, "each once", "delete one of them");
            } else if relays.len() == limits::RELAYS_MAX {
                let expected = format!("at most {}", limits::RELAYS_MAX);
                self.wrong_at(span, section, "relay", "too many", &expected, "keep the nearest");
                break;
            } else {
                relays.push(relay);
            }
        }
        relays
    }

    /// An URL, or a table with one.
    fn relay(
        &mut self,
        section: &Section<'_>,
        item: &Spanned<DeValue<'_>>,
        index: usize,
    ) -> Option<Relay> {
        match item.get_ref() {
            DeValue::String(text) => match HttpUrl::parse(text) {
                Ok(url) => Some(url.into()),
                Err(expected) => {
                    let (span, seen) = (item.span(), quoted(text));
                    self.wrong_at(span, section, "relay", &seen, expected, RELAY_URL);
                    None
                }
            },
            DeValue::Table(table) => {
                let label = format!("{}[{}]", section.label_of("relay"), index + 1);
                self.relay_table(&Section { label, table, span: item.span() })
            }
            _ => {
                let (span, seen) = (item.span(), self.source(item.span()));
                self.wrong_at(span, section, "relay", &seen, "an URL or a table", RELAY_URL);
                None
            }
        }
    }

    fn relay_table(&mut self, section: &Section<'_>) -> Option<Relay> {
        self.unknown_keys(section, "discovery.relay", &[]);
        if section.get("url").is_none() {
            let (span, label) = (section.span.clone(), section.label_of("url"));
            self.problem(Some(span), label, "the key is missing", "url = \"https://…\"", RELAY_URL);
        }
        let url = self.one(section, "url", RELAY_URL, HttpUrl::parse);
        let cure = "docs/control.md says how the relay's certificate is asked for it";
        let certificate = self.one(section, "certificate", cure, Fingerprint::parse);
        let cure = "the log of millrace-relay has it as public_key";
        let key = self.one(section, "key", cure, relay_key);
        let url = url?;
        if certificate.is_some() && !url.tls {
            let cure = "write https://, or take the certificate out";
            self.wrong(section, "certificate", "at a relay without TLS", "an https:// URL", cure);
        }
        Some(Relay { url, certificate, key })
    }

    fn authorities(&mut self, section: &Section<'_>) -> Authorities {
        let cure = "put the certificates into a PEM file and write its path here";
        let file = self.path(section, "relay_ca_file", cure);
        let both = self.word(section, "relay_ca", &[("auto", false), ("both", true)]);
        match (file, both.unwrap_or(false)) {
            (Some(file), true) => Authorities::Both(file),
            (Some(file), false) => Authorities::File(file),
            (None, true) if section.get("relay_ca_file").is_none() => {
                let cure = "without a file the system's authorities count alone: delete this line";
                let expected = "relay_ca_file beside it";
                self.wrong(section, "relay_ca", "\"both\" without a file", expected, cure);
                Authorities::System
            }
            (None, _) => Authorities::System,
        }
    }

    fn proxy(&mut self, section: &Section<'_>, discovery: &mut Discovery) {
        let like = "write it like \"http://proxy.example.net:3128\", or \"environment\"";
        discovery.proxy = match self.string(section, "proxy").as_deref() {
            None => Proxy::None,
            Some("environment") => Proxy::Environment,
            Some(text) => match proxy_url(text) {
                Ok(url) => Proxy::Server(url),
                Err(expected) => {
                    // It may hold a password and is not repeated.
                    self.wrong(section, "proxy", "no URL of a proxy", expected, like);
                    Proxy::None
                }
            },
        };
        let cure = "put user:password into a file of mode 0600 and write its path here";
        discovery.proxy_credentials_file = self.path(section, "proxy_credentials_file", cure);
        if discovery.proxy == Proxy::Environment && discovery.proxy_credentials_file.is_some() {
            let seen = "proxy = \"environment\", which names user and password itself";
            let expected = "one of the two";
            let cure = "delete this line, or write the proxy's URL in the file";
            self.wrong(section, "proxy_credentials_file", seen, expected, cure);
        }
    }

    /// One value that is written as a string.
    fn one<T>(
        &mut self,
        section: &Section<'_>,
        key: &str,
        cure: &str,
        parse: impl Fn(&str) -> Result<T, &'static str>,
    ) -> Option<T> {
        let text = self.string(section, key)?;
        let value = parse(&text);
        value.map_err(|expected| self.wrong(section, key, &quoted(&text), expected, cure)).ok()
    }
}

fn proxy_url(text: &str) -> Result<HttpUrl, &'static str> {
    match HttpUrl::parse(text)? {
        url if url.tls => Err("an http:// URL: TLS runs inside the proxy's tunnel"),
        url => Ok(url),
    }
}

/// As our relay writes it, or as Tailscale does.
fn relay_key(text: &str) -> Result<PublicKey, &'static str> {
    let key = match text.strip_prefix("nodekey:") {
        Some(hex) => PublicKey::from_hex(hex),
        None => PublicKey::from_base64(text),
    };
    let key = key.ok().filter(|key| !key.is_zero());
    key.ok_or("a public key: 32 bytes in base64, or nodekey: and 64 hex digits")
}
