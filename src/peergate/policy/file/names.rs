//! Names of users and groups to ids. Used by [`file`](super), which makes these names public.

use std::io;

use nix::errno::Errno;
use nix::unistd::{Group, User};

use crate::ids::{Gid, Uid};

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
}

/// The system's own database: getpwnam_r(3) and getgrnam_r(3), and so whatever nsswitch.conf(5) lists.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemNames;

impl Names for SystemNames {
    fn uid(&self, name: &str) -> io::Result<Option<Uid>> {
        found(name, User::from_name).map(|user| user.map(|user| Uid::new(user.uid.as_raw())))
    }

    fn gid(&self, name: &str) -> io::Result<Option<Gid>> {
        found(name, Group::from_name).map(|group| group.map(|group| Gid::new(group.gid.as_raw())))
    }
}

impl super::User {
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

impl super::Group {
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

fn found<R>(name: &str, look_up: impl Fn(&str) -> nix::Result<Option<R>>) -> io::Result<Option<R>> {
    if name.contains('\0') {
        return Ok(None);
    }
    match look_up(name) {
        // Some sources say so where the others say "nothing found" (getpwnam(3), ERRORS).
        Err(Errno::ENOENT | Errno::ESRCH) => Ok(None),
        answer => answer.map_err(io::Error::from),
    }
}
