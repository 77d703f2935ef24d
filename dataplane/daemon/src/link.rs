//! Control's place at the slow thread: who may connect, what is told, what is handed out, and what
//! is taken back when control is gone. Without control nothing changes for any packet: the lines of
//! ENDPOINTS stay.

use std::collections::BTreeMap;
use std::num::NonZeroU8;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use millrace_ebpf::abi;
use millrace_ebpf::link::{
    self, BoxKey, BoxKeyAnswer, BoxKeyRefusal, LinkError, LinkPeer, Offer, PublicKey, ToControl,
    ToDataPlane, Welcome,
};
use millrace_ebpf::load::Programs;
use millrace_ebpf::maps::LineWriter;
use millrace_ebpf::tables::{SocketFamily, SocketSlot};
use millrace_wg::device::{Device, NoBoxKey, PeerView};
use millrace_wg::time::Clock;
use millrace_wg::{Drop, DropCounters, Instant, PeerSlot};
use rustix::event::{PollFd, PollFlags};
use zeroize::Zeroizing;

use crate::clock;
use crate::connects::Connects;
use crate::io::detour::Counterparts;
use crate::io::tap::Tap;
use crate::io::udp::UdpSocket;
use crate::link_file::LinkFile;
use crate::observer::Observer;

/// Questions answered before packets get their turn: each is a Diffie-Hellman of some 50 µs.
const TURN_QUESTIONS: usize = 16;
/// From a change of peers to telling it: a tool that sets thousands one by one is told of once.
const TELL_PAUSE: Duration = Duration::from_millis(20);
/// From a failure to let somebody in to the next try.
const DEAF_PAUSE: Duration = Duration::from_secs(1);
/// Frames past the firewall that are told at once, and the pause when they come faster than it: 640
/// a second, and no more than 20 turns of this thread.
const HEARD_PER_TURN: usize = 32;
const HEARD_PAUSE: Duration = Duration::from_millis(50);
/// More than the buffers hold; those over a turn's number are counted.
const HEARD_READ_MAX: usize = 1024;
/// Descriptors to poll, at most.
pub const POLL_MAX: usize = 5;

/// Everything about control.
pub struct Link {
    /// Or why nobody can connect.
    file: Result<LinkFile, String>,
    /// Or why there is nothing to hand out.
    tools: Result<Tools, String>,
    /// Connected, and has not said hello.
    arriving: Option<LinkPeer>,
    client: Option<Client>,
    /// What the client knows, or would.
    told: Told,
    /// When to compare it with what is.
    tell_at: Option<Instant>,
    /// Nobody could be let in: we are out of descriptors, most likely, and they come back.
    deaf_until: Option<Instant>,
    pub connects: Connects,
    /// When frames past the firewall were last taken, and until when they wait.
    heard_at: Option<Instant>,
    deaf_to_frames_until: Option<Instant>,
    /// The slow thread's.
    drops: Arc<DropCounters>,
}

/// What control works with.
pub struct Tools {
    pub programs: Arc<Programs>,
    /// Of our port, and in no slot while control is not connected.
    pub udp: UdpSocket,
    pub detours: Counterparts,
    pub workers: NonZeroU8,
    pub observer: Observer,
    /// Or why disco that the host's firewall drops is not heard.
    pub tap: Result<Tap, String>,
    /// Control's to write. We do so only while there is none, and only for slots without a peer.
    pub endpoints: LineWriter<abi::Endpoint>,
}

struct Client {
    peer: LinkPeer,
    /// Since the Unix epoch.
    since: Duration,
}

/// The facts of the interface that do not come from the device.
pub struct Place<'a> {
    pub interface: &'a str,
    pub listen_port: u16,
    pub fwmark: u32,
}

#[derive(Default)]
struct Told {
    public_key: Option<PublicKey>,
    mtu: u16,
    fwmark: u32,
    peers: BTreeMap<u32, link::Peer>,
}

impl Link {
    pub fn new(
        file: Result<LinkFile, String>,
        tools: Result<Tools, String>,
        drops: Arc<DropCounters>,
    ) -> Self {
        Self {
            file,
            tools,
            arriving: None,
            client: None,
            told: Told::default(),
            tell_at: None,
            deaf_until: None,
            connects: Connects::default(),
            heard_at: None,
            deaf_to_frames_until: None,
            drops,
        }
    }

