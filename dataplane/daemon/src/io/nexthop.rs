//! How AF_XDP transmit finds the first hop: finished headers for each endpoint in use.
//!
//! Workers only look up; a miss asks the port's thread to find out and sends by socket meanwhile.
//! The thread asks the kernel for route and neighbour, publishes the whole table anew, and looks
//! again when the kernel has news or an entry gets old. Entries that nobody used are forgotten, so
//! an idle port asks nothing.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;
use crossbeam::queue::ArrayQueue;
use millrace_wg::Endpoint;

use super::frame::{Hop, Template};
use super::lane::signal;
use super::netlink::{Link, Netlink};

/// Questions that wait for the port's thread; further ones are asked again by the next packet.
const QUESTIONS_MAX: usize = 256;
/// Endpoints with an entry; the packets of further ones go by socket.
const ENTRIES_MAX: usize = 65_536;

/// Whom to reach from where: the endpoint without the interface.
type Key = (SocketAddr, Option<IpAddr>);
type Table = HashMap<Key, Arc<Entry>>;

/// Headers for one endpoint, and the link's limit.
#[derive(Debug)]
pub struct NextHop {
    pub template: Template,
    /// The largest IP packet that the link takes.
    pub mtu: usize,
}

#[derive(Debug)]
struct Entry {
    /// None: known to be for the socket path (another device, no answer yet).
    hop: Option<Arc<NextHop>>,
    used: AtomicBool,
}

/// The table and the questions. Shared by all workers and the port's thread.
#[derive(Debug)]
pub struct NextHops {
    table: ArcSwap<Table>,
    questions: ArrayQueue<Key>,
    wake_port: Arc<OwnedFd>,
}

/// What entries are made from.
#[derive(Clone, Copy, Debug)]
pub struct From<'a> {
    pub link: &'a Link,
    /// Our UDP port.
    pub port: u16,
    pub mark: u32,
}

impl NextHops {
    pub fn new(wake_port: Arc<OwnedFd>) -> Arc<Self> {
        let questions = ArrayQueue::new(QUESTIONS_MAX);
        Arc::new(Self { table: ArcSwap::default(), questions, wake_port })
    }

    /// The headers for `endpoint`, if they are known and of this port.
    pub fn lookup(&self, endpoint: &Endpoint) -> Option<Arc<NextHop>> {
        let key = (endpoint.remote, endpoint.local);
        let table = self.table.load();
        match table.get(&key) {
            Some(entry) => {
                // A load first: the line stays shared while it is set.
                if !entry.used.load(Ordering::Relaxed) {
                    entry.used.store(true, Ordering::Relaxed);
                }
                entry.hop.clone()
            }
            None => {
                // Wake the thread for the first question only: it takes all that wait.
                let first = self.questions.is_empty();
                if self.questions.push(key).is_ok() && first {
                    signal(&self.wake_port);
                }
                None
            }
        }
    }

    /// Answers what was asked since the last call. Asks for neighbours that are not known.
    pub fn answer(&self, netlink: &Netlink, from: From<'_>) -> io::Result<()> {
        if self.questions.is_empty() {
            return Ok(());
        }
        let mut table = Table::clone(&self.table.load());
        while let Some(key) = self.questions.pop() {
            if table.len() < ENTRIES_MAX && !table.contains_key(&key) {
                table.insert(key, entry(netlink, from, key, true)?);
            }
        }
        self.table.store(Arc::new(table));
        Ok(())
    }

    /// Looks at all entries again. `forget`: also drops those that nobody used since the last time.
    pub fn refresh(&self, netlink: &Netlink, from: From<'_>, forget: bool) -> io::Result<()> {
        let old = self.table.load();
        let mut table = Table::with_capacity(old.len());
        for (key, known) in old.iter() {
            let used = known.used.load(Ordering::Relaxed);
            if used || !forget {
                table.insert(*key, entry(netlink, from, *key, used && !forget)?);
            }
        }
        self.table.store(Arc::new(table));
        Ok(())
    }

    /// Forgets everything: the port is not to be sent on.
    pub fn clear(&self) {
        self.table.store(Arc::default());
        while self.questions.pop().is_some() {}
    }
}

fn entry(netlink: &Netlink, from: From<'_>, key: Key, used: bool) -> io::Result<Arc<Entry>> {
    let hop = resolve(netlink, from, key)?;
    Ok(Arc::new(Entry { hop, used: AtomicBool::new(used) }))
}

/// Route, then neighbour. None: not by this port, or not known yet.
fn resolve(netlink: &Netlink, from: From<'_>, key: Key) -> io::Result<Option<Arc<NextHop>>> {
    let (remote, local) = key;
    let From { link, port, mark } = from;
    let Some(source) = link.address else { return Ok(None) };
    let Some(route) = netlink.route(remote.ip(), local, mark)? else { return Ok(None) };
    if route.ifindex != link.index {
        return Ok(None);
    }
    let Some(local) = local.or(route.source) else { return Ok(None) };
    let ip = route.gateway.unwrap_or(remote.ip());
    let neighbour = netlink.neighbour(link.index, ip)?;
    if neighbour.is_none_or(|neighbour| neighbour.is_stale) {
        netlink.use_neighbour(link.index, ip)?;
    }
    let Some(neighbour) = neighbour else { return Ok(None) };
    let hop = Hop { destination: neighbour.address, source };
    let template = Template::new(hop, local, port, remote);
    Ok(template.map(|template| Arc::new(NextHop { template, mtu: link.mtu as usize })))
}
