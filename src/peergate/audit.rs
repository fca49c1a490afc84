//! What is recorded and what is counted; the event ids.
//!
//! The gate and whoever serves behind it hand their records over here and go on at once. One thread
//! ([`journal`](crate::journal)) takes them out again and writes them. In between, a flood is thinned:
//! the first [`burst`](Settings::burst) denials of each user and reason in an interval are kept whole, the
//! rest become a number that a summary tells at the interval's end. Nothing is lost on the way, so that
//!
//! > denials that clients saw = records of verdict *denied* + the counts of summaries for the reasons
//! > *policy* and *no-credentials*
//!
//! Memory is bounded whatever happens: so many records wait at most, so many users are told apart.
//!
//! Whoever accepts without a [`Door`](crate::Door) hands in what it would:
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use std::sync::Arc;
//! use peergate::{Audit, Peer, Policy, Uid, Verdict};
//!
//! let (audit, nobody) = (Audit::default(), Policy::<()>::new([], Uid::effective())?);
//! let (guest, _theirs) = UnixStream::pair()?;
//! let (mut peer, listener) = (Peer::of(&guest)?, Arc::from("/run/hello.sock"));
//! if let Verdict::Denied(rule) = nobody.decide(&peer) {
//!     audit.denied(&mut peer, &guest, &listener, rule.map(|rule| rule.name()));
//! }
//! assert_eq!(audit.totals().denied, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fmt::{self, Write as _};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Subject as _;
use crate::clock::later;
use crate::ids::{Gid, Uid};
use crate::peer::{Details, MOST_GROUPS, Peer};
use crate::permits::LimitExceeded;
use crate::policy::RuleName;

/// How many supplementary groups a record lists: about as many as are of use to a reader, and no more than what else
/// the record holds.
const MOST_GROUPS_WRITTEN: usize = 64;
/// Records that may wait for the journal; what comes on top is counted instead.
const MOST_WAITING: usize = 4096;
/// Bytes that waiting records may hold, roughly.
const MOST_WAITING_BYTES: usize = 4 << 20;
/// Users and reasons told apart; whoever comes on top shares one count for each reason.
const MOST_TRACKED: usize = 1024;

/// What happened. Each has a MESSAGE_ID of its own, explained in the journal's catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A peer was turned away by the policy.
    Denied,
    /// A peer that the policy admits was turned away by a limit.
    Refused,
    /// Denials, refusals or cut-offs that were counted, not written one by one.
    Summary,
    /// A peer was admitted.
    Admitted,
    /// An admitted connection has ended.
    Closed,
    /// A line came back to its sender.
    Line,
    /// A configuration is in force.
    ConfigLoaded,
    /// A configuration was refused; the one before it stays.
    ConfigRefused,
    /// An admitted connection was cut off: the policy, or its sender, has changed.
    Revoked,
    /// Anything else worth a line, without an id.
    Note(Severity),
}

/// How grave it is; syslog(3)'s levels by other names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Severity {
    /// LOG_ERR, 3.
    Error,
    /// LOG_WARNING, 4.
    Warning,
    /// LOG_NOTICE, 5.
    Notice,
    /// LOG_INFO, 6.
    Info,
}

/// A [`Note`](Event::Note).
impl From<Severity> for Event {
    fn from(severity: Severity) -> Self {
        Self::Note(severity)
    }
}

impl Event {
    /// The journal's MESSAGE_ID (systemd.journal-fields(7)): 128 bits in hexadecimal.
    pub const fn message_id(self) -> Option<&'static str> {
        Some(match self {
            Self::Denied => "72261db9963c465c8c6121daadeb1cbc",
            Self::Refused => "a45920b1da8c42cb8c4acbd02e5140bf",
            Self::Summary => "e00fb3280d1140dca1192a4f029b14b6",
            Self::Admitted => "fb07ecd99a40415abb029457009dd51a",
            Self::Closed => "9aa9a5f08d08409e9e656c48f20bf4f8",
            Self::Line => "b4a1cf2d2f5c4b0f9d0f5ab96f3f1c27",
            Self::ConfigLoaded => "b07bc66e288e48eba96896e38dfe1144",
            Self::ConfigRefused => "00e1479225c6488a9e2fed748c43c786",
            Self::Revoked => "765ab08f733d46e1a5b6850cc41b9003",
            Self::Note(_) => return None,
        })
    }

    /// The field GATE_VERDICT, for events that are one.
    pub const fn verdict(self) -> Option<&'static str> {
        Some(match self {
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Summary => "summary",
            Self::Admitted => "admitted",
            Self::Closed => "closed",
            Self::Revoked => "revoked",
            Self::Line | Self::ConfigLoaded | Self::ConfigRefused | Self::Note(_) => return None,
        })
    }

    /// The field PRIORITY.
    pub const fn severity(self) -> Severity {
        match self {
            Self::ConfigRefused => Severity::Error,
            Self::Denied | Self::Refused | Self::Summary | Self::Revoked => Severity::Warning,
            Self::ConfigLoaded => Severity::Notice,
            Self::Admitted | Self::Closed | Self::Line => Severity::Info,
            Self::Note(severity) => severity,
        }
    }
}

