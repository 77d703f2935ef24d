//! What the process gives up once its sockets are open: everything. It reads its configuration and
//! talks to the world as a user who may do nothing else.

use std::path::Path;

use millrace_ebpf::link::GROUP;
use nix::unistd::{Gid, Group, Uid, User, setgid, setgroups, setuid};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// The user as whom control runs where it was started by root and nobody chose another.
pub const USER: &str = "millrace";

/// Becomes [`USER`] if it is root, and keeps no capability. Call before the first thread starts.
/// What cannot be given up is logged: a site without paths is worse.
pub fn restrict() {
    if Uid::effective().is_root() {
        match User::from_name(USER) {
            Ok(Some(user)) => {
                let group = Group::from_name(GROUP).ok().flatten().map_or(user.gid, |g| g.gid);
                if let Err(error) = become_user(user.uid, group) {
                    tracing::warn!(user = USER, %error, "control stays root");
                }
            }
            _ => tracing::warn!(
                "there is no user {USER}: control stays root, without root's powers. `useradd \
                 --system --no-create-home {USER}` makes one"
            ),
        }
    }
    let none = caps::CapsHashSet::new();
    let note = |what: &str, result: Result<(), String>| {
        if let Err(error) = result {
            tracing::warn!(what, error, "a privilege could not be given up");
        }
    };
    for (set, what) in [
        (caps::CapSet::Inheritable, "inheritable set"),
        (caps::CapSet::Effective, "effective set"),
        (caps::CapSet::Permitted, "permitted set"),
    ] {
        note(what, caps::set(None, set, &none).map_err(|error| error.to_string()));
    }
    note("new privileges", text(rustix::thread::set_no_new_privs(true)));
    // Box keys must not reach a core dump, nor a debugger of the same user.
    note("dumps", text(set_dumpable_behavior(DumpableBehavior::NotDumpable)));
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    note("core files", text(setrlimit(Resource::Core, no_core)));
}

/// Gives a socket's file to the group that may ask.
pub fn give_to_group(path: &Path) {
    let Ok(Some(group)) = Group::from_name(GROUP) else { return };
    if let Err(error) = std::os::unix::fs::chown(path, None, Some(group.gid.as_raw())) {
        tracing::warn!(%error, "only root may ask at {}", path.display());
    }
}

fn become_user(user: Uid, group: Gid) -> nix::Result<()> {
    setgroups(&[group])?;
    setgid(group)?;
    setuid(user)
}

fn text(result: rustix::io::Result<()>) -> Result<(), String> {
    result.map_err(|error| error.to_string())
}
