//! Opens a file that only root and the service's user can have put where it is. Used by [`source`](super::source).
//!
//! The owner and the mode of a file say which user has written it, not which user has put it there: with write access to
//! a directory on the way, an old file of root's can be moved into its place. So the rule for the file holds for each
//! directory on the way too, as in sshd's check of `authorized_keys` (StrictModes), and for the directories that symbolic
//! links lead through. The walk begins at the root directory. Only root and this user can change a directory that has
//! passed, so a path leads to the same place when it is used again. The walk needs one descriptor, the file's own: a
//! reload works with the last one.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_file, readlink};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, lstat};

use super::source::{Fault, ReadError};
use crate::ids::{OVERFLOW_ID, Uid};

/// As many symbolic links as the kernel follows, path_resolution(7).
const MOST_LINKS: usize = 40;

const ROOT: &str = "/";

const NO_FILE: &str = "not a regular file; expected a file of text";

/// Opens the file for reading and never waits, whatever the path leads to.
pub(super) fn open(path: &Path, me: Uid) -> Result<File, ReadError> {
    Walk::begin(path, me)?.finish()
}

/// How far the path has been walked.
struct Walk<'a> {
    /// What faults call the file.
    path: &'a Path,
    whole: PathBuf,
    me: Uid,
    /// The directory reached, by a path without symbolic links.
    reached: PathBuf,
    /// Whether every user may create files there but remove only their own: the sticky bit.
    is_shared: bool,
    /// The owner of the root directory.
    owner_of_all: u32,
    ahead: VecDeque<Step>,
    links: usize,
}

/// A name to look up next.
struct Step {
    name: OsString,
    /// Whether it comes from a symbolic link. If such a name is missing, the link dangles.
    by_link: bool,
}

impl<'a> Walk<'a> {
    fn begin(path: &'a Path, me: Uid) -> Result<Self, ReadError> {
        let whole = std::path::absolute(path).map_err(ReadError::Unreadable)?;
        let owner_of_all = lstat(ROOT).map_err(|error| ReadError::Unreadable(error.into()))?.st_uid;
        let ahead = steps(&whole, false).collect();
        let reached = PathBuf::new();
        let mut walk = Self { path, whole, me, reached, is_shared: false, owner_of_all, ahead, links: 0 };
        walk.enter(ROOT.into())?;
        Ok(walk)
    }

    fn finish(mut self) -> Result<File, ReadError> {
        while let Some(step) = self.ahead.pop_front() {
            if let Some(file) = self.step(&step)? {
                return Ok(file);
            }
        }
        self.refuse(NO_FILE.into())
    }

    /// Enters a directory, follows a link, or opens the file, which is the last one.
    fn step(&mut self, step: &Step) -> Result<Option<File>, ReadError> {
        let here = self.reached.join(&step.name);
        let status = match lstat(&here) {
            Ok(status) => status,
            Err(Errno::ENOENT) if step.by_link => return Err(dangling(&here)),
            Err(Errno::ENOENT) => return Err(ReadError::Missing),
            Err(error) => return Err(self.failed(&here, error)),
        };
        match type_of(&status) {
            SFlag::S_IFDIR => {
                // A directory that is mounted when it is used must be root's or this user's before that too.
                self.judge_owner(&status, Some(("directory", &here)))?;
                self.enter(here)?;
            }
            SFlag::S_IFLNK => self.follow(&here, &status)?,
            _ if !self.ahead.is_empty() => return Err(self.failed(&here, Errno::ENOTDIR)),
            _ => return self.open(&here, &status).map(Some),
        }
        Ok(None)
    }

    /// Enters a directory that passes the rule for one on the way. A sticky one may be written by all, as /tmp: there only
    /// the owner of a file can rename or remove it, so what belongs to root or this user stays; that is looked at next.
    fn enter(&mut self, here: PathBuf) -> Result<(), ReadError> {
        // With a name behind it, or an automount point would be looked at in place of what is mounted there (fstatat(2),
        // AT_NO_AUTOMOUNT).
        let status = lstat(&here.join(".")).map_err(|error| self.failed(&here, error))?;
        self.judge_owner(&status, Some(("directory", &here)))?;
        let is_open = status.st_mode & 0o022 != 0;
        let is_sticky = status.st_mode & libc::S_ISVTX != 0;
        if is_open && !is_sticky {
            return self.refuse(format!("directory {}: {}", here.display(), writable(&status, "0755")));
        }
        (self.reached, self.is_shared) = (here, is_open);
        Ok(())
    }