/// Why a peer was turned away or a connection ended: the field GATE_REASON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// A deny rule, or no rule at all.
    Policy,
    /// The kernel would not say who it is.
    NoCredentials,
    /// Data came from another user than the one who was judged, without credentials, or with file descriptors.
    Sender,
    /// This user's connections are used up.
    UserLimit,
    /// All connections are used up.
    TotalLimit,
    /// A line was longer than allowed.
    LineLength,
    /// Nothing came for longer than allowed.
    Idle,
    /// The service is going down.
    Stopping,
}

impl Reason {
    /// The word in GATE_REASON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::NoCredentials => "no-credentials",
            Self::Sender => "sender",
            Self::UserLimit => "user-limit",
            Self::TotalLimit => "total-limit",
            Self::LineLength => "line-length",
            Self::Idle => "idle",
            Self::Stopping => "stopping",
        }
    }

    const fn is_denial(self) -> bool {
        matches!(self, Self::Policy | Self::NoCredentials)
    }
}

impl From<LimitExceeded> for Reason {
    fn from(excess: LimitExceeded) -> Self {
        match excess {
            LimitExceeded::User => Self::UserLimit,
            LimitExceeded::Total => Self::TotalLimit,
        }
    }
}

/// Who a record is about.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct About {
    /// PEER_UID.
    pub uid: Uid,
    /// PEER_GID; a summary has none, it stands for all of the user's.
    pub gid: Option<Gid>,
    /// PEER_GROUPS: the effective group and the supplementary ones, of these 64 at most; empty where they cannot
    /// be told, and where the record is not about a connection's start.
    pub groups: Box<[Gid]>,
    /// How many supplementary groups the kernel counted, where they are not all in `groups`.
    pub groups_left_out: Option<usize>,
    /// PEER_PID.
    pub pid: Option<i32>,
    /// PEER_COMM, PEER_UNIT, PEER_LABEL.
    pub details: Details,
}

impl About {
    /// Everything a record may tell of `peer`, details included.
    pub fn peer(peer: &Peer, details: Details) -> Self {
        let (gids, count) = (peer.gids(), peer.supplementary_groups());
        let listed = if peer.gids_complete() { gids.len().min(1 + MOST_GROUPS_WRITTEN) } else { 0 };
        let is_cut = count > MOST_GROUPS || 0 < listed && listed < gids.len();
        let (groups, groups_left_out) = (gids[..listed].into(), is_cut.then_some(count));
        let (gid, pid) = (Some(peer.gid()), peer.pid());
        Self { uid: peer.uid(), gid, groups, groups_left_out, pid, details }
    }

    /// What a summary tells of a user.
    fn user(uid: Uid) -> Self {
        let (gid, groups, groups_left_out, pid, details) = (None, Box::default(), None, None, Details::default());
        Self { uid, gid, groups, groups_left_out, pid, details }
    }

    /// What is still known of `peer` when its connection ends.
    pub fn former(peer: &Peer) -> Self {
        let unit = peer.remembered_units().map(|units| crate::peer::printable(units.name()));
        let details = Details { unit, ..Details::default() };
        Self { details, pid: peer.pid(), gid: Some(peer.gid()), ..Self::user(peer.uid()) }
    }
}

/// Where a peer connected: the listening socket's address, and the connection's number where it has one.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct At<'a> {
    /// GATE_SOCKET.
    pub listener: &'a Arc<str>,
    /// GATE_CONNECTION.
    pub connection: Option<u64>,
}

impl<'a> From<&'a Arc<str>> for At<'a> {
    fn from(listener: &'a Arc<str>) -> Self {
        Self { listener, connection: None }
    }
}

impl<'a> From<(&'a Arc<str>, u64)> for At<'a> {
    fn from((listener, connection): (&'a Arc<str>, u64)) -> Self {
        Self { listener, connection: Some(connection) }
    }
}

/// One record, before it is written. Absent fields are left out of the journal.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Record {
    /// MESSAGE_ID, PRIORITY and GATE_VERDICT follow from it.
    pub event: Event,
    /// GATE_REASON.
    pub reason: Option<Reason>,
    /// GATE_RULE: the deciding rule's full name, or `default`.
    pub rule: Option<Arc<str>>,
    /// GATE_SOCKET: the address of the listening socket.
    pub socket: Option<Arc<str>>,
    /// GATE_CONNECTION.
    pub connection: Option<u64>,
    /// GATE_COUNT; summaries only.
    pub count: Option<u64>,
    /// GATE_LINES.
    pub lines: Option<u64>,
    /// GATE_BYTES.
    pub bytes: Option<u64>,
    /// GATE_DURATION_USEC.
    pub duration: Option<Duration>,
    /// The PEER_ fields.
    pub about: Option<About>,
    /// What MESSAGE says beyond the fields, or all it says.
    pub text: Option<String>,
    /// How many of those it stands for standard error has told of already.
    told: u64,
    /// How many records that were not written it tells of.
    stands_for_missing: u64,
}

