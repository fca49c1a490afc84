//! The sums, for a person to read or for a program. Used by [`report`](super).

use std::io::{self, Write};
use std::path::Path;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use peergate::escape::printable;
use serde_json::{Value, json};

use super::Program;
use super::entry::Scope;
use super::sources::Sources;
use super::tally::{Count, Key, Named, Row, Span, Tally, Verdict};

/// The widest a bar gets.
const WIDEST_BAR: usize = 40;
/// A bar narrower than this says nothing.
const NARROWEST_BAR: usize = 4;
/// A longer name is cut in the table.
const LONGEST_NAME: usize = 20;

/// How to print for a person.
#[derive(Clone, Debug)]
pub struct Look {
    /// Columns there are.
    pub width: usize,
    /// Whether the locale's characters are UTF-8.
    pub unicode: bool,
    /// Whether to use colours.
    pub colour: bool,
    /// Which time to show.
    pub zone: TimeZone,
}

/// What was asked for, and how much of it was read.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// --since.
    pub since: Option<&'a str>,
    /// --until.
    pub until: Option<&'a str>,
    /// The files that were read, and those that were not.
    pub sources: &'a Sources,
    /// Why records may be missing; empty where everything was read.
    pub complaints: &'a [String],
}

/// The report as one JSON document. Times are UTC; numbers are those of [`text`].
pub fn json(tally: &Tally, asked: Asked<'_>) -> Value {
    let lines = tally.lines();
    let span = tally.span();
    json!({
        "scope": match tally.scope() {
            Scope::System(_) => "system",
            Scope::User(..) => "user",
        },
        "since": asked.since,
        "until": asked.until,
        "complete": asked.complaints.is_empty(),
        "complaints": asked.complaints,
        "journal": {
            "looked_in": asked.sources.places,
            "files": asked.sources.files.len(),
            "directories": asked.sources.directories().into_iter().map(path).collect::<Vec<_>>(),
            "oldest": asked.sources.oldest().and_then(utc),
            "unreadable": asked.sources.unreadable.iter().map(|unreadable| path(unreadable)).collect::<Vec<_>>(),
        },
        "first": span.and_then(|span| utc(span.first)),
        "last": span.and_then(|span| utc(span.last)),
        "denied": count_json(tally.total(Verdict::Denied)),
        "refused": count_json(tally.total(Verdict::Refused)),
        "revoked": count_json(tally.total(Verdict::Revoked)),
        "suppressed": tally.suppressed(),
        "machines": tally.machines().iter().map(|(id, host)| machine_json(*id, host.as_deref())).collect::<Vec<_>>(),
        "peers": tally.rows().into_iter().map(|(key, row)| row_json(key, row, tally)).collect::<Vec<_>>(),
        "entries": {
            "read": lines.read,
            "believed": lines.believed,
            "left_aside": lines.left_aside,
            "unusable": lines.unusable,
            "damaged": lines.damaged,
        },
    })
}

fn count_json(count: Count) -> Value {
    json!({ "total": count.total(), "records": count.records, "counted": count.counted })
}

fn machine_json(id: u128, host: Option<&str>) -> Value {
    json!({ "id": format!("{id:032x}"), "host": host })
}

/// A path, harmless to a terminal.
fn path(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

fn row_json(key: Key, row: &Row, tally: &Tally) -> Value {
    let mut json = json!({
        "verdict": verdict_word(key.verdict),
        "reason": key.reason,
        "uid": key.uid,
        "user": row.user.as_deref(),
        "total": row.count.total(),
        "records": row.count.records,
        "counted": row.count.counted,
        "first": row.span.and_then(|span| utc(span.first)),
        "last": row.span.and_then(|span| utc(span.last)),
        "rules": named_json(&row.rules),
        "units": named_json(&row.units),
        "programs": named_json(&row.programs),
        "logins": named_json(&row.logins),
    });
    if let Some(id) = key.machine.filter(|_| tally.machines().len() > 1) {
        json["machine"] = machine_json(id, tally.machines().get(&id).and_then(|host| host.as_deref()));
    }
    json
}

fn named_json(named: &Named) -> Value {
    let names = by_records(named).into_iter().map(|(name, records)| json!({ "name": name, "records": records }));
    let more = (named.more > 0).then(|| json!({ "name": null, "records": named.more }));
    names.chain(more).collect()
}

/// RFC 3339. `None` for a time that no calendar has.
fn utc(microseconds: i64) -> Option<String> {
    Timestamp::from_microsecond(microseconds).ok().map(|time| time.to_string())
}

const fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Denied => "denied",
        Verdict::Refused => "refused",
        Verdict::Revoked => "revoked",
    }
}

