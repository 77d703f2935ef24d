//! The slow thread: owns the WireGuard device, and everything that is not a packet of an
//! established session goes through it. Sleeps until a handshake, an event, a command or a
//! deadline; an idle gateway does not wake.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::{io, iter};

use arrayvec::ArrayVec;
use millrace_config::Exit;
use millrace_config::uapi::{Errno, SetRequest};
use millrace_ebpf::class::{self, Class};
use millrace_wg::device::{Device, Output};
use millrace_wg::limits::UNDER_LOAD_QUEUE;
use millrace_wg::time::Clock;
use millrace_wg::{Drop, DropCounters, Endpoint};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::clock::{self, SuspendWatch};
use crate::control::{Command, ControlQueue, Refusal};
use crate::device_uapi::{self, RefusedPeers};
use crate::facts::Facts;
use crate::failure::Failure;
use crate::io::detour::Detour;
use crate::io::udp::{self, Receiver, UdpSocket};
use crate::link::{self, Link};
use crate::queue::SlowQueue;
use crate::state::TimestampFile;
use crate::steering::Steering;
use crate::watchdog::Pulse;

/// Handshake messages taken from the socket before timers and commands get their turn.
const TURN_MESSAGES: usize = 32;
/// Events and forwarded handshakes likewise.
const TURN_EVENTS: usize = 256;

/// Runs that control received, likewise.
const TURN_DETOURS: usize = 4;

/// Everything that the slow thread owns.
pub struct Slow {
    pub device: Device,
    /// Sends for the device.
    pub udp: Arc<UdpSocket>,
    /// The socket is our own and gets the handshakes; else a worker's, which hands them over.
    pub receives: bool,
    pub control: ControlQueue,
    pub queue: Arc<SlowQueue>,
    pub drops: Arc<DropCounters>,
    pub steering: Steering,
    pub timestamps: TimestampFile,
    pub facts: Facts,
    /// Readable when the workers must end.
    pub stop_workers: Arc<OwnedFd>,
    pub receiver: Receiver,
    pub suspend: SuspendWatch,
    pub refused: RefusedPeers,
    pub link: Link,
    /// Our pair; none where the link has nothing to hand out.
    pub detour: Option<Detour>,
    /// Where a watchdog is asked for.
    pub pulse: Option<Arc<Pulse>>,
}

