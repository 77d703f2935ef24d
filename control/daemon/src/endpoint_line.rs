//! A route as the data plane reads it from ENDPOINTS, and back after we were restarted.

use std::net::{IpAddr, SocketAddr};

use millrace_ebpf::abi::{Endpoint, EndpointKind};
use millrace_path::output::Route;

use crate::udp::Source;

/// Bytes of the headers before a UDP payload.
const HEADERS_V4: usize = 28;
const HEADERS_V6: usize = 48;

/// The line of a peer. `source`: the address and interface that a direct path was proven from.
pub fn line(route: Route, source: Source) -> Endpoint {
    let mut line = Endpoint::default();
    match route {
        Route::Unset => line.kind = EndpointKind::Unset as u8,
        Route::Relay => line.kind = EndpointKind::Detour as u8,
        Route::Direct { pair, frame_len } => {
            line.kind = EndpointKind::Direct as u8;
            line.set_remote(pair.remote);
            if let Some(ip) = source.ip.filter(|ip| ip.is_ipv4() == pair.remote.is_ipv4()) {
                line.set_local(ip);
            }
            line.ifindex = source.ifindex;
            let headers = if pair.remote.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 };
            // Not known of a path that was taken over.
            let known = (frame_len > 0).then_some(frame_len + headers);
            line.path_mtu = known.map_or(0, |mtu| u16::try_from(mtu).unwrap_or(u16::MAX));
        }
    }
    line
}

/// The path that a line names, if it is a direct one: to where, from which address and interface.
pub fn in_use(line: &Endpoint) -> Option<(SocketAddr, Option<IpAddr>, u32)> {
    (line.kind() == Some(EndpointKind::Direct)).then_some(())?;
    Some((line.remote()?, line.local(), line.ifindex))
}

#[cfg(test)]
mod tests {
    use millrace_path::path::{Pair, UplinkId};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_direct_line_reads_back(remote: SocketAddr, ifindex: u32, frame_len in 0_usize..70_000) {
            let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
            let route = Route::Direct { pair: Pair { uplink: UplinkId(0), remote }, frame_len };
            let source = Source { ip: None, ifindex };
            prop_assert_eq!(in_use(&line(route, source)), Some((remote, None, ifindex)));
        }
    }

    #[test]
    fn a_length_that_is_not_known_is_not_written() {
        let remote = "192.0.2.1:51820".parse().unwrap();
        let pair = Pair { uplink: UplinkId(0), remote };
        let mtu = |frame_len| line(Route::Direct { pair, frame_len }, Source::default()).path_mtu;
        assert_eq!((mtu(0), mtu(1452)), (0, 1480));
    }

    #[test]
    fn only_direct_lines_name_a_path() {
        assert_eq!(in_use(&line(Route::Relay, Source::default())), None);
        assert_eq!(in_use(&line(Route::Unset, Source::default())), None);
    }
}
