//! The queue of records between the gate and the thread that writes them.
//!
//! The gate and the service put a record into the queue and never wait. One thread ([`journal`](crate::journal)) takes
//! the records out and writes them. A flood is thinned: the first [`burst`](Settings::burst) denials of each user and
//! reason in an interval become records. The rest are counted, and a summary at the end of the interval gives the number.
//! No denial is lost on the way:
//!
//! > denials that clients saw = records of verdict *denied* + the counts of summaries for the reasons
//! > *policy* and *no-credentials*
//!
//! Memory is bounded: the queue has a length, and the number of users that are counted separately has a limit.
//!
//! A service that accepts without a [`Gate`](crate::Gate) makes the same records itself.

mod record;
mod window;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use record::{About, At, Event, Reason, Record, Severity};

use record::counted;
use window::{MOST_TRACKED, Windows};

use crate::ids::Uid;
use crate::peer::Peer;
use crate::permits::LimitExceeded;
use crate::policy::{Accounts, Policy, RuleName};

/// How many records may wait for the journal. Denials beyond it are counted.
const MOST_WAITING: usize = 4096;
/// Bytes that waiting records may hold, roughly.
const MOST_WAITING_BYTES: usize = 4 << 20;

/// How much is written in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum RecordScope {
    /// Denials and refusals.
    Denials,
    /// Also admissions, and how each connection ended.
    Connections,
    /// Also each line: its length, never its content. The first of each user and interval one by one, the rest counted.
    Lines,
}

impl RecordScope {
    /// The word in a configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Denials => "denials",
            Self::Connections => "connections",
            Self::Lines => "lines",
        }
    }
}

/// The settings that an administrator makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// How much is written in full.
    pub scope: RecordScope,
    /// How many denials, refusals, and connections revoked because of their sender are written in full, for each user
    /// and reason in an interval; and how many lines, for each user. Subordinate ids count as their owner
    /// ([`Audit::count_by_owner`]).
    pub burst: u32,
    /// How long an interval is.
    pub interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { scope: RecordScope::Denials, burst: 10, interval: Duration::from_secs(10) }
    }
}

/// The number of each decision since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Peers admitted.
    pub admitted: u64,
    /// Peers denied.
    pub denied: u64,
    /// Peers refused by a limit.
    pub refused: u64,
}

/// The queue. Clones share it.
#[derive(Clone)]
pub struct Audit(Arc<Shared>);

/// With the default [`Settings`].
impl Default for Audit {
    fn default() -> Self {
        Self::new(Settings::default())
    }
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Audit({:?})", self.totals())
    }
}

#[derive(Default)]
struct Shared {
    queue: Mutex<RecordQueue>,
    wake: Condvar,
    scope: AtomicU8,
    admitted: AtomicU64,
    denied: AtomicU64,
    refused: AtomicU64,
    too_late: AtomicBool,
}

#[derive(Default)]
struct RecordQueue {
    waiting: VecDeque<Record>,
    waiting_bytes: usize,
    /// Tell the owner of a subordinate uid. A user has thousands of them, and one burst and one count for all.
    accounts: Arc<Accounts>,
    /// Taken out by the writer, and not yet reported as written or failed.
    in_hand: Option<Record>,
    /// How many records the writer has finished with.
    dealt_with: u64,
    windows: Windows,
    /// Of lines. Apart, because admitted users could fill the places of users that are turned away.
    line_windows: Windows,
    /// Records that were not written and are in no summary, since the last note that gave their number.
    unwritten: u64,
    /// The last record did not reach the journal, or standard error where there is none.
    journal_is_away: bool,
    sleeping: bool,
    nudged: bool,
    closed: bool,
}

/// The next step of the writer.
#[allow(clippy::large_enum_variant)] // it lives for as long as a record takes to write, once
pub(crate) enum Next {
    Write(Record),
    Nothing,
    Finished,
}

/// How long to wait before summaries are tried again with a journal that could not be reached.
const LOOK_FOR_JOURNAL: Duration = Duration::from_secs(1);

