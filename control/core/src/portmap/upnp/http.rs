//! HTTP as far as a router's UPnP needs it: one request a connection, one answer of bounded length.

use std::net::SocketAddrV4;

use crate::limits::{UPNP_ANSWER_LEN_MAX, UPNP_HEADERS_MAX, UPNP_PATH_LEN_MAX};
use crate::portmap::Refused;

/// Where something is on a router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) at: SocketAddrV4,
    /// Begins with a slash; visible ASCII only, so that it cannot end the request's line.
    pub(super) path: String,
}

impl Place {
    /// Reads a URL with an address for its host, as UPnP writes it.
    pub(super) fn parse(url: &str) -> Result<Self, Refused> {
        let scheme_len = "http://".len();
        let scheme = url.get(..scheme_len).ok_or(Refused::Url)?;
        if !scheme.eq_ignore_ascii_case("http://") {
            return Err(Refused::Url);
        }
        let rest = &url[scheme_len..];
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let at = match authority.split_once(':') {
            Some(_) => authority.parse().ok(),
            None => authority.parse().ok().map(|ip| SocketAddrV4::new(ip, 80)),
        };
        let at = at.filter(|at| at.port() != 0).ok_or(Refused::Url)?;
        Self { at, path: String::new() }.with_path(if path.is_empty() { "/" } else { path })
    }

    /// Another path of the same router.
    pub(super) fn with_path(&self, path: &str) -> Result<Self, Refused> {
        let slash = if path.starts_with('/') { "" } else { "/" };
        let visible = path.bytes().all(|byte| byte.is_ascii_graphic());
        if !visible || path.len() >= UPNP_PATH_LEN_MAX {
            return Err(Refused::Url);
        }
        Ok(Self { at: self.at, path: format!("{slash}{path}") })
    }

    /// A request for what is there.
    pub(super) fn get(&self) -> Vec<u8> {
        let Self { at, path } = self;
        format!("GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n").into_bytes()
    }

    /// A request to do something there.
    pub(super) fn post(&self, action: &str, body: &str) -> Vec<u8> {
        let Self { at, path } = self;
        format!(
            "POST {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\
             Content-Type: text/xml; charset=\"utf-8\"\r\nSOAPAction: \"{action}\"\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: String,
}

/// Gathers an answer as it arrives.
#[derive(Clone, Debug, Default)]
pub(super) struct Reader {
    bytes: Vec<u8>,
}

impl Reader {
    /// The answer, if it is whole with these bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Option<Answer>, Refused> {
        if self.bytes.len() + bytes.len() > UPNP_ANSWER_LEN_MAX {
            return Err(Refused::HttpLong);
        }
        self.bytes.extend_from_slice(bytes);
        self.read(false)
    }

    /// The answer, if the router's end of the connection ends it.
    pub(super) fn end(&self) -> Result<Answer, Refused> {
        self.read(true)?.ok_or(Refused::HttpTruncated)
    }

    fn read(&self, at_end: bool) -> Result<Option<Answer>, Refused> {
        let mut headers = [httparse::EMPTY_HEADER; UPNP_HEADERS_MAX];
        let mut head = httparse::Response::new(&mut headers);
        let head_len = match head.parse(&self.bytes) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(Refused::HttpMalformed),
        };
        let status = head.code.ok_or(Refused::HttpMalformed)?;
        let rest = &self.bytes[head_len..];
        let body = if let Some(coding) = header(head.headers, "transfer-encoding") {
            if !coding.eq_ignore_ascii_case("chunked") {
                return Err(Refused::HttpMalformed);
            }
            unchunk(rest)?
        } else if let Some(length) = header(head.headers, "content-length") {
            let length: usize = length.parse().map_err(|_| Refused::HttpMalformed)?;
            rest.get(..length).map(<[u8]>::to_vec)
        } else {
            at_end.then(|| rest.to_vec())
        };
        let Some(body) = body else { return Ok(None) };
        // Names and numbers are all that is read; what else is in there may be in any encoding.
        let body = String::from_utf8_lossy(&body).into_owned();
        Ok(Some(Answer { status, body }))
    }
}

/// The value of a header, trimmed.
pub(super) fn header<'h>(headers: &[httparse::Header<'h>], name: &str) -> Option<&'h str> {
    let header = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
    std::str::from_utf8(header.value).ok().map(str::trim)
}

