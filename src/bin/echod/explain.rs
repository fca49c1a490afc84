//! `echod explain`: how the policy judges somebody, and why. For main.
//!
//! The verdict is the one that the service would give: [`Policy::explain`](peergate::policy::Policy::explain) asks
//! the code that serves.

use std::ffi::CString;
use std::fmt;
use std::io::{self, Write as _};

use nix::unistd::{Group, User as Account, getgrouplist};
use peergate::Subject;
use peergate::ids::{Gid, Uid};
use peergate::peer::Peer;
use peergate::policy::User;
use peergate::unit::Units;

use crate::cli::{Explain, Who};
use crate::config::Config;
use crate::vouching;

/// Somebody who is not connected.
#[derive(Debug)]
struct Described {
    uid: Uid,
    gids: Vec<Gid>,
    units: Option<Units>,
}

impl Subject for Described {
    fn uid(&self) -> Uid {
        self.uid
    }

    fn gids(&self) -> &[Gid] {
        &self.gids
    }

    fn gids_complete(&self) -> bool {
        true
    }

    fn units(&self) -> Option<&Units> {
        self.units.as_ref()
    }
}

/// Why nobody can be judged.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    /// The command line names nobody: EX_USAGE.
    Usage(String),
    /// The system gives no answer about them: EX_OSERR.
    System(String),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 64,
            Self::System(_) => 71,
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
/// names nobody, 71 the system tells nothing of the process, or as
/// [`LoadError::exit_code`](crate::config::LoadError::exit_code) says.
pub fn run(asked: &Explain) -> u8 {
    let config = match Config::load(asked.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return error.exit_code();
        }
    };
    let who = match somebody(asked) {
        Ok(who) => who,
        Err(failure) => {
            eprintln!("echod: {failure}");
            return failure.exit_code();
        }
    };
    let explanation = config.policy.explain(who.as_ref());
    let mut text = explanation.to_string();
    if asked.who.pid.is_none() && asked.unit.is_none() && config.policy.depends_on_units() {
        text += "  (the policy depends on units; --unit tells from which one they would connect)\n";
    }
    if config.policy.rules().filter_map(|rule| rule.listed_users()).any(|users| users.contains(&User::Me)) {
        let me = config.policy.me();
        text += &format!(
            "  (`self` is whoever asks, uid {me} here; to a service it is the user that the service runs as)\n"
        );
    }
    for reservation in vouching::reservations(&config) {
        text += &format!("  ({reservation})\n");
    }
    // Whoever reads may have seen enough; that changes nothing of the answer.
    let _ = io::stdout().write_all(text.as_bytes());
    u8::from(!explanation.is_admitted())
}

/// Whom the command line names.
fn somebody(asked: &Explain) -> Result<Box<dyn Subject>, Failure> {
    let units = asked.unit.as_deref().map(unit).transpose()?;
    match &asked.who {
        Who { pid: Some(pid), .. } => match Peer::of_process(*pid) {
            Ok(peer) => Ok(Box::new(peer)),
            Err(error) => Err(Failure::System(format!("process {pid}: {error}"))),
        },
        Who { user: Some(name), .. } => Ok(Box::new(user(name, units)?)),
        Who { uid: Some(uid), .. } => {
            let mut gids = vec![Gid::new(asked.gid.unwrap_or(*uid))];
            for name in &asked.group {
                gids.push(group(name)?);
            }
            Ok(Box::new(Described { uid: Uid::new(*uid), gids, units }))
        }
        Who { user: None, uid: None, pid: None } => {
            Err(Failure::Usage("nobody to judge; expected --user, --uid or --pid".to_owned()))
        }
    }
}

/// A user as the user database has them.
fn user(name: &str, units: Option<Units>) -> Result<Described, Failure> {
    let unknown = || Failure::Usage(format!("no user {name:?} in the user database; expected a name, or --uid"));
    let name = CString::new(name).map_err(|_| unknown())?;
    let found = Account::from_name(&name.to_string_lossy());
    let user = found.map_err(|error| Failure::System(format!("the user database: {error}")))?.ok_or_else(unknown)?;
    let groups = getgrouplist(&name, user.gid);
    let mut gids = vec![Gid::new(user.gid.as_raw())];
    gids.extend(
        groups
            .map_err(|error| Failure::System(format!("the groups of {name:?}: {error}")))?
            .into_iter()
            .map(|gid| Gid::new(gid.as_raw()))
            .filter(|gid| *gid != Gid::new(user.gid.as_raw())),
    );
    Ok(Described { uid: Uid::new(user.uid.as_raw()), gids, units })
}

/// A group by name or number.
fn group(name: &str) -> Result<Gid, Failure> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::new(number));
    }
    let unknown = || Failure::Usage(format!("no group {name:?} in the user database; expected a name or a number"));
    if name.contains('\0') {
        return Err(unknown());
    }
    let found = Group::from_name(name).map_err(|error| Failure::System(format!("the user database: {error}")))?;
    found.map(|group| Gid::new(group.gid.as_raw())).ok_or_else(unknown)
}

/// The units around somebody in this one: a name, or a path as in a control group.
fn unit(path: &str) -> Result<Units, Failure> {
    Units::from_path(path).ok_or_else(|| {
        Failure::Usage(format!(
            "{path:?} is no unit that can hold processes; expected one such as backup.service, \
             or user@1000.service/mail.service for a unit of a user's own"
        ))
    })
}
