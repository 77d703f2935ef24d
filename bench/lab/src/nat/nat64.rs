//! NAT64 and DNS64 on a router: how hosts with IPv6 alone reach IPv4.

use std::{net::Ipv6Addr, path::PathBuf, time::Duration};

use super::{
    Internet, Router, SERVER_V4,
    services::{place, program, write},
};
use crate::{Daemon, Error, Lab, Result};

/// How long a daemon may take to start.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Where the translated hosts are seen by the router's IPv4 side.
const POOL: &str = "192.168.255";

/// tayga and the name servers. Without IPv6 on the router there is nothing to translate.
#[derive(Debug)]
pub struct Nat64 {
    /// A file as /etc/resolv.conf that names the router's name server.
    pub resolv_conf: PathBuf,
    /// The prefix under which the router has IPv4.
    pub prefix: Ipv6Addr,
    _tayga: Daemon,
    _names: [Daemon; 2],
}

impl Router {
    /// tayga under a prefix of the network's own, which nobody can guess, and unbound, which makes
    /// IPv6 addresses of IPv4 ones for all names.
    pub fn start_nat64(&self, lab: &Lab, internet: &Internet) -> Result<Nat64> {
        let number = self.number();
        let none = || Error::Unexpected("NAT64 needs a router with IPv6".into());
        let server = self.lan_v6(1).ok_or_else(none)?;
        let prefix = Ipv6Addr::new(0x2001, 0xdb8, number.into(), 0xff9b, 0, 0, 0, 0);
        let tayga = self.start_tayga(lab, prefix)?;
        let names = [self.start_root(lab, internet)?, self.start_dns64(lab, prefix, server)?];
        let (directory, _) = place(lab, "resolver")?;
        let resolv_conf = write(directory.join("resolv.conf"), &format!("nameserver {server}\n"))?;
        Ok(Nat64 { resolv_conf, prefix, _tayga: tayga, _names: names })
    }

    fn start_tayga(&self, lab: &Lab, prefix: Ipv6Addr) -> Result<Daemon> {
        let (directory, name) = place(lab, "tayga")?;
        let number = self.number();
        let configuration = format!(
            "tun-device nat64\nipv4-addr {POOL}.1\nipv6-addr 2001:db8:{number}:64::1\n\
             prefix {prefix}/96\ndynamic-pool {POOL}.0/24\ndata-dir {}\n",
            directory.display()
        );
        let file = write(directory.join("tayga.conf"), &configuration)?;
        let tayga = program("/usr/sbin/tayga")?;
        self.namespace().exec(&format!("{tayga} -c {} --mktun", file.display()))?;
        self.namespace().ip([
            "link set nat64 up".into(),
            format!("route add {POOL}.0/24 dev nat64"),
            format!("route add {prefix}/96 dev nat64"),
        ])?;
        let mut command = self.namespace().command(tayga);
        command.arg("-c").arg(file).arg("--nodetach");
        let mut daemon = Daemon::start(&directory, &name, command)?;
        daemon.wait_for("a carrier", START_LIMIT, || {
            let state = self.namespace().exec("ip -o link show dev nat64").ok()?;
            state.contains("LOWER_UP").then_some(())
        })?;
        Ok(daemon)
    }

    /// The name server of the internet: it knows the name that RFC 7050 asks for.
    fn start_root(&self, lab: &Lab, internet: &Internet) -> Result<Daemon> {
        let listen = SERVER_V4[0];
        let zones = "module-config: \"iterator\"\n local-zone: \"arpa.\" nodefault\n \
             local-zone: \"ipv4only.arpa.\" static\n \
             local-data: \"ipv4only.arpa. 3600 IN A 192.0.0.170\"\n \
             local-data: \"ipv4only.arpa. 3600 IN A 192.0.0.171\"\n";
        let (directory, name) = place(lab, "unbound")?;
        let text = unbound(&directory, &listen.to_string(), zones);
        let file = write(directory.join("unbound.conf"), &text)?;
        let mut command = internet.server.command(program("/usr/sbin/unbound")?);
        command.arg("-d").arg("-c").arg(file);
        let mut daemon = Daemon::start(&directory, &name, command)?;
        daemon.wait_for_log("start of service", START_LIMIT)?;
        Ok(daemon)
    }

    fn start_dns64(&self, lab: &Lab, prefix: Ipv6Addr, listen: Ipv6Addr) -> Result<Daemon> {
        let zones = format!(
            "module-config: \"dns64 iterator\"\n dns64-prefix: {prefix}/96\n\
             forward-zone:\n name: \".\"\n forward-addr: {}\n",
            SERVER_V4[0]
        );
        let (directory, name) = place(lab, "unbound")?;
        let text = unbound(&directory, &listen.to_string(), &zones);
        let file = write(directory.join("unbound.conf"), &text)?;
        let mut command = self.namespace().command(program("/usr/sbin/unbound")?);
        command.arg("-d").arg("-c").arg(file);
        let mut daemon = Daemon::start(&directory, &name, command)?;
        daemon.wait_for_log("start of service", START_LIMIT)?;
        Ok(daemon)
    }
}

/// What both name servers have in common, and `more` of the server's section.
fn unbound(directory: &std::path::Path, listen: &str, more: &str) -> String {
    let directory = directory.display();
    format!(
        "server:\n interface: {listen}\n access-control: ::/0 allow\n access-control: 0.0.0.0/0 allow\n \
         do-daemonize: no\n username: \"\"\n chroot: \"\"\n directory: \"{directory}\"\n \
         pidfile: \"{directory}/pid\"\n use-syslog: no\n logfile: \"\"\n verbosity: 1\n \
         do-not-query-localhost: no\n {more}"
    )
}
