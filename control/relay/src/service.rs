//! The life of the relay: start, reload, drain, stop.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use millrace_config::Exit;
use millrace_config::key::PublicKey as ConfigKey;
use millrace_host::signals::{Asked, Signals};
use millrace_path::sealed::PublicKey;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::ClientConfig;
use sd_notify::NotifyState;
use socket2::{Domain, Protocol, Socket, Type};

use crate::acme::certificate::Certificate;
use crate::acme::{Acme, Challenges};
use crate::addresses::Addresses;
use crate::files;
use crate::limits;
use crate::mail::Mailbox;
use crate::mesh::Mesh;
use crate::mesh::mate::Mate;
use crate::metrics::{self, Counters};
use crate::settings::Settings;
use crate::shared::{Admission, Desk, Live, Rate, Shared};
use crate::stun;
use crate::worker::{Door, Worker};
use millrace_host::failure::Failure;

/// Connections that the kernel holds for us before we accept them.
const BACKLOG: i32 = 4096;
/// Descriptors that are no connection, of each worker (epoll, eventfd, listeners) and besides.
const DESCRIPTORS_OF_A_WORKER: usize = 8;
const DESCRIPTORS_BESIDES: usize = 64;
/// How often the main thread looks at the workers and the certificate.
const LOOK: Duration = Duration::from_secs(1);
/// A worker that takes no turn for so long is stuck; its sweep is due each second.
const STUCK: Duration = Duration::from_secs(10);

/// Reads the configuration and all files that it names, and changes nothing: no key is made.
pub fn check(path: &Path) -> Result<Settings, Failure> {
    let settings = read(path)?;
    let public = if settings.private_key_file.exists() {
        files::read_key(&settings.private_key_file)?.public_key()
    } else {
        PublicKey([0; 32])
    };
    live(&settings, public)?;
    mesh(&settings)?;
    Ok(settings)
}

/// Runs until SIGTERM or SIGINT.
pub fn run(path: &Path) -> Result<(), Failure> {
    let settings = read(path)?;
    let mut signals = Signals::catch().map_err(|e| Failure::from_io("catching signals", &e))?;
    let secret = files::private_key(&settings.private_key_file)?;
    let public = secret.public_key();
    let connections_max = raise_descriptors(&settings);
    let (mesh, roots) = mesh(&settings)?.unzip();
    let desks = (0..settings.workers + settings.mates().len()).map(|_| desk());
    let desks: std::io::Result<Vec<Desk>> = desks.collect();
    let shared = Arc::new(Shared {
        public,
        live: ArcSwap::from_pointee(live(&settings, public)?),
        registry: Default::default(),
        desks: desks.map_err(|error| Failure::from_io("making eventfds", &error))?,
        workers: settings.workers,
        mesh,
        acme: Counters::default(),
        challenges: Challenges::default(),
        renewed: AtomicBool::new(false),
        stun: settings.stun.iter().map(|_| Counters::default()).collect(),
        connections: AtomicUsize::new(0),
        connections_max,
        addresses: Addresses::new(settings.connections_per_address),
        reload_failed: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        stopped: AtomicBool::new(false),
        secret,
    });
    let workers = start(&settings, &shared)?;
    if let Some(acme) = &settings.acme {
        let acme = Acme { settings: acme.clone(), shared: Arc::clone(&shared) };
        spawn("acme".to_owned(), move || acme.run())?;
    }
    if let Some(roots) = roots {
        meet(&settings, &shared, &roots)?;
    }
    tracing::info!(
        public_key = %ConfigKey(public.0), workers = settings.workers,
        admission = if settings.keys_file.is_some() { "by list" } else { "everybody" },
        "the relay is ready"
    );
    notify(&[NotifyState::Ready]);
    let mut service = Service { path: path.into(), settings, shared, workers, seen: None };
    service.seen = service.files_changed();
    service.watch(&mut signals)
}

fn desk() -> std::io::Result<Desk> {
    let mailbox = Mailbox::new()?;
    let counters = Counters::default();
    Ok(Desk { mailbox, counters, beat: 0.into(), watchers: 0.into() })
}

/// What `[mesh]` asks for: the key, and TLS towards the mates.
fn mesh(settings: &Settings) -> Result<Option<(Mesh, Arc<ClientConfig>)>, Failure> {
    let Some(mesh) = &settings.mesh else { return Ok(None) };
    let key = files::mesh_key(&mesh.key_file)?;
    Ok(Some((Mesh::new(key), files::roots(mesh.ca_file.as_deref())?)))
}

