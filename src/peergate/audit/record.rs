//! What a record says: the event, its fields and its text.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::Subject as _;
use crate::escape::{in_parentheses, printable};
use crate::ids::{Gid, Uid};
use crate::peer::{Details, MOST_GROUPS, Peer};
use crate::permits::LimitExceeded;
use crate::policy::RuleName;

/// How many supplementary groups a record lists at most.
const MOST_GROUPS_WRITTEN: usize = 64;

/// What happened. Each event has a MESSAGE_ID, which the journal's catalog explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A peer was turned away by the policy.
    Denied,
    /// A peer that the policy admits was turned away by a limit.
    Refused,
    /// The number of denials, refusals or revocations that were not written one by one.
    Summary,
    /// A peer was admitted.
    Admitted,
    /// An admitted connection has ended.
    Closed,
    /// A line came back to its sender.
    Line,
    /// The number of lines that were not written one by one.
    LineSummary,
    /// A configuration is in force.
    ConfigLoaded,
    /// A configuration was refused; the one before it stays.
    ConfigRefused,
    /// An admitted connection was closed because the policy or its sender has changed.
    Revoked,
    /// Any other message, without an id.
    Note(Severity),
}

/// The priority of a record, as the levels of syslog(3).
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
            Self::LineSummary => "a32225cea0b74f40a0009c977477f105",
            Self::ConfigLoaded => "b07bc66e288e48eba96896e38dfe1144",
            Self::ConfigRefused => "00e1479225c6488a9e2fed748c43c786",
            Self::Revoked => "765ab08f733d46e1a5b6850cc41b9003",
            Self::Note(_) => return None,
        })
    }

    /// The field GATE_VERDICT, if the event has one.
    pub const fn verdict(self) -> Option<&'static str> {
        Some(match self {
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Summary => "summary",
            Self::Admitted => "admitted",
            Self::Closed => "closed",
            Self::Revoked => "revoked",
            // Of lines nothing is decided: this summary stands for no denial and no refusal.
            Self::Line | Self::LineSummary | Self::ConfigLoaded | Self::ConfigRefused | Self::Note(_) => return None,
        })
    }

    /// The field PRIORITY.
    pub const fn severity(self) -> Severity {
        match self {
            Self::ConfigRefused => Severity::Error,
            Self::Denied | Self::Refused | Self::Summary | Self::Revoked => Severity::Warning,
            Self::ConfigLoaded => Severity::Notice,
            Self::Admitted | Self::Closed | Self::Line | Self::LineSummary => Severity::Info,
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
    /// The kernel did not give the peer's credentials.
    NoCredentials,
    /// Data came from another user than the judged peer's, without credentials, or with file descriptors.
    Sender,
    /// The limit for this user is reached.
    UserLimit,
    /// The limit for all connections is reached.
    TotalLimit,
    /// A line was longer than allowed.
    LineLength,
    /// Nothing was received for longer than allowed.
    Idle,
    /// The service is stopping.
    Stopping,
    /// The service that the connection was to be passed on to could not be reached.
    Upstream,
    /// No reason, but what the count of a summary is one of: lines.
    Lines,
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
            Self::Upstream => "upstream",
            Self::Lines => "lines",
        }
    }

    pub(super) const fn is_denial(self) -> bool {
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

/// The peer that a record is about.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct About {
    /// PEER_UID.
    pub uid: Uid,
    /// PEER_GID; not in a summary.
    pub gid: Option<Gid>,
    /// PEER_GROUPS: the effective group and at most 64 supplementary groups. Empty if they are not known, and in records
    /// that are not about the start of a connection.
    pub groups: Box<[Gid]>,
    /// The number of supplementary groups, if `groups` does not hold all of them.
    pub groups_left_out: Option<usize>,
    /// PEER_PID.
    pub pid: Option<i32>,
    /// PEER_COMM, PEER_UNIT, PEER_LABEL, PEER_LOGINUID, PEER_SESSION.
    pub details: Details,
}

impl About {
    /// All that is known of `peer` at the start of its connection.
    pub fn peer(peer: &Peer, details: Details) -> Self {
        let (gids, count) = (peer.gids(), peer.supplementary_groups());
        let listed = if peer.gids_complete() { gids.len().min(1 + MOST_GROUPS_WRITTEN) } else { 0 };
        let is_cut = count > MOST_GROUPS || 0 < listed && listed < gids.len();
        let (groups, groups_left_out) = (gids[..listed].into(), is_cut.then_some(count));
        let (gid, pid) = (Some(peer.gid()), peer.pid());
        Self { uid: peer.uid(), gid, groups, groups_left_out, pid, details }
    }

