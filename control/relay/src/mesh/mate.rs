//! One other relay, as the thread that dials it sees it: it tells us its clients, we send it the
//! packets for them.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millrace_path::derp::{ClientInfo, Cutter, Frame, FrameError, Gone, LoginError, ServerInfo};
use millrace_path::sealed::{BoxKey, NONCE_LEN, PublicKey};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ClientConfig;

use super::Mesh;
use super::url::RelayUrl;
use super::wire::Wire;
use crate::limits;
use crate::mail::Letters;
use crate::metrics::Count;
use crate::shared::{Desk, Shared};

/// `PeerPresent`: the flag of a connection that is itself a relay's.
const FLAG_MATE: u8 = 2;

/// What one thread needs to keep a connection to a mate.
#[derive(Debug)]
pub struct Mate {
    pub url: RelayUrl,
    /// Its index among the desks: its mail is the packets for it.
    pub desk: u16,
    pub tls: Arc<ClientConfig>,
    pub shared: Arc<Shared>,
}

/// Why a connection to a mate ends.
#[derive(Debug, thiserror::Error)]
enum MateError {
    #[error("{0}")]
    System(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Login(#[from] LoginError),
    #[error("it is this relay itself")]
    Ourselves,
    #[error("it ends the login: does it have the same mesh key?")]
    Refused,
    #[error("nothing came for {} s", limits::MATE_SILENCE_LIMIT.as_secs())]
    Silent,
    #[error("a {0:?} frame while a login is under way")]
    Unexpected(millrace_path::derp::Kind),
    #[error("this relay stops")]
    Stopped,
}

impl Mate {
    /// Connects again and again, until the relay stops. Says each change once.
    pub fn run(self) {
        let mut retry = limits::MATE_RETRY_FIRST;
        let mut said = String::new();
        while !self.shared.stopped() {
            let Some(mesh) = &self.shared.mesh else { return };
            let mut link = match Link::open(&self, mesh) {
                Ok(link) => link,
                Err(MateError::Ourselves) => {
                    tracing::info!(mate = %self.url, "this relay itself is in its list of peers");
                    return;
                }
                Err(error) => {
                    self.desk().counters.add(Count::MateFailed, 1);
                    let error = error.to_string();
                    if error != said {
                        tracing::warn!(mate = %self.url, "not connected, trying again: {error}");
                        said = error;
                    }
                    self.pause(retry);
                    retry = (retry * 2).min(limits::MATE_RETRY_LAST);
                    continue;
                }
            };
            self.desk().counters.add(Count::MateConnected, 1);
            mesh.connected.fetch_add(1, Ordering::Relaxed);
            tracing::info!(mate = %self.url, "connected");
            let Err(error) = link.serve();
            mesh.connected.fetch_sub(1, Ordering::Relaxed);
            drop(link);
            tracing::warn!(mate = %self.url, "connection lost: {error}");
            (retry, said) = (limits::MATE_RETRY_FIRST, String::new());
            self.pause(retry);
        }
    }

    fn desk(&self) -> &Desk {
        &self.shared.desks[usize::from(self.desk)]
    }

    /// Waits, unless the relay stops. What is for a mate that we have lost is thrown away.
    fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.shared.stopped() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let _ =
                poll(&mut [PollFd::new(&self.desk().mailbox, PollFlags::IN)], Some(&spec(left)));
            let mut lost = Letters::default();
            self.desk().mailbox.take(&mut lost);
            self.desk().counters.add(Count::DropGone, lost.count());
        }
    }
}

/// A connection whose mate knows us.
struct Link<'m> {
    mate: &'m Mate,
    mesh: &'m Mesh,
    wire: Wire,
    /// What came and has not been used, behind what has.
    bytes: Vec<u8>,
    used: usize,
    cutter: Cutter,
    /// The clients that it told us.
    present: HashSet<PublicKey>,
    /// For the workers: `PeerGone`, where a client of the mate is lost to ours.
    outgoing: Vec<Letters>,
}

