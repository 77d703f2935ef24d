//! The device that AF_XDP works on: one thread attaches XDP, binds the queues, hands sockets to
//! workers, and takes them back when the device goes down, changes or misbehaves.
//!
//! Nothing here is needed for traffic: while there are no AF_XDP sockets, or after this process is
//! killed, every packet goes through the UDP sockets. So a failure is a reason in `status`, not an
//! end, except where the configuration asked for what this device cannot do.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use millrace_config::config::{Receive, Transmit};
use millrace_ebpf::error::{LoadError, OtherProgram};
use millrace_ebpf::load::{Programs, XdpAttachment};
use millrace_ebpf::xdp_owner;
use millrace_host::monitor::{Monitor, News};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::ethtool;
use super::lane::{LaneSocket, Mailbox, drain};
use super::netlink::{Link, Netlink, offers_zero_copy};
use super::nexthop::{self, NextHops};
use super::port_status::PortStatus;
use super::sender_rest::SenderRest;
use super::umem::chunk_len;
use super::xsk::{self, Fault, Mode, XskError};
use super::xsk_ledger::{Ledger, Statistics};

/// Attached, it looks whether all is as it was: queues and program change without news.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// After a failure the next try waits for so long, unless the interface has news.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// A device that stopped working is not taken again at once.
const REST: Duration = Duration::from_secs(1);
/// Some drivers drop the carrier for a moment when XDP is attached or a queue is bound.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(5);
/// News come in flocks; one look is enough for all of them.
const NEWS_PAUSE: Duration = Duration::from_millis(50);
/// Workers look at their mailboxes at every turn.
const PICK_UP_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);
/// Queues that are bound at most: as many as the map of sockets has places.
const QUEUES_MAX: u32 = millrace_ebpf::abi::QUEUES_MAX;

/// What the configuration asks for.
#[derive(Clone, Debug)]
pub struct PortOptions {
    /// The interface's name; none: that of the default route.
    pub device: Option<String>,
    pub receive: Receive,
    pub transmit: Transmit,
    /// Our UDP port.
    pub port: u16,
    pub fwmark: u32,
    /// From [`foreign_program`], before the right to ask for it was given up.
    pub foreign: Option<OtherProgram>,
}

/// The XDP program that is on the device already. Its name only a process with CAP_SYS_ADMIN may
/// ask for, so ask before privileges are given up.
pub fn foreign_program(device: Option<&str>) -> Option<OtherProgram> {
    let netlink = Netlink::new().ok()?;
    let link = match device {
        Some(device) => netlink.link_by_name(device),
        None => netlink.default_link(),
    };
    xdp_owner::program_on(link.ok()??.index)
}

/// The running thread.
#[derive(Debug)]
pub struct Port {
    status: Arc<Mutex<PortStatus>>,
    mailboxes: Vec<Arc<Mailbox>>,
    ledger: Arc<Ledger>,
    programs: Arc<Programs>,
}

impl Port {
    /// Starts the thread. It ends with the process; `stop` makes it give the device back first.
    pub fn start(
        options: PortOptions,
        programs: Arc<Programs>,
        mailboxes: Vec<Arc<Mailbox>>,
        hops: Arc<NextHops>,
        wake: Arc<OwnedFd>,
        stop: Arc<OwnedFd>,
    ) -> io::Result<Self> {
        let status = Arc::new(Mutex::new(PortStatus::sockets("starting")));
        let ledger = Arc::new(Ledger::default());
        let port = Self {
            status: Arc::clone(&status),
            mailboxes: mailboxes.clone(),
            ledger: Arc::clone(&ledger),
            programs: Arc::clone(&programs),
        };
        let keeper = Keeper {
            netlink: Netlink::new()?,
            monitor: Monitor::new()?,
            options,
            programs,
            mailboxes,
            hops,
            wake,
            stop,
            status,
            ledger,
            sender_rest: SenderRest::default(),
            refused: None,
        };
        thread::Builder::new().name("port".into()).spawn(move || keeper.run())?;
        Ok(port)
    }

    pub fn status(&self) -> PortStatus {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for mailbox in &self.mailboxes {
            let [received, sent] = mailbox.frames();
            status.frames[0] += received;
            status.frames[1] += sent;
        }
        status
    }

    /// What the kernel counted on all AF_XDP sockets since the start.
    pub fn statistics(&self) -> io::Result<Statistics> {
        self.ledger.sum()
    }

