//! The running service: puts gate, workers, journal and service manager together. The main thread then does what is left:
//! signals, reload, watchdog, status, idle exit.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use peergate::Wakeup;
use peergate::activation::Listener;
use peergate::audit::{Audit, Record, Severity, Totals};
use peergate::gate::{Gate, Setup};
use peergate::journal::Writer;
use peergate::peer::unmapped_ids;
use peergate::permits::Permits;
use peergate::poll_timeout;
use peergate::systemd::{Notifier, Request, Signals, Store, Watchdog};

use crate::cli::Choice;
use crate::close::Context;
use crate::config::Config;
use crate::first_turn::FirstTurn;
use crate::gate_thread::{FirstTurns, GateThread};
use crate::handover::{Inheritance, Unusable};
use crate::in_force::{gate_config, record_configuration, record_descriptor_limit, worker_config};
use crate::inherit::Judgement;
use crate::names::NameSearch;
use crate::protocol::Protocol;
use crate::worker::Worker;

/// How often the status line may change.
const STATUS_PAUSE: Duration = Duration::from_secs(1);
/// How soon to look again after an idle exit had to be put off, because a connection is just being closed.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// More workers than this gain nothing, unless the configuration says so.
pub const MOST_WORKERS: usize = 16;
/// How often other threads may wake the main thread.
const NOTICE_PAUSE: Duration = Duration::from_secs(1);

/// What the service is started with.
pub struct Start<P: Protocol> {
    pub listeners: Vec<Listener>,
    pub inheritance: Inheritance<P>,
    pub config: Config<P>,
    /// As given on the command line, for the reload.
    pub choice: Choice<P::Options>,
    pub store: Store,
    pub notifier: Notifier,
    pub signals: Signals,
    /// The service runs in the foreground of a terminal: a hangup ends it.
    pub ends_at_hangup: bool,
    /// Received while the configuration was read.
    pub requests: VecDeque<Request>,
}

/// Serves until told to stop, or idle for long enough.
///
/// # Errors
/// What the system refused, as a sentence.
pub fn run<P: Protocol>(start: Start<P>) -> Result<(), String> {
    let audit = Audit::new(start.config.audit);
    let journal = Writer::start(&audit, P::NAME).map_err(|error| format!("starting the journal's thread: {error}"))?;
    record_descriptor_limit(&start.config, &audit);
    if let Some(partial) = unmapped_ids() {
        audit.write(Record::note(Severity::Warning, partial));
    }
    record_configuration(&audit, &start.config, "in force");
    let mut service = match Service::open(start, audit.clone(), &journal) {
        Ok(service) => service,
        Err(error) => {
            journal.finish(Duration::from_secs(1));
            return Err(error);
        }
    };
    service.attend();
    service.stop(journal);
    Ok(())
}

/// What the main thread holds.
pub struct Service<P: Protocol> {
    pub(crate) audit: Audit,
    pub(crate) permits: Permits,
    pub(crate) gate: GateThread<P>,
    pub(crate) workers: Vec<Worker<P>>,
    pub(crate) context: Context,
    pub(crate) config: Config<P>,
    pub(crate) choice: Choice<P::Options>,
    /// The addresses of the listeners.
    pub(crate) sockets: Vec<Arc<str>>,
    pub(crate) store: Store,
    pub(crate) notifier: Notifier,
    pub(crate) signals: Signals,
    ends_at_hangup: bool,
    /// Asked for while something else was under way.
    pub(crate) requests: VecDeque<Request>,
    pub(crate) wakeup: Arc<Wakeup>,
    pub(crate) watchdog: Option<Watchdog>,
    /// Until then no other thread wakes this one.
    unwatched_until: Instant,
    pub(crate) status: Status,
    idle: Idle,
    pub(crate) names: NameSearch,
}

/// What the status line said last, and when.
pub struct Status {
    pub(crate) said: String,
    at: Instant,
    due: bool,
}

/// Since when there has been no connection.
struct Idle {
    totals: Totals,
    /// Whether there was one at the last look.
    is_present: bool,
    since: Instant,
    not_before: Instant,
}

