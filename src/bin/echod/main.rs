//! echod: a line echo that answers only to the local users its policy names.
//!
//! Who is served, and how, is in [`serve`]; this file tells the ways to start apart and turns what comes of
//! them into exit codes (sysexits.h).

// The tests count allocations, and an allocator cannot be written without.
#![cfg_attr(not(test), forbid(unsafe_code))]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod check;
mod cli;
mod config;
mod connection;
#[cfg(test)]
#[path = "../../../tests/support/counting.rs"]
mod counting;
mod exit;
mod explain;
mod handover;
mod line;
mod mailbox;
mod pacing;
mod report;
mod serve;
mod threshold;
mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use peergate::activation::{self, Listener, Passed, Refused};
use peergate::service::{Notifier, Signals, Store, request_reload, return_memory};

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

fn main() -> ExitCode {
    let cli = Cli::parse();
    let code = match cli.command {
        Some(Command::Check { config }) => check::run(config.as_deref()),
        Some(Command::Explain(explain)) => explain::run(&explain),
        Some(Command::Report(asked)) => report::run(&asked),
        Some(Command::Reload { pid }) => reload(pid),
        None => match serve(cli.serve) {
            Ok(()) => 0,
            Err(Failure(code, message)) => {
                for line in message.lines() {
                    eprintln!("{IDENTIFIER}: {line}");
                }
                code
            }
        },
    };
    ExitCode::from(code)
}

fn serve(options: Serve) -> Result<(), Failure> {
    return_memory(LARGE);
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
    let store = Store::from_env(STORE_FALLBACK);
    let inheritance = handover::take_back(kept, &store);
    let notifier = Notifier::from_env();
    let (config, signals, bound) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => {
            // Connections of an earlier process cannot go on here, but they are owed an orderly end. Without a socket, systemd
            // starts this for that end alone: echo-reopen.service.
            serve::end_inherited(inheritance, &notifier);
            return Err(failure);
        }
    };
    listeners.extend(bound);
    let config_path = options.config.map(absolute);
    let start = serve::Start { listeners, inheritance, config, config_path, store, notifier, signals };
    serve::run(start).map_err(|error| Failure(serve::FAILURE, error))
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
fn prepare(options: &Serve) -> Result<(Config, Signals, Vec<Listener>), Failure> {
    let mut config =
        Config::load(options.config.as_deref()).map_err(|error| Failure(error.exit_code(), error.to_string()))?;
    config.source = config.source.map(absolute);
    // From here on a signal to stop is heard, and what we bound is removed.
    let signals = Signals::catch().map_err(|error| Failure(EX_OSERR, format!("catching signals: {error}")))?;
    let bound = bind_all(&options.listen)?;
    Ok((config, signals, bound))
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
            eprintln!("{IDENTIFIER}: process {pid} refused its new configuration; the old one stays (see the journal)");
            EX_CONFIG
        }
        Err(error) => {
            eprintln!("{IDENTIFIER}: asking process {pid} to reload: {error}");
            EX_OSERR
        }
    }
}
