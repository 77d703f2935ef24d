//! The life of the process: start, wait for whatever is ready, stop.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use millrace_config::{Config, Exit, paths};
use millrace_host::monitor::Monitor;
use millrace_host::signals::{Asked, Signals};
use rustix::event::{PollFd, PollFlags, poll};
use sd_notify::NotifyState;

use crate::api::Api;
use crate::clock;
use crate::gateway::Gateway;
use crate::privileges;
use millrace_host::failure::Failure;

/// Runs until SIGTERM or SIGINT.
pub fn run(path: &Path) -> Result<(), Failure> {
    let failed = |doing: &'static str| move |e: io::Error| Failure::from_io(doing, &e);
    // First of all, so that no thread is ever killed by a signal that it should have caught.
    let signals = Signals::catch().map_err(failed("catching signals"))?;
    let config = read(path)?;
    let name = config.interface.name.clone();
    let directory = Path::new(millrace_ebpf::link::DIRECTORY);
    let shown = directory.display();
    fs::create_dir_all(directory)
        .map_err(|e| Failure::from_io(format_args!("making the directory {shown}"), &e))?;
    let socket = paths::socket(&name);
    let shown = socket.display().to_string();
    let api = Api::bind(socket)
        .map_err(|e| Failure::from_io(format_args!("listening at {shown}"), &e))?;
    let monitor = Monitor::new().and_then(|monitor| monitor.follow_routes().map(|()| monitor));
    let monitor = monitor.map_err(failed("asking for news of the network"))?;
    // While we may: the directory is root's.
    let pid_file = directory.join(format!("{name}.control.pid"));
    let shown = pid_file.display();
    fs::write(&pid_file, format!("{}\n", std::process::id()))
        .map_err(|e| Failure::from_io(format_args!("writing {shown}"), &e))?;
    privileges::restrict();
    let gateway = Gateway::new(&name, config.discovery);
    let gateway = gateway.map_err(failed("looking at the network"))?;
    tracing::info!(interface = name, "ready");
    let _ = sd_notify::notify(false, &[NotifyState::Ready]);
    let mut service = Service { path: path.to_owned(), signals, monitor, api, gateway };
    service.serve();
    service.gateway.close();
    let _ = sd_notify::notify(false, &[NotifyState::Stopping]);
    tracing::info!(interface = name, "stopped; the data plane keeps the paths as they are");
    Ok(())
}

struct Service {
    path: PathBuf,
    signals: Signals,
    monitor: Monitor,
    api: Api,
    gateway: Gateway,
}

/// What a descriptor is for.
#[derive(Clone, Copy)]
enum Ready {
    Signals,
    Network,
    Names,
    Plane,
    Udp,
    Detour(usize),
    Relay(usize),
    Routers,
    Kinds,
}

impl Service {
    fn serve(&mut self) {
        loop {
            for ready in self.wait() {
                let now = clock::now();
                match ready {
                    Ready::Signals => match self.signals.take() {
                        Some(Asked::Stop) => return,
                        Some(Asked::Reload) => self.reload(),
                        None => {}
                    },
                    Ready::Network => {
                        self.monitor.take();
                        if let Err(error) = self.gateway.look_at_network() {
                            tracing::error!(%error, "the kernel does not tell of the network");
                        }
                    }
                    Ready::Plane => self.gateway.handle_plane(now),
                    Ready::Udp => self.gateway.handle_udp(now),
                    Ready::Detour(at) => self.gateway.handle_detour(now, at),
                    Ready::Relay(at) => self.gateway.handle_relay(now, at),
                    // These are looked at in every turn.
                    Ready::Names | Ready::Routers | Ready::Kinds => {}
                }
            }
            let now = clock::now();
            self.gateway.handle_timeouts(now);
            self.api.handle(now, &mut self.gateway);
            self.gateway.flush(now);
        }
    }

    /// Sleeps until something is ready or due.
    fn wait(&self) -> Vec<Ready> {
        let gateway = &self.gateway;
        let mut waits: Vec<(BorrowedFd<'_>, Ready)> = vec![
            (self.signals.as_fd(), Ready::Signals),
            (self.monitor.as_fd(), Ready::Network),
            (gateway.names.as_fd(), Ready::Names),
        ];
        if let Some(plane) = &gateway.plane {
            waits.push((plane.as_fd(), Ready::Plane));
            if let Some(tools) = &plane.tools {
                waits.push((tools.udp.as_fd(), Ready::Udp));
                let detours = tools.detours.iter().enumerate();
                waits.extend(detours.map(|(at, socket)| (socket.as_fd(), Ready::Detour(at))));
            }
        }
        let relays = gateway.relays.list.iter().enumerate();
        waits.extend(relays.map(|(at, relay)| (relay.client.interest().0, Ready::Relay(at))));
        let routers = &gateway.routers;
        waits.extend(routers.mappers.iter().map(|mapper| (mapper.interest().0, Ready::Routers)));
        waits.push((routers.nat64.interest().0, Ready::Routers));
        waits.push((gateway.kinds.driver.interest().0, Ready::Kinds));
        let mut fds: Vec<PollFd<'_>> =
            waits.iter().map(|(fd, _)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        // Last, because these are served in every turn, whichever of them is ready.
        fds.extend(self.api.interest().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        let deadline = [gateway.deadline(), self.api.deadline()].into_iter().flatten().min();
        // Interrupted is as good as woken: everything is looked at.
        let _ = poll(&mut fds, deadline.map(clock::until).as_ref());
        let ready = fds.iter().zip(&waits).filter(|(fd, _)| !fd.revents().is_empty());
        ready.map(|(_, (_, ready))| *ready).collect()
    }

    /// A bad file changes nothing.
    fn reload(&mut self) {
        let changed = read(&self.path).and_then(|config| {
            self.gateway
                .set_discovery(clock::now(), config.discovery)
                .map_err(|e| Failure::from_io("taking over the configuration", &e))
        });
        match changed {
            Ok(()) => tracing::info!("configuration read again"),
            Err(failure) => tracing::error!("the configuration stays as it was: {failure}"),
        }
    }
}

fn read(path: &Path) -> Result<Config, Failure> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| {
        Failure::of_file(path, error, "name a file that exists and that this user may read")
    })?;
    let config = Config::from_toml(&text).map_err(|problems| {
        Failure::new(
            Exit::ConfigInvalid,
            format!("{shown} is not valid:\n{problems}"),
            "nothing was changed",
        )
    })?;
    if !config.discovery.is_on() {
        tracing::warn!("{shown} has no relay and no STUN server in [discovery]: nothing to do");
    }
    Ok(config)
}
