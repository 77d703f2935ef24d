//! Walks the parsed document and remembers what is wrong, with its position.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use millrace_config::problem::{Problem, Problems, nearest, position, quoted};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{
    ACME_DIRECTORY, ACME_STATE, AcmeSettings, Https, KEYS, MeshSettings, Settings, TABLES,
};
use crate::limits;
use crate::mesh::url::RelayUrl;

struct Reader<'t> {
    text: &'t str,
    problems: Vec<Problem>,
}

/// One table with its name.
#[derive(Clone, Copy)]
struct Section<'d> {
    name: &'static str,
    table: &'d DeTable<'d>,
    /// Where it begins in the text.
    start: usize,
}

pub(super) fn read(text: &str) -> Result<Settings, Problems> {
    let document = DeTable::parse(text).map_err(|error| {
        Problems(vec![Problem {
            position: error.span().map(|span| position(text, span.start)),
            key: String::new(),
            seen: error.message().replace('\n', ", "),
            expected: "TOML".to_owned(),
            cure: "mend the line; strings stand in double quotes".to_owned(),
        }])
    })?;
    let mut reader = Reader { text, problems: Vec::new() };
    let settings = reader.document(&document);
    if reader.problems.is_empty() { Ok(settings) } else { Err(Problems::new(reader.problems)) }
}

