//! An AF_XDP endpoint whose rings, memory and XDP program are not ours (xsk-rs on libxdp): the
//! generator and the sink that our own rings are tested against. Copy mode, one queue.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use xsk_rs::config::{BindFlags, SocketConfig, UmemConfig, XdpFlags};
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::{CompQueue, FillQueue, RxQueue, Socket, TxQueue, Umem};

use crate::{Error, Result};

/// Frames of each direction.
const FRAMES: usize = 1024;
/// Frames that one call gives to the kernel.
const BURST: usize = 64;

/// An endpoint on one queue of an interface of the calling thread's namespace.
pub struct XskPeer {
    umem: Umem,
    tx: TxQueue,
    rx: RxQueue,
    fill: FillQueue,
    completion: CompQueue,
    idle: Vec<FrameDesc>,
}

impl XskPeer {
    /// Attaches libxdp's program, which takes every frame of the queue, and binds to it.
    pub fn new(interface: &str, queue: u32) -> Result<Self> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Error::Unexpected(format!("{what} {interface} queue {queue}: {error}"))
        };
        let count = NonZeroU32::new(2 * FRAMES as u32).unwrap_or(NonZeroU32::MIN);
        let (umem, mut descriptors) = Umem::new(UmemConfig::default(), count, false)
            .map_err(|error| failed("packet memory for", &error))?;
        let config = SocketConfig::builder()
            .xdp_flags(XdpFlags::XDP_FLAGS_DRV_MODE)
            .bind_flags(BindFlags::XDP_COPY | BindFlags::XDP_USE_NEED_WAKEUP)
            .build();
        let name = interface.parse().map_err(|error| failed("the name of", &error))?;
        // SAFETY: this memory has no other socket.
        let (tx, rx, rings) = unsafe { Socket::new(config, &umem, &name, queue) }
            .map_err(|error| failed("binding to", &error))?;
        let (mut fill, completion) =
            rings.ok_or_else(|| failed("the rings of", &"taken by another socket"))?;
        let idle = descriptors.split_off(FRAMES);
        // SAFETY: these frames are of this memory and only the fill ring has them.
        let filled = unsafe { fill.produce(&descriptors) };
        assert_eq!(filled, FRAMES, "a fresh fill ring has room");
        Ok(Self { umem, tx, rx, fill, completion, idle })
    }

    /// Sends frames in order and waits until all have left; an error after `limit`.
    pub fn send<F: AsRef<[u8]>>(&mut self, frames: &[F], limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        for burst in frames.chunks(BURST) {
            let mut descriptors = Vec::with_capacity(burst.len());
            for frame in burst {
                let mut descriptor = self.idle(deadline)?;
                // SAFETY: an idle frame is in no ring.
                let mut data = unsafe { self.umem.data_mut(&mut descriptor) };
                let mut cursor = data.cursor();
                cursor.set_pos(0);
                std::io::Write::write_all(&mut cursor, frame.as_ref())
                    .map_err(Error::system("write a frame"))?;
                descriptors.push(descriptor);
            }
            // SAFETY: the frames are of this memory and in no ring.
            while unsafe { self.tx.produce(&descriptors) } == 0 {
                self.collect(deadline)?;
            }
            self.kick();
        }
        while self.idle.len() < FRAMES {
            self.collect(deadline)?;
        }
        Ok(())
    }

    /// Waits up to `wait` for frames and returns copies of those that are there.
    pub fn receive(&mut self, wait: Duration) -> Result<Vec<Vec<u8>>> {
        let mut descriptors = vec![FrameDesc::default(); BURST];
        // SAFETY: the fill ring got its frames from this memory only.
        let count = unsafe { self.rx.poll_and_consume(&mut descriptors, wait.as_millis() as i32) }
            .map_err(Error::system("receive from an AF_XDP socket"))?;
        let received = &descriptors[..count];
        // SAFETY: received frames are in no ring until they are given back below.
        let frames =
            received.iter().map(|d| unsafe { self.umem.data(d) }.contents().to_vec()).collect();
        if count > 0 {
            // SAFETY: the frames are of this memory, and their copies are made.
            while unsafe { self.fill.produce(received) } == 0 {
                std::thread::yield_now();
            }
        }
        Ok(frames)
    }

    fn idle(&mut self, deadline: Instant) -> Result<FrameDesc> {
        loop {
            match self.idle.pop() {
                Some(descriptor) => return Ok(descriptor),
                None => self.collect(deadline)?,
            }
        }
    }

    fn collect(&mut self, deadline: Instant) -> Result<()> {
        let mut done = [FrameDesc::default(); BURST];
        // SAFETY: the transmit ring got its frames from this memory only.
        let count = unsafe { self.completion.consume(&mut done) };
        self.idle.extend_from_slice(&done[..count]);
        if count == 0 {
            if Instant::now() > deadline {
                return Err(Error::Unexpected("xsk-rs frames were not completed in time".into()));
            }
            self.kick();
        }
        Ok(())
    }

    /// One call moves 32 frames; what it could not do now, the next one does.
    fn kick(&self) {
        let _ = self.tx.wakeup();
    }
}
