//! What clients say, and where their packets go.

use std::collections::HashSet;

use millrace_path::derp::frame::{deliver_forwarded, readdress};
use millrace_path::derp::{
    ClientInfo, Cutter, Frame, Gone, HEADER_LEN, KEY_LEN, Kind, LoginError, ServerInfo,
};
use millrace_path::sealed::{BoxKey, NONCE_LEN, PublicKey};

use crate::connection::{Client, End, Phase};
use crate::http::{self, Asked, Request};
use crate::limits;
use crate::mail::Order;
use crate::metrics::Count;
use crate::outbox;
use crate::rate::Bucket;
use crate::worker::Worker;

/// Said to a client whose key a second connection uses; empty when that has gone.
const SHARED_KEY: &str = "another connection uses the same key and gets its packets: \
    give each node a key of its own";

impl Worker {
    /// Takes what a connection said and returns how many bytes are done with.
    pub(crate) fn consume(
        &mut self,
        slot: u32,
        generation: u32,
        bytes: &mut [u8],
    ) -> Result<usize, End> {
        let mut used = 0;
        loop {
            let Some(connection) = self.connection(slot, generation) else { return Ok(used) };
            if connection.closing {
                return Ok(bytes.len());
            }
            let taken = match connection.phase {
                Phase::Request { relay } => {
                    self.request(slot, generation, relay, &bytes[used..])?
                }
                Phase::Login(_) => self.login(slot, generation, &bytes[used..])?,
                Phase::Client(_) => {
                    return Ok(used + self.frames(slot, generation, &mut bytes[used..])?);
                }
            };
            used += taken;
            if taken == 0 {
                return Ok(used);
            }
        }
    }

    /// One HTTP request.
    fn request(
        &mut self,
        slot: u32,
        generation: u32,
        relay: bool,
        bytes: &[u8],
    ) -> Result<usize, End> {
        let Some((request, len)) = Request::parse(bytes)? else { return Ok(0) };
        let mut answer = Vec::new();
        let mut phase = None;
        match request.asked {
            Asked::Relay { fast_start } if relay => {
                if !fast_start {
                    answer = http::switching_protocols(self.shared.public);
                }
                Frame::ServerKey(self.shared.public).write(&mut answer);
                phase = Some(Phase::Login(Cutter::default()));
            }
            _ => {
                self.count(Count::HttpRequests, 1);
                let proof = match &request.asked {
                    Asked::Challenge { token } => self.shared.challenges.answer(token),
                    _ => None,
                };
                answer = request.answer(proof.as_deref());
            }
        }
        let deadline_ms = self.now_ms + limits::LOGIN_LIMIT.as_millis() as u64;
        let mut scratch = std::mem::take(&mut self.scratch);
        if let Some(connection) = self.connection(slot, generation) {
            tracing::debug!(peer = %connection.peer, "asked for {:?}", request.asked);
            connection.closing = phase.is_none() && request.last;
            connection.deadline_ms = deadline_ms;
            connection.phase = phase.unwrap_or(Phase::Request { relay });
            connection.send_bytes(&answer, false, &mut scratch)?;
        }
        self.scratch = scratch;
        Ok(len)
    }

    /// The client's introduction; after it, it is one.
    fn login(&mut self, slot: u32, generation: u32, bytes: &[u8]) -> Result<usize, End> {
        let Some(connection) = self.connection(slot, generation) else { return Ok(0) };
        let Phase::Login(cutter) = &mut connection.phase else { return Ok(0) };
        let mut rest = bytes;
        let Some(raw) = cutter.next(&mut rest)? else {
            if Cutter::needed(rest) > HEADER_LEN + limits::CLIENT_INFO_MAX {
                return Err(End::TooLong);
            }
            return Ok(bytes.len() - rest.len());
        };
        let cutter = *cutter;
        let Frame::ClientInfo { from, nonce, sealed } = Frame::parse(raw.kind, raw.payload)? else {
            return Err(End::Unexpected(raw.kind));
        };
        let proof = LoginError::Proof(Kind::ClientInfo);
        let key = BoxKey::agree(&self.shared.secret, from).ok_or(proof)?;
        let info = ClientInfo::open(&key, &nonce, sealed)?;
        let mate = match (&self.shared.mesh, &info.mesh_key) {
            (Some(mesh), Some(mesh_key)) if mesh.key == *mesh_key => true,
            (Some(_), Some(_)) => return Err(End::MeshKey),
            _ => false,
        };
        if !mate && !self.live.admission.admits(&from) {
            return Err(End::NotAdmitted);
        }
        self.admit(slot, generation, from, &key, cutter, mate)?;
        Ok(bytes.len() - rest.len())
    }

