//! The running service: puts gate, workers, journal and service manager together, and takes them apart.
//!
//! The main thread does what is left: signals, reload, watchdog, status, idle exit, the end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use peergate::activation::Listener;
use peergate::audit::{self, About, Audit, Event, Reason, Record, Severity, Totals};
use peergate::gate::{self, Admission, Door, Reception, Ruling as Admitting, Setup};
use peergate::journal::Writer;
use peergate::limits::{Caps, Limits, Permit};
use peergate::peer::unmapped_ids;
use peergate::policy::{Rule, Verdict};
use peergate::service::{Activity, Notifier, Request, Signals, Store, Watchdog};

use crate::config::{Config, LoadError, Record as RecordWhat, Terms, Verify};
use crate::connection::{Carried, Ruling};
use crate::handover::{self, Inheritance};
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
/// More workers than this gain nothing by themselves; who wants more says so.
const MOST_WORKERS: usize = 16;
/// How often the main thread lets itself be woken by what others do.
const NOTICE_PAUSE: Duration = Duration::from_secs(1);

impl peergate::limits::Terms for Terms {
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
    limits: Limits,
    door: Door<Terms>,
    workers: Vec<Worker>,
    around: Surroundings,
    config: Config,
    config_path: Option<PathBuf>,
    store: Store,
    notifier: Notifier,
    signals: Signals,
    activity: Arc<Activity>,
    watchdog: Option<Watchdog>,
    /// Until then nobody wakes this thread by what they do.
    unwatched_until: Instant,
    status: Status,
    idle: Idle,
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
}

/// Why the service ends.
enum End {
    Told,
    Idle,
}

