//! millrace-relay at the server site of an [`Internet`]: TLS, STUN on all addresses, and a name.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use crate::{
    Daemon, Error, Lab, Result, gateway,
    nat::{Internet, RELAY_NAME, SERVER_V4, SERVER_V6},
};

/// How long a relay may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The port of its STUN service.
const STUN_PORT: u16 = 3478;

/// A running relay.
#[derive(Debug)]
pub struct Relay {
    directory: PathBuf,
    namespace: crate::Namespace,
    daemon: Option<Daemon>,
    starts: u32,
}

impl Relay {
    /// Starts it on TCP 443 and UDP 3478 of all the server's addresses.
    pub fn start(lab: &Lab, internet: &Internet) -> Result<Self> {
        let directory = lab.directory().join(lab.interface_name());
        fs::create_dir(&directory).map_err(Error::system("make the relay's directory"))?;
        let mut relay =
            Self { directory, namespace: internet.server.clone(), daemon: None, starts: 0 };
        relay.configure()?;
        relay.start_again()?;
        Ok(relay)
    }

    /// Lines for a `[discovery]` of those who shall use it.
    pub fn discovery(&self) -> String {
        self.discovery_and(&[])
    }

    /// The same with more STUN servers, `host:port`.
    pub fn discovery_and(&self, more: &[String]) -> String {
        let ca = self.certificate_file();
        let second = format!("{}:{STUN_PORT}", SERVER_V4[1]);
        let stun: Vec<&String> = [&second].into_iter().chain(more).collect();
        format!("relay = [\"https://{RELAY_NAME}\"]\nrelay_ca_file = {ca:?}\nstun = {stun:?}\n")
    }

    /// The certificate that it shows, which signed itself.
    pub fn certificate_file(&self) -> PathBuf {
        self.directory.join("chain.pem")
    }

    /// Its process, while it runs.
    pub fn daemon(&mut self) -> Option<&mut Daemon> {
        self.daemon.as_mut()
    }

    /// Kills it; its connections end at once.
    pub fn kill(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.kill();
        }
    }

    /// Starts it as it was, with the same key.
    pub fn start_again(&mut self) -> Result<()> {
        let mut command = self.namespace.command(gateway::own_program("millrace-relay")?);
        command.arg("run").arg("--config").arg(self.directory.join("relay.toml"));
        self.starts += 1;
        let name = format!("relay-{}", self.starts);
        let mut daemon = Daemon::start(&self.directory, &name, command)?;
        daemon.wait_for_log("the relay is ready", START_LIMIT)?;
        self.daemon = Some(daemon);
        Ok(())
    }

    fn configure(&self) -> Result<()> {
        let made = rcgen::generate_simple_self_signed(vec![RELAY_NAME.to_owned()])
            .map_err(|error| Error::Unexpected(format!("no certificate: {error}")))?;
        let path = |name: &str| self.directory.join(name);
        let (chain, key) = (path("chain.pem"), path("key.pem"));
        let addresses: Vec<IpAddr> =
            SERVER_V4.map(IpAddr::from).into_iter().chain(SERVER_V6.map(IpAddr::from)).collect();
        let listen = |port| {
            let all = addresses.iter().map(|address| SocketAddr::new(*address, port).to_string());
            format!("{:?}", all.collect::<Vec<_>>())
        };
        let toml = format!(
            "schema = 1\n[relay]\nprivate_key_file = {:?}\nworkers = 1\n\
             [https]\nlisten = {}\ncertificate_file = {chain:?}\nkey_file = {key:?}\n\
             [stun]\nlisten = {}\n",
            path("private.key"),
            listen(443),
            listen(STUN_PORT)
        );
        for (path, text) in [
            (&chain, made.cert.pem()),
            (&key, made.signing_key.serialize_pem()),
            (&path("relay.toml"), toml),
        ] {
            fs::write(path, text).map_err(Error::system(format!("write {}", path.display())))?;
        }
        Ok(())
    }
}