    /// For a summary.
    pub(super) fn user(uid: Uid) -> Self {
        let (gid, groups, groups_left_out, pid, details) = (None, Box::default(), None, None, Details::default());
        Self { uid, gid, groups, groups_left_out, pid, details }
    }

    /// The user who logged in, where that is not the peer's own.
    pub(crate) fn login_of_another(&self) -> Option<Uid> {
        self.details.login.filter(|login| *login != self.uid)
    }

    /// What is still known of `peer` at the end of its connection.
    pub fn former(peer: &Peer) -> Self {
        let unit = peer.remembered_units().map(|units| printable(units.name()));
        let login = peer.remembered_login().user();
        let details = Details { unit, login, ..Details::default() };
        Self { details, pid: peer.pid(), gid: Some(peer.gid()), ..Self::user(peer.uid()) }
    }
}

/// Where a peer connected: the address of the listening socket, and the number of the connection if it has one.
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

/// A record that is not written yet. Fields without a value are left out.
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
    /// GATE_BYTES_SENT: to the peer.
    pub bytes_sent: Option<u64>,
    /// GATE_UPSTREAM: the service that the connection was to be passed on to.
    pub upstream: Option<Arc<str>>,
    /// GATE_DURATION_USEC.
    pub duration: Option<Duration>,
    /// The PEER_ fields.
    pub about: Option<About>,
    /// The part of MESSAGE that does not follow from the fields.
    pub text: Option<String>,
    /// How many of `count` are on standard error already.
    pub(super) on_stderr: u64,
    /// How many records were not written, if this is the note that says so.
    pub(super) stands_for_missing: u64,
}

