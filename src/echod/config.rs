//! The program's configuration: which file, what it may say besides the policy, and what holds where it is silent.
//! For main, and for whoever is handed a part of it. Imports the library; knows nothing of sockets.
//!
//! One file is the whole configuration. A file that is there but cannot be used is refused, never passed over: the
//! defaults might admit someone whom the file denies.

pub mod values;

use std::ffi::OsString;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use peergate::ids::Uid;
use peergate::policy::{Name, Policy};
use peergate::policy_file::{self, Fault, Faults, Loaded, Names, ReadError, Source, SystemNames};
use serde::Deserialize;

/// The file's name below each directory it may be in.
const NAME: &str = "echod.toml";

/// What is in force.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who may in, and on which terms.
    pub policy: Arc<Policy<Terms>>,
    /// The table `[limits]`.
    pub limits: Limits,
    /// The table `[audit]`.
    pub audit: Audit,
    /// The table `[service]`.
    pub service: Service,
    /// The file it was read from; `None` where there is none.
    pub source: Option<PathBuf>,
    /// What is hardly meant, but no reason to refuse.
    pub warnings: Vec<Fault>,
    /// The names in the policy for which the user database gave no answer.
    pub unanswered: Vec<Name>,
}

/// What an allow rule may say in place of `[limits]`. `None`: the general limit holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Terms {
    /// Connections at once of one user.
    #[serde(deserialize_with = "values::connections_of_one")]
    pub connections_per_user: Option<u32>,
    /// The longest line in bytes, its LF included.
    #[serde(deserialize_with = "values::some_size")]
    pub line_length: Option<usize>,
    /// How long a connection may say nothing; `Some(None)`: for ever.
    #[serde(deserialize_with = "values::some_span_or_off")]
    pub idle_timeout: Option<Option<Duration>>,
}

/// What one connection, one user, and all of them may take.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Admitted connections at once.
    #[serde(deserialize_with = "values::connections")]
    pub connections: usize,
    /// Admitted connections at once of one user.
    #[serde(deserialize_with = "values::connections")]
    pub connections_per_user: usize,
    /// The longest line in bytes, its LF included.
    #[serde(deserialize_with = "values::size")]
    pub line_length: usize,
    /// How long a connection may say nothing; `None`: for ever.
    #[serde(deserialize_with = "values::span_or_off")]
    pub idle_timeout: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, connections_per_user: 64, line_length: 64 << 10, idle_timeout: None }
    }
}

/// What is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Audit {
    /// Which events.
    #[serde(deserialize_with = "values::record")]
    pub record: Record,
    /// Records in full for each user, reason and interval; the rest is counted.
    #[serde(deserialize_with = "values::burst")]
    pub burst: u32,
    /// The interval of `burst`; above zero.
    #[serde(deserialize_with = "values::span")]
    pub interval: Duration,
}

impl Default for Audit {
    fn default() -> Self {
        Self { record: Record::Denials, burst: 10, interval: Duration::from_secs(10) }
    }
}

/// Which events are recorded; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Record {
    /// Who was turned away.
    Denials,
    /// Also who was admitted, and what became of the connection.
    Connections,
    /// Also each line: its length, never its content.
    Lines,
}

/// How the service works.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Service {
    /// How many worker threads; `None`: one for every two processors that we may use.
    #[serde(deserialize_with = "values::workers")]
    pub workers: Option<NonZeroUsize>,
    /// How long to look again before sleeping; `None`: not at all.
    #[serde(deserialize_with = "values::busy_poll")]
    pub busy_poll: Option<Duration>,
    /// How often to make sure that the sender is the user who was judged.
    #[serde(deserialize_with = "values::verify")]
    pub verify: Verify,
    /// How long without a connection until we exit, for systemd to start us again; `None`: never.
    #[serde(deserialize_with = "values::span_or_off")]
    pub idle_exit: Option<Duration>,
}

impl Default for Service {
    fn default() -> Self {
        let busy_poll = Some(Duration::from_micros(50));
        Self { workers: None, busy_poll, verify: Verify::Connection, idle_exit: None }
    }
}

/// How often to make sure that the sender is the user who was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Once, when it connects.
    Connection,
    /// For each piece of data, by the credentials that the kernel attaches to it.
    Line,
}

/// The tables besides the policy.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Tables {
    limits: Limits,
    audit: Audit,
    service: Service,
}

/// Where the configuration is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// The file that --config names; it must be there.
    Named(PathBuf),
    /// The one default file; it need not be there.
    Default(PathBuf),
    /// Nowhere: neither the environment nor the user database tells a home directory.
    Nowhere,
    /// The user database, which would tell the home directory, does not answer.
    Unknown(Errno),
}

/// Why there is no configuration.
#[derive(Debug)]
pub enum LoadError {
    /// The file that --config names is missing or cannot be read.
    NoInput {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: ReadError,
    },
    /// The file is there and is refused.
    Refused(Faults),
}

