//! STUN (RFC 8489) as far as finding our own address needs it: binding requests and their answers.
//!
//! Our requests have the one form that a stock derper answers: 40 bytes, SOFTWARE first, FINGERPRINT
//! last. Our server answers every well-formed binding request, also the bare header. What RFC 5780
//! adds is asked for and read, where a server offers it: answers from elsewhere show what a NAT
//! filters.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use arrayvec::ArrayVec;

use crate::transaction::TransactionId;

/// Bytes of our binding request.
pub const REQUEST_LEN: usize = 40;
/// Bytes of the longest answer: the header and an IPv6 address.
pub const ANSWER_LEN_MAX: usize = 44;

/// Bytes of the header: type, length, cookie, transaction.
const HEADER_LEN: usize = 20;
/// Bytes before each attribute's value: type, length.
const ATTRIBUTE_HEADER_LEN: usize = 4;
const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
/// What derper asks a request to name (tailscale, net/stun/stun.go).
const SOFTWARE: [u8; 8] = *b"tailnode";
/// XORed to the CRC so that it differs from the CRC of an enclosing protocol: "STUN".
const FINGERPRINT_XOR: u32 = 0x5354_554e;
/// Attributes that a 420 answer lists: as many as fit into [`ANSWER_LEN_MAX`].
const UNKNOWN_LISTED_MAX: usize = 6;

/// Message types: method 1 (binding) and class (RFC 8489, section 5).
mod message_type {
    pub(super) const REQUEST: u16 = 0x0001;
    pub(super) const SUCCESS: u16 = 0x0101;
    pub(super) const ERROR: u16 = 0x0111;
}

/// Attribute types (RFC 8489, section 18.3, and those of RFC 3489 that servers still send).
mod attribute_type {
    pub(super) const MAPPED_ADDRESS: u16 = 0x0001;
    /// RFC 5780, section 7.2.
    pub(super) const CHANGE_REQUEST: u16 = 0x0003;
    pub(super) const SOURCE_ADDRESS: u16 = 0x0004;
    pub(super) const CHANGED_ADDRESS: u16 = 0x0005;
    pub(super) const USERNAME: u16 = 0x0006;
    pub(super) const MESSAGE_INTEGRITY: u16 = 0x0008;
    pub(super) const ERROR_CODE: u16 = 0x0009;
    pub(super) const UNKNOWN_ATTRIBUTES: u16 = 0x000a;
    pub(super) const REALM: u16 = 0x0014;
    pub(super) const NONCE: u16 = 0x0015;
    pub(super) const MESSAGE_INTEGRITY_SHA256: u16 = 0x001c;
    pub(super) const PASSWORD_ALGORITHM: u16 = 0x001d;
    pub(super) const USERHASH: u16 = 0x001e;
    pub(super) const XOR_MAPPED_ADDRESS: u16 = 0x0020;
    /// RFC 5780, section 7.5.
    pub(super) const RESPONSE_PORT: u16 = 0x0027;
    /// XOR-MAPPED-ADDRESS of drafts before RFC 5389, which some servers still send.
    pub(super) const XOR_MAPPED_ADDRESS_DRAFT: u16 = 0x8020;
    pub(super) const SOFTWARE: u16 = 0x8022;
    pub(super) const FINGERPRINT: u16 = 0x8028;
    /// RFC 5780, section 7.3.
    pub(super) const RESPONSE_ORIGIN: u16 = 0x802b;
    /// RFC 5780, section 7.4.
    pub(super) const OTHER_ADDRESS: u16 = 0x802c;
    /// Types below this must be understood by who receives them.
    pub(super) const OPTIONAL: u16 = 0x8000;
}

/// What a request asks for beside our own address (RFC 5780). A server that offers it names its
/// [`other`](BindingResponse::other) address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    /// Nothing: the form that every server answers.
    Plain,
    /// To be answered from the server's other port.
    OtherPort,
    /// To be answered from the server's other address and other port.
    OtherAddressAndPort,
    /// To be answered to this port of our address.
    ToPort(u16),
}

