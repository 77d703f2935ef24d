//! A Linux guest under QEMU: the kernel's own WireGuard, and network cards that do AF_XDP zero-copy.
//!
//! `scripts/vm` builds and boots it; here it becomes a thing with a name that runs shell scripts.
//! Its CPU is software, so it proves behaviour and never speed.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{Daemon, Error, Lab, Namespace, Result};

/// From start of QEMU to the first script: 3 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// How long one script may take.
const SCRIPT_LIMIT: Duration = Duration::from_secs(120);

/// How often a condition inside the guest is asked for: each question starts processes there.
const POLL: Duration = Duration::from_millis(200);

/// The model of the guest's network cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Card {
    /// Paravirtual; one queue on a cable, as many as its tap has otherwise.
    Virtio,
    /// Intel's 82576: real receive-side scaling, other buffer rules.
    Igb,
}

/// What a card is plugged into.
#[derive(Clone, Debug)]
pub enum Wire {
    /// A hub inside QEMU; two cards on one hub are joined by a cable.
    Hub(u8),
    /// A tap device of the namespace in which the guest is booted.
    Tap {
        /// The device's name.
        name: String,
        /// Queue pairs of the device, and of the card if it is virtio.
        queues: u8,
    },
}

/// A guest to be.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// The model of all cards.
    pub card: Card,
    /// One card each, in the order of the guest's eth0, eth1 …
    pub wires: Vec<Wire>,
    /// Files to put in: (here, there). Programs bring their shared libraries along.
    pub files: Vec<(PathBuf, String)>,
    /// Cards whose frames are recorded, by their number.
    pub captures: Vec<u8>,
}

/// A running guest. Dropped, it is killed; in a panic it also prints what its kernel said last.
#[derive(Debug)]
pub struct Guest {
    agent: BufReader<UnixStream>,
    requests: u32,
    kernel: String,
    console: PathBuf,
    captures: Vec<(u8, PathBuf)>,
    qemu: Daemon,
}

impl Guest {
    /// Boots a guest inside `namespace` and waits until it takes scripts.
    pub fn boot(
        lab: &Lab,
        namespace: &Namespace,
        name: &str,
        options: &GuestOptions,
    ) -> Result<Self> {
        let directory = lab.directory();
        let socket = directory.join(format!("{name}.agent"));
        let console = directory.join(format!("{name}.console"));
        let captures: Vec<(u8, PathBuf)> = (options.captures.iter())
            .map(|&card| (card, directory.join(format!("{name}.eth{card}.pcap"))))
            .collect();

        let mut command = namespace.command(vm_script());
        command.arg("boot").arg("--agent").arg(&socket).arg("--console").arg(&console);
        command.args(options.arguments());
        for (card, path) in &captures {
            command.arg("--capture").arg(format!("{card}:{}", path.display()));
        }
        let mut qemu = Daemon::start(directory, &format!("{name}.qemu"), command)?;
        let agent =
            qemu.wait_for("QEMU's agent socket", BOOT_LIMIT, || UnixStream::connect(&socket).ok())?;
        let agent = BufReader::new(agent);
        let mut guest = Self { agent, requests: 0, kernel: String::new(), console, captures, qemu };
        guest.kernel = guest.read_ready()?;
        Ok(guest)
    }