impl Audit {
    /// An empty queue. Records stay in it until there is a [`journal::Writer`](crate::journal::Writer).
    pub fn new(settings: Settings) -> Self {
        let audit = Self(Arc::default());
        audit.set(settings);
        audit
    }

    /// Replaces the settings. What was counted under the old ones becomes summaries.
    pub fn set(&self, settings: Settings) {
        self.0.scope.store(settings.scope as u8, Ordering::Relaxed);
        let mut queue = self.lock();
        // Before the summaries: the next one is due by the new interval.
        let RecordQueue { windows, line_windows, .. } = &mut *queue;
        for windows in [windows, line_windows] {
            (windows.burst, windows.interval) = (settings.burst, settings.interval);
        }
        queue.summarize(Instant::now(), true);
        self.wake(queue);
    }

    /// Counts users as `policy` does from now on: each subordinate id as its owner
    /// ([`Policy::owner_of`](crate::Policy::owner_of)). A [`Gate`](crate::Gate) asks for it with each policy that is put in
    /// force.
    pub fn count_by_owner<T>(&self, policy: &Policy<T>) {
        self.lock().accounts = policy.shared_accounts();
    }

    /// Whether admissions and ends of connections are written.
    pub fn writes_connections(&self) -> bool {
        self.0.scope.load(Ordering::Relaxed) >= RecordScope::Connections as u8
    }

    /// Whether each line is written.
    pub fn writes_lines(&self) -> bool {
        self.0.scope.load(Ordering::Relaxed) >= RecordScope::Lines as u8
    }

