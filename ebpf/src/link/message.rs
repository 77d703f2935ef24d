//! The messages of the link, both directions: bytes ⇄ values. Numbers are little-endian.

use std::net::SocketAddr;
use std::num::NonZeroU8;

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::wire::{Reader, Writer};
use super::{
    HEARD_LEN_MAX, INTERFACE_LEN_MAX, PREFIXES_PER_MESSAGE, PublicKey, REASON_LEN_MAX, VERSION,
};

/// First word of [`ToDataPlane::Hello`], which every version understands.
const HELLO_MAGIC: u32 = 0x6b6c_726d;

/// What control says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToDataPlane {
    /// First and once. Any other version than ours is refused, and its number is all that is read.
    Hello { version: u16 },
    /// Answered by [`ToControl::BoxKey`] with the same `request`.
    WantBoxKey { request: u32, peer: PublicKey },
    /// The peer in `slot` may still send with a session that this data plane never had: shake hands
    /// now, not when its own timers find out. Not answered; nothing happens if there is a session,
    /// or a handshake is under way.
    ConnectNow { slot: u32 },
}

/// What the data plane says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToControl {
    /// First and once, with the descriptors of [`super::Handles`] if [`Steering::On`].
    Welcome(Welcome),
    /// Instead of the welcome; the connection ends.
    Refused {
        reason: String,
    },
    /// A new peer, or everything anew about one that was told before.
    PeerUp(Peer),
    /// More prefixes of the peer that the last [`ToControl::PeerUp`] named.
    AllowedIps {
        slot: u32,
        allowed_ips: Vec<IpNet>,
    },
    /// The slot is free, and may soon be another peer's: set its line to "unset" now.
    PeerDown {
        slot: u32,
    },
    /// Every peer of the moment of the welcome has been told.
    Synced,
    BoxKey(BoxKeyAnswer),
    /// The private key changed: box keys of before are of no use. None: there is no key.
    OwnKey {
        public_key: Option<PublicKey>,
    },
    /// Bytes of the largest inner packet.
    Mtu {
        mtu: u16,
    },
    /// The mark that sockets of control's own must carry; 0: none.
    Fwmark {
        mark: u32,
    },
    /// Packets go to or come from a peer that was silent: its line in OBSERVED changes from now on.
    /// Not said again before it was silent for a while, so who sleeps need not look at silent peers.
    Active {
        slot: u32,
    },
    /// A frame for control that came in, whether or not the host's firewall lets it through. If it
    /// does, control gets it by its socket as well.
    Heard(Heard),
}

/// Disco to the port, as it was seen on a network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    pub from: SocketAddr,
    /// Perhaps not one of our addresses: a gateway also sees what it forwards.
    pub to: SocketAddr,
    pub ifindex: u32,
    /// The UDP payload; at most [`HEARD_LEN_MAX`] bytes.
    pub frame: Vec<u8>,
}

/// What does not change while a data plane runs, and the rest as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The node key; none: no private key is set yet.
    pub public_key: Option<PublicKey>,
    pub interface: String,
    pub ifindex: u32,
    pub listen_port: u16,
    /// Bytes of the largest inner packet.
    pub mtu: u16,
    pub fwmark: u32,
    pub steering: Steering,
}

/// Whether control can do anything here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Steering {
    /// Descriptors come along, with as many detours of workers.
    On { workers: NonZeroU8 },
    /// The eBPF programs could not be loaded: no maps, no socket on the port, no paths.
    Off { reason: String },
}

/// A configured peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its line in ENDPOINTS and OBSERVED.
    pub slot: u32,
    pub public_key: PublicKey,
    /// As configured, resolved; not where it roamed to.
    pub endpoint: Option<SocketAddr>,
    /// 0: off.
    pub keepalive_s: u16,
    /// The first [`PREFIXES_PER_MESSAGE`]; [`ToControl::AllowedIps`] has the others.
    pub allowed_ips: Vec<IpNet>,
}

/// HSalsa20(X25519(private key, peer), 0): what NaCl calls the precomputed key of `crypto_box`. It
/// opens boxes between the two keys and nothing else; wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct BoxKey(pub Zeroizing<[u8; 32]>);

impl std::fmt::Debug for BoxKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BoxKey(..)")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoxKeyAnswer {
    pub request: u32,
    pub key: Result<BoxKey, BoxKeyRefusal>,
}

/// Why there is no box key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BoxKeyRefusal {
    #[error("the interface has no private key yet")]
    NoPrivateKey,
    #[error("the public key is a point of low order, which no private key has")]
    LowOrder,
}

/// Bytes that are none of the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("it ends in the middle of a field")]
    Short,
    #[error("it goes on after its last field")]
    Long,
    #[error("{value} is no kind of message")]
    Kind { value: u8 },
    #[error("its {field} cannot be")]
    Field { field: &'static str },
}

