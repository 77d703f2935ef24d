//! The two HTTP exchanges before a relay's stream: CONNECT at a proxy, the upgrade at the relay.

use base64::prelude::{BASE64_STANDARD, Engine};
use zeroize::Zeroizing;

use crate::limits;

/// The request that makes a proxy a pipe to `host`. It may hold a password.
pub fn connect_request(host: &str, port: u16, credentials: Option<&str>) -> Zeroizing<Vec<u8>> {
    let authority = authority(host, port);
    let mut request = Zeroizing::new(
        format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n").into_bytes(),
    );
    // Grown once, so that no copy of the password stays behind.
    request.reserve(2 * credentials.map_or(0, str::len) + 64);
    if let Some(credentials) = credentials {
        let encoded = Zeroizing::new(BASE64_STANDARD.encode(credentials));
        request.extend_from_slice(b"Proxy-Authorization: Basic ");
        request.extend_from_slice(encoded.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    request
}

/// The request that makes a web server's connection a relay's stream. With a fast start the relay
/// answers with its stream at once.
pub fn upgrade_request(host: &str, port: u16, usual_port: u16, fast_start: bool) -> Vec<u8> {
    let mut authority = authority(host, port);
    if port == usual_port {
        authority.truncate(authority.len() - format!(":{port}").len());
    }
    let fast = if fast_start { "Derp-Fast-Start: 1\r\n" } else { "" };
    format!(
        "GET /derp HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: millrace\r\n\
         Upgrade: DERP\r\nConnection: Upgrade\r\n{fast}\r\n"
    )
    .into_bytes()
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The head of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// What the server calls the status: printable, short.
    pub reason: String,
    /// Which kinds of authentication a proxy takes: printable, short.
    pub authenticate: String,
    /// Where a redirection points: printable, short.
    pub location: String,
}

/// Why the bytes are no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    #[error("what it sent is not HTTP")]
    Syntax,
    #[error("the head of its answer is above {} bytes", limits::HTTP_HEAD_MAX)]
    TooLong,
}

impl Answer {
    /// Reads an answer's head off the front of `bytes`; with it, its length. None while it is not
    /// whole.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, AnswerError> {
        let mut headers = [httparse::EMPTY_HEADER; limits::HTTP_HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let head = &bytes[..bytes.len().min(limits::HTTP_HEAD_MAX)];
        let len = match response.parse(head) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) if head.len() < limits::HTTP_HEAD_MAX => {
                return Ok(None);
            }
            Ok(httparse::Status::Partial) => return Err(AnswerError::TooLong),
            Err(_) => return Err(AnswerError::Syntax),
        };
        let header = |name: &str| {
            let all = response.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name));
            let all: Vec<String> = all.map(|h| printable(h.value)).collect();
            all.join(", ")
        };
        let answer = Self {
            status: response.code.unwrap_or_default(),
            reason: printable(response.reason.unwrap_or_default().as_bytes()),
            authenticate: header("proxy-authenticate") + &header("www-authenticate"),
            location: header("location"),
        };
        Ok(Some((answer, len)))
    }
}

/// The text of a URL's user and password; what is no escape stays.
pub fn percent_decoded(text: &str) -> Zeroizing<String> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let digits = behind.first_chunk::<2>().and_then(|digits| str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        rest = match escaped {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                &behind[2..]
            }
            _ => {
                bytes.push(first);
                behind
            }
        };
    }
    Zeroizing::new(String::from_utf8_lossy(&bytes).into_owned())
}

/// Text of a stranger, for a line of ours.
fn printable(bytes: &[u8]) -> String {
    const LEN_MAX: usize = 100;
    let plain = |byte: &u8| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' };
    bytes.iter().take(LEN_MAX).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(bytes: &[u8]) -> &str {
        str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn requests_name_the_host_as_http_wants_it() {
        let plain = connect_request("2001:db8::1", 443, None);
        assert_eq!(
            text(&plain),
            "CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n\r\n"
        );
        let basic = connect_request("relay.test", 443, Some("Aladdin:open sesame"));
        // The example of RFC 7617, section 2.
        assert!(
            text(&basic)
                .contains("\r\nProxy-Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==\r\n\r\n")
        );
        let usual = upgrade_request("relay.test", 443, 443, true);
        assert!(text(&usual).contains("\r\nHost: relay.test\r\n"));
        assert!(text(&usual).ends_with("\r\nDerp-Fast-Start: 1\r\n\r\n"));
        let other = upgrade_request("::1", 3340, 80, false);
        assert!(text(&other).contains("\r\nHost: [::1]:3340\r\n"));
        assert!(!text(&other).contains("Fast"));
    }

    #[test]
    fn answers_are_read_when_they_are_whole() {
        let head =
            b"HTTP/1.1 407 Proxy Authentication\r\nProxy-Authenticate: Basic realm=\"a\"\r\n\
                     proxy-authenticate: NTLM\r\n\r\nbody";
        assert_eq!(Answer::parse(&head[..40]), Ok(None));
        let (answer, len) = Answer::parse(head).unwrap().unwrap();
        assert_eq!((answer.status, &head[len..]), (407, &b"body"[..]));
        assert_eq!(answer.authenticate, "Basic realm=\"a\", NTLM");
        assert_eq!(Answer::parse(b"SSH-2.0-OpenSSH_9.2\r\n"), Err(AnswerError::Syntax));
        let endless = [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'a'; 20_000]].concat();
        assert_eq!(Answer::parse(&endless), Err(AnswerError::TooLong));
    }

    proptest! {
        #[test]
        fn what_is_read_of_strangers_is_short_and_printable(
            bytes in prop::collection::vec(any::<u8>(), 0..400)
        ) {
            let mut head = b"HTTP/1.1 500 ".to_vec();
            head.extend(&bytes);
            for bytes in [&bytes, &head] {
                if let Ok(Some((answer, len))) = Answer::parse(bytes) {
                    prop_assert!(len <= bytes.len() && answer.reason.len() <= 100);
                    prop_assert!(answer.reason.chars().all(|c| (' '..='~').contains(&c)));
                }
            }
        }
    }
}
