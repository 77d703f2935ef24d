//! One question to rtnetlink, one answer. Blocking: the kernel answers at once.

use std::cell::Cell;
use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// A socket for questions and changes.
#[derive(Debug)]
pub struct RouteSocket {
    socket: Socket,
    /// Of the last request; its answers bear it, too.
    sequence: Cell<u32>,
}

impl RouteSocket {
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Without it any process could send us answers.
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: Cell::new(0) })
    }

    /// As [`Self::new`], for dumps of a part: the kernel then obeys what the request says, instead of
    /// sending all there is.
    pub fn for_parts() -> io::Result<Self> {
        let this = Self::new()?;
        this.socket.set_netlink_get_strict_chk(true)?;
        Ok(this)
    }

    /// One answer; none if there is only an acknowledgement.
    pub fn ask(
        &self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        self.send(request, flags)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let answer = read(&bytes)?;
            if !self.is_answer(&answer.header) {
                continue;
            }
            return match answer.payload {
                NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
                NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
                _ => Ok(None),
            };
        }
    }

    /// Returns when the kernel has done it.
    pub fn change(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(request, NLM_F_ACK | flags).map(drop)
    }

    /// Every object of the kind that `request` asks for.
    pub fn dump(
        &self,
        request: RouteNetlinkMessage,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.send(request, NLM_F_DUMP)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let answer = read(rest)?;
                // Each message is padded to four bytes, the last one perhaps not.
                let len = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(len..).unwrap_or_default();
                if !self.is_answer(&answer.header) {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::Done(_) => return Ok(()),
                    _ => {}
                }
            }
        }
    }

    fn send(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence.set(self.sequence.get().wrapping_add(1));
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence.get();
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// What is left of a question that failed half-way is no answer to the next.
    fn is_answer(&self, header: &NetlinkHeader) -> bool {
        header.sequence_number == self.sequence.get()
    }
}

pub(crate) fn read(bytes: &[u8]) -> io::Result<NetlinkMessage<RouteNetlinkMessage>> {
    NetlinkMessage::deserialize(bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::address::AddressMessage;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};

    use super::*;

    #[test]
    fn what_is_left_of_one_question_does_not_answer_the_next() {
        let socket = RouteSocket::new().unwrap();
        let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        socket.send(addresses, NLM_F_DUMP).unwrap();
        let link = |name: &str| {
            let mut request = LinkMessage::default();
            request.attributes.push(LinkAttribute::IfName(name.into()));
            socket.ask(RouteNetlinkMessage::GetLink(request), 0)
        };
        assert!(matches!(link("lo"), Ok(Some(RouteNetlinkMessage::NewLink(_)))));
        assert_eq!(link("nobody").unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert!(matches!(link("lo"), Ok(Some(RouteNetlinkMessage::NewLink(_)))));
    }
}
