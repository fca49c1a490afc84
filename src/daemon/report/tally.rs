//! The journal's lines, added up: who was turned away, why and how often. Used by [`report`](super).
//!
//! However long the journal, memory is bounded: so many pairs of user and reason are told apart, so many texts
//! remembered. What comes on top still counts in every sum.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, BufRead};
use std::sync::Arc;

use peergate::escape::printable_again;

use super::entry::{Entry, Scope};

/// The longest line that is looked at. Ours are shorter by far: journalctl leaves out fields above 4 KiB.
const LONGEST_LINE: usize = 256 << 10;
/// Pairs of user and reason told apart; further pairs share one count.
const MOST_ROWS: usize = 16 << 10;
/// Different units, programs or rules that are named for each row.
const MOST_NAMED: usize = 8;
/// Different texts remembered in all.
const MOST_TEXTS: usize = 8 << 10;
/// Machines whose host names are remembered.
const MOST_MACHINES: usize = 4 << 10;
/// Characters of a text that are kept.
const LONGEST_TEXT: usize = 256;

/// What turned a peer away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// The policy.
    Denied,
    /// A limit.
    Refused,
    /// Cut off, after having been admitted: by a new policy, or because its data came from another user.
    Revoked,
}

/// What GATE_REASON may say.
const REASONS: [&str; 9] =
    ["policy", "no-credentials", "sender", "user-limit", "total-limit", "line-length", "idle", "stopping", "upstream"];
/// What stands for a reason that is missing or none of these.
const NO_REASON: &str = "unknown";

/// Who, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// By the policy or by a limit, at the start or later.
    pub verdict: Verdict,
    /// One of the contract's words, or "unknown".
    pub reason: &'static str,
    /// `None`: users whom a summary did not tell apart, or whom the kernel did not tell.
    pub uid: Option<u32>,
    /// The id of the machine whose journal has the records; `None` where they have none.
    pub machine: Option<u128>,
}

/// How many times, and how that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Recorded in full, one by one.
    pub records: u64,
    /// Told by summaries.
    pub counted: u64,
}

impl Count {
    /// Both together.
    pub fn total(self) -> u64 {
        self.records.saturating_add(self.counted)
    }

    fn add(&mut self, other: Self) {
        self.records = self.records.saturating_add(other.records);
        self.counted = self.counted.saturating_add(other.counted);
    }
}

/// From when to when, in microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first time.
    pub first: i64,
    /// The last time.
    pub last: i64,
}

impl Span {
    fn join(whole: &mut Option<Self>, part: Option<Self>) {
        *whole = match (*whole, part) {
            (Some(a), Some(b)) => Some(Self { first: a.first.min(b.first), last: a.last.max(b.last) }),
            (a, b) => a.or(b),
        };
    }
}

/// Names, and how many full records bear each.
#[derive(Clone, Debug, Default)]
pub struct Named {
    /// In the order they came.
    pub names: Vec<(Arc<str>, u64)>,
    /// Records with further names, which were not remembered.
    pub more: u64,
}

impl Named {
    fn add(&mut self, name: Option<Arc<str>>) {
        let Some(name) = name else {
            self.more += 1;
            return;
        };
        if let Some((_, records)) = self.names.iter_mut().find(|(known, _)| *known == name) {
            *records += 1;
        } else if self.names.len() < MOST_NAMED {
            self.names.push((name, 1));
        } else {
            self.more += 1;
        }
    }
}

/// What is known of one user and reason.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The user's name, where a record had one.
    pub user: Option<Arc<str>>,
    /// How many times.
    pub count: Count,
    /// From when to when; `None` where no record told.
    pub span: Option<Span>,
    /// GATE_RULE of the full records.
    pub rules: Named,
    /// PEER_UNIT of the full records.
    pub units: Named,
    /// PEER_COMM of the full records.
    pub programs: Named,
    /// The users who logged in, by PEER_LOGIN, of the full records in which that is not the peer's own user.
    pub logins: Named,
}

/// What became of the journal's lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineCounts {
    /// Read in all, empty ones left out.
    pub read: u64,
    /// Counted.
    pub believed: u64,
    /// Sent by another program in our name.
    pub left_aside: u64,
    /// Ours, but without what a count needs.
    pub unusable: u64,
    /// No JSON object, or too long.
    pub damaged: u64,
}

/// The sums.
#[derive(Debug)]
pub struct Tally {
    scope: Scope,
    rows: HashMap<Key, Row>,
    texts: HashSet<Arc<str>>,
    machines: BTreeMap<u128, Option<Arc<str>>>,
    lines: LineCounts,
    suppressed: u64,
    others: bool,
}

