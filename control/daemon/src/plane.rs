//! The data plane as we hold it: the link, its tables, its port.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use millrace_ebpf::abi::{Endpoint, Observed};
use millrace_ebpf::error::LoadError;
use millrace_ebpf::link::{
    Delivery, DetourSockets, Handles, LinkClient, LinkError, Steering, ToControl, Welcome,
};
use millrace_ebpf::maps::{LineReader, LineWriter};
use millrace_ebpf::spec;

use crate::udp::UdpSocket;

/// A connection to a data plane. Dropping it gives everything back.
#[derive(Debug)]
pub struct Plane {
    pub link: LinkClient,
    /// None before the welcome, and where the data plane has no eBPF programs.
    pub tools: Option<Tools>,
}

/// What we work with.
#[derive(Debug)]
pub struct Tools {
    pub endpoints: LineWriter<Endpoint>,
    pub observed: LineReader<Observed>,
    pub udp: UdpSocket,
    pub detours: DetourSockets,
}

/// Why a data plane is of no use to us.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the data plane's tables cannot be used: {0}")]
    Tables(#[from] LoadError),
    #[error("the data plane's UDP socket cannot be used: {0}")]
    Socket(#[from] io::Error),
}

/// What the data plane said.
#[derive(Debug)]
pub enum News {
    /// First. A reason: it has no eBPF programs, so there is nothing that we can do for it.
    Welcome(Welcome, Option<String>),
    Message(ToControl),
}

impl Plane {
    pub fn connect(path: &Path) -> io::Result<Self> {
        Ok(Self { link: LinkClient::connect(path)?, tools: None })
    }

    /// None if it says nothing now. After an error drop it and connect anew.
    pub fn receive(&mut self) -> Result<Option<News>, PlaneError> {
        let Some(Delivery { message, handles }) = self.link.receive()? else { return Ok(None) };
        let ToControl::Welcome(welcome) = message else { return Ok(Some(News::Message(message))) };
        self.tools = handles.map(Tools::new).transpose()?;
        let reason = match &welcome.steering {
            Steering::On { .. } => None,
            Steering::Off { reason } => Some(reason.clone()),
        };
        Ok(Some(News::Welcome(welcome, reason)))
    }
}

impl AsFd for Plane {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

impl Tools {
    fn new(handles: Handles) -> Result<Self, PlaneError> {
        let Handles { maps, udp, detours } = handles;
        let specs = spec::read_abi(maps.abi.as_fd())?;
        Ok(Self {
            endpoints: LineWriter::<Endpoint>::endpoints(maps.endpoints.as_fd(), &specs)?,
            observed: LineReader::<Observed>::observed(maps.observed.as_fd(), &specs)?,
            udp: UdpSocket::new(udp)?,
            detours,
        })
    }
}
