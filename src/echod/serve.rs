//! The running service: puts gate, workers, journal and service manager together, and takes them apart.
//!
//! The main thread does what is left: signals, reload, watchdog, status, idle exit, the end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use peergate::Wakeup;
use peergate::activation::Listener;
use peergate::audit::{self, Audit, Event, Reason, Record, Severity, Totals};
use peergate::gate::{Gate, GateConfig, Judge, Setup};
use peergate::ids::Uid;
use peergate::journal::Writer;
use peergate::peer::unmapped_ids;
use peergate::permits::{Limits, Permit, Permits};
use peergate::policy::{Rule, Verdict};
use peergate::systemd::{Notifier, Request, Signals, Store, Watchdog};

use crate::config::{Config, Record as RecordWhat, Terms, Verify};
use crate::connection::{Carried, Ruling};
use crate::exit::Leaving;
use crate::gate_thread::GateThread;
use crate::handover::{self, Inheritance};
use crate::names::{Found, NameSearch};
use crate::pacing::Pacing;
use crate::threshold::Threshold;
use crate::worker::{Surroundings, Worker};
use crate::{EX_OSERR, IDENTIFIER};

/// How often the status line may change.
const STATUS_PAUSE: Duration = Duration::from_secs(1);
/// How soon to look again after an idle exit had to be put off: somebody is just being seen off.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long connections that cannot be handed over may take to get what they are owed.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the end may wait for a journal that takes nothing. TimeoutStopSec= of the unit is shorter: it is extended.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(60);
/// The same for one that takes what is left, but slowly.
const JOURNAL_AT_MOST: Duration = Duration::from_secs(300);
/// More workers than this gain nothing by themselves; who wants more says so.
const MOST_WORKERS: usize = 16;
/// How often the main thread lets itself be woken by what others do.
const NOTICE_PAUSE: Duration = Duration::from_secs(1);

impl peergate::permits::Terms for Terms {
    fn connections_per_user(&self) -> Option<u32> {
        self.connections_per_user
    }
}

/// What the service is started with.
pub struct Start {
    pub listeners: Vec<Listener>,
    pub inheritance: Inheritance,
    pub config: Config,
    /// As given on the command line, for the reload.
    pub config_path: Option<PathBuf>,
    pub store: Store,
    pub notifier: Notifier,
    pub signals: Signals,
    /// A hangup is that of the terminal in whose foreground the service runs, and ends it.
    pub ends_at_hangup: bool,
    /// Received while the configuration was read.
    pub requests: VecDeque<Request>,
}

/// Serves until told to stop, or idle for long enough.
///
/// # Errors
/// What the system refused, as a sentence. The exit code is [`EX_OSERR`].
pub fn run(start: Start) -> Result<(), String> {
    let audit = Audit::new(audit_settings(&start.config));
    let journal =
        Writer::start(&audit, IDENTIFIER).map_err(|error| format!("starting the journal's thread: {error}"))?;
    raise_descriptor_limit(&start, &audit);
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
    service.close(journal);
    Ok(())
}

struct Service {
    audit: Audit,
    limits: Permits,
    gate: GateThread,
    workers: Vec<Worker>,
    around: Surroundings,
    config: Config,
    config_path: Option<PathBuf>,
    store: Store,
    notifier: Notifier,
    signals: Signals,
    ends_at_hangup: bool,
    /// Asked for while something else was under way.
    requests: VecDeque<Request>,
    wakeup: Arc<Wakeup>,
    watchdog: Option<Watchdog>,
    /// Until then nobody wakes this thread by what they do.
    unwatched_until: Instant,
    status: Status,
    idle: Idle,
    names: NameSearch,
}

/// What the status line said last, and when.
struct Status {
    said: String,
    at: Instant,
    due: bool,
}

/// Since when nobody has been there.
struct Idle {
    totals: Totals,
    /// Whether anybody was, at the last look.
    is_present: bool,
    since: Instant,
    not_before: Instant,
}

/// A connection of an earlier process that may stay, with the place it takes; or the socket of one that may not, which is
/// on record already.
type Judged = Result<(Carried, Arc<Rule<Terms>>, Permit), OwnedFd>;

