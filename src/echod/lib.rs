//! echod: a line echo that answers only to the local users its policy names.
//!
//! Who is served, and how, is in [`serve`]; this file tells the ways to start apart and turns what comes of
//! them into exit codes (sysexits.h).

// The tests count allocations, and an allocator cannot be written without.
#![cfg_attr(not(test), forbid(unsafe_code))]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]
// They panic where writing fails.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod check;
pub mod cli;
pub mod config;
mod connection;
#[cfg(test)]
#[path = "../../tests/support/counting.rs"]
mod counting;
mod exit;
mod explain;
mod gate_thread;
mod handover;
pub mod line;
mod mailbox;
mod names;
mod output;
mod pacing;
pub mod report;
mod serve;
mod starting;
mod threshold;
mod vouching;
mod worker;

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use peergate::activation::{self, Listener, Passed, Refused};
use peergate::return_memory;
use peergate::systemd::{Notifier, Request, Signals, Store, request_reload};

use crate::cli::{Cli, Command, Serve};
use crate::config::Config;

/// SYSLOG_IDENTIFIER of every record, and the first word of every message.
const IDENTIFIER: &str = "echod";

/// sysexits.h: the command line makes no sense.
const EX_USAGE: u8 = 64;
/// sysexits.h: the system refused.
const EX_OSERR: u8 = 71;
/// sysexits.h: what the other side, systemd, did is against the protocol.
const EX_PROTOCOL: u8 = 76;
/// sysexits.h: the configuration is faulty.
const EX_CONFIG: u8 = 78;

/// Capacity of the descriptor store where systemd does not tell it ($FDSTORE, since 254); our unit sets it.
const STORE_FALLBACK: &str = "ECHOD_FDSTORE_MAX";

/// What is as large as this is freed for good: what a connection holds of long lines, above all.
const LARGE: usize = 32 * 1024;

/// How long a reload may take.
const RELOAD_PATIENCE: Duration = Duration::from_secs(60);

/// A message and the exit code that goes with it.
struct Failure(u8, String);

/// Runs the program: reads the command line, does what it says, gives the exit code.
pub fn main() -> ExitCode {
    output::outlive_limits();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Also what --help and --version print.
        Err(error) => return ExitCode::from(output::of_clap(error)),
    };
    let code = match cli.command {
        Some(Command::Check { config }) => check::run(config.as_deref()),
        Some(Command::Explain(explain)) => explain::run(&explain),
        Some(Command::Report(asked)) => report::run(&asked),
        Some(Command::Reload { pid }) => reload(pid),
        None => match serve(cli.serve) {
            Ok(()) => 0,
            Err(Failure(code, message)) => {
                output::complain(&message);
                code
            }
        },
    };
    ExitCode::from(code)
}

fn serve(options: Serve) -> Result<(), Failure> {
    return_memory(LARGE);
    let has_terminal = io::stderr().is_terminal();
    // Before anything else opens a descriptor or starts a thread.
    let passed = activation::adopt(handover::is_kept).map_err(|refused| match refused {
        Refused::System(_) => Failure(EX_OSERR, refused.to_string()),
        _ => Failure(EX_PROTOCOL, refused.to_string()),
    })?;
    let Passed { mut listeners, kept, ignored, .. } = passed;
    let prepared = if listeners.is_empty() && options.listen.is_empty() {
        Err(Failure(EX_USAGE, nothing_to_listen_on(ignored)))
    } else {
        prepare(&options)
    };
    let notifier = Notifier::from_env();
    if let Ok(Prepared::Stopped { is_final: false }) = prepared {
        serve::leave_kept(handover::count(&kept), &notifier);
        return Ok(());
    }
    let store = Store::from_env(STORE_FALLBACK);
    let inheritance = handover::take_back(kept, &store);
    let (config, signals, bound, requests) = match prepared {
        Ok(Prepared::ToServe { config, signals, bound, requests }) => (*config, signals, bound, requests),
        Ok(Prepared::Stopped { .. }) => {
            serve::end_inherited(inheritance, &notifier, "this one was told to stop before it served");
            return Ok(());
        }
        Err(failure) => {
            // Connections of an earlier process cannot go on here, but they are owed an orderly end. Without a socket, systemd
            // starts this for that end alone: echo-reopen.service.
            serve::end_inherited(inheritance, &notifier, "this one cannot serve them");
            return Err(failure);
        }
    };
    listeners.extend(bound);
    // Without a terminal the service would go on unseen, and with the path taken.
    let ends_at_hangup = has_terminal && (!options.listen.is_empty() || !notifier.is_present());
    let config_path = options.config.map(absolute);
    let start = serve::Start {
        listeners,
        inheritance,
        config,
        config_path,
        store,
        notifier,
        signals,
        requests,
        ends_at_hangup,
    };
    serve::run(start).map_err(|error| Failure(serve::FAILURE, error))
}

/// What is ready before connections of an earlier process are taken back.
enum Prepared {
    ToServe {
        config: Box<Config>,
        signals: Signals,
        bound: Vec<Listener>,
        requests: VecDeque<Request>,
    },
    /// A stop came first. If it is not final, a next process takes the connections back.
    Stopped {
        is_final: bool,
    },
}

fn nothing_to_listen_on(ignored: Option<String>) -> String {
    let message = "nothing to listen on: either let systemd pass a socket (systemctl start echo.socket, or systemctl \
                   --user start echo.socket), or name one (echod --listen PATH)";
    match ignored {
        Some(reason) => format!("{reason}\n{message}"),
        None => message.to_owned(),
    }
}

/// What can go wrong before anybody is served, connections of an earlier process included.
fn prepare(options: &Serve) -> Result<Prepared, Failure> {
    // From here on a signal to stop is heard, and what we bound is removed.
    let signals = Signals::catch().map_err(|error| Failure(EX_OSERR, format!("catching signals: {error}")))?;
    let mut requests = VecDeque::new();
    let mut config = match starting::load(options.config.as_deref(), &signals, &mut requests) {
        Ok(starting::Outcome::Loaded(config)) => config,
        Ok(starting::Outcome::Failed(error)) => return Err(Failure(error.exit_code(), error.to_string())),
        Ok(starting::Outcome::Stopped) => return Ok(Prepared::Stopped { is_final: signals.stop_is_final() }),
        Err(error) => return Err(Failure(EX_OSERR, format!("waiting for the configuration: {error}"))),
    };
    config.source = config.source.map(absolute);
    let bound = bind_all(&options.listen)?;
    Ok(Prepared::ToServe { config, signals, bound, requests })
}

fn bind_all(paths: &[PathBuf]) -> Result<Vec<Listener>, Failure> {
    // Every path that cannot be bound is named, not only the first.
    let (bound, failed): (Vec<_>, Vec<_>) = paths.iter().map(|path| activation::bind(path)).partition(Result::is_ok);
    if failed.is_empty() {
        return Ok(bound.into_iter().flatten().collect());
    }
    let messages: Vec<_> = failed.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
    Err(Failure(EX_OSERR, messages.join("\n")))
}

/// A reload must find the file that the start found.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(Path::new(&path)).unwrap_or(path)
}

fn reload(pid: i32) -> u8 {
    match request_reload(pid, RELOAD_PATIENCE) {
        Ok(true) => 0,
        Ok(false) => {
            output::complain(&format!(
                "process {pid} refused its new configuration; the old one stays (see the journal)"
            ));
            EX_CONFIG
        }
        Err(error) => {
            output::complain(&format!("asking process {pid} to reload: {error}"));
            EX_OSERR
        }
    }
}
