//! The fuzz targets: for each a function that takes any bytes and panics if a claim does not hold.
//!
//! Included by fuzz_targets/ (libFuzzer, nightly compiler) and by tests/fuzz_replay.rs, which replays the corpora on
//! the stable one.

// Each target uses only a part of the modules and of this file.
#![allow(dead_code)]

use std::io::{self, BufReader};

use jiff::tz::TimeZone;
use peergate::Subject;
use peergate::ids::{Gid, OVERFLOW_ID, Uid};
use peergate::policy_file::{Faults, Names, Source};
use peergate::unit::Units;

use echod::echo::Echo;
use echod::line::{Cursor, End, Room, TOO_LONG, advance, echo};
use peergate_daemon::config::Config;
use peergate_daemon::report::Program;
use peergate_daemon::report::entry::Scope;
use peergate_daemon::report::show::{Asked, Look, json, text};
use peergate_daemon::report::sources::{Sources, parse_headers};
use peergate_daemon::report::tally::{Tally, Verdict};

/// A target: its name, which is also its corpus's, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target there is.
pub const ALL: [Target; 4] = [("policy", policy), ("line", line), ("activation", activation), ("report", report)];

/// A configuration file of any bytes: it is read whole, or refused with faults that can be printed and that have a
/// place. It never admits a peer whose credentials cannot be told.
pub fn policy(data: &[u8]) {
    let me = Uid::new(1000);
    let source = match Source::from_bytes("echod.toml", data.to_vec()) {
        Ok(source) => source,
        Err(fault) => return faults_are_presentable(&Faults(vec![fault]), data),
    };
    let config = match Config::<Echo>::from_source(&source, me, &SomeNames) {
        Ok(config) => config,
        Err(faults) => return faults_are_presentable(&faults, data),
    };
    let warnings = Faults(config.warnings.clone());
    if !warnings.0.is_empty() {
        faults_are_presentable(&warnings, data);
    }
    let units = [None, Units::from_path("backup.service"), Units::from_path("user@1000.service/mail.service")];
    for uid in [0, 1, 1000, 2000, OVERFLOW_ID, u32::MAX] {
        for units in &units {
            for gids in [&[Gid::new(uid)][..], &[Gid::new(4), Gid::new(OVERFLOW_ID)], &[]] {
                let who = Somebody { uid: Uid::new(uid), gids, units: units.as_ref() };
                let verdict = config.policy.decide(&who);
                assert!(!verdict.is_admitted() || who.uid.is_known(), "{verdict:?} for {who:?}");
                let explanation = config.policy.explain(&who);
                assert_eq!(explanation.is_admitted(), verdict.is_admitted(), "{who:?}");
                assert_eq!(explanation.rule(), verdict.rule().map(|rule| rule.name()), "{who:?}");
                let said = explanation.to_string();
                assert!(!said.contains(|c: char| c.is_control() && c != '\n'), "{said:?}");
            }
        }
    }
}

fn faults_are_presentable(faults: &Faults, data: &[u8]) {
    assert!(!faults.0.is_empty(), "refused for no reason");
    let lines = data.iter().filter(|byte| **byte == b'\n').count() + 1;
    for fault in &faults.0 {
        let said = fault.to_string();
        assert!(said.starts_with("echod.toml") && !said.contains(char::is_control), "{said:?}");
        if let Some((line, column)) = fault.place() {
            assert!((1..=lines).contains(&line) && (1..=data.len() + 1).contains(&column), "{said}: no such place");
        }
    }
}

/// A user database that knows some names, does not know some, and gives no answer for some.
struct SomeNames;

impl SomeNames {
    fn answer(name: &str) -> io::Result<Option<u32>> {
        match name.len() % 4 {
            0 => Ok(None),
            1 => Ok(Some(OVERFLOW_ID)),
            2 => Err(io::Error::from(io::ErrorKind::TimedOut)),
            _ => Ok(Some(name.bytes().map(u32::from).sum())),
        }
    }
}

impl Names for SomeNames {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        Self::answer(name).map(|id| id.map(Uid::new))
    }

    fn gid(&self, name: &str) -> io::Result<Option<Gid>> {
        Self::answer(name).map(|id| id.map(Gid::new))
    }
}

#[derive(Debug)]
struct Somebody<'a> {
    uid: Uid,
    gids: &'a [Gid],
    units: Option<&'a Units>,
}

impl Subject for Somebody<'_> {
    fn uid(&self) -> Uid {
        self.uid
    }

    fn gids(&self) -> &[Gid] {
        self.gids
    }

    fn gids_complete(&self) -> bool {
        !self.gids.is_empty()
    }

    fn units(&self) -> Option<&Units> {
        self.units
    }
}

