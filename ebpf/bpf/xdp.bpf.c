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
	/* The /64, or an IPv4 address under ffff:ffff::/32, which is multicast and no source. */
	__u64 source_prefix;
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

/* A packet to our port may be on its way through us to another host. Searching the whole set costs
 * as much as all the rest of the program, so the few that nearly all packets go to come first. */
static __always_inline int is_for_this_host(const struct flags *flags,
					    const struct datagram *datagram)
{
	const struct address *destination = &datagram->destination;
	__u32 zero = 0;

	if (!flags->local_addresses)
		return 1;

	const struct near_addresses *near = bpf_map_lookup_elem(&NEAR_ADDRESSES, &zero);
	for (int i = 0; near && i < NEAR_ADDRESSES_MAX; i++) {
		const struct address *own = &near->addresses[i];
		if (own->word[3] == destination->word[3] && own->word[2] == destination->word[2] &&
		    own->word[1] == destination->word[1] && own->word[0] == destination->word[0])
			return 1;
	}
	return bpf_map_lookup_elem(&LOCAL_ADDRESSES, destination) != 0;
}

/* Ticks until a bucket is full. One that was never used, or so long ago that the clock's 32 bits
 * came round, would seem to wait for longer than any can: it is full. */
static __always_inline __u32 ticks_to_full(__u64 bucket, __u32 now)
{
	__u32 left = (__u32)bucket - now;

	return left > bucket_ticks ? 0 : left;
}

/* Takes one handshake out of the prefix's bucket; 0 if it was empty.
 *
 * Two prefixes share a bucket only if 44 bits of their hashes agree, which for any two has a
 * probability of 2^-43 (multiply-shift hashing with a secret factor). In a set without room the
 * bucket nearest to full is given away: a flood of sources that each send once displaces its own,
 * and one that is in debt stays in debt. Nobody loses a token by another's packets. CPUs take no
 * lock: when two write one word at the same moment, one handshake is not counted. */
static __always_inline int take_handshake(__u64 prefix)
{
	__u64 hash = prefix * handshake_hash;
	__u32 set_index = hash >> (64 - HANDSHAKE_SETS_BITS);
	__u32 tag = hash >> (32 - HANDSHAKE_SETS_BITS);
	/* Every call of a clock costs more than all the rest here; the verifier makes this a load. */
	__u32 now = bpf_jiffies64() * jiffy_ns >> HANDSHAKE_TICK_SHIFT;
	struct handshake_set *set = bpf_map_lookup_elem(&HANDSHAKES, &set_index);

	if (!set)
		return 1;

	volatile __u64 *bucket = &set->buckets[0];
	__u32 left = 0, least = ~0U;
	for (int i = 0; i < HANDSHAKE_WAYS; i++) {
		__u64 seen = *(volatile __u64 *)&set->buckets[i];
		__u32 its_left = ticks_to_full(seen, now);

		if (seen >> 32 == tag) {
			bucket = &set->buckets[i];
			left = its_left;
			break;
		}
		if (its_left < least) {
			bucket = &set->buckets[i];
			least = its_left;
		}
	}
	left += handshake_ticks;
	if (left > bucket_ticks)
		return 0;
	*bucket = (__u64)tag << 32 | (__u32)(now + left);
	return 1;
}

/* To the AF_XDP socket of the queue, or to the kernel if it has none. Whether a socket has room is
 * known only after this program; the socket counts what it could not take. */
static __always_inline int to_ring(struct xdp_md *context, __u64 bytes)
{
	int verdict = bpf_redirect_map(&XSKS, context->rx_queue_index, XDP_PASS);

	if (verdict == XDP_PASS)
		count_passed(bytes);
	return verdict;
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
			return to_ring(context, end - frame);
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