    /// Data messages since the start that came on a queue without a socket and went to the kernel.
    pub fn passed(&self) -> io::Result<u64> {
        let passed = self.programs.passed.get().map_err(io::Error::other)?;
        Ok(passed.packets)
    }
}

/// The thread's state.
struct Keeper {
    options: PortOptions,
    netlink: Netlink,
    monitor: Monitor,
    programs: Arc<Programs>,
    mailboxes: Vec<Arc<Mailbox>>,
    hops: Arc<NextHops>,
    wake: Arc<OwnedFd>,
    stop: Arc<OwnedFd>,
    status: Arc<Mutex<PortStatus>>,
    ledger: Arc<Ledger>,
    sender_rest: SenderRest,
    /// The interface as it was when it refused for good: not worth another try until it changes.
    refused: Option<Link>,
}

/// XDP is attached and workers have sockets.
struct Attached {
    _program: XdpAttachment,
    link: Link,
    queues: u32,
    mode: Mode,
    transmits: bool,
}

/// Why the device has no AF_XDP sockets now.
enum Obstacle {
    /// It may go away: try again.
    Passing(String),
    /// It lies in the device or the configuration: wait for news of the interface.
    Lasting(String),
}

impl Obstacle {
    fn of_attach(mut error: LoadError, foreign: Option<&OtherProgram>) -> Self {
        if let (LoadError::Occupied { program, .. }, Some(foreign)) = (&mut error, foreign)
            && program.id == foreign.id
        {
            *program = foreign.clone();
        }
        match error {
            LoadError::DriverRefused { .. } | LoadError::NoNativeXdp { .. } => {
                Self::Lasting(error.to_string())
            }
            _ => Self::Passing(error.to_string()),
        }
    }

    fn of_bind(error: &XskError) -> Self {
        match error {
            XskError::Busy { .. } | XskError::Other { .. } => Self::Passing(error.to_string()),
            // Trying costs the link its carrier on some drivers, so not without a change.
            _ => Self::Lasting(error.to_string()),
        }
    }
}

/// What makes another try worthwhile when it changes. Not the carrier: trying itself moves it.
#[derive(PartialEq, Eq)]
struct Device<'a> {
    index: u32,
    name: &'a str,
    mtu: u32,
}

impl<'a> Device<'a> {
    fn of(link: &'a Link) -> Self {
        Self { index: link.index, name: &link.name, mtu: link.mtu }
    }
}

/// What ended a wait.
enum Woken {
    Stop,
    News(News),
    Faults(Vec<Fault>),
    TimeOut,
}

impl Keeper {
    fn run(mut self) {
        loop {
            let wait = match self.attach() {
                Ok(mut attached) => {
                    // At the end the workers close their sockets by ending.
                    let Some(reason) = self.serve(&mut attached) else { return };
                    self.release(attached);
                    self.say_sockets(&reason);
                    Some(REST)
                }
                Err(Obstacle::Passing(reason)) => {
                    self.say_sockets(&reason);
                    Some(RETRY_INTERVAL)
                }
                Err(Obstacle::Lasting(reason)) => {
                    self.say_sockets(&reason);
                    None
                }
            };
            self.follow_paths(false);
            if !self.idle(wait) {
                return;
            }
        }
    }

    /// Waits for a reason to try again. False when it is time to end.
    fn idle(&mut self, wait: Option<Duration>) -> bool {
        loop {
            match self.wait(wait) {
                Woken::Stop => return false,
                Woken::TimeOut => return true,
                Woken::Faults(_) | Woken::News(News { links: false, .. }) => {}
                Woken::News(_) => {
                    let now = self.find_link().ok();
                    let refused = self.refused.as_ref();
                    if refused.is_none() || refused.map(Device::of) != now.as_ref().map(Device::of)
                    {
                        return true;
                    }
                }
            }
        }
    }