impl Tally {
    /// Nothing yet.
    pub fn new(scope: Scope) -> Self {
        Self {
            scope,
            rows: HashMap::new(),
            texts: HashSet::new(),
            machines: BTreeMap::new(),
            lines: LineCounts::default(),
            suppressed: 0,
            others: false,
        }
    }

    /// The service that is reported on.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// Adds every line of `input`, the output of `journalctl -o json`. `progress` is told how many were read so far.
    ///
    /// # Errors
    /// What reading says; what was read before is counted.
    pub fn read(&mut self, mut input: impl BufRead, mut progress: impl FnMut(u64)) -> io::Result<()> {
        let mut line = Vec::new();
        loop {
            match next_line(&mut input, &mut line)? {
                Line::End => return Ok(()),
                Line::Whole => self.add_line(&line),
                Line::TooLong => {
                    self.lines.read += 1;
                    self.lines.damaged += 1;
                }
            }
            progress(self.lines.read);
        }
    }

    fn add_line(&mut self, line: &[u8]) {
        if line.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        let entry = Entry::parse(line);
        if let Some(count) = entry.as_ref().and_then(|entry| entry.suppressed(self.scope)) {
            self.suppressed = self.suppressed.saturating_add(count);
            return;
        }
        self.lines.read += 1;
        let Some(entry) = entry else {
            self.lines.damaged += 1;
            return;
        };
        if !self.scope.believes(&entry) {
            self.lines.left_aside += 1;
            return;
        }
        match self.add(&entry) {
            Some(()) => self.lines.believed += 1,
            None => self.lines.unusable += 1,
        }
    }

    fn add(&mut self, entry: &Entry) -> Option<()> {
        let reason = entry.reason.text();
        let reason = REASONS.into_iter().find(|known| reason == Some(*known)).unwrap_or(NO_REASON);
        let (verdict, count) = match entry.verdict.text()? {
            "denied" => (Verdict::Denied, Count { records: 1, counted: 0 }),
            "refused" => (Verdict::Refused, Count { records: 1, counted: 0 }),
            "revoked" => (Verdict::Revoked, Count { records: 1, counted: 0 }),
            "summary" => {
                let verdict = match reason {
                    "policy" | "no-credentials" => Verdict::Denied,
                    // When it is denied, a peer may not have sent anything yet.
                    "sender" => Verdict::Revoked,
                    _ => Verdict::Refused,
                };
                (verdict, Count { records: 0, counted: entry.count.number()? })
            }
            _ => return None,
        };
        let mut key = Key { verdict, reason, uid: entry.uid.number(), machine: entry.machine() };
        self.add_machine(entry);
        if self.rows.len() >= MOST_ROWS && !self.rows.contains_key(&key) {
            (key.uid, key.machine) = (None, None);
            self.others = true;
        }
        let summary = count.records == 0;
        // A summary is written after the last of what it counts, which began at most so long before.
        let before = if summary { entry.duration.number().unwrap_or(0) } else { 0 };
        let span = entry.time().map(|last| Span { first: last.saturating_sub(before).max(0), last });
        let [user, rule, unit, program] = [&entry.user, &entry.rule, &entry.unit, &entry.program]
            .map(|field| field.text().map(|text| self.keep(text)));

        let login = entry.login_of_another().map(|login| self.keep(login));

        let row = self.rows.entry(key).or_default();
        row.count.add(count);
        Span::join(&mut row.span, span);
        if key.uid.is_some() {
            row.user = user.flatten().or_else(|| row.user.take());
        }
        if !summary {
            let Row { rules, units, programs, logins, .. } = row;
            for (named, name) in [(rules, rule), (units, unit), (programs, program), (logins, login)] {
                if let Some(name) = name {
                    named.add(name);
                }
            }
        }
        Some(())
    }

    fn add_machine(&mut self, entry: &Entry) {
        let Some(id) = entry.machine() else { return };
        if self.machines.len() >= MOST_MACHINES && !self.machines.contains_key(&id) {
            return;
        }
        let host = entry.host().and_then(|host| self.keep(host));
        let known = self.machines.entry(id).or_default();
        *known = host.or_else(|| known.take());
    }

