//! A listening socket without systemd. Used by [`activation`](super).
//!
//! The directory may belong to another user, and that user can replace the directory, the socket's file, or a link on the
//! way at any moment. So the directory is opened once, and files are examined and removed through that descriptor, without
//! following links. The socket's file gets its mode from bind(2) itself: nothing is changed by path afterwards.
//!
//! Two starts at the same time may find the same stale socket. The second must not remove the new socket of the first. A
//! lock (flock(2)) does not help: every user that may open the file or directory can hold it without end. Instead a start
//! claims the stale file by giving it a second name (link(2)). Only one link(2) can succeed.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, umask};
use nix::unistd::{UnlinkatFlags, geteuid, linkat, unlinkat};

use super::{BindError, LONGEST_PATH, Listener, address_of};
use crate::fd_passing;

/// How often the path is tried, and how long a try waits until another start has removed the stale socket.
const TRIES: usize = 200;
const PAUSE: Duration = Duration::from_millis(5);

/// After so many tries a claim counts as one of a start that was killed.
const CLAIM_LASTS: usize = 100;

/// Read and write for all users: the policy decides.
const MODE: Mode = Mode::from_bits_truncate(0o666);

/// The file of a socket, removed with its listener.
#[derive(Debug)]
pub(super) struct Bound {
    place: DirEntry,
    id: FileId,
}

impl Bound {
    /// Removes the file, unless another is in its place.
    pub(super) fn remove(&self) {
        let _ = self.place.remove(self.id);
    }
}

/// A name in an open directory.
#[derive(Debug)]
struct DirEntry {
    directory: OwnedFd,
    name: OsString,
}

/// Identifies a file among all that exist at the same time. A file exists while a socket is bound to it or a descriptor is
/// open, even without a name.
type FileId = (libc::dev_t, libc::ino_t);

fn id_of(status: &FileStat) -> FileId {
    (status.st_dev, status.st_ino)
}

/// The file of a socket that is closed.
struct Stale {
    file: OwnedFd,
    id: FileId,
}

/// See [`super::bind`].
pub(super) fn listener(path: &Path) -> Result<Listener, BindError> {
    let length = path.as_os_str().len();
    if length > LONGEST_PATH {
        return Err(BindError::TooLong(path.to_owned(), length));
    }
    let system = |error: io::Error| BindError::System(path.to_owned(), error);
    let failed = |error: Errno| system(error.into());
    if length == 0 {
        return Err(failed(Errno::ENOENT));
    }
    let Some(place) = DirEntry::open(path).map_err(failed)? else {
        return Err(BindError::Occupied(path.to_owned(), "a directory"));
    };
    let fd = bind_in(&place, path)?;
    let bound = place.own_socket().map(|id| Bound { place, id });
    let address = address_of(&fd).map_err(system)?;
    let listener = Listener { fd, address, bound };
    fd_passing::refuse(&listener.fd);
    listen(&listener, Backlog::MAXALLOWABLE).map_err(failed)?;
    Ok(listener)
}

/// Binds a socket at the path, in place of a stale one.
fn bind_in(place: &DirEntry, path: &Path) -> Result<OwnedFd, BindError> {
    let failed = |error: Errno| BindError::System(path.to_owned(), error.into());
    for tried in 0..TRIES {
        if let Some(stale) = place.stale_socket(path)? {
            if place.claim(&stale) || tried >= CLAIM_LASTS {
                place.remove(stale.id).map_err(failed)?;
                let _ = place.remove_as(&name_of_claim(stale.id), stale.id);
            } else {
                thread::sleep(PAUSE);
            }
            continue;
        }
        match bound_socket(path) {
            Err(Errno::EADDRINUSE) => {}
            bound => return bound.map_err(failed),
        }
    }
    Err(BindError::InUse(path.to_owned()))
}

/// Binds a socket. Its file has [`MODE`] from the beginning: bind(2) gives the file the mode of the socket's own inode,
/// less the umask (`unix_bind_bsd` in net/unix/af_unix.c). The umask belongs to the whole process. It is restored at once,
/// and a lock keeps another thread from restoring the wrong one.
fn bound_socket(path: &Path) -> nix::Result<OwnedFd> {
    static UMASK: Mutex<()> = Mutex::new(());
    let fd = new_socket(SockType::Stream)?;
    fchmod(&fd, MODE)?;
    let address = UnixAddr::new(path)?;
    let _turn = UMASK.lock().unwrap_or_else(PoisonError::into_inner);
    let before = umask(Mode::empty());
    let bound = bind(fd.as_raw_fd(), &address);
    umask(before);
    bound.map(|()| fd)
}

fn new_socket(kind: SockType) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

impl DirEntry {
    /// The directory and the name of a path; `None` if the path cannot name a file, as `..`.
    fn open(path: &Path) -> nix::Result<Option<Self>> {
        let Some(name) = path.file_name() else { return Ok(None) };
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = open(directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Some(Self { directory, name: name.to_owned() }))
    }