/// What an earlier process left, judged.
struct Judgement {
    live: Vec<Judged>,
    /// Without usable state: to be ended in order.
    ending: Vec<Judged>,
    /// And those who cannot be told anything but that it is over.
    midline: Vec<Judged>,
}

impl Judgement {
    /// How many go on, how many end for want of a state, how many may not stay.
    fn counts(&self) -> (usize, usize, usize) {
        let stay = |judged: &[Judged]| judged.iter().filter(|one| one.is_ok()).count();
        let (live, ended) = (stay(&self.live), stay(&self.ending) + stay(&self.midline));
        (live, ended, self.live.len() + self.ending.len() + self.midline.len() - live - ended)
    }
}

/// Why the service ends.
enum End {
    Told,
    Idle,
}

impl Service {
    fn open(start: Start, audit: Audit, journal: &Writer) -> Result<Self, String> {
        let Start { listeners, inheritance, config, config_path, store, notifier, signals, requests, ends_at_hangup } =
            start;
        let limits = Permits::new();
        let Inheritance { connections, stateless, midline, unusable, foreign, next_connection } = inheritance;
        let opening = |error| format!("opening the gate: {error}");
        let mut setup = Setup::new(listeners, Arc::clone(&config.policy), audit.clone()).map_err(opening)?;
        setup.config = gate_config(&config);
        setup.permits = limits.clone();
        setup.first_connection = next_connection;
        let gate = Gate::new(setup).map_err(opening)?;
        // Before the gate opens: a new connection gets a place that the earlier ones leave.
        let judge_of_gate = gate.judge();
        let judged = |connection| judge(connection, &judge_of_gate, &config, &limits, &audit);
        let inherited = Judgement {
            live: connections.into_iter().map(judged).collect(),
            ending: stateless.into_iter().map(judged).collect(),
            midline: midline.into_iter().map(judged).collect(),
        };
        // Alone on a processor, whoever looks again keeps everyone else from doing anything to be seen.
        let processors = thread::available_parallelism().map_or(1, Into::into);
        let busy_poll = config.service.busy_poll.filter(|_| processors > 1);
        let wakeup = Arc::new(Wakeup::new().map_err(opening)?);
        let around = Surroundings {
            audit: audit.clone(),
            closer: gate.closer(),
            judge: gate.judge(),
            wakeup: Arc::clone(&wakeup),
            busy_poll,
        };
        let count = config.service.workers.map_or_else(|| default_workers(processors), Into::into);
        let workers: io::Result<Vec<Worker>> =
            (0..count).map(|number| Worker::start(number, serving(&config), around.clone())).collect();
        let workers = workers.map_err(|error| format!("starting a worker: {error}"))?;
        let mailboxes = workers.iter().map(Worker::mailbox).collect();
        let threshold = Threshold::new(mailboxes, audit.clone(), around.exit(), Pacing::new(busy_poll));
        let gate = GateThread::start(gate, threshold, Arc::clone(&wakeup)).map_err(opening)?;
        let monitored = workers.iter().map(Worker::monitored).chain([gate.monitored(), journal.monitored()]).collect();
        let now = Instant::now();
        let names = NameSearch::new(config.policy.unknown_names(), Arc::clone(&wakeup));
        let mut service = Self {
            audit,
            limits,
            gate,
            workers,
            around,
            config,
            config_path,
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
        let (carried, ended, revoked) = inherited.counts();
        if carried + ended + revoked > 0 {
            service.take_over(inherited);
            let why = unusable.map(|why| format!(" ({why})")).unwrap_or_default();
            let revoked = if revoked > 0 { format!(", {revoked} revoked") } else { String::new() };
            let severity = if ended > 0 { Severity::Warning } else { Severity::Notice };
            let text = format!("{carried} connections carried over the restart, {ended} ended{why}{revoked}");
            service.note(severity, text);
        }
        service.status.said = service.status_line();
        service.notifier.ready(&service.status.said);
        Ok(service)
    }

    /// Goes on with the connections of an earlier process.
    fn take_over(&self, inherited: Judgement) {
        let mut next = (0..self.workers.len()).cycle();
        for judged in inherited.live {
            match judged {
                Ok((connection, rule, permit)) => {
                    self.workers[next.next().unwrap_or(0)].resume(connection, rule, permit);
                }
                Err(denied) => self.around.closer.close_denied(denied),
            }
        }
        let nothing = Arc::from(&b""[..]);
        for judged in inherited.midline {
            match judged {
                Ok((mut connection, rule, _)) => {
                    leaving(&mut connection).record_closed(&self.audit, Some(Reason::Stopping), rule.name().as_str());
                    self.around.closer.close_with(connection.socket, &nothing);
                }
                Err(denied) => self.around.closer.close_denied(denied),
            }
        }
        self.end_in_order(inherited.ending.into_iter());
    }

    /// Does what comes up, until it is time to end.
    fn attend(&mut self) -> End {
        loop {
            let now = Instant::now();
            if now >= self.unwatched_until {
                self.wakeup.arm();
                self.unwatched_until = now;
            }
            // What happened before the watch began wakes nobody: look for it now.
            self.look_for_names(now);
            self.notice_changes();
            if self.status.due && now >= self.status.at + STATUS_PAUSE {
                self.say_status(now);
            }
            self.feed_watchdog();
            if self.idle_exit_due().is_some_and(|due| due <= now) {
                // Nobody is to wait until a journal that has stopped goes on.
                if self.audit.is_written() && self.gate.shut_if_quiet() {
                    return End::Idle;
                }
                self.idle.not_before = now + LOOK_AGAIN;
            }
            if self.requests.is_empty() {
                self.sleep();
            }
            while let Some(request) = self.requests.pop_front().or_else(|| self.next_request()) {
                match request {
                    Request::Stop => return End::Told,
                    Request::Reload { answer_to } => self.reload(answer_to),
                    _ => {}
                }
            }
        }
    }

    fn next_request(&self) -> Option<Request> {
        match self.signals.next()? {
            Request::Reload { answer_to: None } if self.ends_at_hangup => Some(Request::Stop),
            request => Some(request),
        }
    }

    fn feed_watchdog(&mut self) {
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
        let timeout = due.map_or(PollTimeout::NONE, until);
        let mut events =
            [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN), PollFd::new(self.wakeup.as_fd(), PollFlags::POLLIN)];
        // EINTR or an event: the loop looks at everything anyway.
        let _ = poll(&mut events, timeout);
        if events[1].any() == Some(true) {
            // Enough for now: who comes and goes all the time need not wake this thread each time.
            self.wakeup.clear();
            // But an idle exit counts from when the last one is seen to have left.
            let pause = self.config.service.idle_exit.map_or(NOTICE_PAUSE, |span| span.min(NOTICE_PAUSE));
            self.unwatched_until = Instant::now() + pause;
        }
    }

