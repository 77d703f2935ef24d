//! The life of the daemon: start everything in order, follow signals, stop.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use millrace_config::config::{Routes, Workers};
use millrace_config::uapi::{Errno, SetRequest};
use millrace_config::{Config, Exit};
use millrace_host::monitor::Monitor;
use millrace_host::signals::{Asked, Signals};
use millrace_wg::limits::MTU_DEFAULT;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sd_notify::NotifyState;

use crate::control::{About, ControlHandle, Refusal};
use crate::failure::{self, Failure};
use crate::interface::Interface;
use crate::look_up::LookUps;
use crate::run::{Dataplane, Options};
use crate::settings::Settings;
use crate::uapi_server::UapiSocket;
use crate::watchdog::Watchdog;

/// Pid files, for `millrace down`.
const RUN_DIRECTORY: &str = "/run/millrace";
/// What must survive a reboot.
const STATE_DIRECTORY: &str = "/var/lib/millrace";

/// Runs until SIGTERM or SIGINT, or until something fails that the data plane needs.
pub fn run(settings: Settings) -> Result<(), Failure> {
    let failed = |e: io::Error| failure::of_io("catching signals", &e);
    // First of all, so that no thread is ever killed by a signal that it should have caught.
    let signals = Signals::catch().map_err(failed)?;
    let name = settings.config.interface.name.clone();
    let dataplane = Dataplane::start(options(&settings.config)?)?;
    let watchdog = watchdog_limit().map(|limit| Watchdog::new(limit, dataplane.pulses.clone()));
    let end = Service::start(settings, dataplane.control.clone(), signals, watchdog)
        .and_then(|service| service.serve(dataplane.listen_port));
    notify(&[NotifyState::Stopping]);
    // It may have stopped by itself, and then says why below.
    let _ = dataplane.control.stop();
    let result = dataplane.join();
    tracing::info!(interface = name, "stopped");
    end.and(result)
}

/// The first thread: between the operator (file, signals, `ip link`) and the data plane.
struct Service {
    settings: Settings,
    control: ControlHandle,
    signals: Signals,
    interface: Interface,
    links: Monitor,
    /// The operator has not set the interface down.
    is_up: bool,
    watchdog: Option<Watchdog>,
    look_ups: LookUps,
}

impl Service {
    /// Gives a started data plane its interface and its peers.
    fn start(
        settings: Settings,
        control: ControlHandle,
        signals: Signals,
        watchdog: Option<Watchdog>,
    ) -> Result<Self, Failure> {
        let failed = |e: io::Error| failure::of_io("asking for news of interfaces", &e);
        let links = Monitor::new().map_err(failed)?;
        let config = &settings.config;
        let interface = Interface::open(&config.interface.name)?;
        interface.silence()?;
        interface.set_up(config.interface.mtu.unwrap_or(MTU_DEFAULT))?;
        let look_ups = LookUps::new(control.clone());
        let service =
            Self { settings, control, signals, interface, links, is_up: true, watchdog, look_ups };
        service.put_addresses(&service.settings.config)?;
        // What came so far was our own doing, or was undone by it.
        service.links.take_states(service.interface.index()).map_err(failed)?;
        service.set(service.settings.to_change())?;
        service.tell_about(None)?;
        service.look_ups.want(service.settings.named_endpoints());
        Ok(service)
    }

