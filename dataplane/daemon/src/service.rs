//! The life of the daemon: start everything in order, follow signals, stop.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use millrace_config::Config;
use millrace_config::config::{Routes, Workers};
use millrace_config::uapi::{Errno, SetRequest};
use millrace_wg::limits::MTU_DEFAULT;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::control::{About, ControlHandle, Refusal};
use crate::failure::Failure;
use crate::netlink::Interface;
use crate::run::{Dataplane, Options};
use crate::settings::{Settings, Unresolved};
use crate::uapi_server::UapiSocket;

/// Pid files, for `millrace down`.
const RUN_DIRECTORY: &str = "/run/millrace";
/// What must survive a reboot.
const STATE_DIRECTORY: &str = "/var/lib/millrace";
/// Between two look-ups of a name that fails.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(30);

/// Runs until SIGTERM or SIGINT, or until something fails that the data plane needs.
pub fn run(mut settings: Settings) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::from_io("catching signals", &e);
    // First of all, so that no thread is ever killed by a signal that it should have caught.
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(failed)?;
    let name = settings.config.interface.name.clone();
    let dataplane = Dataplane::start(options(&settings.config)?)?;
    let end = serve(&mut settings, &dataplane.control, &mut signals, dataplane.listen_port);
    notify(&[NotifyState::Stopping]);
    // It may have stopped by itself, and then says why below.
    let _ = dataplane.control.stop();
    let result = dataplane.join();
    tracing::info!(interface = name, "stopped");
    end.and(result)
}

/// From a started data plane to the end of its life.
fn serve(
    settings: &mut Settings,
    control: &ControlHandle,
    signals: &mut Signals,
    port: u16,
) -> Result<(), Failure> {
    let name = settings.config.interface.name.clone();
    set_interface(&settings.config, None)?;
    let (change, unresolved) = settings.to_change();
    set(control, change)?;
    about(control, settings, None)?;
    look_up_later(control, unresolved);
    let _socket = UapiSocket::start(&name, control.clone())?;
    let _pid_file = PidFile::write(&name)?;
    let peers = settings.config.peers.len();
    tracing::info!(interface = name, port, peers, "ready");
    let status = format!("{peers} peers, UDP port {port}");
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    for signal in signals.forever() {
        if signal != SIGHUP {
            break;
        }
        notify(&[NotifyState::Reloading]);
        match reload(settings, control) {
            Ok(()) => tracing::info!("reloaded"),
            Err(failure) => {
                tracing::error!("not reloaded, the old state stays: {failure}");
                about(control, settings, Some(failure.to_string()))?;
            }
        }
        notify(&[NotifyState::Ready]);
    }
    Ok(())
}

/// Takes the file over as it is now. On an error everything stays as it was.
fn reload(settings: &mut Settings, control: &ControlHandle) -> Result<(), Failure> {
    let mut new = settings.read_again()?;
    let restart = new.config.restart_keys(&settings.config);
    if !restart.is_empty() {
        tracing::warn!(keys = restart.join(", "), "these keys take effect at the next start");
    }
    let config = new.config.keeping_restart_keys(&settings.config);
    let (change, unresolved) = new.to_change();
    let changed =
        set_interface(&config, Some(&settings.config)).and_then(|()| set(control, change));
    if let Err(failure) = changed {
        // Half of it may be done: back to what was. If that fails too, the first reason counts.
        let back = set_interface(&settings.config, Some(&config));
        let _ = back.and_then(|()| set(control, settings.to_change().0));
        return Err(failure);
    }
    let mtu = config.interface.mtu.unwrap_or(MTU_DEFAULT);
    control.set_mtu(mtu).map_err(|refusal| refused(&refusal))?;
    about(control, &new, None)?;
    look_up_later(control, unresolved);
    new.config = config;
    *settings = new;
    Ok(())
}

/// Tells `status` what it cannot know from the device.
fn about(
    control: &ControlHandle,
    settings: &Settings,
    config_error: Option<String>,
) -> Result<(), Failure> {
    let about = About { names: settings.names(), config_error };
    control.set_about(about).map_err(|refusal| refused(&refusal))
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
        .map_err(|e| Failure::from_io(&format!("making {STATE_DIRECTORY}"), &e))?;
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
    })
}

/// More workers than this only help with more peers than most gateways have; say so in the file.
const WORKERS_AUTO_MAX: usize = 8;

/// MTU, addresses and routes; what `before` had and `config` has not goes.
fn set_interface(config: &Config, before: Option<&Config>) -> Result<(), Failure> {
    let mut interface = Interface::open(&config.interface.name)?;
    if before.is_none() {
        interface.silence()?;
    }
    interface.set_up(config.interface.mtu.unwrap_or(MTU_DEFAULT))?;
    for &address in &config.interface.address {
        interface.add_address(address)?;
    }
    let routes = routes(config);
    for &net in &routes {
        interface.add_route(net)?;
    }
    let Some(before) = before else { return Ok(()) };
    for &net in self::routes(before).iter().filter(|net| !routes.contains(net)) {
        interface.remove_route(net)?;
    }
    for &address in &before.interface.address {
        if !config.interface.address.contains(&address) {
            interface.remove_address(address)?;
        }
    }
    Ok(())
}

/// Prefixes that lead into the tunnel. A default route is left to the operator: without policy
/// routing it would lead the tunnel's own packets into the tunnel.
fn routes(config: &Config) -> Vec<ipnet::IpNet> {
    if config.interface.routes == Routes::Off {
        return Vec::new();
    }
    let nets = config.peers.iter().flat_map(|peer| &peer.allowed_ips);
    nets.filter(|net| net.prefix_len() > 0).copied().collect()
}

fn set(control: &ControlHandle, change: SetRequest) -> Result<(), Failure> {
    control.set(change).map_err(|refusal| refused(&refusal))
}

fn refused(refusal: &Refusal) -> Failure {
    let errno = if refusal.errno == Errno::Permission { libc::EPERM } else { libc::EINVAL };
    Failure::from_io(&refusal.why, &io::Error::from_raw_os_error(errno))
}

/// Goes on looking names up until each was found once.
fn look_up_later(control: &ControlHandle, mut unresolved: Vec<Unresolved>) {
    if unresolved.is_empty() {
        return;
    }
    let control = control.clone();
    let spawned = thread::Builder::new().name("look-up".into()).spawn(move || {
        while !unresolved.is_empty() {
            thread::sleep(LOOK_UP_INTERVAL);
            unresolved.retain(|name| match name.retry() {
                // Fails only when the data plane is stopping.
                Some(change) => control.set(change).is_err(),
                None => true,
            });
        }
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "endpoint names are not looked up again");
    }
}

/// /run/millrace/NAME.pid; removed when dropped.
struct PidFile(PathBuf);

impl PidFile {
    fn write(interface: &str) -> Result<Self, Failure> {
        let path = Path::new(RUN_DIRECTORY).join(format!("{interface}.pid"));
        fs::create_dir_all(RUN_DIRECTORY)
            .and_then(|()| fs::write(&path, format!("{}\n", std::process::id())))
            .map_err(|e| Failure::from_io(&format!("writing {}", path.display()), &e))?;
        Ok(Self(path))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Best effort: `millrace down` also checks whose pid it is.
        let _ = fs::remove_file(&self.0);
    }
}

/// Tells systemd, if it started us.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
