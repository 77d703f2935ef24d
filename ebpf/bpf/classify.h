/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The one rule that tells the protocols on our UDP port apart. XDP, the reuseport program and user
 * space (src/class.rs, its twin) all use it; tests/twins.rs proves that they agree.
 *
 * It sees the first 8 payload bytes and the UDP payload's length, nothing else. */
#ifndef MILLRACE_CLASSIFY_H
#define MILLRACE_CLASSIFY_H

enum class {
	CLASS_UNKNOWN,
	CLASS_WG_DATA,
	CLASS_WG_HANDSHAKE,
	CLASS_STUN,
	CLASS_DISCO,
	CLASS_GENEVE,
};

/* WireGuard paper, section 5.4: type, three zero bytes; lengths are exact but for data, where 32
 * is a keepalive. Full packets are padded to the MTU, so data lengths need not divide by 16. */
#define WG_INITIATION 1
#define WG_RESPONSE 2
#define WG_COOKIE_REPLY 3
#define WG_DATA 4
#define WG_INITIATION_LEN 148
#define WG_RESPONSE_LEN 92
#define WG_COOKIE_REPLY_LEN 64
#define WG_DATA_LEN_MIN 32

/* RFC 8489, section 5. */
#define STUN_HEADER_LEN 20
#define STUN_COOKIE 0x2112a442

/* Tailscale's disco envelope: magic, sender's key (32), nonce (24). */
#define DISCO_MAGIC 0x5453f09f92ac0000
#define DISCO_MAGIC_MASK 0xffffffffffff0000
#define DISCO_LEN_MIN 62

/* RFC 8926, section 3.4: version 0; the two protocol types are Tailscale's peer relay. */
#define GENEVE_HEADER_LEN 8
#define GENEVE_DISCO 0x7a11
#define GENEVE_WIREGUARD 0x7a12

/* The WireGuard message type that the first 4 bytes claim, or 0. Says nothing about lengths. */
static __always_inline __u32 wireguard_type(__u64 head)
{
	__u32 first = head >> 32;
	__u32 type = first >> 24;

	return (first & 0xffffff) == 0 && type <= WG_DATA ? type : 0;
}

/* The receiver index of a data message. */
static __always_inline __u32 wireguard_index(__u64 head)
{
	return __builtin_bswap32((__u32)head);
}

/* head: the first 8 payload bytes, the first one most significant. A payload shorter than 8 bytes
 * is unknown, whatever stands in head. */
static __always_inline enum class classify(__u64 head, __u32 length)
{
	if (length < 8)
		return CLASS_UNKNOWN;
	/* What claims to be WireGuard is WireGuard or nothing: it never reaches another protocol's
	 * parser because its index happens to look like a cookie. */
	switch (wireguard_type(head)) {
	case WG_DATA:
		return length >= WG_DATA_LEN_MIN ? CLASS_WG_DATA : CLASS_UNKNOWN;
	case WG_INITIATION:
		return length == WG_INITIATION_LEN ? CLASS_WG_HANDSHAKE : CLASS_UNKNOWN;
	case WG_RESPONSE:
		return length == WG_RESPONSE_LEN ? CLASS_WG_HANDSHAKE : CLASS_UNKNOWN;
	case WG_COOKIE_REPLY:
		return length == WG_COOKIE_REPLY_LEN ? CLASS_WG_HANDSHAKE : CLASS_UNKNOWN;
	}
	if ((head & DISCO_MAGIC_MASK) == DISCO_MAGIC)
		return length >= DISCO_LEN_MIN ? CLASS_DISCO : CLASS_UNKNOWN;
	/* STUN and Geneve (version 0) both begin with two zero bits. */
	if (head >> 62)
		return CLASS_UNKNOWN;
	if ((__u32)head == STUN_COOKIE)
		return length >= STUN_HEADER_LEN ? CLASS_STUN : CLASS_UNKNOWN;

	__u16 protocol = head >> 32;
	if (protocol == GENEVE_DISCO || protocol == GENEVE_WIREGUARD)
		return CLASS_GENEVE;
	return CLASS_UNKNOWN;
}

#endif
