//! Writes records to the journal, on a thread of its own, through tracing and tracing-journald.
//!
//! Sole user of tracing-journald. That crate sends on a blocking socket and reports no errors. So before each record this
//! module waits until journald is there and has room for one more. No other thread waits for this one.
//!
//! If no journal can be reached, the record goes to standard error as a line of text (stderr.rs). If there was a
//! journal before, or standard error does not take the line, a denial or refusal is counted again, for a later summary.
//! While standard error is not read, this thread waits, answers the watchdog, and tries the journal in between. When the
//! service ends, records that the journal does not take in time go to standard error as well.
//!
//! # Whether a record was written
//!
//! A record that is lost must be counted again, but tracing-journald drops the error of its sendmsg(2). Nothing in its
//! interface tells, and no other way is as good:
//!
//! - To look again whether journald is there misses a restart in between, and a lack of memory or descriptors.
//! - To send the datagram from here would be a second implementation of the crate's only task.
//! - To read the record back from the journal takes rights that the service does not have.
//!
//! But errno belongs to the thread, and the crate's last system call is made on this one. So `was_sent` clears errno
//! before the record and reads it after: the one place that depends on how the crate is made.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use tracing::dispatcher::{self, Dispatch};
use tracing_subscriber::layer::SubscriberExt;

use crate::audit::{Audit, Next, Record, Severity};
use crate::escape::printable;
use crate::ids::{Gid, Uid};
use crate::stderr::Stderr;
use crate::sys;
use crate::systemd::{Heartbeat, Monitored};

/// journald's native socket (systemd-journald.service(8)).
const SOCKET: &str = "/run/systemd/journal/socket";

/// How long a user's name is remembered before the user database is asked again.
const NAMES_LAST: Duration = Duration::from_secs(10);
/// How many users' names are remembered at once.
const MOST_NAMES: usize = 1024;
/// How many bytes are sent from one socket before the next is opened.
///
/// Datagrams that journald has not read count against the sender's buffer (net.core.wmem_default, 208 KiB). When it is full
/// send(2) waits, and [`Journal::is_ready`] cannot see that: it sees the queue of journald, which holds more
/// (net.unix.max_dgram_qlen, 512 by systemd).
const SENT_FROM_ONE: usize = 64 * 1024;
/// What a datagram costs its sender besides its bytes, at most.
const DATAGRAM: usize = 1024;

/// How long the end waits for a journald that does not read what was sent.
const READ_WITHIN: Duration = Duration::from_secs(5);

/// How long one step of waiting for standard error takes. The watchdog is answered in between.
const STEP: Duration = Duration::from_millis(250);
/// How long the end waits for standard error that takes nothing. The journal gets longer, because systemd restarts it.
const STDERR_PATIENCE: Duration = Duration::from_secs(3);

/// How long standard error may take for the records that remain at the end.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The thread that writes records.
#[derive(Debug)]
pub struct Writer {
    thread: thread::JoinHandle<()>,
    finished: Receiver<()>,
    audit: Audit,
    identifier: String,
    heartbeat: Arc<Heartbeat>,
    stderr: Stderr,
}

impl Writer {
    /// Starts to write the records of `audit`. `identifier` becomes SYSLOG_IDENTIFIER.
    ///
    /// # Errors
    /// What starting a thread reports.
    pub fn start(audit: &Audit, identifier: &str) -> io::Result<Self> {
        let heartbeat = Arc::new(Heartbeat::default());
        let stderr = Stderr::start()?;
        let mut journal = Journal::new(identifier.to_owned(), Arc::clone(&heartbeat), audit.clone(), stderr.clone());
        let (finishing, finished) = mpsc::channel();
        let run = move || {
            journal.run();
            let _ = finishing.send(());
        };
        let thread = thread::Builder::new().name("journal".to_owned()).spawn(run)?;
        Ok(Self { thread, finished, audit: audit.clone(), identifier: identifier.to_owned(), heartbeat, stderr })
    }

    /// For the watchdog.
    pub fn monitored(&self) -> Monitored {
        let audit = self.audit.clone();
        Monitored::new("journal", &self.heartbeat, move || audit.nudge())
    }

    /// Writes the remaining records and summaries, and ends. If nothing can be written for `patience`, in whole seconds
    /// and at least one, the rest goes to standard error.
    pub fn finish(self, patience: Duration) {
        self.finish_while(|stalled| stalled < patience);
    }