impl<P: Protocol> Service<P> {
    fn open(start: Start<P>, audit: Audit, journal: &Writer) -> Result<Self, String> {
        let Start { listeners, inheritance, config, choice, store, notifier, signals, requests, ends_at_hangup } =
            start;
        let sockets = listeners.iter().map(|listener| Arc::clone(listener.address())).collect();
        let Inheritance { connections, lost, unusable, foreign, next_connection } = inheritance;
        let permits = Permits::new();
        let opening = |error| format!("opening the gate: {error}");
        let mut setup = Setup::new(listeners, Arc::clone(&config.policy), audit.clone()).map_err(opening)?;
        setup.config = gate_config(&config);
        setup.permits = permits.clone();
        setup.first_connection = next_connection;
        let gate = Gate::new(setup).map_err(opening)?;
        // Before the gate opens: a new connection gets a place that the earlier ones leave.
        let inherited = Judgement::of(connections, &gate.judge(), &config, &permits, &audit);
        let processors = thread::available_parallelism().map_or(1, Into::into);
        let wakeup = Arc::new(Wakeup::new().map_err(opening)?);
        let context = Context {
            audit: audit.clone(),
            closer: gate.closer(),
            judge: gate.judge(),
            wakeup: Arc::clone(&wakeup),
            // On a single processor, a thread that polls keeps the peer from sending anything.
            busy_poll: config.service.busy_poll.filter(|_| processors > 1),
        };
        let workers = start_workers(&config, processors, &context)?;
        let mailboxes = workers.iter().map(Worker::mailbox).collect();
        let first_turn = FirstTurn::new(mailboxes, context.clone(), config.settings.clone());
        let gate = GateThread::start(FirstTurns::new(gate, first_turn, Arc::clone(&wakeup))).map_err(opening)?;
        let monitored = workers.iter().map(Worker::monitored).chain([gate.monitored(), journal.monitored()]).collect();
        let now = Instant::now();
        let names = NameSearch::new(config.policy.unknown_names(), Arc::clone(&wakeup));
        let mut service = Self {
            audit,
            permits,
            gate,
            workers,
            context,
            config,
            choice,
            sockets,
            store,
            notifier,
            signals,
            ends_at_hangup,
            requests,
            wakeup,
            watchdog: Watchdog::from_env(monitored),
            unwatched_until: now,
            status: Status { said: String::new(), at: now, due: false },
            idle: Idle { totals: Totals::default(), is_present: false, since: now, not_before: now },
            names,
        };
        if let Some(text) = describe_foreign(foreign) {
            service.note(Severity::Warning, text);
        }
        service.go_on_with(inherited, lost, unusable);
        service.status.said = service.status_line();
        service.notifier.ready(&service.status.said);
        Ok(service)
    }

    /// Goes on with the connections of an earlier process, and records how many.
    fn go_on_with(&self, inherited: Judgement<P>, lost: usize, unusable: Option<Unusable>) {
        let (carried, ended, revoked) = inherited.counts();
        let ended = ended + lost;
        if carried + ended + revoked == 0 {
            return;
        }
        self.take_over(inherited);
        let why = unusable.map(|why| format!(" ({why})")).unwrap_or_default();
        let revoked = if revoked > 0 { format!(", {revoked} revoked") } else { String::new() };
        let severity = if ended > 0 { Severity::Warning } else { Severity::Notice };
        let text = format!("{carried} connections carried over the restart, {ended} ended{why}{revoked}");
        self.note(severity, text);
    }

    /// Does what comes up, until it is time to end.
    fn attend(&mut self) {
        loop {
            let now = Instant::now();
            if now >= self.unwatched_until {
                self.wakeup.arm();
                self.unwatched_until = now;
            }
            // What happened before the wake-up was armed wakes no thread: look for it now.
            self.look_for_names(now);
            self.notice_changes();
            if self.status.due && now >= self.status.at + STATUS_PAUSE {
                self.say_status(now);
            }
            self.feed_watchdog();
            if self.idle_exit_due().is_some_and(|due| due <= now) {
                // A client that connects meanwhile would wait until a journal that has stopped goes on.
                if self.audit.is_written() && self.gate.shut_if_quiet() {
                    return;
                }
                self.idle.not_before = now + LOOK_AGAIN;
            }
            if self.requests.is_empty() {
                self.sleep();
            }
            while let Some(request) = self.requests.pop_front().or_else(|| self.next_request()) {
                match request {
                    Request::Stop => return,
                    Request::Reload { answer_to } => self.reload(answer_to),
                    _ => {}
                }
            }
        }
    }