impl Service {
    fn open(start: Start, audit: Audit, journal: &Writer) -> Result<Self, String> {
        let Start { listeners, inheritance, config, config_path, store, notifier, signals } = start;
        let limits = Limits::new();
        let Inheritance { connections, stateless, unusable, foreign, next_connection } = inheritance;
        let (carried, ended) = (connections.len(), stateless.len());
        // Before the door opens: who comes gets the places that are left, not those of the ones who have been here.
        let judged = |connection| judge(connection, &config, &limits, &audit);
        let inherited = Judgement {
            live: connections.into_iter().map(judged).collect(),
            ending: stateless.into_iter().filter_map(Carried::without_state).map(judged).collect(),
        };
        // Alone on a processor, whoever looks again keeps everyone else from doing anything to be seen.
        let busy_poll = config.service.busy_poll.filter(|_| processors() > 1);
        // Workers need the door, and the door's thread needs workers as soon as somebody is admitted: it waits for them.
        let (threshold, to_threshold) = mpsc::channel();
        let opening = |error| format!("opening the gate: {error}");
        let mut setup = Setup::new(listeners, Arc::clone(&config.policy), audit.clone()).map_err(opening)?;
        setup.ruling = admitting(&config);
        setup.limits = limits.clone();
        setup.first_connection = next_connection;
        let activity = Arc::clone(&setup.activity);
        let mut door = Door::open_with(setup, Entrance { threshold: None, to_threshold }).map_err(opening)?;
        let around =
            Surroundings { audit: audit.clone(), usher: door.usher(), activity: Arc::clone(&activity), busy_poll };
        let count = config.service.workers.map_or_else(default_workers, Into::into);
        let workers: io::Result<Vec<Worker>> =
            (0..count).map(|number| Worker::start(number, serving(&config), around.clone())).collect();
        let workers = match workers {
            Ok(workers) => workers,
            Err(error) => {
                // Whoever is denied from now on would not be recorded any more.
                drop(threshold);
                drop(door.shut());
                return Err(format!("starting a worker: {error}"));
            }
        };
        let mailboxes = workers.iter().map(Worker::mailbox).collect();
        let _ = threshold.send(Threshold::new(mailboxes, audit.clone(), around.exit(), Pacing::new(busy_poll)));
        let watched = workers.iter().map(Worker::watched).chain([door.watched(), journal.watched()]).collect();
        let now = Instant::now();
        let mut service = Self {
            audit,
            limits,
            door,
            workers,
            around,
            config,
            config_path,
            store,
            notifier,
            signals,
            activity,
            watchdog: Watchdog::from_env(watched),
            unwatched_until: now,
            status: Status { said: String::new(), at: now, due: false },
            idle: Idle { totals: Totals::default(), since: now, not_before: now },
        };
        if foreign > 0 {
            service.note(Severity::Warning, format!("{foreign} stored file descriptors that are not ours were closed"));
        }
        if carried + ended > 0 {
            service.take_over(inherited);
            let why = unusable.map(|why| format!(" ({why})")).unwrap_or_default();
            let severity = if ended > 0 { Severity::Warning } else { Severity::Notice };
            service.note(severity, format!("{carried} connections carried over the restart, {ended} ended{why}"));
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
                Err(denied) => self.around.usher.revoke(denied),
            }
        }
        self.end_in_order(inherited.ending.into_iter());
    }

    /// Does what comes up, until it is time to end.
    fn attend(&mut self) -> End {
        loop {
            let now = Instant::now();
            if now >= self.unwatched_until {
                self.activity.watch();
                self.unwatched_until = now;
            }
            // What happened before the watch began wakes nobody: look for it now.
            self.notice_changes();
            if self.status.due && now >= self.status.at + STATUS_PAUSE {
                self.say_status(now);
            }
            self.feed_watchdog();
            if self.idle_exit_due().is_some_and(|due| due <= now) {
                if self.door.shut_if_quiet() {
                    return End::Idle;
                }
                self.idle.not_before = now + LOOK_AGAIN;
            }
            self.sleep();
            while let Some(request) = self.signals.next() {
                match request {
                    Request::Stop => return End::Told,
                    Request::Reload { answer_to } => self.reload(answer_to),
                    _ => {}
                }
            }
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
        let due = [status, watchdog, watch, self.idle_exit_due()].into_iter().flatten().min();
        let timeout = due.map_or(PollTimeout::NONE, |due| {
            let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut events = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.activity.as_fd(), PollFlags::POLLIN),
        ];
        // EINTR or an event: the loop looks at everything anyway.
        let _ = poll(&mut events, timeout);
        if events[1].any() == Some(true) {
            // Enough for now: who comes and goes all the time need not wake this thread each time.
            self.activity.calm();
            self.unwatched_until = Instant::now() + NOTICE_PAUSE;
        }
    }

    fn notice_changes(&mut self) {
        let totals = self.audit.totals();
        if totals != self.idle.totals || self.limits.total() > 0 {
            self.idle.totals = totals;
            self.idle.since = Instant::now();
        }
        self.status.due = self.notifier.is_present() && self.status.said != self.status_line();
    }

    fn idle_exit_due(&self) -> Option<Instant> {
        let span = self.config.service.idle_exit.filter(|_| self.limits.total() == 0)?;
        Some((self.idle.since + span).max(self.idle.not_before))
    }

    fn status_line(&self) -> String {
        let Totals { admitted, denied, .. } = self.audit.totals();
        let (connected, rules) = (self.limits.total(), self.config.policy.len());
        let plural = if rules == 1 { "" } else { "s" };
        format!("{connected} connected, {admitted} admitted, {denied} denied; policy of {rules} rule{plural}")
    }

    fn say_status(&mut self, now: Instant) {
        self.status.said = self.status_line();
        self.status.at = now;
        self.status.due = false;
        self.notifier.status(&self.status.said);
    }

    /// All or nothing: either the whole file is in force when this returns, or nothing has changed.
    fn reload(&mut self, answer_to: Option<i32>) {
        self.notifier.reloading();
        let taken = match self.load() {
            Ok(config) => {
                self.put_in_force(config);
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
    /// the watchdog is fed meanwhile.
    fn load(&mut self) -> Result<Config, LoadError> {
        let path = self.config_path.clone();
        let (done, loaded) = mpsc::channel();
        let load = move || {
            let _ = done.send(Config::load(path.as_deref()));
        };
        // Where no thread can be had the channel is closed at once.
        let _ = thread::Builder::new().name("reload".to_owned()).spawn(load);
        loop {
            let pause = self.watchdog.as_ref().map_or(Duration::MAX, |watchdog| {
                watchdog.due().saturating_duration_since(Instant::now()) + Duration::from_millis(1)
            });
            match loaded.recv_timeout(pause) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => self.feed_watchdog(),
                Err(RecvTimeoutError::Disconnected) => return Config::load(self.config_path.as_deref()),
            }
        }
    }

    fn put_in_force(&mut self, config: Config) {
        self.audit.set(audit_settings(&config));
        // First the gate, so that nobody else comes in by the old policy; then those who are in.
        let generation = self.door.rule(admitting(&config));
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
        record_configuration(&self.audit, &config, "reloaded");
        self.config = config;
    }

    fn note(&self, severity: Severity, text: String) {
        self.audit.write(Record::note(severity, text));
    }

    /// Nobody else is accepted; live connections are left to the next process, or ended in order.
    fn close(mut self, journal: Writer) {
        // Counted before anybody hears of it: who then ends by themselves is one of those who ended.
        let total = self.limits.total();
        self.notifier.stopping("stopping");
        self.door.stop_accepting();
        let total = total.max(self.limits.total());
        let carry = if total > 0 { self.store.capacity().saturating_sub(1) } else { 0 };
        self.notifier.extend_timeout(DRAIN * 6);
        let carried = end_workers(&mut self.workers, carry);
        let carried = match carried.len() {
            0 => carried,
            _ => self.leave(carried),
        };
        if total > 0 {
            let ended = total - carried.len().min(total);
            let severity = if ended > 0 { Severity::Warning } else { Severity::Notice };
            let text = format!("{} connections left to the next process, {ended} ended", carried.len());
            self.note(severity, text);
        }
        // The sockets of the carried are closed only now: the manager holds its own.
        drop(carried);
        let listeners = self.door.shut();
        let until = Instant::now() + JOURNAL_PATIENCE;
        let notifier = self.notifier.clone();
        journal.finish_while(|| {
            notifier.extend_timeout(Duration::from_secs(10));
            Instant::now() < until
        });
        drop(listeners);
    }

    /// Leaves connections to the next process. Those that could not be left are ended in order.
    fn leave(&mut self, carried: Vec<Carried>) -> Vec<Carried> {
        // Time for a batch, and for what follows if the manager does not take it.
        let takes_time = || self.notifier.extend_timeout(DRAIN * 6);
        let error = match handover::leave(&carried, self.door.next_connection(), &self.store, takes_time) {
            Ok(()) => return carried,
            Err(error) => error,
        };
        handover::retract(&self.store);
        self.note(Severity::Warning, format!("the service manager did not take the connections: {error}"));
        let judged = |connection| judge(connection, &self.config, &self.limits, &self.audit);
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
                Err(denied) => self.around.usher.revoke(denied),
            }
        }
        end_workers(&mut [worker], 0);
    }
}