    /// The text, harmless to a terminal and not too long; `None` where too many are remembered already.
    fn keep(&mut self, text: &str) -> Option<Arc<str>> {
        let text = harmless(text);
        if let Some(known) = self.texts.get(text.as_str()) {
            return Some(Arc::clone(known));
        }
        if self.texts.len() >= MOST_TEXTS {
            return None;
        }
        let text: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&text));
        Some(text)
    }

    /// The rows: denials first, then by how often, then by user.
    pub fn rows(&self) -> Vec<(Key, &Row)> {
        let mut rows: Vec<_> = self.rows.iter().map(|(key, row)| (*key, row)).collect();
        rows.sort_by_key(|(key, row)| (key.verdict, std::cmp::Reverse(row.count.total()), *key));
        rows
    }

    /// How many were turned away so.
    pub fn total(&self, verdict: Verdict) -> Count {
        let rows = self.rows.iter().filter(|(key, _)| key.verdict == verdict);
        rows.fold(Count::default(), |mut sum, (_, row)| {
            sum.add(row.count);
            sum
        })
    }

    /// From the first to the last.
    pub fn span(&self) -> Option<Span> {
        self.rows.values().fold(None, |mut whole, row| {
            Span::join(&mut whole, row.span);
            whole
        })
    }

    /// The machines that the records are of, each with its last host name.
    pub fn machines(&self) -> &BTreeMap<u128, Option<Arc<str>>> {
        &self.machines
    }

    /// What became of the lines.
    pub fn lines(&self) -> LineCounts {
        self.lines
    }

    /// How many of the service's messages journald says it has dropped: they may have been records.
    pub fn suppressed(&self) -> u64 {
        self.suppressed
    }

    /// Whether there were too many users to tell all of them apart here.
    pub fn has_overflowed(&self) -> bool {
        self.others
    }
}

/// `text` as it may be shown: shortened, and escaped but for backslashes: what echod wrote has been escaped once, and
/// twice would misquote it.
fn harmless(text: &str) -> String {
    let end = text.char_indices().nth(LONGEST_TEXT).map_or(text.len(), |(end, _)| end);
    let mut shown = printable_again(&text[..end]);
    let cut = shown.char_indices().nth(LONGEST_TEXT).map(|(cut, _)| cut);
    if let Some(cut) = cut {
        shown.truncate(cut);
    }
    if cut.is_some() || end < text.len() {
        shown.push_str("...");
    }
    shown
}

/// What [`next_line`] found.
enum Line {
    End,
    Whole,
    TooLong,
}