impl<'m> Link<'m> {
    /// Dials, proves who we are, and asks to hear of every client.
    fn open(mate: &'m Mate, mesh: &'m Mesh) -> Result<Self, MateError> {
        let deadline = Instant::now() + limits::MATE_LOGIN_LIMIT;
        let (wire, bytes) = Wire::dial(&mate.url, &mate.tls, deadline)?;
        let outgoing = mate.shared.desks.iter().map(|_| Letters::default()).collect();
        let mut link = Self {
            mate,
            mesh,
            wire,
            bytes,
            used: 0,
            cutter: Cutter::default(),
            present: HashSet::new(),
            outgoing,
        };
        let shared = &mate.shared;
        let key = link.await_frame(deadline, |frame| match frame {
            Frame::ServerKey(key) => Some(key),
            _ => None,
        })?;
        if key == shared.public {
            return Err(MateError::Ourselves);
        }
        let proof = LoginError::Proof(millrace_path::derp::Kind::ServerKey);
        let box_key = BoxKey::agree(&shared.secret, key).ok_or(proof)?;
        let info = ClientInfo { mesh_key: Some(mesh.key.clone()), ..ClientInfo::default() };
        let mut out = Vec::new();
        info.write(shared.public, &box_key, rand::random::<[u8; NONCE_LEN]>(), &mut out);
        link.wire.send(&out)?;
        let answer = link.await_frame(deadline, |frame| match frame {
            Frame::ServerInfo { nonce, sealed } => Some(ServerInfo::open(&box_key, &nonce, sealed)),
            _ => None,
        });
        match answer {
            Ok(info) => {
                info?;
            }
            Err(MateError::System(error)) if is_end(&error) => return Err(MateError::Refused),
            Err(error) => return Err(error),
        }
        link.tell(&Frame::WatchConns)?;
        link.confirm(deadline)?;
        Ok(link)
    }

    /// A relay with another key ends the connection on `WatchConns`: only an answer to something
    /// later says that it did not.
    fn confirm(&mut self, deadline: Instant) -> Result<(), MateError> {
        const DATA: [u8; 8] = *b"watching";
        self.tell(&Frame::Ping(DATA))?;
        loop {
            let answered = match self.take_frame(|link, frame| {
                link.presence(frame);
                *frame == Frame::Pong(DATA)
            })? {
                Some(answered) => answered,
                None => match self.wire.wait_and_receive(&mut self.bytes, deadline) {
                    Ok(()) => false,
                    Err(error) if is_end(&error) => return Err(MateError::Refused),
                    Err(error) => return Err(error.into()),
                },
            };
            if answered {
                return Ok(());
            }
        }
    }

    /// Moves frames both ways until the connection is lost.
    fn serve(&mut self) -> Result<std::convert::Infallible, MateError> {
        let mut letters = Letters::default();
        let mut heard = Instant::now();
        let mut ping = heard + limits::MATE_PING_INTERVAL;
        loop {
            let now = Instant::now();
            if self.mate.shared.stopped() {
                return Err(MateError::Stopped);
            }
            if now.duration_since(heard) >= limits::MATE_SILENCE_LIMIT {
                return Err(MateError::Silent);
            }
            if now >= ping {
                ping = now + limits::MATE_PING_INTERVAL;
                self.tell(&Frame::Ping([0; 8]))?;
            }
            self.wait(ping.saturating_duration_since(now))?;
            if self.receive()? {
                heard = Instant::now();
            }
            self.wire.flush()?;
            if !self.wire.is_blocked() {
                self.mate.desk().mailbox.take(&mut letters);
                let mut at = 0;
                while let Some((_, _, frames)) = letters.record(at) {
                    at = frames.end;
                    self.wire.send(letters.frames(frames))?;
                }
                letters.clear();
            }
        }
    }