    /// From nothing to sockets in all workers' hands.
    fn attach(&mut self) -> Result<Attached, Obstacle> {
        let link = self.find_link()?;
        self.refused = Some(link.clone());
        let mode = self.choose_mode(&link)?;
        let driver = ethtool::driver(&link.name);
        let queues_before = ethtool::receive_queues(&link.name);
        // Before the first look at them, so that no change falls between.
        self.follow_paths(true);
        // Before XDP sees a packet: it must act only on those that are for this host.
        self.note_addresses(&link).map_err(Obstacle::Passing)?;
        let program = self
            .programs
            .attach_xdp(link.index)
            .map_err(|error| Obstacle::of_attach(error, self.options.foreign.as_ref()))?;
        // Attaching may add queues; what arrives on one without a socket goes to the kernel.
        let queues = ethtool::receive_queues(&link.name).min(QUEUES_MAX);
        let chunk_len = chunk_len(&driver, link.mtu);
        let sockets = xsk::bind_queues(&self.ledger, link.index, queues, mode, chunk_len)
            .map_err(|error| Obstacle::of_bind(&error))?;
        // What is sent without a carrier is lost, so the workers get the sockets after this.
        let link = self.wait_for_carrier(&link).ok_or_else(|| {
            Obstacle::Passing(format!("{} lost its carrier when XDP was attached", link.name))
        })?;
        // Added queues were seen to receive but never to send.
        let transmits = self.transmit_obstacle(mode).is_none();
        let mut lanes: Vec<Vec<LaneSocket>> = self.mailboxes.iter().map(|_| Vec::new()).collect();
        for (xsk, queue) in sockets.into_iter().zip(0..) {
            self.programs
                .xsks
                .set(queue, xsk.as_fd())
                .map_err(|error| Obstacle::Passing(error.to_string()))?;
            let lane = queue as usize % lanes.len();
            let transmit = transmits && queue < queues_before;
            lanes[lane].push(LaneSocket { xsk, transmit });
        }
        for (mailbox, sockets) in self.mailboxes.iter().zip(lanes) {
            mailbox.post(sockets);
        }
        self.refused = None;
        let attached = Attached { _program: program, link, queues, mode, transmits };
        self.say_attached(&attached, &driver, chunk_len);
        Ok(attached)
    }

    fn find_link(&self) -> Result<Link, Obstacle> {
        let failed = |error| Obstacle::Passing(format!("asking for the interface failed: {error}"));
        let link = match &self.options.device {
            Some(device) => self.netlink.link_by_name(device),
            None => self.netlink.default_link(),
        };
        let named = self.options.device.as_deref();
        let device = named.unwrap_or("the default route's interface");
        match link.map_err(failed)? {
            None => Err(Obstacle::Lasting(match named {
                Some(name) => {
                    format!("there is no interface {name}; `ip link` lists those that exist")
                }
                None => "no device is named, and there is no default route to find one by".into(),
            })),
            Some(link) if !link.is_ethernet => {
                Err(Obstacle::Lasting(format!("{device} is no Ethernet interface")))
            }
            Some(link) if !link.is_up => Err(Obstacle::Lasting(format!("{device} is down"))),
            Some(link) if !link.has_carrier => {
                Err(Obstacle::Lasting(format!("{device} has no carrier")))
            }
            Some(link) => Ok(link),
        }
    }

    /// `auto` attaches only where the driver offers zero-copy: on others XDP costs offloads.
    fn choose_mode(&self, link: &Link) -> Result<Mode, Obstacle> {
        let wants_zero_copy = match self.options.receive {
            Receive::XdpCopy => return Ok(Mode::Copy),
            Receive::XdpZerocopy => true,
            Receive::Auto => false,
            Receive::Socket => {
                return Err(Obstacle::Lasting("the configuration says so".into()));
            }
        };
        match offers_zero_copy(link.index) {
            Some(true) => Ok(Mode::ZeroCopy),
            // An older kernel does not tell; a bind will.
            None if wants_zero_copy => Ok(Mode::ZeroCopy),
            Some(false) | None => Err(Obstacle::Lasting(format!(
                "the driver of {} offers no AF_XDP zero-copy, and without it sockets are faster",
                link.name
            ))),
        }
    }

    /// Why AF_XDP transmit does not run; none if it does.
    fn transmit_obstacle(&self, mode: Mode) -> Option<String> {
        match self.options.transmit {
            Transmit::Gso => Some("the configuration says so".into()),
            _ if mode == Mode::Copy => Some("AF_XDP transmit pays only with zero-copy".into()),
            _ => self.sender_rest.reason().map(str::to_owned),
        }
    }

