//! The protocols by which routers open ports, and what can go wrong with them.

use std::fmt;

/// The order is that of preference: PCP ties a mapping to a secret of ours, NAT-PMP to our address,
/// UPnP to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Pcp,
    NatPmp,
    Upnp,
}

impl Protocol {
    pub const ALL: [Self; 3] = [Self::Pcp, Self::NatPmp, Self::Upnp];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pcp => "PCP",
            Self::NatPmp => "NAT-PMP",
            Self::Upnp => "UPnP",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which protocols the router answers; `None`: not asked, or not known yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    pub pcp: Option<bool>,
    pub nat_pmp: Option<bool>,
    pub upnp: Option<bool>,
}

impl Answered {
    pub fn get(&self, protocol: Protocol) -> Option<bool> {
        match protocol {
            Protocol::Pcp => self.pcp,
            Protocol::NatPmp => self.nat_pmp,
            Protocol::Upnp => self.upnp,
        }
    }

    /// What is not known here is as `other` says.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            pcp: self.pcp.or(other.pcp),
            nat_pmp: self.nat_pmp.or(other.nat_pmp),
            upnp: self.upnp.or(other.upnp),
        }
    }

    pub(super) fn get_mut(&mut self, protocol: Protocol) -> &mut Option<bool> {
        match protocol {
            Protocol::Pcp => &mut self.pcp,
            Protocol::NatPmp => &mut self.nat_pmp,
            Protocol::Upnp => &mut self.upnp,
        }
    }
}

/// A router's number for why it did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub protocol: Protocol,
    pub code: u16,
}

impl Status {
    /// As the protocol's document names it.
    pub fn name(self) -> &'static str {
        match (self.protocol, self.code) {
            // RFC 6886, section 3.5.
            (Protocol::NatPmp, 1) => "unsupported version",
            (Protocol::NatPmp, 2) => "not authorized",
            (Protocol::NatPmp, 3) => "network failure",
            (Protocol::NatPmp, 4) => "out of resources",
            (Protocol::NatPmp, 5) => "unsupported opcode",
            // RFC 6887, section 7.4.
            (Protocol::Pcp, 1) => "UNSUPP_VERSION",
            (Protocol::Pcp, 2) => "NOT_AUTHORIZED",
            (Protocol::Pcp, 3) => "MALFORMED_REQUEST",
            (Protocol::Pcp, 4) => "UNSUPP_OPCODE",
            (Protocol::Pcp, 5) => "UNSUPP_OPTION",
            (Protocol::Pcp, 6) => "MALFORMED_OPTION",
            (Protocol::Pcp, 7) => "NETWORK_FAILURE",
            (Protocol::Pcp, 8) => "NO_RESOURCES",
            (Protocol::Pcp, 9) => "UNSUPP_PROTOCOL",
            (Protocol::Pcp, 10) => "USER_EX_QUOTA",
            (Protocol::Pcp, 11) => "CANNOT_PROVIDE_EXTERNAL",
            (Protocol::Pcp, 12) => "ADDRESS_MISMATCH",
            (Protocol::Pcp, 13) => "EXCESSIVE_REMOTE_PEERS",
            // WANIPConnection, section 2.4.
            (Protocol::Upnp, 401) => "Invalid Action",
            (Protocol::Upnp, 402) => "Invalid Args",
            (Protocol::Upnp, 501) => "Action Failed",
            (Protocol::Upnp, 606) => "Action not authorized",
            (Protocol::Upnp, 718) => "ConflictInMappingEntry",
            (Protocol::Upnp, 724) => "SamePortValuesRequired",
            (Protocol::Upnp, 725) => "OnlyPermanentLeasesSupported",
            (Protocol::Upnp, 728) => "NoPortMapsAvailable",
            (Protocol::Upnp, 729) => "ConflictWithOtherMechanisms",
            _ => "an error",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the router answers {} ({}) by {}", self.name(), self.code, self.protocol)
    }
}

/// Why a router made no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("the router does not answer")]
    Unanswered,
    #[error("{0}")]
    Denied(Status),
    #[error("the router has no address outside: it is not connected")]
    NoExternalAddress,
}

/// Why something that arrived was not used. Each is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Refused {
    /// From another host than the router.
    NotTheRouter,
    /// An answer to nothing that we asked, or asked long ago.
    Unasked,
    Short,
    Length,
    Version,
    NotAnAnswer,
    Opcode,
    /// Of another mapping than ours: another nonce, port or protocol.
    OtherMapping,
    /// An external address that is none.
    BadExternal,
    Ssdp,
    TooManyDescriptions,
    Url,
    UrlElsewhere,
    HttpMalformed,
    HttpLong,
    HttpTruncated,
    HttpStatus,
    HttpLate,
    Xml,
}

impl Refused {
    /// Each with its name in counters.
    pub const ALL: [(Self, &'static str); 19] = [
        (Self::NotTheRouter, "not_the_router"),
        (Self::Unasked, "unasked"),
        (Self::Short, "short"),
        (Self::Length, "length"),
        (Self::Version, "version"),
        (Self::NotAnAnswer, "not_an_answer"),
        (Self::Opcode, "opcode"),
        (Self::OtherMapping, "other_mapping"),
        (Self::BadExternal, "bad_external"),
        (Self::Ssdp, "ssdp"),
        (Self::TooManyDescriptions, "too_many_descriptions"),
        (Self::Url, "url"),
        (Self::UrlElsewhere, "url_elsewhere"),
        (Self::HttpMalformed, "http_malformed"),
        (Self::HttpLong, "http_long"),
        (Self::HttpTruncated, "http_truncated"),
        (Self::HttpStatus, "http_status"),
        (Self::HttpLate, "http_late"),
        (Self::Xml, "xml"),
    ];
}
