//! `echod report`: who was turned away, how often and why, from the journal. For main.
//!
//! journalctl(1) reads the journal for us, one line of JSON for each entry, and these are added up as they come. Which
//! entries are believed to be ours is told in [`entry`]. journalctl is asked for all journals that the caller may
//! read, not for those of --system or --user: in which file journald keeps an entry depends on its configuration
//! (SplitMode=, Storage=), the fields that it vouches for don't.

mod entry;
mod show;
mod tally;

use std::env;
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use peergate::audit::Event;
use peergate::peer::printable;

use self::entry::Scope;
use self::show::{Asked, Look};
use self::tally::Tally;
use crate::cli::Report;
use crate::output;

/// sysexits.h: something that is needed is not there.
const EX_UNAVAILABLE: u8 = 69;
/// sysexits.h: reading or writing failed.
const EX_IOERR: u8 = 74;

/// What journalctl says on standard error is kept up to so many bytes.
const MOST_COMPLAINTS: u64 = 16 << 10;
/// How long the journal is read before a terminal is told how far it has come.
const QUIET: Duration = Duration::from_millis(300);
/// How often it is told anew.
const TICK: Duration = Duration::from_millis(100);

/// Prints the report. Returns the status to exit with: 0, 69 where there is no journalctl, 74 where it failed; what was
/// read until then is printed all the same.
pub fn run(asked: &Report) -> u8 {
    let scope = scope(asked);
    let mut journalctl = match start(asked, scope) {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            output::complain("no journalctl(1) here, which reads the journal for us; it is part of systemd");
            return EX_UNAVAILABLE;
        }
        Err(error) => {
            output::complain(&format!("starting journalctl: {error}"));
            return EX_UNAVAILABLE;
        }
    };
    let mut tally = Tally::new(scope);
    let complaint = read(&mut journalctl, &mut tally).err();
    let lines = tally.lines();
    if complaint.is_none() || lines.read > 0 {
        print(asked, &tally, complaint.is_none());
    }
    match complaint {
        Some(complaint) => {
            output::complain(&complaint);
            EX_IOERR
        }
        None => {
            if lines.read == 0 && scope == Scope::System && !nix::unistd::getuid().is_root() {
                output::complain(
                    "hint: only root and the groups systemd-journal and adm may read the system's journal; \
                     --user reports on your own echod",
                );
            }
            0
        }
    }
}

/// Root asks about the system's echod, everybody else about their own, unless they say otherwise.
fn scope(asked: &Report) -> Scope {
    let me = nix::unistd::getuid();
    if asked.system || (me.is_root() && !asked.user) { Scope::System } else { Scope::User(me.as_raw()) }
}

fn start(asked: &Report, scope: Scope) -> io::Result<Child> {
    let mut command = Command::new("journalctl");
    command.args(["--output=json", "--no-pager", "--quiet"]);
    command.arg(format!("--output-fields={}", entry::FIELDS));
    for (option, value) in [("since", &asked.since), ("until", &asked.until)] {
        if let Some(value) = value {
            command.arg(format!("--{option}={value}"));
        }
    }
    command.arg("SYSLOG_IDENTIFIER=echod");
    if let Scope::User(uid) = scope {
        command.arg(format!("_UID={uid}"));
    }
    let ids = [Event::Denied, Event::Refused, Event::Summary, Event::Revoked].into_iter().filter_map(Event::message_id);
    command.args(ids.map(|id| format!("MESSAGE_ID={id}")));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
}

/// Adds up what journalctl prints. What it, or reading, complains of is the error.
fn read(journalctl: &mut Child, tally: &mut Tally) -> Result<(), String> {
    let output = journalctl.stdout.take().ok_or("journalctl: no output")?;
    let errors = journalctl.stderr.take();
    // On a thread of its own, so that neither pipe can fill up while we wait for the other.
    let complaints = thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut errors) = errors {
            let _ = errors.by_ref().take(MOST_COMPLAINTS).read_to_end(&mut text);
            let _ = io::copy(&mut errors, &mut io::sink());
        }
        text
    });
    let progress = Progress::start();
    let outcome = tally.read(BufReader::with_capacity(64 << 10, output), |lines| progress.set(lines));
    drop(progress);
    if outcome.is_err() {
        let _ = journalctl.kill();
    }
    let status = journalctl.wait();
    let complaints = complaints.join().unwrap_or_default();
    let said: Vec<_> = String::from_utf8_lossy(&complaints).lines().map(printable).collect();
    let failed = match (outcome, status) {
        (Err(error), _) => Some(format!("reading from journalctl: {error}")),
        (_, Err(error)) => Some(format!("waiting for journalctl: {error}")),
        (_, Ok(status)) if !status.success() => Some(format!("journalctl failed ({status})")),
        _ => None,
    };
    match failed {
        Some(failed) if said.is_empty() => Err(failed),
        Some(failed) => Err(format!("{failed}: {}", said.join("; "))),
        None => {
            for line in said {
                output::complain(&format!("journalctl: {line}"));
            }
            Ok(())
        }
    }
}

fn print(asked: &Report, tally: &Tally, complete: bool) {
    let mut out = Vec::new();
    // Writing to memory does not fail.
    if asked.json {
        let asked = Asked { since: asked.since.as_deref(), until: asked.until.as_deref(), complete };
        let _ = serde_json::to_writer_pretty(&mut out, &show::json(tally, asked));
        out.push(b'\n');
    } else {
        let _ = show::text(tally, &look(), &mut out);
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
        let running = io::stderr().is_terminal().then(|| {
            let (stop, stopped) = mpsc::channel();
            let lines = Arc::clone(&lines);
            (stop, thread::spawn(move || turn(&lines, &stopped)))
        });
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