    /// The interface with its carrier back; none if that takes too long.
    fn wait_for_carrier(&self, link: &Link) -> Option<Link> {
        let deadline = Instant::now() + CARRIER_TIMEOUT;
        loop {
            match self.netlink.link_by_index(link.index) {
                Ok(Some(now)) if now.has_carrier => return Some(now),
                Ok(Some(now)) if !now.is_up => return None,
                _ if Instant::now() >= deadline => return None,
                _ => thread::sleep(PAUSE),
            }
        }
    }

    /// Keeps the port going. Returns why it cannot; none when it is time to end.
    fn serve(&mut self, attached: &mut Attached) -> Option<String> {
        let mut next_check = Instant::now() + CHECK_INTERVAL;
        loop {
            let woken = self.wait(Some(next_check.saturating_duration_since(Instant::now())));
            match woken {
                Woken::Stop => return None,
                Woken::Faults(ref faults) => {
                    if let Some(reason) = self.judge(faults, attached) {
                        return Some(reason);
                    }
                    self.answer(attached);
                }
                Woken::News(news) => {
                    self.refresh(attached, false);
                    if news.addresses
                        && let Err(reason) = self.note_addresses(&attached.link)
                    {
                        return Some(reason);
                    }
                }
                Woken::TimeOut => {}
            }
            let is_due = Instant::now() >= next_check;
            if (is_due || matches!(woken, Woken::News(News { links: true, .. })))
                && let Some(reason) = self.check(attached)
            {
                return Some(reason);
            }
            if is_due && self.sender_rest.end_if_due(Instant::now()) {
                return Some("AF_XDP transmit is tried again".into());
            }
            if is_due {
                self.refresh(attached, true);
                next_check = Instant::now() + CHECK_INTERVAL;
            }
        }
    }

    /// A reason to give the sockets back and start anew.
    fn judge(&mut self, faults: &[Fault], attached: &Attached) -> Option<String> {
        let reason = match faults.first()? {
            // Without a carrier nothing is completed; that is no fault of the device.
            Fault::Stalled { .. } if self.wait_for_carrier(&attached.link).is_none() => {
                format!("{} has no carrier", attached.link.name)
            }
            Fault::Stalled { outstanding } => {
                let reason = self.sender_rest.begin(*outstanding, Instant::now());
                tracing::warn!(device = attached.link.name, reason, "AF_XDP transmit rests");
                reason.to_owned()
            }
            Fault::Down { errno } => {
                let error = io::Error::from_raw_os_error(*errno);
                format!("{} does not take packets: {error}", attached.link.name)
            }
        };
        Some(reason)
    }

    /// Whether the interface is still what the sockets were bound for.
    fn check(&mut self, attached: &mut Attached) -> Option<String> {
        let name = &attached.link.name;
        let Ok(now) = self.netlink.link_by_index(attached.link.index) else { return None };
        let Some(now) = now else { return Some(format!("{name} is gone")) };
        if !now.is_up {
            self.sender_rest.forget();
            return Some(format!("{name} is down"));
        }
        if !now.has_carrier && self.wait_for_carrier(&now).is_none() {
            self.sender_rest.forget();
            return Some(format!("{name} has no carrier"));
        }
        if now.xdp_program != attached.link.xdp_program {
            return Some(format!("somebody detached our XDP program from {name}"));
        }
        if now.mtu != attached.link.mtu || now.name != *name {
            return Some(format!("{name} changed its name or MTU"));
        }
        let queues = ethtool::receive_queues(name).min(QUEUES_MAX);
        if queues != attached.queues {
            return Some(format!("{name} has {queues} receive queues, it had {}", attached.queues));
        }
        attached.link = now;
        None
    }

    /// Tells XDP the addresses of this host. It judges only packets to them: those to the same port
    /// of another host, which this gateway forwards, are left alone.
    fn note_addresses(&self, link: &Link) -> Result<(), String> {
        let addresses = self.netlink.addresses(link.index);
        let addresses = addresses
            .map_err(|error| format!("asking for the addresses of this host failed: {error}"))?;
        if addresses.is_empty() {
            return Err("this host has no address".into());
        }
        self.programs.set_local_addresses(&addresses).map_err(|error| error.to_string())
    }

    /// Without AF_XDP sockets no neighbour, route or address concerns us.
    fn follow_paths(&self, follow: bool) {
        if let Err(error) = self.monitor.follow_paths(follow) {
            tracing::warn!(%error, follow, "the kernel's news of paths cannot be chosen");
        }
    }

    fn answer(&self, attached: &Attached) {
        if attached.transmits {
            self.log(self.hops.answer(&self.netlink, self.from(attached)));
        }
    }