/// Starts a thread for each mate.
fn meet(settings: &Settings, shared: &Arc<Shared>, tls: &Arc<ClientConfig>) -> Result<(), Failure> {
    for (desk, url) in (settings.workers..).zip(settings.mates()) {
        if !url.tls {
            tracing::warn!(mate = %url, "the mesh key goes there without TLS: only for labs");
        }
        let mate = Mate {
            url: url.clone(),
            desk: desk as u16,
            tls: Arc::clone(tls),
            shared: Arc::clone(shared),
        };
        spawn("mate".to_owned(), move || mate.run())?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Settings, Failure> {
    Settings::from_toml(&files::read(path)?).map_err(|problems| {
        let seen = format!("{}:\n{problems}", path.display());
        Failure::new(Exit::ConfigInvalid, seen, "`millrace-relay config keys` lists every key")
    })
}

/// The part that a reload replaces.
fn live(settings: &Settings, public: PublicKey) -> Result<Live, Failure> {
    let mut certificate_end = None;
    let tls = match &settings.https {
        Some(https) if settings.acme.is_some() && !https.certificate_file.exists() => {
            Some(files::tls_without_certificate()?)
        }
        Some(https) => {
            let tls = files::tls(&https.certificate_file, &https.key_file, public)?;
            certificate_end = Some(Certificate::read(&https.certificate_file)?.not_after);
            Some(tls)
        }
        None => None,
    };
    let admission = match &settings.keys_file {
        Some(path) => Admission::Keys(files::admitted(path)?),
        None => Admission::Everybody,
    };
    let rate = (settings.bytes_per_second > 0).then_some(Rate {
        bytes_per_second: settings.bytes_per_second,
        burst_bytes: settings.burst_bytes,
    });
    Ok(Live { tls, certificate_end, admission, rate })
}

/// Opens all ports and starts all threads.
fn start(settings: &Settings, shared: &Arc<Shared>) -> Result<Vec<JoinHandle<()>>, Failure> {
    let mut workers = Vec::new();
    for index in 0..settings.workers {
        let mut doors = Vec::new();
        for &address in settings.https.iter().flat_map(|https| &https.listen) {
            doors.push(Door { listener: listen(address)?, tls: true, relay: true });
        }
        for &address in &settings.http.listen {
            let relay = settings.http.relay;
            doors.push(Door { listener: listen(address)?, tls: false, relay });
        }
        let worker = Worker::new(index as u16, Arc::clone(shared), doors)
            .map_err(|error| Failure::from_io("preparing a worker", &error))?;
        let run = move || {
            if let Err(error) = worker.run() {
                // Without it the clients of this worker hang: better all come back to a new start.
                tracing::error!("worker {index}: {error}");
                std::process::abort();
            }
        };
        workers.push(spawn(format!("relay-{index}"), run)?);
    }
    for (index, &address) in settings.stun.iter().enumerate() {
        let socket = udp(address)?;
        let shared = Arc::clone(shared);
        spawn("stun".to_owned(), move || stun::serve(&socket, &shared, index))?;
    }
    if let Some(address) = settings.metrics {
        let doing = format!("listening on {address} for metrics");
        let listener =
            TcpListener::bind(address).map_err(|error| Failure::from_io(doing, &error))?;
        let shared = Arc::clone(shared);
        spawn("metrics".to_owned(), move || metrics::serve(&listener, &shared))?;
    }
    Ok(workers)
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Failure> {
    thread::Builder::new()
        .name(name)
        .spawn(run)
        .map_err(|error| Failure::from_io("starting a thread", &error))
}

/// A listener of one worker. The kernel spreads connections over the workers' sockets.
fn listen(address: SocketAddr) -> Result<TcpListener, Failure> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        open_to_both(&socket, address)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    };
    open().map_err(|error| Failure::from_io(format!("listening on {address}"), &error))
}

fn udp(address: SocketAddr) -> Result<UdpSocket, Failure> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        open_to_both(&socket, address)?;
        socket.bind(&address.into())?;
        Ok(socket.into())
    };
    open().map_err(|error| Failure::from_io(format!("listening on UDP {address}"), &error))
}

/// [::] means IPv4 too, whatever the host's default.
fn open_to_both(socket: &Socket, address: SocketAddr) -> std::io::Result<()> {
    if address.is_ipv6() { socket.set_only_v6(false) } else { Ok(()) }
}

