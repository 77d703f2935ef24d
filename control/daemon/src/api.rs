//! The socket at which operators ask: a line of JSON in, a line of JSON out. Whoever may open the
//! socket's file may ask everything; nothing can be changed.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use millrace_config::paths::{Refusal, Request};
use millrace_path::Instant;
use millrace_path::sealed::PublicKey;
use rustix::event::PollFlags;
use serde::Serialize;

use crate::answers;
use crate::gateway::Gateway;
use crate::limits::{API_CLIENTS_MAX, API_LINE_LEN_MAX, PING_ANSWER_LIMIT};
use crate::privileges;

/// What listens, and those who are connected. The file goes when this does.
#[derive(Debug)]
pub struct Api {
    listener: UnixListener,
    path: PathBuf,
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The answer to this ping is awaited.
    ping: Option<(u32, PublicKey, Instant)>,
    over: bool,
}

impl Api {
    /// For root and the group; the socket of a process that is gone is replaced.
    pub fn bind(path: PathBuf) -> io::Result<Self> {
        if UnixStream::connect(&path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another control process answers there",
            ));
        }
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o660))?;
        privileges::give_to_group(&path);
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path, clients: Vec::new() })
    }

    /// The descriptors to poll, and for what.
    pub fn interest(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let clients = self.clients.iter();
        let clients = clients.filter_map(|c| Some((c.stream.as_fd(), c.interest()?)));
        std::iter::once((self.listener.as_fd(), PollFlags::IN)).chain(clients)
    }

    /// When a ping is to be given up.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.iter().filter_map(|client| client.ping.map(|(.., limit)| limit)).min()
    }

    /// Takes questions and gives the answers that are there.
    pub fn handle(&mut self, now: Instant, gateway: &mut Gateway) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() < API_CLIENTS_MAX && stream.set_nonblocking(true).is_ok() {
                let (input, output) = (Vec::new(), Vec::new());
                self.clients.push(Client { stream, input, output, ping: None, over: false });
            }
        }
        let pinged = std::mem::take(&mut gateway.pinged);
        for client in &mut self.clients {
            client.read();
            client.serve(now, gateway);
            if let Some((number, peer, limit)) = client.ping {
                let answer = pinged.iter().chain(&gateway.pinged).find(|p| p.number == number);
                match answer {
                    Some(answer) if answer.answer.is_none() => client.refuse(
                        "the peer cannot be pinged: it has not introduced itself, or no path is \
                         known",
                    ),
                    Some(answer) => client.answer(&answers::pong(gateway, peer, answer.answer)),
                    None if limit <= now => client.answer(&answers::pong(gateway, peer, None)),
                    None => continue,
                }
                client.ping = None;
            }
        }
        gateway.pinged.clear();
        for client in &mut self.clients {
            client.write();
        }
        let waits = |client: &Client| !client.output.is_empty() || client.ping.is_some();
        self.clients.retain(|client| !client.over || waits(client));
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Client {
    /// Whoever has not taken its answer is not listened to, nor is who ended its side: polled for
    /// nothing, it would still be reported for ever.
    fn interest(&self) -> Option<PollFlags> {
        if !self.output.is_empty() {
            return Some(PollFlags::OUT);
        }
        (!self.over).then_some(PollFlags::IN)
    }

    fn read(&mut self) {
        if self.over || !self.output.is_empty() {
            return;
        }
        let mut chunk = [0; 4096];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => self.over = true,
                Ok(len) if self.input.len() + len <= API_LINE_LEN_MAX => {
                    self.input.extend_from_slice(&chunk[..len]);
                    continue;
                }
                Ok(_) => {
                    self.refuse("the line is too long for a question");
                    self.over = true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => (self.over, self.output) = (true, Vec::new()),
            }
            return;
        }
    }

    /// One question at a time: the next line waits for the answer to this one.
    fn serve(&mut self, now: Instant, gateway: &mut Gateway) {
        while self.ping.is_none() && self.output.is_empty() {
            let Some(end) = self.input.iter().position(|byte| *byte == b'\n') else { return };
            let line: Vec<u8> = self.input.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Request::Status) => self.answer(&answers::paths(gateway, now)),
                Ok(Request::Why { peer }) => match peer_of(gateway, &peer) {
                    Ok(key) => {
                        if let Some(peer) = gateway.peers.get(&key) {
                            self.answer(&answers::why(gateway, peer, now));
                        }
                    }
                    Err(why) => self.refuse(&why),
                },
                Ok(Request::Ping { peer }) => match peer_of(gateway, &peer) {
                    Ok(key) => {
                        let number = gateway.ping(now, key);
                        self.ping = Some((number, key, now + PING_ANSWER_LIMIT));
                    }
                    Err(why) => self.refuse(&why),
                },
                Err(error) => self.refuse(&format!("no question that is known: {error}")),
            }
        }
    }

    fn answer(&mut self, document: &impl Serialize) {
        // Our own documents are plain data.
        if serde_json::to_writer(&mut self.output, document).is_ok() {
            self.output.push(b'\n');
        }
    }

    fn refuse(&mut self, why: &str) {
        self.answer(&Refusal { error: why.to_owned() });
    }

    fn write(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => break,
                Ok(len) => drop(self.output.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The document of a hub is longer than a socket's buffer.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    (self.over, self.output) = (true, Vec::new());
                }
            }
        }
    }
}

