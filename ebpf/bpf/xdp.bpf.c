/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* XDP: takes data messages of live sessions to the AF_XDP ring of their queue and throws away what
 * cannot be for us. Whatever is not provably ours goes to the kernel untouched: other protocols,
 * fragments, IP options, extension headers, a second VLAN tag, lengths that do not add up.
 *
 * The checksums are not verified: data messages authenticate themselves. */

#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define VLAN_TAG_LEN 4
#define IPV4_VERSION_IHL_5 0x45
#define IPV4_FRAGMENT_MASK 0x3fff /* more fragments, offset */
#define IPV6_VERSION_MASK 0xf0
#define PROTOCOL_UDP 17

/* Frames are not aligned to what they contain; all machines that run this load unaligned words. */
#define LOAD16(from) (*(const __u16 *)(from))
#define LOAD32(from) (*(const __u32 *)(from))
#define LOAD64(from) (*(const __u64 *)(from))

/* What the rest of the program needs of a frame that is a well-formed UDP packet to our port. */
struct datagram {
	__u64 head; /* first 8 payload bytes, 0 if there are fewer */
	__u32 length; /* of the payload */
	__u64 source_prefix; /* key of HANDSHAKES */
	struct address destination;
};

/* Reads the UDP header at udp, whose IP payload has ip_payload bytes, all inside the frame. */
static __always_inline int parse_udp(const __u8 *udp, const __u8 *end, __u32 ip_payload,
				     struct datagram *datagram)
{
	/* A UDP length that leaves bytes over is legal, and nobody's real traffic: not ours. */
	if (ip_payload < 8 || bpf_ntohs(LOAD16(udp + 4)) != ip_payload)
		return -1;
	datagram->length = ip_payload - 8;
	datagram->head = 0;
	if (datagram->length >= 8 && udp + 16 <= end)
		datagram->head = bpf_be64_to_cpu(LOAD64(udp + 8));
	return 0;
}

static __always_inline int parse_ipv4(const __u8 *ip, const __u8 *end, struct datagram *datagram)
{
	if (ip + 28 > end || LOAD16(ip + 22) != own_port)
		return -1;
	if (ip[0] != IPV4_VERSION_IHL_5 || ip[9] != PROTOCOL_UDP)
		return -1;
	if (LOAD16(ip + 6) & bpf_htons(IPV4_FRAGMENT_MASK))
		return -1;

	__u32 total = bpf_ntohs(LOAD16(ip + 2));
	if (total < 28 || total > end - ip)
		return -1;
	datagram->source_prefix = 0xffffffff00000000 | LOAD32(ip + 12);
	datagram->destination.word[0] = 0;
	datagram->destination.word[1] = 0;
	datagram->destination.word[2] = bpf_htonl(0xffff);
	datagram->destination.word[3] = LOAD32(ip + 16);
	return parse_udp(ip + 20, end, total - 20, datagram);
}

static __always_inline int parse_ipv6(const __u8 *ip, const __u8 *end, struct datagram *datagram)
{
	if (ip + 48 > end || LOAD16(ip + 42) != own_port)
		return -1;
	if ((ip[0] & IPV6_VERSION_MASK) != 0x60 || ip[6] != PROTOCOL_UDP)
		return -1;

	__u32 payload = bpf_ntohs(LOAD16(ip + 4));
	if (payload > end - ip - 40)
		return -1;
	datagram->source_prefix = bpf_be64_to_cpu(LOAD64(ip + 8));
	__builtin_memcpy(&datagram->destination, ip + 24, sizeof(datagram->destination));
	return parse_udp(ip + 40, end, payload, datagram);
}

static __always_inline int parse(const __u8 *frame, const __u8 *end, struct datagram *datagram)
{
	/* The shortest frame that can hold IPv4 and UDP is longer than a tagged Ethernet header. */
	if (frame + 18 > end)
		return -1;

	__u16 ethertype = LOAD16(frame + 12);
	const __u8 *ip = frame + 14;
	if (ethertype == bpf_htons(ETHERTYPE_VLAN)) {
		ethertype = LOAD16(frame + 16);
		ip += VLAN_TAG_LEN;
	}
	if (ethertype == bpf_htons(ETHERTYPE_IPV4))
		return parse_ipv4(ip, end, datagram);
	if (ethertype == bpf_htons(ETHERTYPE_IPV6))
		return parse_ipv6(ip, end, datagram);
	return -1;
}

/* A packet to our port may be on its way through us to another host. */
static __always_inline int is_for_this_host(const struct flags *flags,
					    const struct datagram *datagram)
{
	return !flags->local_addresses ||
	       bpf_map_lookup_elem(&LOCAL_ADDRESSES, &datagram->destination);
}

/* Takes one handshake out of the prefix's bucket; 0 if it was empty. The bucket is one number,
 * the time at which it will be full again, so that CPUs need no lock. */
static __always_inline int take_handshake(__u64 prefix)
{
	__u64 now = bpf_ktime_get_coarse_ns();
	struct bucket *bucket = bpf_map_lookup_elem(&HANDSHAKES, &prefix);

	if (!bucket) {
		struct bucket fresh = { .full_at_ns = now + handshake_interval_ns };
		bpf_map_update_elem(&HANDSHAKES, &prefix, &fresh, BPF_ANY);
		return 1;
	}
	/* A lost race means that another CPU took one at the same moment; four in a row are a flood. */
	for (int attempt = 0; attempt < 4; attempt++) {
		__u64 seen = *(volatile __u64 *)&bucket->full_at_ns;
		__u64 full_at = (seen > now ? seen : now) + handshake_interval_ns;

		if (full_at > now + handshake_burst * handshake_interval_ns)
			return 0;
		if (__sync_val_compare_and_swap(&bucket->full_at_ns, seen, full_at) == seen)
			return 1;
	}
	return 0;
}

SEC("xdp")
int millrace_xdp(struct xdp_md *context)
{
	const __u8 *frame = (const __u8 *)(long)context->data;
	const __u8 *end = (const __u8 *)(long)context->data_end;
	struct datagram datagram;

	if (parse(frame, end, &datagram))
		return XDP_PASS;

	const struct flags *flags = read_flags();
	if (!flags || !is_for_this_host(flags, &datagram))
		return XDP_PASS;

	enum drop reason;
	switch (classify(datagram.head, datagram.length)) {
	case CLASS_WG_DATA:
		if (find_session(wireguard_index(datagram.head)))
			return bpf_redirect_map(&XSKS, context->rx_queue_index, XDP_PASS);
		if (!flags->authoritative)
			return XDP_PASS;
		reason = DROP_xdp_unknown_index;
		break;
	case CLASS_WG_HANDSHAKE:
		if (take_handshake(datagram.source_prefix))
			return XDP_PASS;
		reason = DROP_xdp_handshake_rate;
		break;
	case CLASS_STUN:
	case CLASS_DISCO:
	case CLASS_GENEVE:
		return XDP_PASS;
	default:
		reason = DROP_xdp_unknown_class;
	}
	count_drop(reason, end - frame);
	return XDP_DROP;
}