/// "1 line", "2 lines".
fn counted(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// The name of a program, which whoever starts it may choose, as it can stand in parentheses: none of its own closes them.
fn closed_by_the_last(comm: &str) -> Cow<'_, str> {
    match comm.trim_end_matches(')') {
        head if head.contains(')') => Cow::Owned(head.replace(')', "\\x29") + &comm[head.len()..]),
        _ => Cow::Borrowed(comm),
    }
}

impl Record {
    /// A record of `event` with no field set.
    pub fn new(event: Event) -> Self {
        Self {
            event,
            reason: None,
            rule: None,
            socket: None,
            connection: None,
            count: None,
            lines: None,
            bytes: None,
            duration: None,
            about: None,
            text: None,
            told: 0,
            stands_for_missing: 0,
        }
    }

    fn at(event: Event, at: At<'_>, rule: Option<&RuleName>) -> Self {
        Self {
            rule: Some(rule.map_or("default", RuleName::as_str).into()),
            socket: Some(Arc::clone(at.listener)),
            connection: at.connection,
            ..Self::new(event)
        }
    }

    /// A record that only says `text`: of an event, or of no more than a [`Severity`].
    pub fn note(event: impl Into<Event>, text: impl Into<String>) -> Self {
        Self { text: Some(text.into()), ..Self::new(event.into()) }
    }

    /// The field MESSAGE. `user` is the name of the user the record is about, where there is one.
    pub fn message(&self, user: Option<&str>) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_message(user, &mut out).and_then(|()| self.write_groups_left_out(&mut out));
        out
    }

    fn write_message(&self, user: Option<&str>, out: &mut String) -> std::fmt::Result {
        let text = self.text.as_deref();
        let verb = match self.event {
            Event::Denied => "Denied",
            Event::Refused => "Refused",
            Event::Summary if self.reason.is_some_and(Reason::is_denial) => "Denied",
            Event::Summary if self.reason == Some(Reason::Sender) => "Revoked",
            Event::Summary => "Refused",
            Event::Admitted => "Admitted",
            Event::Closed => "Closed",
            Event::Line => "Line of",
            Event::Revoked => "Revoked",
            Event::ConfigLoaded | Event::ConfigRefused | Event::Note(_) => {
                return out.write_str(text.unwrap_or_default());
            }
        };
        out.write_str(verb)?;
        self.write_who(user, out)?;
        match self.event {
            Event::Summary => {
                let (count, seconds) = (self.count.unwrap_or(0), self.duration.unwrap_or_default().as_secs_f64());
                let why = if self.reason == Some(Reason::Policy) { "by policy".into() } else { self.why() };
                write!(out, " {count} more times in {seconds:.1} s: {why}")
            }
            Event::Admitted => write!(out, " by {}", self.rule.as_deref().unwrap_or("default")),
            Event::Closed => {
                let (lines, bytes) = (self.lines.unwrap_or(0), self.bytes.unwrap_or(0));
                write!(
                    out,
                    ": {}, {} in {:.1} s",
                    counted(lines, "line"),
                    counted(bytes, "byte"),
                    self.duration.unwrap_or_default().as_secs_f64()
                )?;
                if self.reason.is_some() { write!(out, "; {}", self.why()) } else { Ok(()) }
            }
            Event::Line => write!(out, ": {}", counted(self.bytes.unwrap_or(0), "byte")),
            _ => match text {
                Some(text) => write!(out, ": {text}"),
                None => write!(out, ": {}", self.why()),
            },
        }
    }

    fn write_groups_left_out(&self, out: &mut String) -> std::fmt::Result {
        match self.about.as_ref().and_then(|about| about.groups_left_out) {
            Some(count) if count > MOST_GROUPS => {
                write!(out, " ({count} supplementary groups, of which none can be told; at most {MOST_GROUPS} can)")
            }
            Some(count) => {
                write!(out, " (the first {MOST_GROUPS_WRITTEN} of {count} supplementary groups are in the record)")
            }
            None => Ok(()),
        }
    }

    fn write_who(&self, user: Option<&str>, out: &mut String) -> std::fmt::Result {
        let Some(about) = &self.about else {
            return out.write_str(if self.event == Event::Summary { " peers" } else { " a peer" });
        };
        match user {
            Some(user) => write!(out, " {user} (uid {})", about.uid)?,
            None => write!(out, " uid {}", about.uid)?,
        }
        if let Some(gid) = about.gid {
            write!(out, " gid {gid}")?;
        }
        if let Some(pid) = about.pid {
            write!(out, " pid {pid}")?;
        }
        if let Some(comm) = &about.details.comm {
            write!(out, " ({})", closed_by_the_last(comm))?;
        }
        if let Some(unit) = &about.details.unit {
            write!(out, " in {unit}")?;
        }
        Ok(())
    }

    fn why(&self) -> Cow<'static, str> {
        Cow::Borrowed(match (self.reason, self.rule.as_deref()) {
            (Some(Reason::Policy), Some(rule)) if rule != "default" => return format!("{rule} denies it").into(),
            (Some(Reason::Policy), _) => "no rule allows it",
            (Some(Reason::NoCredentials), _) => "the kernel would not tell its credentials",
            (Some(Reason::Sender), _) => "its data came from another user, or with file descriptors",
            (Some(Reason::UserLimit), _) => "too many connections of this user",
            (Some(Reason::TotalLimit), _) => "too many connections in all",
            (Some(Reason::LineLength), _) => "a line was too long",
            (Some(Reason::Idle), _) => "nothing came for too long",
            (Some(Reason::Stopping), _) => "the service is stopping",
            (None, _) => "no reason given",
        })
    }

    /// Without those whom standard error has told of; `None` where it has of all.
    pub(crate) fn untold(&self) -> Option<Cow<'_, Self>> {
        match self.count.map(|count| count.saturating_sub(self.told)) {
            Some(0) => None,
            count if count == self.count => Some(Cow::Borrowed(self)),
            count => Some(Cow::Owned(Self { count, ..self.clone() })),
        }
    }

    fn weight(&self) -> usize {
        let about = self.about.as_ref().map_or(0, |about| {
            let details = [&about.details.comm, &about.details.unit, &about.details.label];
            let details: usize = details.into_iter().flatten().map(String::len).sum();
            about.groups.len() * size_of::<Gid>() + details
        });
        size_of::<Self>() + about + self.text.as_ref().map_or(0, String::len)
    }

    /// How many denials or refusals the record stands for.
    fn stands_for(&self) -> u64 {
        match self.event {
            Event::Denied | Event::Refused => 1,
            Event::Summary => self.count.unwrap_or(0),
            _ => 0,
        }
    }
}

