//! Who asks where it is seen: requests, and what their answers say.

use std::net::SocketAddr;

use arrayvec::ArrayVec;

use super::address::{address, xored_address};
use super::message::{
    ATTRIBUTE_HEADER_LEN, Attribute, HEADER_LEN, Message, attribute_type, fingerprint,
    message_type, must_be_understood, push_attribute, push_header,
};
use super::{REQUEST_LEN, StunError};
use crate::transaction::TransactionId;

/// What derper asks a request to name (tailscale, net/stun/stun.go).
const SOFTWARE: [u8; 8] = *b"tailnode";

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

fn is_usable(address: &SocketAddr) -> bool {
    address.port() != 0 && !address.ip().is_unspecified()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::super::address::to_xored;
    use super::super::message::transaction_of_request;
    use super::super::samples::*;
    use super::super::server::answer;
    use super::*;

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
    fn the_xored_address_wins_over_the_plain_one_wherever_it_stands() {
        let plain: &[u8] = &[0, 1, 0, 9, 10, 0, 0, 1];
        let expected: SocketAddr = "2.3.4.5:1234".parse().unwrap();
        let xored = to_xored(expected, TRANSACTION);
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
        fn cut_answers_are_refused(len in 0_usize..80) {
            prop_assert!(parse_response(&rfc_response_v4()[..len]).is_err());
        }
    }
}
