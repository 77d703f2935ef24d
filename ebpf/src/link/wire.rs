//! Fields of the link's messages.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::message::MessageError;
use super::{MESSAGE_LEN_MAX, PREFIXES_PER_MESSAGE, PublicKey};

/// Writes one message. Its memory never moves and is wiped: there may be a key in it.
pub(super) struct Writer(Zeroizing<Vec<u8>>);

impl Default for Writer {
    fn default() -> Self {
        Self(Zeroizing::new(Vec::with_capacity(MESSAGE_LEN_MAX)))
    }
}

impl Writer {
    pub(super) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// All zero for none, which is no public key.
    pub(super) fn key(&mut self, key: Option<PublicKey>) -> &mut Self {
        self.bytes(&key.map_or([0; 32], |key| key.0))
    }

    /// Cut at a character's edge where it is longer than `max` bytes.
    pub(super) fn text(&mut self, text: &str, max: usize) -> &mut Self {
        let text = &text[..text.floor_char_boundary(max)];
        self.u16(text.len() as u16).bytes(text.as_bytes())
    }

    /// Family, address, port, zone.
    pub(super) fn address(&mut self, address: Option<SocketAddr>) -> &mut Self {
        match address {
            None => self.u8(0),
            Some(SocketAddr::V4(v4)) => self.u8(4).bytes(&v4.ip().octets()).u16(v4.port()),
            Some(SocketAddr::V6(v6)) => {
                self.u8(6).bytes(&v6.ip().octets()).u16(v6.port()).u32(v6.scope_id())
            }
        }
    }

    /// Family, length, address of each.
    pub(super) fn prefixes(&mut self, nets: &[IpNet]) -> &mut Self {
        let nets = &nets[..nets.len().min(PREFIXES_PER_MESSAGE)];
        self.u8(nets.len() as u8);
        for net in nets {
            match net {
                IpNet::V4(v4) => {
                    self.u8(4).u8(v4.prefix_len()).bytes(&v4.network().octets());
                }
                IpNet::V6(v6) => {
                    self.u8(6).u8(v6.prefix_len()).bytes(&v6.network().octets());
                }
            }
        }
        self
    }

    pub(super) fn finish(self) -> Zeroizing<Vec<u8>> {
        debug_assert!(self.0.len() <= MESSAGE_LEN_MAX);
        self.0
    }
}

/// What is still to be read of a message.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(MessageError::Short)?;
        self.0 = rest;
        Ok(*array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, MessageError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, MessageError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, MessageError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn key(&mut self) -> Result<Option<PublicKey>, MessageError> {
        let key = self.array()?;
        Ok((key != [0; 32]).then_some(PublicKey(key)))
    }

    pub(super) fn text(&mut self, max: usize) -> Result<String, MessageError> {
        let text = std::str::from_utf8(self.sized(max)?);
        text.map(str::to_owned).map_err(|_| MessageError::Field { field: "text" })
    }

    /// Bytes after their number.
    pub(super) fn sized(&mut self, max: usize) -> Result<&'a [u8], MessageError> {
        let len = usize::from(self.u16()?);
        if len > max {
            return Err(MessageError::Field { field: "length" });
        }
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(MessageError::Short)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(super) fn address(&mut self) -> Result<Option<SocketAddr>, MessageError> {
        match self.u8()? {
            0 => Ok(None),
            4 => {
                let ip = IpAddr::from(self.array::<4>()?);
                Ok(Some(SocketAddr::new(ip, self.u16()?)))
            }
            6 => {
                let ip = std::net::Ipv6Addr::from(self.array::<16>()?);
                if ip.to_ipv4_mapped().is_some() {
                    return Err(MessageError::Field { field: "address" });
                }
                let (port, scope) = (self.u16()?, self.u32()?);
                Ok(Some(SocketAddrV6::new(ip, port, 0, scope).into()))
            }
            _ => Err(MessageError::Field { field: "address family" }),
        }
    }

    pub(super) fn prefixes(&mut self) -> Result<Vec<IpNet>, MessageError> {
        let count = usize::from(self.u8()?);
        if count > PREFIXES_PER_MESSAGE {
            return Err(MessageError::Field { field: "number of prefixes" });
        }
        (0..count).map(|_| self.prefix()).collect()
    }

    fn prefix(&mut self) -> Result<IpNet, MessageError> {
        let (family, length) = (self.u8()?, self.u8()?);
        let address = match family {
            4 => IpAddr::from(self.array::<4>()?),
            6 => IpAddr::from(self.array::<16>()?),
            _ => return Err(MessageError::Field { field: "prefix family" }),
        };
        let net = IpNet::new(address, length).ok().filter(|net| net.network() == address);
        net.ok_or(MessageError::Field { field: "prefix" })
    }

    /// `message`, if nothing is left.
    pub(super) fn finish<T>(self, message: T) -> Result<T, MessageError> {
        if self.0.is_empty() { Ok(message) } else { Err(MessageError::Long) }
    }
}
