//! Puts a data plane together and starts its threads: sockets, TUN queues, steering, workers, and
//! the slow thread last. What fails here fails before anything was changed that stays.

use std::num::NonZeroU8;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread::{self, JoinHandle};

use millrace_aead::{Backend, ChoiceError};
use millrace_config::Exit;
use millrace_config::config::{Aead, Receive};
use millrace_config::limits::PEERS_MAX;
use millrace_ebpf::error::OtherProgram;
use millrace_wg::device::{Device, DeviceConfig};
use millrace_wg::limits::SESSIONS_PER_PEER;
use millrace_wg::timestamp::Tai64n;
use millrace_wg::{DropCounters, Paths, Shared};
use rand::TryRngCore;
use rand::rngs::OsRng;
use rustix::event::{EventfdFlags, eventfd};

use crate::clock::SuspendWatch;
use crate::control::{self, About, ControlHandle};
use crate::device_uapi::RefusedPeers;
use crate::facts::Facts;
use crate::failure::{self, Failure};
use crate::io::detour::{self, Detour};
use crate::io::icmp::IcmpSender;
use crate::io::lane::{Lane, Mailbox};
use crate::io::nexthop::NextHops;
use crate::io::tap::Tap;
use crate::io::tun::{TunOffloads, TunQueue};
use crate::io::udp::{Receiver, UdpOptions, UdpSocket};
use crate::io::xdp_port::{Port, PortOptions, foreign_program};
use crate::link::{Link, Tools};
use crate::link_file::LinkFile;
use crate::observer::Observer;
use crate::offload::Offloads;
use crate::privileges;
use crate::queue::SlowQueue;
use crate::slow::Slow;
use crate::state::TimestampFile;
use crate::steering::Steering;
use crate::watchdog::Pulse;
use crate::worker::{Context, End, Worker};

/// Receiving sessions that the tables hold.
const SESSIONS_MAX: usize = PEERS_MAX * SESSIONS_PER_PEER;
const _: () = assert!(SESSIONS_MAX.is_power_of_two(), "the place of an index is its low bits");

/// What does not change while a data plane runs.
pub struct Options {
    /// Name of the TUN device.
    pub interface: String,
    /// 0 lets the kernel choose.
    pub listen_port: u16,
    pub fwmark: u32,
    /// The core of each worker; at least one.
    pub cores: Vec<usize>,
    pub offload: millrace_config::config::Offload,
    pub mtu: u16,
    /// Where the newest handshake timestamp is kept; none: only in memory.
    pub timestamps: Option<PathBuf>,
    /// Lines for `status` about what the configuration asked for and did not get.
    pub notes: Vec<String>,
    pub plane: millrace_config::config::Dataplane,
    /// Control is told of disco that the host's firewall drops.
    pub past_firewall: bool,
    /// Somebody wants to know whether all threads live.
    pub watchdog: bool,
}

/// A running data plane.
pub struct Dataplane {
    pub control: ControlHandle,
    pub listen_port: u16,
    /// One for each thread that packets need; none without [`Options::watchdog`].
    pub pulses: Vec<Arc<Pulse>>,
    slow: JoinHandle<Result<(), Failure>>,
    workers: Vec<JoinHandle<()>>,
}

