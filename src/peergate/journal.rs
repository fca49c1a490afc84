//! Records become journal entries, on a thread of their own, through tracing and tracing-journald.
//!
//! Sole user of tracing-journald. That crate sends with a blocking socket and swallows errors; so before each record
//! this module makes sure that journald is there and takes one more, waiting as long as it must (nobody waits for us).
//! Where no journal can be reached, the record goes to standard error as a line of text ([`crate::stderr`]). If there was
//! a journal before, or standard error does not take the line, a denial or refusal is counted into a summary for later.
//! While standard error is not read this thread waits, with a sign of life, and looks for the journal meanwhile. In the
//! end, what a journal has not taken for long enough goes to standard error too.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::dispatcher::{self, Dispatch};
use tracing_subscriber::layer::SubscriberExt;

use crate::audit::{Audit, Next, Record, Severity};
use crate::escape::printable;
use crate::ids::{Gid, Uid};
use crate::stderr::Stderr;
use crate::systemd::{Heartbeat, Monitored};

/// journald's native socket (systemd-journald.service(8)).
const SOCKET: &str = "/run/systemd/journal/socket";

/// How long a user's name stays known before the user database is asked again.
const NAMES_LAST: Duration = Duration::from_secs(10);
/// How many users' names are remembered at once.
const MOST_NAMES: usize = 1024;
/// How much is sent from one socket before the next is opened. What journald has not read yet counts against its
/// sender's buffer (net.core.wmem_default, 208 KiB), and once that is full send(2) waits, which [`Journal::is_ready`]
/// could not see: journald's queue, which it does see, holds more than that (net.unix.max_dgram_qlen, 512 by systemd).
const SENT_FROM_ONE: usize = 64 * 1024;
/// What a datagram costs its sender besides its bytes, at most.
const DATAGRAM: usize = 1024;

/// How long one step of waiting for standard error takes. In between the thread gives a sign of life.
const STEP: Duration = Duration::from_millis(250);
/// How long the end waits for standard error that takes nothing. It is less than for a journal: systemd starts a journal
/// again, but no reader of a pipe.
const STDERR_PATIENCE: Duration = Duration::from_secs(3);

/// How long standard error may take for what a journal has not taken in the end.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The thread that writes.
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
    /// Starts to write what `audit` takes in. `identifier` becomes SYSLOG_IDENTIFIER.
    ///
    /// # Errors
    /// What starting a thread says.
    pub fn start(audit: &Audit, identifier: &str) -> io::Result<Self> {
        let heartbeat = Arc::new(Heartbeat::default());
        let stderr = Stderr::start()?;
        let mut journal = Journal::new(identifier.to_owned(), Arc::clone(&heartbeat), audit.clone(), stderr.clone());
        let (finishing, finished) = mpsc::channel();
        let run = move || {
            journal.run();
            // The other end waits for this or is gone.
            let _ = finishing.send(());
        };
        let thread = thread::Builder::new().name("journal".to_owned()).spawn(run)?;
        Ok(Self { thread, finished, audit: audit.clone(), identifier: identifier.to_owned(), heartbeat, stderr })
    }

    /// For the watchdog.
    pub fn monitored(&self) -> Monitored {
        let audit = self.audit.clone();
        Monitored {
            name: "journal".to_owned(),
            heartbeat: Arc::clone(&self.heartbeat),
            nudge: Box::new(move || audit.nudge()),
        }
    }

    /// Writes what waits, summaries included, and ends. Where nothing gets through for as long as `patience`, in whole
    /// seconds and at least one, what is left goes to standard error.
    pub fn finish(self, patience: Duration) {
        self.finish_while(|stalled| stalled < patience);
    }

    /// As [`finish`](Self::finish); `has_patience` is asked every second, and told for how long nothing has got through.
    /// For a service that has to tell its manager that it takes longer.
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
                // The thread is not waited for: what holds it up may be no journal, but the user database.
                let until = Instant::now() + if takes_nothing { Duration::ZERO } else { LAST_WORDS };
                tell_the_rest(&self.audit, &self.identifier, &self.stderr, until);
                return;
            }
        }
        let _ = self.thread.join();
    }
}