impl Reader<'_> {
    fn document(&mut self, document: &Spanned<DeTable<'_>>) -> Settings {
        let mut settings = Settings::default();
        let top = document.get_ref();
        self.unknown(top, "", TABLES.into_iter().chain(["schema"]));
        match top.get("schema").map(|value| integer(value.get_ref())) {
            Some(Some(1)) => {}
            Some(_) => self.wrong(top, "", "schema", "the format version 1", "write schema = 1"),
            None => {
                let cure = "write schema = 1 on the first line";
                self.problem(0, "schema".to_owned(), "the key is missing", "schema = 1", cure);
            }
        }
        if let Some(section) = self.section(top, "relay") {
            self.relay(section, &mut settings);
        }
        if let Some(section) = self.section(top, "acme") {
            settings.acme = self.acme(section);
        }
        if let Some(section) = self.section(top, "https") {
            settings.https = self.https(section, top.contains_key("acme"), &settings);
        }
        if let Some(section) = self.section(top, "http") {
            settings.http.listen = self.addresses(section, "listen");
            settings.http.relay = self.flag(section, "relay").unwrap_or(false);
        }
        if let Some(section) = self.section(top, "stun") {
            settings.stun = self.addresses(section, "listen");
        }
        if let Some(section) = self.section(top, "admission") {
            settings.keys_file = self.path(section, "keys_file");
        }
        if let Some(section) = self.section(top, "mesh") {
            settings.mesh = self.mesh(section);
        }
        if let Some(section) = self.section(top, "rate") {
            let any = 1..=u64::from(u32::MAX);
            settings.bytes_per_second = self.number(section, "bytes_per_second", any).unwrap_or(0);
            let burst = limits::BURST_MIN..=u64::from(u32::MAX);
            settings.burst_bytes =
                self.number(section, "burst_bytes", burst).unwrap_or(limits::BURST_MIN);
        }
        if let Some(section) = self.section(top, "metrics") {
            settings.metrics = self
                .string(section, "listen")
                .and_then(|text| self.address(section, "listen", &text));
        }
        if settings.acme.is_some() && self.problems.is_empty() {
            let port = settings.http.listen.is_empty().then_some("[http] listen, for port 80");
            let https = settings.https.is_none().then_some("[https] listen");
            if let Some(missing) = port.or(https) {
                let seen = "[acme] is there and cannot work";
                self.problem(0, "acme".to_owned(), seen, missing, "add it");
            }
        }
        if settings.https.is_none() && !settings.http.relay && self.problems.is_empty() {
            let expected = "[https], or [http] with relay = true in a lab";
            self.problem(0, String::new(), "nothing serves /derp", expected, "add one of them");
        }
        settings
    }

    fn relay(&mut self, section: Section<'_>, settings: &mut Settings) {
        if let Some(path) = self.path(section, "private_key_file") {
            settings.private_key_file = path;
        }
        if let Some(workers) = self.number(section, "workers", 1..=limits::WORKERS_MAX as u64) {
            settings.workers = workers as usize;
        }
        if let Some(most) = self.number(section, "connections_max", 1..=10_000_000) {
            settings.connections_max = most as usize;
        }
        if let Some(most) = self.number(section, "connections_per_address", 1..=10_000_000) {
            settings.connections_per_address = most as usize;
        }
        if let Some(seconds) = self.number(section, "drain_seconds", 0..=3600) {
            settings.drain_seconds = seconds;
        }
    }

    fn acme(&mut self, section: Section<'_>) -> Option<AcmeSettings> {
        let table = section.table;
        let names = self.names(section, "names");
        if self.flag(section, "terms_agreed") != Some(true) {
            let (at, label) = (section.start, "acme.terms_agreed".to_owned());
            let cure = "read the terms of the server, and write it if you agree";
            self.problem(at, label, "the terms are not agreed to", "terms_agreed = true", cure);
        }
        let contact = self.string(section, "contact");
        if contact.as_ref().is_some_and(|mail| !mail.contains('@')) {
            let cure = "write it like \"operator@example.net\"";
            self.wrong(table, section.name, "contact", "a mail address", cure);
        }
        let directory = self.string(section, "directory");
        if directory.as_ref().is_some_and(|url| !url.starts_with("https://")) {
            let cure = "see the documentation of the ACME server";
            self.wrong(table, section.name, "directory", "a URL that begins with https://", cure);
        }
        let ca_file = self.path(section, "ca_file");
        let state = self.path(section, "state_directory");
        Some(AcmeSettings {
            names: names?,
            contact,
            directory: directory.unwrap_or_else(|| ACME_DIRECTORY.to_owned()),
            ca_file,
            state_directory: state.unwrap_or_else(|| ACME_STATE.into()),
        })
    }

    fn https(&mut self, section: Section<'_>, acme: bool, settings: &Settings) -> Option<Https> {
        let listen = self.addresses(section, "listen");
        let table = section.table;
        if acme {
            for key in ["certificate_file", "key_file"] {
                if table.contains_key(key) {
                    let expected = "no file, as [acme] gets the certificate";
                    self.wrong(table, section.name, key, expected, "delete it, or [acme]");
                }
            }
            let file = settings.acme.as_ref()?.certificate_file();
            return Some(Https { listen, certificate_file: file.clone(), key_file: file });
        }
        for key in ["listen", "certificate_file", "key_file"] {
            if table.get(key).is_none() {
                let label = format!("https.{key}");
                let at = section.start;
                self.problem(at, label, "the key is missing", "it, as [https] is there", "add it");
            }
        }
        let certificate_file = self.path(section, "certificate_file");
        let key_file = self.path(section, "key_file");
        Some(Https { listen, certificate_file: certificate_file?, key_file: key_file? })
    }

    fn mesh(&mut self, section: Section<'_>) -> Option<MeshSettings> {
        if section.table.get("key_file").is_none() {
            let (at, label) = (section.start, "mesh.key_file".to_owned());
            self.problem(at, label, "the key is missing", "it, as [mesh] is there", "add it");
        }
        let peers = self.urls(section, "peers");
        let ca_file = self.path(section, "ca_file");
        let key_file = self.path(section, "key_file");
        Some(MeshSettings { key_file: key_file?, peers, ca_file })
    }

    // Values of one shape. Each reports what it does not like and then stands for "absent".

    fn section<'d>(&mut self, top: &'d DeTable<'d>, name: &'static str) -> Option<Section<'d>> {
        let value = top.get(name)?;
        let DeValue::Table(table) = value.get_ref() else {
            let cure = "write the name in brackets on a line of its own";
            self.wrong(top, "", name, &format!("a table [{name}]"), cure);
            return None;
        };
        let known = KEYS.iter().filter(|key| key.0 == name).map(|key| key.1);
        self.unknown(table, name, known);
        Some(Section { name, table, start: value.span().start })
    }

    fn string(&mut self, section: Section<'_>, key: &str) -> Option<String> {
        let table = section.table;
        let value = table.get(key)?;
        let text = value.get_ref().as_str().map(ToOwned::to_owned);
        if text.is_none() {
            self.wrong(table, section.name, key, "a string", "put the value in double quotes");
        }
        text
    }

    fn path(&mut self, section: Section<'_>, key: &str) -> Option<PathBuf> {
        let text = self.string(section, key)?;
        if text.starts_with('/') {
            return Some(text.into());
        }
        let expected = "a path that begins with /";
        self.wrong(section.table, section.name, key, expected, "write the whole path");
        None
    }

    fn flag(&mut self, section: Section<'_>, key: &str) -> Option<bool> {
        let table = section.table;
        let flag = table.get(key)?.get_ref().as_bool();
        if flag.is_none() {
            self.wrong(table, section.name, key, "true or false", "write it without quotes");
        }
        flag
    }

    fn number(
        &mut self,
        section: Section<'_>,
        key: &str,
        range: RangeInclusive<u64>,
    ) -> Option<u64> {
        let table = section.table;
        let found = integer(table.get(key)?.get_ref()).filter(|number| range.contains(number));
        if found.is_none() {
            let expected = format!("a number from {} to {}", range.start(), range.end());
            self.wrong(table, section.name, key, &expected, "write it without quotes or units");
        }
        found
    }

    fn addresses(&mut self, section: Section<'_>, key: &str) -> Vec<SocketAddr> {
        let table = section.table;
        let Some(value) = table.get(key) else { return Vec::new() };
        let Some(items) = value.get_ref().as_array() else {
            let cure = "write it like [\"[::]:443\"]";
            self.wrong(table, section.name, key, "a list of addresses with ports", cure);
            return Vec::new();
        };
        let text = |item: &Spanned<DeValue<'_>>| item.get_ref().as_str().map(ToOwned::to_owned);
        let texts: Vec<String> = items.iter().map(|item| text(item).unwrap_or_default()).collect();
        texts.iter().filter_map(|text| self.address(section, key, text)).collect()
    }

    /// Names for a certificate. They go into a request as they are: no wildcards, ASCII alone.
    fn names(&mut self, section: Section<'_>, key: &str) -> Option<Vec<String>> {
        let value = section.table.get(key).and_then(|value| value.get_ref().as_array());
        let read = |item: &Spanned<DeValue<'_>>| {
            let name = item.get_ref().as_str()?;
            let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || ".-".contains(c));
            let dns = plain && name.contains('.') && name.len() <= 253;
            (dns || name.parse::<IpAddr>().is_ok()).then(|| name.to_owned())
        };
        let names: Option<Vec<String>> = value.and_then(|items| items.iter().map(read).collect());
        let names = names.filter(|names| (1..=limits::ACME_NAMES_MAX).contains(&names.len()));
        if names.is_none() {
            let cure = "write them like [\"relay.example.net\"]";
            self.wrong(section.table, section.name, key, "a list of full DNS names", cure);
        }
        names
    }

    fn urls(&mut self, section: Section<'_>, key: &str) -> Vec<RelayUrl> {
        let table = section.table;
        let Some(value) = table.get(key) else { return Vec::new() };
        let read = |item: &Spanned<DeValue<'_>>| RelayUrl::parse(item.get_ref().as_str()?);
        let urls: Option<Vec<RelayUrl>> =
            value.get_ref().as_array().and_then(|items| items.iter().map(read).collect());
        let urls = urls.filter(|urls| urls.len() <= limits::MATES_MAX);
        if urls.is_none() {
            let expected = format!("at most {} URLs of relays", limits::MATES_MAX);
            let cure = "write them like [\"https://relay-b.example.net\"]";
            self.wrong(table, section.name, key, &expected, cure);
        }
        urls.unwrap_or_default()
    }

    fn address(&mut self, section: Section<'_>, key: &str, text: &str) -> Option<SocketAddr> {
        let address = text.parse().ok();
        if address.is_none() {
            let expected = "an address with a port";
            let cure = "write it like \"[::]:443\" or \"192.0.2.1:443\"";
            self.wrong(section.table, section.name, key, expected, cure);
        }
        address
    }

    // Reports.

    fn unknown(
        &mut self,
        table: &DeTable<'_>,
        name: &str,
        known: impl Iterator<Item = &'static str> + Clone,
    ) {
        for key in table.keys() {
            let word = key.get_ref().as_ref();
            if known.clone().any(|known| known == word) {
                continue;
            }
            let elsewhere = KEYS.iter().find(|key| key.1 == word && key.0 != name);
            let cure = match (nearest(word, known.clone()), elsewhere) {
                (_, Some(other)) => format!("it belongs to [{}]", other.0),
                (Some(near), None) => format!("did you mean {near:?}?"),
                (None, None) => "delete it, or see `millrace-relay config keys`".to_owned(),
            };
            let list: Vec<&str> = known.clone().collect();
            let expected = format!("one of {}", list.join(", "));
            let label = label(name, word);
            self.problem(key.span().start, label, "the key is unknown", &expected, &cure);
        }
    }

    fn wrong(&mut self, table: &DeTable<'_>, name: &str, key: &str, expected: &str, cure: &str) {
        let span = table.get(key).map_or(0..0, Spanned::span);
        let seen = quoted(self.text.get(span.clone()).unwrap_or_default());
        self.problem(span.start, label(name, key), &seen, expected, cure);
    }

    fn problem(&mut self, at: usize, key: String, seen: &str, expected: &str, cure: &str) {
        self.problems.push(Problem {
            position: Some(position(self.text, at)),
            key,
            seen: seen.to_owned(),
            expected: expected.to_owned(),
            cure: cure.to_owned(),
        });
    }
}