/// Where the server saw our request come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindingResponse {
    pub transaction: TransactionId,
    /// Canonical (no IPv4-mapped IPv6), neither address nor port zero.
    pub mapped: SocketAddr,
    /// Where the server says it sent this from; none where it does not say.
    pub origin: Option<SocketAddr>,
    /// The address and port that the server can also answer from (RFC 5780). Whoever sends there
    /// trusts the server: it could name anybody.
    pub other: Option<SocketAddr>,
}

/// What the client sends.
pub type Request = ArrayVec<u8, REQUEST_LEN>;

/// What the server sends back.
pub type Answer = ArrayVec<u8, ANSWER_LEN_MAX>;

/// Why a datagram is not a STUN message that we can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StunError {
    #[error("{seen} bytes are no STUN message: the header alone has {HEADER_LEN}")]
    Short { seen: usize },
    #[error("no STUN cookie where RFC 8489 wants it")]
    Cookie,
    #[error("the header announces {announced} bytes of attributes, the datagram has {seen}")]
    Length { announced: usize, seen: usize },
    #[error("message type {seen:#06x} is not the one awaited")]
    Type { seen: u16 },
    #[error("attribute {attribute:#06x} is cut off, or follows the last one")]
    Attribute { attribute: u16 },
    #[error("the fingerprint does not match")]
    Fingerprint,
    #[error("the answer needs attribute {attribute:#06x} to be understood")]
    Unknown { attribute: u16 },
    #[error("the server answered with error {code}")]
    Refused { code: u16 },
    #[error("the answer names no usable address")]
    Address,
}

/// Our binding request: exactly the bytes that a stock derper answers.
pub fn binding_request(transaction: TransactionId) -> [u8; REQUEST_LEN] {
    let mut message = ArrayVec::new();
    push_header(&mut message, message_type::REQUEST, transaction, REQUEST_LEN);
    push_attribute(&mut message, attribute_type::SOFTWARE, &SOFTWARE);
    let fingerprint = fingerprint(&message).to_be_bytes();
    push_attribute(&mut message, attribute_type::FINGERPRINT, &fingerprint);
    // Full by construction: 20 + 12 + 8 bytes.
    message.into_inner().unwrap_or([0; REQUEST_LEN])
}

/// A binding request that may ask for more: for [`Ask::Plain`] it is [`binding_request()`].
pub fn request(ask: Ask, transaction: TransactionId) -> Request {
    /// Flags of CHANGE-REQUEST.
    const CHANGE_ADDRESS: u8 = 4;
    const CHANGE_PORT: u8 = 2;
    let (kind, value) = match ask {
        Ask::Plain => return binding_request(transaction).into(),
        Ask::OtherPort => (attribute_type::CHANGE_REQUEST, [0, 0, 0, CHANGE_PORT]),
        Ask::OtherAddressAndPort => {
            (attribute_type::CHANGE_REQUEST, [0, 0, 0, CHANGE_ADDRESS | CHANGE_PORT])
        }
        Ask::ToPort(port) => {
            let [high, low] = port.to_be_bytes();
            (attribute_type::RESPONSE_PORT, [high, low, 0, 0])
        }
    };
    let mut message = Request::new();
    let len = HEADER_LEN + 2 * (ATTRIBUTE_HEADER_LEN + 4);
    push_header(&mut message, message_type::REQUEST, transaction, len);
    push_attribute(&mut message, kind, &value);
    let fingerprint = fingerprint(&message).to_be_bytes();
    push_attribute(&mut message, attribute_type::FINGERPRINT, &fingerprint);
    message
}

/// The transaction of a request; none of anything else.
pub fn transaction_of_request(datagram: &[u8]) -> Option<TransactionId> {
    transaction_of(datagram, message_type::REQUEST)
}

/// The transaction of an error; none of anything else.
pub fn transaction_of_error(datagram: &[u8]) -> Option<TransactionId> {
    transaction_of(datagram, message_type::ERROR)
}