    /// Records that `peer` was denied by `rule`, or because no rule allows it.
    pub fn denied<'a>(&self, peer: &mut Peer, socket: &impl AsFd, at: impl Into<At<'a>>, rule: Option<&RuleName>) {
        self.turned_away_peer(Event::Denied, Reason::Policy, peer, socket, at.into(), rule);
    }

    /// Records that `rule` admits `peer`, but a limit was reached.
    pub fn refused<'a>(
        &self,
        peer: &mut Peer,
        socket: &impl AsFd,
        at: impl Into<At<'a>>,
        rule: &RuleName,
        excess: LimitExceeded,
    ) {
        self.turned_away_peer(Event::Refused, excess.into(), peer, socket, at.into(), Some(rule));
    }

    /// Records that a peer was denied whose credentials could not be read ([`Peer::of`] failed).
    pub fn unidentified<'a>(&self, at: impl Into<At<'a>>) {
        self.turned_away(Event::Denied, Reason::NoCredentials, None, || Record {
            reason: Some(Reason::NoCredentials),
            ..Record::at(Event::Denied, at.into(), None)
        });
    }

    /// Counts that `rule` admitted `peer`. Writes a record if the settings say so.
    pub fn admitted<'a>(&self, peer: &mut Peer, socket: &impl AsFd, at: impl Into<At<'a>>, rule: &RuleName) {
        self.0.admitted.fetch_add(1, Ordering::Relaxed);
        if self.writes_connections() {
            self.write(Record::at(Event::Admitted, at.into(), Some(rule)).about(peer, socket));
        }
    }

    fn turned_away_peer(
        &self,
        event: Event,
        reason: Reason,
        peer: &mut Peer,
        socket: &impl AsFd,
        at: At<'_>,
        rule: Option<&RuleName>,
    ) {
        self.turned_away(event, reason, Some(peer.uid()), || Record {
            reason: Some(reason),
            ..Record::at(event, at, rule).about(peer, socket)
        });
    }

    /// Counts a denial or refusal. Either the record that `record` makes is kept, or the next summary counts one more.
    /// `record` is called only for a record that is kept.
    pub fn turned_away(&self, event: Event, reason: Reason, uid: Option<Uid>, record: impl FnOnce() -> Record) {
        match event {
            Event::Denied => &self.0.denied,
            _ => &self.0.refused,
        }
        .fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut queue = self.lock();
        // A writer that waits for the end of an interval need not be woken for a count.
        let known = queue.next_tick().is_some();
        queue.end_intervals(now);
        let uid = queue.owner_of(uid);
        if !queue.has_room() || !queue.windows.may_write(uid, reason, now) {
            queue.windows.count(uid, reason, 1, 0, now);
            return if known { drop(queue) } else { self.wake(queue) };
        }
        // Without the lock: `record` reads from the kernel and /proc.
        drop(queue);
        let record = record();
        let mut queue = self.lock();
        queue.push(record);
        self.wake(queue);
    }

    /// Records `count` lines of a user, of `bytes` in all: the first ones by what `record` makes of their `lengths`, as many
    /// as the burst of this interval has left and the queue has room for. The next summary counts the rest.
    ///
    /// All of them in one go: a peer may send a line for each of its bytes.
    pub fn lines(
        &self,
        uid: Uid,
        (count, bytes): (u64, u64),
        lengths: impl IntoIterator<Item = usize>,
        mut record: impl FnMut(usize) -> Record,
    ) {
        let now = Instant::now();
        let mut queue = self.lock();
        let known = queue.next_tick().is_some();
        queue.end_intervals(now);
        let owner = queue.owner_of(Some(uid));
        let wanted = u32::try_from(count).unwrap_or(u32::MAX).min(queue.room_for_the_admitted());
        let first = queue.line_windows.may_write_of(wanted, owner, Reason::Lines, now);
        let mut left = (count, bytes);
        for length in lengths.into_iter().take(first as usize) {
            queue.push(record(length));
            left = (left.0.saturating_sub(1), left.1.saturating_sub(length as u64));
        }
        if left.0 > 0 {
            queue.line_windows.count_lines(owner, left.0, left.1, 0, now);
        }
        if first > 0 || !known {
            self.wake(queue);
        }
    }

    /// Puts a record into the queue. If there is no room it is left out, and a note gives the number of records left out.
    pub fn write(&self, record: Record) {
        let mut queue = self.lock();
        match (record.event, record.reason) {
            // A peer can cause any number of these: as with denials, the first are written and the rest counted.
            (Event::Revoked, Some(reason)) if reason != Reason::Policy => {
                let (uid, now) = (queue.owner_of(record.uid()), Instant::now());
                queue.end_intervals(now);
                if queue.has_room() && queue.windows.may_write(uid, reason, now) {
                    queue.push(record);
                } else {
                    queue.windows.count(uid, reason, 1, 0, now);
                }
            }
            // Only a reload causes these: the administrator bounds their number.
            (Event::Revoked | Event::ConfigLoaded | Event::ConfigRefused, _) => queue.push(record),
            _ if queue.room_for_the_admitted() > 0 => queue.push(record),
            _ => queue.unwritten += 1,
        }
        self.wake(queue);
    }

    /// Turns all counts into summaries. The writer ends when the queue is empty.
    pub(crate) fn close(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        queue.summarize(Instant::now(), true);
        self.wake(queue);
    }

    /// The number of each decision since the start.
    pub fn totals(&self) -> Totals {
        Totals {
            admitted: self.0.admitted.load(Ordering::Relaxed),
            denied: self.0.denied.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }

    /// Whether every record has been written. Counts that wait for their summary are ignored.
    pub fn is_written(&self) -> bool {
        let queue = self.lock();
        queue.waiting.is_empty() && queue.in_hand.is_none()
    }

    /// How many records the writer has finished with.
    pub(crate) fn dealt_with(&self) -> u64 {
        self.lock().dealt_with
    }

    /// Takes all records that are not written from the writer, also the one it is writing.
    pub(crate) fn take_unwritten(&self) -> Vec<Record> {
        let mut queue = self.lock();
        self.0.too_late.store(true, Ordering::Relaxed);
        let mut left: Vec<_> = queue.in_hand.take().into_iter().collect();
        left.extend(queue.waiting.drain(..));
        queue.waiting_bytes = 0;
        left
    }

    /// The summaries that stand for `left`, one for each user and reason, and a note that gives the number of the
    /// remaining records. Called when the writer has ended.
    pub(crate) fn sum_up(&self, left: &[Record]) -> Vec<Record> {
        let mut queue = self.lock();
        left.iter().for_each(|record| queue.count_again(record, record.on_stderr));
        queue.summarize(Instant::now(), true);
        std::iter::from_fn(|| queue.pop()).collect()
    }

    pub(crate) fn is_too_late(&self) -> bool {
        self.0.too_late.load(Ordering::Relaxed)
    }

    /// Wakes the writer, so that it answers the watchdog.
    pub(crate) fn nudge(&self) {
        let mut queue = self.lock();
        queue.nudged = true;
        self.wake(queue);
    }

    /// Waits for something to write.
    pub(crate) fn next(&self) -> Next {
        let mut queue = self.lock();
        loop {
            let now = Instant::now();
            queue.end_intervals(now);
            if let Some(record) = queue.pop() {
                queue.in_hand = Some(record.clone());
                return Next::Write(record);
            }
            if std::mem::take(&mut queue.nudged) {
                return Next::Nothing;
            }
            if queue.closed {
                return Next::Finished;
            }
            queue.sleeping = true;
            queue = match queue.next_tick() {
                Some(due) => {
                    let pause = due.saturating_duration_since(now);
                    self.0.wake.wait_timeout(queue, pause).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.0.wake.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
            queue.sleeping = false;
        }
    }

    /// The record in hand is about to be written to standard error. False if
    /// [`take_unwritten`](Self::take_unwritten) has taken it: then it is written from there.
    pub(crate) fn release(&self) -> bool {
        self.lock().release().is_some()
    }

    /// A [released](Self::release) record could not be written to the journal. `on_stderr` says whether all of it was
    /// written to standard error, `is_owed` whether the journal must get it later.
    ///
    /// If it is owed, or not on standard error either, a later summary counts what it stands for. A record that stands
    /// for no denial or refusal is added to the number of records left out.
    pub(crate) fn write_failed(&self, record: &Record, is_owed: bool, on_stderr: bool) {
        let mut queue = self.lock();
        queue.journal_is_away = is_owed || !on_stderr;
        match record.event {
            // A note on standard error is not counted: it may be the one that gives this very number, without end.
            Event::Note(_) if on_stderr || queue.closed => {}
            Event::Note(_) => queue.unwritten += record.stands_for_missing.max(1),
            _ if on_stderr && !is_owed => {}
            _ => {
                let on_stderr = if on_stderr { record.stands_for() } else { record.on_stderr };
                queue.count_again(record, on_stderr);
            }
        }
    }

    /// The record in hand is in the journal.
    pub(crate) fn written(&self) {
        let mut queue = self.lock();
        queue.release();
        queue.journal_is_away = false;
    }

    fn lock(&self) -> MutexGuard<'_, RecordQueue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, queue: MutexGuard<'_, RecordQueue>) {
        let sleeping = queue.sleeping;
        drop(queue);
        if sleeping {
            self.0.wake.notify_one();
        }
    }
}

impl RecordQueue {
    fn has_room(&self) -> bool {
        self.waiting.len() < MOST_WAITING && self.waiting_bytes < MOST_WAITING_BYTES
    }

    /// For how many records of admissions, ends and lines there is room. They may fill three quarters of the queue: admitted
    /// peers cause any number of them, and the last quarter is kept for denials.
    fn room_for_the_admitted(&self) -> u32 {
        let has_room = self.waiting_bytes < MOST_WAITING_BYTES / 4 * 3;
        let left = if has_room { (MOST_WAITING / 4 * 3).saturating_sub(self.waiting.len()) } else { 0 };
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    fn next_tick(&self) -> Option<Instant> {
        self.windows.next_tick().into_iter().chain(self.line_windows.next_tick()).min()
    }

    fn owner_of(&self, uid: Option<Uid>) -> Option<Uid> {
        uid.map(|uid| self.accounts.owner_of(uid))
    }

    fn release(&mut self) -> Option<Record> {
        self.dealt_with += 1;
        self.in_hand.take()
    }

    /// Counts again what `record` stands for. `on_stderr` of these are on standard error.
    fn count_again(&mut self, record: &Record, on_stderr: u64) {
        let (uid, now) = (self.owner_of(record.uid()), Instant::now());
        if matches!(record.event, Event::Line | Event::LineSummary) {
            let (lines, bytes) = (record.stands_for(), record.bytes.unwrap_or(0));
            return self.line_windows.count_lines(uid, lines, bytes, on_stderr, now);
        }
        let (reason, count) = match (record.event, record.reason, record.stands_for()) {
            (Event::Revoked, Some(reason), _) if reason != Reason::Policy => (reason, 1),
            (_, Some(reason), count @ 1..) => (reason, count),
            _ => return self.unwritten += 1,
        };
        self.windows.count(uid, reason, count, on_stderr, now);
    }

    /// Called with every denial too: a writer that waits must not make an interval longer.
    fn end_intervals(&mut self, now: Instant) {
        if self.next_tick().is_some_and(|due| due <= now) {
            self.summarize(now, false);
        }
    }

    fn push(&mut self, record: Record) {
        self.waiting_bytes += record.weight();
        self.waiting.push_back(record);
    }

    fn pop(&mut self) -> Option<Record> {
        if self.waiting.is_empty() && self.unwritten > 0 && (self.closed || !self.journal_is_away) {
            let count = std::mem::take(&mut self.unwritten);
            let were = if count == 1 { "was" } else { "were" };
            let text = format!("{} {were} not written: the journal was too slow, or away", counted(count, "record"));
            return Some(Record { stands_for_missing: count, ..Record::note(Severity::Warning, text) });
        }
        let record = self.waiting.pop_front()?;
        self.waiting_bytes -= record.weight();
        if self.waiting.is_empty() {
            // After a flood the memory is given back.
            self.waiting.shrink_to(64);
        }
        Some(record)
    }

    /// Ends the intervals that are over, or all of them, each with its summary.
    fn summarize(&mut self, now: Instant, all: bool) {
        // Summaries have room beyond that of records, because each stands for many. This room is bounded too: the journal
        // may take nothing for a long time.
        let has_room = self.closed || self.waiting.len() < MOST_WAITING + MOST_TRACKED;
        let soonest = if self.journal_is_away { now + LOOK_FOR_JOURNAL } else { now };
        for of_lines in [false, true] {
            let windows = if of_lines { &mut self.line_windows } else { &mut self.windows };
            let summaries = windows.end(now, all, has_room, soonest);
            summaries.into_iter().for_each(|summary| self.push(summary));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::ids::Gid;

    fn audit(burst: u32) -> Audit {
        Audit::new(Settings { burst, interval: Duration::from_secs(3600), ..Settings::default() })
    }

    fn deny(audit: &Audit, uid: u32) {
        let about = About { gid: Some(Gid::new(uid)), ..About::user(Uid::new(uid)) };
        audit.turned_away(Event::Denied, Reason::Policy, Some(about.uid), || Record {
            reason: Some(Reason::Policy),
            about: Some(about),
            ..Record::new(Event::Denied)
        });
    }

    fn drain(audit: &Audit) -> Vec<Record> {
        let mut out = Vec::new();
        while let Next::Write(record) = audit.next() {
            out.push(record);
        }
        out
    }

    /// The record in hand is written to standard error instead of the journal.
    fn write_to_stderr(audit: &Audit, is_owed: bool) -> bool {
        let record = audit.lock().in_hand.clone();
        let is_released = audit.release();
        record.iter().for_each(|record| audit.write_failed(record, is_owed, true));
        is_released
    }

    fn sum(records: &[Record]) -> u64 {
        records.iter().map(Record::stands_for).sum()
    }

    #[test]
    fn a_record_that_standard_error_does_not_take_is_counted_again() {
        let audit = audit(2);
        (0..5).for_each(|_| deny(&audit, 1000));
        audit.write(Record::note(Severity::Notice, "a note"));
        let lose = || {
            let Next::Write(record) = audit.next() else { panic!("nothing to write") };
            assert!(audit.release());
            audit.write_failed(&record, false, false);
        };
        (0..3).for_each(|_| lose());
        audit.set(Settings { burst: 2, interval: Duration::from_secs(3600), ..Settings::default() });
        // A lost summary is counted again too.
        lose();
        audit.close();
        let records = drain(&audit);
        assert_eq!((sum(&records), records.len()), (5, 2), "{records:?}");
        assert!(records.iter().all(|record| record.not_on_stderr().is_some_and(|rest| rest.count == record.count)));
        let missing = records.iter().find_map(|record| record.text.as_deref()).unwrap();
        assert!(missing.starts_with("1 record was not written"), "{missing}");
    }

    #[test]
    fn the_first_of_a_flood_are_written_and_the_rest_counted() {
        let audit = audit(10);
        (0..1000).for_each(|_| deny(&audit, 1000));
        deny(&audit, 1001);
        audit.close();
        let records = drain(&audit);
        assert_eq!(records.iter().filter(|record| record.event == Event::Denied).count(), 11);
        let summary: Vec<_> = records.iter().filter(|record| record.event == Event::Summary).collect();
        assert_eq!(summary.len(), 1);
        assert_eq!(summary[0].count, Some(990));
        assert_eq!(sum(&records), 1001);
    }

    #[test]
    fn users_beyond_the_tracked_ones_share_a_summary_without_uid() {
        let audit = audit(0);
        (0..5000).for_each(|uid| deny(&audit, uid));
        assert!(audit.lock().windows.by_user.len() <= MOST_TRACKED + 1);
        audit.close();
        let records = drain(&audit);
        assert_eq!(sum(&records), 5000);
        let shared: Vec<_> = records.iter().filter(|record| record.about.is_none()).collect();
        assert_eq!(shared.len(), 1);
        assert_eq!(shared[0].count, Some(5000 - MOST_TRACKED as u64));
    }

    #[test]
    fn all_subordinate_ids_of_a_user_have_one_burst_and_one_summary() {
        let (eve, first) = (1000, 100_000);
        let range = crate::policy::SubordinateRange::new(Uid::new(eve), first, first + 65_535);
        let policy = Policy::<()>::owner_only(Uid::new(0)).with_accounts(Accounts::new([range], [], [])).unwrap();
        let audit = audit(10);
        audit.count_by_owner(&policy);
        deny(&audit, eve);
        (first..first + 5000).for_each(|uid| deny(&audit, uid));
        (0..30).for_each(|nth| audit.write(revoked(first + nth, Reason::Sender)));
        (0..30).for_each(|nth| record_lines(&audit, first + nth, &[1, 1]));
        (0..20).for_each(|_| deny(&audit, 1001));
        // What the journal did not take is counted for the owner too.
        (0..4).for_each(|_| assert!(matches!(audit.next(), Next::Write(_)) && write_to_stderr(&audit, true)));
        audit.close();
        let records = drain(&audit);
        let summaries: Vec<_> = records
            .iter()
            .filter_map(|record| Some((record.reason?.as_str(), record.uid()?.raw(), record.count?)))
            .collect();
        let expected = [("policy", eve, 4991 + 4), ("sender", eve, 20), ("policy", 1001, 10), ("lines", eve, 50)];
        assert_eq!(BTreeSet::from_iter(summaries), BTreeSet::from(expected));
        let written = |event| records.iter().filter(|record| record.event == event).count();
        assert_eq!((written(Event::Denied), written(Event::Revoked), written(Event::Line)), (20 - 4, 10, 10));
    }

    #[test]
    fn denials_that_find_no_room_are_counted() {
        let audit = audit(u32::MAX);
        (0..10_000).for_each(|_| deny(&audit, 1000));
        assert_eq!(audit.lock().waiting.len(), MOST_WAITING);
        audit.close();
        assert_eq!(sum(&drain(&audit)), 10_000);
    }

    fn revoked(uid: u32, reason: Reason) -> Record {
        let about = About::user(Uid::new(uid));
        Record { reason: Some(reason), about: Some(about), ..Record::new(Event::Revoked) }
    }

    #[test]
    fn revocations_for_a_sender_are_written_and_counted_as_denials_are() {
        let audit = audit(10);
        (0..10_000).for_each(|_| audit.write(revoked(1000, Reason::Sender)));
        audit.write(revoked(1001, Reason::Sender));
        // Revocations by a reload are written one by one.
        (0..20).for_each(|_| audit.write(revoked(1000, Reason::Policy)));
        assert!(matches!(audit.next(), Next::Write(_)));
        assert!(write_to_stderr(&audit, true));
        audit.close();
        let records = drain(&audit);
        let written = |reason| {
            let of = |record: &&Record| record.event == Event::Revoked && record.reason == Some(reason);
            records.iter().filter(of).count() as u64
        };
        assert_eq!((written(Reason::Sender), written(Reason::Policy)), (10, 20));
        assert_eq!(sum(&records), 10_001 - 10);
    }

    #[test]
    fn lines_of_admitted_peers_leave_room_for_denials_and_summaries() {
        let audit = audit(10);
        (0..10_000).for_each(|_| audit.write(Record::new(Event::Line)));
        (0..30).for_each(|_| deny(&audit, 1000));
        assert_eq!(audit.lock().waiting.len(), MOST_WAITING / 4 * 3 + 10);
        // A flood of denials leaves room for their summaries.
        (0..MOST_WAITING as u32).for_each(|uid| deny(&audit, 2000 + uid % 500));
        assert_eq!(audit.lock().waiting.len(), MOST_WAITING);
        let sum_up = || audit.lock().summarize(Instant::now(), true);
        sum_up();
        assert_eq!(audit.lock().windows.by_user.values().map(|window| window.counted).sum::<u64>(), 0);
        // Summaries are bounded too.
        for _ in 0..10 {
            (0..500).for_each(|uid| deny(&audit, 2000 + uid));
            sum_up();
        }
        assert!(audit.lock().waiting.len() <= MOST_WAITING + 2 * MOST_TRACKED);
        audit.close();
        let records: Vec<_> = drain(&audit).into_iter().filter(|record| record.event != Event::Line).collect();
        assert_eq!(sum(&records), 30 + MOST_WAITING as u64 + 10 * 500);
    }

    fn record_lines(audit: &Audit, uid: u32, lengths: &[usize]) {
        let sums = (lengths.len() as u64, lengths.iter().sum::<usize>() as u64);
        audit.lines(Uid::new(uid), sums, lengths.iter().copied(), |length| Record {
            bytes: Some(length as u64),
            about: Some(About::user(Uid::new(uid))),
            ..Record::new(Event::Line)
        });
    }

    /// Lines and bytes that records of lines and their summaries stand for, and the number of these records.
    fn lines_of(records: &[Record]) -> (u64, u64, usize) {
        let lines = records.iter().filter(|record| matches!(record.event, Event::Line | Event::LineSummary));
        lines.fold((0, 0, 0), |sum, record| (sum.0 + record.stands_for(), sum.1 + record.bytes.unwrap(), sum.2 + 1))
    }

    #[test]
    fn the_first_lines_of_a_user_are_written_and_the_rest_counted() {
        let audit = audit(10);
        record_lines(&audit, 1000, &[7, 9]);
        record_lines(&audit, 1000, &[1; 65_536]);
        record_lines(&audit, 1001, &[5]);
        deny(&audit, 1000);
        assert_eq!(audit.lock().waiting.len(), 12, "in one go, and denials have a burst of their own");
        audit.close();
        let records = drain(&audit);
        assert_eq!(lines_of(&records), (65_539, 65_536 + 21, 12));
        let summary = records.iter().find(|record| record.event == Event::LineSummary).unwrap();
        assert_eq!((summary.count, summary.bytes, summary.reason), (Some(65_528), Some(65_528), Some(Reason::Lines)));
        assert!(!records.iter().any(|record| record.event == Event::Summary));
    }

    #[test]
    fn lines_without_room_or_journal_are_counted_and_leave_room_for_denials() {
        let audit = audit(u32::MAX);
        record_lines(&audit, 1000, &[3; 10_000]);
        assert_eq!(audit.lock().waiting.len(), MOST_WAITING / 4 * 3);
        (0..5000).for_each(|uid| record_lines(&audit, uid, &[1]));
        assert!(audit.lock().windows.by_user.is_empty() && audit.lock().line_windows.by_user.len() <= MOST_TRACKED + 1);
        deny(&audit, 1000);
        assert!(matches!(audit.next(), Next::Write(_)));
        assert!(write_to_stderr(&audit, true));
        audit.close();
        let records = drain(&audit);
        let (lines, bytes, _) = lines_of(&records);
        assert_eq!((lines, bytes, sum(&records) - lines), (15_000, 35_000, 1));
    }

    #[test]
    fn a_note_gives_the_number_of_unwritten_records_when_the_journal_is_back() {
        let audit = audit(10);
        let lose = |event| {
            audit.write(Record::new(event));
            assert!(matches!(audit.next(), Next::Write(_)));
            assert!(write_to_stderr(&audit, true));
        };
        lose(Event::Admitted);
        lose(Event::ConfigLoaded);
        lose(Event::Note(Severity::Warning));
        audit.nudge();
        assert!(matches!(audit.next(), Next::Nothing), "no note while the journal is away");
        audit.write(Record::new(Event::Admitted));
        assert!(matches!(audit.next(), Next::Write(_)));
        audit.written();
        let Next::Write(note) = audit.next() else { panic!("it is back") };
        assert_eq!(note.text.as_deref(), Some("2 records were not written: the journal was too slow, or away"));
    }

    #[test]
    fn a_record_that_could_not_be_written_comes_back_in_a_summary() {
        let audit = audit(10);
        (0..25).for_each(|_| deny(&audit, 1000));
        assert!(matches!(audit.next(), Next::Write(_)));
        assert!(write_to_stderr(&audit, true));
        audit.close();
        let records = drain(&audit);
        assert_eq!(sum(&records), 25);
        assert_eq!(records.last().unwrap().count, Some(16));
    }

    #[test]
    fn take_unwritten_takes_the_record_in_hand_too() {
        let audit = audit(3);
        (0..7).for_each(|_| deny(&audit, 1000));
        audit.write(Record::new(Event::Admitted));
        assert!(matches!(audit.next(), Next::Write(_)) && !audit.is_written());
        audit.close();
        let left = audit.take_unwritten();
        assert_eq!((left.len(), sum(&left)), (5, 7));
        assert!(audit.is_written() && !write_to_stderr(&audit, true), "it was taken");
        assert!(matches!(audit.next(), Next::Finished));
        let sums = audit.sum_up(&left[1..]);
        assert_eq!((sums.len(), sums[0].count), (2, Some(6)));
        assert_eq!(sums[1].text.as_deref(), Some("1 record was not written: the journal was too slow, or away"));
    }

    #[test]
    fn a_summary_on_standard_error_leaves_out_what_is_there_already() {
        let audit = audit(1);
        (0..5).for_each(|_| deny(&audit, 1000));
        assert!(matches!(audit.next(), Next::Write(_)));
        assert!(write_to_stderr(&audit, true));
        audit.close();
        let summary = drain(&audit).pop().unwrap();
        assert_eq!((summary.count, summary.not_on_stderr().unwrap().count), (Some(5), Some(4)));
        assert!(write_to_stderr(&audit, true));
        audit.lock().summarize(Instant::now(), true);
        let summary = drain(&audit).pop().unwrap();
        assert_eq!((summary.count, summary.not_on_stderr().is_none()), (Some(5), true));
        audit.written();
        (0..3).for_each(|_| deny(&audit, 1000));
        audit.lock().summarize(Instant::now(), true);
        assert_eq!(
            drain(&audit).pop().unwrap().not_on_stderr().unwrap().count,
            Some(3),
            "the journal has the first five"
        );
    }
}