impl Dataplane {
    /// Starts it without key and peers; those come by [`ControlHandle::set`].
    pub fn start(mut options: Options) -> Result<Self, Failure> {
        choose_aead(options.plane.aead)?;
        let offloads = Arc::new(Offloads::new(&options.offload));
        let udp = UdpOptions { port: options.listen_port, fwmark: options.fwmark };
        // The first socket of the group: it settles the port. It must not share it with a program
        // of the same user, so it is bound alone first.
        let slow_udp = UdpSocket::bind_first(udp)?;
        let port = slow_udp.port().map_err(|e| failure::of_io("asking for the UDP port", &e))?;
        let mut steering = Steering::load(port, options.cores.len(), SESSIONS_MAX);
        let mut sockets = options
            .cores
            .iter()
            .map(|_| UdpSocket::bind(UdpOptions { port, ..udp }))
            .collect::<Result<Vec<_>, _>>()?;
        steering.attach(&sockets, &slow_udp);
        // Unsteered, the kernel would spread flows over all sockets of the group: one must do.
        let slow_udp = match &steering {
            Steering::On(_) => Some(slow_udp),
            Steering::Off(why) => {
                tracing::warn!(why, "one worker and one socket: no steering program");
                options.cores.truncate(1);
                sockets.truncate(1);
                None
            }
        };
        let queues = TunQueue::open(&options.interface, options.cores.len())?;
        // From here on the name is ours.
        let udp = UdpOptions { port, ..udp };
        let tap = open_tap(options.past_firewall, port);
        let (tools, detours) = match control_tools(&steering, udp, options.cores.len(), tap) {
            Ok((tools, detours)) => (Ok(tools), detours),
            Err(reason) => (Err(reason), Vec::new()),
        };
        let link_file = LinkFile::listen(&options.interface)
            .inspect_err(|error| tracing::warn!(%error, "control cannot connect"))
            .map_err(|error| format!("its socket could not be made: {error}"));
        set_tun_offloads(&queues, &offloads);
        let all_sockets: Vec<&UdpSocket> = sockets.iter().chain(&slow_udp).collect();
        offloads.receive_runs(&all_sockets);
        offloads.avoid_defects(&rustix::system::uname().release().to_string_lossy());
        offloads.probe();

        let shared = Arc::new(Shared::new(SESSIONS_MAX));
        let queue = SlowQueue::new().map_err(|e| failure::of_io("making an eventfd", &e))?;
        let queue = Arc::new(queue);
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| failure::of_io("making an eventfd", &e.into()))?;
        let stop = Arc::new(stop);
        let (control, control_queue) =
            control::channel().map_err(|e| failure::of_io("making an eventfd", &e))?;
        let suspend = SuspendWatch::new().map_err(|e| failure::of_io("making a timer", &e))?;
        let timestamps = TimestampFile::open(options.timestamps.clone())?;
        let drops: Vec<Arc<DropCounters>> =
            (0..=options.cores.len()).map(|_| Arc::default()).collect();
        let config = DeviceConfig {
            mtu: options.mtu,
            newest_timestamp: timestamps.newest().map(Tai64n),
            drops: Arc::clone(&drops[options.cores.len()]),
            paths: steering.endpoints().map(|table| Arc::new(table) as Arc<dyn Paths>),
        };
        let device = Device::new(config, Arc::clone(&shared), Box::new(OsRng.unwrap_err()));
        let sockets: Vec<Arc<UdpSocket>> = sockets.into_iter().map(Arc::new).collect();
        let icmp = Arc::new(IcmpSender::open());
        let wants_af_xdp = options.plane.receive != Receive::Socket;
        let named = options.plane.device.first().map(String::as_str);
        let foreign = wants_af_xdp.then(|| foreign_program(named)).flatten();
        privileges::restrict(wants_af_xdp);
        let (port_of_rings, mut lanes) = match start_port(&options, port, foreign, &steering, &stop)
        {
            Ok((port, lanes)) => (Ok(port), lanes),
            Err(reason) => (Err(reason), Vec::new()),
        };
        lanes.reverse();
        let mut detours = detours.into_iter();
        let slow_detour = detours.next();
        let mut pulses = Vec::new();
        let mut new_pulse = |name: String| {
            let pulse = options.watchdog.then(|| Pulse::new(name)).transpose();
            let pulse = pulse.map_err(|e| failure::of_io("making an eventfd", &e))?;
            pulses.extend(pulse.clone());
            Ok::<_, Failure>(pulse)
        };
        let mut workers = Vec::new();
        for (number, (tun, &core)) in queues.into_iter().zip(&options.cores).enumerate() {
            let context = Context {
                shared: Arc::clone(&shared),
                slow: Arc::clone(&queue),
                offloads: Arc::clone(&offloads),
                drops: Arc::clone(&drops[number]),
                icmp: Arc::clone(&icmp),
                stop: Arc::clone(&stop),
                pulse: new_pulse(format!("worker-{number}"))?,
            };
            let worker = Worker::new(
                context,
                Arc::clone(&sockets[number]),
                tun,
                lanes.pop(),
                detours.next(),
            );
            workers.push(spawn_worker(worker, number, core)?);
        }
        let facts = Facts {
            interface: options.interface,
            listen_port: port,
            fwmark: AtomicU32::new(options.fwmark),
            cores: options.cores,
            offloads,
            drops: drops.clone(),
            worker_sockets: sockets,
            slow_socket: slow_udp.map(Arc::new),
            notes: options.notes,
            about: About::default(),
            name_note: None,
            port: port_of_rings,
        };
        let own_drops = Arc::clone(&drops[drops.len() - 1]);
        let receives = facts.slow_socket.is_some();
        let udp = Arc::clone(facts.slow_socket.as_ref().unwrap_or(&facts.worker_sockets[0]));
        let slow = Slow {
            device,
            udp,
            receives,
            control: control_queue,
            queue,
            steering,
            timestamps,
            facts,
            stop_workers: stop,
            receiver: Receiver::new(),
            suspend,
            refused: RefusedPeers::default(),
            link: Link::new(link_file, tools, Arc::clone(&own_drops)),
            drops: own_drops,
            detour: slow_detour,
            pulse: new_pulse("slow".into())?,
        };
        let slow = thread::Builder::new()
            .name("slow".into())
            .spawn(move || {
                let end = slow.run();
                // Wakes the thread that waits for signals; it then asks how we ended.
                let _ = signal_hook::low_level::raise(signal_hook::consts::SIGTERM);
                end
            })
            .map_err(|e| failure::of_io("starting a thread", &e))?;
        Ok(Self { control, listen_port: port, pulses, slow, workers })
    }

    /// Whether the slow thread still runs; if not, [`Self::join`] says why.
    pub fn is_running(&self) -> bool {
        !self.slow.is_finished()
    }

    /// Waits for the end: after [`ControlHandle::stop`], or a failure at run time.
    pub fn join(self) -> Result<(), Failure> {
        let result = self.slow.join();
        for worker in self.workers {
            // A worker that panicked has said so on stderr; in release builds it aborts.
            let _ = worker.join();
        }
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Measured now, before there are packets to wait for it.
fn choose_aead(wanted: Aead) -> Result<(), Failure> {
    let wanted = match wanted {
        Aead::Auto => None,
        Aead::Ring => Some(Backend::Ring),
        Aead::Avx2 => Some(Backend::Avx2),
        Aead::Avx512 => Some(Backend::Avx512),
    };
    let failed = |error: ChoiceError| {
        let cure = "`aead` in [dataplane] and the variable MILLRACE_AEAD choose it";
        Failure::new(Exit::NotSupported, error.to_string(), cure)
    };
    millrace_aead::choose(wanted).map_err(failed)?;
    Ok(())
}

/// What control gets to work with, and our ends of its detours: the slow thread's first. Or why there
/// is nothing.
fn control_tools(
    steering: &Steering,
    udp: UdpOptions,
    workers: usize,
    tap: Result<Tap, String>,
) -> Result<(Tools, Vec<Detour>), String> {
    let programs = match steering {
        Steering::On(programs) => Arc::clone(programs),
        Steering::Off(reason) => return Err(reason.clone()),
    };
    let workers = u8::try_from(workers).ok().and_then(NonZeroU8::new);
    let workers = workers.ok_or("there are too many workers")?;
    // The group is steered, so that it gets nothing before it is in its slot.
    let udp = UdpSocket::bind(udp).map_err(|failure| failure.to_string())?;
    let (ours, detours) = detour::pairs(1 + usize::from(workers.get()))
        .map_err(|error| format!("making a pair of sockets failed: {error}"))?;
    let observer = programs.observed().map(Observer::new).map_err(|error| error.to_string())?;
    let endpoints = programs.endpoints_writer().map_err(|error| error.to_string())?;
    Ok((Tools { programs, udp, detours, workers, observer, tap, endpoints }, ours))
}

/// Or why there is none. Now, because most privileges are about to go.
fn open_tap(wanted: bool, port: u16) -> Result<Tap, String> {
    if !wanted {
        return Err("the configuration says so".to_owned());
    }
    Tap::open(port).map_err(|error| {
        tracing::warn!(%error, "disco that the host's firewall drops is not heard");
        format!("a packet socket could not be opened: {error}")
    })
}

/// Starts the thread that runs AF_XDP, with a lane for each worker; or says why there is none.
fn start_port(
    options: &Options,
    port: u16,
    foreign: Option<OtherProgram>,
    steering: &Steering,
    stop: &Arc<OwnedFd>,
) -> Result<(Port, Vec<Lane>), String> {
    let plane = &options.plane;
    if plane.receive == Receive::Socket {
        return Err("the configuration says so".into());
    }
    let Steering::On(programs) = steering else {
        return Err("the eBPF programs could not be loaded".into());
    };
    let start = || {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let hops = NextHops::new(Arc::clone(&wake));
        let mailboxes = (0..options.cores.len())
            .map(|_| Mailbox::new(Arc::clone(&wake)))
            .collect::<std::io::Result<Vec<_>>>()?;
        let lanes = mailboxes
            .iter()
            .map(|mailbox| Lane::new(Arc::clone(mailbox), Arc::clone(&hops)))
            .collect();
        let options = PortOptions {
            device: plane.device.first().cloned(),
            receive: plane.receive,
            transmit: plane.transmit,
            port,
            fwmark: options.fwmark,
            foreign,
        };
        let (programs, stop) = (Arc::clone(programs), Arc::clone(stop));
        Ok((Port::start(options, programs, mailboxes, hops, wake, stop)?, lanes))
    };
    start().map_err(|error: std::io::Error| format!("starting AF_XDP failed: {error}"))
}

fn spawn_worker(worker: Worker, number: usize, core: usize) -> Result<JoinHandle<()>, Failure> {
    let run = move || {
        let slow = worker.slow_queue();
        if !core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
            tracing::warn!(worker = number, core, "the kernel does not let this worker be pinned");
        }
        if worker.run() == End::TunGone {
            slow.report_tun_gone();
        }
    };
    thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(run)
        .map_err(|e| failure::of_io("starting a thread", &e))
}

/// Asks for all that is wanted, then for less, until the kernel agrees.
fn set_tun_offloads(queues: &[TunQueue], offloads: &Offloads) {
    loop {
        let wanted = TunOffloads { tso: offloads.tun_tso.is_on(), uso: offloads.tun_uso.is_on() };
        let refused = queues.iter().find_map(|queue| queue.set_offloads(wanted).err());
        let Some(error) = refused else {
            offloads.tun_tso.confirm("the TUN device agreed");
            offloads.tun_uso.confirm("the TUN device agreed");
            return;
        };
        // USO is the younger one (Linux 6.2).
        if wanted.uso {
            offloads.tun_uso.demote(format_args!("the TUN device refused: {error}"));
        } else if wanted.tso {
            offloads.tun_tso.demote(format_args!("the TUN device refused: {error}"));
        } else {
            // Not even checksums: then every packet comes whole, which is what we need least of.
            tracing::warn!(%error, "the TUN device takes no offload setting at all");
            return;
        }
    }
}
