//! Walks the parsed document and remembers what is wrong, with its position.

mod discovery;

use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;

use ipnet::IpNet;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::words::{AEAD, RECEIVE, TRANSMIT};
use crate::claims::Claims;
use crate::config::{
    Config, Dataplane, EndpointName, Interface, KeySource, Offload, Peer, Routes, Workers,
    is_interface_name, parse_net,
};
use crate::key::PublicKey;
use crate::limits;
use crate::problem::{Problem, nearest, position, quoted};
use crate::reference::{TABLES, names_in};

/// One pass over a document. A value that is wrong leaves a problem and stands for "absent".
pub(super) struct Reader<'t> {
    text: &'t str,
    pub(super) problems: Vec<Problem>,
}

/// One table of the document with the name it has in messages (`interface`, `peer[2]`).
struct Section<'d> {
    label: String,
    table: &'d DeTable<'d>,
    span: Range<usize>,
}

type Value<'d> = &'d Spanned<DeValue<'d>>;

impl Section<'_> {
    fn get(&self, key: &str) -> Option<Value<'_>> {
        self.table.get(key)
    }

    fn label_of(&self, key: &str) -> String {
        if self.label.is_empty() { key.to_owned() } else { format!("{}.{key}", self.label) }
    }
}

impl<'t> Reader<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, problems: Vec::new() }
    }

    pub(super) fn document(&mut self, document: &Spanned<DeTable<'_>>) -> Config {
        let top =
            Section { label: String::new(), table: document.get_ref(), span: document.span() };
        self.unknown_keys(&top, "", &TABLES);
        self.schema(&top);
        let mut config = Config::named("mr0");
        if let Some(section) = self.section(&top, "interface") {
            self.interface(&section, &mut config.interface);
        }
        if let Some(section) = self.section(&top, "dataplane") {
            self.dataplane(&section, &mut config.dataplane);
        }
        if let Some(section) = self.section(&top, "offload") {
            self.offload(&section, &mut config.offload);
        }
        if let Some(section) = self.section(&top, "discovery") {
            self.discovery(&section, &mut config.discovery);
        }
        self.peers(&top, &mut config.peers);
        config
    }

    fn schema(&mut self, top: &Section<'_>) {
        match top.get("schema") {
            None => self.problem(
                None,
                "schema".to_owned(),
                "the key is missing",
                "schema = 1",
                "write it on the first line",
            ),
            Some(value) => {
                if self.integer(top, "schema", 1..=1, "the format version 1").is_none() {
                    return;
                }
                debug_assert!(value.get_ref().is_integer());
            }
        }
    }

    fn interface(&mut self, section: &Section<'_>, interface: &mut Interface) {
        self.unknown_keys(section, "interface", &[]);
        if let Some(name) = self.string(section, "name") {
            if is_interface_name(&name) {
                interface.name = name;
            } else {
                let expected = "1 to 15 printable characters without '/', ':' or '%'";
                self.wrong(section, "name", &quoted(&name), expected, "choose a name like \"mr0\"");
            }
        }
        interface.private_key = self.file(section, "private_key_file");
        if let Some(port) =
            self.integer(section, "listen_port", 1..=65535, "a port from 1 to 65535")
        {
            interface.listen_port = port as u16;
        }
        interface.address = self.nets(section, "address", false);
        let range = u64::from(limits::MTU_MIN)..=u64::from(limits::MTU_MAX);
        let expected = format!("bytes from {} to {}", limits::MTU_MIN, limits::MTU_MAX);
        interface.mtu = self.integer(section, "mtu", range, &expected).map(|mtu| mtu as u16);
        if let Some(mark) =
            self.integer(section, "fwmark", 0..=u64::from(u32::MAX), "a mark of 32 bits")
        {
            interface.fwmark = mark as u32;
        }
        let routes = [("auto", Routes::Auto), ("off", Routes::Off)];
        interface.routes = self.word(section, "routes", &routes).unwrap_or_default();
    }

    fn dataplane(&mut self, section: &Section<'_>, dataplane: &mut Dataplane) {
        self.unknown_keys(section, "dataplane", &[]);
        dataplane.receive = self.word(section, "receive", &RECEIVE).unwrap_or_default();
        dataplane.transmit = self.word(section, "transmit", &TRANSMIT).unwrap_or_default();
        dataplane.aead = self.word(section, "aead", &AEAD).unwrap_or_default();
        for (name, span) in self.strings(section, "device") {
            if is_interface_name(&name) && !dataplane.device.contains(&name) {
                dataplane.device.push(name);
            } else {
                let expected = "names of network devices, each once";
                self.wrong_at(span, section, "device", &quoted(&name), expected, LIST_DEVICES);
            }
        }
        self.workers(section, &mut dataplane.workers);
    }

    fn workers(&mut self, section: &Section<'_>, workers: &mut Workers) {
        const EXPECTED: &str = "\"auto\" or a list of different cores like [2, 3]";
        const CURE: &str = "`lscpu --extended` lists the cores";
        let Some(value) = section.get("workers") else { return };
        let cores = match value.get_ref() {
            DeValue::String(word) if word == "auto" => return,
            DeValue::Array(items) => {
                items.iter().map(|item| integer_of(item.get_ref())).collect::<Option<Vec<u64>>>()
            }
            _ => None,
        };
        let cores: Option<Vec<usize>> =
            cores.map(|list| list.iter().map(|&c| c as usize).collect());
        let valid = |cores: &Vec<usize>| {
            let mut sorted = cores.clone();
            sorted.sort_unstable();
            sorted.dedup();
            (1..=limits::WORKERS_MAX).contains(&cores.len())
                && sorted.len() == cores.len()
                && sorted.iter().all(|&core| core <= limits::CORE_MAX)
        };
        match cores.filter(valid) {
            Some(cores) => *workers = Workers::Cores(cores),
            None => self.wrong(section, "workers", &self.source(value.span()), EXPECTED, CURE),
        }
    }

    fn offload(&mut self, section: &Section<'_>, offload: &mut Offload) {
        self.unknown_keys(section, "offload", &[]);
        for (key, switch) in [
            ("udp_gso", &mut offload.udp_gso),
            ("udp_gro", &mut offload.udp_gro),
            ("tun_tso", &mut offload.tun_tso),
            ("tun_uso", &mut offload.tun_uso),
            ("coalesce_tcp", &mut offload.coalesce_tcp),
            ("coalesce_udp", &mut offload.coalesce_udp),
        ] {
            *switch = self.word(section, key, &[("auto", true), ("off", false)]).unwrap_or(true);
        }
    }

    fn peers(&mut self, top: &Section<'_>, peers: &mut Vec<Peer>) {
        let Some(value) = top.get("peer") else { return };
        let DeValue::Array(items) = value.get_ref() else {
            let seen = self.source(value.span());
            self.wrong(top, "peer", &seen, "tables [[peer]]", "write [[peer]] above each peer");
            return;
        };
        if items.len() > limits::PEERS_MAX {
            let (seen, expected) =
                (format!("{} peers", items.len()), format!("at most {}", limits::PEERS_MAX));
            self.wrong(top, "peer", &seen, &expected, "use several interfaces");
        }
        let mut claims = Claims::default();
        for (index, item) in items.iter().take(limits::PEERS_MAX).enumerate() {
            let label = format!("peer[{}]", index + 1);
            let Some(table) = item.get_ref().as_table() else {
                let seen = self.source(item.span());
                self.problem(Some(item.span()), label, &seen, "a table", "write [[peer]] above it");
                continue;
            };
            let section = Section { label, table, span: item.span() };
            if let Some(peer) = self.peer(&section, &mut claims) {
                peers.push(peer);
            }
        }
    }

    fn peer(&mut self, section: &Section<'_>, claims: &mut Claims) -> Option<Peer> {
        self.unknown_keys(section, "peer", &[]);
        let name = self.string(section, "name").filter(|name| self.peer_name(section, name));
        let public_key = self.public_key(section);
        let preshared_key = self.file(section, "preshared_key_file");
        let allowed_ips = self.nets(section, "allowed_ips", true);
        let endpoint = self.string(section, "endpoint").and_then(|text| {
            EndpointName::parse(&text)
                .map_err(|expected| {
                    let cure = "write it like \"b.example.net:51820\" or \"[2001:db8::1]:51820\"";
                    self.wrong(section, "endpoint", &quoted(&text), expected, cure);
                })
                .ok()
        });
        let keepalive_seconds = self.keepalive(section);
        let public_key = public_key?;
        let peer =
            Peer { name, public_key, preshared_key, allowed_ips, endpoint, keepalive_seconds };
        for (key, seen) in claims.add(&peer, &section.label) {
            let (expected, cure) = match key {
                "allowed_ips" => ("each prefix at one peer", "take it from one of the two"),
                _ => ("every peer once", "join the two tables or correct one"),
            };
            self.wrong(section, key, &seen, expected, cure);
        }
        Some(peer)
    }

    fn peer_name(&mut self, section: &Section<'_>, name: &str) -> bool {
        let fits = (1..=limits::PEER_NAME_MAX).contains(&name.chars().count());
        let good = fits && !name.chars().any(|c| c.is_control() || c == ';');
        if !good {
            let expected = "1 to 63 characters without control characters or ';'";
            self.wrong(section, "name", &quoted(name), expected, "choose a shorter, plain name");
        }
        good
    }

    fn public_key(&mut self, section: &Section<'_>) -> Option<PublicKey> {
        const CURE: &str = "`wg show` or `millrace pubkey` on the other side prints it";
        if section.get("public_key").is_none() {
            let label = section.label_of("public_key");
            let span = Some(section.span.clone());
            self.problem(span, label, "the key is missing", "public_key = \"…\"", CURE);
            return None;
        }
        let text = self.string(section, "public_key")?;
        match PublicKey::from_base64(&text) {
            Ok(key) if !key.is_zero() => Some(key),
            Ok(_) => {
                self.wrong(section, "public_key", "the all-zero key", "a public key", CURE);
                None
            }
            Err(error) => {
                let expected = "32 bytes in base64, 44 characters";
                self.wrong(section, "public_key", &error.to_string(), expected, CURE);
                None
            }
        }
    }

    fn keepalive(&mut self, section: &Section<'_>) -> u16 {
        let Some(text) = self.string(section, "keepalive") else { return 0 };
        match keepalive_seconds(&text) {
            Some(seconds) => seconds,
            None => {
                let expected = "\"off\" or whole seconds or minutes up to 65535s, like \"25s\"";
                self.wrong(section, "keepalive", &quoted(&text), expected, "25s suits most NATs");
                0
            }
        }
    }

    // Values of one shape. Each reports what it does not like and then stands for "absent".

    fn section<'d>(&mut self, top: &'d Section<'_>, name: &str) -> Option<Section<'d>> {
        let value = top.get(name)?;
        match value.get_ref().as_table() {
            Some(table) => Some(Section { label: name.to_owned(), table, span: value.span() }),
            None => {
                let (seen, expected) = (self.source(value.span()), format!("a table [{name}]"));
                self.wrong(
                    top,
                    name,
                    &seen,
                    &expected,
                    "write the name in brackets on its own line",
                );
                None
            }
        }
    }

    fn string(&mut self, section: &Section<'_>, key: &str) -> Option<String> {
        let value = section.get(key)?;
        match value.get_ref() {
            DeValue::String(text) => Some(text.clone().into_owned()),
            _ => {
                let seen = self.source(value.span());
                self.wrong(section, key, &seen, "a string", "put the value in double quotes");
                None
            }
        }
    }

    fn strings(&mut self, section: &Section<'_>, key: &str) -> Vec<(String, Range<usize>)> {
        let Some(value) = section.get(key) else { return Vec::new() };
        let items = match value.get_ref() {
            DeValue::Array(items) => items
                .iter()
                .map(|item| Some((item.get_ref().as_str()?.to_owned(), item.span())))
                .collect::<Option<Vec<_>>>(),
            _ => None,
        };
        items.unwrap_or_else(|| {
            let seen = self.source(value.span());
            self.wrong(section, key, &seen, "a list of strings", "write it like [\"…\", \"…\"]");
            Vec::new()
        })
    }

    /// A list of at most `max` different values that are written as strings.
    fn parsed<T: PartialEq>(
        &mut self,
        section: &Section<'_>,
        key: &str,
        max: usize,
        cure: &str,
        parse: impl Fn(&str) -> Result<T, &'static str>,
    ) -> Vec<T> {
        let mut values = Vec::new();
        for (text, span) in self.strings(section, key) {
            match parse(&text) {
                Ok(value) if values.contains(&value) => {
                    let seen = format!("{text} twice");
                    self.wrong_at(span, section, key, &seen, "each once", "delete one of them");
                }
                Ok(_) if values.len() == max => {
                    let expected = format!("at most {max}");
                    self.wrong_at(span, section, key, "too many", &expected, "keep the nearest");
                    break;
                }
                Ok(value) => values.push(value),
                Err(expected) => {
                    self.wrong_at(span, section, key, &quoted(&text), expected, cure);
                }
            }
        }
        values
    }

    fn integer(
        &mut self,
        section: &Section<'_>,
        key: &str,
        range: RangeInclusive<u64>,
        expected: &str,
    ) -> Option<u64> {
        let value = section.get(key)?;
        let integer = integer_of(value.get_ref()).filter(|number| range.contains(number));
        if integer.is_none() {
            let seen = self.source(value.span());
            self.wrong(section, key, &seen, expected, "write a plain number without quotes");
        }
        integer
    }

    fn word<T: Copy>(
        &mut self,
        section: &Section<'_>,
        key: &str,
        words: &[(&str, T)],
    ) -> Option<T> {
        let text = self.string(section, key)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|&(_, value)| value);
        if found.is_none() {
            let list: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
            let cure = match nearest(&text, words.iter().map(|&(word, _)| word)) {
                Some(word) => format!("did you mean {word:?}?"),
                None => "choose one of them".to_owned(),
            };
            self.wrong(section, key, &quoted(&text), &list.join(" or "), &cure);
        }
        found
    }

    fn file(&mut self, section: &Section<'_>, key: &str) -> Option<KeySource> {
        let cure = "put the key into a file of mode 0600 and write its path here";
        self.path(section, key, cure).map(KeySource::File)
    }

    fn path(&mut self, section: &Section<'_>, key: &str, cure: &str) -> Option<PathBuf> {
        let path = self.string(section, key)?;
        if path.starts_with('/') {
            return Some(PathBuf::from(path));
        }
        // What stands here may be the secret itself: it is never repeated.
        self.wrong(section, key, "no absolute path", "a path that begins with /", cure);
        None
    }

    /// `prefixes`: host bits are a slip; otherwise they are the host's own address.
    fn nets(&mut self, section: &Section<'_>, key: &str, prefixes: bool) -> Vec<IpNet> {
        let mut nets: Vec<IpNet> = Vec::new();
        for (text, span) in self.strings(section, key) {
            match parse_net(&text) {
                Ok(net) if prefixes && net.trunc() != net => {
                    let cure = format!("write \"{}\"", net.trunc());
                    let expected = "a prefix without host bits";
                    self.wrong_at(span, section, key, &quoted(&text), expected, &cure);
                }
                Ok(net) if nets.contains(&net) => {
                    let seen = format!("{text} twice");
                    self.wrong_at(span, section, key, &seen, "each once", "delete one of them");
                }
                Ok(net) => nets.push(net),
                Err(expected) => {
                    let cure = "write it like \"10.2.0.0/16\"";
                    self.wrong_at(span, section, key, &quoted(&text), expected, cure);
                }
            }
        }
        nets
    }

    fn unknown_keys(&mut self, section: &Section<'_>, table: &'static str, more: &[&'static str]) {
        for key in section.table.keys() {
            let name = key.get_ref().as_ref();
            let known = || names_in(table).chain(more.iter().copied());
            if known().any(|known| known == name) {
                continue;
            }
            let elsewhere = TABLES.iter().find(|other| names_in(other).any(|known| known == name));
            let cure = match (nearest(name, known()), elsewhere) {
                (_, Some(other)) => format!("it belongs to [{other}]"),
                (Some(near), None) => format!("did you mean {near:?}?"),
                (None, None) => "delete it, or see the reference in operations.md".to_owned(),
            };
            let list: Vec<&str> = known().collect();
            let expected = format!("one of {}", list.join(", "));
            let label = section.label_of(name);
            self.problem(Some(key.span()), label, "the key is unknown", &expected, &cure);
        }
    }

    // Reports.

    fn wrong(&mut self, section: &Section<'_>, key: &str, seen: &str, expected: &str, cure: &str) {
        let span = section.get(key).map_or_else(|| section.span.clone(), |value| value.span());
        self.wrong_at(span, section, key, seen, expected, cure);
    }

    fn wrong_at(
        &mut self,
        span: Range<usize>,
        section: &Section<'_>,
        key: &str,
        seen: &str,
        expected: &str,
        cure: &str,
    ) {
        self.problem(Some(span), section.label_of(key), seen, expected, cure);
    }

    fn problem(
        &mut self,
        span: Option<Range<usize>>,
        key: String,
        seen: &str,
        expected: &str,
        cure: &str,
    ) {
        self.problems.push(Problem {
            position: span.map(|span| position(self.text, span.start)),
            key,
            seen: seen.to_owned(),
            expected: expected.to_owned(),
            cure: cure.to_owned(),
        });
    }

    /// The text of a value as the file has it.
    fn source(&self, span: Range<usize>) -> String {
        quoted(self.text.get(span).unwrap_or_default())
    }
}

const LIST_DEVICES: &str = "`ip link` lists the devices";

fn integer_of(value: &DeValue<'_>) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn keepalive_seconds(text: &str) -> Option<u16> {
    if text == "off" {
        return Some(0);
    }
    let (number, factor) = match (text.strip_suffix('s'), text.strip_suffix('m')) {
        (Some(number), _) => (number, 1),
        (_, Some(number)) => (number, 60),
        _ => return None,
    };
    if !number.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let seconds = number.parse::<u64>().ok()?.checked_mul(factor)?;
    (1..=limits::KEEPALIVE_SECONDS_MAX).contains(&seconds).then_some(seconds as u16)
}