    /// The release of the guest's kernel, as `uname -r` says it.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// All that the guest's kernel has said.
    pub fn console(&self) -> String {
        std::fs::read(&self.console)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The recording of a card that was named in [`GuestOptions::captures`].
    pub fn capture(&self, card: u8) -> Option<&Path> {
        self.captures.iter().find(|(number, _)| *number == card).map(|(_, path)| path.as_path())
    }

    /// Runs a shell script to its end and returns what it wrote; a failing one is an error.
    pub fn run(&mut self, script: &str) -> Result<String> {
        self.run_within(SCRIPT_LIMIT, script)
    }

    /// As [`Self::run`], with its own time limit.
    pub fn run_within(&mut self, limit: Duration, script: &str) -> Result<String> {
        // A failure in the middle is a failure of the whole.
        let (status, output) = self.ask(limit, &format!("set -e\n{script}"))?;
        if status == 0 {
            return Ok(output);
        }
        Err(Error::Command {
            command: script.into(),
            place: "the guest".into(),
            status: format!("exit status {status}"),
            output,
        })
    }

    /// Whether a shell script ends with success.
    pub fn succeeds(&mut self, script: &str) -> Result<bool> {
        Ok(self.ask(SCRIPT_LIMIT, script)?.0 == 0)
    }

    /// Runs a script again and again until it ends with success.
    pub fn wait_until(&mut self, what: &str, limit: Duration, script: &str) -> Result<()> {
        let started = Instant::now();
        while !self.succeeds(script)? {
            if started.elapsed() > limit {
                let (_, said) = self.ask(SCRIPT_LIMIT, script)?;
                let what = format!("{what} in the guest; `{script}` said: {said}");
                return Err(Error::Timeout { what, waited: limit });
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn read_ready(&mut self) -> Result<String> {
        let line = self.read_line(Instant::now() + BOOT_LIMIT, "the guest to boot")?;
        let kernel = line.strip_prefix("READY ").map(|kernel| kernel.trim_end().to_owned());
        kernel.ok_or_else(|| Error::Unexpected(format!("the guest's agent said {line:?}")))
    }

    /// One request to the guest's agent (see `scripts/vm`): exit status and output.
    fn ask(&mut self, limit: Duration, script: &str) -> Result<(i32, String)> {
        let deadline = Instant::now() + limit;
        self.requests += 1;
        let request = format!("RUN {} {}\n{script}", self.requests, script.len());
        let sent = self.agent.get_mut().write_all(request.as_bytes());
        sent.map_err(Error::system("send a script to the guest"))?;
        let done = format!("DONE {} ", self.requests);
        let mut output = String::new();
        loop {
            let line = self.read_line(deadline, &format!("the guest's script `{script}`"))?;
            if let Some(status) = line.strip_prefix(&done) {
                let status = status.trim_end().parse();
                let status = status.map_err(|_| Error::Unexpected(format!("agent: {line:?}")))?;
                return Ok((status, output.trim_end().into()));
            }
            output.push_str(&line);
        }
    }

    fn read_line(&mut self, deadline: Instant, what: &str) -> Result<String> {
        let started = Instant::now();
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = || Error::Timeout { what: what.into(), waited: started.elapsed() };
            if left.is_zero() {
                return Err(timeout());
            }
            let limited = self.agent.get_ref().set_read_timeout(Some(left));
            limited.map_err(Error::system("limit the wait for the guest"))?;
            match self.agent.by_ref().read_until(b'\n', &mut line) {
                Ok(_) if line.ends_with(b"\n") => {
                    return Ok(String::from_utf8_lossy(&line).into_owned());
                }
                Ok(_) => return Err(self.ended(what)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(timeout());
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::system("read from the guest")(error)),
            }
        }
    }

    /// QEMU closed the agent's socket.
    fn ended(&mut self, what: &str) -> Error {
        Error::Unexpected(format!(
            "the guest ended during {what}\n{}\n{}",
            self.qemu.log_tail(),
            tail(&self.console())
        ))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the guest's kernel said last:\n{}", tail(&self.console()));
        }
    }
}

impl GuestOptions {
    /// One card of this model on each of these wires, nothing more.
    pub fn new(card: Card, wires: Vec<Wire>) -> Self {
        Self { card, wires, files: Vec::new(), captures: Vec::new() }
    }

    /// Also puts in a program of this build, as /bin/`name`.
    pub fn program(mut self, name: &str) -> Result<Self> {
        let own = std::env::current_exe().map_err(Error::system("find the running executable"))?;
        // A test's executable is one directory further down, in target/PROFILE/deps.
        let found = own.ancestors().skip(1).take(2).map(|directory| directory.join(name));
        let found = found.into_iter().find(|path| path.is_file()).ok_or_else(|| {
            let near = own.display();
            Error::Unexpected(format!("no {name} near {near}: run cargo build --workspace --bins"))
        })?;
        self.files.push((found, format!("/bin/{name}")));
        Ok(self)
    }

    fn arguments(&self) -> Vec<String> {
        let card = match self.card {
            Card::Virtio => "virtio",
            Card::Igb => "igb",
        };
        let mut arguments = vec!["--model".into(), card.into()];
        for wire in &self.wires {
            arguments.push("--nic".into());
            arguments.push(match wire {
                Wire::Hub(hub) => format!("hub:{hub}"),
                Wire::Tap { name, queues } => format!("tap:{name}:{queues}"),
            });
        }
        for (here, there) in &self.files {
            arguments.push("--file".into());
            arguments.push(format!("{}:{there}", here.display()));
        }
        arguments
    }
}

/// `scripts/vm` of this source tree.
fn vm_script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/vm")
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
