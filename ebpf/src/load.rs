//! Loads both programs with their maps, attaches XDP and steers a reuseport group.
//!
//! XDP is attached natively only, by a link that lives as long as an fd of this process: when the
//! process dies, by whatever cause, the interface is as before. Nothing is pinned.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::maps::{Map, MapData};
use aya::programs::{ProgramError, SkReuseport, Xdp};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use zerocopy::IntoBytes;

use crate::abi::{
    Abi, Endpoint, HANDSHAKE_BURST, HANDSHAKE_INTERVAL_NS, HANDSHAKE_TICK_SHIFT, Observed,
    PEERS_MAX_DEFAULT, SESSIONS_MAX_DEFAULT, WORKERS_MAX,
};
use crate::error::LoadError;
use crate::maps::{FlagWords, LineReader, LineWriter, StatsLines};
use crate::shared_fds::SharedFds;
use crate::spec::{MapSpec, Specs};
use crate::sys;
use crate::tables::{Drops, LocalAddresses, Passed, Sessions, Sockets, Xsks};
use crate::xdp_owner;

/// The object that was built from `bpf/programs.bpf.c`.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.bpf.o"));

/// Bounds the table to 256 MiB.
const SESSIONS_MAX_LIMIT: u32 = 1 << 24;

/// Half of what a tick count holds, so that the past can be told from the future; 39 hours.
const BUCKET_TICKS_MAX: u64 = 1 << 31;

const XDP: &str = "millrace_xdp";
const REUSEPORT: &str = "millrace_reuseport";

/// What is fixed when the programs are verified.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// The UDP port, host order. Only packets to it are looked at.
    pub port: u16,
    /// Workers that have sockets, 1..=[`WORKERS_MAX`]: worthless packets are spread over them.
    pub workers: u32,
    /// Lines of ENDPOINTS and OBSERVED.
    pub peers_max: u32,
    /// Places of SESSIONS, rounded up to a power of two. Not smaller than the data plane's own
    /// table, or two live indices could meet in one place.
    pub sessions_max: u32,
    /// Each IPv4 /32 and IPv6 /64 may send one handshake in this time, on average. Rounded up to
    /// 66 µs; together with the burst at most 39 hours.
    pub handshake_interval_ns: u64,
    /// And so many at once.
    pub handshake_burst: u64,
}

impl LoadOptions {
    pub fn new(port: u16) -> Self {
        Self {
            port,
            workers: 1,
            peers_max: PEERS_MAX_DEFAULT,
            sessions_max: SESSIONS_MAX_DEFAULT,
            handshake_interval_ns: HANDSHAKE_INTERVAL_NS,
            handshake_burst: HANDSHAKE_BURST,
        }
    }
}

impl LoadOptions {
    /// Ticks that a handshake takes out of its bucket and that the bucket holds.
    fn bucket(&self) -> (u32, u32) {
        let ticks = self.handshake_interval_ns.div_ceil(1 << HANDSHAKE_TICK_SHIFT);
        let burst = self.handshake_burst.max(1);
        let ticks = ticks.min(BUCKET_TICKS_MAX / burst);
        // Both fit: the first is no larger than the second.
        (ticks as u32, (ticks * burst) as u32)
    }
}

/// Both programs, verified by the kernel, and their maps. The maps work without XDP attached.
#[derive(Debug)]
pub struct Programs {
    pub sessions: Sessions,
    pub sockets: Sockets,
    pub xsks: Xsks,
    pub drops: Drops,
    pub passed: Passed,
    pub flags: FlagWords,
    pub stats: StatsLines,
    specs: Specs,
    local_addresses: LocalAddresses,
    abi: OwnedFd,
    endpoints: OwnedFd,
    observed: OwnedFd,
    stats_fd: OwnedFd,
    drops_fd: OwnedFd,
    ebpf: Ebpf,
}

