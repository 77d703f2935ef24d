//! What every STUN message is made of: a header and attributes, the last of which may prove that
//! the others arrived as they were sent.

use arrayvec::ArrayVec;

use super::StunError;
use crate::transaction::TransactionId;

/// Bytes of the header: type, length, cookie, transaction.
pub(super) const HEADER_LEN: usize = 20;
/// Bytes before each attribute's value: type, length.
pub(super) const ATTRIBUTE_HEADER_LEN: usize = 4;
pub(super) const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// XORed to the CRC so that it differs from the CRC of an enclosing protocol: "STUN".
const FINGERPRINT_XOR: u32 = 0x5354_554e;
/// Message types: method 1 (binding) and class (RFC 8489, section 5).
pub(super) mod message_type {
    pub(in crate::stun) const REQUEST: u16 = 0x0001;
    pub(in crate::stun) const SUCCESS: u16 = 0x0101;
    pub(in crate::stun) const ERROR: u16 = 0x0111;
}

/// Attribute types (RFC 8489, section 18.3, and those of RFC 3489 that servers still send).
pub(super) mod attribute_type {
    pub(in crate::stun) const MAPPED_ADDRESS: u16 = 0x0001;
    /// RFC 5780, section 7.2.
    pub(in crate::stun) const CHANGE_REQUEST: u16 = 0x0003;
    pub(in crate::stun) const SOURCE_ADDRESS: u16 = 0x0004;
    pub(in crate::stun) const CHANGED_ADDRESS: u16 = 0x0005;
    pub(in crate::stun) const USERNAME: u16 = 0x0006;
    pub(in crate::stun) const MESSAGE_INTEGRITY: u16 = 0x0008;
    pub(in crate::stun) const ERROR_CODE: u16 = 0x0009;
    pub(in crate::stun) const UNKNOWN_ATTRIBUTES: u16 = 0x000a;
    pub(in crate::stun) const REALM: u16 = 0x0014;
    pub(in crate::stun) const NONCE: u16 = 0x0015;
    pub(in crate::stun) const MESSAGE_INTEGRITY_SHA256: u16 = 0x001c;
    pub(in crate::stun) const PASSWORD_ALGORITHM: u16 = 0x001d;
    pub(in crate::stun) const USERHASH: u16 = 0x001e;
    pub(in crate::stun) const XOR_MAPPED_ADDRESS: u16 = 0x0020;
    /// RFC 5780, section 7.5.
    pub(in crate::stun) const RESPONSE_PORT: u16 = 0x0027;
    /// XOR-MAPPED-ADDRESS of drafts before RFC 5389, which some servers still send.
    pub(in crate::stun) const XOR_MAPPED_ADDRESS_DRAFT: u16 = 0x8020;
    pub(in crate::stun) const SOFTWARE: u16 = 0x8022;
    pub(in crate::stun) const FINGERPRINT: u16 = 0x8028;
    /// RFC 5780, section 7.3.
    pub(in crate::stun) const RESPONSE_ORIGIN: u16 = 0x802b;
    /// RFC 5780, section 7.4.
    pub(in crate::stun) const OTHER_ADDRESS: u16 = 0x802c;
    /// Types below this must be understood by who receives them.
    pub(in crate::stun) const OPTIONAL: u16 = 0x8000;
}

/// The transaction of a request; none of anything else.
pub fn transaction_of_request(datagram: &[u8]) -> Option<TransactionId> {
    transaction_of(datagram, message_type::REQUEST)
}

/// The transaction of an error; none of anything else.
pub fn transaction_of_error(datagram: &[u8]) -> Option<TransactionId> {
    transaction_of(datagram, message_type::ERROR)
}

/// One checked header and the bytes after it.
pub(super) struct Message<'d> {
    pub(super) message_type: u16,
    pub(super) transaction: TransactionId,
    datagram: &'d [u8],
}

impl<'d> Message<'d> {
    pub(super) fn parse(datagram: &'d [u8]) -> Result<Self, StunError> {
        let short = StunError::Short { seen: datagram.len() };
        let (header, body) = datagram.split_first_chunk::<HEADER_LEN>().ok_or(short)?;
        let [type_0, type_1, length_0, length_1, rest @ ..] = header;
        let (cookie, transaction) = rest.split_first_chunk::<4>().ok_or(short)?;
        if *cookie != COOKIE {
            return Err(StunError::Cookie);
        }
        let announced = usize::from(u16::from_be_bytes([*length_0, *length_1]));
        if announced != body.len() || announced % 4 != 0 {
            return Err(StunError::Length { announced, seen: body.len() });
        }
        let transaction = TransactionId(transaction.try_into().map_err(|_| short)?);
        let message_type = u16::from_be_bytes([*type_0, *type_1]);
        Ok(Self { message_type, transaction, datagram })
    }