    fn notice_changes(&mut self) {
        let (totals, is_present) = (self.audit.totals(), self.limits.total() > 0);
        // Who was there at the last look and is no more has left since then: the end of a connection stirs this thread.
        if totals != self.idle.totals || is_present || self.idle.is_present {
            self.idle.totals = totals;
            self.idle.is_present = is_present;
            self.idle.since = Instant::now();
        }
        self.status.due = self.notifier.is_present() && self.status.said != self.status_line();
    }

    fn idle_exit_due(&self) -> Option<Instant> {
        let span = self.config.service.idle_exit.filter(|_| self.limits.total() == 0)?;
        // At a time that no clock can tell: never.
        Some(self.idle.since.checked_add(span)?.max(self.idle.not_before))
    }

    fn status_line(&self) -> String {
        let Totals { admitted, denied, .. } = self.audit.totals();
        let (connected, rules) = (self.limits.total(), self.config.policy.len());
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

    /// All or nothing: either the whole file is in force when this returns, or nothing has changed.
    fn reload(&mut self, answer_to: Option<i32>) {
        self.notifier.reloading();
        let taken = match self.load() {
            Ok(config) => {
                let config = self.keep_ids(config);
                self.put_in_force(config);
                record_configuration(&self.audit, &self.config, "reloaded");
                true
            }
            Err(error) => {
                let text = format!("The configuration was refused, the old one stays in force:\n{error}");
                self.audit.write(Record::note(Event::ConfigRefused, text));
                false
            }
        };
        self.status.said = self.status_line();
        self.notifier.ready(&self.status.said);
        if let Some(pid) = answer_to {
            self.signals.answer(pid, taken);
        }
    }

    /// Reads the configuration. The user database may be far away, and a restart of ours would not bring it nearer: so
    /// the watchdog is fed meanwhile, and who wants us to stop is heard.
    fn load(&mut self) -> Result<Config, String> {
        let config = self.load_elsewhere()?;
        match &self.config.source {
            // To go on with the built-in policy would throw everybody out: whoever wants that restarts the service.
            Some(path) if config.source.is_none() => {
                Err(format!("{}: is gone; expected the file that what is in force was read from", path.display()))
            }
            _ => Ok(config),
        }
    }

    fn load_elsewhere(&mut self) -> Result<Config, String> {
        let path = self.config_path.clone();
        let load_here = move || Config::load(path.as_deref()).map_err(|error| error.to_string());
        let (result, loaded) = mpsc::channel();
        let (load, wakeup) = (load_here.clone(), Arc::clone(&self.wakeup));
        let load = move || {
            let _ = result.send(load());
            // Not a descriptor of its own: there may be none left.
            wakeup.notify();
        };
        // Where no thread can be had the channel is closed at once.
        let _ = thread::Builder::new().name("reload".to_owned()).spawn(load);
        loop {
            // What happened before the watch began wakes nobody: look for it now.
            self.wakeup.arm();
            match loaded.try_recv() {
                Ok(result) => return result,
                Err(TryRecvError::Disconnected) => return load_here(),
                Err(TryRecvError::Empty) => {}
            }
            let timeout = self.watchdog.as_ref().map_or(PollTimeout::NONE, |watchdog| until(watchdog.due()));
            let mut events = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wakeup.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut events, timeout);
            self.wakeup.clear();
            self.feed_watchdog();
            while let Some(request) = self.next_request() {
                if request == Request::Stop {
                    // Before those who asked for another reload earlier: that one would wait as this one does.
                    self.requests.push_front(request);
                    return Err("the service was told to stop while it was being read".to_owned());
                }
                self.requests.push_back(request);
            }
        }
    }