    /// As [`finish`](Self::finish). `has_patience` is called every second with the time since the last record was written.
    /// For a service that tells its manager that the stop takes longer.
    pub fn finish_while(self, mut has_patience: impl FnMut(Duration) -> bool) {
        self.audit.close();
        let (mut dealt_with, mut since) = (self.audit.dealt_with(), Instant::now());
        while self.finished.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
            if std::mem::replace(&mut dealt_with, self.audit.dealt_with()) != dealt_with {
                since = Instant::now();
            }
            let stalled = since.elapsed();
            let takes_nothing = stalled >= STDERR_PATIENCE && self.stderr.is_awaited();
            if takes_nothing || !has_patience(stalled) {
                // The thread is not joined: it may be waiting for the user database.
                let until = Instant::now() + if takes_nothing { Duration::ZERO } else { LAST_WORDS };
                write_rest(&self.audit, &self.identifier, &self.stderr, until);
                return;
            }
        }
        let _ = self.thread.join();
    }
}

/// Writes the remaining records to standard error instead of the journal, as many as it takes until then.
fn write_rest(audit: &Audit, identifier: &str, stderr: &Stderr, until: Instant) {
    let rest = audit.take_unwritten();
    // Standard error may lead to the same stopped journal and have little room. Records are written one by one while there
    // is room at once, and the rest as summaries in one text.
    let left = || until.saturating_duration_since(Instant::now());
    let mut one_by_one = 0;
    for record in &rest {
        if let Some(line) = line(record, Names::default(), identifier) {
            if !stderr.has_room() || !stderr.begin(line, Duration::ZERO) {
                break;
            }
            // A line that is still being written counts as written: it comes before the summaries.
            if stderr.outcome(left()) == Some(false) {
                break;
            }
        }
        one_by_one += 1;
    }
    let sums = audit.sum_up(&rest[one_by_one..]);
    let lines: String = sums.iter().filter_map(|sum| line(sum, Names::default(), identifier)).collect();
    if stderr.begin(lines, left()) {
        let _ = stderr.outcome(left());
    }
}

/// The names of a record's users, where they are known.
#[derive(Clone, Copy, Default)]
struct Names<'n> {
    user: Option<&'n str>,
    login: Option<&'n str>,
}

/// The record as a line of text; `None` if all of it is on standard error already.
fn line(record: &Record, names: Names<'_>, identifier: &str) -> Option<String> {
    let level = match record.event.severity() {
        Severity::Error => "error: ",
        Severity::Warning => "warning: ",
        Severity::Notice | Severity::Info => "",
    };
    Some(format!("{identifier}: {level}{}\n", record.not_on_stderr()?.message(names.user, names.login)))
}

struct Journal {
    audit: Audit,
    identifier: String,
    heartbeat: Arc<Heartbeat>,
    probe: Option<UnixDatagram>,
    journald: Option<Dispatch>,
    sent: usize,
    was_reached: bool,
    names: HashMap<Uid, Option<String>>,
    names_since: Instant,
    namespace_is_partial: bool,
    stderr: Stderr,
}

impl Journal {
    fn new(identifier: String, heartbeat: Arc<Heartbeat>, audit: Audit, stderr: Stderr) -> Self {
        Self {
            audit,
            identifier,
            heartbeat,
            // Opened now: there may be no descriptor left later.
            probe: UnixDatagram::unbound().ok(),
            journald: None,
            sent: 0,
            was_reached: false,
            names: HashMap::new(),
            names_since: Instant::now(),
            namespace_is_partial: false,
            stderr,
        }
    }

    fn run(&mut self) {
        self.namespace_is_partial = crate::peer::unmapped_ids().is_some();
        loop {
            self.heartbeat.answer();
            match self.audit.next() {
                Next::Write(record) => self.write(&record),
                Next::Nothing => {}
                Next::Finished => {
                    // Records that standard error did not take.
                    let sums = self.audit.sum_up(&[]);
                    let lines: String =
                        sums.iter().filter_map(|sum| line(sum, Names::default(), &self.identifier)).collect();
                    if !lines.is_empty() && self.wait_for_stderr(false) {
                        let _ = self.write_to_stderr(lines, false);
                    }
                    return self.wait_until_read();
                }
            }
        }
    }