/// How much is written in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Scope {
    /// Who was turned away.
    Denials,
    /// Also who was admitted, and how each connection ended.
    Connections,
    /// Also each line: its length, never its content.
    Lines,
}

/// What an administrator sets.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// How much is written in full.
    pub scope: Scope,
    /// How many denials or refusals of each user and reason, or connections cut off for their sender's sake, are written
    /// in full in an interval.
    pub burst: u32,
    /// How long an interval is.
    pub interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { scope: Scope::Denials, burst: 10, interval: Duration::from_secs(10) }
    }
}

/// How often what happened since the start.
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

/// Where records are handed over. Cheap to clone; all clones are one.
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

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    scope: AtomicU8,
    admitted: AtomicU64,
    denied: AtomicU64,
    refused: AtomicU64,
    given_up: AtomicBool,
}

struct State {
    settings: Settings,
    waiting: VecDeque<Record>,
    waiting_bytes: usize,
    /// Taken out by the writer, which has not said yet what came of it.
    in_hand: Option<Record>,
    /// How many records the writer has dealt with.
    dealt_with: u64,
    windows: HashMap<(Option<Uid>, Reason), Window>,
    next_tick: Option<Instant>,
    /// Records that no summary stands for and that found no room or no journal, since the last time we said so.
    unwritten: u64,
    /// The last record did not reach the journal, or standard error where there is none.
    journal_is_away: bool,
    sleeping: bool,
    nudged: bool,
    closed: bool,
}

/// One user's denials, or refusals, for one reason in the interval that runs.
struct Window {
    since: Instant,
    written: u32,
    counted: u64,
    /// Of those counted, how many standard error has told of: only the journal is still to hear of them.
    told: u64,
    first_counted: Instant,
    last_counted: Instant,
}

/// What the writing thread is to do next.
#[allow(clippy::large_enum_variant)] // it lives for as long as a record takes to write, once
pub(crate) enum Next {
    Write(Record),
    Nothing,
    Finished,
}

/// What is owed to a journal that is away is tried no sooner than this after the last time.
const LOOK_FOR_JOURNAL: Duration = Duration::from_secs(1);

impl Audit {
    /// An empty one. Nothing is written until a [`journal::Writer`](crate::journal::Writer) takes out.
    pub fn new(settings: Settings) -> Self {
        let state = State {
            settings,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            in_hand: None,
            dealt_with: 0,
            windows: HashMap::new(),
            next_tick: None,
            unwritten: 0,
            journal_is_away: false,
            sleeping: false,
            nudged: false,
            closed: false,
        };
        Self(Arc::new(Shared {
            state: Mutex::new(state),
            wake: Condvar::new(),
            scope: AtomicU8::new(settings.scope as u8),
            admitted: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
        }))
    }

    /// Replaces the settings, and says what was counted under the old ones.
    pub fn set(&self, settings: Settings) {
        self.0.scope.store(settings.scope as u8, Ordering::Relaxed);
        let mut state = self.lock();
        // First, because the summary to come is due by the new interval: the old one may have been hours.
        state.settings = settings;
        state.summarize(Instant::now(), true);
        self.wake(state);
    }

