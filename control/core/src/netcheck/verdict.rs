//! One sentence of what will work, and the one change that would help most.

use super::{Report, TcpReport};
use crate::nat::{Filtering, Mapping};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub prospect: Prospect,
    /// What will work: a sentence.
    pub sentence: String,
    /// What would make it better: a sentence; none: nothing would.
    pub change: Option<String>,
}

/// How peers will be reached, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Prospect {
    /// Directly, whatever is in front of the peer.
    Open,
    /// Directly, unless the peer's NAT is a hard one.
    Easy,
    /// UDP passes; how the NAT maps is not known.
    Unknown,
    /// Directly only where the peer is open; else by relay.
    Hard,
    /// By relay only.
    RelayOnly,
    /// Not at all.
    Nothing,
}

impl Prospect {
    /// The word in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Easy => "easy",
            Self::Unknown => "unknown",
            Self::Hard => "hard",
            Self::RelayOnly => "relay_only",
            Self::Nothing => "nothing",
        }
    }
}

impl Report {
    pub fn verdict(&self) -> Verdict {
        let verdict = |prospect, sentence: &str, change: Option<&str>| Verdict {
            prospect,
            sentence: sentence.to_owned(),
            change: change.map(str::to_owned),
        };
        if !self.udp {
            return self.without_udp();
        }
        let mut verdict = match self.prospect_of_udp() {
            Prospect::Open => {
                verdict(Prospect::Open, "Peers reach this host directly, wherever they are.", None)
            }
            Prospect::Easy => verdict(
                Prospect::Easy,
                "Direct connections work to all peers but those behind hard NATs.",
                Some(self.change_of_easy()),
            ),
            Prospect::Hard => verdict(
                Prospect::Hard,
                "This NAT is hard: direct connections work only to peers that are open to \
                 anybody; the others are reached by relay.",
                Some(
                    "Turn on endpoint-independent mapping, NAT-PMP, PCP or UPnP on the router, or \
                     forward the tunnel's UDP port to this host.",
                ),
            ),
            _ => verdict(
                Prospect::Unknown,
                "UDP works; whether the NAT is an easy one is not known.",
                Some("Name a second STUN server at another address, so that both can be compared."),
            ),
        };
        if self.relays().next().is_some() && self.relays().all(|relay| !relay.is_usable()) {
            verdict.prospect = verdict.prospect.max(Prospect::Hard);
            verdict.sentence +=
                " No relay can be used: only peers with a configured endpoint are found.";
            verdict.change = Some(self.change_of_relays());
        }
        verdict
    }

    fn without_udp(&self) -> Verdict {
        let relay = self.nearest_relay().map(|(name, _)| name.to_owned());
        if let (Some(true), None) = (self.captive_portal, &relay) {
            return Verdict {
                prospect: Prospect::Nothing,
                sentence: "A captive portal answers in the relays' place; nothing else gets out."
                    .to_owned(),
                change: Some("Log in to this network with a browser.".to_owned()),
            };
        }
        if let Some(relay) = relay {
            return Verdict {
                prospect: Prospect::RelayOnly,
                sentence: format!("UDP is blocked: peers are reached only by relay ({relay})."),
                change: Some(
                    "Let this host send UDP to any address and port, and let the answers in; or \
                     at least to UDP port 3478."
                        .to_owned(),
                ),
            };
        }
        let change = if self.servers.is_empty() {
            "Name a relay or a STUN server to ask.".to_owned()
        } else if !self.ipv4.in_host && !self.ipv6.in_host {
            "This host has no address but local ones: bring its network up.".to_owned()
        } else {
            self.change_of_relays()
        };
        Verdict {
            prospect: Prospect::Nothing,
            sentence: "Nothing answers, neither by UDP nor by TCP: no peer will be reached."
                .to_owned(),
            change: Some(change),
        }
    }

    fn prospect_of_udp(&self) -> Prospect {
        let ipv4_open = self.filtering == Some(Filtering::EndpointIndependent)
            && matches!(self.mapping, Some(Mapping::None | Mapping::EndpointIndependent));
        if ipv4_open || self.port_mapping.mapped.is_some() {
            return Prospect::Open;
        }
        match self.mapping {
            Some(Mapping::None | Mapping::EndpointIndependent) => Prospect::Easy,
            Some(_) => Prospect::Hard,
            // IPv6 is not translated: a firewall at most.
            None if self.ipv4.global.is_none() => Prospect::Easy,
            None => Prospect::Unknown,
        }
    }

    fn change_of_easy(&self) -> &'static str {
        match self.mapping {
            None if self.ipv4.global.is_none() => {
                "Get an IPv4 address or NAT64: peers that have only IPv4 are reached by relay."
            }
            Some(Mapping::None) => "Let UDP to the tunnel's port in through the firewall.",
            _ => {
                "Turn on NAT-PMP, PCP or UPnP on the router, or forward the tunnel's UDP port: \
                 then peers behind hard NATs get in too."
            }
        }
    }

    /// What the first relay that failed says, or where to look.
    fn change_of_relays(&self) -> String {
        let failed = self.relays().find_map(|relay| match &relay.tcp {
            Some(TcpReport::Failed(seen)) => Some((&relay.name, seen)),
            _ => None,
        });
        match failed {
            Some((name, seen)) => {
                format!("Make the relay {name} reachable by TCP from here ({seen}).")
            }
            None => "Check this host's default route and firewall, and that the configured \
                     servers run."
                .to_owned(),
        }
    }
}