    fn admit(
        &mut self,
        slot: u32,
        generation: u32,
        key: PublicKey,
        box_key: &BoxKey,
        cutter: Cutter,
        mate: bool,
    ) -> Result<(), End> {
        let mut info = ServerInfo::default();
        let rate = self.live.rate.filter(|_| !mate);
        if let Some(rate) = rate {
            (info.bytes_per_second, info.burst_bytes) = (rate.bytes_per_second, rate.burst_bytes);
        }
        let mut answer = Vec::new();
        info.write(box_key, rand::random::<[u8; NONCE_LEN]>(), &mut answer);
        let now_ms = self.now_ms;
        let client = Client {
            key,
            cutter,
            home: false,
            shadow: false,
            sent_to: HashSet::new(),
            not_here: Bucket::new(1, limits::NOT_HERE_BURST.into(), now_ms),
            take_over: Bucket::new(1, limits::TAKE_OVER_BURST, now_ms),
            mate,
            rate: rate.map(|r| Bucket::new(r.bytes_per_second, r.burst_bytes, now_ms)),
        };
        // Known before it is answered: it may tell a friend at once, who then sends to it through
        // another worker. Packets from there wait for the end of this turn, and so for the answer.
        self.count(if mate { Count::LoginsMates } else { Count::Logins }, 1);
        let place = self.place(slot, generation);
        if !mate {
            if let Some(former) = self.shared.registry.activate(key, place) {
                self.count(Count::TakeOvers, 1);
                self.outgoing[usize::from(former.worker)].order(Order::Shadow(former, true));
            }
            self.announce(key);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        if let Some(connection) = self.connection(slot, generation) {
            connection.phase = Phase::Client(Box::new(client));
            // The next sweep sends the first KeepAlive, and sets the time of the next.
            connection.deadline_ms = now_ms + millrace_path::derp::KEEP_ALIVE_S * 1000;
            connection.send_bytes(&answer, false, &mut scratch)?;
        }
        self.scratch = scratch;
        Ok(())
    }

    /// All whole frames of a client. Packets for one destination that follow each other go there as
    /// one run, re-addressed where they lie.
    fn frames(&mut self, slot: u32, generation: u32, bytes: &mut [u8]) -> Result<usize, End> {
        let Some(connection) = self.connection(slot, generation) else { return Ok(0) };
        let Phase::Client(client) = &mut connection.phase else { return Ok(0) };
        let (from, mut cutter, mate) = (client.key, client.cutter, client.mate);
        let mut run = 0..0;
        let mut run_to = None;
        let (mut packets, mut total) = (0, 0);
        let mut at = 0;
        let result = loop {
            let mut rest = &bytes[at..];
            let cut = cutter.next(&mut rest);
            let end = bytes.len() - rest.len();
            let raw = match cut {
                Ok(Some(raw)) => raw,
                Ok(None) => break Ok(end),
                Err(error) => break Err(End::Frame(error)),
            };
            let start = end - raw.payload.len() - HEADER_LEN;
            at = end;
            if mate && raw.kind == Kind::ForwardPacket {
                let (from, to, at) = deliver_forwarded(&mut bytes[start..end]);
                packets += 1;
                total += end - start;
                self.forwarded(slot, generation, from, to, &bytes[start + at..end]);
                continue;
            }
            if raw.kind != Kind::SendPacket {
                if let Err(end) = self.control(slot, generation, raw.kind, raw.payload) {
                    break Err(end);
                }
                continue;
            }
            let mut to = [0; KEY_LEN];
            to.copy_from_slice(&raw.payload[..KEY_LEN]);
            let to = PublicKey(to);
            readdress(&mut bytes[start..end], from);
            packets += 1;
            total += end - start;
            if run_to != Some(to) || run.end != start {
                self.forward(slot, generation, from, run_to, &bytes[run]);
                run = start..start;
                run_to = Some(to);
            }
            run.end = end;
        };
        self.forward(slot, generation, from, run_to, &bytes[run]);
        self.count(Count::ReceivedPackets, packets);
        self.count(Count::ReceivedBytes, total);
        let now_ms = self.now_ms;
        let Some(connection) = self.connection(slot, generation) else { return result };
        if let Phase::Client(client) = &mut connection.phase {
            client.cutter = cutter;
            let wait_ms = client.rate.as_mut().map_or(0, |rate| rate.take(total as u64, now_ms));
            if wait_ms > 0 {
                self.pause(slot, generation, now_ms + wait_ms);
            }
        }
        result
    }

    /// A frame that is no packet.
    fn control(
        &mut self,
        slot: u32,
        generation: u32,
        kind: Kind,
        payload: &[u8],
    ) -> Result<(), End> {
        let frame = Frame::parse(kind, payload)?;
        match frame {
            Frame::Ping(data) => {
                self.count(Count::Pings, 1);
                self.tell(slot, generation, &Frame::Pong(data));
            }
            Frame::NotePreferred(home) => {
                if let Some(connection) = self.connection(slot, generation)
                    && let Phase::Client(client) = &mut connection.phase
                {
                    client.home = home;
                }
            }
            Frame::Pong(_) | Frame::KeepAlive => {}
            _ if self.is_mate(slot, generation) => self.mate(slot, generation, &frame)?,
            _ => return Err(End::Unexpected(kind)),
        }
        Ok(())
    }

    fn is_mate(&mut self, slot: u32, generation: u32) -> bool {
        let connection = self.connection(slot, generation);
        connection.is_some_and(|c| matches!(&c.phase, Phase::Client(client) if client.mate))
    }

    /// Sends a run of packets to the connection of its destination.
    fn forward(
        &mut self,
        slot: u32,
        generation: u32,
        from: PublicKey,
        to: Option<PublicKey>,
        frames: &[u8],
    ) {
        let Some(to) = to.filter(|_| !frames.is_empty()) else { return };
        let place = self.place(slot, generation);
        let now_ms = self.now_ms;
        let Some(target) = self.shared.registry.find(&to).or_else(|| self.shared.far(&to)) else {
            self.count(Count::DropNotHere, outbox::count(frames));
            self.not_here(slot, generation, to);
            return;
        };
        if let Some(connection) = self.connection(slot, generation)
            && let Phase::Client(client) = &mut connection.phase
        {
            if client.sent_to.len() < limits::SENT_TO_MAX && !client.sent_to.contains(&to) {
                client.sent_to.insert(to);
            }
            if client.shadow && !client.mate && client.take_over.take_one(now_ms) {
                client.shadow = false;
                self.count(Count::TakeOvers, 1);
                self.tell(slot, generation, &Frame::Health(""));
                if let Some(former) = self.shared.registry.activate(from, place) {
                    self.outgoing[usize::from(former.worker)].order(Order::Shadow(former, true));
                }
            }
        }
        if target.worker == self.index {
            self.deliver(target.slot, target.generation, frames);
        } else if usize::from(target.worker) < self.shared.workers {
            self.outgoing[usize::from(target.worker)].push(target, frames);
        } else {
            self.forward_far(target, from, to, frames);
        }
    }

    /// Tells a sender that its peer is not here; not for each packet.
    pub(crate) fn not_here(&mut self, slot: u32, generation: u32, peer: PublicKey) {
        let now_ms = self.now_ms;
        let Some(connection) = self.connection(slot, generation) else { return };
        let Phase::Client(client) = &mut connection.phase else { return };
        if client.not_here.take_one(now_ms) {
            self.count(Count::PeerGoneSent, 1);
            self.tell(slot, generation, &Frame::PeerGone { peer, why: Gone::NotHere });
        }
    }

    /// Queues whole frames for one of our connections.
    pub(crate) fn deliver(&mut self, slot: u32, generation: u32, frames: &[u8]) {
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut spare = std::mem::take(&mut self.spare);
        // Frames that travel together are all packets, or none is.
        let is_packet = frames.first() == Some(&(Kind::RecvPacket as u8));
        let count = if is_packet { outbox::count(frames) } else { 0 };
        let Some(connection) = self.connection(slot, generation) else {
            (self.scratch, self.spare) = (scratch, spare);
            self.count(Count::DropGone, count);
            return;
        };
        let mut dropped = 0;
        let mut direct = Ok(0);
        let mut flush = false;
        if connection.watched {
            dropped = connection.outbox.push_congested(frames);
        } else {
            let mut rest = frames;
            if frames.len() >= limits::DIRECT_BYTES && !connection.is_blocked() {
                direct = connection.send(frames, &mut scratch);
                rest = &frames[*direct.as_ref().unwrap_or(&frames.len())..];
            }
            if !rest.is_empty() {
                if connection.outbox.wants_buffer() {
                    connection.outbox.lend(spare.pop().unwrap_or_default());
                }
                connection.outbox.push(rest, outbox::count(rest));
            }
            flush = connection.outbox.len() >= limits::FLUSH_BYTES;
        }
        (self.scratch, self.spare) = (scratch, spare);
        self.count(Count::DropQueue, dropped);
        self.count(Count::SentPackets, count - dropped.min(count));
        match direct {
            Ok(sent) => {
                self.count(Count::SentBytes, sent);
                self.touch(slot, generation);
            }
            Err(end) => self.doom(slot, generation, end),
        }
        if flush && let Err(end) = self.flush(slot, generation) {
            self.doom(slot, generation, end);
        }
    }

    /// Queues one of our own frames.
    pub(crate) fn tell(&mut self, slot: u32, generation: u32, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame.write(&mut bytes);
        let Some(connection) = self.connection(slot, generation) else { return };
        if connection.watched {
            connection.outbox.push_congested(&bytes);
        } else {
            connection.outbox.push(&bytes, 1);
        }
        self.touch(slot, generation);
    }

    /// A client has gone: those to whom it sent hear it, as they may have a path through it.
    pub(crate) fn farewell(&mut self, client: &Client) {
        let mut gone = Vec::new();
        Frame::PeerGone { peer: client.key, why: Gone::Disconnected }.write(&mut gone);
        for peer in &client.sent_to {
            let Some(place) = self.shared.registry.find(peer) else { continue };
            self.count(Count::PeerGoneSent, 1);
            if place.worker == self.index {
                let Some(connection) = self.connection(place.slot, place.generation) else {
                    continue;
                };
                connection.outbox.push_congested(&gone);
                self.touch(place.slot, place.generation);
            } else {
                self.outgoing[usize::from(place.worker)].push(place, &gone);
            }
        }
    }

    pub(crate) fn obey_one(&mut self, order: Order) {
        let (place, shadow) = match order {
            Order::Shadow(place, shadow) => (place, shadow),
            Order::Presence(key) => return self.tell_watchers(key),
            Order::Close(place) => return self.close(place),
        };
        let Some(connection) = self.connection(place.slot, place.generation) else { return };
        let Phase::Client(client) = &mut connection.phase else { return };
        client.shadow = shadow;
        let text = if shadow { SHARED_KEY } else { "" };
        self.tell(place.slot, place.generation, &Frame::Health(text));
    }
}
