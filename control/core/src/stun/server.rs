//! Who says where it sees the others: never with more bytes than it was asked with, but for IPv6.

use std::net::SocketAddr;

use arrayvec::ArrayVec;

use super::address::to_xored;
use super::message::{
    ATTRIBUTE_HEADER_LEN, HEADER_LEN, Message, attribute_type, message_type, must_be_understood,
    push_attribute, push_header,
};
use super::{ANSWER_LEN_MAX, StunError};
use crate::transaction::TransactionId;

/// Attributes that a 420 answer lists: as many as fit into [`ANSWER_LEN_MAX`].
const UNKNOWN_LISTED_MAX: usize = 6;

/// What the server sends back.
pub type Answer = ArrayVec<u8, ANSWER_LEN_MAX>;

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

fn push_address(answer: &mut Answer, transaction: TransactionId, source: SocketAddr) {
    let value = to_xored(source, transaction);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::client::{binding_request, parse_response};
    use super::super::samples::*;
    use super::*;

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

    proptest! {
        #[test]
        fn cut_requests_are_refused(len in 0_usize..80) {
            prop_assert!(answer(&rfc_request()[..len], "192.0.2.1:1".parse().unwrap()).is_err());
        }
    }
}