fn peer_of(gateway: &Gateway, key: &str) -> Result<PublicKey, String> {
    let parsed = millrace_config::PublicKey::from_base64(key)
        .map_err(|error| format!("{key:?} is no public key: {error}"))?;
    let key = PublicKey(parsed.0);
    let known = gateway.peers.contains_key(&key);
    known.then_some(key).ok_or_else(|| format!("no peer of this gateway has the key {parsed}"))
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;
    use std::time::Duration;

    use millrace_config::discovery::Discovery;
    use rustix::event::{PollFd, Timespec, poll};

    use super::*;
    use crate::clock;

    fn api() -> (tempfile::TempDir, Api, Gateway) {
        let directory = tempfile::tempdir().unwrap();
        let api = Api::bind(directory.path().join("socket")).unwrap();
        (directory, api, Gateway::new("none0", Discovery::default()).unwrap())
    }

    /// What poll finds at once.
    fn ready(api: &Api) -> Vec<PollFlags> {
        let interest = api.interest();
        let mut fds: Vec<PollFd<'_>> =
            interest.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        fds.iter().map(|fd| fd.revents()).filter(|found| !found.is_empty()).collect()
    }

    #[test]
    fn who_ended_its_side_gets_its_answer_and_wakes_nobody() {
        let (_directory, mut api, mut gateway) = api();
        let mut stream = UnixStream::connect(&api.path).unwrap();
        stream.write_all(b"{\"request\":\"status\"}\n").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        api.handle(clock::now(), &mut gateway);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("millrace.paths/1"), "{answer}");
        assert!(api.clients.is_empty() && ready(&api).is_empty());
    }

    #[test]
    fn an_answer_that_is_longer_than_the_sockets_buffer_arrives_as_it_is_read() {
        let (_directory, mut api, mut gateway) = api();
        let mut stream = UnixStream::connect(&api.path).unwrap();
        api.handle(clock::now(), &mut gateway);
        let document = vec![b'x'; 4 << 20];
        api.clients[0].output.clone_from(&document);
        api.handle(clock::now(), &mut gateway);
        assert!(ready(&api).is_empty(), "the socket's buffer is full");
        let mut got = vec![0; document.len()];
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| stream.read_exact(&mut got).map(drop));
            let limit = clock::now() + Duration::from_secs(20);
            while !api.clients[0].output.is_empty() {
                assert!(clock::now() < limit, "nothing woke us");
                if ready(&api).contains(&PollFlags::OUT) {
                    api.handle(clock::now(), &mut gateway);
                }
            }
            reader.join().unwrap().unwrap();
        });
        assert!(got == document);
    }
}