fn by_records(named: &Named) -> Vec<(&str, u64)> {
    let mut names: Vec<_> = named.names.iter().map(|(name, records)| (&**name, *records)).collect();
    names.sort_by_key(|(_, records)| std::cmp::Reverse(*records));
    names
}

/// The report as a table.
///
/// # Errors
/// What writing says.
pub fn text(tally: &Tally, asked: Asked<'_>, look: &Look, out: &mut impl Write) -> io::Result<()> {
    let whose = match tally.scope() {
        Scope::System(program) => format!("the system's {}", program.name),
        Scope::User(program, uid) => format!("the own {} of uid {uid}", program.name),
    };
    let rows = tally.rows();
    if rows.is_empty() {
        // Only a journal that was read in full tells that there was nothing.
        match asked.complaints {
            [] => writeln!(out, "No connection was turned away by {whose}.")?,
            _ => writeln!(out, "No record was found of a connection turned away by {whose}.")?,
        }
        notes(tally, look, out)?;
        return extent(asked, true, look, out);
    }
    let full = |time: i64| full_time(time, look);
    let span = tally.span();
    match span {
        Some(span) => writeln!(out, "Turned away by {whose}, {} to {}", full(span.first), full(span.last))?,
        None => writeln!(out, "Turned away by {whose}, at unknown times")?,
    }
    writeln!(out)?;
    table(&rows, tally, &Columns::of(&rows, span, look), look, out)?;
    writeln!(out)?;
    let words = [(Verdict::Denied, "Denied: "), (Verdict::Refused, "Refused:"), (Verdict::Revoked, "Revoked:")];
    for (verdict, word) in words {
        let count = tally.total(verdict);
        // Revocations come with a reload, or with `verify = "line"`: most never see one.
        if verdict == Verdict::Revoked && count.total() == 0 {
            continue;
        }
        let (total, records, counted) = (group(count.total()), group(count.records), group(count.counted));
        writeln!(out, "{} {total} = {records} recorded in full + {counted} counted", look.bold(word))?;
    }
    notes(tally, look, out)?;
    extent(asked, false, look, out)
}

/// A time with its day and zone.
fn full_time(time: i64, look: &Look) -> String {
    show(time, "%a %Y-%m-%d %H:%M:%S %Z", look).unwrap_or_else(|| "?".to_owned())
}

/// Which files the report rests on, since when they tell, and whether there may be more. Where nothing was found, also
/// where else there are records.
fn extent(asked: Asked<'_>, nothing: bool, look: &Look, out: &mut impl Write) -> io::Result<()> {
    let sources = asked.sources;
    let mut say = |text: String| wrapped(&[text], " ", 0, look, out);
    if !sources.files.is_empty() {
        let directories: Vec<_> = sources.directories().into_iter().map(|name| look.plain(&path(name))).collect();
        let files = if sources.files.len() == 1 { "file" } else { "files" };
        let oldest = match sources.oldest() {
            Some(time) => format!("from {} on", full_time(time, look)),
            None => "without entries".to_owned(),
        };
        let count = group(sources.files.len() as u64);
        say(format!("Read: {count} journal {files} in {}, {oldest}.", directories.join(", ")))?;
    } else if nothing {
        let places: Vec<_> = sources.places.iter().map(|place| look.plain(place)).collect();
        say(format!("Read: no journal file; looked in {}.", places.join(", ")))?;
    }
    if nothing && !sources.namespaces.is_empty() {
        let names: Vec<_> = sources.namespaces.iter().map(|name| look.plain(&printable(name))).collect();
        say(format!(
            "Not read: the journal {} {}. Records of a service with LogNamespace= are found with --namespace.",
            if names.len() == 1 { "namespace" } else { "namespaces" },
            names.join(", "),
        ))?;
    }
    if !asked.complaints.is_empty() {
        say("Not complete: there may be more records than were read. Standard error says why.".to_owned())?;
    }
    Ok(())
}

/// What the reader must know of the journal's lines.
fn notes(tally: &Tally, look: &Look, out: &mut impl Write) -> io::Result<()> {
    let lines = tally.lines();
    let service = match tally.scope() {
        Scope::System(Program { name, unit }) => {
            format!("sent neither by the system's {unit}.service nor by root's {name}")
        }
        Scope::User(program, _) => format!("not sent by this user's own {}", program.name),
    };
    let notes = [
        (lines.left_aside, format!("in our name, but {service}: left aside")),
        (lines.unusable, "of ours without a verdict or count that can be used: left aside".to_owned()),
        (lines.damaged, "damaged or too long to read: left aside".to_owned()),
    ];
    for (count, what) in notes.iter().filter(|(count, _)| *count > 0) {
        let entries = if *count == 1 { "entry" } else { "entries" };
        wrapped(&[format!("Note: {} {entries} {what}.", group(*count))], " ", 0, look, out)?;
    }
    if tally.has_overflowed() {
        wrapped(&["Note: too many users to tell all apart; the rest are among the others.".into()], " ", 0, look, out)?;
    }
    Ok(())
}

