/* The drop list: every reason for which millrace throws a packet away, in XDP or in user space.
 * One row makes the C enum, the Rust enum, the counter's name and the sentence that `status`
 * prints. Append at the end of a group; the numbers are not stable between versions (ABI version
 * and this list travel together). */
#ifndef MILLRACE_DROPS_H
#define MILLRACE_DROPS_H

#define MILLRACE_DROPS(X) \
	/* XDP */ \
	X(xdp_unknown_class, "A packet to our port is no protocol that we speak.") \
	X(xdp_unknown_index, "A data packet names a receiver index that no session has.") \
	X(xdp_handshake_rate, "A source prefix sends more handshakes than its token bucket allows.") \
	X(xdp_redirect_failed, "A data packet for an AF_XDP ring found no free frame, or was too long for one.") \
	X(xdp_ring_full, "An AF_XDP receive ring was full: its worker was too slow.") \
	X(xdp_ring_closed, "A received packet waited in an AF_XDP ring when the ring was given up.") \
	X(xdp_descriptor_invalid, "An AF_XDP ring named a frame that the other side cannot have.") \
	/* receive */ \
	X(rx_socket_full, "A UDP socket's receive buffer was full, or a checksum was wrong.") \
	X(rx_truncated, "A message is shorter or longer than its type allows.") \
	X(rx_unknown_type, "A datagram is no WireGuard message.") \
	X(rx_unknown_index, "A data message names a receiver index that no session has.") \
	X(rx_session_expired, "A data message belongs to a session past its time or message limit.") \
	X(rx_auth_failed, "A data message did not verify under its session's key.") \
	X(rx_replayed, "A data message repeats a counter or is older than the replay window.") \
	X(rx_inner_version, "A decrypted packet is neither IPv4 nor IPv6.") \
	X(rx_inner_length, "A decrypted packet says that it is longer than what arrived.") \
	X(rx_source_not_allowed, "A peer sent from an inner address that is not in its allowed-ips.") \
	X(rx_ecn_invalid, "Outer ECN says congestion on a packet whose sender cannot hear it (RFC 6040).") \
	X(rx_gro_invalid, "The kernel reported a segment size that does not fit its datagram.") \
	X(rx_frame_invalid, "A frame from the AF_XDP ring has headers that contradict its length.") \
	/* transmit */ \
	X(tx_inner_invalid, "A packet from the TUN device is not a whole IP packet.") \
	X(tx_no_route, "No peer's allowed-ips covers the destination.") \
	X(tx_no_endpoint, "The peer has no known address yet.") \
	X(tx_too_long, "A packet that may not be cut is longer than the path to the peer carries; its sender was told how long.") \
	X(tx_loop, "The way to the peer leads into its own tunnel: what we sent came back.") \
	X(tx_no_session, "The queue of packets that wait for a handshake was full; the oldest went.") \
	X(tx_offload_invalid, "The TUN device's offload header contradicts its packet.") \
	X(tx_socket_error, "The kernel refused to send a datagram.") \
	X(tx_descriptor_invalid, "The kernel refused a frame in the AF_XDP transmit ring.") \
	/* tun */ \
	X(tun_queue_full, "The TUN device's queue was full: its worker was too slow.") \
	X(tun_write_failed, "The TUN device refused a packet.") \
	/* handshake */ \
	X(hs_mac1_invalid, "A handshake message was not made for our public key.") \
	X(hs_mac2_needed, "Under load a handshake came without a valid cookie; a cookie was sent.") \
	X(hs_rate_limited, "Under load a source prefix used up its handshakes.") \
	X(hs_queue_full, "Handshakes arrived faster than they could be worked on.") \
	X(hs_unknown_peer, "A handshake came from a public key that is not configured.") \
	X(hs_invalid, "A handshake message did not verify.") \
	X(hs_replayed, "A handshake initiation is not newer than the last one of its peer.") \
	X(hs_flood, "A peer starts handshakes more often than every 20 ms.") \
	X(hs_unexpected, "A handshake response or cookie answers nothing that we sent.") \
	/* slow thread */ \
	X(slow_queue_full, "The queue to the slow thread was full.") \
	X(interface_down, "The interface is down: no handshake is answered, no packet waits.") \
	/* control */ \
	X(detour_full, "The queue to control for detoured packets was full: control or its relay is too slow.") \
	X(detour_gone, "A packet was to go by control, which is not connected.") \
	X(detour_invalid, "Control handed in bytes that are no run of messages of a peer.") \
	X(control_absent, "STUN, disco or Geneve came while control was not connected.") \
	X(heard_too_fast, "Disco came past the host's firewall faster than control is told of it.")

#endif
