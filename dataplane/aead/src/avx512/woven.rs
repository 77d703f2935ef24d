//! ChaCha20's rounds on two sets of registers, with Poly1305 of two texts woven in. Vector code uses
//! two of the six instructions that a core takes a cycle; ten blocks of scalar Poly1305 fit beside
//! the 192 vector instructions of a double round and cost next to nothing there.
//!
//! Assembly, because the compiler would put all scalar instructions before all others, further apart
//! than the CPU looks ahead, and move states to the stack (docs/decisions/0009).
//!
//! Constant time: no branch but on the number of rounds, no address that depends on a secret.
//! `mulx` and `imul` take the same time for all operands (docs/aead.md).

use std::arch::asm;
use std::arch::x86_64::__m512i;
use std::{ptr, slice};

use super::mac::Mac;

/// Bytes of each of two texts that go into a double round: five blocks of Poly1305.
pub(super) const PART_LEN: usize = 80;

/// What a number of double rounds takes with it: a part of each of two texts. Assembly reads it.
/// Addresses are exposed: both runs of a pair have the same `macs`.
#[repr(C)]
pub(super) struct Run {
    /// Of a `[Mac; 2]`.
    pub(super) macs: usize,
    /// Where the parts begin.
    pub(super) texts: [usize; 2],
    /// At least one.
    pub(super) double_rounds: usize,
}

impl Run {
    /// Without rounds.
    ///
    /// # Safety
    ///
    /// `macs` can be read and written, and as many times [`PART_LEN`] bytes as there are double rounds
    /// can be read of both texts.
    pub(super) unsafe fn work_alone(&self) {
        let len = self.double_rounds * PART_LEN;
        // SAFETY: the caller says so.
        let (macs, first, second) = unsafe {
            (
                &mut *ptr::with_exposed_provenance_mut::<[Mac; 2]>(self.macs),
                slice::from_raw_parts(ptr::with_exposed_provenance(self.texts[0]), len),
                slice::from_raw_parts(ptr::with_exposed_provenance(self.texts[1]), len),
            )
        };
        let [mac, other] = macs;
        for (piece, other_piece) in first.as_chunks().0.iter().zip(second.as_chunks().0) {
            mac.add(piece);
            other.add(other_piece);
        }
    }
}

/// One block of 16 bytes: h = (h + 2^128 + block) · r modulo 2^130 - 5, in limbs of 64 bits and a
/// small third, below 8. As r's limbs are below 2^60, and 5/4 of the upper one below 2^61, no sum of
/// high halves passes 64 bits. `mulx` leaves the flags alone.
#[rustfmt::skip]
macro_rules! piece {
    ($h0:literal $h1:literal $h2:literal, $text:literal + $at:literal, $r0:literal $r1:literal $s1:literal) => {
        concat!(
            "add ", $h0, ",[", $text, "+", $at, "]\n",
            "adc ", $h1, ",[", $text, "+", $at, "+8]\n",
            "adc ", $h2, ",1\n",
            "mov rdx,", $h0, "\n",
            "mulx rbx,", $h0, ",[rdi+", $r0, "]\n",
            "mulx r15,r14,[rdi+", $r1, "]\n",
            "mov rdx,", $h1, "\n",
            "mulx rcx,rax,[rdi+", $s1, "]\n",
            "add ", $h0, ",rax\n",
            "adc rbx,rcx\n",
            "mulx rcx,", $h1, ",[rdi+", $r0, "]\n",
            "add ", $h1, ",r14\n",
            "adc r15,rcx\n",
            "mov rcx,", $h2, "\n",
            "imul rcx,[rdi+", $s1, "]\n",
            "imul ", $h2, ",[rdi+", $r0, "]\n",
            "add rbx,rcx\n",
            "add ", $h1, ",rbx\n",
            "adc r15,", $h2, "\n",
            // What is above 2^130 comes back times 5.
            "mov ", $h2, ",r15\n",
            "and ", $h2, ",3\n",
            "shr r15,2\n",
            "lea r15,[r15+r15*4]\n",
            "add ", $h0, ",r15\n",
            "adc ", $h1, ",0\n",
            "adc ", $h2, ",0\n",
        )
    };
}

// Of the two texts of a `Run`: rdi is its `macs`, rsi and rbp where its texts are.
#[rustfmt::skip]
macro_rules! first { ($at:literal) => { piece!("r8" "r9" "r10", "rsi" + $at, 24 32 40) }; }
#[rustfmt::skip]
macro_rules! second { ($at:literal) => { piece!("r11" "r12" "r13", "rbp" + $at, 72 80 88) }; }

/// A quarter of four quarter rounds side by side, on one set of registers.
macro_rules! half {
    ($bits:literal, $([$a:literal $b:literal $d:literal])*) => {
        concat!(
            $("vpaddd zmm", $a, ",zmm", $a, ",zmm", $b, "\n",)*
            $("vpxord zmm", $d, ",zmm", $d, ",zmm", $a, "\n",)*
            $("vprold zmm", $d, ",zmm", $d, ",", $bits, "\n",)*
        )
    };
}

