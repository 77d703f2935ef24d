//! Whether somebody between answers in a relay's place: a request in the clear whose answer only
//! the relay can give. One thread each, gone after a few seconds.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use millrace_config::discovery::HttpUrl;
use rustix::event::{EventfdFlags, eventfd};

use crate::limits::{PORTAL_ADDRESSES_MAX, PORTAL_ANSWER_MAX, PORTAL_STEP_LIMIT};

const HEADERS_MAX: usize = 64;

/// Questions under way.
#[derive(Debug)]
pub(super) struct Portals {
    wake: Arc<OwnedFd>,
    sender: Sender<Said>,
    said: Receiver<Said>,
}

/// The relay's name; whether another answered, none if nobody did.
type Said = (String, Option<bool>);

impl Portals {
    pub(super) fn new() -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, said) = channel();
        Ok(Self { wake, sender, said })
    }

    pub(super) fn look(&self, relay: String, url: HttpUrl) {
        let (sender, wake) = (self.sender.clone(), Arc::clone(&self.wake));
        let name = relay.clone();
        let work = move || {
            // Whoever asked may be gone.
            let _ = sender.send((relay, ask(&url)));
            let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
        };
        if let Err(error) = thread::Builder::new().name("portal".into()).spawn(work) {
            tracing::error!(%error, "no thread for looking for a captive portal");
            let _ = self.sender.send((name, None));
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    pub(super) fn next(&self) -> Option<Said> {
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut counter);
        self.said.try_recv().ok()
    }
}

impl AsFd for Portals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn ask(url: &HttpUrl) -> Option<bool> {
    // In the clear a relay for https is at the usual port, as derper has it.
    let port = if url.tls { 80 } else { url.port };
    let addresses = (url.host.as_str(), port).to_socket_addrs().ok()?;
    let challenge = format!("millrace-{:016x}", rand::random::<u64>());
    let request = format!(
        "GET /generate_204 HTTP/1.1\r\nHost: {}\r\nUser-Agent: millrace\r\n\
         X-Tailscale-Challenge: {challenge}\r\nConnection: close\r\n\r\n",
        url.host
    );
    let exchange = |address| {
        let mut stream = TcpStream::connect_timeout(&address, PORTAL_STEP_LIMIT)?;
        stream.set_read_timeout(Some(PORTAL_STEP_LIMIT))?;
        stream.set_write_timeout(Some(PORTAL_STEP_LIMIT))?;
        stream.write_all(request.as_bytes())?;
        read_head(&mut stream)
    };
    let answer = addresses.take(PORTAL_ADDRESSES_MAX).find_map(|address| exchange(address).ok())?;
    is_captive(&answer, &url.host, &challenge)
}

/// Up to the empty line, the bound or the end.
fn read_head(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while head.len() < PORTAL_ANSWER_MAX && !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => break,
            len => head.extend_from_slice(&piece[..len]),
        }
    }
    Ok(head)
}

/// None where the bytes are no answer, or one that says nothing about somebody between: a web
/// server that sends everybody to https on the same host may be the relay's own.
fn is_captive(answer: &[u8], host: &str, challenge: &str) -> Option<bool> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    if !response.parse(answer).ok()?.is_complete() {
        return None;
    }
    let header = |name: &str| {
        let found = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found
            .and_then(|header| str::from_utf8(header.value).ok())
            .map(str::trim)
            .unwrap_or_default()
    };
    let https = header("location").strip_prefix("https://").unwrap_or_default();
    let same_host = https
        .strip_prefix(host)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', ':']));
    match response.code? {
        204 => Some(header("x-tailscale-response") != format!("response {challenge}")),
        300..=399 if same_host => None,
        _ => Some(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_relay_knows_the_answer() {
        for (answer, captive) in [
            ("HTTP/1.1 204 No Content\r\nX-Tailscale-Response: response c1\r\n\r\n", Some(false)),
            ("HTTP/1.1 204 No Content\r\n\r\n", Some(true)),
            ("HTTP/1.1 204 No Content\r\nX-Tailscale-Response: response c2\r\n\r\n", Some(true)),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nlogin", Some(true)),
            ("HTTP/1.1 302 Found\r\nLocation: http://login.hotel/\r\n\r\n", Some(true)),
            ("HTTP/1.1 302 Found\r\nLocation: https://r.test.hotel/\r\n\r\n", Some(true)),
            ("HTTP/1.1 301 Moved\r\nLocation: https://r.test/generate_204\r\n\r\n", None),
            ("HTTP/1.1 204 No Content\r\n", None),
            ("SSH-2.0-x\r\n\r\n", None),
            ("", None),
        ] {
            assert_eq!(is_captive(answer.as_bytes(), "r.test", "c1"), captive, "{answer}");
        }
    }

    #[test]
    fn an_answer_without_end_is_cut() {
        let head = read_head(&mut io::repeat(b'a')).unwrap();
        assert!((PORTAL_ANSWER_MAX..PORTAL_ANSWER_MAX + 1024).contains(&head.len()));
    }
}