/// "1 line", "2 lines".
pub(super) fn counted(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
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
            bytes_sent: None,
            upstream: None,
            duration: None,
            about: None,
            text: None,
            on_stderr: 0,
            stands_for_missing: 0,
        }
    }

    pub(super) fn at(event: Event, at: At<'_>, rule: Option<&RuleName>) -> Self {
        Self {
            rule: Some(rule.map_or("default", RuleName::as_str).into()),
            socket: Some(Arc::clone(at.listener)),
            connection: at.connection,
            ..Self::new(event)
        }
    }

    pub(super) fn about(self, peer: &mut Peer, socket: &impl AsFd) -> Self {
        let details = peer.details(socket);
        Self { about: Some(About::peer(peer, details)), ..self }
    }

    /// A record of an event, or of a [`Severity`] alone, that consists of `text`.
    pub fn note(event: impl Into<Event>, text: impl Into<String>) -> Self {
        Self { text: Some(text.into()), ..Self::new(event.into()) }
    }

    /// The field MESSAGE. `user` is the name of the peer's user, `login` that of the user who logged in, if they are known.
    pub fn message(&self, user: Option<&str>, login: Option<&str>) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_message((user, login), &mut out).and_then(|()| self.write_groups_left_out(&mut out));
        out
    }

    fn write_message(&self, names: (Option<&str>, Option<&str>), out: &mut String) -> std::fmt::Result {
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
            Event::LineSummary => "Lines of",
            Event::Revoked => "Revoked",
            Event::ConfigLoaded | Event::ConfigRefused | Event::Note(_) => {
                return out.write_str(text.unwrap_or_default());
            }
        };
        out.write_str(verb)?;
        self.write_peer(names, out)?;
        match self.event {
            Event::Summary => {
                let (count, seconds) = (self.count.unwrap_or(0), self.duration.unwrap_or_default().as_secs_f64());
                let why = if self.reason == Some(Reason::Policy) { "by policy".into() } else { self.why() };
                write!(out, " {count} more times in {seconds:.1} s: {why}")
            }
            Event::Admitted => write!(out, " by {}", self.rule.as_deref().unwrap_or("default")),
            Event::Closed => {
                let bytes = counted(self.bytes.unwrap_or(0), "byte");
                let what = match (self.lines, self.bytes_sent) {
                    (Some(lines), _) => format!("{}, {bytes}", counted(lines, "line")),
                    (None, Some(sent)) => format!("{bytes} received, {} sent", counted(sent, "byte")),
                    (None, None) => bytes,
                };
                write!(out, ": {what} in {:.1} s", self.duration.unwrap_or_default().as_secs_f64())?;
                if self.reason.is_some() { write!(out, "; {}", self.why()) } else { Ok(()) }
            }
            Event::Line => write!(out, ": {}", counted(self.bytes.unwrap_or(0), "byte")),
            Event::LineSummary => {
                let (count, bytes) = (self.count.unwrap_or(0), self.bytes.unwrap_or(0));
                let seconds = self.duration.unwrap_or_default().as_secs_f64();
                write!(out, ": {count} more in {seconds:.1} s, {}", counted(bytes, "byte"))
            }
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

    fn write_peer(&self, (user, login): (Option<&str>, Option<&str>), out: &mut String) -> std::fmt::Result {
        let Some(about) = &self.about else {
            let several = matches!(self.event, Event::Summary | Event::LineSummary);
            return out.write_str(if several { " peers" } else { " a peer" });
        };
        let login = about.login_of_another().map(|uid| match login {
            Some(login) => format!("logged in as {login}"),
            None => format!("logged in as uid {uid}"),
        });
        match (user, login) {
            (Some(user), Some(login)) => write!(out, " {user} (uid {}, {login})", about.uid)?,
            (Some(user), None) => write!(out, " {user} (uid {})", about.uid)?,
            (None, Some(login)) => write!(out, " uid {} ({login})", about.uid)?,
            (None, None) => write!(out, " uid {}", about.uid)?,
        }
        if let Some(gid) = about.gid {
            write!(out, " gid {gid}")?;
        }
        if let Some(pid) = about.pid {
            write!(out, " pid {pid}")?;
        }
        if let Some(comm) = &about.details.comm {
            write!(out, " ({})", in_parentheses(comm))?;
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
            (Some(Reason::Upstream), _) => "the service behind could not be reached",
            (Some(Reason::Lines), _) => "lines",
            (None, _) => "no reason given",
        })
    }

    /// The record without the part that is on standard error already; `None` if that is all of it.
    pub(crate) fn not_on_stderr(&self) -> Option<Cow<'_, Self>> {
        match self.count.map(|count| count.saturating_sub(self.on_stderr)) {
            Some(0) => None,
            count if count == self.count => Some(Cow::Borrowed(self)),
            count => Some(Cow::Owned(Self { count, ..self.clone() })),
        }
    }

    pub(super) fn uid(&self) -> Option<Uid> {
        self.about.as_ref().map(|about| about.uid)
    }

    pub(super) fn weight(&self) -> usize {
        let about = self.about.as_ref().map_or(0, |about| {
            let details = [&about.details.comm, &about.details.unit, &about.details.label];
            let details: usize = details.into_iter().flatten().map(String::len).sum();
            about.groups.len() * size_of::<Gid>() + details
        });
        size_of::<Self>() + about + self.text.as_ref().map_or(0, String::len)
    }

    /// How many denials, refusals or lines the record stands for.
    pub(super) fn stands_for(&self) -> u64 {
        match self.event {
            Event::Denied | Event::Refused | Event::Line => 1,
            Event::Summary | Event::LineSummary => self.count.unwrap_or(0),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_program_does_not_forge_the_rest_of_a_message() {
        let message = |comm: &str| {
            let details = Details { comm: Some(comm.into()), unit: Some("a.scope".into()), ..Details::default() };
            let about = About { pid: Some(2), details, ..About::user(Uid::new(1)) };
            Record { about: Some(about), ..Record::new(Event::Denied) }.message(None, None)
        };
        assert_eq!(message("x) in b.service"), "Denied uid 1 pid 2 (x\\x29 in b.service) in a.scope: no reason given");
        assert_eq!(message("(sd-pam)"), "Denied uid 1 pid 2 ((sd-pam)) in a.scope: no reason given");
    }

    #[test]
    fn a_denial_names_user_groups_process_and_reason() {
        let details = Details { comm: Some("nc".into()), unit: Some("session-3.scope".into()), ..Details::default() };
        let about = About { gid: Some(Gid::new(1001)), pid: Some(4242), details, ..About::user(Uid::new(1001)) };
        let record = Record { reason: Some(Reason::Policy), about: Some(about), ..Record::new(Event::Denied) };
        assert_eq!(
            record.message(Some("guest"), None),
            "Denied guest (uid 1001) gid 1001 pid 4242 (nc) in session-3.scope: no rule allows it"
        );
    }

    #[test]
    fn the_login_is_told_where_it_is_another_user() {
        let message = |uid: u32, user, name| {
            let details = Details { login: Some(Uid::new(1001)), ..Details::default() };
            let about = About { gid: Some(Gid::new(0)), details, ..About::user(Uid::new(uid)) };
            Record { reason: Some(Reason::Policy), about: Some(about), ..Record::new(Event::Denied) }
                .message(user, name)
        };
        assert_eq!(
            message(0, Some("root"), Some("alice")),
            "Denied root (uid 0, logged in as alice) gid 0: no rule allows it"
        );
        assert_eq!(message(0, None, None), "Denied uid 0 (logged in as uid 1001) gid 0: no rule allows it");
        assert_eq!(message(1001, Some("alice"), Some("alice")), "Denied alice (uid 1001) gid 0: no rule allows it");
    }
}