    /// What to wait for, at most [`POLL_MAX`].
    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let client = self.client.as_ref().map(|client| &client.peer);
        let file = self.file.as_ref().ok().filter(|_| self.deaf_until.is_none());
        let file = file.map(|file| (file.as_fd(), PollFlags::IN));
        let peers = client.into_iter().chain(&self.arriving).map(|peer| {
            let out = if peer.wants_write() { PollFlags::OUT } else { PollFlags::empty() };
            (peer.as_fd(), PollFlags::IN | out)
        });
        let hears = self.client.is_some() && self.deaf_to_frames_until.is_none();
        let taps = self.tap().filter(|_| hears).into_iter().flat_map(Tap::fds);
        let taps = taps.map(|fd| (fd, PollFlags::IN));
        let all = file.into_iter().chain(peers).chain(taps);
        all.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
    }

    fn tap(&self) -> Option<&Tap> {
        self.tools.as_ref().ok()?.tap.as_ref().ok()
    }

    /// When to call [`Self::keep_up`] even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let observer = self.tools.as_ref().ok().and_then(|tools| tools.observer.deadline());
        let others = [self.tell_at, self.deaf_until, self.deaf_to_frames_until];
        others.into_iter().chain([observer]).flatten().min()
    }

    /// Peers, keys or numbers may have changed.
    pub fn note_change(&mut self, now: Instant) {
        self.tell_at.get_or_insert(now + TELL_PAUSE);
    }

    /// Packets may have come or gone.
    pub fn wake(&mut self, now: Instant) {
        if let Ok(tools) = &mut self.tools {
            tools.observer.wake(now);
        }
    }

    /// Whoever connects, asks or leaves. Call when one of [`Self::poll_fds`] is ready, and carry out
    /// what the device has to say.
    pub fn serve(&mut self, device: &mut Device, place: &Place<'_>, clock: Clock) {
        match self.file.as_ref().map(LinkFile::accept) {
            Ok(Ok(Some(peer))) => self.arriving = Some(peer),
            Ok(Err(error)) => {
                tracing::warn!(%error, "control could not be let in");
                self.deaf_until = Some(clock::now() + DEAF_PAUSE);
            }
            Ok(Ok(None)) | Err(_) => {}
        }
        if let Some(mut peer) = self.arriving.take() {
            match peer.receive() {
                Ok(None) => self.arriving = Some(peer),
                Ok(Some(_)) => self.welcome(peer, device, place),
                Err(error) => tracing::warn!(%error, "somebody who is not control was turned away"),
            }
        }
        for _ in 0..TURN_QUESTIONS {
            let Some(client) = &mut self.client else { return };
            match client.peer.receive() {
                Ok(None) => break,
                Ok(Some(ToDataPlane::WantBoxKey { request, peer })) => {
                    let key = box_key(device, peer);
                    self.tell(ToControl::BoxKey(BoxKeyAnswer { request, key }));
                }
                Ok(Some(ToDataPlane::ConnectNow { slot })) => {
                    self.connects.ask(clock.now, || device.connect(clock, PeerSlot(slot)));
                }
                // Not after the first: the link itself refuses that.
                Ok(Some(ToDataPlane::Hello { .. })) => {}
                Err(error) => return self.leave(&error),
            }
        }
        if let Some(Err(error)) = self.client.as_mut().map(|client| client.peer.flush()) {
            return self.leave(&error);
        }
        self.hear(clock.now);
    }

    /// Tells control of disco that the host's firewall may drop, in bounds.
    fn hear(&mut self, now: Instant) {
        let (Some(client), Some(tap)) = (&self.client, self.tap()) else { return };
        if self.deaf_to_frames_until.is_some() {
            return;
        }
        let room = if client.peer.wants_write() { 0 } else { HEARD_PER_TURN };
        let mut all: Vec<_> = std::iter::from_fn(|| tap.receive()).take(HEARD_READ_MAX).collect();
        if all.is_empty() {
            return;
        }
        let too_many = all.len().saturating_sub(room);
        self.drops.add(Drop::HeardTooFast, too_many as u64);
        all.truncate(room);
        if self.heard_at.replace(now).is_some_and(|at| now.since(at) < HEARD_PAUSE) {
            self.deaf_to_frames_until = Some(now + HEARD_PAUSE);
        }
        all.into_iter().for_each(|heard| self.tell(ToControl::Heard(heard)));
    }

    /// Tells and writes what is due.
    pub fn keep_up(&mut self, device: &Device, place: &Place<'_>, now: Instant) {
        self.deaf_until.take_if(|until| *until <= now);
        if self.deaf_to_frames_until.take_if(|until| *until <= now).is_some() {
            self.hear(now);
        }
        if self.tell_at.is_some_and(|at| at <= now) {
            self.tell_at = None;
            self.tell_changes(device, place);
        }
        let mut active = Vec::new();
        if let Ok(tools) = &mut self.tools {
            tools.observer.look(device, now, |slot| active.push(slot));
        }
        active.into_iter().for_each(|slot| self.tell(ToControl::Active { slot }));
    }

    /// For `status`.
    pub fn status(&self) -> String {
        match (&self.file, &self.tools, &self.client) {
            (Err(reason), ..) => format!("off: {reason}"),
            (_, Err(reason), _) => format!("off: no paths are searched: {reason}"),
            (.., Some(client)) => format!("connected {}", client.since.as_secs()),
            (.., None) => "absent".to_owned(),
        }
    }

    /// For `status`: "on", or "off" with the reason.
    pub fn past_firewall(&self) -> String {
        match &self.tools {
            Ok(Tools { tap: Ok(_), .. }) => "on".to_owned(),
            Ok(Tools { tap: Err(reason), .. }) | Err(reason) => format!("off: {reason}"),
        }
    }

    /// Frames that the kernel dropped before we looked.
    pub fn unheard(&self) -> u64 {
        self.tap().map_or(0, Tap::kernel_drops)
    }

    /// Marks what control sends with our socket.
    pub fn set_mark(&self, mark: u32) -> std::io::Result<()> {
        self.tools.as_ref().map_or(Ok(()), |tools| tools.udp.set_mark(mark))
    }

    /// The new one takes the place of the old.
    fn welcome(&mut self, mut peer: LinkPeer, device: &Device, place: &Place<'_>) {
        if self.client.is_some() {
            self.leave(&LinkError::Protocol { what: "another control took its place" });
        }
        self.tell_changes(device, place);
        let welcome = Welcome {
            public_key: self.told.public_key,
            interface: place.interface.to_owned(),
            ifindex: self.file.as_ref().map_or(0, |file| ifindex(file.as_fd(), place.interface)),
            listen_port: place.listen_port,
            mtu: self.told.mtu,
            fwmark: self.told.fwmark,
            steering: match &self.tools {
                Ok(tools) => link::Steering::On { workers: tools.workers },
                Err(reason) => link::Steering::Off { reason: reason.clone() },
            },
        };
        if let Err(error) = peer.welcome(&welcome, self.tools.as_ref().ok().map(Tools::offer)) {
            return tracing::warn!(%error, "control could not be welcomed");
        }
        self.client = Some(Client { peer, since: clock::wall() });
        let peers: Vec<_> = self.told.peers.values().cloned().collect();
        tracing::info!(peers = peers.len(), "control is connected");
        for message in peers.into_iter().flat_map(link::Peer::messages) {
            self.tell(message);
        }
        // Before it hears this: it may send at once, and the answers must find its socket.
        if let (Ok(tools), true) = (&mut self.tools, self.client.is_some()) {
            tools.attend(&self.drops);
        }
        self.tell(ToControl::Synced);
    }

    /// Control is gone, or is of no use.
    fn leave(&mut self, why: &LinkError) {
        self.client = None;
        tracing::warn!(%why, "control is gone; peers stay where they are");
        let Ok(tools) = &mut self.tools else { return };
        tools.leave(&self.drops);
        for slot in 0..tools.endpoints.len() {
            if !self.told.peers.contains_key(&slot) {
                tools.unset(slot);
            }
        }
    }

    /// Says it to control, if there is one.
    fn tell(&mut self, message: ToControl) {
        let Some(client) = &mut self.client else { return };
        if let Err(error) = client.peer.send(message) {
            self.leave(&error);
        }
    }

    /// Brings what was told up to what is.
    fn tell_changes(&mut self, device: &Device, place: &Place<'_>) {
        let public_key = device.public_key().map(|key| PublicKey(key.0));
        let peers: BTreeMap<_, _> = device.peers().map(|view| told_of(&view)).collect();
        let now = Told { public_key, mtu: device.mtu(), fwmark: place.fwmark, peers };
        let was = std::mem::replace(&mut self.told, now);
        let (told, mut news) = (&self.told, Vec::new());
        if told.public_key != was.public_key {
            news.push(ToControl::OwnKey { public_key });
        }
        if told.mtu != was.mtu {
            news.push(ToControl::Mtu { mtu: told.mtu });
        }
        if told.fwmark != was.fwmark {
            news.push(ToControl::Fwmark { mark: told.fwmark });
        }
        let mut free = Vec::new();
        for (&slot, before) in &was.peers {
            if told.peers.get(&slot).is_none_or(|now| now.public_key != before.public_key) {
                free.push(slot);
                news.push(ToControl::PeerDown { slot });
            }
        }
        for (slot, peer) in &told.peers {
            if was.peers.get(slot) != Some(peer) {
                news.extend(peer.clone().messages());
            }
        }
        if let Ok(tools) = &mut self.tools {
            for slot in free {
                tools.observer.forget(slot);
                if self.client.is_none() {
                    tools.unset(slot);
                }
            }
        }
        news.into_iter().for_each(|message| self.tell(message));
    }
}