    fn write(&mut self, record: &Record) {
        let heartbeat = Arc::clone(&self.heartbeat);
        // The user database may be on another machine. It is not asked when time is over.
        let asked = record.about.as_ref().filter(|_| !self.audit.is_too_late());
        let user = asked.and_then(|about| heartbeat.suspended(|| self.name_of(about.uid)));
        let login = asked.and_then(|about| heartbeat.suspended(|| self.name_of(about.details.login?)));
        let names = Names { user: user.as_deref(), login: login.as_deref() };
        let message = record.message(names.user, names.login);
        loop {
            if self.is_ready() {
                self.was_reached = true;
                // Another sender may take the free place first. Then sending waits for the next one.
                if heartbeat.suspended(|| self.emit(record, names, &message)) {
                    return self.audit.written();
                }
            }
            if self.audit.is_too_late() {
                return;
            }
            if self.wait_for_stderr(true) {
                break;
            }
        }
        if self.audit.release() {
            let line = line(record, names, &self.identifier);
            let told = line.is_none_or(|line| self.write_to_stderr(line, true));
            self.audit.write_failed(record, self.was_reached, told);
        }
    }

    /// Waits until standard error has finished the line before. False if time is over, or with `looks` if the journal is
    /// back.
    fn wait_for_stderr(&mut self, looks: bool) -> bool {
        self.await_stderr(looks, |stderr| stderr.outcome(STEP).map(|_| true)).unwrap_or(false)
    }

    /// Whether standard error has taken all of `text`. If that is not known in time it counts as taken: the text is written
    /// before everything that comes later.
    fn write_to_stderr(&mut self, text: String, looks: bool) -> bool {
        self.stderr.begin(text, STEP) && self.await_stderr(looks, |stderr| stderr.outcome(STEP)).unwrap_or(true)
    }

    fn await_stderr(&mut self, looks: bool, question: impl Fn(&Stderr) -> Option<bool>) -> Option<bool> {
        loop {
            self.stderr.set_awaited(true);
            let answer = question(&self.stderr);
            self.stderr.set_awaited(false);
            self.heartbeat.answer();
            if answer.is_some() || self.audit.is_too_late() || (looks && self.takes_one()) {
                return answer;
            }
        }
    }

    /// Whether journald can be reached and has room for one more record. Waits while it is reachable but full.
    fn is_ready(&mut self) -> bool {
        if !self.takes_one() {
            return false;
        }
        if self.journald.is_some() && self.sent < SENT_FROM_ONE {
            return true;
        }
        // A new socket sends an empty datagram, which took the free place.
        self.connect() && self.takes_one()
    }

