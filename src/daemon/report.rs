//! `report`: which peers were turned away, how often and why, from the journal.
//!
//! journalctl(1) reads the journal for us, one line of JSON for each entry, and these are added up as they come. Which
//! entries are believed to be ours is told in [`entry`]. journalctl is asked for all journals that the caller may
//! read, without --system or --user: in which file journald keeps an entry depends on its configuration
//! (SplitMode=, Storage=), the fields that it vouches for don't.

pub mod entry;
mod journalctl;
pub mod show;
pub mod sources;
pub mod tally;

use std::env;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use peergate::escape::printable;

use self::entry::Scope;
use self::show::{Asked, Look};
use self::sources::Sources;
use self::tally::Tally;
use crate::cli::{Options, Report};
use crate::protocol::Protocol;
use crate::{exit_code, output};

/// How long the journal is read before a terminal is told how far it has come.
const QUIET: Duration = Duration::from_millis(300);
/// How often it is told anew.
const TICK: Duration = Duration::from_millis(100);

/// What `report` of a daemon may be told besides.
pub type ReportOptions<P> = <<P as Protocol>::Options as Options>::Report;

/// Which program's records to report on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// SYSLOG_IDENTIFIER, and the name of its executable.
    pub name: &'static str,
    /// The name of its service's unit, without `.service`.
    pub unit: &'static str,
}

#[cfg(test)]
pub(crate) const ECHOD: Program = Program { name: "echod", unit: "echo" };

impl Program {
    /// Of a daemon with this protocol.
    pub fn of<P: Protocol>(own: &ReportOptions<P>) -> Self {
        let instance = <P::Options as Options>::instance(own);
        // For the time that the process lives, which is a report's.
        let unit = instance.map_or(P::UNIT, |instance| format!("{}{instance}", P::UNIT).leak());
        Self { name: P::NAME, unit }
    }

    /// Of a template, every instance.
    fn is_service(self, name: &str) -> bool {
        let unit = name.strip_suffix(".service");
        unit == Some(self.unit) || self.unit.ends_with('@') && unit.is_some_and(|unit| unit.starts_with(self.unit))
    }
}

/// A unit's name in a message: `peergate@NAME` for the template `peergate@`.
pub fn unit_for_messages(unit: &str) -> String {
    if unit.ends_with('@') { format!("{unit}NAME") } else { unit.to_owned() }
}

/// Prints the report. Returns the status to exit with: 0, 69 where there is no journalctl, 74 where the report is not
/// complete; what was read is printed all the same.
pub fn run(asked: &Report, program: &Program) -> u8 {
    let scope = scope(asked, *program);
    let mut child = match journalctl::start(asked, scope) {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            output::complain("no journalctl(1) here, which reads the journal for us; it is part of systemd");
            return exit_code::UNAVAILABLE;
        }
        Err(error) => {
            output::complain(&format!("starting journalctl: {error}"));
            return exit_code::UNAVAILABLE;
        }
    };
    let mut tally = Tally::new(scope);
    let progress = Progress::start();
    let ended = journalctl::read(&mut child, |output| tally.read(output, |lines| progress.set(lines)));
    drop(progress);
    // Afterwards: a file that was deleted meanwhile is not said to have been read.
    let (sources, failed) = journalctl::sources(asked, scope);
    let broken_off = ended.failed.is_some() && tally.lines().read == 0;
    let failed = ended.failed.or(failed);
    let complaints: Vec<_> = failed.into_iter().chain(ended.said).chain(missed(&tally, &sources)).collect();
    // Where nothing could be read, a table says nothing; a program still gets its document.
    if !broken_off || asked.json {
        print(asked, &tally, &sources, &complaints);
    }
    for complaint in &complaints {
        output::complain(complaint);
    }
    if complaints.is_empty() {
        return 0;
    }
    if matches!(scope, Scope::System(_)) && !sources.unreadable.is_empty() {
        output::complain(
            "hint: only root and the groups systemd-journal and adm may read the system's journal; --user reports on \
             your own service",
        );
    }
    exit_code::IO_ERROR
}

