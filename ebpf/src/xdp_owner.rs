//! Facts about an interface for error messages: its name, its MTU, and whose XDP program it runs.

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::error::OtherProgram;

#[derive(Debug, Default)]
pub(crate) struct Interface {
    pub(crate) name: Option<String>,
    pub(crate) mtu: u32,
    pub(crate) xdp_program: Option<u32>,
}

/// The XDP program on an interface; none if it runs none.
pub fn program_on(ifindex: u32) -> Option<OtherProgram> {
    let interface = interface(ifindex)?;
    interface.xdp_program.map(|_| interface.other_program())
}

/// None if there is no such interface, or if the kernel does not answer.
pub(crate) fn interface(ifindex: u32) -> Option<Interface> {
    let mut request = LinkMessage::default();
    request.header.index = ifindex;
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetLink(request));
    message.header.flags = NLM_F_REQUEST;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);

    let socket = Socket::new(NETLINK_ROUTE).ok()?;
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).ok()?;
    let (answer, _) = socket.recv_from_full().ok()?;
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) =
        NetlinkMessage::deserialize(&answer).ok()?.payload
    else {
        return None;
    };
    let mut interface = Interface::default();
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = Some(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
            LinkAttribute::Xdp(facts) => {
                interface.xdp_program = facts.iter().find_map(|fact| match fact {
                    LinkXdp::ProgId(id) => Some(*id),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(interface)
}

impl Interface {
    /// The program on the interface, with the name that the kernel keeps of it.
    pub(crate) fn other_program(&self) -> OtherProgram {
        let name = self.xdp_program.and_then(|id| {
            aya::programs::loaded_programs()
                .filter_map(Result::ok)
                .find(|program| program.id() == id)
                .and_then(|program| program.name_as_str().map(str::to_owned))
        });
        OtherProgram { id: self.xdp_program, name }
    }
}