    /// Each attribute in turn, the fingerprint checked and left out; ends at the first error.
    pub(super) fn attributes(&self) -> Attributes<'d> {
        Attributes { datagram: self.datagram, at: HEADER_LEN }
    }

    /// 300 to 699, or 0 where the answer does not say.
    pub(super) fn error_code(&self) -> u16 {
        let found = self.attributes().find_map(|attribute| match attribute.ok()? {
            Attribute { kind: attribute_type::ERROR_CODE, value: [_, _, class, number, ..] } => {
                Some(u16::from(class & 7) * 100 + u16::from(*number))
            }
            _ => None,
        });
        found.unwrap_or(0)
    }
}

pub(super) struct Attribute<'d> {
    pub(super) kind: u16,
    pub(super) value: &'d [u8],
}

pub(super) struct Attributes<'d> {
    datagram: &'d [u8],
    at: usize,
}

impl<'d> Iterator for Attributes<'d> {
    type Item = Result<Attribute<'d>, StunError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (before, rest) = self.datagram.split_at_checked(self.at)?;
        // Never a remainder of 1 to 3 bytes: the length is a multiple of four, and so is each step.
        let ([kind_0, kind_1, length_0, length_1], rest) = rest.split_first_chunk()?;
        let kind = u16::from_be_bytes([*kind_0, *kind_1]);
        let length = usize::from(u16::from_be_bytes([*length_0, *length_1]));
        self.at += ATTRIBUTE_HEADER_LEN + length.next_multiple_of(4);
        let Some(value) = rest.get(..length) else {
            return Some(Err(StunError::Attribute { attribute: kind }));
        };
        if kind != attribute_type::FINGERPRINT {
            return Some(Ok(Attribute { kind, value }));
        }
        if self.at != self.datagram.len() {
            self.at = self.datagram.len();
            return Some(Err(StunError::Attribute { attribute: kind }));
        }
        if value != fingerprint(before).to_be_bytes() {
            return Some(Err(StunError::Fingerprint));
        }
        None
    }
}

/// Whether a message with this attribute is void for somebody who, as we do, knows only some. The
/// credentials of RFC 8489 are known and not looked at: checking them costs more than answering.
pub(super) fn must_be_understood(kind: u16) -> bool {
    use attribute_type as t;
    let known = matches!(
        kind,
        t::MAPPED_ADDRESS
            | t::SOURCE_ADDRESS
            | t::CHANGED_ADDRESS
            | t::USERNAME
            | t::MESSAGE_INTEGRITY
            | t::REALM
            | t::NONCE
            | t::MESSAGE_INTEGRITY_SHA256
            | t::PASSWORD_ALGORITHM
            | t::USERHASH
            | t::XOR_MAPPED_ADDRESS
    );
    kind < attribute_type::OPTIONAL && !known
}

/// CRC-32 of everything before the FINGERPRINT attribute (RFC 8489, section 14.7). The header's
/// length already counts the attribute.
pub(super) fn fingerprint(before: &[u8]) -> u32 {
    crc32fast::hash(before) ^ FINGERPRINT_XOR
}

/// `len` is that of the whole message.
pub(super) fn push_header<const CAP: usize>(
    message: &mut ArrayVec<u8, CAP>,
    message_type: u16,
    transaction: TransactionId,
    len: usize,
) {
    message.extend(message_type.to_be_bytes());
    // At most ANSWER_LEN_MAX.
    message.extend(((len - HEADER_LEN) as u16).to_be_bytes());
    message.extend(COOKIE);
    message.extend(transaction.0);
}

pub(super) fn push_attribute<const CAP: usize>(
    message: &mut ArrayVec<u8, CAP>,
    kind: u16,
    value: &[u8],
) {
    message.extend(kind.to_be_bytes());
    message.extend((value.len() as u16).to_be_bytes());
    message.extend(value.iter().copied());
    while !message.len().is_multiple_of(4) {
        message.push(0);
    }
}

fn transaction_of(datagram: &[u8], message_type: u16) -> Option<TransactionId> {
    let message = Message::parse(datagram).ok()?;
    (message.message_type == message_type).then_some(message.transaction)
}