fn label(table: &str, key: &str) -> String {
    if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }
}

fn integer(value: &DeValue<'_>) -> Option<u64> {
    let number = value.as_integer()?;
    u64::from_str_radix(&number.as_str().replace('_', ""), number.radix()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn a_whole_file_is_read() {
        let text = r#"
            schema = 1
            [relay]
            private_key_file = "/k"
            workers = 3
            connections_max = 20_000
            drain_seconds = 0
            [https]
            listen = ["[::]:443", "192.0.2.1:8443"]
            certificate_file = "/c"
            key_file = "/p"
            [http]
            listen = ["[::]:80"]
            [stun]
            listen = ["[::]:3478"]
            [admission]
            keys_file = "/l"
            [mesh]
            key_file = "/m"
            peers = ["https://b.example.net", "https://[2001:db8::1]:444/derp"]
            [rate]
            bytes_per_second = 1000000
            burst_bytes = 200000
            [metrics]
            listen = "127.0.0.1:9589"
        "#;
        let settings = read(text).unwrap();
        assert_eq!((settings.workers, settings.connections_max), (3, 20_000));
        assert_eq!(settings.https.as_ref().map(|https| https.listen.len()), Some(2));
        assert_eq!((settings.bytes_per_second, settings.burst_bytes), (1_000_000, 200_000));
        let mates: Vec<String> = settings.mates().iter().map(ToString::to_string).collect();
        assert_eq!(mates, ["https://b.example.net:443", "https://[2001:db8::1]:444"]);
        assert_eq!(settings.metrics, "127.0.0.1:9589".parse().ok());
        let live = text.replace("\"/c\"", "\"/other\"").replace("1000000", "5");
        assert!(settings.same_after_reload(&read(&live).unwrap()));
        let fixed = text.replace("workers = 3", "workers = 4");
        assert!(!settings.same_after_reload(&read(&fixed).unwrap()));
    }

    #[test]
    fn slips_are_named_with_their_place_and_cure() {
        let shown = problems("schema = 1\n[http]\nlisten = [\"[::]:80\"]\nrelai = true\n");
        assert!(shown.contains("line 4, column 1: http.relai"), "{shown}");
        assert!(shown.contains("did you mean \"relay\"?"), "{shown}");
        let shown = problems("schema = 1\n[http]\nkeys_file = \"/x\"\n");
        assert!(shown.contains("it belongs to [admission]"), "{shown}");
        let shown = problems("schema = 1\n[htps]\n");
        assert!(shown.contains("did you mean \"https\"?"), "{shown}");
    }

    #[test]
    fn every_value_is_checked() {
        for (text, expected) in [
            ("", "schema = 1"),
            ("schema = 2", "the format version 1"),
            ("schema = 1", "nothing serves /derp"),
            ("schema = 1\n[relay]\nworkers = 0", "a number from 1 to 256"),
            ("schema = 1\n[http]\nrelay = 1", "true or false"),
            ("schema = 1\n[http]\nlisten = \"x\"", "a list of addresses"),
            ("schema = 1\n[stun]\nlisten = [\"x\"]", "an address with a port"),
            ("schema = 1\n[stun]\nlisten = [3]", "an address with a port"),
            ("schema = 1\n[https]\nlisten = []", "https.key_file: the key is missing"),
            ("schema = 1\n[rate]\nburst_bytes = 5", "a number from 131146"),
            ("schema = 1\n[acme]\nnames = [\"relay\"]", "a list of full DNS names"),
            ("schema = 1\n[acme]\nnames = [\"*.b.net\"]", "a list of full DNS names"),
            ("schema = 1\n[acme]\nnames = [\"b.net\"]", "terms_agreed = true"),
            ("schema = 1\n[acme]\ncontact = \"b\"", "a mail address"),
            ("schema = 1\n[acme]\ndirectory = \"http://b\"", "begins with https://"),
            (
                "schema = 1\n[acme]\nnames = [\"b.net\"]\nterms_agreed = true\n[https]\nlisten = []",
                "[http] listen, for port 80",
            ),
            (
                "schema = 1\n[acme]\nnames = [\"b.net\"]\nterms_agreed = true\n[https]\nkey_file = \"/k\"",
                "as [acme] gets the certificate",
            ),
            ("schema = 1\n[mesh]\npeers = []", "mesh.key_file: the key is missing"),
            ("schema = 1\n[mesh]\npeers = [\"b.example.net\"]", "URLs of relays"),
            ("schema = 1\n[metrics]\nlisten = 5", "a string"),
            ("schema = 1\nhttps = 5", "a table [https]"),
            ("schema = 1\n[admission]\nkeys_file = \"x\"", "a path that begins with /"),
            ("schema", "TOML"),
        ] {
            let shown = problems(text);
            assert!(shown.contains(expected), "{text}: {shown}");
        }
    }

    /// The reference and the reader know the same keys.
    #[test]
    fn every_key_of_the_reference_is_read() {
        for (table, key, ..) in KEYS {
            let shown = problems(&format!("schema = 1\n[{table}]\n{key} = 1979-05-27\n"));
            assert!(shown.contains(&format!("{table}.{key}: ")), "{table}.{key}: {shown}");
            assert!(!shown.contains("unknown"), "{shown}");
        }
    }
}
