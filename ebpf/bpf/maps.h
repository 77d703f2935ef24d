/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The maps, and the constants that the loader sets before the programs are verified. */
#ifndef MILLRACE_MAPS_H
#define MILLRACE_MAPS_H

#include "abi.h"

/* Our UDP port in network order. 0 matches nothing. */
const volatile __u16 own_port = 0;
/* Workers that have sockets. */
const volatile __u32 workers = 1;
/* Sessions that the table holds, less one. */
const volatile __u32 session_mask = SESSIONS_MAX_DEFAULT - 1;
const volatile __u64 handshake_interval_ns = HANDSHAKE_INTERVAL_NS;
const volatile __u64 handshake_burst = HANDSHAKE_BURST;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct abi);
} ABI SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flags);
} FLAGS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, PEERS_MAX_DEFAULT);
	__type(key, __u32);
	__type(value, struct endpoint);
} ENDPOINTS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, PEERS_MAX_DEFAULT);
	__type(key, __u32);
	__type(value, struct observed);
} OBSERVED SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, WORKERS_MAX);
	__type(key, __u32);
	__type(value, struct stats);
} STATS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SESSIONS_MAX_DEFAULT);
	__type(key, __u32);
	__type(value, struct session);
} SESSIONS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, QUEUES_MAX);
	__type(key, __u32);
	__type(value, __u32);
} XSKS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, 2 * SOCKETS_PER_FAMILY);
	__type(key, __u32);
	__type(value, __u32);
} SOCKETS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DROPS_COUNT);
	__type(key, __u32);
	__type(value, struct drop_count);
} DROPS SEC(".maps");

/* Key: 16 address bytes, IPv4 as IPv4-mapped IPv6. */
struct address {
	__u32 word[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, LOCAL_ADDRESSES_MAX);
	__type(key, struct address);
	__type(value, __u8);
} LOCAL_ADDRESSES SEC(".maps");

/* Key: the /64, or an IPv4 address under ffff:ffff::/32, which is multicast and no source. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, HANDSHAKE_PREFIXES_MAX);
	__type(key, __u64);
	__type(value, struct bucket);
} HANDSHAKES SEC(".maps");

static __always_inline void count_drop(enum drop reason, __u64 bytes)
{
	__u32 key = reason;
	struct drop_count *count = bpf_map_lookup_elem(&DROPS, &key);

	if (!count)
		return;
	count->packets += 1;
	count->bytes += bytes;
}

/* The live session of a receiver index, or none. */
static __always_inline const struct session *find_session(__u32 index)
{
	__u32 place = index & session_mask;
	const struct session *session = bpf_map_lookup_elem(&SESSIONS, &place);

	return session && session->index == index && session->live ? session : 0;
}

static __always_inline const struct flags *read_flags(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&FLAGS, &zero);
}

#endif