    fn put_in_force(&mut self, config: Config) {
        self.audit.set(audit_settings(&config));
        // First the gate, so that nobody else comes in by the old policy; then those who are in.
        let generation = self.gate.configure(gate_config(&config));
        let (done, finished) = mpsc::channel();
        for worker in &self.workers {
            worker.rule(serving(&config), generation, done.clone());
        }
        drop(done);
        // One word from each; then the channel is closed.
        while finished.recv().is_ok() {}
        for (what, old, new) in [
            ("workers", format!("{:?}", self.config.service.workers), format!("{:?}", config.service.workers)),
            ("busy-poll", format!("{:?}", self.config.service.busy_poll), format!("{:?}", config.service.busy_poll)),
        ] {
            if old != new {
                self.note(
                    Severity::Warning,
                    format!("[service] {what} changes with the next restart, not with a reload"),
                );
            }
        }
        self.names.set_names(config.policy.unknown_names(), Instant::now());
        self.config = config;
    }

    /// A name for which the user database gives no answer just now keeps the id that the policy in force has for it: to
    /// lose it would cut off the peers that it admits.
    fn keep_ids(&self, config: Config) -> Config {
        if config.unanswered.is_empty() {
            return config;
        }
        let known = self.config.policy.known_names();
        let kept: Found = config.unanswered.iter().filter_map(|name| Some((name.clone(), *known.get(name)?))).collect();
        if kept.is_empty() {
            return config;
        }
        self.note(Severity::Warning, format!("the user database did not answer; as before: {}", listed(&kept)));
        self.with_ids(&config, &kept).unwrap_or(config)
    }

