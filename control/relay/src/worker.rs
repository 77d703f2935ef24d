//! One thread with its own listeners, connections and buffers.
//!
//! A turn takes what epoll has, moves frames from readers to queues, and then writes each queue once:
//! what a client sent in one piece leaves in one piece. Nothing is shared with other workers but the
//! registry and the mailboxes.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millrace_path::derp::{Frame, KEEP_ALIVE_S};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::connection::{Connection, End, Phase};
use crate::limits;
use crate::mail::{Letters, Order};
use crate::metrics::{Count, Counters};
use crate::registry::{Place, Removed};
use crate::session::Session;
use crate::shared::{Live, Shared};

/// A slot number that no connection has: the mailbox, and above it the listeners.
const MAILBOX: u64 = u32::MAX as u64;

/// What a port is for.
#[derive(Debug)]
pub struct Door {
    pub listener: TcpListener,
    pub tls: bool,
    /// /derp is served here.
    pub relay: bool,
}

/// A place for a connection; used again with the next generation.
#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    connection: Option<Box<Connection>>,
}

#[derive(Debug)]
pub struct Worker {
    pub(crate) index: u16,
    pub(crate) shared: Arc<Shared>,
    pub(crate) live: Arc<Live>,
    epoll: OwnedFd,
    doors: Vec<Door>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    born: Instant,
    pub(crate) now_ms: u64,
    next_sweep_ms: u64,
    /// What is read, then with TLS what was decrypted, then what is sealed.
    buffer: Vec<u8>,
    plain: Vec<u8>,
    pub(crate) scratch: Vec<u8>,
    pub(crate) spare: Vec<Vec<u8>>,
    /// Connections with something to write, and those that end after this turn.
    pub(crate) dirty: Vec<(u32, u32)>,
    doomed: Vec<(u32, u32, End)>,
    /// Until when reading from a connection is paused.
    paused: Vec<(u64, u32, u32)>,
    /// Mates that watch who comes and goes.
    pub(crate) watchers: Vec<(u32, u32)>,
    /// For every worker and every mate; our own stays empty but for orders.
    pub(crate) outgoing: Vec<Letters>,
    drained: bool,
}

