//! A daemon's configuration: which file, what it may say besides the policy, and what holds where it is silent.
//!
//! One file is the whole configuration. A file that is there but cannot be used is refused, never passed over: the
//! defaults might admit a peer that the file denies.

pub mod sections;
pub mod values;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use peergate::audit;
use peergate::ids::Uid;
use peergate::policy::{Name, Policy};
use peergate::policy_file::{self, Fault, Faults, Loaded, Names, ReadError, Source, SystemNames};

use self::sections::{Audit, Sections};
use crate::cli::{Choice, Options as _};
use crate::exit_code;
use crate::protocol::Protocol;
use crate::terms::Terms;

pub use self::sections::{Limits, Service, Verify};

/// What is in force.
#[derive(Debug)]
pub struct Config<P: Protocol> {
    /// Which peers are admitted, and on which terms.
    pub policy: Arc<Policy<Terms<P::Terms>>>,
    /// The table `[limits]`.
    pub limits: Limits,
    /// The table `[audit]`.
    pub audit: audit::Settings,
    /// The table `[service]`.
    pub service: Service,
    /// The protocol's own.
    pub settings: P::Settings,
    /// The file it was read from; `None` where there is none.
    pub source: Option<PathBuf>,
    /// What is hardly meant, but no reason to refuse.
    pub warnings: Vec<Fault>,
    /// The names in the policy for which the user database gave no answer.
    pub unanswered: Vec<Name>,
}

/// The name of the configuration file in its directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileName {
    /// It need not be there.
    Optional(String),
    /// It must be there.
    Required(String),
    /// There is none.
    None,
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
            Self::NoInput { .. } => exit_code::NO_INPUT,
            Self::Refused(_) => exit_code::CONFIG,
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

impl<P: Protocol> Config<P> {
    /// The file to read: the one that the command line names, else `NAME.toml` in systemd's
    /// `$CONFIGURATION_DIRECTORY`, else the system's (for root) or the user's own.
    pub fn locate(choice: &Choice<P::Options>) -> Location {
        let variable = |name: &str| std::env::var_os(name);
        if let Some(named) = &choice.config {
            return Location::Named(named.clone());
        }
        match choice.own.file(P::NAME) {
            FileName::None => Location::Nowhere,
            FileName::Optional(file) => locate(P::NAME, &file, Uid::effective(), &variable),
            FileName::Required(file) => match locate(P::NAME, &file, Uid::effective(), &variable) {
                Location::Default(path) => Location::Named(path),
                other => other,
            },
        }
    }

    /// Reads the configuration, or takes the defaults where there is no file.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load(choice: &Choice<P::Options>) -> Result<Self, LoadError> {
        let mut config = load::<P>(Self::locate(choice), Uid::effective(), &SystemNames)?;
        P::set_options(&mut config.settings, &choice.own);
        match config.as_faults(P::faults(&config)) {
            Some(faults) => Err(LoadError::Refused(faults)),
            None => Ok(config),
        }
    }

    /// What keeps this process from serving these sockets.
    ///
    /// # Errors
    /// Everything that does.
    pub fn may_serve(&self, sockets: &[Arc<str>]) -> Result<(), Faults> {
        self.as_faults(P::obstacles(self, sockets)).map_or(Ok(()), Err)
    }

    fn as_faults(&self, messages: Vec<String>) -> Option<Faults> {
        let place = self.source.clone().unwrap_or_else(|| "command line".into());
        let faults: Vec<_> = messages.into_iter().map(|message| Fault::of_file(&place, message)).collect();
        (!faults.is_empty()).then_some(Faults(faults))
    }

    /// What holds where there is no file: the owner alone is admitted.
    pub fn without_file(me: Uid) -> Self {
        Self {
            policy: Arc::new(Policy::owner_only(me)),
            limits: Limits::default(),
            audit: audit::Settings::default(),
            service: Service::default(),
            settings: P::Settings::default(),
            source: None,
            warnings: Vec::new(),
            unanswered: Vec::new(),
        }
    }

    /// Makes a configuration of a file's text. "self" stands for `me`.
    ///
    /// # Errors
    /// Everything that is wrong with the file.
    pub fn from_source(source: &Source, me: Uid, names: &dyn Names) -> Result<Self, Faults> {
        let Loaded { policy, application, warnings, unanswered, .. } =
            policy_file::parse::<Terms<P::Terms>, Sections<P::Settings>>(source, me, names)?;
        let Sections { limits, audit: Audit(audit), service, settings } = application;
        let source = Some(source.path().to_path_buf());
        Ok(Self { policy: Arc::new(policy), limits, audit, service, settings, source, warnings, unanswered })
    }
}

fn locate(program: &str, file: &str, me: Uid, variable: &dyn Fn(&str) -> Option<OsString>) -> Location {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    // ConfigurationDirectory= may list several; ours is the first.
    let by_systemd =
        variable("CONFIGURATION_DIRECTORY").and_then(|list| std::env::split_paths(&list).find_map(absolute));
    if let Some(directory) = by_systemd {
        return Location::Default(directory.join(file));
    }
    if me.raw() == 0 {
        return Location::Default(Path::new("/etc").join(program).join(file));
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
    Location::Default(directory.join(program).join(file))
}

/// The home directory as the user database has it.
fn home_of(me: Uid) -> nix::Result<Option<PathBuf>> {
    let unknown = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    let account = SystemNames.account_of(me).map_err(unknown)?;
    Ok(account.map(|account| account.home).filter(|directory| directory.is_absolute()))
}

fn load<P: Protocol>(location: Location, me: Uid, names: &dyn Names) -> Result<Config<P>, LoadError> {
    let (path, named) = match location {
        Location::Named(path) => (path, true),
        Location::Default(path) => (path, false),
        Location::Nowhere => return Ok(built_in(me, names)),
        Location::Unknown(error) => {
            let message = format!(
                "cannot be looked for: the home directory of uid {me} is unknown ({error}); expected an \
                                   answer from the user database, or HOME"
            );
            return Err(LoadError::Refused(Faults(vec![Fault::of_file(format!("{}.toml", P::NAME), message)])));
        }
    };
    match Source::read(&path, me) {
        Ok(source) => Config::from_source(&source, me, names).map_err(LoadError::Refused),
        Err(ReadError::Missing) if !named => Ok(built_in(me, names)),
        Err(ReadError::Refused(fault)) => Err(LoadError::Refused(Faults(vec![fault]))),
        Err(error) if named => Err(LoadError::NoInput { path, error }),
        Err(error) => {
            let message = format!("cannot be read ({error}); expected a file that uid {me} may read, or none");
            Err(LoadError::Refused(Faults(vec![Fault::of_file(&path, message)])))
        }
    }
}

/// What a service goes by where there is no file. A user's subordinate ids count as that user here too.
fn built_in<P: Protocol>(me: Uid, names: &dyn Names) -> Config<P> {
    let config = Config::without_file(me);
    // Only what a deny rule depends on is a fault.
    match policy_file::with_accounts(Policy::owner_only(me), names) {
        Ok((policy, warnings)) => Config { policy: Arc::new(policy), warnings, ..config },
        Err(_) => config,
    }
}

#[cfg(test)]
mod tests;
