//! The few HTTP requests that a relay answers, as bytes to bytes.

use millrace_path::derp::VERSION;
use millrace_path::sealed::PublicKey;

use crate::limits;

/// Where an ACME server looks (RFC 8555 section 8.3).
const CHALLENGE: &str = "/.well-known/acme-challenge/";

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To be upgraded; with a fast start the client does not wait for our 101.
    Relay { fast_start: bool },
    /// Latency over HTTP.
    Probe,
    /// Whether somebody between rewrites answers; the challenge is repeated.
    NoContent { challenge: Option<String> },
    /// An ACME server's look.
    Challenge { token: String },
    /// A browser's look.
    Page,
    /// /derp without an upgrade that we know.
    NoUpgrade,
    /// A method that only reads must be used.
    Method,
    /// Nothing lives there.
    Missing,
}

/// One request whose head is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub asked: Asked,
    /// HEAD: an answer without a body.
    pub head_only: bool,
    /// The client closes the connection after the answer, or we must.
    pub last: bool,
}

/// Why the bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("not an HTTP/1 request")]
    Syntax,
    #[error("a request head above {} bytes", limits::REQUEST_MAX)]
    TooLong,
}

impl Request {
    /// Reads one request off the front of `bytes`; with it, its length. None while it is not whole.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, RequestError> {
        let mut headers = [httparse::EMPTY_HEADER; limits::HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        let head = &bytes[..bytes.len().min(limits::REQUEST_MAX)];
        let len = match request.parse(head) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) if head.len() < limits::REQUEST_MAX => return Ok(None),
            Ok(httparse::Status::Partial) => return Err(RequestError::TooLong),
            Err(_) => return Err(RequestError::Syntax),
        };
        let header = |name: &str| {
            let found = request.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
            found.and_then(|header| str::from_utf8(header.value).ok()).map(str::trim)
        };
        let method = request.method.unwrap_or_default();
        let target = request.path.unwrap_or_default();
        // Tailscale's Rust client sends the absolute form, which a server must accept (RFC 9112
        // section 3.2.2).
        let target = match target.split_once("://") {
            Some((_, rest)) => rest.find('/').map_or("/", |slash| &rest[slash..]),
            None => target,
        };
        let path = target.split('?').next().unwrap_or_default();
        let upgrade = header("upgrade").is_some_and(|to| to.eq_ignore_ascii_case("derp"));
        let asked = match path {
            // The same client asks by POST; derper takes any method here.
            "/derp" if upgrade && ["GET", "HEAD", "POST"].contains(&method) => {
                Asked::Relay { fast_start: header("derp-fast-start") == Some("1") }
            }
            _ if method != "GET" && method != "HEAD" => Asked::Method,
            "/derp" => Asked::NoUpgrade,
            "/derp/probe" | "/derp/latency-check" => Asked::Probe,
            "/generate_204" => Asked::NoContent {
                challenge: header("x-tailscale-challenge").filter(|c| is_plain(c)).map(Into::into),
            },
            "/" => Asked::Page,
            _ if path.starts_with(CHALLENGE) => {
                Asked::Challenge { token: path[CHALLENGE.len()..].to_owned() }
            }
            _ => Asked::Missing,
        };
        // A body would be the next request to us: nobody who only reads sends one.
        let body = header("content-length").is_some_and(|length| length != "0")
            || header("transfer-encoding").is_some();
        let closes = header("connection").is_some_and(|c| c.eq_ignore_ascii_case("close"));
        let last = body || closes || asked == Asked::Method || request.version != Some(1);
        Ok(Some((Self { asked, head_only: method == "HEAD", last }, len)))
    }

    /// The whole answer of everything but an upgrade. `proof` is that to a challenge, if it is ours.
    pub fn answer(&self, proof: Option<&str>) -> Vec<u8> {
        const PLAIN: &str = "Content-Type: text/plain; charset=utf-8\r\n";
        let (status, headers, body) = match &self.asked {
            Asked::Probe => ("200 OK", "Access-Control-Allow-Origin: *\r\n".to_owned(), ""),
            Asked::NoContent { challenge } => {
                let mut headers = String::from(
                    "Cache-Control: no-cache, no-store, must-revalidate, no-transform, max-age=0\r\n",
                );
                if let Some(challenge) = challenge {
                    headers += &format!("X-Tailscale-Response: response {challenge}\r\n");
                }
                ("204 No Content", headers, "")
            }
            Asked::Page => ("200 OK", PLAIN.to_owned(), "A millrace relay (DERP and STUN).\n"),
            Asked::Relay { .. } | Asked::NoUpgrade => (
                "426 Upgrade Required",
                format!("{PLAIN}Upgrade: DERP\r\n"),
                "The relay wants \"Upgrade: DERP\", over HTTPS if this is not.\n",
            ),
            Asked::Method => {
                ("405 Method Not Allowed", format!("{PLAIN}Allow: GET, HEAD\r\n"), "Only GET.\n")
            }
            Asked::Challenge { .. } if proof.is_some() => {
                let headers = "Content-Type: application/octet-stream\r\n".to_owned();
                ("200 OK", headers, proof.unwrap_or_default())
            }
            Asked::Missing | Asked::Challenge { .. } => {
                ("404 Not Found", PLAIN.to_owned(), "Nothing here.\n")
            }
        };
        let mut out = format!("HTTP/1.1 {status}\r\n{headers}");
        if !matches!(self.asked, Asked::NoContent { .. }) {
            out += &format!("Content-Length: {}\r\n", body.len());
        }
        if self.last {
            out += "Connection: close\r\n";
        }
        out += "\r\n";
        if !self.head_only {
            out += body;
        }
        out.into_bytes()
    }
}