impl Programs {
    pub fn load(options: LoadOptions) -> Result<Self, LoadError> {
        let port = options.port.to_be();
        let workers = options.workers.clamp(1, WORKERS_MAX);
        let peers_max = options.peers_max.max(1);
        let sessions_max = options.sessions_max.clamp(1, SESSIONS_MAX_LIMIT).next_power_of_two();
        let session_mask = sessions_max - 1;
        let (handshake_ticks, bucket_ticks) = options.bucket();
        let jiffy_ns = sys::jiffy_ns().map_err(|source| LoadError::Jiffy { source })?;
        let handshake_hash = sys::random_u64().map_err(|source| LoadError::Random { source })? | 1;
        let mut ebpf = EbpfLoader::new()
            // The programs take no CO-RE relocation, so the kernel's own BTF is of no use.
            .btf(None)
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global("own_port", &port, true)
            .override_global("workers", &workers, true)
            .override_global("session_mask", &session_mask, true)
            .override_global("handshake_ticks", &handshake_ticks, true)
            .override_global("bucket_ticks", &bucket_ticks, true)
            .override_global("jiffy_ns", &jiffy_ns, true)
            .override_global("handshake_hash", &handshake_hash, true)
            .map_max_entries("ENDPOINTS", peers_max)
            .map_max_entries("OBSERVED", peers_max)
            .map_max_entries("SESSIONS", sessions_max)
            .load(OBJECT)
            .map_err(object_error)?;
        load_program::<Xdp>(&mut ebpf, XDP, Xdp::load)?;
        load_program::<SkReuseport>(&mut ebpf, REUSEPORT, SkReuseport::load)?;

        let specs = Specs { peers_max, sessions_max };
        let abi = take_map(&mut ebpf, &Specs::ABI)?;
        let header = Abi::new(peers_max, sessions_max);
        sys::map_update(abi.as_fd(), 0u32.as_bytes(), header.as_bytes())
            .map_err(LoadError::map("ABI", "writing the header"))?;
        let stats_fd = take_map(&mut ebpf, &Specs::STATS)?;
        let drops_fd = take_map(&mut ebpf, &Specs::DROPS)?;
        let drops_map = drops_fd.try_clone().map_err(LoadError::map("DROPS", "copying its fd"))?;
        Ok(Self {
            sessions: Sessions::new(take_map(&mut ebpf, &specs.sessions())?, sessions_max),
            sockets: Sockets(take_map(&mut ebpf, &Specs::SOCKETS)?),
            xsks: Xsks(take_map(&mut ebpf, &Specs::XSKS)?),
            drops: Drops::new(drops_map)?,
            passed: Passed::new(take_map(&mut ebpf, &Specs::PASSED)?)?,
            flags: FlagWords::new(take_map(&mut ebpf, &Specs::FLAGS)?.as_fd())?,
            stats: StatsLines::writable(stats_fd.as_fd())?,
            local_addresses: LocalAddresses::new(
                take_map(&mut ebpf, &Specs::LOCAL_ADDRESSES)?,
                take_map(&mut ebpf, &Specs::NEAR_ADDRESSES)?,
            ),
            endpoints: take_map(&mut ebpf, &specs.endpoints())?,
            observed: take_map(&mut ebpf, &specs.observed())?,
            specs,
            abi,
            stats_fd,
            drops_fd,
            ebpf,
        })
    }

    /// Attaches the XDP program to an interface, in native mode. Detached when the returned value
    /// is dropped. The rings in `xsks` belong to one interface, so attach to one only.
    pub fn attach_xdp(&self, ifindex: u32) -> Result<XdpAttachment, LoadError> {
        let program = self.xdp()?.fd().map_err(program_error(XDP))?;
        match sys::link_xdp(program.as_fd(), ifindex) {
            Ok(link) => Ok(XdpAttachment { ifindex, _link: link }),
            Err(error) => Err(attach_error(ifindex, error)),
        }
    }

    /// Lets the reuseport program choose among the sockets of `socket`'s group, for as long as the
    /// group has sockets. Once per family is enough; enter the sockets in `sockets` first.
    pub fn steer(&self, socket: BorrowedFd<'_>) -> Result<(), LoadError> {
        let program = self.ebpf.program(REUSEPORT).ok_or(LoadError::Missing { name: REUSEPORT })?;
        let program = <&SkReuseport>::try_from(program).map_err(program_error(REUSEPORT))?;
        program.attach(socket).map_err(|error| LoadError::Steer { source: io_error(error) })
    }

    /// Tells XDP the addresses of this host: from then on packets to others, which the host only
    /// forwards, are left alone. The first [`crate::abi::NEAR_ADDRESSES_MAX`] cost least; name
    /// those first that most packets go to. An empty list means any address.
    pub fn set_local_addresses(&self, addresses: &[IpAddr]) -> Result<(), LoadError> {
        // While the set shrinks to nothing, the old rule holds no longer: first lift it.
        if addresses.is_empty() {
            self.flags.set_local_addresses(false);
        }
        self.local_addresses.replace(addresses)?;
        self.flags.set_local_addresses(!addresses.is_empty());
        Ok(())
    }

    /// ENDPOINTS, which control writes.
    pub fn endpoints(&self) -> Result<LineReader<Endpoint>, LoadError> {
        LineReader::<Endpoint>::endpoints(self.endpoints.as_fd(), &self.specs)
    }

