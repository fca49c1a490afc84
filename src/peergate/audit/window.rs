//! What is counted: the denials and refusals of each user and reason, and the lines of each user, after the first in an
//! interval. A user is given by the owner of all of its ids ([`Audit::count_by_owner`](super::Audit::count_by_owner)).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{About, Event, Reason, Record};
use crate::clock::later;
use crate::ids::Uid;

/// How many pairs of user and reason are counted separately. Further users share one count for each reason.
pub(super) const MOST_TRACKED: usize = 1024;

/// The current intervals, by user and reason.
#[derive(Default)]
pub(super) struct Windows {
    pub(super) burst: u32,
    pub(super) interval: Duration,
    pub(super) by_user: HashMap<(Option<Uid>, Reason), Window>,
    next_tick: Option<Instant>,
}

/// The current interval of one user and reason.
pub(super) struct Window {
    since: Instant,
    written: u32,
    pub(super) counted: u64,
    /// Bytes of the counted lines.
    bytes: u64,
    /// How many of `counted` are on standard error already, and owed to the journal alone.
    on_stderr: u64,
    first_counted: Instant,
    last_counted: Instant,
}

impl Windows {
    /// When the next interval ends.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        self.next_tick
    }

    /// Whether one more record of this interval may be written. If so it is counted as written.
    pub(super) fn may_write(&mut self, uid: Option<Uid>, reason: Reason, now: Instant) -> bool {
        self.may_write_of(1, uid, reason, now) == 1
    }

    /// How many of `count` more records of this interval may be written. These are counted as written.
    pub(super) fn may_write_of(&mut self, count: u32, uid: Option<Uid>, reason: Reason, now: Instant) -> u32 {
        let burst = self.burst;
        let window = self.window(uid, reason, now);
        let first = burst.saturating_sub(window.written).min(count);
        window.written += first;
        first
    }

    /// Counts so many more lines of so many bytes.
    pub(super) fn count_lines(&mut self, uid: Option<Uid>, lines: u64, bytes: u64, on_stderr: u64, now: Instant) {
        self.count(uid, Reason::Lines, lines, on_stderr, now);
        self.window(uid, Reason::Lines, now).bytes += bytes;
    }

    /// Counts `count` more, of which `on_stderr` are on standard error.
    pub(super) fn count(&mut self, uid: Option<Uid>, reason: Reason, count: u64, on_stderr: u64, now: Instant) {
        let window = self.window(uid, reason, now);
        if window.counted == 0 {
            window.first_counted = now;
        }
        window.last_counted = now;
        window.counted += count;
        window.on_stderr += on_stderr;
    }

    fn window(&mut self, uid: Option<Uid>, reason: Reason, now: Instant) -> &mut Window {
        let full = self.by_user.len() >= MOST_TRACKED && !self.by_user.contains_key(&(uid, reason));
        let key = (if full { None } else { uid }, reason);
        self.next_tick.get_or_insert(later(now, self.interval));
        self.by_user.entry(key).or_insert_with(|| Window {
            since: now,
            written: 0,
            counted: 0,
            bytes: 0,
            on_stderr: 0,
            first_counted: now,
            last_counted: now,
        })
    }

    /// Ends the intervals that are over, or all of them, and returns their summaries. Without room for summaries the
    /// counts stay. [`next_tick`](Self::next_tick) is then at `soonest` or later.
    pub(super) fn end(&mut self, now: Instant, all: bool, has_room: bool, soonest: Instant) -> Vec<Record> {
        let interval = self.interval;
        let mut summaries = Vec::new();
        self.by_user.retain(|(uid, reason), window| {
            let over = now.saturating_duration_since(window.since) >= interval;
            if window.counted > 0 && (over || all) {
                if !has_room {
                    return true;
                }
                summaries.push(window.summary(*uid, *reason));
                (window.counted, window.bytes, window.on_stderr) = (0, 0, 0);
                if over {
                    (window.since, window.written) = (now, 0);
                }
                return true;
            }
            !over
        });
        let earliest = self.by_user.values().map(|window| later(window.since, interval)).min();
        // An interval that is over had no room for its summary: it is tried again an interval later.
        self.next_tick = earliest.map(|due| if due <= now { later(now, interval) } else { due }.max(soonest));
        if self.by_user.is_empty() {
            self.by_user.shrink_to(64);
        }
        summaries
    }
}

impl Window {
    fn summary(&self, uid: Option<Uid>, reason: Reason) -> Record {
        let of_lines = reason == Reason::Lines;
        Record {
            reason: Some(reason),
            bytes: of_lines.then_some(self.bytes),
            count: Some(self.counted),
            on_stderr: self.on_stderr,
            duration: Some(self.last_counted.saturating_duration_since(self.first_counted)),
            about: uid.map(About::user),
            ..Record::new(if of_lines { Event::LineSummary } else { Event::Summary })
        }
    }
}