/// The body of all chunks; `None` while the last is not there.
fn unchunk(mut rest: &[u8]) -> Result<Option<Vec<u8>>, Refused> {
    let mut body = Vec::new();
    loop {
        let (head_len, size) = match httparse::parse_chunk_size(rest) {
            Ok(httparse::Status::Complete(head)) => head,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(Refused::HttpMalformed),
        };
        if size == 0 {
            // Trailers say nothing that we want.
            return Ok(Some(body));
        }
        let size = usize::try_from(size).ok().filter(|size| *size <= UPNP_ANSWER_LEN_MAX);
        let size = size.ok_or(Refused::HttpLong)?;
        let Some(chunk) = rest.get(head_len..head_len + size) else { return Ok(None) };
        body.extend_from_slice(chunk);
        let Some(end) = rest.get(head_len + size..head_len + size + 2) else { return Ok(None) };
        if end != b"\r\n" {
            return Err(Refused::HttpMalformed);
        }
        rest = &rest[head_len + size + 2..];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Answer, Refused> {
        let mut reader = Reader::default();
        match reader.push(bytes)? {
            Some(answer) => Ok(answer),
            None => reader.end(),
        }
    }

    #[test]
    fn urls_are_read() {
        let place = |at: &str, path: &str| Ok(Place { at: at.parse().unwrap(), path: path.into() });
        assert_eq!(
            Place::parse("http://192.0.2.1:5000/root.xml"),
            place("192.0.2.1:5000", "/root.xml")
        );
        assert_eq!(Place::parse("HTTP://192.0.2.1"), place("192.0.2.1:80", "/"));
        let control = Place::parse("http://192.0.2.1/x").unwrap().with_path("ctl/IPConn");
        assert_eq!(control, place("192.0.2.1:80", "/ctl/IPConn"));
        let long = format!("http://192.0.2.1/{}", "x".repeat(300));
        for bad in [
            "",
            "http:/",
            "https://192.0.2.1/",
            "http://router/",
            "http://user@192.0.2.1/",
            "http://192.0.2.1:0/",
            "http://192.0.2.1:99999/",
            "http://192.0.2.1/a b",
            "http://192.0.2.1/\r\nEvil: 1",
            "http://[2001:db8::1]/",
            "htt\u{e9}://",
            &long,
        ] {
            assert_eq!(Place::parse(bad), Err(Refused::Url), "{bad}");
        }
    }

    #[test]
    fn answers_end_by_length_chunks_or_the_connection() {
        let answer = Answer { status: 200, body: "hello".into() };
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\ncontent-length:  5 \r\n\r\nhello and more",
            "HTTP/1.0 200 OK\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
        ] {
            assert_eq!(read(text.as_bytes()), Ok(answer.clone()), "{text}");
        }
        for (text, why) in [
            ("", Refused::HttpTruncated),
            ("HTTP/1.1 200 OK\r\n", Refused::HttpTruncated),
            ("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello", Refused::HttpTruncated),
            ("HTTP/1.1 200 OK\r\nContent-Length: -6\r\n\r\nhello", Refused::HttpMalformed),
            ("SSH-2.0-OpenSSH_9.2\r\n", Refused::HttpMalformed),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", Refused::HttpMalformed),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello",
                Refused::HttpMalformed,
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\nhello",
                Refused::HttpLong,
            ),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
                Refused::HttpTruncated,
            ),
        ] {
            assert_eq!(read(text.as_bytes()), Err(why), "{text}");
        }
    }

    #[test]
    fn an_answer_without_end_is_cut_off() {
        let mut reader = Reader::default();
        assert_eq!(reader.push(b"HTTP/1.1 200 OK\r\n\r\n"), Ok(None));
        let mut pushed = 0;
        let refused = loop {
            match reader.push(&[b'x'; 1000]) {
                Ok(None) => pushed += 1000,
                other => break other,
            }
        };
        assert_eq!(refused, Err(Refused::HttpLong));
        assert!(pushed <= UPNP_ANSWER_LEN_MAX);
    }

    proptest! {
        #[test]
        fn pieces_say_what_the_whole_says(body in "[ -~]{0,200}", cut in 0_usize..300) {
            let chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
            let chunked = if body.is_empty() { "0\r\n\r\n" } else { &chunks };
            for text in [
                format!("HTTP/1.1 500 No\r\nContent-Length: {}\r\n\r\n{body}", body.len()),
                format!("HTTP/1.1 500 No\r\nTransfer-Encoding: Chunked\r\n\r\n{chunked}"),
            ] {
                let (first, rest) = text.as_bytes().split_at(cut.min(text.len()));
                let mut reader = Reader::default();
                let answer = match reader.push(first).unwrap() {
                    Some(answer) => Some(answer),
                    None => reader.push(rest).unwrap(),
                };
                prop_assert_eq!(answer, Some(Answer { status: 500, body: body.clone() }));
            }
        }
    }
}
