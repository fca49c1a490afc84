//! Names of users and groups to ids. Used by [`policy_file`](super), which makes these names public.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::{Source, nsswitch};
use crate::ids::{Gid, Uid};
use crate::policy::{Group, HIGHEST, Name, User};
use crate::sys;

const SUBUID: &str = "/etc/subuid";

/// Sources of nsswitch.conf(5) that list all their users and groups.
const LISTING: [&str; 6] = ["files", "compat", "systemd", "db", "extrausers", "altfiles"];

/// A database of users and groups.
pub trait Names {
    /// The id of the user with this name; `None` where there is no such user.
    ///
    /// # Errors
    /// The database gave no answer.
    fn uid(&self, name: &str) -> io::Result<Option<Uid>>;

    /// The id of the group with this name; `None` where there is no such group.
    ///
    /// # Errors
    /// The database gave no answer.
    fn gid(&self, name: &str) -> io::Result<Option<Gid>>;

    /// The users that the database lists. By default none.
    ///
    /// # Errors
    /// The database gave no answer.
    fn users(&self) -> io::Result<Vec<Account>> {
        Ok(Vec::new())
    }

    /// The groups that the database lists, with the names of their members. By default none.
    ///
    /// # Errors
    /// The database gave no answer.
    fn groups(&self) -> io::Result<Vec<(Gid, Vec<String>)>> {
        Ok(Vec::new())
    }

    /// The names of the members of one group. By default none.
    ///
    /// # Errors
    /// The database gave no answer.
    fn members(&self, _gid: Gid) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Whether [`users`](Self::users) and [`groups`](Self::groups) list all that there are: a directory often finds more by
    /// their names.
    fn lists_all(&self) -> bool {
        true
    }

    /// The text of /etc/subuid, or of what stands in its place; empty where there is none. By default empty.
    ///
    /// # Errors
    /// It cannot be read.
    fn subordinate_ids(&self) -> io::Result<Source> {
        Ok(Source::new(SUBUID, ""))
    }
}

/// The system's own database: getpwnam_r(3) and getgrnam_r(3), and so whatever nsswitch.conf(5) lists.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemNames;

impl Names for SystemNames {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        Ok(self.account(name)?.map(|account| account.uid))
    }

    fn gid(&self, name: &str) -> io::Result<Option<Gid>> {
        let Ok(name) = CString::new(name) else { return Ok(None) };
        Ok(sys::group_by_name(&name)?.map(Gid::new))
    }

    fn users(&self) -> io::Result<Vec<Account>> {
        Ok(sys::users()?.into_iter().map(Account::from).collect())
    }

    fn groups(&self) -> io::Result<Vec<(Gid, Vec<String>)>> {
        Ok(sys::groups()?.into_iter().map(|group| (Gid::new(group.gid), group.members)).collect())
    }

    fn members(&self, gid: Gid) -> io::Result<Vec<String>> {
        Ok(sys::group_by_id(gid.raw())?.map(|group| group.members).unwrap_or_default())
    }

    fn lists_all(&self) -> bool {
        nsswitch::read(&["passwd", "group", "initgroups"]).iter().all(|source| LISTING.contains(&source.as_str()))
    }

    fn subordinate_ids(&self) -> io::Result<Source> {
        match fs::read(SUBUID) {
            Ok(bytes) => Ok(Source::new(SUBUID, String::from_utf8_lossy(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Source::new(SUBUID, "")),
            Err(error) => Err(error),
        }
    }
}

/// An entry of the user database.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Account {
    /// The name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// The user id.
    pub uid: Uid,
    /// The id of the user's own group.
    pub gid: Gid,
    /// The home directory.
    pub home: PathBuf,
}

impl Account {
    /// A user of this name, without a home directory.
    pub fn new(name: impl Into<String>, uid: Uid, gid: Gid) -> Self {
        Self { name: name.into(), uid, gid, home: PathBuf::from("/nonexistent") }
    }
}

impl From<sys::PasswdEntry> for Account {
    fn from(entry: sys::PasswdEntry) -> Self {
        Self { name: entry.name, uid: Uid::new(entry.uid), gid: Gid::new(entry.gid), home: entry.home }
    }
}

impl SystemNames {
    /// The sources that nsswitch.conf(5) names for these databases, each once: where users and groups, or subordinate ids,
    /// come from.
    pub fn sources(databases: &[&str]) -> Vec<String> {
        nsswitch::read(databases)
    }

    /// The user with this name: getpwnam_r(3). `None` where there is no such user.
    ///
    /// # Errors
    /// The database gave no answer.
    pub fn account(&self, name: &str) -> io::Result<Option<Account>> {
        let Ok(name) = CString::new(name) else { return Ok(None) };
        Ok(sys::user_by_name(&name)?.map(Account::from))
    }