    fn refresh(&self, attached: &Attached, forget: bool) {
        if attached.transmits {
            self.log(self.hops.refresh(&self.netlink, self.from(attached), forget));
        }
    }

    fn from<'a>(&self, attached: &'a Attached) -> nexthop::From<'a> {
        let PortOptions { port, fwmark: mark, .. } = self.options;
        nexthop::From { link: &attached.link, port, mark }
    }

    fn log(&self, result: io::Result<()>) {
        if let Err(error) = result {
            tracing::warn!(%error, "asking the kernel for routes failed; packets go by socket");
        }
    }

    /// Takes the sockets from the workers, then detaches XDP. Packets go to the UDP sockets.
    fn release(&mut self, attached: Attached) {
        for queue in 0..attached.queues {
            // Already empty if the socket is closed.
            let _ = self.programs.xsks.clear(queue);
        }
        self.hops.clear();
        self.mailboxes.iter().for_each(|mailbox| mailbox.post(Vec::new()));
        let deadline = Instant::now() + PICK_UP_TIMEOUT;
        while !self.mailboxes.iter().all(|mailbox| mailbox.is_settled())
            && Instant::now() < deadline
        {
            thread::sleep(PAUSE);
        }
        drop(attached);
    }

    /// Sleeps until something happens. Questions of workers are answered by the caller.
    fn wait(&self, wait: Option<Duration>) -> Woken {
        let timeout = wait.map(|wait| Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        let mut fds = [
            PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.monitor.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
        ];
        let count = poll(&mut fds, timeout.as_ref()).unwrap_or(1);
        let seen = fds.map(|fd| !fd.revents().is_empty());
        if seen[0] {
            return Woken::Stop;
        }
        if seen[2] {
            drain(&self.wake);
            return Woken::Faults(self.mailboxes.iter().flat_map(|m| m.take_faults()).collect());
        }
        if seen[1] {
            thread::sleep(NEWS_PAUSE);
            let news = self.monitor.take();
            return Woken::News(news);
        }
        if count == 0 { Woken::TimeOut } else { Woken::News(News::ALL) }
    }

    fn say_attached(&self, attached: &Attached, driver: &str, chunk_len: u32) {
        let mut reason = match attached.mode {
            Mode::ZeroCopy => "the driver confirmed zero-copy".to_owned(),
            Mode::Copy => "the configuration says so".to_owned(),
        };
        let _ = write!(
            reason,
            ": {} queues of {} ({driver}), {chunk_len}-byte frames",
            attached.queues, attached.link.name
        );
        let obstacle = self.transmit_obstacle(attached.mode);
        let receive = match attached.mode {
            Mode::ZeroCopy => "xdp-zerocopy",
            Mode::Copy => "xdp-copy",
        };
        tracing::info!(device = attached.link.name, receive, reason, "AF_XDP runs");
        self.say(PortStatus {
            device: attached.link.name.clone(),
            receive,
            receive_reason: reason,
            transmit_zero_copy: obstacle.is_none(),
            transmit_reason: obstacle.unwrap_or_else(|| "the driver confirmed zero-copy".into()),
            warning: self.rest_warning(),
            queues: attached.queues,
            ..PortStatus::default()
        });
    }

    fn say_sockets(&self, reason: &str) {
        let is_asked_for = matches!(self.options.receive, Receive::XdpCopy | Receive::XdpZerocopy);
        let not_as_asked = || format!("AF_XDP was asked for and does not run: {reason}");
        let status = PortStatus {
            device: self.options.device.clone().unwrap_or_default(),
            receive: "socket",
            receive_reason: reason.to_owned(),
            transmit_zero_copy: false,
            transmit_reason: self.sender_rest.reason().unwrap_or(reason).to_owned(),
            warning: self.rest_warning().or_else(|| is_asked_for.then(not_as_asked)),
            ..PortStatus::default()
        };
        if self.say(status) && is_asked_for {
            tracing::error!(device = self.options.device, reason, "packets go by sockets");
        }
    }

    fn rest_warning(&self) -> Option<String> {
        self.sender_rest.reason().map(|reason| format!("AF_XDP transmit rests: {reason}"))
    }

    /// True if it is something new.
    fn say(&self, status: PortStatus) -> bool {
        let mut known = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = *known != status;
        *known = status;
        is_new
    }
}
