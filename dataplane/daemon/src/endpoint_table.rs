//! ENDPOINTS: where control says that peers are reached. Read without a system call, by every
//! thread that sends.

use millrace_ebpf::abi::{self, EndpointKind};
use millrace_ebpf::maps::LineReader;
use millrace_wg::{Endpoint, Paths, PeerSlot};

/// The table as control writes it. A line that stays half written, because its writer was killed
/// there, is as good as none: the peer roams.
pub struct EndpointTable(pub LineReader<abi::Endpoint>);

impl Paths for EndpointTable {
    fn endpoint(&self, peer: PeerSlot) -> Option<Endpoint> {
        let line = self.0.read(peer.0)?;
        match line.kind()? {
            EndpointKind::Direct => {
                let (local, ifindex) = (line.local(), line.ifindex);
                Some(Endpoint { remote: line.remote()?, local, ifindex })
            }
            EndpointKind::Detour => Some(Endpoint::detour(peer)),
            // Nobody writes the second: there is no relay over UDP.
            EndpointKind::Unset | EndpointKind::PeerRelay => None,
        }
    }
}
