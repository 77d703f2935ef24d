//! Reader of wg0.conf: the words of wg(8) and of wg-quick(8).

use ipnet::IpNet;

use crate::claims::Claims;
use crate::config::{Config, EndpointName, KeySource, Peer, Routes, is_interface_name, parse_net};
use crate::key::{KeyError, PublicKey, SecretKey};
use crate::limits;
use crate::problem::{Problem, Problems, nearest, quoted};

const INTERFACE_WORDS: [&str; 12] = [
    "PrivateKey",
    "ListenPort",
    "FwMark",
    "Address",
    "MTU",
    "Table",
    "DNS",
    "PreUp",
    "PostUp",
    "PreDown",
    "PostDown",
    "SaveConfig",
];
const PEER_WORDS: [&str; 5] =
    ["PublicKey", "PresharedKey", "AllowedIPs", "Endpoint", "PersistentKeepalive"];

impl Config {
    /// Reads wg0.conf for the interface `name`. What millrace does not do becomes a note.
    pub fn from_wg_quick(text: &str, name: &str) -> Result<Self, Problems> {
        let mut reader = Reader { config: Config::named(name), problems: Vec::new(), line: 0 };
        if !is_interface_name(name) {
            let expected = "1 to 15 printable characters without '/', ':' or '%'";
            reader.wrong("interface", &quoted(name), expected, "rename the file");
        }
        if text.len() > limits::CONFIG_BYTES_MAX {
            reader.wrong(
                "",
                "a very large file",
                "at most 16 MiB",
                "check that it is the right file",
            );
        } else {
            reader.lines(text);
        }
        if reader.problems.is_empty() {
            return Ok(reader.config);
        }
        Err(Problems::new(reader.problems))
    }
}

struct Reader {
    config: Config,
    problems: Vec<Problem>,
    /// From 1; 0 before the first line.
    line: usize,
}

/// A `[Peer]` while it is read; the key may stand on any of its lines.
struct PartialPeer {
    line: usize,
    public_key: Option<PublicKey>,
    rest: Peer,
}

enum Section {
    None,
    Interface,
    Peer(Box<PartialPeer>),
}

impl Reader {
    fn lines(&mut self, text: &str) {
        let mut section = Section::None;
        let mut claims = Claims::default();
        for (index, line) in text.lines().enumerate() {
            self.line = index + 1;
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            if line.starts_with('[') {
                let next = self.header(line);
                if let Section::Peer(peer) = std::mem::replace(&mut section, next) {
                    self.finish_peer(*peer, &mut claims);
                }
                continue;
            }
            let Some((word, value)) = line.split_once('=') else {
                // The line may be a key that lost its word: it is not repeated.
                self.wrong("", "a line without '='", "Word = value", "write one setting per line");
                continue;
            };
            let (word, value) = (word.trim(), value.trim());
            match &mut section {
                Section::None => {
                    let cure = "write [Interface] or [Peer] above it";
                    self.wrong(word, "it stands in no section", "a section", cure);
                }
                Section::Interface => self.interface(word, value),
                Section::Peer(peer) => self.peer(peer, word, value),
            }
        }
        if let Section::Peer(peer) = section {
            self.finish_peer(*peer, &mut claims);
        }
    }

    fn header(&mut self, line: &str) -> Section {
        if line.eq_ignore_ascii_case("[Interface]") {
            return Section::Interface;
        }
        if !line.eq_ignore_ascii_case("[Peer]") {
            self.wrong("", &quoted(line), "[Interface] or [Peer]", "correct the section's name");
            return Section::None;
        }
        if self.config.peers.len() == limits::PEERS_MAX {
            let expected = format!("at most {} peers", limits::PEERS_MAX);
            self.wrong("[Peer]", "one peer more", &expected, "use several interfaces");
        }
        let public_key = PublicKey([0; 32]);
        let rest = Peer {
            name: None,
            public_key,
            preshared_key: None,
            allowed_ips: Vec::new(),
            endpoint: None,
            keepalive_seconds: 0,
        };
        Section::Peer(Box::new(PartialPeer { line: self.line, public_key: None, rest }))
    }

