/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* SK_REUSEPORT: chooses the socket of our port's group for what comes through the kernel.
 *
 * The kernel may hand over a run of datagrams as one (GRO), and tells only the sum of their
 * lengths. So WireGuard messages are told by their type alone here, and by the first of the run;
 * the data plane classifies each segment by the whole rule. Everything else goes by the whole rule.
 *
 * A WireGuard message never goes to control, not even if the data plane has no socket left: then
 * the kernel answers port unreachable, which is the truth. */

/* Slot in the group of sockets that this packet came to: IPv4 sockets first, because a dual-stack
 * socket, which also gets IPv4, stands among those of IPv6. */
static __always_inline int select(struct sk_reuseport_md *context, __u32 slot)
{
	if (context->eth_protocol == bpf_htons(0x0800) &&
	    !bpf_sk_select_reuseport(context, &SOCKETS, &slot, 0))
		return 1;
	slot += SOCKETS_INET6;
	return !bpf_sk_select_reuseport(context, &SOCKETS, &slot, 0);
}

/* Where the worthless goes: to some worker, which counts and drops it. One flow stays with one
 * worker; a flood from many spreads, and never fills the buffer in which handshakes wait. */
static __always_inline __u32 flow_worker(struct sk_reuseport_md *context)
{
	return workers ? context->hash % workers : 0;
}

/* The worker that owns the session. */
static __always_inline __u32 worker_of(struct sk_reuseport_md *context, __u32 index)
{
	const struct session *session = find_session(index);

	if (session && session->worker < WORKERS_MAX)
		return session->worker;
	return flow_worker(context);
}

SEC("sk_reuseport")
int millrace_reuseport(struct sk_reuseport_md *context)
{
	__u64 head = 0;
	__u32 length = context->len > 8 ? context->len - 8 : 0;
	__u32 slot = SOCKET_CONTROL;

	/* The payload may lie outside of the linear part, so it is copied, not pointed to. */
	if (length >= 8 && bpf_skb_load_bytes(context, 8, &head, sizeof(head)))
		head = 0;
	head = bpf_be64_to_cpu(head);

	switch (wireguard_type(head)) {
	case WG_DATA:
		if (select(context, worker_of(context, wireguard_index(head))))
			return SK_PASS;
		break;
	case WG_INITIATION:
	case WG_RESPONSE:
	case WG_COOKIE_REPLY:
		break;
	default:
		if (classify(head, length) == CLASS_UNKNOWN)
			slot = flow_worker(context);
		if (select(context, slot))
			return SK_PASS;
	}
	if (select(context, SOCKET_SLOW) || select(context, 0))
		return SK_PASS;
	return SK_DROP;
}