    fn takes_one(&mut self) -> bool {
        // connect(2) each time: it fails while systemd-journald.socket is stopped, and finds the new socket after a start.
        let Ok(probe) = self.probe.take().map_or_else(UnixDatagram::unbound, Ok) else { return false };
        if probe.connect(SOCKET).is_err() {
            // Kept: there may be no descriptor left when journald is back.
            self.probe = Some(probe);
            return false;
        }
        let takes_one = loop {
            // A connected datagram socket is writable only while the queue of the receiver has room.
            let mut question = [PollFd::new(probe.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut question, PollTimeout::from(250_u16)) {
                Ok(0) if self.audit.is_too_late() => break false,
                Ok(0) => self.heartbeat.answer(),
                Ok(_) => {
                    let answer = question[0].revents().unwrap_or(PollFlags::empty());
                    break answer.contains(PollFlags::POLLOUT) && !answer.contains(PollFlags::POLLERR);
                }
                Err(Errno::EINTR) => {}
                Err(_) => break false,
            }
        };
        self.probe = Some(probe);
        takes_one
    }

    /// Waits until journald has read what was sent. When it reads a record it looks up the unit and the program of the
    /// process in /proc, and without those `report` does not believe the record. A process that lived for a moment may be
    /// gone by then.
    fn wait_until_read(&mut self) {
        let Some(probe) = self.probe.as_ref().filter(|_| self.journald.is_some()) else { return };
        if probe.connect(SOCKET).is_err() {
            return;
        }
        // The queue is one for all senders: when this empty datagram is read, which journald ignores, all before it have been
        // dealt with.
        let ask = || send(probe.as_raw_fd(), &[], MsgFlags::MSG_DONTWAIT);
        let is_read = || sys::sent_and_unread(probe.as_fd()).map_or(true, |size| size == 0);
        let (until, mut pause) = (Instant::now() + READ_WITHIN, Duration::from_micros(100));
        let mut asked = ask();
        while asked == Err(Errno::EAGAIN) || (asked.is_ok() && !is_read()) {
            if Instant::now() >= until || self.audit.is_too_late() {
                return;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
            self.heartbeat.answer();
            if asked.is_err() {
                asked = ask();
            }
        }
    }

    fn connect(&mut self) -> bool {
        // It sends an empty datagram, and another sender may take the free place first.
        let heartbeat = Arc::clone(&self.heartbeat);
        let Ok(layer) = heartbeat.suspended(tracing_journald::layer) else {
            // Probably out of descriptors. The old socket still works, but may have to wait.
            return self.journald.is_some();
        };
        // No prefix: fields have the names of the documentation. The crate maps INFO to notice (5) and DEBUG to info (6).
        let layer = layer.with_field_prefix(None).with_syslog_identifier(self.identifier.clone());
        self.journald = Some(Dispatch::new(tracing_subscriber::registry().with(layer)));
        self.sent = 0;
        true
    }

    /// Sends the record. False if it is lost: journald has gone since [`is_ready`](Self::is_ready), or there was no
    /// descriptor or memory to send it.
    fn emit(&mut self, record: &Record, names: Names<'_>, message: &str) -> bool {
        let Some(journald) = &self.journald else { return false };
        let about = record.about.as_ref();
        let details = about.map(|about| &about.details);
        let groups = about.filter(|about| !about.groups.is_empty()).map(|about| join(&about.groups));
        self.sent += DATAGRAM + 2 * message.len() + groups.as_ref().map_or(0, String::len);
        // tracing needs the level at compile time.
        macro_rules! event {
            ($level:expr) => {
                tracing::event!(
                    target: "peergate",
                    $level,
                    MESSAGE_ID = record.event.message_id(),
                    GATE_VERDICT = record.event.verdict(),
                    GATE_REASON = record.reason.map(crate::audit::Reason::as_str),
                    GATE_RULE = record.rule.as_deref(),
                    GATE_SOCKET = record.socket.as_deref(),
                    GATE_CONNECTION = record.connection,
                    GATE_COUNT = record.count,
                    GATE_LINES = record.lines,
                    GATE_BYTES = record.bytes,
                    GATE_BYTES_SENT = record.bytes_sent,
                    GATE_UPSTREAM = record.upstream.as_deref(),
                    GATE_DURATION_USEC = record.duration.map(|span| u64::try_from(span.as_micros()).unwrap_or(u64::MAX)),
                    PEER_UID = about.map(|about| about.uid.raw()),
                    PEER_USER = names.user,
                    PEER_GID = about.and_then(|about| about.gid).map(Gid::raw),
                    PEER_GROUPS = groups.as_deref(),
                    PEER_PID = about.and_then(|about| about.pid),
                    PEER_COMM = details.and_then(|details| details.comm.as_deref()),
                    PEER_UNIT = details.and_then(|details| details.unit.as_deref()),
                    PEER_LOGINUID = details.and_then(|details| details.login).map(Uid::raw),
                    PEER_LOGIN = names.login,
                    PEER_SESSION = details.and_then(|details| details.session),
                    PEER_LABEL = details.and_then(|details| details.label.as_deref()),
                    "{message}"
                )
            };
        }
        was_sent(|| {
            dispatcher::with_default(journald, || match record.event.severity() {
                Severity::Error => event!(tracing::Level::ERROR),
                Severity::Warning => event!(tracing::Level::WARN),
                Severity::Notice => event!(tracing::Level::INFO),
                Severity::Info => event!(tracing::Level::DEBUG),
            });
        })
    }

    /// The name of the user, from the user database.
    fn name_of(&mut self, uid: Uid) -> Option<String> {
        if !uid.is_known() && self.namespace_is_partial {
            return Some("unmapped".to_owned());
        }
        if self.names_since.elapsed() > NAMES_LAST || self.names.len() >= MOST_NAMES {
            self.names.clear();
            self.names_since = Instant::now();
        }
        let look_up = || {
            let user = sys::user_by_id(uid.raw()).ok()??;
            Some(printable(&user.name))
        };
        self.names.entry(uid).or_insert_with(look_up).clone()
    }
}

/// Whether the datagram that `send` makes tracing-journald send is in the queue of journald. The [module](self) says why
/// errno is read. Only errors count after which the crate tries no other way: after EMSGSIZE it sends a memfd.
fn was_sent(send: impl FnOnce()) -> bool {
    const IS_AWAY: [Errno; 6] =
        [Errno::ENOENT, Errno::ENOTDIR, Errno::ECONNREFUSED, Errno::ECONNRESET, Errno::ENOTCONN, Errno::EPIPE];
    const LACKS: [Errno; 4] = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
    Errno::clear();
    send();
    let error = Errno::last();
    !IS_AWAY.contains(&error) && !LACKS.contains(&error)
}

fn join(groups: &[Gid]) -> String {
    groups.iter().map(|group| group.raw().to_string()).collect::<Vec<_>>().join(",")
}