    /// Whether admissions and ends of connections are written.
    pub fn writes_connections(&self) -> bool {
        self.0.scope.load(Ordering::Relaxed) >= Scope::Connections as u8
    }

    /// Whether each line is written.
    pub fn writes_lines(&self) -> bool {
        self.0.scope.load(Ordering::Relaxed) >= Scope::Lines as u8
    }

    /// Records that `peer` was denied by `rule`, or because no rule allows it.
    pub fn denied<'a>(&self, peer: &mut Peer, socket: &impl AsFd, at: impl Into<At<'a>>, rule: Option<&RuleName>) {
        self.turned_away_peer(Event::Denied, Reason::Policy, peer, socket, at.into(), rule);
    }

    /// Records that `peer` was admitted by `rule`, but found no place.
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

    /// Records that somebody was denied of whom the kernel would tell nothing ([`Peer::of`] failed).
    pub fn unidentified<'a>(&self, at: impl Into<At<'a>>) {
        self.turned_away(Event::Denied, Reason::NoCredentials, None, || Record {
            reason: Some(Reason::NoCredentials),
            ..Record::at(Event::Denied, at.into(), None)
        });
    }

    /// Records that `peer` was admitted by `rule`. Counted in any case, written where the settings say so.
    pub fn admitted<'a>(&self, peer: &mut Peer, socket: &impl AsFd, at: impl Into<At<'a>>, rule: &RuleName) {
        self.0.admitted.fetch_add(1, Ordering::Relaxed);
        if self.writes_connections() {
            let details = peer.details(socket);
            let about = Some(About::peer(peer, details));
            self.write(Record { about, ..Record::at(Event::Admitted, at.into(), Some(rule)) });
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
        self.turned_away(event, reason, Some(peer.uid()), || {
            let details = peer.details(socket);
            let about = Some(About::peer(peer, details));
            Record { reason: Some(reason), about, ..Record::at(event, at, rule) }
        });
    }

    /// Counts a peer turned away, and either keeps a record of it, made by `record`, or adds one to the
    /// next summary. `record` is called only where its work is not in vain.
    pub fn turned_away(&self, event: Event, reason: Reason, uid: Option<Uid>, record: impl FnOnce() -> Record) {
        match event {
            Event::Denied => &self.0.denied,
            _ => &self.0.refused,
        }
        .fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut state = self.lock();
        // The writer learns of a count at the interval's end; wake it only if it knows of no interval.
        let known = state.next_tick.is_some();
        state.end_intervals(now);
        if !state.has_room() || !state.may_write(uid, reason, now) {
            state.count(uid, reason, 1, now);
            return if known { drop(state) } else { self.wake(state) };
        }
        // Made without the lock: it asks the kernel and /proc.
        drop(state);
        let record = record();
        let mut state = self.lock();
        state.push(record);
        self.wake(state);
    }

    /// Keeps a record that no summary stands for. Where there is no room it is only counted, and the
    /// journal is told how many are missing.
    pub fn write(&self, record: Record) {
        let mut state = self.lock();
        match (record.event, record.reason) {
            // Peers can bring this about as often as they like: the first are written, the rest counted, as with denials.
            (Event::Revoked, Some(reason)) if reason != Reason::Policy => {
                let (uid, now) = (record.about.as_ref().map(|about| about.uid), Instant::now());
                state.end_intervals(now);
                if state.has_room() && state.may_write(uid, reason, now) {
                    state.push(record);
                } else {
                    state.count(uid, reason, 1, now);
                }
            }
            // Bounded by what an administrator does: reloads, and the connections that each of them ends.
            (Event::Revoked | Event::ConfigLoaded | Event::ConfigRefused, _) => state.push(record),
            _ if state.has_room_for_the_admitted() => state.push(record),
            _ => state.unwritten += 1,
        }
        self.wake(state);
    }

    /// Puts everything counted into summaries; the writer ends once it has written what waits.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.summarize(Instant::now(), true);
        self.wake(state);
    }

    /// How often what happened since the start.
    pub fn totals(&self) -> Totals {
        Totals {
            admitted: self.0.admitted.load(Ordering::Relaxed),
            denied: self.0.denied.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }

    /// Whether everything to be written has been. What is counted is not: it waits for its summary.
    pub fn is_written(&self) -> bool {
        let state = self.lock();
        state.waiting.is_empty() && state.in_hand.is_none()
    }

    /// How many records the writer has dealt with so far.
    pub(crate) fn dealt_with(&self) -> u64 {
        self.lock().dealt_with
    }

    /// Takes everything from the writer that it has not dealt with, the record in its hands included.
    pub(crate) fn give_up(&self) -> Vec<Record> {
        let mut state = self.lock();
        self.0.given_up.store(true, Ordering::Relaxed);
        let mut left: Vec<_> = state.in_hand.take().into_iter().collect();
        left.extend(state.waiting.drain(..));
        state.waiting_bytes = 0;
        left
    }

    /// What records that will not be written one by one come to: a summary for each user and reason, and a note of how
    /// many others there are. For when there is no writer any more.
    pub(crate) fn sum_up(&self, left: &[Record]) -> Vec<Record> {
        let mut state = self.lock();
        left.iter().for_each(|record| state.count_again(record, record.told));
        state.summarize(Instant::now(), true);
        std::iter::from_fn(|| state.pop()).collect()
    }

    pub(crate) fn has_given_up(&self) -> bool {
        self.0.given_up.load(Ordering::Relaxed)
    }

    /// Makes the writer look around, so that it can show that it is alive.
    pub(crate) fn nudge(&self) {
        let mut state = self.lock();
        state.nudged = true;
        self.wake(state);
    }

    /// Waits for something to write.
    pub(crate) fn next(&self) -> Next {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            state.end_intervals(now);
            if let Some(record) = state.pop() {
                state.in_hand = Some(record.clone());
                return Next::Write(record);
            }
            if std::mem::take(&mut state.nudged) {
                return Next::Nothing;
            }
            if state.closed {
                return Next::Finished;
            }
            state.sleeping = true;
            state = match state.next_tick {
                Some(due) => {
                    let pause = due.saturating_duration_since(now);
                    self.0.wake.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.0.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
            state.sleeping = false;
        }
    }

    /// The record in hand is about to go to standard error. False where it has been taken away
    /// ([`give_up`](Self::give_up)) and is told there in another way.
    pub(crate) fn let_go(&self) -> bool {
        self.lock().let_go().is_some()
    }

    /// A record that was [let go](Self::let_go) has found no journal, and was written to standard error as a whole, or
    /// not (`told`).
    ///
    /// If a journal is owed it (`is_owed`), or standard error did not take it, what it stands for is for a summary later
    /// on; one that stands for nobody turned away is counted among those that are missing.
    pub(crate) fn missed(&self, record: &Record, is_owed: bool, told: bool) {
        let mut state = self.lock();
        state.journal_is_away = is_owed || !told;
        match record.event {
            // To count a note that standard error has told would never end: it may be the one that says how many are
            // missing.
            Event::Note(_) if told || state.closed => {}
            Event::Note(_) => state.unwritten += record.stands_for_missing.max(1),
            _ if told && !is_owed => {}
            _ => {
                let on_stderr = if told { record.stands_for() } else { record.told };
                state.count_again(record, on_stderr);
            }
        }
    }

    /// The record in hand has reached the journal.
    pub(crate) fn got_through(&self) {
        let mut state = self.lock();
        state.let_go();
        state.journal_is_away = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: MutexGuard<'_, State>) {
        let sleeping = state.sleeping;
        drop(state);
        if sleeping {
            self.0.wake.notify_one();
        }
    }
}

impl State {
    fn has_room(&self) -> bool {
        self.waiting.len() < MOST_WAITING && self.waiting_bytes < MOST_WAITING_BYTES
    }

    /// A quarter of the room is kept free of what peers bring about as they like without being turned away (admissions,
    /// ends, lines): they must not keep anybody's denial from being written.
    fn has_room_for_the_admitted(&self) -> bool {
        self.waiting.len() < MOST_WAITING / 4 * 3 && self.waiting_bytes < MOST_WAITING_BYTES / 4 * 3
    }

    fn let_go(&mut self) -> Option<Record> {
        self.dealt_with += 1;
        self.in_hand.take()
    }

    /// Of those that the record stands for, standard error has told of `told`.
    fn count_again(&mut self, record: &Record, told: u64) {
        let (uid, now) = (record.about.as_ref().map(|about| about.uid), Instant::now());
        let (reason, count) = match (record.event, record.reason, record.stands_for()) {
            (Event::Revoked, Some(reason), _) if reason != Reason::Policy => (reason, 1),
            (_, Some(reason), count @ 1..) => (reason, count),
            _ => return self.unwritten += 1,
        };
        self.count(uid, reason, count, now);
        self.window(uid, reason, now).told += told;
    }

    /// Also where the writer is held up: the first of the next interval are to be written too.
    fn end_intervals(&mut self, now: Instant) {
        if self.next_tick.is_some_and(|due| due <= now) {
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
            // A flood is over: give its memory back.
            self.waiting.shrink_to(64);
        }
        Some(record)
    }

    /// Whether this one is still among the first of its interval; if so it is taken as written.
    fn may_write(&mut self, uid: Option<Uid>, reason: Reason, now: Instant) -> bool {
        let burst = self.settings.burst;
        let window = self.window(uid, reason, now);
        let first = window.written < burst;
        window.written += u32::from(first);
        first
    }

    fn count(&mut self, uid: Option<Uid>, reason: Reason, count: u64, now: Instant) {
        let window = self.window(uid, reason, now);
        if window.counted == 0 {
            window.first_counted = now;
        }
        window.last_counted = now;
        window.counted += count;
    }

    fn window(&mut self, uid: Option<Uid>, reason: Reason, now: Instant) -> &mut Window {
        let full = self.windows.len() >= MOST_TRACKED && !self.windows.contains_key(&(uid, reason));
        let key = (if full { None } else { uid }, reason);
        let interval = self.settings.interval;
        self.next_tick.get_or_insert(later(now, interval));
        self.windows.entry(key).or_insert_with(|| Window {
            since: now,
            written: 0,
            counted: 0,
            told: 0,
            first_counted: now,
            last_counted: now,
        })
    }

    /// Ends the intervals that are over (all of them if `now_or_never`), each with its summary.
    fn summarize(&mut self, now: Instant, now_or_never: bool) {
        let interval = self.settings.interval;
        // They have room of their own, beyond what any records take: each stands for as many as there were. But a journal
        // that does not take what waits already must not be given ever more of them.
        let room = self.closed || self.waiting.len() < MOST_WAITING + MOST_TRACKED;
        let mut summaries = Vec::new();
        self.windows.retain(|(uid, reason), window| {
            let over = now.saturating_duration_since(window.since) >= interval;
            if window.counted > 0 && (over || now_or_never) {
                if !room {
                    return true;
                }
                summaries.push(window.summary(*uid, *reason));
                (window.counted, window.told) = (0, 0);
                if over {
                    (window.since, window.written) = (now, 0);
                }
                return true;
            }
            !over
        });
        summaries.into_iter().for_each(|summary| self.push(summary));
        let earliest = self.windows.values().map(|window| later(window.since, interval)).min();
        // Where there was no room, look again in an interval's time, not at once; nor for a journal that was not there.
        let soonest = if self.journal_is_away { now + LOOK_FOR_JOURNAL } else { now };
        self.next_tick = earliest.map(|due| if due <= now { later(now, interval) } else { due }.max(soonest));
        if self.windows.is_empty() {
            self.windows.shrink_to(64);
        }
    }
}

impl Window {
    fn summary(&self, uid: Option<Uid>, reason: Reason) -> Record {
        let about = uid.map(About::user);
        Record {
            reason: Some(reason),
            count: Some(self.counted),
            told: self.told,
            duration: Some(self.last_counted.saturating_duration_since(self.first_counted)),
            about,
            ..Record::new(Event::Summary)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// The record in hand finds no journal, and standard error takes it.
    fn miss(audit: &Audit, is_owed: bool) -> bool {
        let record = audit.lock().in_hand.clone();
        let has_let_go = audit.let_go();
        record.iter().for_each(|record| audit.missed(record, is_owed, true));
        has_let_go
    }

    fn sum(records: &[Record]) -> u64 {
        records.iter().map(Record::stands_for).sum()
    }

    #[test]
    fn what_standard_error_does_not_take_is_counted_again() {
        let audit = audit(2);
        (0..5).for_each(|_| deny(&audit, 1000));
        audit.write(Record::note(Severity::Notice, "a note"));
        let lose = || {
            let Next::Write(record) = audit.next() else { panic!("nothing to write") };
            assert!(audit.let_go());
            audit.missed(&record, false, false);
        };
        (0..3).for_each(|_| lose());
        audit.set(Settings { burst: 2, interval: Duration::from_secs(3600), ..Settings::default() });
        // The summary too, and it stands for as many as before.
        lose();
        audit.close();
        let records = drain(&audit);
        assert_eq!((sum(&records), records.len()), (5, 2), "{records:?}");
        assert!(records.iter().all(|record| record.untold().is_some_and(|untold| untold.count == record.count)));
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
    fn users_beyond_those_tracked_share_a_summary_without_uid() {
        let audit = audit(0);
        (0..5000).for_each(|uid| deny(&audit, uid));
        assert!(audit.lock().windows.len() <= MOST_TRACKED + 1);
        audit.close();
        let records = drain(&audit);
        assert_eq!(sum(&records), 5000);
        let shared: Vec<_> = records.iter().filter(|record| record.about.is_none()).collect();
        assert_eq!(shared.len(), 1);
        assert_eq!(shared[0].count, Some(5000 - MOST_TRACKED as u64));
    }

    #[test]
    fn what_finds_no_room_is_counted_and_none_is_lost() {
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
    fn those_cut_off_for_their_senders_sake_are_written_and_counted_as_the_denied_are() {
        let audit = audit(10);
        (0..10_000).for_each(|_| audit.write(revoked(1000, Reason::Sender)));
        audit.write(revoked(1001, Reason::Sender));
        // What an administrator's reload brings about is written one by one.
        (0..20).for_each(|_| audit.write(revoked(1000, Reason::Policy)));
        assert!(matches!(audit.next(), Next::Write(_)));
        assert!(miss(&audit, true));
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
    fn whatever_the_admitted_do_there_is_room_for_denials_and_their_summaries() {
        let audit = audit(10);
        (0..10_000).for_each(|_| audit.write(Record::new(Event::Line)));
        (0..30).for_each(|_| deny(&audit, 1000));
        assert_eq!(audit.lock().waiting.len(), MOST_WAITING / 4 * 3 + 10);
        // Nor does a flood of denials leave no room for what they are summed up in.
        (0..MOST_WAITING as u32).for_each(|uid| deny(&audit, 2000 + uid % 500));
        assert_eq!(audit.lock().waiting.len(), MOST_WAITING);
        let sum_up = || audit.lock().summarize(Instant::now(), true);
        sum_up();
        assert_eq!(audit.lock().windows.values().map(|window| window.counted).sum::<u64>(), 0);
        // They have a bound too.
        for _ in 0..10 {
            (0..500).for_each(|uid| deny(&audit, 2000 + uid));
            sum_up();
        }
        assert!(audit.lock().waiting.len() <= MOST_WAITING + 2 * MOST_TRACKED);
        audit.close();
        assert_eq!(sum(&drain(&audit)), 30 + MOST_WAITING as u64 + 10 * 500);
    }

    #[test]
    fn records_that_the_journal_missed_are_told_when_it_is_back() {
        let audit = audit(10);
        let lose = |event| {
            audit.write(Record::new(event));
            assert!(matches!(audit.next(), Next::Write(_)));
            assert!(miss(&audit, true));
        };
        lose(Event::Admitted);
        lose(Event::ConfigLoaded);
        lose(Event::Note(Severity::Warning));
        audit.nudge();
        assert!(matches!(audit.next(), Next::Nothing), "while it is away there is no use in saying so");
        audit.write(Record::new(Event::Admitted));
        assert!(matches!(audit.next(), Next::Write(_)));
        audit.got_through();
        let Next::Write(note) = audit.next() else { panic!("it is back") };
        assert_eq!(note.text.as_deref(), Some("2 records were not written: the journal was too slow, or away"));
    }

    #[test]
    fn a_record_that_could_not_be_written_comes_back_in_a_summary() {
        let audit = audit(10);
        (0..25).for_each(|_| deny(&audit, 1000));
        assert!(matches!(audit.next(), Next::Write(_)));
        assert!(miss(&audit, true));
        audit.close();
        let records = drain(&audit);
        assert_eq!(sum(&records), 25);
        assert_eq!(records.last().unwrap().count, Some(16));
    }

    #[test]
    fn who_gives_up_gets_the_record_in_hand_too_and_the_writer_keeps_none() {
        let audit = audit(3);
        (0..7).for_each(|_| deny(&audit, 1000));
        audit.write(Record::new(Event::Admitted));
        assert!(matches!(audit.next(), Next::Write(_)) && !audit.is_written());
        audit.close();
        let left = audit.give_up();
        assert_eq!((left.len(), sum(&left)), (5, 7));
        assert!(audit.is_written() && !miss(&audit, true), "somebody else has it");
        assert!(matches!(audit.next(), Next::Finished));
        let sums = audit.sum_up(&left[1..]);
        assert_eq!((sums.len(), sums[0].count), (2, Some(6)));
        assert_eq!(sums[1].text.as_deref(), Some("1 record was not written: the journal was too slow, or away"));
    }

    #[test]
    fn of_a_summary_only_what_was_not_told_before_is_told() {
        let audit = audit(1);
        (0..5).for_each(|_| deny(&audit, 1000));
        assert!(matches!(audit.next(), Next::Write(_)));
        assert!(miss(&audit, true));
        audit.close();
        let summary = drain(&audit).pop().unwrap();
        assert_eq!((summary.count, summary.untold().unwrap().count), (Some(5), Some(4)));
        assert!(miss(&audit, true));
        audit.lock().summarize(Instant::now(), true);
        let summary = drain(&audit).pop().unwrap();
        assert_eq!((summary.count, summary.untold().is_none()), (Some(5), true));
        audit.got_through();
        (0..3).for_each(|_| deny(&audit, 1000));
        audit.lock().summarize(Instant::now(), true);
        assert_eq!(drain(&audit).pop().unwrap().untold().unwrap().count, Some(3), "the journal has the others");
    }

    #[test]
    fn a_program_cannot_call_itself_what_reads_as_the_rest_of_a_message() {
        let message = |comm: &str| {
            let details = Details { comm: Some(comm.into()), unit: Some("a.scope".into()), label: None };
            let about = About { pid: Some(2), details, ..About::user(Uid::new(1)) };
            Record { about: Some(about), ..Record::new(Event::Denied) }.message(None)
        };
        assert_eq!(message("x) in b.service"), "Denied uid 1 pid 2 (x\\x29 in b.service) in a.scope: no reason given");
        assert_eq!(message("(sd-pam)"), "Denied uid 1 pid 2 ((sd-pam)) in a.scope: no reason given");
    }

    #[test]
    fn a_denial_reads_as_the_contract_has_it() {
        let details = Details { comm: Some("nc".into()), unit: Some("session-3.scope".into()), label: None };
        let about = About { gid: Some(Gid::new(1001)), pid: Some(4242), details, ..About::user(Uid::new(1001)) };
        let record = Record { reason: Some(Reason::Policy), about: Some(about), ..Record::new(Event::Denied) };
        assert_eq!(
            record.message(Some("guest")),
            "Denied guest (uid 1001) gid 1001 pid 4242 (nc) in session-3.scope: no rule allows it"
        );
    }
}