impl ToDataPlane {
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut to = Writer::default();
        match self {
            Self::Hello { version } => to.u8(1).u32(HELLO_MAGIC).u16(*version),
            Self::WantBoxKey { request, peer } => to.u8(2).u32(*request).bytes(&peer.0),
            Self::ConnectNow { slot } => to.u8(3).u32(*slot),
        };
        to.finish()
    }

    /// A hello of another version is one too, whatever follows its number.
    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut from = Reader(bytes);
        let message = match from.u8()? {
            1 => {
                if from.u32()? != HELLO_MAGIC {
                    return Err(MessageError::Field { field: "magic" });
                }
                let version = from.u16()?;
                if version != VERSION {
                    return Ok(Self::Hello { version });
                }
                Self::Hello { version }
            }
            2 => Self::WantBoxKey { request: from.u32()?, peer: PublicKey(from.array()?) },
            3 => Self::ConnectNow { slot: from.u32()? },
            value => return Err(MessageError::Kind { value }),
        };
        from.finish(message)
    }
}

impl ToControl {
    /// Lists and texts that are too long are cut: whoever has more sends more messages.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut to = Writer::default();
        match self {
            Self::Welcome(welcome) => welcome.encode(&mut to),
            Self::Refused { reason } => to.u8(129).text(reason, REASON_LEN_MAX),
            Self::PeerUp(peer) => peer.encode(&mut to),
            Self::AllowedIps { slot, allowed_ips } => to.u8(131).u32(*slot).prefixes(allowed_ips),
            Self::PeerDown { slot } => to.u8(132).u32(*slot),
            Self::Synced => to.u8(133),
            Self::BoxKey(BoxKeyAnswer { request, key }) => {
                to.u8(134).u32(*request);
                match key {
                    Ok(key) => to.u8(0).bytes(&*key.0),
                    Err(BoxKeyRefusal::NoPrivateKey) => to.u8(1),
                    Err(BoxKeyRefusal::LowOrder) => to.u8(2),
                }
            }
            Self::OwnKey { public_key } => to.u8(135).key(*public_key),
            Self::Mtu { mtu } => to.u8(136).u16(*mtu),
            Self::Fwmark { mark } => to.u8(137).u32(*mark),
            Self::Active { slot } => to.u8(138).u32(*slot),
            Self::Heard(heard) => heard.encode(&mut to),
        };
        to.finish()
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut from = Reader(bytes);
        let message = match from.u8()? {
            128 => Self::Welcome(Welcome::parse(&mut from)?),
            129 => Self::Refused { reason: from.text(REASON_LEN_MAX)? },
            130 => Self::PeerUp(Peer::parse(&mut from)?),
            131 => Self::AllowedIps { slot: from.u32()?, allowed_ips: from.prefixes()? },
            132 => Self::PeerDown { slot: from.u32()? },
            133 => Self::Synced,
            134 => {
                let request = from.u32()?;
                let key = match from.u8()? {
                    0 => Ok(BoxKey(Zeroizing::new(from.array()?))),
                    1 => Err(BoxKeyRefusal::NoPrivateKey),
                    2 => Err(BoxKeyRefusal::LowOrder),
                    _ => return Err(MessageError::Field { field: "refusal" }),
                };
                Self::BoxKey(BoxKeyAnswer { request, key })
            }
            135 => Self::OwnKey { public_key: from.key()? },
            136 => Self::Mtu { mtu: from.u16()? },
            137 => Self::Fwmark { mark: from.u32()? },
            138 => Self::Active { slot: from.u32()? },
            139 => Self::Heard(Heard::parse(&mut from)?),
            value => return Err(MessageError::Kind { value }),
        };
        from.finish(message)
    }
}

impl Welcome {
    /// Descriptors that come along.
    pub fn descriptors(&self) -> usize {
        match self.steering {
            Steering::On { workers } => 5 + 1 + 1 + usize::from(workers.get()),
            Steering::Off { .. } => 0,
        }
    }

    fn encode<'w>(&self, to: &'w mut Writer) -> &'w mut Writer {
        to.u8(128).u16(VERSION).key(self.public_key).text(&self.interface, INTERFACE_LEN_MAX);
        to.u32(self.ifindex).u16(self.listen_port).u16(self.mtu).u32(self.fwmark);
        match &self.steering {
            Steering::On { workers } => to.u8(workers.get()),
            Steering::Off { reason } => to.u8(0).text(reason, REASON_LEN_MAX),
        }
    }

    fn parse(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        if from.u16()? != VERSION {
            return Err(MessageError::Field { field: "version" });
        }
        let public_key = from.key()?;
        let interface = from.text(INTERFACE_LEN_MAX)?;
        if interface.is_empty() || interface.contains(['/', '\0']) {
            return Err(MessageError::Field { field: "interface" });
        }
        Ok(Self {
            public_key,
            interface,
            ifindex: from.u32()?,
            listen_port: from.u16()?,
            mtu: from.u16()?,
            fwmark: from.u32()?,
            steering: match NonZeroU8::new(from.u8()?) {
                None => Steering::Off { reason: from.text(REASON_LEN_MAX)? },
                Some(workers) if u32::from(workers.get()) <= crate::abi::WORKERS_MAX => {
                    Steering::On { workers }
                }
                Some(_) => return Err(MessageError::Field { field: "number of workers" }),
            },
        })
    }
}