/// Each connection is a descriptor: as many as the hard limit allows. Returns how many connections
/// that lets in, for a listener without descriptors would wake its worker for ever.
fn raise_descriptors(settings: &Settings) -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let wanted = settings.connections_max;
    let ours = DESCRIPTORS_BESIDES + settings.workers * DESCRIPTORS_OF_A_WORKER;
    let mut limit = getrlimit(Resource::Nofile);
    let was = limit.current;
    limit.current = limit.maximum;
    let most = if setrlimit(Resource::Nofile, limit).is_ok() { limit.maximum } else { was };
    let room = most.map_or(usize::MAX, |most| most as usize).saturating_sub(ours);
    if room < wanted {
        tracing::warn!(
            "connections_max is {wanted}, but the limit of descriptors lets in {room}; \
             raise LimitNOFILE to {}",
            wanted + ours
        );
    }
    wanted.min(room)
}

struct Service {
    path: PathBuf,
    settings: Settings,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// When the certificate or the list last changed.
    seen: Option<SystemTime>,
}

impl Service {
    /// Waits for signals, and looks at workers and files meanwhile.
    fn watch(&mut self, signals: &mut Signals) -> Result<(), Failure> {
        let mut beats = vec![(0, Instant::now()); self.shared.workers];
        let mut looked = Instant::now();
        loop {
            let mut fds = [PollFd::new(signals, PollFlags::IN)];
            let wait = Timespec { tv_sec: LOOK.as_secs() as i64, tv_nsec: 0 };
            match poll(&mut fds, Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Failure::from_io("waiting", &error.into())),
            }
            match signals.take() {
                Some(Asked::Stop) => return self.stop(),
                Some(Asked::Reload) => self.reload("SIGHUP"),
                None => {}
            }
            if self.shared.renewed.swap(false, Ordering::Acquire) {
                self.reload("a new certificate");
            }
            if looked.elapsed() >= limits::CERTIFICATE_LOOK {
                looked = Instant::now();
                if self.files_changed() != self.seen {
                    self.reload("a changed certificate or list");
                }
            }
            if self.alive(&mut beats) {
                let clients = self.shared.registry.len();
                let status = format!("{clients} clients");
                notify(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
            }
        }
    }

    /// Whether every worker takes turns.
    fn alive(&self, beats: &mut [(u64, Instant)]) -> bool {
        let mut alive = true;
        for (index, (desk, seen)) in self.shared.desks.iter().zip(beats).enumerate() {
            let beat = desk.beat.load(Ordering::Relaxed);
            if beat != seen.0 {
                *seen = (beat, Instant::now());
            } else if seen.1.elapsed() >= STUCK {
                tracing::error!("worker {index} takes no turns");
                alive = false;
            }
        }
        alive
    }

    fn files_changed(&self) -> Option<SystemTime> {
        let https = self.settings.https.iter();
        let certificate = https.flat_map(|https| [&*https.certificate_file, &*https.key_file]);
        files::changed(certificate.chain(self.settings.keys_file.as_deref()))
    }

    /// Takes a new configuration over; a bad one changes nothing.
    fn reload(&mut self, why: &str) {
        // systemd matches the READY that follows by the time.
        let mut states = vec![NotifyState::Reloading];
        states.extend(NotifyState::monotonic_usec_now());
        notify(&states);
        self.seen = self.files_changed();
        let read = read(&self.path)
            .and_then(|settings| Ok((live(&settings, self.shared.public)?, settings)));
        self.shared.reload_failed.store(read.is_err(), Ordering::Relaxed);
        match read {
            Ok((live, settings)) => {
                if !self.settings.same_after_reload(&settings) {
                    tracing::warn!(
                        "ports, workers, limits of connections, the key, [acme] and [mesh] wait for a restart"
                    );
                }
                self.shared.live.store(Arc::new(live));
                self.settings = settings;
                self.seen = self.files_changed();
                tracing::info!("reloaded for {why}");
            }
            Err(failure) => tracing::error!("not reloaded, nothing changed: {failure}"),
        }
        notify(&[NotifyState::Ready]);
    }

    /// Tells the clients to go elsewhere, waits for them, ends.
    fn stop(&mut self) -> Result<(), Failure> {
        notify(&[NotifyState::Stopping]);
        let clients = self.shared.registry.len();
        tracing::info!(clients, "stopping: clients have {} s", self.settings.drain_seconds);
        self.shared.draining.store(true, Ordering::Relaxed);
        self.shared.ring();
        let end = Instant::now() + Duration::from_secs(self.settings.drain_seconds);
        while Instant::now() < end && !self.shared.registry.is_empty() {
            thread::sleep(Duration::from_millis(20));
        }
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.shared.ring();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                return Err(Failure::new(Exit::Error, "a worker panicked", "report it"));
            }
        }
        Ok(())
    }
}

/// Tells systemd, if it started us.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::debug!("systemd: {error}");
    }
}
