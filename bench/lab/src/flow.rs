//! A numbered stream of datagrams that remembers when each was sent and when it came, so that the
//! effect of one fault can be read off while the stream goes on.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{Error, Marker, Namespace, Result, probe, wait_for};

/// A stream that has stopped and whose last datagram came is over when nothing came for so long.
const SILENCE: Duration = Duration::from_millis(300);

/// As long as the last one is missing, a busy machine may be holding it.
const SILENCE_BEFORE_LAST: Duration = Duration::from_secs(2);

/// Bytes of a datagram: its number, then the marker over and over.
const LEN: usize = 120;

/// A stream in one direction.
#[derive(Debug)]
pub struct Flow {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    record: Mutex<Record>,
}

/// What has happened so far.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// When each number was sent.
    pub sent: Vec<Instant>,
    /// When it first came.
    pub came: Vec<Option<Instant>>,
    /// Datagrams that came twice.
    pub duplicated: u64,
    /// Those that came after one with a higher number.
    pub reordered: u64,
    /// Those with a wrong content.
    pub damaged: u64,
    /// One above the highest number that came.
    next: usize,
}

/// What a stretch of the stream saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// Datagrams sent in it.
    pub sent: usize,
    /// Those of them that never came.
    pub lost: usize,
    /// The longest time in which all that was sent was lost: from one that came to the next that came,
    /// by when they were sent. A busy machine that stops sender or receiver for a while adds nothing.
    pub gap: Duration,
}

impl Flow {
    /// Sends from `from` to `address` in `to`, one datagram every `interval`.
    pub fn start(
        from: &Namespace,
        to: &Namespace,
        address: SocketAddr,
        interval: Duration,
        marker: Marker,
    ) -> Result<Self> {
        let receiver = probe::bind(to, address)?;
        let address = receiver.local_addr().map_err(Error::system("ask for the flow's port"))?;
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let any = any.parse().map_err(|_| Error::Unexpected("no address".into()))?;
        let sender = probe::bind(from, any)?;
        let shared = Arc::new(Shared::default());
        let (here, there) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = vec![
            thread::spawn(move || receive(&receiver, marker, &there)),
            thread::spawn(move || send(&sender, address, interval, marker, &here)),
        ];
        Ok(Self { shared, threads })
    }

    /// How long after the first datagram was sent the first one came; waits for it.
    pub fn first_arrival(&self, limit: Duration) -> Result<Duration> {
        wait_for("the first datagram through the tunnel", limit, || {
            let record = self.record();
            let came = record.came.iter().flatten().min()?;
            Some(came.duration_since(*record.sent.first()?))
        })
    }

    /// When the first datagram was sent, if one was.
    pub fn started(&self) -> Option<Instant> {
        self.lock().sent.first().copied()
    }

    /// Waits until a datagram that was sent after `since` has come, and returns how long after it.
    pub fn arrival_after(&self, since: Instant, limit: Duration) -> Result<Duration> {
        wait_for("a datagram after the fault", limit, || {
            let record = self.lock();
            let first = record.sent.partition_point(|sent| *sent < since);
            let came = record.came.get(first..)?.iter().flatten().min()?;
            Some(came.duration_since(since))
        })
    }

    /// What has happened so far.
    pub fn record(&self) -> Record {
        self.lock().clone()
    }

    /// Stops, gives the last datagrams a moment, and reports.
    pub fn finish(mut self) -> Record {
        self.end();
        self.record()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ = thread.join();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Record> {
        self.shared.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.end();
    }
}

impl Record {
    /// What happened to the datagrams that were sent from `since` on.
    pub fn since(&self, since: Instant) -> Stretch {
        self.between(since, None)
    }

