//! What can go wrong with programs and maps: what was seen, what was expected, what to do.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error(
        "{action} was not permitted; it needs CAP_BPF and CAP_NET_ADMIN: start as root, or give \
         the unit these capabilities"
    )]
    NotPermitted { action: &'static str, source: io::Error },

    #[error("the kernel did not take the eBPF object: {0}")]
    Object(#[source] Box<aya::EbpfError>),

    #[error("the kernel did not take the program {program}: {source}")]
    Program { program: &'static str, source: Box<aya::programs::ProgramError> },

    #[error("the eBPF object has no {name}; it and the loader are of different builds")]
    Missing { name: &'static str },

    #[error("map {map}: {action} failed: {source}")]
    Map { map: &'static str, action: &'static str, source: io::Error },

    #[error("map {map}: slot {slot} was asked for, it has {slots}")]
    SlotOutOfRange { map: &'static str, slot: u32, slots: u32 },

    #[error("map {map} has {field} {seen}, this build expects {expected}{}", cure_of(.path))]
    MapMismatch {
        map: &'static str,
        path: Option<PathBuf>,
        field: &'static str,
        seen: u32,
        expected: u32,
    },

    #[error(
        "the maps have ABI {field} {seen:#x}, this build expects {expected:#x}; the processes are \
         of different versions: install the same version of both and restart them"
    )]
    Abi { field: &'static str, seen: u32, expected: u32 },

    #[error(
        "interface {interface} already runs the XDP program {program}; it is left alone. Stop the \
         service that put it there (`bpftool link` shows its process), or detach it (`ip link set \
         dev {interface} xdp off`), or set receive = \"socket\""
    )]
    Occupied { interface: String, program: OtherProgram },

    #[error(
        "the driver of interface {interface} has no native XDP, and generic XDP is never used; set \
         receive = \"socket\""
    )]
    NoNativeXdp { interface: String },

    #[error(
        "the driver of interface {interface} refused the XDP program ({source}); usually its MTU \
         ({mtu}) is too large for XDP, or LRO or too many queues are on: change that or set receive \
         = \"socket\""
    )]
    DriverRefused { interface: String, mtu: u32, source: io::Error },

    #[error("there is no interface with index {ifindex} here; was it removed?")]
    NoInterface { ifindex: u32 },

    #[error("attaching to interface {interface} failed: {source}")]
    Attach { interface: String, source: io::Error },

    #[error("the kernel gave no random number: {source}")]
    Random { source: io::Error },

    #[error("the kernel does not tell how often its timer ticks: {source}")]
    Jiffy { source: io::Error },

    #[error("steering failed: {source}; is SO_REUSEPORT set on the socket before bind?")]
    Steer { source: io::Error },
}

impl LoadError {
    pub(crate) fn map(
        map: &'static str,
        action: &'static str,
    ) -> impl FnOnce(io::Error) -> LoadError {
        move |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => LoadError::NotPermitted { action, source },
            _ => LoadError::Map { map, action, source },
        }
    }
}

/// Who holds an interface's XDP hook, as far as the kernel tells: names only with CAP_SYS_ADMIN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherProgram {
    pub id: Option<u32>,
    pub name: Option<String>,
}

impl std::fmt::Display for OtherProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.name, self.id) {
            (Some(name), Some(id)) => write!(f, "{name} (id {id})"),
            (None, Some(id)) => write!(f, "with id {id} (`bpftool prog show id {id}` names it)"),
            (_, None) => f.write_str("of another process"),
        }
    }
}

fn cure_of(path: &Option<PathBuf>) -> String {
    match path {
        Some(path) => format!(
            "; it is of another version: stop what uses {} and remove that file",
            path.display()
        ),
        None => "; install the same version of both processes and restart them".to_owned(),
    }
}