    /// Until something can be done. Our mail can wait while the mate takes nothing.
    fn wait(&self, at_most: Duration) -> Result<(), MateError> {
        let blocked = self.wire.is_blocked();
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, blocked);
        let mut fds = vec![PollFd::new(&self.wire, flags)];
        if !blocked {
            fds.push(PollFd::new(&self.mate.desk().mailbox, PollFlags::IN));
        }
        match poll(&mut fds, Some(&spec(at_most))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// Takes what came. Whether anything did.
    fn receive(&mut self) -> Result<bool, MateError> {
        let mut buffer = [0; 16 << 10];
        let mut any = false;
        // To the end: what TLS has decrypted wakes nobody.
        loop {
            match self.wire.receive(&mut buffer) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(len) => self.bytes.extend_from_slice(&buffer[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) => return Err(error.into()),
            }
            any = true;
            while let Some(ping) = self.take_frame(|link, frame| {
                link.presence(frame);
                if let Frame::Ping(data) = *frame { Some(data) } else { None }
            })? {
                if let Some(data) = ping {
                    self.tell(&Frame::Pong(data))?;
                }
            }
            self.post();
        }
    }

    /// Who came and who went.
    fn presence(&mut self, frame: &Frame<'_>) {
        if let Frame::PeerPresent { peer, flags, .. } = *frame {
            // Other relays are nobody's peers.
            let client = flags & FLAG_MATE == 0 && peer != self.mate.shared.public;
            let room = self.present.len() < limits::MATE_CLIENTS_MAX;
            if client && room && self.present.insert(peer) {
                self.mesh.arrive(peer, self.mate.desk);
            }
        } else if let Frame::PeerGone { peer, .. } = *frame
            && self.present.remove(&peer)
        {
            self.leave(&peer);
        }
    }

    /// A client of the mate is lost: those of ours that heard it may have a path through it.
    fn leave(&mut self, peer: &PublicKey) {
        let Some(heard_by) = self.mesh.leave(peer, self.mate.desk) else { return };
        let registry = &self.mate.shared.registry;
        if registry.find(peer).is_some() {
            // It only moved to us.
            return;
        }
        let mut gone = Vec::new();
        Frame::PeerGone { peer: *peer, why: Gone::Disconnected }.write(&mut gone);
        for place in heard_by.iter().filter_map(|key| registry.find(key)) {
            self.mate.desk().counters.add(Count::PeerGoneSent, 1);
            self.outgoing[usize::from(place.worker)].push(place, &gone);
        }
    }

    fn post(&mut self) {
        for (desk, letters) in self.mate.shared.desks.iter().zip(&mut self.outgoing) {
            if !letters.is_empty() {
                let dropped = desk.mailbox.post(letters);
                self.mate.desk().counters.add(Count::DropMail, dropped);
            }
        }
    }

    fn tell(&mut self, frame: &Frame<'_>) -> Result<(), MateError> {
        let mut out = Vec::new();
        frame.write(&mut out);
        Ok(self.wire.send(&out)?)
    }

    /// The next frame must be the one that `take` knows.
    fn await_frame<T>(
        &mut self,
        deadline: Instant,
        take: impl Fn(Frame<'_>) -> Option<T>,
    ) -> Result<T, MateError> {
        loop {
            let taken = self
                .take_frame(|_, frame| take(*frame).ok_or(MateError::Unexpected(frame.kind())))?;
            match taken {
                Some(taken) => return taken,
                None => self.wire.wait_and_receive(&mut self.bytes, deadline)?,
            }
        }
    }

    /// Hands the next whole frame to `act`. None while it is not there.
    fn take_frame<T>(
        &mut self,
        act: impl FnOnce(&mut Self, &Frame<'_>) -> T,
    ) -> Result<Option<T>, MateError> {
        let bytes = std::mem::take(&mut self.bytes);
        let mut rest = &bytes[self.used..];
        let result = match self.cutter.next(&mut rest) {
            Ok(Some(raw)) => Frame::parse(raw.kind, raw.payload).map(|f| Some(act(self, &f))),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        self.used = bytes.len() - rest.len();
        self.bytes = bytes;
        if let Ok(None) = result {
            self.bytes.drain(..std::mem::take(&mut self.used));
        }
        Ok(result?)
    }
}

impl Drop for Link<'_> {
    /// The connection has ended: all of its clients are lost.
    fn drop(&mut self) {
        for peer in std::mem::take(&mut self.present) {
            self.leave(&peer);
        }
        self.post();
    }
}

/// Whether the other side has ended the connection.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn spec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}