/// The table's measures.
struct Columns {
    count: usize,
    bar: usize,
    who: usize,
    reason: usize,
    time: &'static str,
    time_width: usize,
    most: u64,
}

const GAP: usize = 2;

impl Columns {
    fn of(rows: &[(Key, &Row)], span: Option<Span>, look: &Look) -> Self {
        let widest =
            |text: fn(&(Key, &Row)) -> usize, head: &str| rows.iter().map(text).max().unwrap_or(0).max(head.len());
        let count = widest(|(_, row)| group(row.count.total()).len(), "COUNT");
        let who = widest(|(key, row)| who(*key, row).chars().count(), "USER");
        let reason = widest(|(key, _)| key.reason.len(), "REASON");
        // As journalctl shows them; with the year where that would leave it open.
        let year = |time| show(time, "%Y", look);
        let one_year = span.is_none_or(|span| year(span.first) == year(span.last));
        let (time, time_width) = if one_year { ("%b %d %H:%M:%S", 15) } else { ("%Y-%m-%d %H:%M:%S", 19) };
        let taken = count + GAP + who + GAP + reason + GAP + time_width + GAP + time_width;
        let left = look.width.saturating_sub(taken + GAP).min(WIDEST_BAR);
        let bar = if left < NARROWEST_BAR { 0 } else { left };
        let most = rows.iter().map(|(_, row)| row.count.total()).max().unwrap_or(0);
        Self { count, bar, who, reason, time, time_width, most }
    }
}

fn table(rows: &[(Key, &Row)], tally: &Tally, columns: &Columns, look: &Look, out: &mut impl Write) -> io::Result<()> {
    let Columns { count, bar, who: who_width, reason, time_width, .. } = *columns;
    let gap = |width: usize| if width == 0 { 0 } else { width + GAP };
    let head = format!(
        "{:>count$}{:bar_gap$}  {:who_width$}  {:reason$}  {:time_width$}  LAST",
        "COUNT",
        "",
        "USER",
        "REASON",
        "FIRST",
        bar_gap = gap(bar),
    );
    writeln!(out, "{}", look.bold(&head))?;
    for (key, row) in rows {
        let total = row.count.total();
        let drawn = if bar == 0 { String::new() } else { draw(total, columns.most, bar, look.unicode) };
        let padding = " ".repeat(gap(bar).saturating_sub(drawn.chars().count() + if bar == 0 { 0 } else { GAP }));
        let drawn = if bar == 0 { drawn } else { format!("  {}", look.bar(key.verdict, &drawn)) };
        let time = |time: fn(Span) -> i64| row.span.and_then(|span| show(time(span), columns.time, look));
        let unknown = || "-".to_owned();
        let (first, last) = (time(|span| span.first), time(|span| span.last));
        let who = look.plain(&who(*key, row));
        writeln!(
            out,
            "{:>count$}{drawn}{padding}  {who:who_width$}  {:reason$}  {:time_width$}  {}",
            group(total),
            key.reason,
            first.unwrap_or_else(unknown),
            last.unwrap_or_else(unknown),
        )?;
        wrapped(&details(*key, row, tally, look), "; ", count + GAP, look, out)?;
    }
    Ok(())
}

/// "guest (1001)", "root (0), logged in as guest".
fn who(key: Key, row: &Row) -> String {
    let Some(uid) = key.uid else {
        return if key.reason == "no-credentials" { "unknown" } else { "others" }.to_owned();
    };
    let who = row.user.as_deref().map_or(uid.to_string(), |name| format!("{} ({uid})", short(name)));
    match only_login(row) {
        Some(login) => format!("{who}, logged in as {}", short(login)),
        None => who,
    }
}

/// The login of all full records, where it is not the peer's own user.
fn only_login(row: &Row) -> Option<&str> {
    match row.logins.names.as_slice() {
        [(login, records)] if *records == row.count.records => Some(login),
        _ => None,
    }
}

/// A name that fits into a column.
fn short(name: &str) -> String {
    let short: String = name.chars().take(LONGEST_NAME).collect();
    if short.len() < name.len() { short + "..." } else { short }
}

