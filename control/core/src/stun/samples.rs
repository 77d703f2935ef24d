//! Messages of others, for the tests of both sides.
#![allow(clippy::unwrap_used, reason = "tests")]

use arrayvec::ArrayVec;

use super::message::{HEADER_LEN, message_type, push_attribute, push_header};
use crate::transaction::TransactionId;

pub(super) const TRANSACTION: TransactionId =
    TransactionId([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
/// Of RFC 5769, all samples.
pub(super) const RFC_TRANSACTION: TransactionId =
    TransactionId([0xb7, 0xe7, 0xa7, 0x01, 0xbc, 0x34, 0xd6, 0x86, 0xfa, 0x87, 0xdf, 0xae]);

pub(super) fn bytes(hex: &str) -> Vec<u8> {
    hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// RFC 5769, section 2.1: PRIORITY, ICE-CONTROLLED, USERNAME and MESSAGE-INTEGRITY.
pub(super) fn rfc_request() -> Vec<u8> {
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
pub(super) fn rfc_response_v4() -> Vec<u8> {
    bytes(
        "01 01 00 3c 21 12 a4 42 b7 e7 a7 01 bc 34 d6 86 fa 87 df ae
         80 22 00 0b 74 65 73 74 20 76 65 63 74 6f 72 20
         00 20 00 08 00 01 a1 47 e1 12 a6 43
         00 08 00 14 2b 91 f5 99 fd 9e 90 c3 8c 74 89 f9 2a f9 ba 53 f0 6b e7 d7
         80 28 00 04 c0 7d 4c 96",
    )
}

/// RFC 5769, section 2.3.
pub(super) fn rfc_response_v6() -> Vec<u8> {
    bytes(
        "01 01 00 48 21 12 a4 42 b7 e7 a7 01 bc 34 d6 86 fa 87 df ae
         80 22 00 0b 74 65 73 74 20 76 65 63 74 6f 72 20
         00 20 00 14 00 02 a1 47 01 13 a9 fa a5 d3 f1 79 bc 25 f4 b5 be d2 b9 d9
         00 08 00 14 a3 82 95 4e 4b e6 7b f1 17 84 c9 7c 82 92 c2 75 bf e3 ed 41
         80 28 00 04 c8 fb 0b 4c",
    )
}

/// A success answer with these attributes and no fingerprint.
pub(super) fn response(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = ArrayVec::<u8, 256>::new();
    attributes.iter().for_each(|(kind, value)| push_attribute(&mut body, *kind, value));
    let mut message = ArrayVec::<u8, 512>::new();
    let len = HEADER_LEN + body.len();
    push_header(&mut message, message_type::SUCCESS, TRANSACTION, len);
    message.extend(body);
    message.to_vec()
}