/// Reads the answer to a binding request. Whether the transaction is ours and whether the answer
/// comes from the server that was asked is for the caller to see.
pub fn parse_response(datagram: &[u8]) -> Result<BindingResponse, StunError> {
    let message = Message::parse(datagram)?;
    match message.message_type {
        message_type::SUCCESS => {}
        message_type::ERROR => return Err(StunError::Refused { code: message.error_code() }),
        seen => return Err(StunError::Type { seen }),
    }
    let (mut mapped, mut origin, mut other) = (None, None, None);
    for attribute in message.attributes() {
        let Attribute { kind, value } = attribute?;
        match kind {
            attribute_type::XOR_MAPPED_ADDRESS | attribute_type::XOR_MAPPED_ADDRESS_DRAFT => {
                mapped = Some(xored_address(value, message.transaction)?);
            }
            // Some home routers rewrite it to look like the inside address: the last resort.
            attribute_type::MAPPED_ADDRESS if mapped.is_none() => mapped = Some(address(value)?),
            // Extras: one that cannot be read is as good as none.
            attribute_type::RESPONSE_ORIGIN => origin = address(value).ok(),
            attribute_type::OTHER_ADDRESS => other = address(value).ok(),
            _ if must_be_understood(kind) => return Err(StunError::Unknown { attribute: kind }),
            _ => {}
        }
    }
    let mapped = mapped.ok_or(StunError::Address)?;
    if !is_usable(&mapped) {
        return Err(StunError::Address);
    }
    let [origin, other] = [origin, other].map(|address| address.filter(is_usable));
    Ok(BindingResponse { transaction: message.transaction, mapped, origin, other })
}

/// Answers a binding request from `source`: its address, or error 420 where the request has
/// attributes that must be understood and are not. Ignoring CHANGE-REQUEST (RFC 5780), say, would
/// let the asker believe that its NAT filters nothing.
pub fn answer(datagram: &[u8], source: SocketAddr) -> Result<Answer, StunError> {
    let message = Message::parse(datagram)?;
    if message.message_type != message_type::REQUEST {
        return Err(StunError::Type { seen: message.message_type });
    }
    let mut unknown = ArrayVec::<u8, { 2 * UNKNOWN_LISTED_MAX }>::new();
    for attribute in message.attributes() {
        let kind = attribute?.kind;
        if must_be_understood(kind) {
            // A list that is full says enough.
            let _ = unknown.try_extend_from_slice(&kind.to_be_bytes());
        }
    }
    let mut answer = Answer::new();
    if unknown.is_empty() {
        push_address(&mut answer, message.transaction, source);
    } else {
        push_unknown(&mut answer, message.transaction, &unknown);
    }
    Ok(answer)
}

/// One checked header and the bytes after it.
struct Message<'d> {
    message_type: u16,
    transaction: TransactionId,
    datagram: &'d [u8],
}

impl<'d> Message<'d> {
    fn parse(datagram: &'d [u8]) -> Result<Self, StunError> {
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
    fn attributes(&self) -> Attributes<'d> {
        Attributes { datagram: self.datagram, at: HEADER_LEN }
    }

    /// 300 to 699, or 0 where the answer does not say.
    fn error_code(&self) -> u16 {
        let found = self.attributes().find_map(|attribute| match attribute.ok()? {
            Attribute { kind: attribute_type::ERROR_CODE, value: [_, _, class, number, ..] } => {
                Some(u16::from(class & 7) * 100 + u16::from(*number))
            }
            _ => None,
        });
        found.unwrap_or(0)
    }
}

struct Attribute<'d> {
    kind: u16,
    value: &'d [u8],
}