    /// Puts names into force that have been found since the configuration was read, as a reload would.
    fn look_for_names(&mut self, now: Instant) {
        let found = self.names.turn(now);
        if found.is_empty() {
            return;
        }
        let Some(config) = self.with_ids(&self.config, &found) else { return };
        self.put_in_force(config);
        let text = format!("Names found and in force: {}; configuration: {}", listed(&found), describe(&self.config));
        self.audit.write(Record::note(Event::ConfigLoaded, text));
    }

    fn with_ids(&self, config: &Config, ids: &Found) -> Option<Config> {
        match config.policy.with_ids(ids) {
            Ok(policy) => Some(Config { policy: Arc::new(policy), ..config.clone() }),
            Err(error) => {
                self.note(Severity::Error, format!("names that were found cannot be used: {error}"));
                None
            }
        }
    }

    fn note(&self, severity: Severity, text: String) {
        self.audit.write(Record::note(severity, text));
    }

    /// Nobody else is accepted; live connections are left to the next process, or ended in order.
    fn close(mut self, journal: Writer) {
        // Counted before anybody hears of it: who then ends by themselves is one of those who ended.
        let total = self.limits.total();
        self.notifier.stopping("stopping");
        let next_connection = self.gate.stop_accepting();
        let total = total.max(self.limits.total());
        // Who waits for the answer to a reload will get no other.
        let waiting = self.requests.drain(..).chain(std::iter::from_fn(|| self.signals.next()));
        let waiting: Vec<_> = waiting.collect();
        for request in waiting {
            if let Request::Reload { answer_to: Some(pid) } = request {
                self.signals.answer(pid, false);
            }
        }
        let carry = match handover::most_left(self.store.capacity()) {
            most if most == 0 || total == 0 || self.signals.stop_is_final() => 0,
            most => most,
        };
        self.notifier.extend_timeout(DRAIN * 6);
        let carried = end_workers(&mut self.workers, carry);
        let carried = match carried.len() {
            0 => carried,
            _ => self.leave(carried, next_connection),
        };
        if total > 0 {
            let ended = total - carried.len().min(total);
            let severity = if ended > 0 { Severity::Warning } else { Severity::Notice };
            let text = format!("{} connections left to the next process, {ended} ended", carried.len());
            self.note(severity, text);
        }
        // The sockets of the carried are closed only now: the manager holds its own.
        drop(carried);
        let listeners = self.gate.shut();
        finish(journal, &self.notifier);
        drop(listeners);
    }

    /// Leaves connections to the next process. Those that could not be left are ended in order.
    fn leave(&mut self, carried: Vec<Carried>, next_connection: u64) -> Vec<Carried> {
        // Time for a batch, and for what follows if the manager does not take it.
        let takes_time = || self.notifier.extend_timeout(DRAIN * 6);
        let error = match handover::leave(&carried, next_connection, &self.store, takes_time) {
            Ok(()) => return carried,
            Err(error) => error,
        };
        handover::retract(&self.store);
        self.note(Severity::Warning, format!("the service manager did not take the connections: {error}"));
        let judged = |connection| judge(connection, &self.around.judge, &self.config, &self.limits, &self.audit);
        self.end_in_order(carried.into_iter().map(judged));
        Vec::new()
    }

    /// Connections in no worker's hands get the echo of everything they sent, then their end of file, from
    /// a worker of their own.
    fn end_in_order(&self, connections: impl Iterator<Item = Judged>) {
        let mut connections = connections.peekable();
        if connections.peek().is_none() {
            return;
        }
        let Ok(worker) = Worker::start(self.workers.len(), serving(&self.config), self.around.clone()) else { return };
        for judged in connections {
            match judged {
                Ok((connection, rule, permit)) => worker.resume(connection, rule, permit),
                Err(denied) => self.around.closer.close_denied(denied),
            }
        }
        end_workers(&mut [worker], 0);
    }
}

/// Records that `count` connections of an earlier process stay in the store, where this one was told to make way for a
/// next one before it took them back.
pub fn leave_kept(count: usize, notifier: &Notifier) {
    if count == 0 {
        return;
    }
    let audit = Audit::new(audit_settings(&Config::without_file(Uid::effective())));
    let Ok(journal) = Writer::start(&audit, IDENTIFIER) else { return };
    audit.write(Record::note(Severity::Notice, format!("{count} connections left to the next process, 0 ended")));
    finish(journal, notifier);
}