    /// What happened to the datagrams that were sent from `since` on and before `until`.
    pub fn between(&self, since: Instant, until: Option<Instant>) -> Stretch {
        let place = |time: Instant| self.sent.partition_point(|sent| *sent < time);
        let first = place(since);
        let end = until.map_or(self.sent.len(), place);
        let mut stretch = Stretch { sent: end.saturating_sub(first), ..Stretch::default() };
        // The last that came before the stretch, or where it begins.
        let mut last = since;
        let mut losing = false;
        for number in first..end {
            let sent = self.sent[number];
            if self.came.get(number).is_some_and(Option::is_some) {
                if losing {
                    stretch.gap = stretch.gap.max(sent.duration_since(last));
                }
                (last, losing) = (sent, false);
            } else {
                stretch.lost += 1;
                losing = true;
            }
        }
        if let (true, Some(end)) = (losing, self.sent[..end].last()) {
            stretch.gap = stretch.gap.max(end.duration_since(last));
        }
        stretch
    }

    /// All of it.
    pub fn all(&self) -> Stretch {
        self.sent.first().map(|first| self.since(*first)).unwrap_or_default()
    }
}

fn send(socket: &UdpSocket, to: SocketAddr, interval: Duration, marker: Marker, shared: &Shared) {
    let mut bytes = marker.fill(LEN);
    let start = Instant::now();
    let mut number = 0u32;
    while !shared.stop.load(Ordering::Relaxed) {
        bytes[..8].copy_from_slice(&u64::from(number).to_be_bytes());
        {
            let mut record = shared.record.lock().unwrap_or_else(PoisonError::into_inner);
            record.sent.push(Instant::now());
            record.came.push(None);
        }
        // A refusal of the kernel is a loss: the inside must not notice a fault outside.
        let _ = socket.send_to(&bytes, to);
        number += 1;
        let due = start + interval * number;
        // No burst after a pause: what was not sent then is not sent.
        thread::sleep(due.saturating_duration_since(Instant::now()).max(interval / 8));
    }
}

/// Until told to stop and nothing comes any more.
fn receive(socket: &UdpSocket, marker: Marker, shared: &Shared) {
    let expected = marker.fill(LEN);
    let mut buffer = [0; 2 * LEN];
    let mut last = Instant::now();
    loop {
        let len = match socket.recv(&mut buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let record = shared.record.lock().unwrap_or_else(PoisonError::into_inner);
                let missing = record.came.last().is_some_and(Option::is_none);
                let silence = if missing { SILENCE_BEFORE_LAST } else { SILENCE };
                if shared.stop.load(Ordering::Relaxed) && last.elapsed() > silence {
                    return;
                }
                continue;
            }
            Err(_) => continue,
        };
        let now = Instant::now();
        last = now;
        let mut record = shared.record.lock().unwrap_or_else(PoisonError::into_inner);
        let number = buffer.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes) as usize);
        let Some(number) = number.filter(|number| {
            len == LEN && buffer[8..LEN] == expected[8..] && *number < record.came.len()
        }) else {
            record.damaged += 1;
            continue;
        };
        if record.came[number].is_some() {
            record.duplicated += 1;
            continue;
        }
        record.came[number] = Some(now);
        record.reordered += u64::from(number < record.next);
        record.next = record.next.max(number + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_the_time_in_which_all_was_lost() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let sent: Vec<_> = (0..10).map(|n| start + ms(n)).collect();
        let came = |lost: &[u64]| {
            (0..10).map(|n| (!lost.contains(&n)).then_some(start + ms(50))).collect()
        };
        let record = |lost| Record { sent: sent.clone(), came: came(lost), ..Record::default() };
        let stretch = |lost, from| record(lost).since(start + ms(from));
        assert_eq!(stretch(&[], 0), Stretch { sent: 10, lost: 0, gap: ms(0) });
        assert_eq!(stretch(&[3, 4, 5, 8], 0), Stretch { sent: 10, lost: 4, gap: ms(4) });
        assert_eq!(stretch(&[3, 4, 5, 8], 4), Stretch { sent: 6, lost: 3, gap: ms(2) });
        assert_eq!(stretch(&[7, 8, 9], 0), Stretch { sent: 10, lost: 3, gap: ms(3) });
        let before = record(&[1, 8]).between(start, Some(start + ms(5)));
        assert_eq!(before, Stretch { sent: 5, lost: 1, gap: ms(2) });
    }
}
