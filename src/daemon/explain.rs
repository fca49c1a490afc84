//! `explain`: how the policy judges a user or a process, and why.
//!
//! The verdict is the one that the service would give: [`Policy::explain`](peergate::policy::Policy::explain) asks
//! the code that serves.

use std::fmt;

use peergate::Subject;
use peergate::ids::{Gid, Uid};
use peergate::peer::{MOST_GROUPS, Peer};
use peergate::policy_file::{Names as _, SystemNames};
use peergate::unit::Units;

use crate::cli::{Explain, Who};
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
    units: Option<Units>,
}

impl Described {
    fn new(uid: Uid, gid: Gid, supplementary: Vec<Gid>, units: Option<Units>) -> Self {
        let count = supplementary.len();
        let told = supplementary.into_iter().filter(|_| count <= MOST_GROUPS).filter(|other| *other != gid);
        Self { uid, gids: std::iter::once(gid).chain(told).collect(), supplementary: count, units }
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
        self.units.as_ref()
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
pub fn run<P: Protocol>(asked: &Explain) -> u8 {
    let config = match Config::<P>::load(asked.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            output::say(&error.to_string());
            return error.exit_code();
        }
    };
    let (who, supplementary) = match somebody(asked) {
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
    if asked.who.pid.is_none() && asked.unit.is_none() && config.policy.depends_on_units() {
        text += "  (the policy depends on units; --unit tells from which one the process would connect)\n";
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
fn somebody(asked: &Explain) -> Result<(Box<dyn Subject>, usize), Failure> {
    let units = asked.unit.as_deref().map(unit).transpose()?;
    match &asked.who {
        Who { pid: Some(pid), .. } => match Peer::of_process(*pid) {
            Ok(peer) => {
                let supplementary = peer.supplementary_groups();
                Ok((Box::new(peer), supplementary))
            }
            Err(error) => Err(Failure::System(format!("process {pid}: {error}"))),
        },
        Who { user: Some(name), .. } => Ok(named(user(name, units)?)),
        Who { uid: Some(uid), .. } => {
            let groups = asked.group.iter().map(|name| group(name)).collect::<Result<_, _>>()?;
            let gid = Gid::new(asked.gid.unwrap_or(*uid));
            Ok(named(Described::new(Uid::new(*uid), gid, groups, units)))
        }
        Who { user: None, uid: None, pid: None } => {
            Err(Failure::Usage("nobody to judge; expected --user, --uid or --pid".to_owned()))
        }
    }
}

fn named(described: Described) -> (Box<dyn Subject>, usize) {
    let supplementary = described.supplementary;
    (Box::new(described), supplementary)
}

/// A user as the user database has them.
fn user(name: &str, units: Option<Units>) -> Result<Described, Failure> {
    let unknown = || Failure::Usage(format!("no user {name:?} in the user database; expected a name, or --uid"));
    let found = SystemNames.account(name);
    let account = found.map_err(|error| Failure::System(format!("the user database: {error}")))?.ok_or_else(unknown)?;
    let groups = SystemNames.groups_of(&account);
    let groups = groups.map_err(|error| Failure::System(format!("the groups of {name:?}: {error}")))?;
    Ok(Described::new(account.uid, account.gid, groups, units))
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