/// Gives up on the journal: what has not been written goes to standard error, as far as it takes that by then.
fn tell_the_rest(audit: &Audit, identifier: &str, stderr: &Stderr, until: Instant) {
    let rest = audit.take_unwritten();
    // Standard error may be the stopped journal too, and has room for some of it then: for each record as long as it
    // takes one more at once, in the end for what the others come to, all in one.
    let left = || until.saturating_duration_since(Instant::now());
    let mut one_by_one = 0;
    for record in &rest {
        if let Some(line) = line(record, None, identifier) {
            if !stderr.has_room() || !stderr.begin(line, Duration::ZERO) {
                break;
            }
            // What it is still writing when time is up has been handed over, and comes before the sums.
            if stderr.outcome(left()) == Some(false) {
                break;
            }
        }
        one_by_one += 1;
    }
    let sums = audit.sum_up(&rest[one_by_one..]);
    let lines: String = sums.iter().filter_map(|sum| line(sum, None, identifier)).collect();
    if stderr.begin(lines, left()) {
        let _ = stderr.outcome(left());
    }
}

/// The record as a line of text; `None` where standard error has told it all before.
fn line(record: &Record, user: Option<&str>, identifier: &str) -> Option<String> {
    let level = match record.event.severity() {
        Severity::Error => "error: ",
        Severity::Warning => "warning: ",
        Severity::Notice | Severity::Info => "",
    };
    Some(format!("{identifier}: {level}{}\n", record.not_on_stderr()?.message(user)))
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
            // At once: later there may be no descriptor for it.
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
                    // What standard error did not take when it was its turn.
                    let sums = self.audit.sum_up(&[]);
                    let lines: String = sums.iter().filter_map(|sum| line(sum, None, &self.identifier)).collect();
                    if !lines.is_empty() && self.wait_for_stderr(false) {
                        let _ = self.tell(lines, false);
                    }
                    return;
                }
            }
        }
    }

    fn write(&mut self, record: &Record) {
        let heartbeat = Arc::clone(&self.heartbeat);
        // The user database may be far away: too far, when there is no time left.
        let asked = record.about.as_ref().filter(|_| !self.audit.is_too_late());
        let user = asked.and_then(|about| heartbeat.suspended(|| self.name_of(about.uid)));
        let message = record.message(user.as_deref());
        loop {
            if self.is_ready() {
                self.was_reached = true;
                // Others may have taken the place that was free a moment ago; then sending waits for the next one.
                if heartbeat.suspended(|| self.emit(record, user.as_deref(), &message)) {
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
            let line = line(record, user.as_deref(), &self.identifier);
            let told = line.is_none_or(|line| self.tell(line, true));
            self.audit.write_failed(record, self.was_reached, told);
        }
    }

    /// Waits until standard error has dealt with the line before. False where the journal is back, if `looks` for it, or
    /// it is too late.
    fn wait_for_stderr(&mut self, looks: bool) -> bool {
        self.await_stderr(looks, |stderr| stderr.outcome(STEP).map(|_| true)).unwrap_or(false)
    }

    /// Whether standard error has taken the whole of it. What is not known while there is time to wait is taken for told:
    /// it comes before everything else that is handed over.
    fn tell(&mut self, text: String, looks: bool) -> bool {
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

    /// Whether journald can be reached and takes one more; waits while it can be reached but takes nothing.
    fn is_ready(&mut self) -> bool {
        if !self.takes_one() {
            return false;
        }
        if self.journald.is_some() && self.sent < SENT_FROM_ONE {
            return true;
        }
        // To open one sends an empty datagram: that took the place we waited for.
        self.connect() && self.takes_one()
    }

    fn takes_one(&mut self) -> bool {
        // connect(2) fails where nothing is bound to the path, as after systemd-journald.socket was
        // stopped, and finds the new socket after it was started again.
        let Ok(probe) = self.probe.take().map_or_else(UnixDatagram::unbound, Ok) else { return false };
        if probe.connect(SOCKET).is_err() {
            // Kept: there may be no descriptor for another one when journald is back.
            self.probe = Some(probe);
            return false;
        }
        let takes_one = loop {
            // A connected datagram socket polls writable only while the receiver's queue has room.
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

    fn connect(&mut self) -> bool {
        // It sends an empty datagram, and others may have taken the place that was free a moment ago.
        let heartbeat = Arc::clone(&self.heartbeat);
        let Ok(layer) = heartbeat.suspended(tracing_journald::layer) else {
            // Out of descriptors, most likely, since journald was there a moment ago: better one that may have to wait.
            return self.journald.is_some();
        };
        // No prefix: the contract's field names are the journal's. The crate's own mapping of
        // levels to priorities loses nothing: INFO is notice (5), DEBUG is info (6).
        let layer = layer.with_field_prefix(None).with_syslog_identifier(self.identifier.clone());
        self.journald = Some(Dispatch::new(tracing_subscriber::registry().with(layer)));
        self.sent = 0;
        true
    }

    /// Sends the record. False where it is lost: journald went away since [`is_ready`](Self::is_ready) looked, or there
    /// was no descriptor or memory to send it with.
    fn emit(&mut self, record: &Record, user: Option<&str>, message: &str) -> bool {
        let Some(journald) = &self.journald else { return false };
        let about = record.about.as_ref();
        let details = about.map(|about| &about.details);
        let groups = about.filter(|about| !about.groups.is_empty()).map(|about| join(&about.groups));
        self.sent += DATAGRAM + 2 * message.len() + groups.as_ref().map_or(0, String::len);
        // One list of fields, four levels: tracing wants the level when it is compiled.
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
                    GATE_DURATION_USEC = record.duration.map(|span| u64::try_from(span.as_micros()).unwrap_or(u64::MAX)),
                    PEER_UID = about.map(|about| about.uid.raw()),
                    PEER_USER = user,
                    PEER_GID = about.and_then(|about| about.gid).map(Gid::raw),
                    PEER_GROUPS = groups.as_deref(),
                    PEER_PID = about.and_then(|about| about.pid),
                    PEER_COMM = details.and_then(|details| details.comm.as_deref()),
                    PEER_UNIT = details.and_then(|details| details.unit.as_deref()),
                    PEER_LABEL = details.and_then(|details| details.label.as_deref()),
                    "{message}"
                )
            };
        }
        // tracing-journald keeps the error of its last system call to itself; the thread's errno still has it. Only
        // what says that nobody is there counts, or that there was nothing to send with (a large record takes a memfd):
        // EMSGSIZE, for one, is followed by another way to send.
        Errno::clear();
        dispatcher::with_default(journald, || match record.event.severity() {
            Severity::Error => event!(tracing::Level::ERROR),
            Severity::Warning => event!(tracing::Level::WARN),
            Severity::Notice => event!(tracing::Level::INFO),
            Severity::Info => event!(tracing::Level::DEBUG),
        });
        !matches!(
            Errno::last(),
            Errno::ENOENT
                | Errno::ECONNREFUSED
                | Errno::ECONNRESET
                | Errno::ENOTCONN
                | Errno::EPIPE
                | Errno::ENOTDIR
                | Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOMEM
                | Errno::ENOBUFS
        )
    }

    /// The user's name, from the user database, now and then afresh.
    fn name_of(&mut self, uid: Uid) -> Option<String> {
        if !uid.is_known() && self.namespace_is_partial {
            return Some("unmapped".to_owned());
        }
        if self.names_since.elapsed() > NAMES_LAST || self.names.len() >= MOST_NAMES {
            self.names.clear();
            self.names_since = Instant::now();
        }
        let look_up = || {
            let user = crate::sys::user_by_id(uid.raw()).ok()??;
            Some(printable(&user.name))
        };
        self.names.entry(uid).or_insert_with(look_up).clone()
    }
}

fn join(groups: &[Gid]) -> String {
    groups.iter().enumerate().fold(String::new(), |mut list, (i, group)| {
        if i > 0 {
            list.push(',');
        }
        list.push_str(&group.raw().to_string());
        list
    })
}