impl Tools {
    fn offer(&self) -> Offer<'_> {
        Offer {
            maps: self.programs.shared_fds(),
            udp: self.udp.as_fd(),
            detours: &self.detours.sockets,
        }
    }

    fn attend(&mut self, drops: &DropCounters) {
        self.detours.attend(drops);
        self.observer.start(clock::now());
        if let Ok(tap) = &self.tap {
            // What waits from before is of no use.
            std::iter::from_fn(|| tap.receive()).take(HEARD_READ_MAX).for_each(drop);
            if let Err(error) = tap.listen() {
                tracing::error!(%error, "disco that the host's firewall drops is not heard");
                self.tap = Err(format!("binding a packet socket failed: {error}"));
            }
        }
        self.discard_received(drops);
        let (family, socket): (_, BorrowedFd<'_>) = (self.family(), self.udp.as_fd());
        if let Err(error) = self.programs.sockets.set(family, SocketSlot::Control, socket) {
            tracing::error!(%error, "control gets no packets from our port");
        }
    }

    fn leave(&mut self, drops: &DropCounters) {
        self.detours.leave(drops);
        self.observer.stop();
        if let Err(error) = self.programs.sockets.clear(self.family(), SocketSlot::Control) {
            tracing::error!(%error, "what is control's goes on to a socket that nobody reads");
        }
        self.discard_received(drops);
    }

    /// What came for a control that was gone already.
    fn discard_received(&self, drops: &DropCounters) {
        drops.add(Drop::ControlAbsent, self.udp.discard_received() as u64);
    }

    fn family(&self) -> SocketFamily {
        if self.udp.is_v6() { SocketFamily::Inet6 } else { SocketFamily::Inet4 }
    }

    /// The line would be of the slot's next peer, too.
    fn unset(&mut self, slot: u32) {
        if self.endpoints.read(slot).is_none_or(|line| line.kind != 0) {
            self.endpoints.write(slot, &abi::Endpoint::default());
        }
    }
}

fn box_key(device: &Device, peer: PublicKey) -> Result<BoxKey, BoxKeyRefusal> {
    match device.box_key(&millrace_wg::PublicKey(peer.0)) {
        Ok(key) => Ok(BoxKey(Zeroizing::new(*key.expose()))),
        Err(NoBoxKey::NoPrivateKey) => Err(BoxKeyRefusal::NoPrivateKey),
        Err(NoBoxKey::LowOrder) => Err(BoxKeyRefusal::LowOrder),
    }
}

fn told_of(view: &PeerView<'_>) -> (u32, link::Peer) {
    let slot = view.peer.slot.0;
    let peer = link::Peer {
        slot,
        public_key: PublicKey(view.peer.public_key.0),
        endpoint: view.configured,
        keepalive_s: view.keepalive.map_or(0, |interval| interval.as_secs() as u16),
        allowed_ips: view.nets.iter().copied().collect(),
    };
    (slot, peer)
}

/// 0 if the interface is gone: then we are about to end, too.
fn ifindex(socket: BorrowedFd<'_>, interface: &str) -> u32 {
    rustix::net::netdevice::name_to_index(socket, interface).unwrap_or(0)
}
