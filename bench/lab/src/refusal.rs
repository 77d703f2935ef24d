//! System calls that the kernel refuses a device, as an older or a hardened kernel would: by
//! seccomp, so that the program under test is the real one and cannot tell.

use std::{io, os::unix::process::CommandExt, process::Command};

/// One kind of call that fails.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// Number of the call, such as `libc::SYS_setsockopt`.
    pub call: libc::c_long,
    /// Which calls: all of these must hold.
    pub when: [Condition; 2],
    /// The error they end with.
    pub errno: i32,
}

/// What the low 32 bits of an argument (0 to 5) must be.
#[derive(Clone, Copy, Debug)]
pub enum Condition {
    Equals(u8, u32),
    AtLeast(u8, u32),
    /// One of these bits is set.
    Has(u8, u32),
}

/// Offsets in `struct seccomp_data`.
const CALL: u32 = 0;
const ARGUMENTS: u32 = 16;

/// Makes `command`, once it runs, see the calls fail.
pub fn apply(command: &mut Command, refusals: &[Refusal]) {
    if refusals.is_empty() {
        return;
    }
    let mut filter: Vec<_> = refusals.iter().flat_map(instructions).collect();
    filter.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW));
    let install = move || {
        let program =
            libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        // SAFETY: async-signal-safe; the program and its instructions outlive the call, which
        // copies them.
        let done = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec `install` allocates nothing and takes no lock.
    unsafe { command.pre_exec(install) };
}

/// Compares from the call on; the first thing that differs leads behind the last instruction.
fn instructions(refusal: &Refusal) -> Vec<libc::sock_filter> {
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let mut tests = vec![(CALL, libc::BPF_JEQ, refusal.call as u32)];
    tests.extend(refusal.when.iter().map(|condition| match *condition {
        Condition::Equals(at, value) => (ARGUMENTS + 8 * u32::from(at), libc::BPF_JEQ, value),
        Condition::AtLeast(at, value) => (ARGUMENTS + 8 * u32::from(at), libc::BPF_JGE, value),
        Condition::Has(at, bits) => (ARGUMENTS + 8 * u32::from(at), libc::BPF_JSET, bits),
    }));
    let count = tests.len();
    let mut all = Vec::new();
    for (number, (offset, comparison, value)) in tests.into_iter().enumerate() {
        all.push(statement(load, offset));
        let code = (libc::BPF_JMP | comparison | libc::BPF_K) as u16;
        // The comparisons after this one, two instructions each, and the verdict.
        let jf = 2 * (count - number - 1) as u8 + 1;
        all.push(libc::sock_filter { code, jt: 0, jf, k: value });
    }
    all.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | refusal.errno as u32));
    all
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}
