//! A whole daemon behind the gate: configuration file, `check`, `explain`, `report`, reload, idle exit, a restart that loses no
//! connection, records of the peers that were turned away. Its author implements one trait, [`Protocol`], and calls
//! [`main`].
//!
//! The gate itself is [`peergate`]. `echod` is the first such daemon; `examples/length_daemon.rs` a small one.

// The tests count allocations, and an allocator cannot be written without.
#![cfg_attr(not(test), forbid(unsafe_code))]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]
// They panic where writing fails.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod buffers;
mod check;
pub mod cli;
mod close;
pub mod config;
pub mod connection;
#[cfg(test)]
#[path = "../../tests/support/counting.rs"]
mod counting;
mod exit_code;
mod explain;
mod first_turn;
mod gate_thread;
mod handover;
mod in_force;
mod inherit;
mod loading;
mod mailbox;
pub mod memory;
pub mod moment;
mod names;
mod output;
mod pacing;
pub mod protocol;
mod reload;
pub mod report;
mod reservations;
pub mod rounds;
mod service;
mod stop;
pub mod terms;
#[cfg(test)]
mod testing;
mod timeouts;
pub mod worker;

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::FromArgMatches;
use peergate::activation::{self, Listener, Passed, Refused};
use peergate::return_memory;
use peergate::systemd::{Notifier, Request, Signals, Store, request_reload};

use crate::cli::{Choice, Cli, Command, Serve};
use crate::config::Config;
use crate::report::Program;

pub use crate::protocol::Protocol;

/// What is as large as this is freed for good: what a connection holds of long messages, above all.
const LARGE: usize = 32 * 1024;

/// How long a reload may take.
const RELOAD_PATIENCE: Duration = Duration::from_secs(60);

/// A message and the exit code that goes with it.
struct Failure(u8, String);

/// Runs the daemon: reads the command line, does what it says, gives the exit code. To be called first in `main`, before
/// there is a second thread.
pub fn main<P: Protocol>() -> ExitCode {
    output::begin(P::NAME);
    let parsed =
        cli::command::<P>().try_get_matches().and_then(|matches| Cli::<P::Options>::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        // Also what --help and --version print.
        Err(error) => return ExitCode::from(output::of_clap(error)),
    };
    let code = match cli.command {
        Some(Command::Check { config, own }) => check::run::<P>(&Choice { config, own }),
        Some(Command::Explain { asked, own }) => explain::run::<P>(&asked, own),
        Some(Command::Report { asked, own }) => report::run(&asked, &Program::of::<P>(&own)),
        Some(Command::Reload { pid }) => reload(pid),
        None => match serve::<P>(cli.serve) {
            Ok(()) => 0,
            Err(Failure(code, message)) => {
                output::complain(&message);
                code
            }
        },
    };
    ExitCode::from(code)
}

fn serve<P: Protocol>(options: Serve<P::Options>) -> Result<(), Failure> {
    return_memory(LARGE);
    let has_terminal = io::stderr().is_terminal();
    // Before anything else opens a descriptor or starts a thread.
    let passed = activation::adopt(handover::is_kept::<P>).map_err(|refused| match refused {
        Refused::System(_) => Failure(exit_code::OS_ERROR, refused.to_string()),
        _ => Failure(exit_code::PROTOCOL, refused.to_string()),
    })?;
    let Passed { mut listeners, kept, ignored, .. } = passed;
    let prepared = if listeners.is_empty() && options.listen.is_empty() {
        Err(Failure(exit_code::USAGE, nothing_to_listen_on::<P>(ignored)))
    } else {
        prepare::<P>(&options, &listeners)
    };
    let notifier = Notifier::from_env();
    if let Ok(Prepared::Stopped { is_final: false }) = prepared {
        inherit::leave_kept::<P>(!kept.is_empty(), &notifier);
        return Ok(());
    }
    in_force::raise_descriptor_limit();
    let store = Store::from_env();
    let inheritance = handover::take_back(kept, &store, |excess| {
        inherit::end_inherited(excess, &notifier, "the limit of descriptors is too low for them (LimitNOFILE=)");
    });
    let (config, signals, bound, requests) = match prepared {
        Ok(Prepared::ToServe { config, signals, bound, requests }) => (*config, signals, bound, requests),
        Ok(Prepared::Stopped { .. }) => {
            inherit::end_inherited(inheritance.connections, &notifier, "this one was told to stop before it served");
            return Ok(());
        }
        Err(failure) => {
            // Connections of an earlier process cannot go on here, but they are owed an orderly end. Where the
            // socket has failed at its restart, systemd starts this for that end alone.
            inherit::end_inherited(inheritance.connections, &notifier, "this one cannot serve them");
            return Err(failure);
        }
    };
    listeners.extend(bound);
    // Without a terminal the service would go on unseen, and with the path taken.
    let ends_at_hangup = has_terminal && (!options.listen.is_empty() || !notifier.is_present());
    let choice = Choice { config: options.config.map(absolute), own: options.own };
    let start =
        service::Start { listeners, inheritance, config, choice, store, notifier, signals, requests, ends_at_hangup };
    service::run(start).map_err(|error| Failure(exit_code::OS_ERROR, error))
}

