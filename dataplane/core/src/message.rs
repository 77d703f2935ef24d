//! Handshake messages as they are on the wire (WireGuard paper, sections 5.4.2 to 5.4.7). The type
//! is one byte and three zeros, read together; integers are little-endian.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::data_header::TYPE_DATA;
use crate::limits::{COOKIE_REPLY_LEN, INITIATION_LEN, RESPONSE_LEN};

pub const TYPE_INITIATION: u32 = 1;
pub const TYPE_RESPONSE: u32 = 2;
pub const TYPE_COOKIE_REPLY: u32 = 3;

/// Bytes of `mac1` and `mac2` each; they are the last 32 of an initiation or a response.
pub const MAC_LEN: usize = 16;
/// What Noise makes of an initiation: ephemeral, sealed static, sealed timestamp.
pub const INITIATION_BODY_LEN: usize = 32 + 48 + 28;
/// What Noise makes of a response: ephemeral, sealed nothing.
pub const RESPONSE_BODY_LEN: usize = 32 + 16;

#[derive(Clone, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Initiation {
    pub kind: U32,
    pub sender_index: U32,
    pub body: [u8; INITIATION_BODY_LEN],
    pub mac1: [u8; MAC_LEN],
    pub mac2: [u8; MAC_LEN],
}

#[derive(Clone, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Response {
    pub kind: U32,
    pub sender_index: U32,
    pub receiver_index: U32,
    pub body: [u8; RESPONSE_BODY_LEN],
    pub mac1: [u8; MAC_LEN],
    pub mac2: [u8; MAC_LEN],
}

#[derive(Clone, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CookieReply {
    pub kind: U32,
    pub receiver_index: U32,
    pub nonce: [u8; 24],
    /// The cookie and its tag.
    pub sealed: [u8; 32],
}

/// A datagram that has the length of its type.
pub enum Message<'a> {
    Initiation(&'a Initiation),
    Response(&'a Response),
    CookieReply(&'a CookieReply),
    /// Belongs to the fast half.
    Data,
}

/// Why a datagram is no [`Message`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotMessage {
    Length,
    Type,
}

impl<'a> Message<'a> {
    pub fn parse(datagram: &'a [u8]) -> Result<Self, NotMessage> {
        let kind = datagram.first_chunk().ok_or(NotMessage::Length)?;
        match u32::from_le_bytes(*kind) {
            TYPE_INITIATION => Initiation::ref_from_bytes(datagram).map(Message::Initiation).ok(),
            TYPE_RESPONSE => Response::ref_from_bytes(datagram).map(Message::Response).ok(),
            TYPE_COOKIE_REPLY => {
                CookieReply::ref_from_bytes(datagram).map(Message::CookieReply).ok()
            }
            TYPE_DATA => Some(Message::Data),
            _ => return Err(NotMessage::Type),
        }
        .ok_or(NotMessage::Length)
    }
}

const _: () = assert!(size_of::<Initiation>() == INITIATION_LEN);
const _: () = assert!(size_of::<Response>() == RESPONSE_LEN);
const _: () = assert!(size_of::<CookieReply>() == COOKIE_REPLY_LEN);
