//! What a driver says about itself (ioctl SIOCETHTOOL, `linux/ethtool.h`). Unlike /sys it follows
//! the thread's namespace.

use std::io;
use std::os::fd::AsRawFd;

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const GET_DRIVER: u32 = 0x03;
const GET_CHANNELS: u32 = 0x3c;

/// `struct ethtool_drvinfo`: the driver's name stands first.
#[repr(C)]
struct Driver {
    command: u32,
    name: [u8; 32],
    rest: [u8; 160],
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    max: [u32; 4],
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

const _: () = assert!(size_of::<Driver>() == 196);

/// Name of the driver; empty if it does not tell.
pub fn driver(interface: &str) -> String {
    let mut driver = Driver { command: GET_DRIVER, name: [0; 32], rest: [0; 160] };
    if ask(interface, &mut driver).is_err() {
        return String::new();
    }
    let len = driver.name.iter().position(|&byte| byte == 0).unwrap_or(driver.name.len());
    String::from_utf8_lossy(&driver.name[..len]).into_owned()
}

/// Receive queues in use now, at least one. Drivers add some when XDP is attached, so ask again.
pub fn receive_queues(interface: &str) -> u32 {
    let mut channels = Channels { command: GET_CHANNELS, ..Channels::default() };
    match ask(interface, &mut channels) {
        Ok(()) => channels.rx.saturating_add(channels.combined).max(1),
        Err(_) => 1,
    }
}

/// `request` is one of the structures above, its command set.
fn ask<T: Request>(interface: &str, request: &mut T) -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
    // SAFETY: zero bytes are a valid ifreq.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= ifreq.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = std::ptr::from_mut(request).cast();
    // SAFETY: the ifreq names a terminated interface and points to a structure of the size that
    // its command writes; both outlive the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut ifreq) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A structure that begins with its command.
trait Request {}
impl Request for Driver {}
impl Request for Channels {}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_lab::{Lab, lab};

    #[test]
    fn a_veth_tells_driver_and_queues() {
        let lab = Lab::new().unwrap();
        let (a, b) = (lab.namespace("a").unwrap(), lab.namespace("b").unwrap());
        lab::link((&a, "veth0"), (&b, "veth1")).unwrap();
        a.ip(["link add veth2 numtxqueues 3 numrxqueues 3 type veth peer name veth3"]).unwrap();
        a.run(|| {
            assert_eq!((driver("veth0"), receive_queues("veth0")), ("veth".into(), 1));
            assert_eq!(receive_queues("veth2"), 3);
            assert_eq!((driver("no-such"), receive_queues("no-such")), (String::new(), 1));
        });
    }
}
