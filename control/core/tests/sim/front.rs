//! What stands before a gateway, and who meets through it.

use super::nat::{Filtering, Mapping};

/// What stands before a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    Open,
    /// Lets in what it saw going out.
    Firewall,
    Nat(Mapping, Filtering),
    /// Nothing but the relay passes.
    Blocked,
}

impl Front {
    pub const ALL: [Self; 7] = {
        use Filtering as F;
        use Mapping as M;
        [
            Self::Open,
            Self::Firewall,
            Self::Nat(M::EndpointIndependent, F::EndpointIndependent),
            Self::Nat(M::EndpointIndependent, F::AddressDependent),
            Self::Nat(M::EndpointIndependent, F::AddressAndPortDependent),
            Self::Nat(M::AddressAndPortDependent, F::AddressDependent),
            Self::Nat(M::AddressAndPortDependent, F::AddressAndPortDependent),
        ]
    };

    pub fn name(self) -> String {
        let filtering = |filtering| match filtering {
            Filtering::EndpointIndependent => "anybody",
            Filtering::AddressDependent => "addresses sent to",
            Filtering::AddressAndPortDependent => "address and port sent to",
        };
        match self {
            Self::Open => "open".to_owned(),
            Self::Firewall => "firewall".to_owned(),
            Self::Blocked => "no UDP".to_owned(),
            Self::Nat(Mapping::AddressAndPortDependent, lets_in) => {
                format!("hard, lets in {}", filtering(lets_in))
            }
            Self::Nat(_, lets_in) => format!("easy, lets in {}", filtering(lets_in)),
        }
    }

    /// Its address as others see it is its own, or can be learnt from a STUN server if there is one.
    pub fn is_predictable(self, stun: bool) -> bool {
        use Mapping::{AddressAndPortDependent, AddressDependent};
        match self {
            Self::Nat(AddressDependent | AddressAndPortDependent, _) => false,
            Self::Nat(..) => stun,
            Self::Open | Self::Firewall | Self::Blocked => true,
        }
    }

    /// It lets in what comes from a port that it has not sent to.
    pub fn admits_unknown_ports(self) -> bool {
        match self {
            Self::Open => true,
            Self::Firewall | Self::Blocked => false,
            Self::Nat(_, filtering) => filtering != Filtering::AddressAndPortDependent,
        }
    }

    /// What theory says (RFC 5128, section 3): direct unless one side's port cannot be known and
    /// the other side wants to know it.
    pub fn meets(self, other: Self) -> bool {
        self.meets_with(other, true)
    }

    /// The same where STUN servers answer, or none does.
    pub fn meets_with(self, other: Self, stun: bool) -> bool {
        if self == Self::Blocked || other == Self::Blocked {
            return false;
        }
        match (self.is_predictable(stun), other.is_predictable(stun)) {
            (true, true) => true,
            (true, false) => self.admits_unknown_ports(),
            (false, true) => other.admits_unknown_ports(),
            (false, false) => false,
        }
    }

    /// This one around another: what both do.
    pub fn around(self, inner: Self) -> Self {
        use {Filtering as F, Mapping as M};
        let parts = |front| match front {
            Self::Open => Some((M::None, F::EndpointIndependent)),
            Self::Firewall => Some((M::None, F::AddressAndPortDependent)),
            Self::Nat(mapping, filtering) => Some((mapping, filtering)),
            Self::Blocked => None,
        };
        let (Some(outer), Some(inner)) = (parts(self), parts(inner)) else { return Self::Blocked };
        let hard = [outer.0, inner.0].contains(&M::AddressAndPortDependent);
        let mapping = if hard { M::AddressAndPortDependent } else { M::EndpointIndependent };
        let strictness = |filtering: &F| *filtering as u8;
        Self::Nat(mapping, [outer.1, inner.1].into_iter().max_by_key(strictness).unwrap())
    }
}