/// What is ready before connections of an earlier process are taken back.
enum Prepared<P: Protocol> {
    ToServe {
        config: Box<Config<P>>,
        signals: Signals,
        bound: Vec<Listener>,
        requests: VecDeque<Request>,
    },
    /// A stop came first. If it is not final, a next process takes the connections back.
    Stopped {
        is_final: bool,
    },
}

fn nothing_to_listen_on<P: Protocol>(ignored: Option<String>) -> String {
    let (name, unit) = (P::NAME, report::unit_for_messages(P::UNIT));
    let message = format!(
        "nothing to listen on: either let systemd pass a socket (systemctl start {unit}.socket, or systemctl --user start \
         {unit}.socket), or name one ({name} --listen PATH)"
    );
    match ignored {
        Some(reason) => format!("{reason}\n{message}"),
        None => message,
    }
}

/// What can go wrong before any connection is served or taken back.
fn prepare<P: Protocol>(options: &Serve<P::Options>, passed: &[Listener]) -> Result<Prepared<P>, Failure> {
    // From here on a signal to stop is heard, and what we bound is removed.
    let signals =
        Signals::catch().map_err(|error| Failure(exit_code::OS_ERROR, format!("catching signals: {error}")))?;
    let mut requests = VecDeque::new();
    let choice = Choice { config: options.config.clone(), own: options.own.clone() };
    let mut config = match loading::load_at_start::<P>(&choice, &signals, &mut requests) {
        Ok(loading::Outcome::Loaded(config)) => config,
        Ok(loading::Outcome::Failed(error)) => return Err(Failure(error.exit_code(), error.to_string())),
        Ok(loading::Outcome::Stopped) => return Ok(Prepared::Stopped { is_final: signals.stop_is_final() }),
        Err(error) => return Err(Failure(exit_code::OS_ERROR, format!("waiting for the configuration: {error}"))),
    };
    config.source = config.source.map(absolute);
    let bound = bind_all(&options.listen)?;
    let sockets: Vec<_> = passed.iter().chain(&bound).map(|listener| Arc::clone(listener.address())).collect();
    config.may_serve(&sockets).map_err(|faults| Failure(exit_code::CONFIG, faults.to_string()))?;
    Ok(Prepared::ToServe { config, signals, bound, requests })
}

fn bind_all(paths: &[PathBuf]) -> Result<Vec<Listener>, Failure> {
    // Every path that cannot be bound is named, not only the first.
    let (bound, failed): (Vec<_>, Vec<_>) = paths.iter().map(activation::bind).partition(Result::is_ok);
    if failed.is_empty() {
        return Ok(bound.into_iter().flatten().collect());
    }
    let messages: Vec<_> = failed.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
    Err(Failure(exit_code::OS_ERROR, messages.join("\n")))
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
            exit_code::CONFIG
        }
        Err(error) => {
            output::complain(&format!("asking process {pid} to reload: {error}"));
            exit_code::OS_ERROR
        }
    }
}