/// What does not fit into a column.
fn details(key: Key, row: &Row, tally: &Tally, look: &Look) -> Vec<String> {
    let Count { records, counted } = row.count;
    let mut details = vec![match (records, counted) {
        (_, 0) => verdict_word(key.verdict).to_owned(),
        (0, _) => format!("{}: counted only", verdict_word(key.verdict)),
        _ => format!("{}: {} in full, {} counted", verdict_word(key.verdict), group(records), group(counted)),
    }];
    if let Some(machine) = key.machine.filter(|_| tally.machines().len() > 1) {
        details.push(format!("on {}", one_word(&look.plain(&machine_name(machine, tally)))));
    }
    let logins = if only_login(row).is_some() { &Named::default() } else { &row.logins };
    for (what, named) in [("by", &row.rules), ("from", &row.units), ("with", &row.programs), ("logged in as", logins)] {
        let names = by_records(named);
        let alone = names.len() == 1 && names[0].1 == records;
        let mut shown: Vec<String> = names
            .into_iter()
            .map(|(name, records)| {
                let name = one_word(&look.plain(name));
                if alone { name } else { format!("{name} ({})", group(records)) }
            })
            .collect();
        if named.more > 0 {
            shown.push(format!("others ({})", group(named.more)));
        }
        if !shown.is_empty() {
            details.push(format!("{what} {}", shown.join(", ")));
        }
    }
    details
}

/// The machine's host name; with the beginning of its id where another machine has the same, or where it has none.
fn machine_name(id: u128, tally: &Tally) -> String {
    let short = &format!("{id:032x}")[..12];
    let host = tally.machines().get(&id).and_then(|host| host.as_deref());
    let Some(host) = host else { return short.to_owned() };
    let namesakes = tally.machines().values().filter(|other| other.as_deref() == Some(host)).count();
    if namesakes == 1 { host.to_owned() } else { format!("{host}/{short}") }
}

/// A space that no line is broken at.
const FIXED_SPACE: char = '\u{1}';

/// A name as it is, or in quotes where it could be read as more than a name: peers choose those of their programs.
fn one_word(name: &str) -> String {
    if name.chars().all(|c| c.is_alphanumeric() || "-_.:@/+\\".contains(c)) {
        return name.to_owned();
    }
    let escaped = name.replace('"', "\\\"").replace(' ', &FIXED_SPACE.to_string());
    format!("\"{escaped}\"")
}

/// Writes the parts in lines no wider than the terminal where their words allow, each beginning with `indent` spaces.
fn wrapped(parts: &[String], separator: &str, indent: usize, look: &Look, out: &mut impl Write) -> io::Result<()> {
    let all = parts.join(separator);
    let room = look.width.saturating_sub(indent).max(20);
    let mut line = String::new();
    let mut put = |line: &str| writeln!(out, "{:indent$}{}", "", line.replace(FIXED_SPACE, " "));
    for word in all.split(' ') {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > room {
            put(&line)?;
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    put(&line)
}

/// A bar of at most `width` columns: `most` fills it, and what is not nothing shows.
fn draw(value: u64, most: u64, width: usize, unicode: bool) -> String {
    let steps_each = if unicode { 8 } else { 1 };
    let steps = u128::from(value) * (width * steps_each) as u128 / u128::from(most.max(1));
    let steps = (steps as usize).clamp(usize::from(value > 0), width * steps_each);
    if !unicode {
        return "#".repeat(steps);
    }
    let eighths = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    "█".repeat(steps / 8) + eighths[steps % 8]
}

/// The number, its digits in threes.
pub fn group(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3 + 1);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A time in the look's zone, by strftime(3)'s letters. `None` for a time that no calendar has.
fn show(microseconds: i64, format: &str, look: &Look) -> Option<String> {
    let time = ZonedDateTime::new(Timestamp::from_microsecond(microseconds).ok()?, look.zone.clone());
    Some(time.strftime(format).to_string())
}

impl Look {
    fn bold(&self, text: &str) -> String {
        if self.colour { format!("\u{1b}[1m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    fn bar(&self, verdict: Verdict, text: &str) -> String {
        let colour = match verdict {
            Verdict::Denied => 31,
            Verdict::Refused => 33,
            Verdict::Revoked => 35,
        };
        if self.colour { format!("\u{1b}[{colour}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    /// The text in characters that the locale has.
    fn plain(&self, text: &str) -> String {
        if self.unicode || text.is_ascii() {
            return text.to_owned();
        }
        text.chars().fold(String::new(), |mut out, c| {
            if c.is_ascii() {
                out.push(c)
            } else {
                out.extend(c.escape_unicode())
            }
            out
        })
    }
}
