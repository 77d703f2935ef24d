//! What all parts of one lab share: a directory for logs and captures, and unique names.

use std::{
    fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use crate::{Error, Namespace, Result, wait_for};

/// Start of the name of every lab's directory; the owner's pid follows.
const DIRECTORY_PREFIX: &str = "millrace-lab-";

/// Labs and interfaces made by this process so far.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// One lab. Declare it before what runs in it, so that it is dropped last.
#[derive(Debug)]
pub struct Lab {
    directory: PathBuf,
}

impl Lab {
    /// A new lab; it also removes the directories of labs whose process was killed.
    pub fn new() -> Result<Self> {
        // SAFETY: geteuid has no arguments and cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            return Err(Error::Unexpected(
                "a lab of network namespaces needs root: run this with sudo".into(),
            ));
        }
        remove_orphans();
        let name = format!("{DIRECTORY_PREFIX}{}-{}", process::id(), next());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory)
            .map_err(Error::system(format!("make {}", directory.display())))?;
        Ok(Self { directory })
    }

    /// Where logs, captures and configuration files of this lab are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A new namespace.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        Namespace::new(name)
    }

    /// An interface name that no other lab on this machine uses: UAPI sockets are files, and so
    /// interface names must be unique across namespaces too.
    pub fn interface_name(&self) -> String {
        format!("mr{}n{}", process::id(), next())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("MILLRACE_LAB_KEEP").is_some() {
            eprintln!("kept {}", self.directory.display());
            return;
        }
        // Best effort: the next lab removes what is left.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Joins two namespaces with a veth pair, both ends up and in use.
pub fn link(a: (&Namespace, &str), b: (&Namespace, &str)) -> Result<()> {
    a.0.ip([
        format!("link add {} type veth peer name {} netns {}", a.1, b.1, b.0.path()),
        format!("link set {} up", a.1),
    ])?;
    b.0.ip([format!("link set {} up", b.1)])?;
    settle(a.0, a.1)?;
    settle(b.0, b.1)
}

/// Waits until the kernel uses an interface: it notices a carrier a moment after the fact, and until
/// then IPv6 sends nothing and a bridge forwards nothing.
pub fn settle(namespace: &Namespace, interface: &str) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(5);
    let line = format!("ip -oneline link show dev {interface}");
    wait_for(format!("{interface} in {} to be up", namespace.name()), LIMIT, || {
        namespace.exec(&line).ok().filter(|said| said.contains(" state UP ")).map(drop)
    })
}

fn next() -> u32 {
    COUNTER.fetch_add(1, Ordering::Relaxed)
}

fn remove_orphans() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(DIRECTORY_PREFIX)) else {
            continue;
        };
        let owner = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(owner).exists() {
            // Another lab may remove the same one at the same time.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