    /// ENDPOINTS for writing. Control is the one writer; while there is none, the data plane may be.
    pub fn endpoints_writer(&self) -> Result<LineWriter<Endpoint>, LoadError> {
        LineWriter::<Endpoint>::endpoints(self.endpoints.as_fd(), &self.specs)
    }

    /// OBSERVED. Keep one writer.
    pub fn observed(&self) -> Result<LineWriter<Observed>, LoadError> {
        LineWriter::<Observed>::observed(self.observed.as_fd(), &self.specs)
    }

    /// The fds that control needs, to be sent over a unix socket; it opens them by
    /// [`crate::spec::read_abi`] and the constructors in [`crate::maps`].
    pub fn shared_fds(&self) -> SharedFds<'_> {
        SharedFds {
            abi: self.abi.as_fd(),
            endpoints: self.endpoints.as_fd(),
            observed: self.observed.as_fd(),
            stats: self.stats_fd.as_fd(),
            drops: self.drops_fd.as_fd(),
        }
    }

    /// The XDP program itself, for test runs.
    pub fn xdp(&self) -> Result<&Xdp, LoadError> {
        let program = self.ebpf.program(XDP).ok_or(LoadError::Missing { name: XDP })?;
        program.try_into().map_err(program_error(XDP))
    }
}

/// An attached XDP program; dropping it detaches.
#[derive(Debug)]
pub struct XdpAttachment {
    pub ifindex: u32,
    _link: OwnedFd,
}

fn load_program<'a, P>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
    load: impl FnOnce(&mut P) -> Result<(), ProgramError>,
) -> Result<(), LoadError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
    P: 'a,
{
    let program = ebpf.program_mut(name).ok_or(LoadError::Missing { name })?;
    program.try_into().and_then(load).map_err(program_error(name))
}

/// Takes the map out of aya's hands and checks that the kernel made what the spec says.
fn take_map(ebpf: &mut Ebpf, spec: &MapSpec) -> Result<OwnedFd, LoadError> {
    let map = ebpf.take_map(spec.name).ok_or(LoadError::Missing { name: spec.name })?;
    let fd = map_data(&map)
        .ok_or(LoadError::Missing { name: spec.name })?
        .fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(LoadError::map(spec.name, "copying its fd"))?;
    spec.check(fd.as_fd())?;
    Ok(fd)
}

fn map_data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::ReusePortSockArray(data)
        | Map::XskMap(data) => Some(data),
        _ => None,
    }
}

fn attach_error(ifindex: u32, error: io::Error) -> LoadError {
    // The kernel says EINVAL for a missing interface, and for much else.
    let Some(facts) = xdp_owner::interface(ifindex) else {
        return LoadError::NoInterface { ifindex };
    };
    let interface = facts.name.clone().unwrap_or_else(|| format!("with index {ifindex}"));
    match error.raw_os_error() {
        // EEXIST: somebody's generic program. Both modes at once are impossible.
        Some(libc::EBUSY | libc::EEXIST) => {
            LoadError::Occupied { interface, program: facts.other_program() }
        }
        Some(libc::EOPNOTSUPP) => LoadError::NoNativeXdp { interface },
        Some(libc::EPERM | libc::EACCES) => {
            LoadError::NotPermitted { action: "attaching XDP", source: error }
        }
        Some(libc::EINVAL | libc::ERANGE) => {
            LoadError::DriverRefused { interface, mtu: facts.mtu, source: error }
        }
        _ => LoadError::Attach { interface, source: error },
    }
}

fn object_error(error: EbpfError) -> LoadError {
    let source = match &error {
        EbpfError::MapError(aya::maps::MapError::CreateError { io_error, .. }) => {
            io_error.raw_os_error()
        }
        _ => None,
    };
    match source {
        Some(code @ (libc::EPERM | libc::EACCES)) => LoadError::NotPermitted {
            action: "creating eBPF maps",
            source: io::Error::from_raw_os_error(code),
        },
        _ => LoadError::Object(Box::new(error)),
    }
}

fn program_error(program: &'static str) -> impl FnOnce(ProgramError) -> LoadError {
    move |source| match &source {
        ProgramError::LoadError { io_error, verifier_log }
            if io_error.raw_os_error() == Some(libc::EPERM)
                && verifier_log.to_string().is_empty() =>
        {
            LoadError::NotPermitted {
                action: "loading an eBPF program",
                source: io::Error::from_raw_os_error(libc::EPERM),
            }
        }
        _ => LoadError::Program { program, source: Box::new(source) },
    }
}

fn io_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::SyscallError(error) => error.io_error,
        ProgramError::SkReuseportError(
            aya::programs::sk_reuseport::SkReuseportError::SetsockoptError { io_error, .. },
        ) => io_error,
        error => io::Error::other(error),
    }
}
