//! Real daemons that run on a router.

use std::{fs, path::PathBuf, time::Duration};

use super::{Router, internet::names_for};
use crate::{Daemon, Error, Lab, Result};

/// How long a daemon may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The proxy's port, the one that everybody uses.
pub const PROXY_PORT: u16 = 3128;

/// Which protocols for port mapping a router speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortMapping {
    /// UPnP, NAT-PMP and PCP.
    All,
    /// UPnP alone.
    Upnp,
    /// NAT-PMP and PCP.
    PmpAndPcp,
}

impl Router {
    /// miniupnpd: hosts may open ports. It refuses a WAN address that is not public.
    pub fn start_port_mapping(&self, lab: &Lab, protocols: PortMapping) -> Result<Daemon> {
        const TABLE: &str = "table inet miniupnpd
            delete table inet miniupnpd
            table inet miniupnpd {
                chain forward { type filter hook forward priority -10; jump miniupnpd; }
                chain miniupnpd { }
                chain prerouting { type nat hook prerouting priority -110; jump prerouting_miniupnpd; }
                chain postrouting { type nat hook postrouting priority 90; jump postrouting_miniupnpd; }
                chain prerouting_miniupnpd { }
                chain postrouting_miniupnpd { }
            }\n";
        self.nft(TABLE)?;
        let (directory, name) = place(lab, "miniupnpd")?;
        let yes = |is| if is { "yes" } else { "no" };
        let leases = directory.join("leases");
        let configuration = format!(
            "ext_ifname=wan\next_ip={wan}\nlistening_ip=lan\nhttp_port=5000\n\
             enable_upnp={upnp}\nenable_natpmp={pmp}\nsecure_mode=yes\n\
             uuid=00000000-0000-4000-8000-0000000000{number:02x}\nserial=1\nmodel_number=1\n\
             system_uptime=no\nupnp_forward_chain=miniupnpd\n\
             upnp_nat_chain=prerouting_miniupnpd\nupnp_nat_postrouting_chain=postrouting_miniupnpd\n\
             upnp_table_name=miniupnpd\nupnp_nat_table_name=miniupnpd\nlease_file={leases}\n\
             min_lifetime=1\nmax_lifetime=86400\nnotify_interval=60\nclean_ruleset_interval=600\n\
             allow 1024-65535 0.0.0.0/0 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535\n",
            wan = self.wan_v4(),
            upnp = yes(protocols != PortMapping::PmpAndPcp),
            pmp = yes(protocols != PortMapping::Upnp),
            number = self.number(),
            leases = leases.display(),
        );
        let file = write(directory.join("miniupnpd.conf"), &configuration)?;
        write(leases, "")?;
        let mut command = self.namespace().command(program("/usr/sbin/miniupnpd")?);
        command.arg("-d").arg("-f").arg(file).arg("-P").arg(directory.join("pid"));
        let mut daemon = Daemon::start(&directory, &name, command)?;
        let ready = match protocols {
            PortMapping::PmpAndPcp => "Listening for NAT-PMP/PCP",
            PortMapping::All | PortMapping::Upnp => "HTTP listening on",
        };
        daemon.wait_for_log(ready, START_LIMIT)?;
        Ok(daemon)
    }

    /// Closes all ports that miniupnpd has opened: what a restart of the router does when it is gone.
    pub fn close_ports(&self) -> Result<()> {
        self.nft("table inet miniupnpd\ndelete table inet miniupnpd\n")
    }

    /// tinyproxy on [`PROXY_PORT`] of the LAN address: CONNECT to port 443, for those who know the
    /// user's name and password, if there are any.
    pub fn start_proxy(&self, lab: &Lab, credentials: Option<(&str, &str)>) -> Result<Daemon> {
        let (directory, name) = place(lab, "tinyproxy")?;
        let listen = self.lan_v4(1);
        let mut configuration = format!(
            "Port {PROXY_PORT}\nListen {listen}\nTimeout 600\nMaxClients 50\nConnectPort 443\n\
             LogLevel Connect\n"
        );
        if let Some((user, password)) = credentials {
            configuration += &format!("BasicAuth {user} {password}\n");
        }
        let file = write(directory.join("tinyproxy.conf"), &configuration)?;
        let mut command = self.namespace().command(program("/usr/bin/tinyproxy")?);
        command.arg("-d").arg("-c").arg(file);
        names_for(lab, &mut command)?;
        let mut daemon = Daemon::start(&directory, &name, command)?;
        daemon.wait_for("it listens", START_LIMIT, || {
            let connect = || std::net::TcpStream::connect((listen, PROXY_PORT));
            self.namespace().run(connect).ok()
        })?;
        Ok(daemon)
    }
}

/// A directory of its own for a daemon, and a unique name.
pub(super) fn place(lab: &Lab, daemon: &str) -> Result<(PathBuf, String)> {
    let name = format!("{daemon}-{}", lab.interface_name());
    let directory = lab.directory().join(&name);
    fs::create_dir(&directory).map_err(Error::system(format!("make {}", directory.display())))?;
    Ok((directory, name))
}

pub(super) fn write(path: PathBuf, text: &str) -> Result<PathBuf> {
    fs::write(&path, text).map_err(Error::system(format!("write {}", path.display())))?;
    Ok(path)
}

pub(super) fn program(path: &str) -> Result<&str> {
    if std::path::Path::new(path).exists() {
        return Ok(path);
    }
    Err(Error::Unexpected(format!("{path} does not exist; run scripts/setup")))
}
