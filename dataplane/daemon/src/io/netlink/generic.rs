//! What generic netlink says of a device's driver.

use netlink_packet_core::NLM_F_REQUEST;
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

const GENL_ID_CTRL: u16 = 16;
const GENL_HEADERS_LEN: usize = 20;
/// `NETDEV_XDP_ACT_XSK_ZEROCOPY` of `linux/netdev.h`.
const XDP_FEATURE_ZEROCOPY: u64 = 1 << 3;

/// Whether the driver says that it can do AF_XDP zero-copy (netdev family of generic netlink, Linux
/// 6.3). Asking changes nothing; a yes is no promise. None: this kernel does not tell.
pub fn offers_zero_copy(ifindex: u32) -> Option<bool> {
    const GETFAMILY: u8 = 3;
    const FAMILY_NAME: u16 = 2;
    const FAMILY_ID: u16 = 1;
    const DEV_GET: u8 = 1;
    const IFINDEX: u16 = 1;
    const XDP_FEATURES: u16 = 3;
    let mut socket = Socket::new(NETLINK_GENERIC).ok()?;
    socket.bind_auto().ok()?;
    let answer = ask_generic(&socket, GENL_ID_CTRL, GETFAMILY, FAMILY_NAME, b"netdev\0")?;
    let family = u16::from_ne_bytes(*attribute(&answer, FAMILY_ID)?.first_chunk()?);
    let answer = ask_generic(&socket, family, DEV_GET, IFINDEX, &ifindex.to_ne_bytes())?;
    let features = u64::from_ne_bytes(*attribute(&answer, XDP_FEATURES)?.first_chunk()?);
    Some(features & XDP_FEATURE_ZEROCOPY != 0)
}

/// One request with one attribute; the answer's attributes.
fn ask_generic(
    socket: &Socket,
    family: u16,
    command: u8,
    attribute: u16,
    value: &[u8],
) -> Option<Vec<u8>> {
    let mut bytes = vec![0; GENL_HEADERS_LEN];
    bytes[4..6].copy_from_slice(&family.to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    (bytes[16], bytes[17]) = (command, 1);
    bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&attribute.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).ok()?;
    let (answer, _) = socket.recv_from_full().ok()?;
    let is_answer = answer.get(4..6)? == family.to_ne_bytes();
    is_answer.then(|| answer.get(GENL_HEADERS_LEN..).map(<[u8]>::to_vec))?
}

/// The value of the first attribute of `kind`.
fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let header = bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = bytes.get(4..len)?;
        if u16::from_ne_bytes([header[2], header[3]]) & 0x3fff == kind {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}
