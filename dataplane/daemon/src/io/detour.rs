//! The data plane's ends of the detours: sealed runs to control, and runs that control received.
//!
//! The pairs live as long as the process, and it keeps both ends of each: a new control gets those
//! of the old one, emptied. Whether anybody reads is said by a flag.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use millrace_config::limits::PEERS_MAX;
use millrace_ebpf::link::{DetourSocket, Run, detour};
use millrace_wg::{Drop, DropCounters, PeerSlot};

/// One thread's end of its pair.
pub struct Detour {
    socket: DetourSocket,
    attended: Arc<AtomicBool>,
    buffer: Box<[u8]>,
}

/// The other ends, for control.
pub struct Counterparts {
    /// The slow thread's first, then those of the workers.
    pub sockets: Vec<DetourSocket>,
    attended: Arc<AtomicBool>,
}

/// Makes `count` pairs.
pub fn pairs(count: usize) -> io::Result<(Vec<Detour>, Counterparts)> {
    let attended = Arc::new(AtomicBool::new(false));
    let (mut ours, mut sockets) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for _ in 0..count {
        let (socket, theirs) = DetourSocket::pair()?;
        let buffer = vec![0; detour::BUFFER_LEN].into_boxed_slice();
        ours.push(Detour { socket, attended: Arc::clone(&attended), buffer });
        sockets.push(theirs);
    }
    Ok((ours, Counterparts { sockets, attended }))
}

impl Detour {
    /// Sends a run of messages to `peer`. Never waits; what does not go is counted.
    pub fn send(&self, peer: PeerSlot, segment_len: usize, bytes: &[u8], drops: &DropCounters) {
        let lost = if !self.attended.load(Ordering::Acquire) {
            Drop::DetourGone
        } else {
            match self.socket.send(peer.0, segment_len as u16, bytes) {
                Ok(()) => return,
                // Full, or no memory for it.
                Err(_) => Drop::DetourFull,
            }
        };
        drops.add(lost, bytes.len().div_ceil(segment_len.max(1)) as u64);
    }

    /// The next run that control received, and whether there may be more. What is none is counted.
    pub fn receive(&mut self, drops: &DropCounters) -> Option<Option<(PeerSlot, Run<'_>)>> {
        let datagram = self.socket.receive(&mut self.buffer).ok()??;
        let run = Run::parse(datagram).filter(|run| (run.slot as usize) < PEERS_MAX);
        if run.is_none() {
            drops.add(Drop::DetourInvalid, 1);
        }
        Some(run.map(|run| (PeerSlot(run.slot), run)))
    }
}

impl AsFd for Detour {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Counterparts {
    /// Somebody reads from now on, and gets nothing of what was meant for an earlier reader.
    pub fn attend(&self, drops: &DropCounters) {
        self.empty(drops);
        self.attended.store(true, Ordering::Release);
    }

    /// Nobody reads any more.
    pub fn leave(&self, drops: &DropCounters) {
        self.attended.store(false, Ordering::Release);
        self.empty(drops);
    }

    fn empty(&self, drops: &DropCounters) {
        let mut buffer = vec![0; detour::BUFFER_LEN];
        for socket in &self.sockets {
            while let Ok(Some(datagram)) = socket.receive(&mut buffer) {
                let messages = Run::parse(datagram).map_or(0, |mut run| run.messages().count());
                drops.add(Drop::DetourGone, messages as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_only_where_somebody_reads() {
        let (mut ours, theirs) = pairs(2).unwrap();
        let drops = DropCounters::default();
        ours[1].send(PeerSlot(7), 100, &[4; 250], &drops);
        assert_eq!(drops.get(Drop::DetourGone), 3);
        theirs.attend(&drops);
        ours[1].send(PeerSlot(7), 100, &[4; 250], &drops);
        let mut buffer = vec![0; detour::BUFFER_LEN];
        let run = Run::parse(theirs.sockets[1].receive(&mut buffer).unwrap().unwrap()).unwrap();
        assert_eq!((run.slot, run.segment_len, run.bytes.len()), (7, 100, 250));
        ours[1].send(PeerSlot(7), 100, &[4; 250], &drops);
        theirs.leave(&drops);
        theirs.attend(&drops);
        assert!(theirs.sockets[1].receive(&mut buffer).unwrap().is_none(), "emptied");
        while drops.get(Drop::DetourFull) == 0 {
            ours[1].send(PeerSlot(7), 1000, &[4; 50_000], &drops);
        }
        assert_eq!((drops.get(Drop::DetourFull), drops.get(Drop::DetourGone)), (50, 6));

        theirs.sockets[0].send(9, 50, &[1; 148]).unwrap();
        let (slot, run) = ours[0].receive(&drops).unwrap().unwrap();
        assert_eq!((slot, run.segment_len, run.bytes.len()), (PeerSlot(9), 50, 148));
        theirs.sockets[0].send(PEERS_MAX as u32, 50, &[1; 148]).unwrap();
        theirs.sockets[0].send(1, 149, &[1; 148]).unwrap();
        assert!(ours[0].receive(&drops).unwrap().is_none());
        assert!(ours[0].receive(&drops).unwrap().is_none());
        assert!(ours[0].receive(&drops).is_none());
        assert_eq!(drops.get(Drop::DetourInvalid), 2);
    }
}
