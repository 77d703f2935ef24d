//! SSDP (UPnP Device Architecture 2.0, section 1): asking a router where its description is.

use std::net::Ipv4Addr;

use super::http::{self, Place};
use crate::limits::UPNP_HEADERS_MAX;
use crate::portmap::Refused;

/// Port and group to which searches go.
pub(super) const PORT: u16 = 1900;
pub(super) const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 255, 250);

/// A search for routers, and one for anything: some routers answer only the second.
pub fn searches() -> [Vec<u8>; 2] {
    ["urn:schemas-upnp-org:device:InternetGatewayDevice:1", "ssdp:all"].map(|target| {
        format!(
            "M-SEARCH * HTTP/1.1\r\nHOST: {GROUP}:{PORT}\r\nST: {target}\r\n\
             MAN: \"ssdp:discover\"\r\nMX: 1\r\n\r\n"
        )
        .into_bytes()
    })
}

/// What a router says to a search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) description: Place,
    /// Another number after each start of the router's UPnP, from routers of UPnP 1.1 on.
    pub(super) boot: Option<u32>,
}

/// Reads an answer from `router`. A description elsewhere is refused: an answer must not be able to
/// send us to other hosts.
pub(super) fn parse(bytes: &[u8], router: Ipv4Addr) -> Result<Found, Refused> {
    let mut headers = [httparse::EMPTY_HEADER; UPNP_HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    match head.parse(bytes) {
        Ok(httparse::Status::Complete(_)) if head.code == Some(200) => {}
        _ => return Err(Refused::Ssdp),
    }
    let location = http::header(head.headers, "location").ok_or(Refused::Ssdp)?;
    let description = Place::parse(location)?;
    if *description.at.ip() != router {
        return Err(Refused::UrlElsewhere);
    }
    let boot = http::header(head.headers, "bootid.upnp.org").and_then(|boot| boot.parse().ok());
    Ok(Found { description, boot })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

    fn answer(location: &str) -> Result<Found, Refused> {
        let text = format!(
            "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: upnp:rootdevice\r\nEXT:\r\n\
             Server: x\r\nLocation: {location}\r\nBOOTID.UPNP.ORG: 17\r\n\r\n"
        );
        parse(text.as_bytes(), ROUTER)
    }

    #[test]
    fn the_description_is_on_the_router_itself() {
        let found = answer("http://192.168.1.1:5000/rootDesc.xml").unwrap();
        assert_eq!(found.boot, Some(17));
        assert_eq!(found.description.path, "/rootDesc.xml");
        assert_eq!(answer("http://192.168.1.2:5000/rootDesc.xml"), Err(Refused::UrlElsewhere));
        assert_eq!(answer("http://127.0.0.1:80/"), Err(Refused::UrlElsewhere));
        assert_eq!(answer("http://router/"), Err(Refused::Url));
    }

    #[test]
    fn what_is_no_answer_to_a_search_is_refused() {
        for text in [
            "",
            "NOTIFY * HTTP/1.1\r\nLocation: http://192.168.1.1/\r\n\r\n",
            "HTTP/1.1 200 OK\r\nST: x\r\n\r\n",
            "HTTP/1.1 404 No\r\nLocation: http://192.168.1.1/\r\n\r\n",
            "HTTP/1.1 200 OK\r\nLocation: http://192.168.1.1/\r\n",
        ] {
            assert_eq!(parse(text.as_bytes(), ROUTER), Err(Refused::Ssdp), "{text}");
        }
    }
}
