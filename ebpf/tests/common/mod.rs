//! Frames to feed to the XDP program, and what it says of them. Shared by tests and the bench.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::programs::{TestRun as _, TestRunOptions, Xdp};

pub(crate) const PORT: u16 = 51820;
pub(crate) const XDP_DROP: u32 = 1;
pub(crate) const XDP_PASS: u32 = 2;
pub(crate) const XDP_REDIRECT: u32 = 4;

/// A UDP frame, every header of which a test may bend.
#[derive(Clone)]
pub(crate) struct Frame {
    pub(crate) tags: Vec<u16>,
    pub(crate) ethertype: Option<u16>,
    pub ipv6: bool,
    pub(crate) source: [u8; 16],
    pub(crate) destination: [u8; 16],
    pub(crate) version_ihl: u8,
    pub(crate) fragment: u16,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
    /// Added to the true IP length, UDP length.
    pub(crate) ip_length_lie: i32,
    pub(crate) udp_length_lie: i32,
    pub(crate) payload: Vec<u8>,
    pub(crate) padding: usize,
}

impl Frame {
    pub(crate) fn ipv4(payload: Vec<u8>) -> Self {
        let mut source = [0; 16];
        source[..4].copy_from_slice(&[192, 0, 2, 1]);
        let mut destination = [0; 16];
        destination[..4].copy_from_slice(&[198, 51, 100, 7]);
        Self {
            tags: vec![],
            ethertype: None,
            ipv6: false,
            source,
            destination,
            version_ihl: 0x45,
            fragment: 0,
            protocol: 17,
            port: PORT,
            ip_length_lie: 0,
            udp_length_lie: 0,
            payload,
            padding: 0,
        }
    }

    pub(crate) fn ipv6(payload: Vec<u8>) -> Self {
        let mut frame = Self { ipv6: true, version_ihl: 0x60, ..Self::ipv4(payload) };
        frame.source = [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        frame.destination = [0x20, 1, 0xd, 0xb8, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
        frame
    }

    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in &self.tags {
            bytes.extend(tag.to_be_bytes());
            bytes.extend([0, 42]);
        }
        let ethertype = self.ethertype.unwrap_or(if self.ipv6 { 0x86dd } else { 0x0800 });
        bytes.extend(ethertype.to_be_bytes());

        let udp_length = 8 + self.payload.len() as i32;
        let options = usize::from(self.version_ihl & 15).saturating_sub(5) * 4;
        if self.ipv6 {
            let length = (udp_length + self.ip_length_lie) as u16;
            bytes.extend([self.version_ihl, 0, 0, 0]);
            bytes.extend(length.to_be_bytes());
            bytes.extend([self.protocol, 64]);
            bytes.extend(self.source);
            bytes.extend(self.destination);
        } else {
            let length = (20 + options as i32 + udp_length + self.ip_length_lie) as u16;
            bytes.extend([self.version_ihl, 0]);
            bytes.extend(length.to_be_bytes());
            bytes.extend([0, 0]);
            bytes.extend(self.fragment.to_be_bytes());
            bytes.extend([64, self.protocol, 0, 0]);
            bytes.extend(&self.source[..4]);
            bytes.extend(&self.destination[..4]);
            bytes.extend(vec![1; options]);
        }
        bytes.extend(40000u16.to_be_bytes());
        bytes.extend(self.port.to_be_bytes());
        bytes.extend(((udp_length + self.udp_length_lie) as u16).to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(&self.payload);
        bytes.extend(vec![0; self.padding]);
        bytes
    }
}

/// A payload of `length` bytes that starts with `head`.
pub(crate) fn payload(head: &[u8], length: usize) -> Vec<u8> {
    let mut payload = vec![0xa5; length];
    let copied = head.len().min(length);
    payload[..copied].copy_from_slice(&head[..copied]);
    payload
}

pub(crate) fn data(index: u32, length: usize) -> Vec<u8> {
    let [a, b, c, d] = index.to_le_bytes();
    payload(&[4, 0, 0, 0, a, b, c, d], length)
}

pub(crate) fn initiation() -> Vec<u8> {
    payload(&[1, 0, 0, 0, 9, 9, 9, 9], 148)
}

pub(crate) fn stun() -> Vec<u8> {
    payload(&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42], 20)
}

pub(crate) fn disco() -> Vec<u8> {
    payload(&[0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac], 120)
}

pub(crate) fn geneve() -> Vec<u8> {
    payload(&[0, 0, 0x7a, 0x12, 0, 0, 1, 0], 48)
}

pub(crate) fn unknown() -> Vec<u8> {
    payload(b"GET / HTTP/1.1", 60)
}

/// One test run: verdict and the frame afterwards.
pub(crate) fn run(program: &Xdp, frame: &[u8]) -> (u32, Vec<u8>) {
    let mut out = vec![0; frame.len() + 64];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        })
        .expect("BPF_PROG_TEST_RUN");
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

/// The object with the bare rule and the empty program.
pub(crate) fn twin(program: &str) -> aya::Ebpf {
    let path = concat!(env!("OUT_DIR"), "/twin.bpf.o");
    let mut ebpf = aya::EbpfLoader::new().btf(None).load_file(path).expect("twin; run as root");
    let loaded: &mut Xdp = ebpf.program_mut(program).expect("in twin").try_into().expect("xdp");
    loaded.load().expect("load; run as root");
    ebpf
}

pub(crate) fn twin_program<'a>(ebpf: &'a aya::Ebpf, program: &str) -> &'a Xdp {
    ebpf.program(program).expect("in twin").try_into().expect("xdp")
}

/// Puts this thread into a network namespace of its own, which goes when the thread ends.
pub(crate) fn enter_own_network() {
    // SAFETY: a system call without pointers; it changes this thread only.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "unshare: {}; run as root", std::io::Error::last_os_error());
}

/// Held while a child is made, which has our descriptors until it is a program of its own; and by
/// who must know that what it closed is closed.
static SPAWNING: Mutex<()> = Mutex::new(());

pub(crate) fn nobody_spawns() -> MutexGuard<'static, ()> {
    SPAWNING.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn shell(command: &str) {
    let _alone = nobody_spawns();
    let output = std::process::Command::new("sh").args(["-c", command]).output().expect("sh");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}