/// What the gate's thread lets people in to: empty until there are workers.
struct Entrance {
    threshold: Option<Threshold>,
    to_threshold: mpsc::Receiver<Threshold>,
}

impl Reception<Terms> for Entrance {
    fn admit(&mut self, guest: Admission<Terms>) {
        if self.threshold.is_none() {
            self.threshold = self.to_threshold.recv().ok();
        }
        if let Some(threshold) = &mut self.threshold {
            threshold.admit(guest);
        }
    }

    fn linger(&mut self) -> bool {
        self.threshold.as_mut().is_some_and(Threshold::linger)
    }

    fn settle(&mut self) {
        self.threshold.iter_mut().for_each(Threshold::settle);
    }
}

/// A connection that some process admitted before, by the policy in force.
fn judge(mut connection: Carried, config: &Config, limits: &Limits, audit: &Audit) -> Judged {
    // The gate's reserves are not filled yet, or not any more: there are descriptors to ask with.
    gate::learn(&mut connection.peer, &connection.socket, &config.policy);
    match config.policy.decide(&connection.peer) {
        Verdict::Admitted(rule) => {
            let (rule, permit) = (Arc::clone(rule), limits.resume(connection.peer.uid()));
            connection.peer.release_process();
            Ok((connection, rule, permit))
        }
        Verdict::Denied(rule) => {
            let rule = rule.map_or("default", |rule| rule.name().as_str()).to_owned();
            record_revoked(&mut connection, &rule, audit);
            Err(connection.socket)
        }
    }
}

fn record_revoked(connection: &mut Carried, rule: &str, audit: &Audit) {
    let details = connection.peer.details(&connection.socket);
    let text = match rule {
        "default" => "no rule allows it any more".to_owned(),
        rule => format!("{rule} denies it now"),
    };
    let mut record = Record::note(Event::Revoked, text);
    record.reason = Some(Reason::Policy);
    record.rule = Some(rule.into());
    record.connection = Some(connection.connection);
    record.lines = Some(connection.lines);
    record.bytes = Some(connection.bytes);
    record.about = Some(About::peer(&connection.peer, details));
    audit.write(record);
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
fn default_workers() -> usize {
    (processors() / 2).clamp(1, MOST_WORKERS)
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, Into::into)
}

fn admitting(config: &Config) -> Admitting<Terms> {
    let mut ruling = Admitting::new(Arc::clone(&config.policy));
    let per_user = u32::try_from(config.limits.connections_per_user).unwrap_or(u32::MAX);
    ruling.caps = Caps::new(config.limits.connections, per_user);
    ruling.pass_credentials = config.service.verify == Verify::Line;
    ruling
}

fn serving(config: &Config) -> Ruling {
    Ruling {
        policy: Arc::clone(&config.policy),
        line_length: config.limits.line_length,
        idle_timeout: config.limits.idle_timeout,
    }
}

fn audit_settings(config: &Config) -> audit::Settings {
    let mut settings = audit::Settings::default();
    settings.scope = match config.audit.record {
        RecordWhat::Denials => audit::Scope::Denials,
        RecordWhat::Connections => audit::Scope::Connections,
        RecordWhat::Lines => audit::Scope::Lines,
    };
    settings.burst = config.audit.burst;
    settings.interval = config.audit.interval;
    settings
}

fn record_configuration(audit: &Audit, config: &Config, what: &str) {
    for warning in &config.warnings {
        audit.write(Record::note(Severity::Warning, warning.to_string()));
    }
    let source = config.source.as_deref().map_or("built-in policy (no file)".into(), Path::to_string_lossy);
    let (rules, plural) = (config.policy.len(), if config.policy.len() == 1 { "" } else { "s" });
    let text = format!("Configuration {what}: {source}, {rules} rule{plural}");
    audit.write(Record::note(Event::ConfigLoaded, text));
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
