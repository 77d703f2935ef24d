//! How other threads talk to the slow thread, which alone owns the WireGuard device: commands in a
//! queue, an eventfd that wakes it, answers in a channel of their own.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use millrace_config::PublicKey;
use millrace_config::uapi::{DeviceState, Errno, SetRequest};
use rustix::event::{EventfdFlags, eventfd};

/// Commands that may wait; each is an operator's action, so a full queue means a stuck thread.
const COMMANDS_MAX: usize = 64;
/// No command takes the slow thread longer than this; `PEERS_MAX` peers are set in less.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the slow thread is asked to do. A dropped `reply` means that it will not.
pub enum Command {
    /// `get=1`: the whole state, with the `mr_` facts of the data path.
    Get { reply: Sender<DeviceState> },
    /// `set=1`: apply in order; equal values are no change, so sessions live on. On an error the
    /// changes before it stay, as in the kernel. The sentence goes to the log.
    Set { change: SetRequest, reply: Sender<Result<(), Refusal>> },
    /// `[interface] mtu` changed: padding and segment limits follow.
    SetMtu(u16),
    /// The operator set the interface up or down.
    SetUp(bool),
    /// The configuration file was read again, or could not be.
    SetAbout(About),
    /// What `status` says of names of endpoints that were not found.
    SetNameNote(Option<String>),
    /// Leave the main loop, stop the workers, release everything.
    Stop,
}

/// What `status` says of the configuration file; the device itself does not need it.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Names that the operator gave to peers.
    pub names: HashMap<PublicKey, String>,
    /// Why the file as it stands now is not what runs.
    pub config_error: Option<String>,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct Refusal {
    pub errno: Errno,
    pub why: String,
}

impl Refusal {
    pub fn new(errno: Errno, why: impl Into<String>) -> Self {
        Self { errno, why: why.into() }
    }
}

/// The end that asks; cheap to clone.
#[derive(Clone)]
pub struct ControlHandle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

/// The end of the slow thread: poll the descriptor for reading, then take commands until none.
pub struct ControlQueue {
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
}

/// Makes the two ends.
pub fn channel() -> io::Result<(ControlHandle, ControlQueue)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = bounded(COMMANDS_MAX);
    let handle = ControlHandle { commands: sender, wake: Arc::clone(&wake) };
    Ok((handle, ControlQueue { commands: receiver, wake }))
}

impl ControlHandle {
    pub fn get(&self) -> Result<DeviceState, Refusal> {
        let (reply, answer) = bounded(1);
        self.send(Command::Get { reply })?;
        wait(&answer)
    }

    pub fn set(&self, change: SetRequest) -> Result<(), Refusal> {
        let (reply, answer) = bounded(1);
        self.send(Command::Set { change, reply })?;
        wait(&answer)?
    }

    pub fn set_mtu(&self, mtu: u16) -> Result<(), Refusal> {
        self.send(Command::SetMtu(mtu))
    }

    pub fn set_up(&self, up: bool) -> Result<(), Refusal> {
        self.send(Command::SetUp(up))
    }

    pub fn set_about(&self, about: About) -> Result<(), Refusal> {
        self.send(Command::SetAbout(about))
    }

    pub fn set_name_note(&self, note: Option<String>) -> Result<(), Refusal> {
        self.send(Command::SetNameNote(note))
    }

    pub fn stop(&self) -> Result<(), Refusal> {
        self.send(Command::Stop)
    }

    fn send(&self, command: Command) -> Result<(), Refusal> {
        self.commands
            .send_timeout(command, ANSWER_TIMEOUT)
            .map_err(|_| Refusal::new(Errno::Io, "the slow thread does not take commands"))?;
        // The counter can only be full if the thread has 2^64 wake-ups to read.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Ok(())
    }
}

impl ControlQueue {
    /// The next command, if there is one. Resets the wake-up when the queue is empty.
    pub fn take(&self) -> Option<Command> {
        if let Ok(command) = self.commands.try_recv() {
            return Some(command);
        }
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut counter);
        // A command may have come between the two lines above.
        self.commands.try_recv().ok()
    }
}

impl AsFd for ControlQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

fn wait<T>(answer: &Receiver<T>) -> Result<T, Refusal> {
    answer.recv_timeout(ANSWER_TIMEOUT).map_err(|error| {
        let why = match error {
            RecvTimeoutError::Timeout => "the slow thread does not answer",
            RecvTimeoutError::Disconnected => "the data plane is stopping",
        };
        Refusal::new(Errno::Io, why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_readable(queue: &ControlQueue) -> bool {
        let mut fds = [rustix::event::PollFd::new(queue, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).unwrap() == 1
    }

    #[test]
    fn commands_wake_and_answers_return() {
        let (handle, queue) = channel().unwrap();
        assert!(!is_readable(&queue));
        let asker = std::thread::spawn(move || handle.get().map(|state| state.listen_port));
        let mut fds = [rustix::event::PollFd::new(&queue, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        let Some(Command::Get { reply }) = queue.take() else { panic!("no get") };
        reply.send(DeviceState { listen_port: 7, ..DeviceState::default() }).unwrap();
        assert_eq!(asker.join().unwrap().unwrap(), 7);
        assert!(queue.take().is_none());
        assert!(!is_readable(&queue), "an empty queue must not spin the slow thread");
    }

    #[test]
    fn a_dropped_reply_is_an_error_and_not_a_hang() {
        let (handle, queue) = channel().unwrap();
        let asker = std::thread::spawn(move || handle.set(SetRequest::default()));
        while queue.take().is_none() {
            std::thread::yield_now();
        }
        assert_eq!(asker.join().unwrap().unwrap_err().errno, Errno::Io);
    }
}