/// Ends the connections of an earlier process where this one does not serve: nobody is judged, each is echoed what it is
/// owed, and sees its end.
pub fn end_inherited(inheritance: Inheritance, notifier: &Notifier, why: &str) {
    let count = inheritance.len();
    if count == 0 {
        return;
    }
    let config = Config::without_file(Uid::effective());
    let audit = Audit::new(audit_settings(&config));
    let Ok(journal) = Writer::start(&audit, IDENTIFIER) else { return };
    if let Err(error) = end_unjudged(inheritance, &config, &audit) {
        audit.write(Record::note(Severity::Error, format!("ending connections of an earlier process: {error}")));
    }
    let text = format!("{count} connections of an earlier process ended: {why}");
    audit.write(Record::note(Severity::Warning, text));
    finish(journal, notifier);
}

fn end_unjudged(inheritance: Inheritance, config: &Config, audit: &Audit) -> io::Result<()> {
    let Some(rule) = config.policy.rules().next() else { return Ok(()) };
    let setup = Setup::without_listeners(Arc::clone(&config.policy), audit.clone());
    let limits = setup.permits.clone();
    let gate = Gate::new(setup)?;
    let around = Surroundings {
        audit: audit.clone(),
        closer: gate.closer(),
        judge: gate.judge(),
        wakeup: Arc::new(Wakeup::new()?),
        busy_poll: None,
    };
    // No limit of ours may cut off what was accepted by theirs.
    let worker = Worker::start(0, Ruling { line_length: usize::MAX, ..serving(config) }, around.clone())?;
    for connection in inheritance.connections.into_iter().chain(inheritance.stateless) {
        let permit = limits.resume(connection.peer.uid());
        worker.resume(connection, Arc::clone(rule), permit);
    }
    let nothing = Arc::from(&b""[..]);
    inheritance.midline.into_iter().for_each(|connection| around.closer.close_with(connection.socket, &nothing));
    end_workers(&mut [worker], 0);
    gate.finish();
    Ok(())
}

/// The journal's last records, for which systemd is asked to wait.
fn finish(journal: Writer, notifier: &Notifier) {
    let until = Instant::now() + JOURNAL_AT_MOST;
    journal.finish_while(|stalled| {
        notifier.extend_timeout(Duration::from_secs(10));
        stalled < JOURNAL_PATIENCE && Instant::now() < until
    });
}

/// `user "alice" (1001), group "adm" (4)`; not more than a message should hold.
fn listed(names: &Found) -> String {
    const MOST: usize = 20;
    let mut listed: Vec<_> = names.iter().take(MOST).map(|(name, id)| format!("{name} ({id})")).collect();
    if names.len() > MOST {
        listed.push(format!("and {} more", names.len() - MOST));
    }
    listed.join(", ")
}

fn describe_foreign(mut names: Vec<String>) -> Option<String> {
    let count = names.len();
    names.sort();
    names.dedup();
    let names = names.join(", ");
    (count > 0).then(|| format!("{count} stored file descriptors that are not ours were closed: {names}"))
}

/// How long to sleep for something that is due then.
fn until(due: Instant) -> PollTimeout {
    // Rounded up, so as not to wake just before the time.
    let left = due.saturating_duration_since(Instant::now()).saturating_add(Duration::from_millis(1));
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

/// A connection that some process admitted before, by the policy in force.
fn judge(mut connection: Carried, judge: &Judge, config: &Config, limits: &Permits, audit: &Audit) -> Judged {
    match judge.judge(&mut connection.peer, &connection.socket, &config.policy) {
        Verdict::Admitted(rule) => {
            if !connection.verify(config.service.verify == Verify::Line) {
                let rule = rule.name().as_str();
                let mut leaving = leaving(&mut connection);
                leaving.record_unattested(audit, rule);
                leaving.record_closed(audit, Some(Reason::Sender), rule);
                return Err(connection.socket);
            }
            let (rule, permit) = (Arc::clone(rule), limits.resume(connection.peer.uid()));
            connection.peer.release_process();
            connection.peer.forget_groups();
            Ok((connection, rule, permit))
        }
        Verdict::Denied(rule) => {
            let rule = rule.map(|rule| rule.name().as_str());
            let mut leaving = leaving(&mut connection);
            leaving.record_denied(audit, rule);
            leaving.record_closed(audit, Some(Reason::Policy), rule.unwrap_or("default"));
            Err(connection.socket)
        }
    }
}

fn leaving(connection: &mut Carried) -> Leaving<'_> {
    Leaving {
        socket: connection.socket.as_fd(),
        peer: &mut connection.peer,
        number: connection.connection,
        lines: connection.lines,
        bytes: connection.bytes,
        age: connection.age,
    }
}

