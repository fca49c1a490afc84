//! A whole service behind the gate: sockets, policy and its reload, limits, record, readiness, watchdog, stop.
//!
//! ```no_run
//! use std::io::{BufRead, Write};
//!
//! use peergate::{Error, Service};
//!
//! fn main() -> Result<(), Error> {
//!     Service::<()>::from_systemd("shout").policy_file("/etc/shout.toml").serve_threads(|connection| {
//!         let mut line = String::new();
//!         while connection.read_line(&mut line)? > 0 {
//!             connection.write_all(line.to_uppercase().as_bytes())?;
//!             line.clear();
//!         }
//!         Ok(())
//!     })
//! }
//! ```
//!
//! With the feature `tokio` the same service runs on tokio's runtime: `Service::block_on`, and the module `tokio`.
//!
//! # What it does
//!
//! - SIGTERM and SIGINT stop it. SIGHUP or [`request_reload`](crate::systemd::request_reload) reads the policy's file again:
//!   for the next connection and for the live ones. What the new policy denies is revoked. A file with a fault changes
//!   nothing; the fault is recorded.
//! - The service manager is told: READY=1, RELOADING=1, STOPPING=1, WATCHDOG=1 while gate, journal and this service's own
//!   thread make progress (Type=notify or notify-reload, WatchdogSec=).
//! - At a stop no connection is accepted any more: a client that connects waits in the backlog for the next process. Live
//!   connections read their end; what does not end within five seconds is cut off.
//! - A panic of the service's code ends one connection, and is recorded.
//!
//! # Its units
//!
//! systemd listens, and starts the service with the first connection. `systemctl reload` is the SIGHUP:
//!
//! ```ini
//! # /etc/systemd/system/shout.socket
//! [Socket]
//! ListenStream=/run/shout.sock
//! # Every user may connect: the policy decides, and each denial is recorded.
//! SocketMode=0666
//! [Install]
//! WantedBy=sockets.target
//! ```
//!
//! ```ini
//! # /etc/systemd/system/shout.service
//! [Service]
//! Type=notify
//! ExecStart=/usr/local/libexec/shout
//! ExecReload=/bin/kill -HUP $MAINPID
//! WatchdogSec=10s
//! DynamicUser=yes
//! ```
//!
//! `systemctl enable --now shout.socket` begins it, `journalctl -t shout` shows its records. The policy's file is to be
//! readable for the service's user, and writable for root or that user only.

mod attend;
mod core;
mod inline;
#[cfg(feature = "restart")]
mod restart;
mod threads;

use std::error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::activation::{self, Listener, Passed};
use crate::audit::{Audit, Record, Settings, Severity};
use crate::gate::{Replies, Setup};
use crate::ids::Uid;
use crate::journal::Writer;
use crate::peer::unmapped_ids;
use crate::permits::{Limits, Terms};
use crate::policy::Policy;
use crate::policy_file::{self, Fault, FromTable, Loaded, SystemNames};
use crate::systemd::{Notifier, Signals, Store};

pub(crate) use self::attend::Attendant;
pub(crate) use self::core::Core;
#[cfg(feature = "restart")]
pub use self::restart::HandOver;
#[cfg(all(feature = "restart", feature = "tokio"))]
pub(crate) use self::restart::{Inheritance, Leaving, Start, finish, leave};

/// Reads the policy, at the start and at each reload.
type Source<T> = Arc<dyn Fn() -> Result<Read<T>, String> + Send + Sync>;

/// A policy, and what is to be said about it.
pub(crate) struct Read<T> {
    policy: Arc<Policy<T>>,
    warnings: Vec<String>,
}

impl<T> Read<T> {
    fn new(policy: Policy<T>, warnings: &[Fault]) -> Self {
        Self { policy: Arc::new(policy), warnings: warnings.iter().map(ToString::to_string).collect() }
    }
}

impl<T> Clone for Read<T> {
    fn clone(&self) -> Self {
        Self { policy: Arc::clone(&self.policy), warnings: self.warnings.clone() }
    }
}

/// For rules that were made by code: deny rules and the limit per user know subordinate ids and the members of groups.
fn with_accounts<T>(policy: Policy<T>) -> Result<Read<T>, String> {
    let (policy, warnings) = policy_file::with_accounts(policy, &SystemNames).map_err(|faults| faults.to_string())?;
    Ok(Read::new(policy, &warnings))
}

/// How a service is made up. `T` is the type of the rules' terms; `()` where a rule only admits.
///
/// Make it at the beginning of `main`, before there is a second thread: it reads the environment and blocks signals.
/// A signal that the service waits for is blocked in every thread that starts later, so that `tokio::signal` and signal
/// handlers do not see SIGTERM, SIGINT, SIGHUP and SIGCONT any more.
#[must_use = "a service does nothing until it serves"]
pub struct Service<T> {
    name: String,
    passed: Result<Passed, Error>,
    signals: io::Result<Signals>,
    source: Option<Source<T>>,
    replies: Replies,
    limits: Limits,
    settings: Settings,
    idle_exit: Option<Duration>,
}

