//! An unmodified derper at the server site.

use std::{net::TcpStream, time::Duration};

use super::{Internet, SERVER_V4};
use crate::{Daemon, Lab, Result, gateway::installed_program};

/// Where it serves HTTP, at [`SERVER_V4`]; STUN is at 3478.
pub const DERPER_PORT: u16 = 3340;

/// A loaded machine starts it within this.
const START_LIMIT: Duration = Duration::from_secs(20);

impl Internet {
    /// Starts derper without TLS, with or without its STUN server, and waits until it listens.
    pub fn start_derper(&self, lab: &Lab, stun: bool) -> Result<Daemon> {
        let mut command = self.server.command(installed_program("derper")?);
        command.args(["-dev", &format!("-stun={stun}"), "-c"]);
        command.arg(lab.directory().join("derper.json"));
        let mut derper = Daemon::start(lab.directory(), "derper", command)?;
        let listens = || {
            let at = (SERVER_V4[0], DERPER_PORT);
            self.server.run(|| TcpStream::connect(at)).ok().map(drop)
        };
        derper.wait_for("its port", START_LIMIT, listens)?;
        Ok(derper)
    }
}
