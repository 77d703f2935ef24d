//! The TUN device: whole IP packets or super-packets, each behind a virtio-net header.
//!
//! Offloads are asked of the kernel here; whether they stay is [`crate::offload`]'s matter.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use millrace_config::Exit;
use millrace_wg::vnet::VnetHdr;

use crate::failure::{self, Failure};

/// A read returns at most a header and a packet of 64 KiB.
pub const READ_LEN: usize = VnetHdr::LEN + 65_535;

const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// Super-packets that the kernel may hand us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunOffloads {
    pub tso: bool,
    pub uso: bool,
}

/// One queue of a TUN device. The device vanishes with its last queue.
#[derive(Debug)]
pub struct TunQueue {
    file: File,
}

impl TunQueue {
    /// Makes the device `name` and opens `queues` queues of it (more than one: multi-queue).
    pub fn open(name: &str, queues: usize) -> Result<Vec<Self>, Failure> {
        let mut flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        } else {
            // Without it a second process could attach to our device and take its packets.
            flags |= libc::IFF_TUN_EXCL;
        }
        (0..queues).map(|_| Self::open_one(name, flags)).collect()
    }

    fn open_one(name: &str, flags: libc::c_int) -> Result<Self, Failure> {
        let path = "/dev/net/tun";
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(path).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Failure::new(
                Exit::NotSupported,
                format!("opening {path}: {error}"),
                "load the kernel's TUN driver: modprobe tun",
            ),
            _ => failure::of_io(&format!("opening {path}"), &error),
        })?;
        let mut request = interface_request(name)?;
        // Truncation is intended: the kernel's field is 16 bits and all flags fit.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is an open /dev/net/tun and `request` a whole ifreq that outlives
        // the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EBUSY | libc::EINVAL) => Failure::new(
                    Exit::Error,
                    format!("making the interface {name}: {error}"),
                    "an interface of that name exists: stop its owner or choose another name",
                ),
                _ => failure::of_io(&format!("making the interface {name}"), &error),
            });
        }
        Ok(Self { file })
    }

    /// Asks the kernel for super-packets. Checksums of locally sent packets are always left to us.
    pub fn set_offloads(&self, offloads: TunOffloads) -> io::Result<()> {
        let mut flags = TUN_F_CSUM;
        if offloads.tso {
            flags |= TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        }
        if offloads.uso {
            flags |= TUN_F_USO4 | TUN_F_USO6;
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        let done = unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags))
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// One packet with its vnet header into `to` ([`READ_LEN`] bytes); `WouldBlock` if there is none.
    pub fn read(&self, to: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.file, to)?)
    }

    /// Writes one packet given as slices, the first of which is the vnet header.
    pub fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        rustix::io::writev(&self.file, slices).map(drop).map_err(io::Error::from)
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn interface_request(name: &str) -> Result<libc::ifreq, Failure> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', ' ', '%']) {
        return Err(Failure::new(
            Exit::ConfigInvalid,
            format!("{name:?} is no interface name"),
            "use 1 to 15 characters without spaces, slashes and percent signs",
        ));
    }
    // SAFETY: an ifreq of zero bytes is valid: a name, and a union of plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, &from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}
