/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Everything that crosses between the two programs and user space. src/abi.rs is its twin;
 * tests/layout.rs compares both through the object's BTF. Any change here raises ABI_VERSION. */
#ifndef MILLRACE_ABI_H
#define MILLRACE_ABI_H

#include "drops.h"

#define ABI_MAGIC 0x6d696c6c /* "mill" */
#define ABI_VERSION 6

/* Capacities. Those of peers and sessions are set by the loader; what stands here is the default.
 * That of sessions is a power of two. */
#define PEERS_MAX_DEFAULT 1024
#define SESSIONS_MAX_DEFAULT 8192
#define WORKERS_MAX 64
#define QUEUES_MAX 256
#define LOCAL_ADDRESSES_MAX 4096
/* Room in a stats line for reasons to come without a new layout. */
#define STATS_DROPS_MAX 64

/* Addresses that are compared before LOCAL_ADDRESSES is searched. */
#define NEAR_ADDRESSES_MAX 4

/* Handshakes that one IPv4 /32 or IPv6 /64 may send: one per interval, and a burst. Generous,
 * because many peers may share one address behind a NAT; user space is strict under load. */
#define HANDSHAKE_INTERVAL_NS 2000000
#define HANDSHAKE_BURST 512
/* Buckets are kept in sets; the set of a prefix is chosen by its hash. The number of sets is a
 * power of two. */
#define HANDSHAKE_SETS_BITS 12
#define HANDSHAKE_SETS (1 << HANDSHAKE_SETS_BITS)
#define HANDSHAKE_WAYS 4
/* Time is counted in 2^16 ns (66 us): 32 bits of it last 78 hours. */
#define HANDSHAKE_TICK_SHIFT 16

/* Slots of SOCKETS: workers first, then the two that are not workers; once for sockets that are
 * bound to IPv4, once for those bound to IPv6 (dual-stack ones too). */
#define SOCKET_SLOW WORKERS_MAX
#define SOCKET_CONTROL (WORKERS_MAX + 1)
#define SOCKETS_PER_FAMILY (WORKERS_MAX + 2)
#define SOCKETS_INET6 SOCKETS_PER_FAMILY

/* ABI[0]: read first, by everyone who opens the maps. */
struct abi {
	__u32 magic;
	__u32 version;
	__u32 endpoint_size;
	__u32 observed_size;
	__u32 session_size;
	__u32 drop_size;
	__u32 stats_size;
	__u32 peers_max;
	__u32 sessions_max;
	__u32 workers_max;
	__u32 queues_max;
	__u32 drops_count;
};

/* FLAGS[0]: a word that user space may change at any time. */
struct flags {
	/* SESSIONS holds every live index: an index that is not there is nobody's. */
	__u32 authoritative;
	/* LOCAL_ADDRESSES holds every address of this host: act on packets to these only. */
	__u32 local_addresses;
};

enum endpoint_kind {
	ENDPOINT_UNSET, /* classic WireGuard: answer where the peer last spoke from */
	ENDPOINT_DIRECT,
	ENDPOINT_PEER_RELAY, /* prefix stands before every message */
	ENDPOINT_DETOUR, /* hand the sealed message to control */
};

/* ENDPOINTS[peer slot]. Addresses are in network order, an IPv4 one in the first 4 bytes; ports,
 * as all numbers here, in host order. */
struct endpoint {
	__u32 seq; /* odd while being written */
	__u8 kind; /* enum endpoint_kind */
	__u8 family; /* 4, 6, or 0: no address */
	__u16 port;
	__u8 address[16];
	__u8 local[16]; /* source address to use; all zero: the kernel's choice */
	__u32 ifindex; /* 0: the kernel's choice */
	__u16 path_mtu; /* bytes of a whole outer packet; 0: not known */
	__u8 prefix_length;
	__u8 reserved;
	__u8 prefix[16];
};

/* OBSERVED[peer slot]. Times are CLOCK_MONOTONIC, 0: never. */
struct observed {
	__u32 seq;
	__u8 family; /* 4, 6, or 0: no address */
	__u8 kind; /* unset: nothing authenticated yet; direct; detour */
	__u16 port;
	__u8 address[16];
	__u8 local[16];
	__u32 ifindex;
	__u32 reserved2;
	__u64 received_ns;
	__u64 sent_ns;
	__u64 handshake_ns;
	__u64 received_bytes;
	__u64 sent_bytes;
	__u64 unanswered_ns;
	__u64 reserved3[4];
};

/* SESSIONS[receiver index modulo sessions_max]. The data plane never has two live indices in one
 * place: the low bits of an index are its place, the others are random. */
struct session {
	__u32 index;
	__u32 live; /* 0: the place is free */
	__u32 peer_slot;
	__u32 worker;
};

/* DROPS[reason], one per CPU. Bytes are those of whole frames. PASSED[0] likewise: data messages of
 * live sessions that came on a queue without an AF_XDP socket. They went to the kernel: no drop. */
struct drop_count {
	__u64 packets;
	__u64 bytes;
};

/* STATS[worker]. Each number has one writer and is read alone: no seq. */
struct stats {
	__u64 heartbeat_ns; /* CLOCK_MONOTONIC of the worker's last batch */
	__u64 received_packets;
	__u64 received_bytes;
	__u64 received_batches;
	__u64 sent_packets;
	__u64 sent_bytes;
	__u64 sent_batches;
	__u64 reserved;
	__u64 drops[STATS_DROPS_MAX]; /* by reason */
};

/* HANDSHAKES[set]: token buckets of source prefixes. Each is one word, written at once: who it is
 * for (32 more bits of the prefix's hash) above the tick at which it will be full again. A bucket
 * that is full is as good as none, so an old word needs no removal. */
struct handshake_set {
	__u64 buckets[HANDSHAKE_WAYS];
};

/* NEAR_ADDRESSES[0]: those of LOCAL_ADDRESSES to which most packets go; all zero: none. */
struct near_addresses {
	struct address {
		__u32 word[4]; /* IPv4 as IPv4-mapped IPv6 */
	} addresses[NEAR_ADDRESSES_MAX];
};

#define DROP_VALUE(name, sentence) DROP_##name,
enum drop { MILLRACE_DROPS(DROP_VALUE) DROPS_COUNT };
#undef DROP_VALUE

_Static_assert(sizeof(struct endpoint) == 64, "one cache line");
_Static_assert(sizeof(struct observed) == 128, "two cache lines");
_Static_assert(DROPS_COUNT <= STATS_DROPS_MAX, "a stats line has room for every reason");

#endif