/// As many double rounds as `runs` have.
///
/// # Safety
///
/// As for [`Run::work_alone`], of every run, and every run has a double round.
#[inline]
#[rustfmt::skip]
#[target_feature(enable = "avx512f,bmi2")]
pub(super) unsafe fn double_rounds(
    v: &mut [__m512i; 16],
    w: &mut [__m512i; 16],
    runs: &[Run],
) {
    if runs.is_empty() {
        return;
    }
    // SAFETY: each run reads of its texts, and reads and writes its `macs`, as the caller allows; the
    // layout of both is that of C. Beside them only registers and
    // five words of the stack are written. `rbx` and `rbp`, which no operand may name, are given back.
    unsafe {
        asm!(
            "push rbx",
            "push rbp",
            "push rdx", // How many runs.
            "push rax", // The run.
            "push rax", // Its double rounds.
            "3:",
            "mov rdx,[rsp+8]",
            "mov rdi,[rdx]",
            "mov rsi,[rdx+8]",
            "mov rbp,[rdx+16]",
            "mov rax,[rdx+24]",
            "mov [rsp],rax",
            "mov r8,[rdi]", "mov r9,[rdi+8]", "mov r10,[rdi+16]",
            "mov r11,[rdi+48]", "mov r12,[rdi+56]", "mov r13,[rdi+64]",
            ".p2align 6",
            "2:",
            half!(16, [0 4 12] [1 5 13] [2 6 14] [3 7 15]),
            first!(0),
            half!(16, [16 20 28] [17 21 29] [18 22 30] [19 23 31]),
            half!(12, [8 12 4] [9 13 5] [10 14 6] [11 15 7]),
            second!(0),
            half!(12, [24 28 20] [25 29 21] [26 30 22] [27 31 23]),
            first!(16),
            half!(8, [0 4 12] [1 5 13] [2 6 14] [3 7 15]),
            half!(8, [16 20 28] [17 21 29] [18 22 30] [19 23 31]),
            second!(16),
            half!(7, [8 12 4] [9 13 5] [10 14 6] [11 15 7]),
            first!(32),
            half!(7, [24 28 20] [25 29 21] [26 30 22] [27 31 23]),
            second!(32),
            half!(16, [0 5 15] [1 6 12] [2 7 13] [3 4 14]),
            first!(48),
            half!(16, [16 21 31] [17 22 28] [18 23 29] [19 20 30]),
            half!(12, [10 15 5] [11 12 6] [8 13 7] [9 14 4]),
            second!(48),
            half!(12, [26 31 21] [27 28 22] [24 29 23] [25 30 20]),
            first!(64),
            half!(8, [0 5 15] [1 6 12] [2 7 13] [3 4 14]),
            half!(8, [16 21 31] [17 22 28] [18 23 29] [19 20 30]),
            second!(64),
            half!(7, [10 15 5] [11 12 6] [8 13 7] [9 14 4]),
            half!(7, [26 31 21] [27 28 22] [24 29 23] [25 30 20]),
            "add rsi,{len}",
            "add rbp,{len}",
            "dec qword ptr [rsp]",
            "jnz 2b",
            "mov [rdi],r8", "mov [rdi+8],r9", "mov [rdi+16],r10",
            "mov [rdi+48],r11", "mov [rdi+56],r12", "mov [rdi+64],r13",
            "add qword ptr [rsp+8],{size}",
            "dec qword ptr [rsp+16]",
            "jnz 3b",
            "add rsp,24",
            "pop rbp",
            "pop rbx",
            len = const PART_LEN,
            size = const size_of::<Run>(),
            inout("rax") runs.as_ptr() => _,
            inout("rdx") runs.len() => _,
            out("rdi") _, out("rsi") _,
            out("rcx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _,
            out("r13") _, out("r14") _, out("r15") _,
            inout("zmm0") v[0], inout("zmm1") v[1], inout("zmm2") v[2], inout("zmm3") v[3],
            inout("zmm4") v[4], inout("zmm5") v[5], inout("zmm6") v[6], inout("zmm7") v[7],
            inout("zmm8") v[8], inout("zmm9") v[9], inout("zmm10") v[10], inout("zmm11") v[11],
            inout("zmm12") v[12], inout("zmm13") v[13], inout("zmm14") v[14], inout("zmm15") v[15],
            inout("zmm16") w[0], inout("zmm17") w[1], inout("zmm18") w[2], inout("zmm19") w[3],
            inout("zmm20") w[4], inout("zmm21") w[5], inout("zmm22") w[6], inout("zmm23") w[7],
            inout("zmm24") w[8], inout("zmm25") w[9], inout("zmm26") w[10], inout("zmm27") w[11],
            inout("zmm28") w[12], inout("zmm29") w[13], inout("zmm30") w[14], inout("zmm31") w[15],
        );
    }
}

/// # Safety
///
/// As for [`double_rounds`].
#[cfg(test)]
#[target_feature(enable = "avx512f,bmi2")]
pub(super) unsafe fn double_rounds_of_nobody(runs: &[Run]) {
    let zero = std::arch::x86_64::_mm512_setzero_si512();
    // SAFETY: the caller says so.
    unsafe { double_rounds(&mut [zero; 16], &mut [zero; 16], runs) };
}
