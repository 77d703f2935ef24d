/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* One object, so that both programs share their maps without pins. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "abi.h"
#include "classify.h"
#include "maps.h"

#include "xdp.bpf.c"
#include "reuseport.bpf.c"

/* No helper that we call asks for a GPL-compatible licence. */
char LICENSE[] SEC("license") = "MIT OR Apache-2.0";