    /// The stale socket of this name; `None` if there is no file. Another file is an error. `path` is for messages.
    fn stale_socket(&self, path: &Path) -> Result<Option<Stale>, BindError> {
        let failed = |error: Errno| BindError::System(path.to_owned(), error.into());
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = match openat(&self.directory, self.name.as_os_str(), flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::ENOENT) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let status = fstat(&file).map_err(failed)?;
        let what = match type_of(&status) {
            SFlag::S_IFSOCK => None,
            SFlag::S_IFDIR => Some("a directory"),
            SFlag::S_IFLNK => Some("a symbolic link"),
            _ => Some("a file that is no socket"),
        };
        if let Some(what) = what {
            return Err(BindError::Occupied(path.to_owned(), what));
        }
        match knock(&file, path, SockType::Stream) {
            Err(Errno::ECONNREFUSED) => {}
            Err(Errno::EPROTOTYPE) => return Err(BindError::Occupied(path.to_owned(), "a socket of another type")),
            // EAGAIN: the backlog is full.
            Ok(()) | Err(Errno::EAGAIN) => return Err(BindError::InUse(path.to_owned())),
            Err(error) => return Err(failed(error)),
        }
        // A socket in use refuses a connection too, between its bind(2) and its listen(2). So a datagram socket connects as
        // well: the error is ECONNREFUSED if no socket is bound to the file, and EPROTOTYPE if one is.
        match knock(&file, path, SockType::Datagram) {
            Err(Errno::ECONNREFUSED) => Ok(Some(Stale { id: id_of(&status), file })),
            Ok(()) | Err(Errno::EPROTOTYPE) => Err(BindError::InUse(path.to_owned())),
            Err(error) => Err(failed(error)),
        }
    }

    /// Whether this start may remove the stale socket. Only one start can give it the second name. The file is named by its
    /// descriptor, so a file that has taken its place is never claimed, nor one that has been removed.
    fn claim(&self, stale: &Stale) -> bool {
        let file = by_descriptor(&stale.file);
        let claim = name_of_claim(stale.id);
        match linkat(AT_FDCWD, file.as_str(), &self.directory, claim.as_os_str(), AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => true,
            Err(Errno::EEXIST | Errno::ENOENT) => false,
            // A file of another user (fs.protected_hardlinks), or no links on this file system. The check before the removal
            // must be enough.
            Err(_) => true,
        }
    }

    /// The socket that was just bound. `None` if the file of another user is in its place: that is not removed.
    fn own_socket(&self) -> Option<FileId> {
        let status = self.status(&self.name).ok()?;
        let own = type_of(&status) == SFlag::S_IFSOCK && status.st_uid == geteuid().as_raw();
        own.then(|| id_of(&status))
    }

    /// Removes the file of this name if it is still the same one.
    fn remove(&self, id: FileId) -> nix::Result<()> {
        self.remove_as(&self.name, id)
    }

    fn remove_as(&self, name: &OsStr, id: FileId) -> nix::Result<()> {
        if !self.status(name).is_ok_and(|status| id_of(&status) == id) {
            return Ok(());
        }
        match unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            removed => removed,
        }
    }

    fn status(&self, name: &OsStr) -> nix::Result<FileStat> {
        fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
    }
}

fn name_of_claim(id: FileId) -> OsString {
    format!(".{}.stale", id.1).into()
}

fn type_of(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

/// A path to the file of an O_PATH descriptor, whatever becomes of its name.
fn by_descriptor(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Connects a socket of this type to the file, and closes it. Never waits. `path` is used if /proc is not mounted.
fn knock(file: &OwnedFd, path: &Path, kind: SockType) -> nix::Result<()> {
    let visitor = new_socket(kind)?;
    match connect(visitor.as_raw_fd(), &UnixAddr::new(by_descriptor(file).as_str())?) {
        Err(Errno::ENOENT) => connect(visitor.as_raw_fd(), &UnixAddr::new(path)?),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::sync::Barrier;

    fn directory() -> PathBuf {
        nix::unistd::mkdtemp(&std::env::temp_dir().join("bind-test-XXXXXX")).unwrap()
    }

    #[test]
    fn of_many_starts_at_once_one_replaces_the_stale_socket() {
        const CROWD: usize = 6;
        let directory = directory();
        let path = directory.join("socket");
        for _ in 0..200 {
            drop(UnixListener::bind(&path).unwrap());
            let together = Barrier::new(CROWD);
            let start = || {
                together.wait();
                listener(&path)
            };
            let started: Vec<_> = thread::scope(|scope| {
                let starts: Vec<_> = (0..CROWD).map(|_| scope.spawn(start)).collect();
                starts.into_iter().map(|start| start.join().unwrap()).collect()
            });
            let (bound, failed): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
            assert!(failed.iter().all(|error| matches!(error, Err(BindError::InUse(_)))), "{failed:?}");
            assert_eq!(bound.len(), 1, "{bound:?}");
            let bound = bound.into_iter().flatten().next().unwrap();
            while bound.accept().is_ok() {}
            let _client = UnixStream::connect(&path).unwrap();
            assert!(bound.accept().is_ok(), "another socket has the name");
            drop(bound);
            assert_eq!(fs::read_dir(&directory).unwrap().count(), 0, "something is left behind");
        }
        fs::remove_dir(directory).unwrap();
    }

    #[test]
    fn a_claim_left_behind_does_not_stop_the_next_start() {
        let directory = directory();
        let path = directory.join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let inode = fs::metadata(&path).unwrap().ino();
        fs::hard_link(&path, directory.join(format!(".{inode}.stale"))).unwrap();
        drop(listener(&path).unwrap());
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0, "something is left behind");
        fs::remove_dir(directory).unwrap();
    }

    #[test]
    fn a_socket_that_does_not_listen_yet_is_not_stale() {
        let directory = directory();
        let path = directory.join("socket");
        let early = bound_socket(&path).unwrap();
        assert!(matches!(listener(&path), Err(BindError::InUse(_))));
        listen(&early, Backlog::MAXALLOWABLE).unwrap();
        UnixStream::connect(&path).unwrap();
        fs::remove_dir_all(directory).unwrap();
    }
}
