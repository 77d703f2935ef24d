//! Names of hosts, looked up beside everything else: the C library only knows how to wait.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

use crate::limits::LOOK_UPS_MAX;

/// Look-ups of one owner, one after the other, each on a thread that ends with it: a name server that
/// is away costs every owner one thread, however often it asks.
#[derive(Debug)]
pub struct LookUps {
    waiting: VecDeque<String>,
    running: Option<String>,
    desk: Arc<Desk>,
}

/// The outcome of one look-up.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub host: String,
    /// At least one address, or why there is none.
    pub found: Result<Vec<IpAddr>, String>,
}

/// Where threads leave their answers.
#[derive(Debug)]
struct Desk {
    answers: Mutex<VecDeque<Answer>>,
    /// Readable while there are answers: written and read under the lock.
    bell: OwnedFd,
}

impl LookUps {
    pub fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let desk = Arc::new(Desk { answers: Mutex::default(), bell });
        Ok(Self { waiting: VecDeque::new(), running: None, desk })
    }

    /// Asks for a host's addresses. A question that is not answered yet serves again.
    pub fn ask(&mut self, host: &str) {
        if self.running.iter().chain(&self.waiting).any(|asked| asked == host) {
            return;
        }
        if self.waiting.len() == LOOK_UPS_MAX {
            let why = format!("{LOOK_UPS_MAX} other names wait for the name server before it");
            self.desk.put(Answer { host: host.to_owned(), found: Err(why) });
            return;
        }
        self.waiting.push_back(host.to_owned());
        self.start();
    }

    /// Forgets what waits. What runs is answered still.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }

    /// Whether everything was answered.
    pub fn is_idle(&self) -> bool {
        self.running.is_none() && self.waiting.is_empty() && self.desk.lock().is_empty()
    }

    /// The next answer that is there. None costs no system call.
    pub fn next_answer(&mut self) -> Option<Answer> {
        let answer = self.desk.take()?;
        if self.running.as_ref() == Some(&answer.host) {
            self.running = None;
            self.start();
        }
        Some(answer)
    }

    fn start(&mut self) {
        while self.running.is_none()
            && let Some(host) = self.waiting.pop_front()
        {
            let (asked, desk) = (host.clone(), Arc::clone(&self.desk));
            let work = move || {
                let found = look_up(&asked);
                desk.put(Answer { host: asked, found });
            };
            match thread::Builder::new().name("look-up".into()).spawn(work) {
                Ok(_) => self.running = Some(host),
                Err(error) => {
                    let why = format!("no thread for the look-up: {error}; see `ulimit -u`");
                    self.desk.put(Answer { host, found: Err(why) });
                }
            }
        }
    }
}

impl AsFd for LookUps {
    /// The same for as long as this lives; readable while there are answers.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.desk.bell.as_fd()
    }
}

impl Desk {
    fn put(&self, answer: Answer) {
        let mut answers = self.lock();
        answers.push_back(answer);
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Option<Answer> {
        let mut answers = self.lock();
        let answer = answers.pop_front()?;
        if answers.is_empty() {
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        }
        Some(answer)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look_up(host: &str) -> Result<Vec<IpAddr>, String> {
    let found = (host, 0).to_socket_addrs().map_err(|error| error.to_string())?;
    let addresses: Vec<IpAddr> = found.map(|address: SocketAddr| address.ip()).collect();
    if addresses.is_empty() { Err("it has no address".into()) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn readable(look_ups: &LookUps, seconds: i64) -> bool {
        let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
        poll(&mut [PollFd::new(look_ups, PollFlags::IN)], Some(&limit)).unwrap() > 0
    }

    #[test]
    fn an_answer_wakes_its_owner_until_it_is_taken() {
        let mut look_ups = LookUps::new().unwrap();
        assert!(look_ups.is_idle() && look_ups.next_answer().is_none());
        for host in ["localhost", "127.0.0.1", "localhost", "::1"] {
            look_ups.ask(host);
        }
        let mut hosts = Vec::new();
        while !look_ups.is_idle() {
            assert!(readable(&look_ups, 30));
            let Answer { host, found } = look_ups.next_answer().unwrap();
            assert!(found.unwrap().iter().all(IpAddr::is_loopback), "{host}");
            hosts.push(host);
        }
        assert_eq!(hosts, ["localhost", "127.0.0.1", "::1"]);
        assert!(!readable(&look_ups, 0));
    }

    /// As while a name server is away: one look-up never ends.
    #[test]
    fn what_waits_is_bounded_and_the_rest_is_refused() {
        let mut look_ups = LookUps::new().unwrap();
        look_ups.running = Some("stuck".to_owned());
        for number in 0..LOOK_UPS_MAX {
            look_ups.ask(&format!("host{number}"));
            look_ups.ask("stuck");
        }
        assert!(look_ups.next_answer().is_none() && !readable(&look_ups, 0));
        for _ in 0..2 {
            look_ups.ask("more");
        }
        for _ in 0..2 {
            assert!(readable(&look_ups, 0));
            let refused = look_ups.next_answer().unwrap();
            assert_eq!(refused.host, "more");
            assert!(refused.found.unwrap_err().contains("other names wait"));
        }
        assert!(!readable(&look_ups, 0));
        look_ups.clear();
        look_ups.desk.put(Answer { host: "stuck".to_owned(), found: Err("late".to_owned()) });
        assert_eq!(look_ups.next_answer().unwrap().host, "stuck");
        assert!(look_ups.is_idle());
    }
}
