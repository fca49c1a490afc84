//! What a service does beside serving: signals, reload, watchdog, idle exit, the end.

use std::collections::VecDeque;
use std::mem::take;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

use super::{Core, Plan, Read};
use crate::audit::{Event, Record, Severity, Totals};
use crate::clock::{later, poll_timeout};
use crate::handover;
use crate::journal::Writer;
use crate::permits::Terms;
use crate::systemd::{Request, Watchdog};

/// How long connections may take to end by themselves at a stop, and then once more until they are cut off.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end waits for a journal that takes nothing.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(1);
/// How soon to look again after an idle exit had to be put off, because a connection is just being closed.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Why the service ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A signal.
    Stop,
    /// There was no connection for so long.
    Idle,
    /// The service's own code has returned.
    Done,
}

/// What a thread that reads the policy has found, and the process that waits for the outcome.
type Reading<T> = (mpsc::Receiver<Result<Read<T>, String>>, Option<i32>);

/// The one thread that hears signals and speaks to the service manager.
pub(crate) struct Attendant<T: Terms> {
    pub(crate) core: Arc<Core<T>>,
    pub(crate) plan: Plan<T>,
    journal: Writer,
    watchdog: Option<Watchdog>,
    /// Requests to reload, each with the process that waits for the outcome.
    requests: VecDeque<Option<i32>>,
    /// The policy is being read on a thread of its own, because the user database may not answer.
    reading: Option<Reading<T>>,
    /// What was counted when a connection was last seen, and when an exit is due.
    idle: (Totals, Option<Instant>),
}

impl<T: Terms> Attendant<T> {
    pub(crate) fn new(core: &Arc<Core<T>>, mut plan: Plan<T>, journal: Writer) -> Self {
        // What is stored, and not taken over by now, is closed, and the service manager forgets it.
        drop(handover::take_back(take(&mut plan.kept), &plan.name, &plan.store));
        let watchdog = Watchdog::from_env(vec![core.monitored(), journal.monitored()]);
        let idle = (Totals::default(), plan.idle_exit.map(|span| later(Instant::now(), span)));
        let (requests, reading) = (VecDeque::new(), None);
        Self { core: Arc::clone(core), plan, journal, watchdog, requests, reading, idle }
    }

    /// Until the service is to end, or its own code is `done`. Each notice of the core's wake-up makes it look.
    pub(crate) fn attend(&mut self, done: impl Fn() -> bool) -> Ending {
        self.plan.notifier.ready("serving");
        loop {
            self.core.wakeup.arm();
            if done() {
                return Ending::Done;
            }
            while let Some(request) = self.plan.signals.next() {
                match request {
                    Request::Stop => return Ending::Stop,
                    Request::Reload { answer_to } => self.requests.push_back(answer_to),
                }
            }
            self.reload();
            if self.is_idle() {
                return Ending::Idle;
            }
            self.wait(self.idle.1);
        }
    }

    /// Waits for a signal, a notice, or what is due.
    fn wait(&mut self, until: Option<Instant>) {
        let due = [self.core.live.cut_condemned(Instant::now()), until, self.feed_watchdog()];
        let mut events =
            [&self.plan.signals as &dyn AsFd, &self.core.wakeup].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
        // EINTR or an event: the loop looks at everything anyway.
        let _ = poll(&mut events, poll_timeout(due.into_iter().flatten().min()));
        if events[1].any() == Some(true) {
            self.core.wakeup.clear();
        }
    }

    /// Sends a sign of life. When the next one is due.
    fn feed_watchdog(&mut self) -> Option<Instant> {
        let watchdog = self.watchdog.as_mut()?;
        let silent = watchdog.tick(&self.plan.notifier).join(", ");
        if !silent.is_empty() {
            self.core.note(Severity::Error, format!("no sign of life from: {silent}"));
        }
        Some(watchdog.due())
    }

    fn is_idle(&mut self) -> bool {
        let (Some(span), Some(due), now) = (self.plan.idle_exit, self.idle.1, Instant::now()) else { return false };
        if due > now {
            return false;
        }
        let totals = self.core.audit.totals();
        if self.core.permits.total() > 0 || totals != self.idle.0 {
            self.idle = (totals, Some(later(now, span)));
            return false;
        }
        // A client that connects meanwhile would wait until a journal that has stopped goes on.
        let ends = self.core.audit.is_written() && self.core.end_if_quiet();
        self.idle.1 = Some(later(now, LOOK_AGAIN));
        ends
    }