    fn interface(&mut self, word: &str, value: &str) {
        match word.to_ascii_lowercase().as_str() {
            "privatekey" => {
                let key = self.secret(word, value);
                self.config.interface.private_key = key;
            }
            "listenport" => match value.parse() {
                Ok(port) => self.config.interface.listen_port = port,
                Err(_) => self.wrong(word, &quoted(value), "a port from 0 to 65535", PLAIN_NUMBER),
            },
            "fwmark" => match mark(value) {
                Some(mark) => self.config.interface.fwmark = mark,
                None => self.wrong(word, &quoted(value), "off, a number or 0x…", PLAIN_NUMBER),
            },
            "mtu" => match value.parse() {
                Ok(mtu) if (limits::MTU_MIN..=limits::MTU_MAX).contains(&mtu) => {
                    self.config.interface.mtu = Some(mtu);
                }
                _ => self.wrong(word, &quoted(value), "bytes from 576 to 65455", PLAIN_NUMBER),
            },
            "address" => {
                for net in self.nets(word, value) {
                    if !self.config.interface.address.contains(&net) {
                        self.config.interface.address.push(net);
                    }
                }
            }
            "table" => match value {
                "auto" => self.config.interface.routes = Routes::Auto,
                "off" => self.config.interface.routes = Routes::Off,
                _ => {
                    let cure = "write Table = off and add the routes to your table yourself";
                    self.wrong(word, &quoted(value), "auto or off", cure);
                }
            },
            "dns" => self.note("DNS is not set: millrace leaves the resolver alone"),
            "preup" | "postup" | "predown" | "postdown" => {
                self.note(&format!("the hook {word} is not run: millrace starts no commands"));
            }
            "saveconfig" => {
                self.note("SaveConfig is not done: `wg showconf` prints the state to save");
            }
            _ => self.unknown(word, "Interface", &INTERFACE_WORDS),
        }
    }

    fn peer(&mut self, peer: &mut PartialPeer, word: &str, value: &str) {
        match word.to_ascii_lowercase().as_str() {
            "publickey" => match PublicKey::from_base64(value) {
                Ok(key) if !key.is_zero() => peer.public_key = Some(key),
                Ok(_) => self.wrong(word, "the all-zero key", "a public key", ASK_OTHER_SIDE),
                Err(error) => self.wrong_key(word, error),
            },
            "presharedkey" => peer.rest.preshared_key = self.secret(word, value),
            "allowedips" => {
                for net in self.nets(word, value) {
                    let net = net.trunc();
                    if !peer.rest.allowed_ips.contains(&net) {
                        peer.rest.allowed_ips.push(net);
                    }
                }
            }
            "endpoint" => match EndpointName::parse(value) {
                Ok(endpoint) => peer.rest.endpoint = Some(endpoint),
                Err(expected) => {
                    self.wrong(word, &quoted(value), expected, "write host:port or [IPv6]:port");
                }
            },
            "persistentkeepalive" => match (value, value.parse()) {
                ("off", _) => peer.rest.keepalive_seconds = 0,
                (_, Ok(seconds)) => peer.rest.keepalive_seconds = seconds,
                _ => self.wrong(word, &quoted(value), "off or seconds to 65535", PLAIN_NUMBER),
            },
            _ => self.unknown(word, "Peer", &PEER_WORDS),
        }
    }

    fn finish_peer(&mut self, peer: PartialPeer, claims: &mut Claims) {
        let PartialPeer { line, public_key, mut rest } = peer;
        let here = std::mem::replace(&mut self.line, line);
        match public_key {
            None => self.wrong("PublicKey", "this [Peer] has none", "a public key", ASK_OTHER_SIDE),
            Some(public_key) => {
                rest.public_key = public_key;
                for (key, seen) in claims.add(&rest, &format!("the [Peer] of line {line}")) {
                    let (word, expected) = match key {
                        "allowed_ips" => ("AllowedIPs", "each prefix at one peer"),
                        _ => ("PublicKey", "every peer once"),
                    };
                    self.wrong(word, &seen, expected, "take it from one of the two");
                }
                self.config.peers.push(rest);
            }
        }
        self.line = here;
    }

    fn nets(&mut self, word: &str, value: &str) -> Vec<IpNet> {
        let mut nets = Vec::new();
        for text in value.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            match parse_net(text) {
                Ok(net) => nets.push(net),
                Err(expected) => {
                    self.wrong(word, &quoted(text), expected, "write prefixes with commas between");
                }
            }
        }
        nets
    }

    fn secret(&mut self, word: &str, value: &str) -> Option<KeySource> {
        match SecretKey::from_base64(value) {
            Ok(key) if key.is_zero() => None,
            Ok(key) => Some(KeySource::Inline(key)),
            Err(error) => {
                self.wrong_key(word, error);
                None
            }
        }
    }

    fn unknown(&mut self, word: &str, section: &str, known: &[&'static str]) {
        let cure = match nearest(word, known.iter().copied()) {
            Some(near) => format!("did you mean {near}?"),
            None => "delete the line".to_owned(),
        };
        let expected = format!("one of {}", known.join(", "));
        let shown: String = word.chars().take(40).collect();
        self.wrong(&shown, &format!("the word is unknown in [{section}]"), &expected, &cure);
    }

    fn note(&mut self, text: &str) {
        self.config.notes.push(format!("line {}: {text}", self.line));
    }

    fn wrong_key(&mut self, word: &str, error: KeyError) {
        let expected = "32 bytes in base64, 44 characters";
        self.wrong(word, &error.to_string(), expected, "copy the key again");
    }

    fn wrong(&mut self, word: &str, seen: &str, expected: &str, cure: &str) {
        self.problems.push(Problem {
            position: (self.line > 0).then_some((self.line, 1)),
            key: word.to_owned(),
            seen: seen.to_owned(),
            expected: expected.to_owned(),
            cure: cure.to_owned(),
        });
    }
}

