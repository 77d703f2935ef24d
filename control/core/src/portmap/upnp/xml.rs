//! What is read of a router's XML: which services it has, and what an action came to.

use std::net::Ipv4Addr;

use roxmltree::{Document, Node, ParsingOptions};

use super::http::Place;
use crate::limits::{UPNP_NODES_MAX, UPNP_SERVICES_MAX};
use crate::portmap::Refused;

/// A service that maps ports, in the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ServiceKind {
    /// May choose another port itself where one is taken.
    WanIp2,
    WanIp1,
    WanPpp1,
}

impl ServiceKind {
    const ALL: [Self; 3] = [Self::WanIp2, Self::WanIp1, Self::WanPpp1];

    /// As it is written in descriptions and requests.
    pub(super) fn urn(self) -> &'static str {
        match self {
            Self::WanIp2 => "urn:schemas-upnp-org:service:WANIPConnection:2",
            Self::WanIp1 => "urn:schemas-upnp-org:service:WANIPConnection:1",
            Self::WanPpp1 => "urn:schemas-upnp-org:service:WANPPPConnection:1",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) kind: ServiceKind,
    pub(super) control: Place,
}

/// The services of a description, the best first.
pub(super) fn services(text: &str, description: &Place) -> Result<Vec<Service>, Refused> {
    let document = document(text)?;
    let root = document.root_element();
    // UPnP 1.0 may name another base, with the port of the control server.
    let base = match text_of(root, "URLBase") {
        Some(base) if !base.is_empty() => on_router(base, description)?,
        _ => description.clone(),
    };
    let mut found = Vec::new();
    for node in root.descendants().filter(|node| node.tag_name().name() == "service") {
        let kind = text_of(node, "serviceType")
            .and_then(|urn| ServiceKind::ALL.into_iter().find(|kind| kind.urn() == urn));
        let (Some(kind), Some(url)) = (kind, text_of(node, "controlURL")) else { continue };
        let control =
            if url.contains("://") { on_router(url, description)? } else { base.with_path(url)? };
        if found.len() == UPNP_SERVICES_MAX {
            return Err(Refused::Xml);
        }
        found.push(Service { kind, control });
    }
    found.sort_by_key(|service| service.kind);
    Ok(found)
}

/// What an action came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ActionAnswer {
    /// `UPnPError` of a fault.
    pub(super) error: Option<u16>,
    pub(super) external_address: Option<Ipv4Addr>,
    pub(super) reserved_port: Option<u16>,
}

pub(super) fn action_answer(text: &str) -> Result<ActionAnswer, Refused> {
    let document = document(text)?;
    let root = document.root_element();
    fn number<T: std::str::FromStr>(root: Node<'_, '_>, name: &str) -> Option<T> {
        let node = root.descendants().find(|node| node.tag_name().name() == name)?;
        node.text()?.trim().parse().ok()
    }
    Ok(ActionAnswer {
        error: number(root, "errorCode"),
        external_address: number(root, "NewExternalIPAddress"),
        reserved_port: number(root, "NewReservedPort"),
    })
}

/// A URL that must be the router's own.
fn on_router(url: &str, description: &Place) -> Result<Place, Refused> {
    let place = Place::parse(url)?;
    if place.at.ip() != description.at.ip() {
        return Err(Refused::UrlElsewhere);
    }
    Ok(place)
}

/// The text of a child, whatever its namespace: routers are loose with these.
fn text_of<'d>(node: Node<'d, '_>, name: &str) -> Option<&'d str> {
    let child = node.children().find(|child| child.tag_name().name() == name)?;
    Some(child.text().unwrap_or_default().trim())
}