    pub(crate) fn next_request(&self) -> Option<Request> {
        match self.signals.next()? {
            Request::Reload { answer_to: None } if self.ends_at_hangup => Some(Request::Stop),
            request => Some(request),
        }
    }

    pub(crate) fn feed_watchdog(&mut self) {
        if let Some(watchdog) = &mut self.watchdog {
            let silent = watchdog.tick(&self.notifier).join(", ");
            if !silent.is_empty() {
                self.note(Severity::Error, format!("no sign of life from: {silent}"));
            }
        }
    }

    fn sleep(&mut self) {
        let status = self.status.due.then(|| self.status.at + STATUS_PAUSE);
        let watchdog = self.watchdog.as_ref().map(Watchdog::due);
        let watch = (self.unwatched_until > Instant::now()).then_some(self.unwatched_until);
        let due = [status, watchdog, watch, self.idle_exit_due(), self.names.due()].into_iter().flatten().min();
        let timeout = poll_timeout(due);
        let mut events =
            [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN), PollFd::new(self.wakeup.as_fd(), PollFlags::POLLIN)];
        // EINTR or an event: the loop looks at everything anyway.
        let _ = poll(&mut events, timeout);
        if events[1].any() == Some(true) {
            // Enough for now: not each connection is to wake this thread.
            self.wakeup.clear();
            // But an idle exit counts from when the last connection is seen to have ended.
            let pause = self.config.service.idle_exit.map_or(NOTICE_PAUSE, |span| span.min(NOTICE_PAUSE));
            self.unwatched_until = Instant::now() + pause;
        }
    }

    fn notice_changes(&mut self) {
        let (totals, is_present) = (self.audit.totals(), self.permits.total() > 0);
        // A connection that was there at the last look and is no more has ended since: that wakes this thread.
        if totals != self.idle.totals || is_present || self.idle.is_present {
            self.idle.totals = totals;
            self.idle.is_present = is_present;
            self.idle.since = Instant::now();
        }
        self.status.due = self.notifier.is_present() && self.status.said != self.status_line();
    }

    fn idle_exit_due(&self) -> Option<Instant> {
        let span = self.config.service.idle_exit.filter(|_| self.permits.total() == 0)?;
        // At an instant that no clock can tell: never.
        Some(self.idle.since.checked_add(span)?.max(self.idle.not_before))
    }

    pub(crate) fn status_line(&self) -> String {
        let Totals { admitted, denied, .. } = self.audit.totals();
        let (connected, rules) = (self.permits.total(), self.config.policy.len());
        let plural = if rules == 1 { "" } else { "s" };
        format!("{connected} connected, {admitted} admitted, {denied} denied; policy of {rules} rule{plural}")
    }

    fn say_status(&mut self, now: Instant) {
        let line = self.status_line();
        self.status.at = now;
        self.status.due = false;
        // Where the manager does not read, the line is still due after the next pause.
        if self.notifier.status(&line) {
            self.status.said = line;
        }
    }

    pub(crate) fn note(&self, severity: Severity, text: String) {
        self.audit.write(Record::note(severity, text));
    }
}

fn start_workers<P: Protocol>(
    config: &Config<P>,
    processors: usize,
    context: &Context,
) -> Result<Vec<Worker<P>>, String> {
    let count = config.service.workers.map_or_else(|| default_workers(processors), Into::into);
    let workers: io::Result<_> =
        (0..count).map(|number| Worker::start(number, worker_config(config), context.clone())).collect();
    workers.map_err(|error| format!("starting a worker: {error}"))
}

/// The clients of a local socket run on the same processors, and need as much of them: a worker for every second
/// one. More workers than that see fewer events at a time and pay more for each (benches/README.md).
fn default_workers(processors: usize) -> usize {
    (processors / 2).clamp(1, MOST_WORKERS)
}

fn describe_foreign(mut names: Vec<String>) -> Option<String> {
    let count = names.len();
    names.sort();
    names.dedup();
    let names = names.join(", ");
    (count > 0).then(|| format!("{count} stored file descriptors that are not ours were closed: {names}"))
}