impl LoadError {
    /// The status to exit with: EX_NOINPUT or EX_CONFIG of sysexits.h.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoInput { .. } => 66,
            Self::Refused(_) => 78,
        }
    }
}

/// One line for each fault.
impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoInput { path, error } => {
                write!(f, "{}: {error}; expected a readable file, since --config names it", path.display())
            }
            Self::Refused(faults) => faults.fmt(f),
        }
    }
}

impl std::error::Error for LoadError {}

impl Config {
    /// The file to read: the one that the command line names, else `echod.toml` in systemd's
    /// `$CONFIGURATION_DIRECTORY`, else the system's (for root) or the user's own.
    pub fn locate(cli: Option<&Path>) -> Location {
        locate(cli, me(), &|name| std::env::var_os(name))
    }

    /// Reads the configuration, or takes the defaults where there is no file.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load(cli: Option<&Path>) -> Result<Self, LoadError> {
        load(Self::locate(cli), me(), &SystemNames)
    }

    /// What holds where there is no file: the owner alone is admitted.
    pub fn without_file(me: Uid) -> Self {
        Self {
            policy: Arc::new(Policy::owner_only(me)),
            limits: Limits::default(),
            audit: Audit::default(),
            service: Service::default(),
            source: None,
            warnings: Vec::new(),
            unanswered: Vec::new(),
        }
    }

    /// Makes a configuration of a file's text. `me` is whom "self" stands for.
    ///
    /// # Errors
    /// Everything that is wrong with the file.
    pub fn from_source(source: &Source, me: Uid, names: &dyn Names) -> Result<Self, Faults> {
        let Loaded { policy, application, warnings, unanswered, .. } =
            policy_file::parse::<Terms, Tables>(source, me, names)?;
        let Tables { limits, audit, service } = application;
        let source = Some(source.path().to_path_buf());
        Ok(Self { policy: Arc::new(policy), limits, audit, service, source, warnings, unanswered })
    }
}

/// Whom "self" stands for: the user whose rights this process uses.
fn me() -> Uid {
    Uid::new(nix::unistd::geteuid().as_raw())
}

fn locate(cli: Option<&Path>, me: Uid, variable: &dyn Fn(&str) -> Option<OsString>) -> Location {
    if let Some(named) = cli {
        return Location::Named(named.to_path_buf());
    }
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    // ConfigurationDirectory= may list several; ours is the first.
    let by_systemd =
        variable("CONFIGURATION_DIRECTORY").and_then(|list| std::env::split_paths(&list).find_map(absolute));
    if let Some(directory) = by_systemd {
        return Location::Default(directory.join(NAME));
    }
    if me.raw() == 0 {
        return Location::Default(Path::new("/etc/echod").join(NAME));
    }
    // A relative path is invalid and to be ignored (XDG Base Directory Specification).
    let of_users = variable("XDG_CONFIG_HOME").map(PathBuf::from).and_then(absolute).or_else(|| {
        let home = variable("HOME").map(PathBuf::from).and_then(absolute);
        home.map(|home| home.join(".config"))
    });
    let directory = match of_users {
        Some(directory) => directory,
        None => match home_of(me) {
            Ok(Some(home)) => home.join(".config"),
            Ok(None) => return Location::Nowhere,
            Err(error) => return Location::Unknown(error),
        },
    };
    Location::Default(directory.join("echod").join(NAME))
}

/// The home directory as the user database has it.
fn home_of(me: Uid) -> nix::Result<Option<PathBuf>> {
    let unknown = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let account = SystemNames.account_of(me).map_err(unknown)?;
    Ok(account.map(|account| account.home).filter(|directory| directory.is_absolute()))
}

fn load(location: Location, me: Uid, names: &dyn Names) -> Result<Config, LoadError> {
    let (path, named) = match location {
        Location::Named(path) => (path, true),
        Location::Default(path) => (path, false),
        Location::Nowhere => return Ok(Config::without_file(me)),
        Location::Unknown(error) => {
            let message = format!(
                "cannot be looked for: the home directory of uid {me} is unknown ({error}); expected an \
                                   answer from the user database, or HOME"
            );
            return Err(LoadError::Refused(Faults(vec![Fault::of_file(NAME, message)])));
        }
    };
    match Source::read(&path, me) {
        Ok(source) => Config::from_source(&source, me, names).map_err(LoadError::Refused),
        Err(ReadError::Missing) if !named => Ok(Config::without_file(me)),
        Err(ReadError::Refused(fault)) => Err(LoadError::Refused(Faults(vec![fault]))),
        Err(error) if named => Err(LoadError::NoInput { path, error }),
        Err(error) => {
            let message = format!("cannot be read ({error}); expected a file that uid {me} may read, or none");
            Err(LoadError::Refused(Faults(vec![Fault::of_file(&path, message)])))
        }
    }
}

#[cfg(test)]
mod tests;
