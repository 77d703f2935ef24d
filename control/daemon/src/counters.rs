//! What was lost or not used, by name. The path finder counts its own refusals.

use std::io;

/// Why something did not go its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    IcmpErrors,
    StunUnmatched,
    GeneveUnused,
    NotOurs,
    HeardTwice,
    HeardForOthers,
    SendNoRoute,
    SendTooLong,
    SendRefused,
    SendFailed,
    DetourMalformed,
    DetourUnknownSlot,
    NoRelay,
    RelayedFromStranger,
    RelayedUnknown,
    NoPlane,
    PlaneFull,
}

impl Count {
    /// Each with its name and a sentence.
    pub const ALL: [(Self, &'static str, &'static str); 17] = [
        (Self::IcmpErrors, "icmp_errors", "An earlier datagram was answered by an ICMP error."),
        (Self::StunUnmatched, "stun_unmatched", "STUN that answers no question of ours."),
        (Self::GeneveUnused, "geneve_unused", "A peer relay's message; none is in use."),
        (Self::NotOurs, "not_ours", "A datagram of no protocol that control speaks."),
        (Self::HeardTwice, "heard_twice", "Disco past the firewall that came in as well."),
        (Self::HeardForOthers, "heard_for_others", "Disco past the firewall, to another host."),
        (Self::SendNoRoute, "send_no_route", "The host has no route to a candidate."),
        (Self::SendTooLong, "send_too_long", "A frame that proves a length is too long here."),
        (Self::SendRefused, "send_refused", "The host's firewall refused to send."),
        (Self::SendFailed, "send_failed", "Sending failed for another reason."),
        (Self::DetourMalformed, "detour_malformed", "The data plane handed over no run."),
        (Self::DetourUnknownSlot, "detour_unknown_slot", "A packet for a peer that is gone."),
        (Self::NoRelay, "no_relay", "A packet for a relayed peer while no relay is up."),
        (Self::RelayedFromStranger, "relayed_from_stranger", "The sender is no peer of ours."),
        (Self::RelayedUnknown, "relayed_unknown", "A relayed packet of no protocol of ours."),
        (Self::NoPlane, "no_plane", "A relayed packet while there is no data plane."),
        (Self::PlaneFull, "plane_full", "The data plane did not take relayed packets in time."),
    ];

    pub fn of_send_error(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EADDRNOTAVAIL | libc::EINVAL) => {
                Self::SendNoRoute
            }
            Some(libc::EMSGSIZE) => Self::SendTooLong,
            Some(libc::EPERM | libc::EACCES) => Self::SendRefused,
            _ => Self::SendFailed,
        }
    }
}

/// One number for each [`Count`].
#[derive(Debug, Default)]
pub struct Counters([u64; Count::ALL.len()]);

impl Counters {
    pub fn add(&mut self, count: Count, number: u64) {
        self.0[count as usize] += number;
    }

    /// Name, number, sentence.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64, &'static str)> {
        Count::ALL.into_iter().map(|(count, name, why)| (name, self.0[count as usize], why))
    }
}
