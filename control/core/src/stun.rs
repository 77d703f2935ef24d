//! STUN (RFC 8489) as far as finding our own address needs it: binding requests and their answers.
//!
//! Our requests have the one form that a stock derper answers: 40 bytes, SOFTWARE first, FINGERPRINT
//! last. Our server answers every well-formed binding request, also the bare header. What RFC 5780
//! adds is asked for and read, where a server offers it: answers from elsewhere show what a NAT
//! filters.

mod address;
mod client;
mod message;
#[cfg(test)]
mod samples;
mod server;

pub use client::{Ask, BindingResponse, Request, binding_request, parse_response, request};
pub use message::{transaction_of_error, transaction_of_request};
pub use server::{Answer, answer};

/// Bytes of our binding request.
pub const REQUEST_LEN: usize = 40;
/// Bytes of the longest answer: the header and an IPv6 address.
pub const ANSWER_LEN_MAX: usize = 44;

/// Why a datagram is not a STUN message that we can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StunError {
    #[error("{seen} bytes are no STUN message: the header alone has {}", message::HEADER_LEN)]
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