/// Root asks about the system's service, every other user about their own, unless the command line says otherwise.
fn scope(asked: &Report, program: Program) -> Scope {
    let me = nix::unistd::getuid();
    if asked.system || (me.is_root() && !asked.user) {
        Scope::System(program)
    } else {
        Scope::User(program, me.as_raw())
    }
}

/// Reasons why records may be missing although journalctl has not complained: absent files, files that may not be read,
/// and entries that could not be used.
fn missed(tally: &Tally, sources: &Sources) -> Vec<String> {
    let mut missed = Vec::new();
    if !sources.unreadable.is_empty() {
        let paths: Vec<_> = sources.unreadable.iter().map(|path| printable(&path.to_string_lossy())).collect();
        missed.push(format!("no permission to read {}", paths.join(", ")));
    } else if sources.files.is_empty() && tally.lines().read == 0 {
        missed.push(format!("no journal file that may hold the records was found in {}", sources.places.join(", ")));
    }
    let lines = tally.lines();
    if lines.damaged + lines.unusable > 0 {
        missed.push(format!("{} entries of the journal cannot be read or counted", lines.damaged + lines.unusable));
    }
    if tally.suppressed() > 0 {
        missed.push(format!("journald has dropped {} messages of the service, for its rate limit", tally.suppressed()));
    }
    missed
}

fn print(asked: &Report, tally: &Tally, sources: &Sources, complaints: &[String]) {
    let mut out = Vec::new();
    let (since, until) = (asked.since.as_deref(), asked.until.as_deref());
    let asked_for = Asked { since, until, sources, complaints };
    // Writing to memory does not fail.
    if asked.json {
        let _ = serde_json::to_writer_pretty(&mut out, &show::json(tally, asked_for));
        out.push(b'\n');
    } else {
        let _ = show::text(tally, asked_for, &look(), &mut out);
    }
    output::answer_at_leisure(out);
}

fn look() -> Look {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let terminal = io::stdout().is_terminal();
    let columns = set("COLUMNS").and_then(|columns| columns.to_str()?.parse().ok()).filter(|columns| *columns > 0);
    let of_terminal =
        || terminal_size::terminal_size().map(|(width, _)| usize::from(width.0)).filter(|width| *width > 0);
    Look {
        width: columns.or_else(of_terminal).unwrap_or(80),
        unicode: is_utf8(),
        // https://no-color.org
        colour: terminal && set("NO_COLOR").is_none() && set("TERM").is_some_and(|term| term != "dumb"),
        zone: TimeZone::try_system().unwrap_or(TimeZone::UTC),
    }
}

/// Whether the locale's characters are UTF-8: the first of these that is set decides (locale(7)).
fn is_utf8() -> bool {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default();
    let locale = locale.to_string_lossy().to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// Tells a terminal on standard error how many entries were read; erased when dropped.
struct Progress {
    lines: Arc<AtomicU64>,
    running: Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>,
}

impl Progress {
    fn start() -> Self {
        let lines = Arc::new(AtomicU64::new(0));
        let of_thread = Arc::clone(&lines);
        let (stop, stopped) = mpsc::channel();
        // Without a thread to draw, the report is the same.
        let draw = || thread::Builder::new().spawn(move || turn(&of_thread, &stopped)).ok();
        let running = io::stderr().is_terminal().then(draw).flatten().map(|thread| (stop, thread));
        Self { lines, running }
    }

    fn set(&self, lines: u64) {
        self.lines.store(lines, Ordering::Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            // A terminal that is stopped holds it up.
            let until = Instant::now() + output::PATIENCE;
            while !thread.is_finished() && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Draws until the other end of `stopped` is gone.
fn turn(lines: &AtomicU64, stopped: &mpsc::Receiver<()>) {
    let frames: &[&str] = if is_utf8() {
        &["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"]
    } else {
        &["|", "/", "-", "\\"]
    };
    let mut pause = QUIET;
    for frame in frames.iter().cycle() {
        if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            break;
        }
        pause = TICK;
        // Gone or not, standard error is not what the report is printed to.
        let _ = write!(io::stderr(), "\r\u{1b}[K{frame} {} entries read", show::group(lines.load(Ordering::Relaxed)));
    }
    if pause == TICK {
        let _ = write!(io::stderr(), "\r\u{1b}[K");
    }
}
