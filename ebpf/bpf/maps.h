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
/* What a handshake takes out of a bucket and what a full bucket holds, in ticks. The second is at
 * least the first and less than 2^31. */
const volatile __u32 handshake_ticks = 0;
const volatile __u32 bucket_ticks = 0;
/* Time between two ticks of the kernel. */
const volatile __u32 jiffy_ns = 1;
/* Odd and secret: nobody outside can choose prefixes that meet in one bucket. */
const volatile __u64 handshake_hash = 1;

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

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct drop_count);
} PASSED SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, LOCAL_ADDRESSES_MAX);
	__type(key, struct address);
	__type(value, __u8);
} LOCAL_ADDRESSES SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct near_addresses);
} NEAR_ADDRESSES SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, HANDSHAKE_SETS);
	__type(key, __u32);
	__type(value, struct handshake_set);
} HANDSHAKES SEC(".maps");

static __always_inline void count_one(struct drop_count *count, __u64 bytes)
{
	if (!count)
		return;
	count->packets += 1;
	count->bytes += bytes;
}

static __always_inline void count_drop(enum drop reason, __u64 bytes)
{
	__u32 key = reason;

	count_one(bpf_map_lookup_elem(&DROPS, &key), bytes);
}

static __always_inline void count_passed(__u64 bytes)
{
	__u32 zero = 0;

	count_one(bpf_map_lookup_elem(&PASSED, &zero), bytes);
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