impl Worker {
    pub fn new(index: u16, shared: Arc<Shared>, doors: Vec<Door>) -> std::io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let mailbox = &shared.desks[usize::from(index)].mailbox;
        epoll::add(&epoll, mailbox, EventData::new_u64(MAILBOX), EventFlags::IN)?;
        for (number, door) in (1..).zip(&doors) {
            let token = EventData::new_u64(MAILBOX | number << 32);
            epoll::add(&epoll, &door.listener, token, EventFlags::IN)?;
        }
        let outgoing = shared.desks.iter().map(|_| Letters::default()).collect();
        Ok(Self {
            index,
            live: shared.live.load_full(),
            epoll,
            doors,
            slots: Vec::new(),
            free: Vec::new(),
            born: Instant::now(),
            now_ms: 0,
            next_sweep_ms: 0,
            buffer: vec![0; limits::READ_MAX],
            plain: Vec::new(),
            scratch: Vec::new(),
            spare: Vec::new(),
            dirty: Vec::new(),
            doomed: Vec::new(),
            paused: Vec::new(),
            watchers: Vec::new(),
            outgoing,
            drained: false,
            shared,
        })
    }

    /// Takes turns until the relay stops.
    pub fn run(mut self) -> std::io::Result<()> {
        let mut events = Vec::with_capacity(limits::EVENTS_PER_TURN);
        while !self.shared.stopped() {
            events.clear();
            let wait = self.wait();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&wait))
            {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.now_ms = self.born.elapsed().as_millis() as u64;
            for event in &events {
                self.event(event.data.u64(), event.flags);
            }
            self.resume();
            self.sweep();
            self.finish();
        }
        Ok(())
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.desks[usize::from(self.index)].counters
    }

    pub(crate) fn count(&self, count: Count, amount: usize) {
        self.counters().add(count, amount as u64);
    }

    /// The connection in a slot, if it is still the one that was meant.
    pub(crate) fn connection(&mut self, slot: u32, generation: u32) -> Option<&mut Connection> {
        let slot = self.slots.get_mut(slot as usize)?;
        slot.connection.as_deref_mut().filter(|_| slot.generation == generation)
    }

    pub(crate) fn place(&self, slot: u32, generation: u32) -> Place {
        Place { worker: self.index, slot, generation }
    }

    /// Lets a connection end once this turn is over.
    pub(crate) fn doom(&mut self, slot: u32, generation: u32, end: End) {
        self.doomed.push((slot, generation, end));
    }

    /// Writes to a connection at the end of this turn.
    pub(crate) fn touch(&mut self, slot: u32, generation: u32) {
        let Some(connection) = self.connection(slot, generation) else { return };
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push((slot, generation));
        }
    }

    /// Reads no more from a connection until then.
    pub(crate) fn pause(&mut self, slot: u32, generation: u32, until_ms: u64) {
        self.count(Count::Throttled, 1);
        if let Some(connection) = self.connection(slot, generation) {
            connection.paused = true;
            self.paused.push((until_ms, slot, generation));
            self.interest(slot, generation);
        }
    }

    /// Until the next deadline of ours.
    fn wait(&self) -> Timespec {
        let next = self.paused.iter().map(|&(until_ms, ..)| until_ms).min();
        let next = next.unwrap_or(u64::MAX).min(self.next_sweep_ms);
        let now = self.born.elapsed();
        let left = Duration::from_millis(next).saturating_sub(now);
        Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
    }

    fn event(&mut self, token: u64, flags: EventFlags) {
        let (slot, high) = ((token & MAILBOX) as u32, (token >> 32) as u32);
        if u64::from(slot) == MAILBOX {
            match high.checked_sub(1) {
                None => self.mail(),
                Some(door) => self.accept(door as usize),
            }
            return;
        }
        if flags.intersects(EventFlags::OUT) {
            self.touch(slot, high);
        }
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR)
            && let Err(end) = self.read(slot, high)
        {
            self.doom(slot, high, end);
        }
    }

    fn accept(&mut self, door: usize) {
        for _ in 0..limits::ACCEPTS_PER_TURN {
            let Some(Door { listener, tls, relay }) = self.doors.get(door) else { return };
            let (tls, relay) = (*tls, *relay);
            match listener.accept() {
                Ok((socket, peer)) => match self.welcome(socket, peer, tls, relay) {
                    Ok(()) => {}
                    Err(error) => tracing::debug!(%peer, "connection: {error}"),
                },
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, or the client left already: others are not to suffer.
                    tracing::warn!("accepting a connection: {error}");
                    return;
                }
            }
        }
    }

    fn welcome(
        &mut self,
        socket: TcpStream,
        peer: SocketAddr,
        tls: bool,
        relay: bool,
    ) -> Result<(), End> {
        self.count(Count::Accepted, 1);
        let shared = &self.shared;
        let full = shared.connections.fetch_add(1, Ordering::Relaxed) >= shared.connections_max;
        if full || !shared.addresses.enter(peer.ip()) {
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            self.count(if full { Count::ErrorFull } else { Count::ErrorAddress }, 1);
            self.count(Count::Closed, 1);
            return Ok(());
        }
        let deadline_ms = self.now_ms + limits::LOGIN_LIMIT.as_millis() as u64;
        let prepared = prepare(&socket).map_err(End::from).and_then(|()| {
            let mut connection = Connection::new(socket, peer, relay, deadline_ms);
            if let Some(config) = self.live.tls.as_ref().filter(|_| tls) {
                connection.session = Some(Session::new(Arc::clone(config))?);
            }
            let slot = self.free.pop().unwrap_or_else(|| {
                self.slots.push(Slot::default());
                self.slots.len() as u32 - 1
            });
            let place = &mut self.slots[slot as usize];
            let token = EventData::new_u64(u64::from(slot) | u64::from(place.generation) << 32);
            match epoll::add(&self.epoll, &connection, token, EventFlags::IN) {
                Ok(()) => place.connection = Some(Box::new(connection)),
                Err(error) => {
                    self.free.push(slot);
                    return Err(std::io::Error::from(error).into());
                }
            }
            Ok(())
        });
        if prepared.is_err() {
            self.shared.addresses.leave(peer.ip());
            self.shared.connections.fetch_sub(1, Ordering::Relaxed);
            self.count(Count::Closed, 1);
        }
        prepared
    }

    /// Reads once from a connection and does what the bytes ask for.
    fn read(&mut self, slot: u32, generation: u32) -> Result<(), End> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut plain = std::mem::take(&mut self.plain);
        let result = self.receive(slot, generation, &mut buffer, &mut plain);
        plain.clear();
        (self.buffer, self.plain) = (buffer, plain);
        result
    }

    fn receive(
        &mut self,
        slot: u32,
        generation: u32,
        buffer: &mut [u8],
        plain: &mut Vec<u8>,
    ) -> Result<(), End> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let Some(connection) = self.connection(slot, generation) else { return Ok(()) };
        let Some(filled) = connection.fill(buffer)? else { return Ok(()) };
        let mut closed = false;
        if let Some(session) = &mut connection.session {
            plain.append(&mut connection.plain);
            let mut answer = Vec::new();
            let received = session.receive(&mut buffer[..filled], plain, &mut answer);
            // An alert says what is wrong also when we end the connection for it.
            connection.send_bytes(&answer, true, &mut scratch)?;
            let received = received?;
            connection.hold(&buffer[received.taken..filled]);
            closed = received.closed;
            self.scratch = scratch;
            let used = self.consume(slot, generation, plain)?;
            if let Some(connection) = self.connection(slot, generation) {
                connection.plain = plain[used..].to_vec();
            }
        } else {
            self.scratch = scratch;
            let used = self.consume(slot, generation, &mut buffer[..filled])?;
            if let Some(connection) = self.connection(slot, generation) {
                connection.hold(&buffer[used..filled]);
            }
        }
        self.touch(slot, generation);
        if closed { Err(End::Left) } else { Ok(()) }
    }

    /// Reads again from those whose pause is over.
    fn resume(&mut self) {
        let now_ms = self.now_ms;
        let mut over = Vec::new();
        self.paused.retain(|&(until_ms, slot, generation)| {
            let waits = until_ms > now_ms;
            if !waits {
                over.push((slot, generation));
            }
            waits
        });
        for (slot, generation) in over {
            if let Some(connection) = self.connection(slot, generation) {
                connection.paused = false;
                self.interest(slot, generation);
            }
        }
    }

    /// Once a second: deadlines of all connections, a new configuration, the beginning of the end.
    fn sweep(&mut self) {
        if self.shared.draining() && !self.drained {
            self.drain();
        }
        if self.now_ms < self.next_sweep_ms {
            return;
        }
        self.next_sweep_ms = self.now_ms + limits::SWEEP_INTERVAL.as_millis() as u64;
        self.shared.desks[usize::from(self.index)].beat.fetch_add(1, Ordering::Relaxed);
        let live = self.shared.live.load_full();
        let changed = !Arc::ptr_eq(&live, &self.live);
        self.live = live;
        for slot in 0..self.slots.len() {
            let Slot { generation, connection: Some(connection) } = &mut self.slots[slot] else {
                continue;
            };
            let (slot, generation) = (slot as u32, *generation);
            let late = self.now_ms >= connection.deadline_ms;
            match &connection.phase {
                Phase::Client(client)
                    if changed && !client.mate && !self.live.admission.admits(&client.key) =>
                {
                    self.doomed.push((slot, generation, End::NotAdmitted));
                }
                Phase::Client(_) if late => {
                    // Spread, so that thousands that came at once do not hear from us at once.
                    let jitter_ms = u64::from(slot) * 997 % (limits::KEEP_ALIVE_JITTER_S * 1000);
                    connection.deadline_ms = self.now_ms + KEEP_ALIVE_S * 1000 + jitter_ms;
                    self.count(Count::KeepAlives, 1);
                    self.tell(slot, generation, &Frame::KeepAlive);
                }
                Phase::Client(_) => {}
                _ if late => self.doomed.push((slot, generation, End::Timeout)),
                _ => {}
            }
        }
    }

    /// Nobody comes in any more, and everybody hears when to come back.
    fn drain(&mut self) {
        self.drained = true;
        self.doors.clear();
        for slot in 0..self.slots.len() {
            let Slot { generation, connection: Some(connection) } = &self.slots[slot] else {
                continue;
            };
            if let Phase::Client(_) = connection.phase {
                let (slot, generation) = (slot as u32, *generation);
                let reconnect_in_ms = slot.wrapping_mul(997) % 1000;
                let try_for_ms = limits::RESTART_TRY_MS;
                self.tell(slot, generation, &Frame::Restarting { reconnect_in_ms, try_for_ms });
            }
        }
    }

    /// The end of a turn: letters leave, queues are written, connections end.
    fn finish(&mut self) {
        loop {
            self.obey();
            while let Some((slot, generation)) = self.dirty.pop() {
                if let Err(end) = self.flush(slot, generation) {
                    self.doom(slot, generation, end);
                }
            }
            let doomed = std::mem::take(&mut self.doomed);
            if doomed.is_empty() {
                break;
            }
            for (slot, generation, end) in doomed {
                self.end(slot, generation, &end);
            }
        }
        for (desk, letters) in self.shared.desks.iter().zip(&mut self.outgoing) {
            if !letters.is_empty() {
                let dropped = desk.mailbox.post(letters);
                let counters = &self.shared.desks[usize::from(self.index)].counters;
                counters.add(Count::DropMail, dropped);
            }
        }
    }

    /// Writes what a connection's queue holds, and has the kernel tell us if it does not take all.
    pub(crate) fn flush(&mut self, slot: u32, generation: u32) -> Result<(), End> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let Some(connection) = self.connection(slot, generation) else {
            self.scratch = scratch;
            return Ok(());
        };
        connection.dirty = false;
        let flushed = connection.flush(&mut scratch);
        let blocked = connection.is_blocked();
        let dropped = if blocked { connection.outbox.push_congested(&[]) } else { 0 };
        let ends = connection.closing && !blocked;
        let watches = blocked != connection.watched;
        connection.watched = blocked;
        let buffer = connection.outbox.take_buffer();
        self.scratch = scratch;
        self.spare.extend(buffer.filter(|buffer| {
            self.spare.len() < limits::SPARE_BUFFERS && buffer.capacity() <= limits::SPARE_BYTES_MAX
        }));
        self.count(Count::DropQueue, dropped);
        self.count(Count::SentBytes, flushed?);
        if watches {
            self.interest(slot, generation);
        }
        if ends { Err(End::Answered) } else { Ok(()) }
    }

    /// Tells the kernel what we want to hear of a connection.
    pub(crate) fn interest(&mut self, slot: u32, generation: u32) {
        let Some(Slot { connection: Some(connection), .. }) = self.slots.get(slot as usize) else {
            return;
        };
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, !connection.paused);
        flags.set(EventFlags::OUT, connection.watched);
        let token = EventData::new_u64(u64::from(slot) | u64::from(generation) << 32);
        if let Err(error) = epoll::modify(&self.epoll, &**connection, token, flags) {
            self.doom(slot, generation, std::io::Error::from(error).into());
        }
    }

    /// Takes a connection down and tells whom it concerns.
    fn end(&mut self, slot: u32, generation: u32, end: &End) {
        let Some(place) = self.slots.get_mut(slot as usize) else { return };
        if place.generation != generation {
            return;
        }
        let Some(connection) = place.connection.take() else { return };
        place.generation = generation.wrapping_add(1);
        self.free.push(slot);
        self.shared.addresses.leave(connection.peer.ip());
        self.shared.connections.fetch_sub(1, Ordering::Relaxed);
        self.count(Count::Closed, 1);
        match end {
            End::Left | End::Answered | End::System(_) => {}
            End::Tls(_) => self.count(Count::ErrorTls, 1),
            End::Http(_) => self.count(Count::ErrorHttp, 1),
            End::Frame(_) | End::Unexpected(_) | End::TooLong => self.count(Count::ErrorFrame, 1),
            End::Login(_) => self.count(Count::ErrorLogin, 1),
            End::NotAdmitted => self.count(Count::LoginsRefused, 1),
            End::MeshKey => self.count(Count::ErrorMeshKey, 1),
            End::Behind => self.count(Count::ErrorBehind, 1),
            End::Closed => self.count(Count::ErrorClosed, 1),
            End::Timeout => self.count(Count::ErrorTimeout, 1),
        }
        tracing::debug!(peer = %connection.peer, "connection ended: {end}");
        let Phase::Client(client) = connection.phase else { return };
        if client.mate {
            self.unwatch(slot, generation);
            return;
        }
        match self.shared.registry.remove(&client.key, self.place(slot, generation)) {
            Removed::Gone => {
                self.announce(client.key);
                if !self.moved_away(&client) {
                    self.farewell(&client);
                }
            }
            Removed::Inherited(heir) => {
                self.outgoing[usize::from(heir.worker)].order(Order::Shadow(heir, false));
            }
            Removed::Unknown => {}
        }
    }

    /// Frames and orders from other workers.
    fn mail(&mut self) {
        let mut letters = Letters::default();
        self.shared.desks[usize::from(self.index)].mailbox.take(&mut letters);
        let mut at = 0;
        while let Some((slot, generation, frames)) = letters.record(at) {
            at = frames.end;
            self.deliver(slot, generation, letters.frames(frames));
        }
        for &order in letters.orders() {
            self.obey_one(order);
        }
    }

    /// Orders from ourselves.
    fn obey(&mut self) {
        let own = usize::from(self.index);
        let orders = self.outgoing[own].orders().to_vec();
        self.outgoing[own].clear();
        for order in orders {
            self.obey_one(order);
        }
    }
}

/// Sets up an accepted socket.
fn prepare(socket: &TcpStream) -> std::io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    socket.set_nonblocking(true)?;
    // We batch ourselves; what is written is to leave.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(limits::UNACKNOWLEDGED_LIMIT))
}