    /// Takes what the reading thread has found, and starts the next one where another request waits.
    fn reload(&mut self) {
        if let Some((outcome, answer_to)) = self.reading.take() {
            match outcome.try_recv() {
                Err(mpsc::TryRecvError::Empty) => return self.reading = Some((outcome, answer_to)),
                // It panicked.
                Err(mpsc::TryRecvError::Disconnected) => self.end_reload(Err("it was not read".to_owned()), answer_to),
                Ok(read) => self.end_reload(read, answer_to),
            }
        }
        let Some(answer_to) = self.requests.pop_front() else { return };
        self.plan.notifier.reloading();
        let (found, outcome) = mpsc::channel();
        let (source, core) = (Arc::clone(&self.plan.source), Arc::clone(&self.core));
        let read = move || {
            let _ = found.send(source());
            core.wakeup.notify();
        };
        match thread::Builder::new().name("reload".to_owned()).spawn(read) {
            Ok(_) => self.reading = Some((outcome, answer_to)),
            Err(error) => self.end_reload(Err(format!("starting a thread: {error}")), answer_to),
        }
    }

    fn end_reload(&mut self, read: Result<Read<T>, String>, answer_to: Option<i32>) {
        let is_taken = read.is_ok();
        match read {
            Ok(Read { policy, warnings }) => {
                warnings.into_iter().for_each(|text| self.core.note(Severity::Warning, text));
                let rules = policy.len();
                let revoked = self.core.put_in_force(policy);
                let text = format!("policy of {rules} rules in force after a reload, {revoked} connections revoked");
                self.core.audit.write(Record::note(Event::ConfigLoaded, text));
            }
            Err(faults) => {
                let text = format!("reload refused, the policy before stays in force: {faults}");
                self.core.audit.write(Record::note(Event::ConfigRefused, text));
            }
        }
        self.plan.notifier.ready("serving");
        if let Some(pid) = answer_to {
            self.plan.signals.answer(pid, is_taken);
        }
    }

    /// Tells the service manager that the service stops, and processes that wait for a reload that there is none.
    pub(crate) fn begin_end(&mut self) {
        self.plan.notifier.stopping("stopping");
        let waiting = self.reading.take().map(|(_, answer_to)| answer_to);
        for pid in waiting.into_iter().chain(self.requests.drain(..)).flatten() {
            self.plan.signals.answer(pid, false);
        }
    }

    /// Waits until `is_over`, with signs of life meanwhile. Connections that live after [`PATIENCE`] read their end; after
    /// twice that time they are cut off.
    pub(crate) fn wait_until(&mut self, is_over: impl Fn() -> bool) {
        let began = Instant::now();
        let mut steps = [later(began, PATIENCE), later(began, PATIENCE * 2)].into_iter();
        let mut next = steps.next();
        loop {
            self.core.wakeup.arm();
            if is_over() {
                return;
            }
            if next.is_some_and(|at| at <= Instant::now()) {
                next = steps.next();
                if next.is_some() { self.core.live.end_all() } else { self.core.live.cut_all() }
            }
            self.wait(next);
        }
    }

    /// Waits until `is_over`, for [`PATIENCE`] at most.
    #[cfg(feature = "tokio")]
    pub(crate) fn wait_a_while(&mut self, is_over: impl Fn() -> bool) {
        let until = later(Instant::now(), PATIENCE);
        loop {
            self.core.wakeup.arm();
            if is_over() || until <= Instant::now() {
                return;
            }
            self.wait(Some(until));
        }
    }

    /// From now on each reader is told to leave its connection to the next process, if one follows and can take it. Otherwise
    /// it reads what has come, and then the end.
    #[cfg(any(feature = "restart", feature = "tokio"))]
    pub(crate) fn leave_or_end_all(&self, ending: Ending) {
        let Plan { store, signals, .. } = &self.plan;
        if ending == Ending::Stop && store.is_present() && !signals.stop_is_final() {
            self.core.live.leave_all();
        } else {
            self.core.live.end_all();
        }
    }

    /// Closes in order what is being closed, and writes the rest of the record.
    pub(crate) fn end(self) {
        // The sockets that we bound ourselves go last: until then a client finds the service.
        let listeners = self.core.end();
        self.journal.finish(JOURNAL_PATIENCE);
        drop(listeners);
    }
}
