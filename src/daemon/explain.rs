//! `explain`: how the policy judges a user or a process, and why.
//!
//! The verdict is the one that the service would give: [`Policy::explain`](peergate::policy::Policy::explain) asks
//! the code that serves.

use std::fmt;

use peergate::ids::{Gid, Uid};
use peergate::peer::{MOST_GROUPS, Peer};
use peergate::policy_file::{Account, Names as _, SystemNames};
use peergate::unit::Units;
use peergate::{Login, Subject};

use crate::cli::{Choice, Explain, Who};
use crate::config::Config;
use crate::protocol::Protocol;
use crate::{exit_code, output, reservations};

/// A peer that is not connected.
#[derive(Debug)]
struct Described {
    uid: Uid,
    /// The effective one first. Of more than can be told, as for a peer, nothing is kept but that one.
    gids: Vec<Gid>,
    /// How many supplementary ones there are.
    supplementary: usize,
    process: Process,
}

/// What the command line says of the process.
#[derive(Debug, Default)]
struct Process {
    units: Option<Units>,
    login: Login,
}

impl Described {
    fn new(uid: Uid, gid: Gid, supplementary: Vec<Gid>, process: Process) -> Self {
        let count = supplementary.len();
        let told = supplementary.into_iter().filter(|_| count <= MOST_GROUPS).filter(|other| *other != gid);
        Self { uid, gids: std::iter::once(gid).chain(told).collect(), supplementary: count, process }
    }
}

impl Subject for Described {
    fn uid(&self) -> Uid {
        self.uid
    }

    fn gids(&self) -> &[Gid] {
        &self.gids
    }

    fn gids_complete(&self) -> bool {
        self.supplementary <= MOST_GROUPS
    }

    fn units(&self) -> Option<&Units> {
        self.process.units.as_ref()
    }

    fn login(&self) -> Login {
        self.process.login
    }
}

/// Why there is no verdict.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    /// The command line names no user: EX_USAGE.
    Usage(String),
    /// The system gives no answer about them: EX_OSERR.
    System(String),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => exit_code::USAGE,
            Self::System(_) => exit_code::OS_ERROR,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Usage(message) | Self::System(message)) = self;
        f.write_str(message)
    }
}

/// Prints the verdict and the way to it. Returns the status to exit with: 0 admitted, 1 denied, 64 the command line
/// names no user, 71 the system tells nothing of the process, or as
/// [`LoadError::exit_code`](crate::config::LoadError::exit_code) says.
pub fn run<P: Protocol>(asked: &Explain, own: P::Options) -> u8 {
    let choice = Choice { config: asked.config.clone(), own };
    let config = match Config::<P>::load(&choice) {
        Ok(config) => config,
        Err(error) => {
            output::say(&error.to_string());
            return error.exit_code();
        }
    };
    let (who, supplementary) = match subject_of(asked) {
        Ok(found) => found,
        Err(failure) => {
            output::complain(&failure.to_string());
            return failure.exit_code();
        }
    };
    let explanation = config.policy.explain(who.as_ref());
    let mut text = explanation.to_string();
    if supplementary > MOST_GROUPS {
        text += &format!("  ({supplementary} supplementary groups; of more than {MOST_GROUPS} none can be told)\n");
    }
    text += &hints(asked, &config);
    if let Some(login) = who.login().user().filter(|_| asked.who.pid.is_some()) {
        text += &format!("  (a login of uid {login} started the process)\n");
    }
    let me = config.policy.me();
    let by_self = format!("self ({me})");
    if config.policy.rules().flat_map(|rule| rule.keys(me)).any(|(_, values)| values.contains(&by_self)) {
        text += &format!(
            "  (`self` is the user that asks, uid {me} here; to a service it is the user that the service runs as)\n"
        );
    }
    for reservation in reservations::reservations(&config) {
        text += &format!("  ({reservation})\n");
    }
    output::answer(text);
    u8::from(!explanation.is_admitted())
}

/// The peer that the command line names, and how many supplementary groups it has.
fn subject_of(asked: &Explain) -> Result<(Box<dyn Subject>, usize), Failure> {
    let units = asked.unit.as_deref().map(unit).transpose()?;
    let login = asked.login.as_deref().map(login).transpose()?.unwrap_or_default();
    let process = Process { units, login };
    match &asked.who {
        Who { pid: Some(pid), .. } => match Peer::of_process(*pid) {
            Ok(peer) => {
                let supplementary = peer.supplementary_groups();
                Ok((Box::new(peer), supplementary))
            }
            Err(error) => Err(Failure::System(format!("process {pid}: {error}"))),
        },
        Who { user: Some(name), .. } => Ok(named(user(name, process)?)),
        Who { uid: Some(uid), .. } => {
            let groups = asked.group.iter().map(|name| group(name)).collect::<Result<_, _>>()?;
            let gid = Gid::new(asked.gid.unwrap_or(*uid));
            Ok(named(Described::new(Uid::new(*uid), gid, groups, process)))
        }
        Who { user: None, uid: None, pid: None } => {
            Err(Failure::Usage("no peer is named; expected --user, --uid or --pid".to_owned()))
        }
    }
}

fn named(described: Described) -> (Box<dyn Subject>, usize) {
    let supplementary = described.supplementary;
    (Box::new(described), supplementary)
}

/// A user as the user database has them.
fn user(name: &str, process: Process) -> Result<Described, Failure> {
    let account = account(name, "a name, or --uid")?;
    let groups = SystemNames.groups_of(&account);
    let groups = groups.map_err(|error| Failure::System(format!("the groups of {name:?}: {error}")))?;
    Ok(Described::new(account.uid, account.gid, groups, process))
}

/// What else the command line could tell, because the policy asks for it.
fn hints<P: Protocol>(asked: &Explain, config: &Config<P>) -> String {
    let has = |key: &str| asked.who.pid.is_none() && config.policy.has_key(key);
    let mut hints = String::new();
    if asked.unit.is_none() && (has("units") || has("user-units")) {
        hints += "  (the policy depends on units; --unit tells from which one the process would connect)\n";
    }
    if asked.login.is_none() && has("logins") {
        hints += "  (the policy depends on logins; --login tells whose login started the process)\n";
    }
    hints
}

fn account(name: &str, expected: &str) -> Result<Account, Failure> {
    let unknown = || Failure::Usage(format!("no user {name:?} in the user database; expected {expected}"));
    let found = SystemNames.account(name);
    found.map_err(|error| Failure::System(format!("the user database: {error}")))?.ok_or_else(unknown)
}

/// A login by the user's name or number, where the number that the kernel shows for none stands for none.
fn login(name: &str) -> Result<Login, Failure> {
    Ok(match name.parse() {
        Ok(u32::MAX) => Login::None,
        Ok(uid) => Login::User(Uid::new(uid)),
        Err(_) => Login::User(account(name, "a name or a number")?.uid),
    })
}

/// A group by name or number.
fn group(name: &str) -> Result<Gid, Failure> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::new(number));
    }
    let unknown = || Failure::Usage(format!("no group {name:?} in the user database; expected a name or a number"));
    let found = SystemNames.gid(name);
    found.map_err(|error| Failure::System(format!("the user database: {error}")))?.ok_or_else(unknown)
}

/// The units around a process in this one: a name, or a path as in a control group.
fn unit(path: &str) -> Result<Units, Failure> {
    Units::from_path(path).ok_or_else(|| {
        Failure::Usage(format!(
            "{path:?} is no unit that can hold processes, or none where systemd would put it; expected one such as \
             backup.service, or user@1000.service/mail.service for a unit of a user's own"
        ))
    })
}