/// Ends all workers; what comes back are up to `carry` connections at rest.
fn end_workers(workers: &mut [Worker], carry: usize) -> Vec<Carried> {
    let (reply, replies) = mpsc::channel();
    let until = Instant::now() + DRAIN;
    let mut left = carry;
    for worker in &mut *workers {
        // A connection that is just being handed over by the gate is counted already.
        let share = worker.connections().min(left);
        left -= share;
        worker.end(share, until, reply.clone());
    }
    drop(reply);
    let carried = replies.iter().flatten().collect();
    workers.iter_mut().for_each(Worker::join);
    carried
}

/// The clients of a local socket run on the same processors, and need as much of them: a worker for every second
/// one. More workers than that see fewer events at a time and pay more for each (benches/README.md).
fn default_workers(processors: usize) -> usize {
    (processors / 2).clamp(1, MOST_WORKERS)
}

fn gate_config(config: &Config) -> GateConfig<Terms> {
    let mut ruling = GateConfig::new(Arc::clone(&config.policy));
    let per_user = u32::try_from(config.limits.connections_per_user).unwrap_or(u32::MAX);
    ruling.limits = Limits::new(config.limits.connections, per_user);
    ruling.pass_credentials = config.service.verify == Verify::Line;
    ruling
}

fn serving(config: &Config) -> Ruling {
    Ruling {
        policy: Arc::clone(&config.policy),
        line_length: config.limits.line_length,
        idle_timeout: config.limits.idle_timeout,
        verify: config.service.verify == Verify::Line,
    }
}

fn audit_settings(config: &Config) -> audit::Settings {
    let mut settings = audit::Settings::default();
    settings.scope = match config.audit.record {
        RecordWhat::Denials => audit::RecordScope::Denials,
        RecordWhat::Connections => audit::RecordScope::Connections,
        RecordWhat::Lines => audit::RecordScope::Lines,
    };
    settings.burst = config.audit.burst;
    settings.interval = config.audit.interval;
    settings
}

fn record_configuration(audit: &Audit, config: &Config, what: &str) {
    for warning in &config.warnings {
        audit.write(Record::note(Severity::Warning, warning.to_string()));
    }
    audit.write(Record::note(Event::ConfigLoaded, format!("Configuration {what}: {}", describe(config))));
}

/// `/etc/echod/echod.toml, 3 rules`.
fn describe(config: &Config) -> String {
    let source = config.source.as_deref().map_or("built-in policy (no file)".into(), Path::to_string_lossy);
    let (rules, plural) = (config.policy.len(), if config.policy.len() == 1 { "" } else { "s" });
    format!("{source}, {rules} rule{plural}")
}

/// Each connection is a descriptor, and so is each peer on its way out. The soft limit is 1024 by default
/// for the sake of select(2), which nothing here uses.
fn raise_descriptor_limit(start: &Start, audit: &Audit) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < hard {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let wanted = start.config.limits.connections as u64 + 512;
    if hard < wanted {
        let text = format!(
            "[limits] connections = {} needs about {wanted} file descriptors, the hard limit is {hard} (LimitNOFILE=)",
            start.config.limits.connections
        );
        audit.write(Record::note(Severity::Warning, text));
    }
}

/// The exit code that goes with [`run`]'s errors.
pub const FAILURE: u8 = EX_OSERR;