/// The answer to an upgrade, without a fast start.
pub fn switching_protocols(key: PublicKey) -> Vec<u8> {
    let key: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\
         Derp-Version: {VERSION}\r\nDerp-Public-Key: {key}\r\n\r\n"
    )
    .into_bytes()
}

/// A challenge that may be repeated in a header: short, and nothing that could end a line.
fn is_plain(challenge: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
    (1..=64).contains(&challenge.len()) && challenge.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn asked(head: &str) -> Request {
        let bytes = head.replace('\n', "\r\n") + "\r\n\r\n";
        for cut in 0..bytes.len() {
            assert_eq!(Request::parse(&bytes.as_bytes()[..cut]), Ok(None), "{cut} of {head}");
        }
        let (request, len) = Request::parse(bytes.as_bytes()).unwrap().unwrap();
        assert_eq!(len, bytes.len());
        request
    }

    #[test]
    fn what_clients_of_derp_ask_for_is_understood() {
        let head = "GET /derp HTTP/1.1\nHost: r\nUpgrade: DERP\nConnection: Upgrade";
        assert_eq!(asked(head).asked, Asked::Relay { fast_start: false });
        let head = "GET /derp HTTP/1.1\nUpgrade: derp\nDerp-Fast-Start: 1";
        assert_eq!(asked(head).asked, Asked::Relay { fast_start: true });
        let head = "POST /derp HTTP/1.1\nUpgrade: DERP\nContent-Length: 0";
        assert_eq!(asked(head).asked, Asked::Relay { fast_start: false });
        assert_eq!(asked("GET /derp HTTP/1.1\nUpgrade: websocket").asked, Asked::NoUpgrade);
        assert_eq!(asked("POST /derp HTTP/1.1").asked, Asked::Method);
        let head = "POST https://127.0.0.1:443/derp HTTP/1.1\nUpgrade: DERP";
        assert_eq!(asked(head).asked, Asked::Relay { fast_start: false });
        assert_eq!(asked("GET http://relay.test HTTP/1.1").asked, Asked::Page);
        assert_eq!(asked("GET /derp/latency-check?x HTTP/1.1").asked, Asked::Probe);
        let probe = asked("HEAD /derp/probe HTTP/1.1");
        assert!(
            probe.answer(None).starts_with(b"HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *")
        );
        let post = asked("POST /derp/probe HTTP/1.1\nContent-Length: 3");
        assert_eq!((post.asked, post.last), (Asked::Method, true));
        assert_eq!(asked("GET /etc/passwd HTTP/1.1").asked, Asked::Missing);
        assert!(asked("GET / HTTP/1.0").last);
        let challenge = asked("GET /.well-known/acme-challenge/a-token HTTP/1.1");
        assert_eq!(challenge.asked, Asked::Challenge { token: "a-token".to_owned() });
        assert!(challenge.answer(None).starts_with(b"HTTP/1.1 404 "));
        assert!(challenge.answer(Some("a-token.proof")).ends_with(b"\r\n\r\na-token.proof"));
    }

    #[test]
    fn a_challenge_is_repeated_unless_it_could_write_headers() {
        let head = |challenge: &str| {
            let head = format!("GET /generate_204 HTTP/1.1\nX-Tailscale-Challenge: {challenge}");
            String::from_utf8(asked(&head).answer(None)).unwrap()
        };
        assert!(head("ts_a.b:c-1").contains("X-Tailscale-Response: response ts_a.b:c-1\r\n"));
        assert!(!head("a b").contains("X-Tailscale-Response"));
        assert!(!head(&"a".repeat(65)).contains("X-Tailscale-Response"));
    }

    #[test]
    fn a_head_without_end_is_refused() {
        let long = format!("GET / HTTP/1.1\r\nX: {}", "a".repeat(limits::REQUEST_MAX));
        assert_eq!(Request::parse(long.as_bytes()), Err(RequestError::TooLong));
        assert_eq!(Request::parse(b"\x16\x03\x01\x02\x00"), Err(RequestError::Syntax));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some((request, len))) = Request::parse(&bytes) {
                prop_assert!(len <= bytes.len());
                prop_assert!(request.answer(None).starts_with(b"HTTP/1.1 "));
            }
        }
    }
}