/// Reads up to the next LF or the end, of which it keeps no more than [`LONGEST_LINE`] bytes.
fn next_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Line> {
    line.clear();
    let (mut length, mut ended) = (0_usize, false);
    while !ended {
        let some = match input.fill_buf() {
            Ok([]) if length == 0 => return Ok(Line::End),
            Ok([]) => break,
            Ok(some) => some,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let lf = memchr::memchr(b'\n', some);
        ended = lf.is_some();
        let taken = lf.map_or(some.len(), |lf| lf + 1);
        let room = LONGEST_LINE.saturating_sub(line.len());
        line.extend_from_slice(&some[..taken.min(room)]);
        length = length.saturating_add(taken);
        input.consume(taken);
    }
    Ok(if length > LONGEST_LINE { Line::TooLong } else { Line::Whole })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ECHOD;

    fn tally(lines: &[&str]) -> Tally {
        let mut tally = Tally::new(Scope::System(ECHOD));
        tally.read(lines.join("\n").as_bytes(), |_| {}).unwrap();
        tally
    }

    fn ours(fields: &str) -> String {
        format!(r#"{{"_SYSTEMD_UNIT":"echo.service",{fields}}}"#)
    }

    #[test]
    fn a_summary_counts_as_a_denial_or_a_refusal_by_its_reason() {
        let line = |fields: &str| ours(&format!(r#""GATE_VERDICT":{fields}"#));
        let lines = [
            line(r#""denied","GATE_REASON":"policy","PEER_UID":"1""#),
            line(r#""summary","GATE_REASON":"policy","PEER_UID":"1","GATE_COUNT":"10""#),
            line(r#""summary","GATE_REASON":"policy","GATE_COUNT":"100""#),
            line(r#""summary","GATE_REASON":"no-credentials","GATE_COUNT":"1000""#),
            line(r#""refused","GATE_REASON":"user-limit","PEER_UID":"1""#),
            line(r#""summary","GATE_REASON":"total-limit","PEER_UID":"1","GATE_COUNT":"7""#),
            // Only summaries carry a count.
            line(r#""denied","GATE_REASON":"policy","PEER_UID":"1","GATE_COUNT":"99""#),
        ];
        let tally = tally(&lines.each_ref().map(String::as_str));
        assert_eq!(tally.total(Verdict::Denied), Count { records: 2, counted: 1110 });
        assert_eq!(tally.total(Verdict::Refused), Count { records: 1, counted: 7 });
        let counts: Vec<_> = tally.rows().iter().map(|(key, row)| (key.reason, key.uid, row.count.total())).collect();
        assert_eq!(
            counts,
            [
                ("no-credentials", None, 1000),
                ("policy", None, 100),
                ("policy", Some(1), 12),
                ("total-limit", Some(1), 7),
                ("user-limit", Some(1), 1),
            ]
        );
    }

    #[test]
    fn a_lie_about_a_count_is_unusable_and_never_overflows() {
        let most = ours(r#""GATE_VERDICT":"summary","GATE_REASON":"policy","GATE_COUNT":"18446744073709551615""#);
        let lines = [
            most.clone(),
            most,
            ours(r#""GATE_VERDICT":"summary","GATE_REASON":"policy","GATE_COUNT":"-1""#),
            ours(r#""GATE_VERDICT":"summary","GATE_REASON":"policy""#),
            ours(r#""GATE_VERDICT":"admitted""#),
            ours(r#""MESSAGE":"x""#),
        ];
        let tally = tally(&lines.each_ref().map(String::as_str));
        assert_eq!(tally.total(Verdict::Denied).total(), u64::MAX);
        assert_eq!(tally.lines(), LineCounts { read: 6, believed: 2, unusable: 4, ..LineCounts::default() });
    }

    #[test]
    fn damaged_lines_are_counted_and_harm_no_other() {
        let good = ours(r#""GATE_VERDICT":"denied","GATE_REASON":"policy","PEER_UID":"1""#);
        let long = format!(r#"{{"x":"{}"}}"#, "x".repeat(LONGEST_LINE));
        let mut tally = Tally::new(Scope::System(ECHOD));
        let input = [&b"\xff\xfe\n\n-- Boot --\n"[..], long.as_bytes(), b"\n", good.as_bytes(), b"\n{\"cut"].concat();
        tally.read(io::BufReader::with_capacity(7, &input[..]), |_| {}).unwrap();
        assert_eq!(tally.lines(), LineCounts { read: 5, believed: 1, damaged: 4, ..LineCounts::default() });
    }

    #[test]
    fn a_flood_of_different_users_and_names_takes_bounded_memory_and_loses_no_count() {
        let mut tally = Tally::new(Scope::System(ECHOD));
        let some = MOST_ROWS as u64 + 1000;
        for n in 0..some {
            let fields = format!(
                r#""GATE_VERDICT":"denied","GATE_REASON":"policy","PEER_UID":"{n}","PEER_COMM":"p{n}","PEER_UNIT":"u{n}""#
            );
            tally.add_line(ours(&fields).as_bytes());
        }
        assert_eq!(tally.rows.len(), MOST_ROWS + 1);
        assert_eq!(tally.texts.len(), MOST_TEXTS);
        assert!(tally.has_overflowed());
        assert_eq!(tally.total(Verdict::Denied).total(), some);
        let (_, others) = tally.rows().into_iter().find(|(key, _)| key.uid.is_none()).unwrap();
        assert_eq!(others.count.total(), 1000);
    }

    #[test]
    fn the_rarer_programs_of_one_user_are_counted_together() {
        let mut tally = Tally::new(Scope::System(ECHOD));
        for n in 0..MOST_NAMED + 5 {
            let fields = format!(r#""GATE_VERDICT":"denied","PEER_UID":"1","PEER_COMM":"p{n}""#);
            tally.add_line(ours(&fields).as_bytes());
        }
        let rows = tally.rows();
        let programs = &rows[0].1.programs;
        assert_eq!((programs.names.len(), programs.more), (MOST_NAMED, 5));
    }

    #[test]
    fn nothing_in_a_text_can_steer_a_terminal() {
        assert_eq!(harmless("a\u{1b}[2J\u{9b}\u{202e}\r\n"), "a\\u{1b}[2J\\u{9b}\\u{202e}\\r\\n");
        assert_eq!(harmless("dev-disk\\\\x2d1.service"), "dev-disk\\\\x2d1.service", "quoted once is enough");
        assert_eq!(harmless(&"\u{7f}".repeat(1000)).chars().count(), LONGEST_TEXT + 3);
    }

    #[test]
    fn the_first_time_is_when_what_a_summary_counts_began() {
        let line =
            r#""GATE_VERDICT":"summary","GATE_REASON":"policy","GATE_COUNT":"2","__REALTIME_TIMESTAMP":"9000000""#;
        let spans = |duration: &str| tally(&[&ours(&format!(r#"{line},"GATE_DURATION_USEC":"{duration}""#))]).span();
        assert_eq!(spans("2000000"), Some(Span { first: 7_000_000, last: 9_000_000 }));
        assert_eq!(spans("9223372036854775807"), Some(Span { first: 0, last: 9_000_000 }), "a lie");
    }
}