    /// The user with this id: getpwuid_r(3). `None` where there is no such user.
    ///
    /// # Errors
    /// The database gave no answer.
    pub fn account_of(&self, uid: Uid) -> io::Result<Option<Account>> {
        Ok(sys::user_by_id(uid.raw())?.map(Account::from))
    }

    /// The groups of a user, the user's own among them: getgrouplist(3). A database that gives no answer cannot be
    /// told from one that lists no group.
    ///
    /// # Errors
    /// More groups than a million.
    pub fn groups_of(&self, account: &Account) -> io::Result<Vec<Gid>> {
        let Ok(name) = CString::new(account.name.as_str()) else { return Ok(vec![account.gid]) };
        Ok(sys::groups_of(&name, account.gid.raw())?.into_iter().map(Gid::new).collect())
    }
}

/// Looks names up: the names that the database knows now, with their ids. A name for which it gives no answer is left out.
///
/// With [`Policy::unknown_names`](crate::policy::Policy::unknown_names) and
/// [`Policy::with_ids`](crate::policy::Policy::with_ids) a service looks up again the names that were unknown when its policy was
/// read. It takes as long as the database does, so call it on a thread that may wait.
pub fn look_up(wanted: &[Name], names: &dyn Names) -> Vec<(Name, u32)> {
    let id = |name: &Name| match name {
        Name::User(user) => names.uid(user).ok().flatten().map(Uid::raw),
        Name::Group(group) => names.gid(group).ok().flatten().map(Gid::raw),
    };
    wanted.iter().filter_map(|name| Some((name.clone(), id(name).filter(|id| *id <= HIGHEST)?))).collect()
}

/// As a file has it: `"alice"`, `"1000-1999"`, `"self"`, `"any"`. A name is looked up now, in the system's user database. For
/// a text that is no such value, and for a name that is unknown, [`Policy::new`](crate::Policy::new) refuses the rule.
///
/// ```
/// use peergate::{Policy, Rule, Uid};
///
/// let rules = |user| [Rule::allow("staff", ()).users(["root", "1000-1999", user]).groups(["root"])];
/// assert!(Policy::new(rules("self"), Uid::effective()).is_ok());
/// assert!(Policy::new(rules("no such user"), Uid::effective()).is_err());
/// assert!(Policy::new(rules("1999-1000"), Uid::effective()).is_err());
/// ```
impl From<&str> for User {
    fn from(text: &str) -> Self {
        Self::read(text, &mut |name| known(name, SystemNames.uid(name.as_str()).map(|uid| uid.map(Uid::raw))))
    }
}

/// As [`User`]: `"adm"`, `"1000-1999"`, `"any"`.
impl From<&str> for Group {
    fn from(text: &str) -> Self {
        Self::read(text, &mut |name| known(name, SystemNames.gid(name.as_str()).map(|gid| gid.map(Gid::raw))))
    }
}

fn known(name: &Name, answer: io::Result<Option<u32>>) -> Result<Option<u32>, String> {
    match answer {
        Ok(Some(id)) => Ok(Some(id)),
        Ok(None) => Err(format!("{name}, which the user database does not know")),
        Err(error) => Err(format!("{name}, for which the user database gives no answer: {error}")),
    }
}

impl User {
    /// The user of this name, by the system's user database (getpwnam_r(3)), as it is now.
    ///
    /// # Errors
    /// NotFound where there is no such user; what the database says where it does not answer.
    ///
    /// ```
    /// use peergate::{Rule, User};
    ///
    /// let rule = Rule::allow("operator", ()).users([User::named("root")?]);
    /// assert!(User::named("no such user").is_err());
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn named(name: &str) -> io::Result<Self> {
        match SystemNames.uid(name)? {
            Some(uid) => Ok(Self::Named(name.to_owned(), Some(uid))),
            None => Err(io::Error::new(io::ErrorKind::NotFound, format!("no user is called {name:?}"))),
        }
    }
}

impl Group {
    /// The group of this name, by the system's user database (getgrnam_r(3)), as it is now.
    ///
    /// # Errors
    /// NotFound where there is no such group; what the database says where it does not answer.
    pub fn named(name: &str) -> io::Result<Self> {
        match SystemNames.gid(name)? {
            Some(gid) => Ok(Self::Named(name.to_owned(), Some(gid))),
            None => Err(io::Error::new(io::ErrorKind::NotFound, format!("no group is called {name:?}"))),
        }
    }
}
