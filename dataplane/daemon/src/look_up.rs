//! Looks the names of endpoints up, beside everything else: nothing waits for a name server, and a
//! name that fails is tried again, later and later.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use millrace_config::PublicKey;
use millrace_config::uapi::{PeerChange, SetRequest};

use crate::control::ControlHandle;

/// Look-ups at a time, each a thread: the C library offers no other way. They end with the last name.
const THREADS_MAX: usize = 4;
/// After the first failure of a name, doubled with each further one.
const RETRY_MIN: Duration = Duration::from_secs(2);
/// Names that `status` tells; of the others it says how many there are.
const NAMED_MAX: usize = 4;
const RETRY_MAX: Duration = Duration::from_secs(300);

/// A peer whose endpoint is given by a name.
#[derive(Clone, Debug)]
pub struct NamedEndpoint {
    pub peer: PublicKey,
    pub host: String,
    pub port: u16,
}

/// All names that are wanted and were not found yet.
#[derive(Clone)]
pub struct LookUps {
    control: ControlHandle,
    todo: Arc<Todo>,
}

#[derive(Default)]
struct Todo {
    list: Mutex<List>,
    changed: Condvar,
}

#[derive(Default)]
struct List {
    /// The one that is due first on top.
    names: BinaryHeap<Reverse<Name>>,
    /// Replaced lists are forgotten, look-ups under way included.
    generation: u64,
    /// Those that were looked up and not found, for `status`.
    failed: BTreeSet<String>,
    threads: usize,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    due: Instant,
    /// As in the configuration among those of one time.
    place: usize,
    host: String,
    peers: Vec<(PublicKey, u16)>,
    retry: Duration,
}

impl LookUps {
    pub fn new(control: ControlHandle) -> Self {
        Self { control, todo: Arc::default() }
    }

    /// Looks these up from now on, each until it is found, and no others.
    pub fn want(&self, endpoints: Vec<NamedEndpoint>) {
        let names = by_host(endpoints);
        let mut list = self.todo.lock();
        list.generation += 1;
        list.names = names.into_iter().map(Reverse).collect();
        list.failed.clear();
        self.tell(&list);
        while list.threads < THREADS_MAX.min(list.names.len()) {
            let this = self.clone();
            match thread::Builder::new().name("look-up".into()).spawn(move || this.run()) {
                Ok(_) => list.threads += 1,
                Err(error) => {
                    tracing::error!(%error, "no thread for looking endpoint names up");
                    break;
                }
            }
        }
        self.todo.changed.notify_all();
    }

    /// A thread: one name after the other until there is none.
    fn run(&self) {
        let mut list = self.todo.lock();
        while let Some(Reverse(next)) = list.names.peek() {
            let left = next.due.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                let waited = self.todo.changed.wait_timeout(list, left);
                list = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let Some(Reverse(mut name)) = list.names.pop() else { break };
            let generation = list.generation;
            drop(list);
            let found = look_up(&name);
            list = self.todo.lock();
            if list.generation != generation {
                continue;
            }
            match found {
                Some(address) => {
                    if list.failed.remove(&name.host) {
                        self.tell(&list);
                    }
                    drop(list);
                    // Fails only while the data plane is stopping.
                    let _ = self.control.set(change(&name, address));
                    list = self.todo.lock();
                }
                None => {
                    if list.failed.insert(name.host.clone()) {
                        self.tell(&list);
                    }
                    name.due = Instant::now() + name.retry;
                    name.retry = RETRY_MAX.min(name.retry * 2);
                    list.names.push(Reverse(name));
                }
            }
        }
        list.threads -= 1;
    }

    /// Tells `status`. Under the lock, so that the last word is the newest.
    fn tell(&self, list: &List) {
        let names: Vec<&str> = list.failed.iter().take(NAMED_MAX).map(String::as_str).collect();
        let (count, more) =
            (list.failed.len(), if list.failed.len() > NAMED_MAX { ", …" } else { "" });
        let note = format!("{count} names of endpoints were not found: {}{more}", names.join(", "));
        // Fails only while the data plane is stopping.
        let _ = self.control.set_name_note((count > 0).then_some(note));
    }
}

impl Todo {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One look-up serves all peers at a host.
fn by_host(endpoints: Vec<NamedEndpoint>) -> Vec<Name> {
    let due = Instant::now();
    let mut names: Vec<Name> = Vec::new();
    let mut places = BTreeMap::new();
    for NamedEndpoint { peer, host, port } in endpoints {
        let place = *places.entry(host.clone()).or_insert(names.len());
        if place == names.len() {
            names.push(Name { due, place, host, peers: Vec::new(), retry: RETRY_MIN });
        }
        names[place].peers.push((peer, port));
    }
    names
}

/// The first address of a host. The first failure of a name is a warning.
fn look_up(name: &Name) -> Option<IpAddr> {
    let host = name.host.as_str();
    let error = match (host, 0).to_socket_addrs() {
        Ok(mut addresses) => match addresses.next() {
            Some(address) => return Some(address.ip()),
            None => "it has no address".to_owned(),
        },
        Err(error) => error.to_string(),
    };
    let again_s = name.retry.as_secs();
    if name.retry == RETRY_MIN {
        tracing::warn!(host, error, again_s, "an endpoint's name could not be looked up");
    } else {
        tracing::debug!(host, error, again_s, "an endpoint's name could not be looked up");
    }
    None
}

fn change(name: &Name, address: IpAddr) -> SetRequest {
    let peers = name.peers.iter().map(|&(peer, port)| PeerChange {
        update_only: true,
        endpoint: Some(SocketAddr::new(address, port)),
        ..PeerChange::new(peer)
    });
    SetRequest { peers: peers.collect(), ..SetRequest::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_looked_up_once_for_all_its_peers_and_in_the_order_of_the_file() {
        let endpoint = |peer: u8, host: &str| NamedEndpoint {
            peer: PublicKey([peer; 32]),
            host: host.into(),
            port: peer.into(),
        };
        let names = by_host(vec![endpoint(1, "b"), endpoint(2, "a"), endpoint(3, "b")]);
        assert_eq!(names[0].peers, [(PublicKey([1; 32]), 1), (PublicKey([3; 32]), 3)]);
        let mut heap: BinaryHeap<_> = names.into_iter().map(Reverse).collect();
        assert_eq!(heap.pop().unwrap().0.host, "b");
        assert_eq!(heap.pop().unwrap().0.host, "a");
    }
}