    /// Puts what the link says in front of what is ahead.
    fn follow(&mut self, here: &Path, status: &FileStat) -> Result<(), ReadError> {
        if self.is_shared {
            self.judge_owner(status, Some(("symbolic link", here)))?;
        }
        self.links += 1;
        if self.links > MOST_LINKS {
            return Err(self.failed(here, Errno::ELOOP));
        }
        let target = PathBuf::from(readlink(here).map_err(|error| self.failed(here, error))?);
        if target.is_absolute() {
            self.enter(ROOT.into())?;
        }
        let ahead = std::mem::take(&mut self.ahead);
        self.ahead = steps(&target, true).chain(ahead).collect();
        Ok(())
    }

    fn open(&self, here: &Path, status: &FileStat) -> Result<File, ReadError> {
        // Before it is opened, because opening a device can have effects. Again afterwards: its owner may have replaced it.
        self.judge_file(status)?;
        // Non-blocking: another process may have a lease on it (fcntl(2)).
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = open_file(here, flags, Mode::empty()).map_err(|error| self.failed(here, error))?;
        self.judge_file(&fstat(&file).map_err(|error| self.failed(here, error))?)?;
        Ok(File::from(file))
    }

    fn judge_file(&self, status: &FileStat) -> Result<(), ReadError> {
        if type_of(status) != SFlag::S_IFREG {
            return self.refuse(NO_FILE.into());
        }
        self.judge_owner(status, None)?;
        if status.st_mode & 0o022 != 0 {
            return self.refuse(writable(status, "0644"));
        }
        // Where fs.protected_hardlinks is off, any user can give a file of root's a name in a sticky directory.
        if self.is_shared && status.st_nlink > 1 {
            let names = status.st_nlink;
            return self.refuse(format!(
                "has {names} names (hard links), in a directory that others may write; expected one name there"
            ));
        }
        Ok(())
    }

    /// Root or the service's user; `what` the owner is of, besides the file itself.
    ///
    /// In a user namespace without root, root's directories show the overflow id as their owner, and so do the directories
    /// of every user that is not mapped. Where the root directory shows it too, they cannot be told apart, and pass. The
    /// file itself must still be this user's or root's.
    fn judge_owner(&self, status: &FileStat, what: Option<(&str, &Path)>) -> Result<(), ReadError> {
        let owner = status.st_uid;
        let is_unknown = owner == OVERFLOW_ID && self.owner_of_all == OVERFLOW_ID && what.is_some();
        if owner == 0 || owner == self.me.raw() || is_unknown {
            return Ok(());
        }
        let what = what.map(|(what, here)| format!("{what} {}: ", here.display())).unwrap_or_default();
        self.refuse(format!("{what}owned by uid {owner}; expected root or the service's user, uid {}", self.me))
    }

    /// What the system says of the file, or of something on the way, which is then named.
    fn failed(&self, here: &Path, error: Errno) -> ReadError {
        if here == self.whole {
            return ReadError::Unreadable(error.into());
        }
        let error = io::Error::from(error);
        ReadError::Unreadable(io::Error::new(error.kind(), format!("{}: {error}", here.display())))
    }

    fn refuse<T>(&self, message: String) -> Result<T, ReadError> {
        Err(ReadError::Refused(Fault::of_file(self.path, message)))
    }
}

/// The names that a path consists of. Its other parts, such as `.`, stay where the walk is.
fn steps(path: &Path, by_link: bool) -> impl Iterator<Item = Step> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name),
        Component::ParentDir => Some(OsStr::new("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    names.map(move |name| Step { name: name.to_owned(), by_link })
}

fn type_of(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

fn writable(status: &FileStat, expected: &str) -> String {
    let mode = status.st_mode & 0o7777;
    format!("others than its owner may write it (mode {mode:04o}); expected mode {expected} or less")
}

fn dangling(here: &Path) -> ReadError {
    let message = format!("a symbolic link leads to {}, which does not exist", here.display());
    ReadError::Unreadable(io::Error::new(io::ErrorKind::NotFound, message))
}