impl Peer {
    /// What tells all of a peer, however many prefixes it has.
    pub fn messages(mut self) -> impl Iterator<Item = ToControl> {
        let slot = self.slot;
        let more = match self.allowed_ips.len().checked_sub(PREFIXES_PER_MESSAGE) {
            None => Vec::new(),
            Some(_) => self.allowed_ips.split_off(PREFIXES_PER_MESSAGE),
        };
        let more: Vec<_> = more
            .chunks(PREFIXES_PER_MESSAGE)
            .map(|part| ToControl::AllowedIps { slot, allowed_ips: part.to_vec() })
            .collect();
        std::iter::once(ToControl::PeerUp(self)).chain(more)
    }

    fn encode<'w>(&self, to: &'w mut Writer) -> &'w mut Writer {
        to.u8(130).u32(self.slot).bytes(&self.public_key.0).address(self.endpoint);
        to.u16(self.keepalive_s).prefixes(&self.allowed_ips)
    }

    fn parse(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        Ok(Self {
            slot: from.u32()?,
            public_key: PublicKey(from.array()?),
            endpoint: from.address()?,
            keepalive_s: from.u16()?,
            allowed_ips: from.prefixes()?,
        })
    }
}

impl Heard {
    fn encode<'w>(&self, to: &'w mut Writer) -> &'w mut Writer {
        let frame = &self.frame[..self.frame.len().min(HEARD_LEN_MAX)];
        to.u8(139).address(Some(self.from)).address(Some(self.to)).u32(self.ifindex);
        to.u16(frame.len() as u16).bytes(frame)
    }

    fn parse(from: &mut Reader<'_>) -> Result<Self, MessageError> {
        let mut address =
            || from.address()?.ok_or(MessageError::Field { field: "address of a frame" });
        let (source, target) = (address()?, address()?);
        let (ifindex, frame) = (from.u32()?, from.sized(HEARD_LEN_MAX)?.to_vec());
        Ok(Self { from: source, to: target, ifindex, frame })
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::super::MESSAGE_LEN_MAX;
    use super::*;

    fn key() -> impl Strategy<Value = PublicKey> {
        (1_u8.., any::<[u8; 31]>()).prop_map(|(first, rest)| {
            let mut key = [first; 32];
            key[1..].copy_from_slice(&rest);
            PublicKey(key)
        })
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (any::<Ipv4Addr>(), 0_u8..=32).prop_map(|(ip, len)| IpNet::new(ip.into(), len)),
            (any::<Ipv6Addr>(), 0_u8..=128).prop_map(|(ip, len)| IpNet::new(ip.into(), len)),
        ]
        .prop_map(|net| net.unwrap().trunc())
    }

    fn prefixes() -> impl Strategy<Value = Vec<IpNet>> {
        prop::collection::vec(prefix(), 0..=PREFIXES_PER_MESSAGE)
    }

    fn endpoint() -> impl Strategy<Value = Option<SocketAddr>> {
        prop_oneof![
            Just(None),
            any::<std::net::SocketAddrV4>().prop_map(|v4| Some(v4.into())),
            (any::<Ipv6Addr>(), any::<u16>(), any::<u32>())
                .prop_filter("mapped", |(ip, ..)| ip.to_ipv4_mapped().is_none())
                .prop_map(|(ip, port, scope)| {
                    Some(std::net::SocketAddrV6::new(ip, port, 0, scope).into())
                }),
        ]
    }

    fn to_control() -> impl Strategy<Value = ToControl> {
        let steering = prop_oneof![
            (1_u8..=64).prop_map(|workers| {
                let workers = NonZeroU8::new(workers).unwrap();
                Steering::On { workers }
            }),
            "\\PC{0,120}".prop_map(|reason| Steering::Off { reason }),
        ];
        let welcome =
            (prop::option::of(key()), "[a-z0-9]{1,15}", any::<(u32, u16, u16, u32)>(), steering);
        let welcome = welcome.prop_map(|(public_key, interface, numbers, steering)| {
            let (ifindex, listen_port, mtu, fwmark) = numbers;
            Welcome { public_key, interface, ifindex, listen_port, mtu, fwmark, steering }
        });
        let peer = (any::<u32>(), key(), endpoint(), any::<u16>(), prefixes()).prop_map(
            |(slot, public_key, endpoint, keepalive_s, allowed_ips)| Peer {
                slot,
                public_key,
                endpoint,
                keepalive_s,
                allowed_ips,
            },
        );
        let box_key = (any::<u32>(), prop::option::of(any::<[u8; 32]>()), any::<bool>()).prop_map(
            |(request, key, low)| {
                let refusal =
                    if low { BoxKeyRefusal::LowOrder } else { BoxKeyRefusal::NoPrivateKey };
                let key = key.map(|key| BoxKey(Zeroizing::new(key))).ok_or(refusal);
                BoxKeyAnswer { request, key }
            },
        );
        prop_oneof![
            welcome.prop_map(ToControl::Welcome),
            "\\PC{0,120}".prop_map(|reason| ToControl::Refused { reason }),
            peer.prop_map(ToControl::PeerUp),
            (any::<u32>(), prefixes())
                .prop_map(|(slot, allowed_ips)| ToControl::AllowedIps { slot, allowed_ips }),
            any::<u32>().prop_map(|slot| ToControl::PeerDown { slot }),
            Just(ToControl::Synced),
            box_key.prop_map(ToControl::BoxKey),
            prop::option::of(key()).prop_map(|public_key| ToControl::OwnKey { public_key }),
            any::<u16>().prop_map(|mtu| ToControl::Mtu { mtu }),
            any::<u32>().prop_map(|mark| ToControl::Fwmark { mark }),
            any::<u32>().prop_map(|slot| ToControl::Active { slot }),
            (endpoint(), endpoint(), any::<u32>(), any::<[u8; HEARD_LEN_MAX]>(), 0..=HEARD_LEN_MAX)
                .prop_filter_map("an address", |(from, to, ifindex, bytes, len)| {
                    let (from, to, frame) = (from?, to?, bytes[..len].to_vec());
                    Some(ToControl::Heard(Heard { from, to, ifindex, frame }))
                }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_said_to_control_is_understood(message in to_control()) {
            let bytes = message.encode();
            prop_assert!(bytes.len() <= MESSAGE_LEN_MAX);
            for short in 0..bytes.len() {
                prop_assert!(ToControl::parse(&bytes[..short]).is_err());
            }
            let mut long = bytes.to_vec();
            long.push(0);
            prop_assert!(ToControl::parse(&long).is_err());
            prop_assert_eq!(ToControl::parse(&bytes), Ok(message));
        }

        #[test]
        fn what_is_said_to_the_data_plane_is_understood(
            request: u32, peer: [u8; 32], slot: u32
        ) {
            let peer = PublicKey(peer);
            for message in [ToDataPlane::Hello { version: VERSION },
                            ToDataPlane::WantBoxKey { request, peer },
                            ToDataPlane::ConnectNow { slot }] {
                let bytes = message.encode();
                for short in 0..bytes.len() {
                    prop_assert!(ToDataPlane::parse(&bytes[..short]).is_err());
                }
                prop_assert_eq!(ToDataPlane::parse(&bytes), Ok(message));
            }
        }
    }

    #[test]
    fn a_hello_of_any_version_is_understood() {
        let mut bytes = ToDataPlane::Hello { version: VERSION + 7 }.encode().to_vec();
        bytes.extend_from_slice(b"something of the future");
        let hello = ToDataPlane::Hello { version: VERSION + 7 };
        assert_eq!(ToDataPlane::parse(&bytes), Ok(hello));
    }

    #[test]
    fn a_peer_with_many_prefixes_takes_more_messages() {
        let net = |number: u32| IpNet::new(Ipv4Addr::from(number << 8).into(), 24).unwrap();
        let all: Vec<_> = (0..150).map(net).collect();
        let peer = Peer {
            slot: 3,
            public_key: PublicKey([1; 32]),
            endpoint: None,
            keepalive_s: 0,
            allowed_ips: all.clone(),
        };
        let told: Vec<_> = peer
            .messages()
            .flat_map(|message| match ToControl::parse(&message.encode()).unwrap() {
                ToControl::PeerUp(Peer { allowed_ips, .. })
                | ToControl::AllowedIps { slot: 3, allowed_ips } => allowed_ips,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, all);
    }

    #[test]
    fn a_prefix_with_bits_past_its_length_is_refused() {
        let message =
            ToControl::AllowedIps { slot: 0, allowed_ips: vec!["192.0.2.0/24".parse().unwrap()] };
        let mut bytes = message.encode().to_vec();
        *bytes.last_mut().unwrap() = 9;
        assert_eq!(ToControl::parse(&bytes), Err(MessageError::Field { field: "prefix" }));
    }
}
