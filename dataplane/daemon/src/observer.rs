//! OBSERVED: what control sees of the peers' traffic. The slow thread copies what the workers note
//! anyway, so that a packet costs nothing; and only while control is connected and somebody is
//! active, so that an idle gateway does not wake up.

use std::time::Duration;

use millrace_ebpf::abi::{EndpointKind, Observed};
use millrace_ebpf::maps::LineWriter;
use millrace_wg::Instant;
use millrace_wg::device::{Device, PeerView};
use millrace_wg::time::AtomicInstant;
use std::sync::atomic::Ordering;

use crate::clock;

/// Between two looks while lines change; half of what control needs to see a dead path in time.
const PAUSE: Duration = Duration::from_millis(100);
/// The same while peers are watched and nothing changes.
const PAUSE_MAX: Duration = Duration::from_millis(400);
/// A peer whose line did not change for so long is news when it changes.
const SILENCE: Duration = Duration::from_secs(10);
/// Two readings of two clocks are never of the same moment: a smaller change of their distance is
/// none, so that equal times stay equal.
const CLOCKS_APART: Duration = Duration::from_millis(1);

/// The one writer of OBSERVED.
pub struct Observer {
    lines: LineWriter<Observed>,
    last: Vec<Last>,
    /// Nobody reads: none.
    schedule: Option<Schedule>,
    /// What turns our times into CLOCK_MONOTONIC.
    ahead: Duration,
}

#[derive(Clone, Copy, Default)]
struct Last {
    line: Observed,
    changed_at: Option<Instant>,
}

struct Schedule {
    looked_at: Option<Instant>,
    /// None until something wakes the slow thread.
    due: Option<Instant>,
    pause: Duration,
}

impl Observer {
    pub fn new(lines: LineWriter<Observed>) -> Self {
        Self { lines, last: Vec::new(), schedule: None, ahead: Duration::ZERO }
    }

    /// Somebody reads from now on; the lines are right after the next look, which is due.
    pub fn start(&mut self, now: Instant) {
        self.schedule = Some(Schedule { looked_at: None, due: Some(now), pause: PAUSE });
        self.last.iter_mut().for_each(|last| last.changed_at = None);
    }

    pub fn stop(&mut self) {
        self.schedule = None;
    }

    /// When to look next.
    pub fn deadline(&self) -> Option<Instant> {
        self.schedule.as_ref()?.due
    }

    /// Something woke the slow thread: perhaps somebody became active.
    pub fn wake(&mut self, now: Instant) {
        let Some(schedule) = &mut self.schedule else { return };
        if schedule.due.is_none() {
            schedule.due = Some(schedule.looked_at.map_or(now, |at| now.max(at + PAUSE)));
        }
    }

    /// Writes what changed, if it is time. `active` is told who was silent before.
    pub fn look(&mut self, device: &Device, now: Instant, mut active: impl FnMut(u32)) {
        let Some(schedule) = &mut self.schedule else { return };
        if schedule.due.is_none_or(|due| due > now) {
            return;
        }
        let ahead = clock::ahead_of_monotonic();
        if ahead.abs_diff(self.ahead) > CLOCKS_APART {
            self.ahead = ahead;
        }
        let (mut any_changed, mut any_watched) = (false, false);
        for view in device.peers() {
            let slot = view.peer.slot.0;
            let place = slot as usize;
            if self.last.len() <= place {
                self.last.resize(place + 1, Last::default());
            }
            let (last, line) = (&mut self.last[place], line(&view, self.ahead));
            any_watched |= view.peer.activity.watched.load(Ordering::Relaxed);
            if line == last.line {
                continue;
            }
            self.lines.write(slot, &line);
            any_changed = true;
            if last.changed_at.is_none_or(|at| now.since(at) >= SILENCE) {
                active(slot);
            }
            *last = Last { line, changed_at: Some(now) };
        }
        schedule.looked_at = Some(now);
        schedule.pause = if any_changed { PAUSE } else { (schedule.pause * 2).min(PAUSE_MAX) };
        schedule.due = (any_changed || any_watched).then_some(now + schedule.pause);
    }

    /// The slot is free: the next peer starts from nothing.
    pub fn forget(&mut self, slot: u32) {
        self.lines.write(slot, &Observed::default());
        if let Some(last) = self.last.get_mut(slot as usize) {
            *last = Last::default();
        }
    }
}

fn line(view: &PeerView<'_>, ahead: Duration) -> Observed {
    let ahead_ns = ahead.as_nanos() as u64;
    let ns = |at: Option<Instant>| at.map_or(0, |at| at.as_nanos().saturating_sub(ahead_ns).max(1));
    let moment = |at: &AtomicInstant| ns(at.get());
    let (peer, activity) = (view.peer, &view.peer.activity);
    let mut line = Observed {
        received_ns: moment(&activity.received_at),
        sent_ns: moment(&activity.sent_at),
        handshake_ns: ns(view.handshake_at),
        received_bytes: peer.received.bytes(),
        sent_bytes: peer.sent.bytes(),
        unanswered_ns: moment(&activity.unanswered_since),
        ..Observed::default()
    };
    // Before anything was received, an endpoint is only what the configuration says.
    if line.received_ns == 0 {
        return line;
    }
    match peer.endpoint.load().as_deref() {
        Some(endpoint) if endpoint.detour_slot().is_some() => {
            line.kind = EndpointKind::Detour as u8;
        }
        Some(endpoint) => {
            line.kind = EndpointKind::Direct as u8;
            line.set_remote(endpoint.remote, endpoint.local, endpoint.ifindex);
        }
        None => {}
    }
    line
}
