//! ENDPOINTS: where control says that peers are reached. Read without a system call, by every
//! thread that sends.

use millrace_ebpf::abi::{self, EndpointKind};
use millrace_ebpf::maps::LineReader;
use millrace_wg::limits::{DATA_HEADER_LEN, INNER_MTU_MIN, TAG_LEN};
use millrace_wg::{Endpoint, Path, Paths, PeerSlot};

/// Bytes of the outer headers up to the UDP payload.
const OUTER_V4: u16 = 20 + 8;
const OUTER_V6: u16 = 40 + 8;
/// Bytes around the padded inner packet of a data message.
const AROUND: u16 = (DATA_HEADER_LEN + TAG_LEN) as u16;

/// The table as control writes it. A line that stays half written, because its writer was killed
/// there, is as good as none: the peer roams.
pub struct EndpointTable(pub LineReader<abi::Endpoint>);

impl Paths for EndpointTable {
    fn path(&self, peer: PeerSlot) -> Option<Path> {
        let line = self.0.read(peer.0)?;
        match line.kind()? {
            EndpointKind::Direct => {
                let (local, ifindex) = (line.local(), line.ifindex);
                let endpoint = Endpoint { remote: line.remote()?, local, ifindex };
                Some(Path { endpoint, inner_len_max: inner_len_max(&line) })
            }
            // A stream carries every length.
            EndpointKind::Detour => {
                Some(Path { endpoint: Endpoint::detour(peer), inner_len_max: None })
            }
            // Nobody writes the second: there is no relay over UDP.
            EndpointKind::Unset | EndpointKind::PeerRelay => None,
        }
    }
}

/// What fits into the whole outer packet that the line says passes. Less than every path carries
/// that control uses is no statement.
fn inner_len_max(line: &abi::Endpoint) -> Option<u16> {
    let outer = if line.family == 6 { OUTER_V6 } else { OUTER_V4 };
    line.path_mtu.checked_sub(outer + AROUND).filter(|len| *len >= INNER_MTU_MIN)
}