impl<T: Terms> Service<T> {
    /// A service on the sockets that the service manager passed. `name` becomes SYSLOG_IDENTIFIER, and names what is left
    /// to the next process.
    pub fn from_systemd(name: &str) -> Self {
        let adopted =
            activation::adopt(|stored| stored == name).map_err(|error| Error::new("the passed sockets", error));
        let passed = adopted.and_then(|passed| match passed.ignored {
            Some(why) => Err(Error(why)),
            None => Ok(passed),
        });
        Self {
            name: name.to_owned(),
            passed,
            signals: Signals::catch(),
            source: None,
            replies: Replies::default(),
            limits: Limits::default(),
            settings: Settings::default(),
            idle_exit: None,
        }
    }

    /// Serves on this socket too: for a service without systemd ([`activation::bind`]).
    pub fn listener(mut self, listener: Listener) -> Self {
        if let Ok(passed) = &mut self.passed {
            passed.listeners.push(listener);
        }
        self
    }

    /// Decides by this policy. A reload changes nothing.
    pub fn policy(self, policy: Policy<T>) -> Self {
        let read = with_accounts(policy);
        self.source(move || read.clone())
    }

    /// Decides by the policy in this file ([`policy_file`]), and reads it again at each reload. Warnings are recorded, and
    /// so is a name that the user database does not know. `self` is the user that the service runs as.
    /// Only root or the service's user may own the file, and no other user may write to it.
    pub fn policy_file(self, path: impl AsRef<Path>) -> Self
    where
        T: FromTable,
    {
        let path: PathBuf = path.as_ref().to_owned();
        self.source(move || {
            let Loaded { policy, warnings, .. } =
                policy_file::load::<T, ()>(&path, Uid::effective()).map_err(|faults| faults.to_string())?;
            Ok(Read::new(policy, &warnings))
        })
    }

    /// Decides by the policy that `read` gives, at the start and again at each reload, on a thread that may wait. For a
    /// service with tables of its own in the file ([`policy_file::load`]).
    pub fn policy_from<E: fmt::Display>(self, read: impl Fn() -> Result<Policy<T>, E> + Send + Sync + 'static) -> Self {
        self.source(move || read().map_err(|error| error.to_string()).and_then(with_accounts))
    }

    fn source(mut self, source: impl Fn() -> Result<Read<T>, String> + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// What a peer gets that is turned away or revoked.
    pub fn replies(mut self, replies: Replies) -> Self {
        self.replies = replies;
        self
    }

    /// How many connections are admitted at once.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// How much is recorded.
    pub fn record(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Ends the service when there has been no connection for so long, or up to twice as long. systemd starts it again at
    /// the next connection.
    pub fn idle_exit(mut self, after: Duration) -> Self {
        self.idle_exit = Some(after);
        self
    }

    /// Opens the gate: from here on connections can be accepted.
    pub(crate) fn open(self) -> Result<Opened<T>, Error> {
        let Self { name, passed, signals, source, replies, limits, settings, idle_exit } = self;
        let passed = passed?;
        let signals = signals.map_err(|error| Error::new("signals", error))?;
        let source = source.ok_or_else(|| Error("no policy; expected a call of policy or policy_file".to_owned()))?;
        let read = source().map_err(Error)?;
        let opening = |error| Error::new("opening the gate", error);
        let audit = Audit::new(settings);
        let mut setup = Setup::new(passed.listeners, read.policy, audit.clone()).map_err(opening)?;
        (setup.config.replies, setup.config.limits) = (replies, limits);
        let permits = setup.permits.clone();
        let journal =
            Writer::start(&audit, &name).map_err(|error| Error::new("starting the journal's thread", error))?;
        if let Some(partial) = unmapped_ids() {
            audit.write(Record::note(Severity::Warning, partial));
        }
        read.warnings.into_iter().for_each(|text| audit.write(Record::note(Severity::Warning, text)));
        let notifier = Notifier::from_env();
        let store = Store::from_env();
        let plan = Plan { name, source, idle_exit, notifier, signals, store, kept: passed.kept };
        Ok(Opened { setup, permits, audit, journal, plan })
    }
}

/// What is known once the service is opened.
pub(crate) struct Opened<T> {
    pub(crate) setup: Setup<T>,
    pub(crate) permits: crate::permits::Permits,
    pub(crate) audit: Audit,
    pub(crate) journal: Writer,
    pub(crate) plan: Plan<T>,
}

/// What the thread needs that attends to the service manager.
pub(crate) struct Plan<T> {
    name: String,
    source: Source<T>,
    idle_exit: Option<Duration>,
    notifier: Notifier,
    signals: Signals,
    store: Store,
    kept: Vec<(String, std::os::fd::OwnedFd)>,
}

impl<T> fmt::Debug for Service<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why a service could not start, as a sentence. `main` may return it: it is shown as that sentence.
pub struct Error(String);

impl Error {
    pub(crate) fn new(what: &str, error: impl fmt::Display) -> Self {
        Self(format!("{what}: {error}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl error::Error for Error {}