/// No DTD and so no entities of its own, bounded in nodes; the reader bounds its length. The parser
/// does not recurse, so depth is no danger.
fn document(text: &str) -> Result<Document<'_>, Refused> {
    let options = ParsingOptions { nodes_limit: UPNP_NODES_MAX, ..ParsingOptions::default() };
    let text = text.trim_start_matches('\u{feff}').trim();
    Document::parse_with_options(text, options).map_err(|_| Refused::Xml)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Place {
        Place::parse("http://192.168.1.1:5000/root.xml").unwrap()
    }

    fn device(base: &str, services: &[(&str, &str)]) -> String {
        let services: String = services
            .iter()
            .map(|(kind, url)| {
                format!(
                    "<service><serviceType>{kind}</serviceType><serviceId>x</serviceId>\
                     <controlURL>{url}</controlURL><SCPDURL>/x.xml</SCPDURL></service>"
                )
            })
            .collect();
        format!(
            "\u{feff}<?xml version=\"1.0\"?>\n\
             <root xmlns=\"urn:schemas-upnp-org:device-1-0\">{base}<device><deviceList><device>\
             <serviceList>{services}</serviceList></device></deviceList></device></root>\n"
        )
    }

    #[test]
    fn the_best_service_comes_first() {
        let [two, one, ppp] = ServiceKind::ALL.map(ServiceKind::urn);
        let text = device(
            "",
            &[(ppp, "/ppp"), ("urn:x", "/x"), (one, "ip"), (two, "http://192.168.1.1:80/two")],
        );
        let found = services(&text, &description()).unwrap();
        let urls: Vec<String> = found
            .iter()
            .map(|service| format!("{}{}", service.control.at, service.control.path))
            .collect();
        assert_eq!(urls, ["192.168.1.1:80/two", "192.168.1.1:5000/ip", "192.168.1.1:5000/ppp"]);
        let text = device("<URLBase>http://192.168.1.1:49000/</URLBase>", &[(one, "/ip")]);
        let found = services(&text, &description()).unwrap();
        assert_eq!(found[0].control.at.port(), 49000);
    }

    #[test]
    fn no_service_sends_us_elsewhere() {
        let one = ServiceKind::WanIp1.urn();
        for text in [
            device("<URLBase>http://192.168.1.2:49000/</URLBase>", &[(one, "/ip")]),
            device("", &[(one, "http://127.0.0.1/ip")]),
        ] {
            assert_eq!(services(&text, &description()), Err(Refused::UrlElsewhere), "{text}");
        }
        let split = device("", &[(one, "/ip HTTP/1.1&#13;&#10;X: y")]);
        assert_eq!(services(&split, &description()), Err(Refused::Url));
    }

    #[test]
    fn xml_is_bounded() {
        let deep = "<a>".repeat(10_000);
        assert_eq!(action_answer(&deep), Err(Refused::Xml));
        let deep = format!("{}{}", "<a>".repeat(4_000), "</a>".repeat(4_000));
        assert_eq!(action_answer(&deep), Ok(ActionAnswer::default()));
        let wide = format!("<a>{}</a>", "<b/>".repeat(6_000));
        assert_eq!(action_answer(&wide), Err(Refused::Xml));
        let entities = "<!DOCTYPE a [<!ENTITY x SYSTEM \"file:///etc/passwd\">]><a>&x;</a>";
        assert_eq!(action_answer(entities), Err(Refused::Xml));
        let many = vec![(ServiceKind::WanIp1.urn(), "/ip"); UPNP_SERVICES_MAX + 1];
        assert_eq!(services(&device("", &many), &description()), Err(Refused::Xml));
    }

    #[test]
    fn answers_are_read_whatever_their_prefixes() {
        let fault = "<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\"><s:Body><s:Fault>\
            <faultcode>s:Client</faultcode><detail><UPnPError xmlns=\"urn:x\">\
            <errorCode> 718 </errorCode></UPnPError></detail></s:Fault></s:Body></s:Envelope>";
        assert_eq!(action_answer(fault).unwrap().error, Some(718));
        let address = "<e:Envelope xmlns:e=\"x\"><u:R xmlns:u=\"y\">\
            <NewExternalIPAddress>192.0.2.1</NewExternalIPAddress></u:R></e:Envelope>";
        let answer = action_answer(address).unwrap();
        assert_eq!(answer.external_address, Some(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(answer.error, None);
        let port = "<R><NewReservedPort>99999</NewReservedPort></R>";
        assert_eq!(action_answer(port).unwrap().reserved_port, None);
    }
}