    /// From a configured data plane to the end of its life.
    fn serve(mut self, port: u16) -> Result<(), Failure> {
        let name = self.settings.config.interface.name.clone();
        let _socket = UapiSocket::start(&name, self.control.clone())?;
        let _pid_file = PidFile::write(&name)?;
        let peers = self.settings.config.peers.len();
        tracing::info!(interface = name, port, peers, "ready");
        let status = format!("{peers} peers, UDP port {port}");
        notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.links.as_fd(), PollFlags::IN),
            ];
            let timeout = self.watchdog.as_ref().map(|watchdog| {
                let left = watchdog.left();
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
            });
            // Interrupted is as good as woken: everything is looked at.
            let _ = poll(&mut fds, timeout.as_ref());
            if self.watchdog.as_mut().is_some_and(Watchdog::beat) {
                notify(&[NotifyState::Watchdog]);
            }
            self.follow_interface();
            match self.signals.take() {
                Some(Asked::Stop) => return Ok(()),
                Some(Asked::Reload) => self.reload_and_tell()?,
                None => {}
            }
        }
    }

    /// Down, the data plane forgets its sessions and is silent; up again, it also needs the routes
    /// and addresses that the kernel forgot.
    fn follow_interface(&mut self) {
        let states = self.links.take_states(self.interface.index()).unwrap_or_else(|error| {
            tracing::warn!(%error, "news of interfaces were lost: it may have been down");
            vec![false, true]
        });
        for up in states {
            if up == self.is_up {
                continue;
            }
            self.is_up = up;
            let state = if up { "up" } else { "down" };
            tracing::info!(interface = self.settings.config.interface.name, state, "set by hand");
            // Routes before sessions: the answer to a packet that waited at the peer would else leave
            // in the clear.
            if up && let Err(failure) = self.put_addresses(&self.settings.config) {
                tracing::error!("the interface is up, but not as configured: {failure}");
            }
            // Fails only while the data plane is stopping.
            let _ = self.control.set_up(up);
        }
    }

    fn reload_and_tell(&mut self) -> Result<(), Failure> {
        let mut states = vec![NotifyState::Reloading];
        // Type=notify-reload waits for the READY=1 that comes after this moment.
        states.extend(NotifyState::monotonic_usec_now());
        notify(&states);
        match self.reload() {
            Ok(()) => tracing::info!("reloaded"),
            Err(failure) => {
                tracing::error!("not reloaded, the old state stays: {failure}");
                self.tell_about(Some(failure.to_string()))?;
            }
        }
        notify(&[NotifyState::Ready]);
        Ok(())
    }

    /// Takes the file over as it is now. On an error everything stays as it was.
    fn reload(&mut self) -> Result<(), Failure> {
        let mut new = self.settings.read_again()?;
        let restart = new.config.restart_keys(&self.settings.config);
        if !restart.is_empty() {
            tracing::warn!(keys = restart.join(", "), "these keys take effect at the next start");
        }
        let old = &self.settings.config;
        let config = new.config.keeping_restart_keys(old);
        let changed = self.change_interface(&config, old);
        let changed = changed.and_then(|()| self.set(new.to_change()));
        if let Err(failure) = changed {
            // Half of it may be done: back to what was. If that fails too, the first reason counts.
            let back = self.change_interface(old, &config);
            let _ = back.and_then(|()| self.set(self.settings.to_change()));
            return Err(failure);
        }
        let mtu = config.interface.mtu.unwrap_or(MTU_DEFAULT);
        self.control.set_mtu(mtu).map_err(|refusal| refused(&refusal))?;
        new.config = config;
        self.settings = new;
        self.tell_about(None)?;
        self.look_ups.want(self.settings.named_endpoints());
        Ok(())
    }

    /// Addresses and routes of a configuration.
    fn put_addresses(&self, config: &Config) -> Result<(), Failure> {
        for &address in &config.interface.address {
            self.interface.add_address(address)?;
        }
        self.interface.add_routes(&routes(config))
    }

    /// From one configuration to another: what `before` had and `config` has not goes.
    fn change_interface(&self, config: &Config, before: &Config) -> Result<(), Failure> {
        self.interface.set_mtu(config.interface.mtu.unwrap_or(MTU_DEFAULT))?;
        if self.is_up {
            // Down, it has no routes; they come when it is up again.
            self.put_addresses(config)?;
        }
        let routes: HashSet<IpNet> = routes(config).into_iter().collect();
        for &net in self::routes(before).iter().filter(|net| !routes.contains(net)) {
            self.interface.remove_route(net)?;
        }
        let addresses = &config.interface.address;
        let gone = before.interface.address.iter().filter(|address| !addresses.contains(address));
        gone.into_iter().try_for_each(|&address| self.interface.remove_address(address))
    }

    fn set(&self, change: SetRequest) -> Result<(), Failure> {
        self.control.set(change).map_err(|refusal| refused(&refusal))
    }

    /// Tells `status` what it cannot know from the device.
    fn tell_about(&self, config_error: Option<String>) -> Result<(), Failure> {
        let about = About { names: self.settings.names(), config_error };
        self.control.set_about(about).map_err(|refusal| refused(&refusal))
    }
}

fn options(config: &Config) -> Result<Options, Failure> {
    let cores = match &config.dataplane.workers {
        Workers::Cores(cores) => cores.clone(),
        Workers::Auto => core_affinity::get_core_ids()
            .unwrap_or_default()
            .into_iter()
            .map(|core| core.id)
            .take(WORKERS_AUTO_MAX)
            .collect(),
    };
    let directory = Path::new(STATE_DIRECTORY);
    fs::create_dir_all(directory)
        .map_err(|e| failure::of_io(&format!("making {STATE_DIRECTORY}"), &e))?;
    let interface = &config.interface;
    Ok(Options {
        interface: interface.name.clone(),
        listen_port: interface.listen_port,
        fwmark: interface.fwmark,
        cores: if cores.is_empty() { vec![0] } else { cores },
        offload: config.offload,
        mtu: interface.mtu.unwrap_or(MTU_DEFAULT),
        timestamps: Some(directory.join(format!("{}.timestamp", interface.name))),
        notes: config.notes.clone(),
        plane: config.dataplane.clone(),
        past_firewall: config.discovery.past_firewall,
        watchdog: watchdog_limit().is_some(),
    })
}

/// More workers than this only help with more peers than most gateways have; say so in the file.
const WORKERS_AUTO_MAX: usize = 8;

/// Prefixes that lead into the tunnel. A default route is left to the operator: without policy
/// routing it would lead the tunnel's own packets into the tunnel.
fn routes(config: &Config) -> Vec<IpNet> {
    if config.interface.routes == Routes::Off {
        return Vec::new();
    }
    let nets = config.peers.iter().flat_map(|peer| &peer.allowed_ips);
    nets.filter(|net| net.prefix_len() > 0).copied().collect()
}

fn refused(refusal: &Refusal) -> Failure {
    if refusal.errno == Errno::Permission {
        return failure::of_io(&refusal.why, &io::Error::from_raw_os_error(libc::EPERM));
    }
    let cure = "the configuration asks for more than this device can do: change it";
    Failure::new(Exit::Error, refusal.why.clone(), cure)
}

/// /run/millrace/NAME.pid; removed when dropped.
struct PidFile(PathBuf);

impl PidFile {
    fn write(interface: &str) -> Result<Self, Failure> {
        let path = Path::new(RUN_DIRECTORY).join(format!("{interface}.pid"));
        fs::create_dir_all(RUN_DIRECTORY)
            .and_then(|()| fs::write(&path, format!("{}\n", std::process::id())))
            .map_err(|e| failure::of_io(&format!("writing {}", path.display()), &e))?;
        Ok(Self(path))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Best effort: `millrace down` also checks whose pid it is.
        let _ = fs::remove_file(&self.0);
    }
}

/// How long systemd waits for a sign of life, if it does.
fn watchdog_limit() -> Option<Duration> {
    let mut limit_us = 0;
    sd_notify::watchdog_enabled(false, &mut limit_us).then(|| Duration::from_micros(limit_us))
}

/// Tells systemd, if it started us.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
