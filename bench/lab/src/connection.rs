//! One TCP connection that stays open: how much came, whether it is what was sent, how long it stood
//! still.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{Error, Marker, Namespace, Result};

/// Bytes that are written at once.
const CHUNK_LEN: usize = 16 << 10;

/// Longest wait for the peer before a thread looks whether it shall end.
const POLL: Duration = Duration::from_millis(20);

/// A running connection.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    sender: Option<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

/// What the receiving end has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Bytes that came.
    pub bytes: u64,
    /// Whether one of them was wrong.
    pub damaged: bool,
    /// Why the connection ended, if it has.
    pub ended: Option<String>,
    /// When bytes came, and how long after those before.
    pauses: Vec<(Instant, Duration)>,
}

impl Connection {
    /// Connects from `from` to a new listener at `address` in `to`, and sends `bytes_per_second` of
    /// the marker until dropped.
    pub fn start(
        from: &Namespace,
        to: &Namespace,
        address: SocketAddr,
        bytes_per_second: u32,
        marker: Marker,
    ) -> Result<Self> {
        let listener = to.run(|| TcpListener::bind(address));
        let listener = listener.map_err(Error::system(format!("listen at {address}")))?;
        let address = listener.local_addr().map_err(Error::system("ask for the port"))?;
        let sender = from.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(10)));
        let sender = sender.map_err(Error::system(format!("connect to {address}")))?;
        let (receiver, _) = listener.accept().map_err(Error::system("accept a connection"))?;
        let limit = receiver.set_read_timeout(Some(POLL));
        limit.map_err(Error::system("set a time limit"))?;
        let shared = Arc::new(Shared::default());
        let copy = sender.try_clone().map_err(Error::system("copy a socket"))?;
        let (here, there) = (Arc::clone(&shared), Arc::clone(&shared));
        let interval = Duration::from_secs(1) * CHUNK_LEN as u32 / bytes_per_second.max(1);
        let threads = vec![
            thread::spawn(move || send(copy, interval, marker, &here)),
            thread::spawn(move || receive(receiver, marker, &there)),
        ];
        Ok(Self { shared, sender: Some(sender), threads })
    }

    /// What the receiving end has seen so far; an error if the connection has ended or bytes changed.
    pub fn seen(&self) -> Result<Seen> {
        let seen = self.lock().clone();
        match &seen.ended {
            Some(why) => Err(Error::Unexpected(format!("the TCP connection has ended: {why}"))),
            None if seen.damaged => {
                Err(Error::Unexpected("the TCP connection delivered what was not sent".into()))
            }
            None => Ok(seen),
        }
    }

    /// The longest time without a byte since `since`, up to now.
    pub fn longest_pause(&self, since: Instant) -> Duration {
        let seen = self.lock();
        let pauses = seen.pauses.iter().filter(|(end, _)| *end > since);
        let last = seen.pauses.last().map_or(since, |(end, _)| (*end).max(since));
        pauses
            .map(|(end, pause)| (*pause).min(end.duration_since(since)))
            .max()
            .unwrap_or_default()
            .max(last.elapsed())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            // A writer that waits for room is woken by it.
            let _ = sender.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }
}

fn send(mut stream: TcpStream, interval: Duration, marker: Marker, shared: &Shared) {
    let chunk = marker.fill(CHUNK_LEN);
    while !shared.stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        if let Err(error) = stream.write_all(&chunk) {
            end(shared, &error.to_string());
            return;
        }
        thread::sleep(interval.saturating_sub(start.elapsed()));
    }
}

fn receive(mut stream: TcpStream, marker: Marker, shared: &Shared) {
    // From any place of the pattern on.
    let expected = marker.fill(CHUNK_LEN + marker.0.len());
    let mut buffer = vec![0; CHUNK_LEN];
    let mut last = Instant::now();
    let mut place = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return end(shared, "closed by the sender"),
            Ok(len) => {
                let now = Instant::now();
                let mut seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.bytes += len as u64;
                seen.damaged |= buffer[..len] != expected[place..place + len];
                seen.pauses.push((now, now - last));
                place = (place + len) % marker.0.len();
                last = now;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return end(shared, &error.to_string()),
        }
    }
}

/// Notes why the connection is over, unless that was wanted.
fn end(shared: &Shared, why: &str) {
    if !shared.stop.load(Ordering::Relaxed) {
        let mut seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.ended.get_or_insert_with(|| why.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_counts_its_bytes_and_pauses() {
        let here = Namespace::current().unwrap();
        let start = Instant::now();
        let marker = Marker::random().unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let connection = Connection::start(&here, &here, address, 4 << 20, marker).unwrap();
        let enough = || connection.seen().ok().filter(|seen| seen.bytes > 1 << 18);
        crate::wait_for("bytes", Duration::from_secs(10), enough).unwrap();
        assert!(connection.longest_pause(start) < start.elapsed());
        connection.sender.as_ref().unwrap().shutdown(Shutdown::Both).unwrap();
        let ended = || connection.seen().err();
        let error = crate::wait_for("the end", Duration::from_secs(10), ended).unwrap();
        assert!(error.to_string().contains("has ended"), "{error}");
    }
}