impl Slow {
    /// Runs until [`Command::Stop`], or until a worker says that the TUN device is gone.
    pub fn run(mut self) -> Result<(), Failure> {
        let end = loop {
            let Woken { clock_jumped, by_control, by_detour } = self.wait();
            if self.queue.is_tun_gone() {
                break Err(Failure::new(
                    Exit::Error,
                    format!("the interface {} is gone", self.facts.interface),
                    "somebody removed it: start again, and remove it with `millrace down`",
                ));
            }
            if clock_jumped && self.suspend.take() {
                // As the kernel does it: keys of before the sleep are not used after it.
                tracing::info!("the machine was suspended: every session starts anew");
                self.device.wipe_all(now());
                self.drain();
            }
            self.receive();
            if by_detour {
                self.receive_detoured();
            }
            self.take_queues();
            if !self.take_commands() {
                break Ok(());
            }
            if by_control {
                self.serve_control();
            }
            let clock = now();
            if self.device.poll_timeout().is_some_and(|(deadline, _)| deadline <= clock.now) {
                self.device.handle_timeout(clock);
                self.drain();
            }
            self.link.wake(clock.now);
            if self.link.deadline().is_some_and(|deadline| deadline <= clock.now) {
                let Self { link, device, facts, .. } = &mut self;
                link.keep_up(device, &facts.place(), clock.now);
            }
        };
        self.steering.close();
        // Workers poll this descriptor; they end after the batch in their hands.
        let _ = rustix::io::write(&self.stop_workers, &1u64.to_ne_bytes());
        end
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> Woken {
        let device = self.device.poll_timeout().map(|(deadline, _reason)| deadline);
        let deadline = device.into_iter().chain(self.link.deadline()).min();
        let timeout = deadline.map(|deadline| {
            let left = deadline.since(clock::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let receive = if self.receives { PollFlags::IN } else { PollFlags::empty() };
        let mut fds: ArrayVec<PollFd<'_>, { 6 + link::POLL_MAX }> = ArrayVec::from_iter([
            PollFd::from_borrowed_fd(self.suspend.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.udp.as_fd(), receive),
            PollFd::from_borrowed_fd(self.queue.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.control.as_fd(), PollFlags::IN),
        ]);
        let detour_at = fds.len();
        let detour = self.detour.as_ref();
        fds.extend(detour.map(|detour| PollFd::from_borrowed_fd(detour.as_fd(), PollFlags::IN)));
        let link_at = fds.len();
        fds.extend(self.link.poll_fds());
        let pulse_at = fds.len();
        let pulse = self.pulse.as_deref();
        fds.extend(pulse.map(|pulse| PollFd::from_borrowed_fd(pulse.as_fd(), PollFlags::IN)));
        // Interrupted is as good as woken: the turn looks at everything.
        let _ = poll(&mut fds, timeout.as_ref());
        let any = |fds: &[PollFd<'_>]| fds.iter().any(|fd| !fd.revents().is_empty());
        if let (Some(pulse), true) = (pulse, any(&fds[pulse_at..])) {
            pulse.answer();
        }
        Woken {
            clock_jumped: any(&fds[..1]),
            by_detour: any(&fds[detour_at..link_at]),
            by_control: any(&fds[link_at..pulse_at]),
        }
    }

    /// Handshakes from our own socket.
    fn receive(&mut self) {
        if !self.receives {
            return;
        }
        // An error of the socket is an ICMP answer to an earlier send: a hint only.
        let count = self.receiver.receive(&self.udp, TURN_MESSAGES).unwrap_or(0);
        if count == 0 {
            return;
        }
        // The socket does not tell how many wait behind a full turn. That many since the last look
        // is a flood for a gateway; being wrong costs honest peers one round trip for a cookie.
        let waiting = if count == TURN_MESSAGES { UNDER_LOAD_QUEUE } else { 0 };
        let waiting = waiting + self.queue.handshakes_waiting();
        let clock = now();
        for message in self.receiver.messages(count) {
            if let Some(defect) = message.defect() {
                self.drops.add(defect, 1);
                continue;
            }
            for datagram in message.bytes.chunks_mut(message.segment_len) {
                match class::classify(datagram) {
                    // Ours only while control, whose it is, has no socket in the group.
                    Class::Stun | Class::Disco | Class::Geneve => {
                        self.drops.add(Drop::ControlAbsent, 1);
                    }
                    _ => self.device.handle_datagram(clock, message.source, datagram, waiting),
                }
            }
        }
        self.drain();
    }

    /// Handshakes that control received.
    fn receive_detoured(&mut self) {
        let Some(detour) = &mut self.detour else { return };
        let clock = now();
        for _ in 0..TURN_DETOURS {
            let Some(received) = detour.receive(&self.drops) else { break };
            let Some((slot, mut run)) = received else { continue };
            // An honest run holds one; one of hundreds must not cost as many Diffie-Hellmans.
            let flood = run.messages().count() >= TURN_MESSAGES;
            let waiting = if flood { UNDER_LOAD_QUEUE } else { 0 };
            let waiting = waiting + self.queue.handshakes_waiting();
            for message in run.messages() {
                self.device.handle_datagram(clock, Endpoint::detour(slot), message, waiting);
            }
        }
        self.drain();
    }

    fn serve_control(&mut self) {
        let Self { link, device, facts, .. } = self;
        link.serve(device, &facts.place(), now());
        self.drain();
    }

    /// What workers pushed.
    fn take_queues(&mut self) {
        self.queue.reset_wake();
        let clock = now();
        for _ in 0..TURN_EVENTS {
            let Some(event) = self.queue.pop_event() else { break };
            self.device.handle_event(clock, event);
            self.drain();
        }
        for _ in 0..TURN_EVENTS {
            let Some(mut handshake) = self.queue.pop_handshake() else { break };
            let waiting = self.queue.handshakes_waiting();
            let source = handshake.source;
            self.device.handle_datagram(clock, source, handshake.bytes_mut(), waiting);
            self.drain();
        }
        self.queue.wake_if_not_empty();
    }

    /// False when it is time to end.
    fn take_commands(&mut self) -> bool {
        while let Some(command) = self.control.take() {
            if !matches!(command, Command::Get { .. }) {
                self.link.note_change(clock::now());
            }
            match command {
                Command::Get { reply } => {
                    let state = device_uapi::state(
                        &self.device,
                        &self.facts,
                        &self.refused,
                        &self.steering,
                        &self.link,
                    );
                    // The asker may have given up.
                    let _ = reply.send(state);
                }
                Command::Set { change, reply } => {
                    let result = self.set(change);
                    let _ = reply.send(result);
                }
                Command::SetMtu(mtu) => self.device.set_mtu(mtu),
                Command::SetUp(up) => self.device.set_up(now(), up),
                Command::SetAbout(about) => self.facts.about = about,
                Command::SetNameNote(note) => self.facts.name_note = note,
                Command::Stop => return false,
            }
            self.drain();
        }
        true
    }

    fn set(&mut self, change: SetRequest) -> Result<(), Refusal> {
        let port = self.facts.listen_port;
        if change.listen_port.is_some_and(|wanted| wanted != 0 && wanted != port) {
            return Err(Refusal::new(
                Errno::NotSupported,
                format!("listen_port is {port} and changes only with a restart"),
            ));
        }
        if let Some(mark) = change.fwmark {
            for socket in
                iter::once(&*self.udp).chain(self.facts.worker_sockets.iter().map(AsRef::as_ref))
            {
                socket.set_mark(mark).map_err(refused_mark)?;
            }
            self.link.set_mark(mark).map_err(refused_mark)?;
            self.facts.fwmark.store(mark, Ordering::Relaxed);
        }
        device_uapi::apply(&mut self.device, &mut self.refused, now(), change)
    }

    /// Sends one datagram; from another of our addresses if that of the endpoint is gone.
    fn send(&self, to: Endpoint, tos: u8, bytes: &[u8]) -> io::Result<()> {
        if let Some(slot) = to.detour_slot() {
            match &self.detour {
                Some(detour) => detour.send(slot, bytes.len(), bytes, &self.drops),
                None => self.drops.add(Drop::DetourGone, 1),
            }
            return Ok(());
        }
        match self.udp.send(&to, tos, bytes, bytes.len()) {
            Err(error) if to.local.is_some() && udp::blames_source(&error) => {
                let to = Endpoint { local: None, ifindex: 0, ..to };
                self.udp.send(&to, tos, bytes, bytes.len())
            }
            result => result,
        }
    }

    /// Carries out what the device decided, in its order.
    fn drain(&mut self) {
        let workers = self.facts.worker_sockets.len();
        while let Some(output) = self.device.poll_output() {
            match output {
                Output::Transmit { to, bytes, tos } => {
                    if self.send(to, tos, &bytes).is_err() {
                        // A handshake is tried again; a staged packet is lost as any datagram is.
                        self.drops.add(Drop::TxSocketError, 1);
                    }
                }
                Output::SessionUp { local_index, peer } => {
                    self.steering.session_up(local_index, peer, workers);
                }
                Output::SessionDown { local_index } => self.steering.session_down(local_index),
                Output::TimestampUsed(timestamp) => self.timestamps.store(timestamp.0),
            }
        }
    }
}

/// Why the slow thread does not sleep.
struct Woken {
    clock_jumped: bool,
    by_control: bool,
    by_detour: bool,
}

fn refused_mark(error: io::Error) -> Refusal {
    Refusal::new(Errno::Permission, format!("setting fwmark: {error}"))
}

fn now() -> Clock {
    Clock { now: clock::now(), wall: clock::wall() }
}