struct Attributes<'d> {
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
fn must_be_understood(kind: u16) -> bool {
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

fn transaction_of(datagram: &[u8], message_type: u16) -> Option<TransactionId> {
    let message = Message::parse(datagram).ok()?;
    (message.message_type == message_type).then_some(message.transaction)
}

fn is_usable(address: &SocketAddr) -> bool {
    address.port() != 0 && !address.ip().is_unspecified()
}

/// CRC-32 of everything before the FINGERPRINT attribute (RFC 8489, section 14.7). The header's
/// length already counts the attribute.
fn fingerprint(before: &[u8]) -> u32 {
    crc32fast::hash(before) ^ FINGERPRINT_XOR
}

/// A MAPPED-ADDRESS: zero, family, port, address.
fn address(value: &[u8]) -> Result<SocketAddr, StunError> {
    let ([_, family, port_0, port_1], ip) = value.split_first_chunk().ok_or(StunError::Address)?;
    let ip = match (family, ip.len()) {
        (1, 4) => <[u8; 4]>::try_from(ip).map(IpAddr::from),
        (2, 16) => <[u8; 16]>::try_from(ip).map(IpAddr::from),
        _ => return Err(StunError::Address),
    };
    let ip = ip.map_err(|_| StunError::Address)?.to_canonical();
    Ok(SocketAddr::new(ip, u16::from_be_bytes([*port_0, *port_1])))
}

/// An XOR-MAPPED-ADDRESS: as [`address`], port and address XORed with cookie and transaction.
fn xored_address(value: &[u8], transaction: TransactionId) -> Result<SocketAddr, StunError> {
    let mut plain = ArrayVec::<u8, 20>::try_from(value).map_err(|_| StunError::Address)?;
    xor_address(&mut plain, transaction);
    address(&plain)
}

/// XORs the port and the address of an address attribute, in place.
fn xor_address(value: &mut [u8], transaction: TransactionId) {
    let mask = COOKIE.into_iter().chain(transaction.0);
    let (head, ip) = value.split_at_mut(value.len().min(4));
    for (byte, mask) in head.iter_mut().skip(2).zip(COOKIE) {
        *byte ^= mask;
    }
    for (byte, mask) in ip.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

fn push_address(answer: &mut Answer, transaction: TransactionId, source: SocketAddr) {
    let mut value = ArrayVec::<u8, 20>::new();
    let port = source.port().to_be_bytes();
    match source.ip().to_canonical() {
        IpAddr::V4(ip) => {
            value.extend([0, 1, port[0], port[1]]);
            value.extend(Ipv4Addr::octets(&ip));
        }
        IpAddr::V6(ip) => {
            value.extend([0, 2, port[0], port[1]]);
            value.extend(Ipv6Addr::octets(&ip));
        }
    }
    xor_address(&mut value, transaction);
    let len = HEADER_LEN + ATTRIBUTE_HEADER_LEN + value.len();
    push_header(answer, message_type::SUCCESS, transaction, len);
    push_attribute(answer, attribute_type::XOR_MAPPED_ADDRESS, &value);
}

/// Error 420 without a reason phrase: the answer stays small.
fn push_unknown(answer: &mut Answer, transaction: TransactionId, unknown: &[u8]) {
    let listed = unknown.len().next_multiple_of(4);
    let len = HEADER_LEN + ATTRIBUTE_HEADER_LEN + 4 + ATTRIBUTE_HEADER_LEN + listed;
    push_header(answer, message_type::ERROR, transaction, len);
    push_attribute(answer, attribute_type::ERROR_CODE, &[0, 0, 4, 20]);
    push_attribute(answer, attribute_type::UNKNOWN_ATTRIBUTES, unknown);
}

/// `len` is that of the whole message.
fn push_header<const CAP: usize>(
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

fn push_attribute<const CAP: usize>(message: &mut ArrayVec<u8, CAP>, kind: u16, value: &[u8]) {
    message.extend(kind.to_be_bytes());
    message.extend((value.len() as u16).to_be_bytes());
    message.extend(value.iter().copied());
    while !message.len().is_multiple_of(4) {
        message.push(0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRANSACTION: TransactionId = TransactionId([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    /// Of RFC 5769, all samples.
    const RFC_TRANSACTION: TransactionId =
        TransactionId([0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae]);

    fn bytes(hex: &str) -> Vec<u8> {
        hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
    }

    /// RFC 5769, section 2.1: PRIORITY, ICE-CONTROLLED, USERNAME and MESSAGE-INTEGRITY.
    fn rfc_request() -> Vec<u8> {
        bytes(
            "00 01 00 58 21 12 a4 42 b7 e7 a7 01 bc 34 d6 86 fa 87 df ae
             80 22 00 10 53 54 55 4e 20 74 65 73 74 20 63 6c 69 65 6e 74
             00 24 00 04 6e 00 01 ff 80 29 00 08 93 2f f9 b1 51 26 3b 36
             00 06 00 09 65 76 74 6a 3a 68 36 76 59 20 20 20
             00 08 00 14 9a ea a7 0c bf d8 cb 56 78 1e f2 b5 b2 d3 f2 49 c1 b5 71 a2
             80 28 00 04 e5 7a 3b cf",
        )
    }

    /// RFC 5769, section 2.2.
    fn rfc_response_v4() -> Vec<u8> {
        bytes(
            "01 01 00 3c 21 12 a4 42 b7 e7 a7 01 bc 34 d6 86 fa 87 df ae
             80 22 00 0b 74 65 73 74 20 76 65 63 74 6f 72 20
             00 20 00 08 00 01 a1 47 e1 12 a6 43
             00 08 00 14 2b 91 f5 99 fd 9e 90 c3 8c 74 89 f9 2a f9 ba 53 f0 6b e7 d7
             80 28 00 04 c0 7d 4c 96",
        )
    }

    /// RFC 5769, section 2.3.
    fn rfc_response_v6() -> Vec<u8> {
        bytes(
            "01 01 00 48 21 12 a4 42 b7 e7 a7 01 bc 34 d6 86 fa 87 df ae
             80 22 00 0b 74 65 73 74 20 76 65 63 74 6f 72 20
             00 20 00 14 00 02 a1 47 01 13 a9 fa a5 d3 f1 79 bc 25 f4 b5 be d2 b9 d9
             00 08 00 14 a3 82 95 4e 4b e6 7b f1 17 84 c9 7c 82 92 c2 75 bf e3 ed 41
             80 28 00 04 c8 fb 0b 4c",
        )
    }

    /// A success answer with these attributes and no fingerprint.
    fn response(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = ArrayVec::<u8, 256>::new();
        attributes.iter().for_each(|(kind, value)| push_attribute(&mut body, *kind, value));
        let mut message = ArrayVec::<u8, 512>::new();
        let len = HEADER_LEN + body.len();
        push_header(&mut message, message_type::SUCCESS, TRANSACTION, len);
        message.extend(body);
        message.to_vec()
    }

    #[test]
    fn our_request_is_the_form_that_derper_answers() {
        // The fingerprint was computed with zlib.
        let golden = bytes(
            "00 01 00 14 21 12 a4 42 01 02 03 04 05 06 07 08 09 0a 0b 0c
             80 22 00 08 74 61 69 6c 6e 6f 64 65 80 28 00 04 b3 2c 37 0f",
        );
        assert_eq!(binding_request(TRANSACTION).as_slice(), golden);
    }

    #[test]
    fn requests_of_rfc_5780_ask_for_an_answer_from_elsewhere_or_to_elsewhere() {
        // The fingerprints were computed with zlib.
        let golden = [
            (Ask::OtherPort, "00 03 00 04 00 00 00 02 80 28 00 04 59 da dc 24"),
            (Ask::OtherAddressAndPort, "00 03 00 04 00 00 00 06 80 28 00 04 5e b7 18 3d"),
            (Ask::ToPort(0x1234), "00 27 00 04 12 34 00 00 80 28 00 04 55 54 72 df"),
        ];
        for (ask, attributes) in golden {
            let head = "00 01 00 10 21 12 a4 42 01 02 03 04 05 06 07 08 09 0a 0b 0c ";
            let golden = bytes(&format!("{head}{attributes}"));
            assert_eq!(request(ask, TRANSACTION).as_slice(), golden, "{ask:?}");
            assert_eq!(transaction_of_request(&golden), Some(TRANSACTION));
        }
        assert_eq!(request(Ask::Plain, TRANSACTION).as_slice(), binding_request(TRANSACTION));
        assert_eq!(transaction_of_request(&rfc_response_v4()), None);
    }

    #[test]
    fn a_server_with_two_addresses_says_so() {
        let mapped: &[u8] = &[0, 1, 0, 9, 10, 0, 0, 1];
        let origin: &[u8] = &[0, 1, 0x0d, 0x96, 192, 0, 2, 1];
        let other: &[u8] = &[0, 1, 0x0d, 0x97, 192, 0, 2, 2];
        let read = |other| {
            let attributes: [(u16, &[u8]); 3] = [(1, mapped), (0x802b, origin), (0x802c, other)];
            parse_response(&response(&attributes)).unwrap()
        };
        assert_eq!(read(other).origin, "192.0.2.1:3478".parse().ok());
        assert_eq!(read(other).other, "192.0.2.2:3479".parse().ok());
        // Not a reason to throw the rest away.
        for bad in [&[][..], &[0, 1, 0, 0, 192, 0, 2, 2], &[0, 1, 0, 9, 0, 0, 0, 0]] {
            assert_eq!((read(bad).other, read(bad).mapped.port()), (None, 9));
        }
    }

    #[test]
    fn answers_of_rfc_5769_are_read() {
        let v4 = BindingResponse {
            transaction: RFC_TRANSACTION,
            mapped: "192.0.2.1:32853".parse().unwrap(),
            origin: None,
            other: None,
        };
        assert_eq!(parse_response(&rfc_response_v4()), Ok(v4));
        let mapped = "[2001:db8:1234:5678:11:2233:4455:6677]:32853".parse().unwrap();
        assert_eq!(parse_response(&rfc_response_v6()), Ok(BindingResponse { mapped, ..v4 }));
    }

    #[test]
    fn the_request_of_rfc_5769_is_told_which_attribute_we_do_not_know() {
        let answer = answer(&rfc_request(), "192.0.2.1:1".parse().unwrap()).unwrap();
        let golden = bytes(
            "01 11 00 10 21 12 a4 42 b7 e7 a7 01 bc 34 d6 86 fa 87 df ae
             00 09 00 04 00 00 04 14 00 0a 00 02 00 24 00 00",
        );
        assert_eq!(answer.as_slice(), golden);
        assert_eq!(parse_response(&answer), Err(StunError::Refused { code: 420 }));
    }

    #[test]
    fn answers_are_no_longer_than_our_request_for_ipv4_and_never_longer_than_an_address_needs() {
        let v4 = answer(&binding_request(TRANSACTION), "[::ffff:2.3.4.5]:1234".parse().unwrap());
        let golden = "01 01 00 0c 21 12 a4 42 01 02 03 04 05 06 07 08 09 0a 0b 0c
                      00 20 00 08 00 01 25 c0 23 11 a0 47";
        assert_eq!(v4.unwrap().as_slice(), bytes(golden));
        let v6 = answer(&binding_request(TRANSACTION), "[2001:db8::1]:1234".parse().unwrap());
        assert_eq!(v6.unwrap().len(), ANSWER_LEN_MAX);
    }

    #[test]
    fn a_bare_header_is_answered_and_other_messages_are_not() {
        let source = "192.0.2.1:4500".parse().unwrap();
        let mut bare = binding_request(TRANSACTION)[..HEADER_LEN].to_vec();
        bare[3] = 0;
        let reply = answer(&bare, source).unwrap();
        assert_eq!(parse_response(&reply).unwrap().mapped, source);
        assert_eq!(answer(&reply, source), Err(StunError::Type { seen: 0x0101 }));
        // An indication (class 1 of method 1) is never answered.
        bare[1] = 0x11;
        assert_eq!(answer(&bare, source), Err(StunError::Type { seen: 0x0011 }));
    }

    #[test]
    fn a_change_request_is_refused_not_ignored() {
        let mut request = response(&[(0x0003, &[0, 0, 0, 6])]);
        request[0] = 0;
        let reply = answer(&request, "192.0.2.1:4500".parse().unwrap()).unwrap();
        assert_eq!(parse_response(&reply), Err(StunError::Refused { code: 420 }));
    }

    #[test]
    fn the_list_of_unknown_attributes_is_bounded() {
        let many: Vec<(u16, &[u8])> = (0x7000..0x7020).map(|kind| (kind, &[][..])).collect();
        let mut request = response(&many);
        request[0] = 0;
        let reply = answer(&request, "[2001:db8::1]:4500".parse().unwrap()).unwrap();
        assert_eq!(reply.len(), ANSWER_LEN_MAX);
    }

    #[test]
    fn the_xored_address_wins_over_the_plain_one_wherever_it_stands() {
        let plain: &[u8] = &[0, 1, 0, 9, 10, 0, 0, 1];
        let mut xored = [0, 1, 0x04, 0xd2, 2, 3, 4, 5];
        xor_address(&mut xored, TRANSACTION);
        let expected: SocketAddr = "2.3.4.5:1234".parse().unwrap();
        for kind in [attribute_type::XOR_MAPPED_ADDRESS, attribute_type::XOR_MAPPED_ADDRESS_DRAFT] {
            let orders: [[(u16, &[u8]); 2]; 2] =
                [[(1, plain), (kind, &xored)], [(kind, &xored), (1, plain)]];
            for order in orders {
                assert_eq!(parse_response(&response(&order)).unwrap().mapped, expected);
            }
        }
        let alone = parse_response(&response(&[(1, plain)])).unwrap();
        assert_eq!(alone.mapped, "10.0.0.1:9".parse().unwrap());
    }

    #[test]
    fn answers_that_name_no_usable_address_are_refused() {
        let cases: [&[(u16, &[u8])]; 6] = [
            &[],
            &[(0x8022, b"only")],
            &[(1, &[0, 1, 0, 0, 10, 0, 0, 1])],
            &[(1, &[0, 1, 0, 9, 0, 0, 0, 0])],
            &[(1, &[0, 3, 0, 9, 10, 0, 0, 1])],
            &[(1, &[0, 2, 0, 9, 10, 0, 0, 1])],
        ];
        for attributes in cases {
            assert_eq!(parse_response(&response(attributes)), Err(StunError::Address));
        }
        let unknown = parse_response(&response(&[(0x0042, &[])]));
        assert_eq!(unknown, Err(StunError::Unknown { attribute: 0x42 }));
    }

    #[test]
    fn nothing_may_follow_the_fingerprint() {
        let mut message = rfc_response_v4();
        message.extend([0x80, 0x22, 0, 0]);
        message[3] += 4;
        assert_eq!(parse_response(&message), Err(StunError::Attribute { attribute: 0x8028 }));
    }

    #[test]
    fn one_changed_bit_of_a_fingerprinted_message_is_seen() {
        // With another type or length of an attribute there may be no fingerprint, and a message
        // needs none.
        let attribute_headers = [20..24, 36..40, 48..52, 72..76];
        let whole = rfc_response_v4();
        for bit in 0..8 * whole.len() {
            let mut message = whole.clone();
            message[bit / 8] ^= 1 << (bit % 8);
            let header = attribute_headers.iter().any(|header| header.contains(&(bit / 8)));
            assert!(header || parse_response(&message).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn every_answer_is_read_back(id: [u8; 12], ip: IpAddr, port in 1_u16..) {
            prop_assume!(!ip.is_unspecified() && !ip.to_canonical().is_unspecified());
            let request = binding_request(TransactionId(id));
            let reply = answer(&request, SocketAddr::new(ip, port)).unwrap();
            let expected = BindingResponse {
                transaction: TransactionId(id),
                mapped: SocketAddr::new(ip.to_canonical(), port),
                origin: None,
                other: None,
            };
            prop_assert_eq!(parse_response(&reply), Ok(expected));
        }

        #[test]
        fn cut_messages_are_refused(len in 0_usize..80) {
            prop_assert!(parse_response(&rfc_response_v4()[..len]).is_err());
            prop_assert!(answer(&rfc_request()[..len], "192.0.2.1:1".parse().unwrap()).is_err());
        }
    }
}
