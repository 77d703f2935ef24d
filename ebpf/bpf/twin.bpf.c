/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* For tests and benches only, never shipped: the rule by itself, and a program that does nothing,
 * which shows what a test run costs without us. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "abi.h"
#include "classify.h"

/* Nothing else would bring these into the object's BTF. */
enum class every_class;
enum drop every_drop;
enum endpoint_kind every_kind;

/* The input is no frame: length (host order, 4 bytes), then the first 8 payload bytes. */
SEC("xdp")
int twin_classify(struct xdp_md *context)
{
	const __u8 *input = (const __u8 *)(long)context->data;

	if (input + 12 > (const __u8 *)(long)context->data_end)
		return -1;
	return classify(bpf_be64_to_cpu(*(const __u64 *)(input + 4)), *(const __u32 *)input);
}

SEC("xdp")
int twin_empty(struct xdp_md *context)
{
	(void)context;
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "MIT OR Apache-2.0";
