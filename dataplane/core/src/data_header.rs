//! What stands before the ciphertext of a data message (WireGuard paper section 5.4.6):
//! type 4 as one byte and three zeros, receiver index, counter; all little-endian.

use crate::limits::{DATA_HEADER_LEN, KEEPALIVE_LEN};

pub const TYPE_DATA: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHeader {
    pub receiver_index: u32,
    pub counter: u64,
}

/// Why a datagram is no data message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotData {
    /// Too short for header and tag.
    Truncated,
    /// Another type of message, or none of WireGuard's.
    Type,
}

impl DataHeader {
    /// Reads the header of a whole datagram.
    pub fn parse(datagram: &[u8]) -> Result<Self, NotData> {
        let header: &[u8; DATA_HEADER_LEN] = datagram.first_chunk().ok_or(NotData::Truncated)?;
        let [t0, t1, t2, t3, i0, i1, i2, i3, counter @ ..] = *header;
        if u32::from_le_bytes([t0, t1, t2, t3]) != TYPE_DATA {
            return Err(NotData::Type);
        }
        if datagram.len() < KEEPALIVE_LEN {
            return Err(NotData::Truncated);
        }
        let receiver_index = u32::from_le_bytes([i0, i1, i2, i3]);
        Ok(Self { receiver_index, counter: u64::from_le_bytes(counter) })
    }

    pub fn to_bytes(self) -> [u8; DATA_HEADER_LEN] {
        let mut bytes = [0; DATA_HEADER_LEN];
        bytes[..4].copy_from_slice(&TYPE_DATA.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.receiver_index.to_le_bytes());
        bytes[8..].copy_from_slice(&self.counter.to_le_bytes());
        bytes
    }
}
