//! What the process gives up once everything is open.
//!
//! It stays root by uid, so that it can read its 0600 key files again on a reload, but without
//! root's powers: CAP_NET_ADMIN remains (routes and addresses on a reload, the mark of sockets),
//! and with AF_XDP also CAP_NET_RAW, CAP_BPF and CAP_IPC_LOCK (new rings after a link was down).
//! Capabilities belong to threads: call before the first thread is started.

use caps::{CapSet, Capability, CapsHashSet};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Gives everything up but what is named above. What cannot be given up is logged: it is no reason
/// to leave a site without its tunnel.
pub fn restrict(with_af_xdp: bool) {
    let mut keep = CapsHashSet::from([Capability::CAP_NET_ADMIN]);
    if with_af_xdp {
        keep.extend([Capability::CAP_NET_RAW, Capability::CAP_BPF, Capability::CAP_IPC_LOCK]);
    }
    let held = caps::read(None, CapSet::Permitted).unwrap_or_default();
    let keep: CapsHashSet = keep.intersection(&held).copied().collect();
    let note = |what: &str, result: Result<(), String>| {
        if let Err(error) = result {
            tracing::warn!(what, error, "a privilege could not be given up");
        }
    };
    if let Ok(bounding) = caps::read(None, CapSet::Bounding)
        && held.contains(&Capability::CAP_SETPCAP)
    {
        for capability in bounding.difference(&keep) {
            let dropped = caps::drop(None, CapSet::Bounding, *capability);
            note("bounding set", dropped.map_err(|error| error.to_string()));
        }
    }
    let none = CapsHashSet::new();
    for (set, what, wanted) in [
        (CapSet::Inheritable, "inheritable set", &none),
        (CapSet::Effective, "effective set", &keep),
        (CapSet::Permitted, "permitted set", &keep),
    ] {
        note(what, caps::set(None, set, wanted).map_err(|error| error.to_string()));
    }
    note("new privileges", text(rustix::thread::set_no_new_privs(true)));
    // Keys must not reach a core dump, nor a debugger of the same user.
    note("dumps", text(set_dumpable_behavior(DumpableBehavior::NotDumpable)));
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    note("core files", text(setrlimit(Resource::Core, no_core)));
}

fn text(result: rustix::io::Result<()>) -> Result<(), String> {
    result.map_err(|error| error.to_string())
}