const PLAIN_NUMBER: &str = "write a plain number";
const ASK_OTHER_SIDE: &str = "`wg show` on the other side prints it";

fn mark(value: &str) -> Option<u32> {
    match value.strip_prefix("0x") {
        _ if value == "off" => Some(0),
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "AnPqrHBUF916ovweo4Po8I0uoPG3/lt3uHcTYVh5ixY=";

    fn problems(text: &str) -> String {
        Config::from_wg_quick(text, "wg0").unwrap_err().to_string()
    }

    #[test]
    fn one_peer_more_than_fits_is_an_error() {
        let text = |peers: usize| {
            let sections = (0..peers).map(|number| {
                let mut key = [9; 32];
                key[..8].copy_from_slice(&number.to_le_bytes());
                format!("[Peer]\nPublicKey = {}\n", PublicKey(key).to_base64())
            });
            sections.collect::<String>()
        };
        let most = Config::from_wg_quick(&text(limits::PEERS_MAX), "wg0").unwrap();
        assert_eq!(most.peers.len(), limits::PEERS_MAX);
        let said = problems(&text(limits::PEERS_MAX + 2));
        assert!(
            said.contains("expected at most 16384 peers") && said.lines().count() == 1,
            "{said}"
        );
    }

    #[test]
    fn a_usual_file_is_read_and_what_is_not_done_is_told() {
        let text = format!(
            "[Interface] # ours\nPrivateKey = GMuIA7abyIPboMosOGzYHKl3j7wQytjjVVujTaC0Xm8=\n\
             address=10.0.0.1/24, fd00::1/64\nListenPort = 51820\nFwMark = 0xca6c\nMTU = 1400\n\
             Table = off\nDNS = 1.1.1.1\nPostUp = iptables -A X; echo a=b\n\n[peer]\n\
             AllowedIPs = 10.2.3.4/16, fd02::/64,10.9.0.1\nPublicKey = {KEY}\n\
             Endpoint = [2001:db8::1]:51820\nPersistentKeepalive = 25\n"
        );
        let config = Config::from_wg_quick(&text, "wg0").unwrap();
        let interface = &config.interface;
        assert_eq!((interface.listen_port, interface.fwmark), (51820, 0xca6c));
        assert_eq!((interface.mtu, interface.routes), (Some(1400), Routes::Off));
        assert_eq!(interface.address.len(), 2);
        assert!(matches!(&interface.private_key, Some(KeySource::Inline(key))
            if key.public_key().to_base64() == KEY));
        let peer = &config.peers[0];
        let nets: Vec<String> = peer.allowed_ips.iter().map(IpNet::to_string).collect();
        assert_eq!(nets, ["10.2.0.0/16", "fd02::/64", "10.9.0.1/32"]);
        assert_eq!(peer.endpoint.as_ref().unwrap().to_string(), "[2001:db8::1]:51820");
        assert_eq!(peer.keepalive_seconds, 25);
        assert_eq!(config.notes.len(), 2);
        assert!(config.notes[1].contains("PostUp is not run"), "{:?}", config.notes);
        assert!(!format!("{config:?}").contains("GMuIA7"), "a secret leaks through Debug");
    }

    #[test]
    fn each_defect_names_line_and_cure() {
        assert!(problems("[Interface]\nListenPrt = 1").contains("did you mean ListenPort?"));
        assert!(
            problems("ListenPort = 1").contains("line 1, column 1: ListenPort: it stands in no")
        );
        assert!(problems("[Peer]\nAllowedIPs = 10.0.0.0/33").contains("from 0 to 32"));
        let twice = format!("[Peer]\nPublicKey={KEY}\n[Peer]\nPublicKey={KEY}\n");
        assert!(problems(&twice).starts_with("line 3"), "{}", problems(&twice));
        let secret = "GMuIA7abyIPboMosOGzYHKl3j7wQytjjVVujTaC0Xm";
        let text = problems(&format!("[Interface]\nPrivateKey = {secret}\n{secret}\n"));
        assert!(text.contains("42 characters") && !text.contains(secret), "{text}");
    }

    proptest! {
        #[test]
        fn any_text_is_judged_without_panic(text: String, name: String) {
            drop(Config::from_wg_quick(&text, &name));
        }

        #[test]
        fn any_lines_of_known_words_are_judged_without_panic(
            lines in prop::collection::vec(
                (prop::sample::select(
                    [&INTERFACE_WORDS[..], &PEER_WORDS[..], &["[Peer]", "[Interface]"]].concat()
                ), "[ -~]{0,50}"), 0..20)
        ) {
            let text: String = lines.iter().map(|(word, value)| if word.starts_with('[') {
                format!("{word}\n")
            } else {
                format!("{word} = {value}\n")
            }).collect();
            drop(Config::from_wg_quick(&text, "wg0"));
        }
    }
}