/// Any bytes in any chunks, through a socket that takes any part of the answer: the answer is the model's.
///
/// The first eight bytes choose the limit, the room for output and the sizes of chunks and parts; the rest is sent.
pub fn line(data: &[u8]) {
    let Some((choice, input)) = data.split_first_chunk::<8>() else { return };
    let limit = 1 + usize::from(choice[0]);
    let (room, most) = (1 + usize::from(choice[1]), 1 + u64::from(choice[1] % 7));
    let sizes = |from: &[u8]| from.iter().map(|byte| usize::from(*byte)).collect::<Vec<_>>();
    // At least one byte each round, or the connection would stand still.
    let mut chunks = sizes(&choice[2..5]).into_iter().map(|size| size + 1).cycle();
    let mut parts = sizes(&choice[5..8]).into_iter().chain([1]).cycle();

    let (mut held, mut at, mut out, mut lines) = (Vec::new(), Cursor::default(), Vec::new(), 0);
    let mut rest = input;
    let mut too_long = false;
    'connection: loop {
        let (chunk, after) = rest.split_at(chunks.next().unwrap_or(1).min(rest.len()));
        rest = after;
        held.extend_from_slice(chunk);
        let ended = rest.is_empty();
        loop {
            let mut some = Vec::new();
            let echoed = echo(&held, at, limit, ended, Room { bytes: room, lines: most }, &mut some);
            assert!(some.len() <= room, "{} bytes in room for {room}", some.len());
            assert!(echoed.lines <= most, "{} lines in room for {most}", echoed.lines);
            let taken = some.len().min(parts.next().unwrap_or(1));
            out.extend_from_slice(&some[..taken]);
            let (after, completed) = advance(&held, at, taken);
            if taken == some.len() {
                assert_eq!((after, completed), (echoed.next, echoed.lines), "two ways to the same place");
            }
            at = after;
            lines += completed;
            held.drain(..at.start);
            at.start = 0;
            if taken < some.len() || echoed.end == End::Full {
                continue;
            }
            if echoed.end == End::TooLong {
                too_long = true;
                break 'connection;
            }
            assert!(held.len() <= limit, "{} bytes are kept of a line of {limit}", held.len());
            if ended {
                break 'connection;
            }
            break;
        }
    }
    let (model, model_lines, model_too_long) = answer(input, limit);
    assert_eq!(out, model, "limit {limit}");
    assert_eq!((lines, too_long), (model_lines, model_too_long), "limit {limit}");
    assert!(TOO_LONG.ends_with(b"\n"));
}

/// The model of the contract, as simple as possible. Returns the echo, the number of lines, and whether one was too
/// long.
fn answer(input: &[u8], limit: usize) -> (Vec<u8>, u64, bool) {
    let mut out = Vec::new();
    let mut lines = 0;
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        if line.len() > limit {
            return (out, lines, true);
        }
        out.extend_from_slice(b"> ");
        out.extend_from_slice(line);
        lines += 1;
    }
    (out, lines, false)
}

/// Any LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES, as lines in this order; a missing line is an unset variable.
pub fn activation(data: &[u8]) {
    const ME: u32 = 4711;
    let variables: Vec<String> =
        data.splitn(3, |byte| *byte == b'\n').map(|value| String::from_utf8_lossy(value).into_owned()).collect();
    let [fds, pid, names] = [0, 1, 2].map(|index| variables.get(index).cloned());
    let ours = pid.as_deref().is_some_and(|pid| pid.parse() == Ok(ME));
    match peergate::activation::declared(fds.clone(), pid, names.clone(), ME) {
        Ok(Some((count, each))) => {
            assert!(ours, "descriptors of another process");
            assert_eq!(fds.and_then(|fds| fds.parse().ok()), Some(count));
            assert!(count <= 1 << 20, "{count} descriptors");
            if each.is_empty() {
                assert!(names.is_none_or(|names| names.split(':').count() != count), "names were lost");
            } else {
                assert_eq!(each.len(), count);
                assert_eq!(Some(each.join(":")), names);
            }
        }
        Ok(None) => assert!(fds.is_none(), "LISTEN_FDS went unnoticed"),
        Err(why) => {
            assert!(!why.is_empty());
            let number = fds.and_then(|fds| fds.parse::<u64>().ok());
            assert!(!ours || number.is_none_or(|number| number > 1 << 20), "{why}");
        }
    }
}

/// Any journal, in any chunks: each line is counted, the sums agree, and the output has no control sequence for a
/// terminal.
pub fn report(data: &[u8]) {
    let program = Program { name: "echod", unit: "echo" };
    for scope in [Scope::System(program), Scope::User(program, 1000)] {
        let read = |capacity: usize| {
            let mut tally = Tally::new(scope);
            let mut last = 0;
            let input = BufReader::with_capacity(capacity, data);
            tally.read(input, |lines| last = lines).expect("memory reads without errors");
            assert_eq!(last, tally.lines().read);
            tally
        };
        let tally = read(data.len().max(1));
        let lines = tally.lines();
        assert_eq!(lines.read, lines.believed + lines.left_aside + lines.unusable + lines.damaged);
        for verdict in [Verdict::Denied, Verdict::Refused] {
            let rows = tally.rows();
            let of_rows = rows.iter().filter(|(key, _)| key.verdict == verdict);
            let sum = of_rows.fold(0_u64, |sum, (_, row)| sum.saturating_add(row.count.total()));
            assert_eq!(tally.total(verdict).total(), sum);
        }
        let opened = parse_headers(&String::from_utf8_lossy(data));
        let sources = Sources::new(scope, true, opened, Vec::new());
        let asked = Asked { since: None, until: None, sources: &sources, complaints: &[] };
        let document = json(&tally, asked).to_string();
        assert_eq!(json(&read(7), asked).to_string(), document, "it matters how the journal arrives");
        is_harmless(&document);
        for (width, unicode) in [(1, false), (80, true), (1000, true)] {
            let look = Look { width, unicode, colour: false, zone: TimeZone::UTC };
            let mut shown = Vec::new();
            text(&tally, asked, &look, &mut shown).expect("memory takes everything");
            let shown = String::from_utf8(shown).expect("text is UTF-8");
            assert!(unicode || shown.is_ascii(), "{shown:?}");
            is_harmless(&shown);
        }
    }
}

fn is_harmless(text: &str) {
    let harmful =
        |c: char| (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    assert!(!text.contains(harmful), "{text:?}");
}
