//! Connecting to a local service with the ids of another user, so that the service's SO_PEERCRED and SO_PEERGROUPS (unix(7))
//! tell these.
//!
//! The kernel takes the credentials of the thread that calls connect(2): effective uid and gid, supplementary groups. A thread
//! of its own takes these for the length of that call and gives them back, by system calls of its own: glibc's wrappers would
//! change every thread. A thread that could not go back would act for the wrong user; then the process aborts. The pid that the
//! service sees is this process's.
//!
//! The path is looked up before that, with the process's own ids: the user needs write permission on the socket, and no way to
//! it. So the socket can lie in a directory that only this process may enter, and no user gets to it past the gate.
//!
//! While the call lasts, real and saved ids stay the process's own: the user can neither signal nor trace the process. The kernel
//! marks the process as not dumpable from the first call on (prctl(2), PR_SET_DUMPABLE).
//!
//! It needs CAP_SETUID and CAP_SETGID (capabilities(7)), in the permitted set.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::process::abort;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use nix::fcntl::{OFlag, open};
use nix::sys::socket::{UnixAddr, connect};
use nix::sys::stat::Mode;
use nix::unistd::{getegid, geteuid};

use crate::ids::{Gid, Uid};
use crate::sys;

/// The ids to connect with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    /// The effective uid.
    pub uid: Uid,
    /// The effective gid.
    pub gid: Gid,
    /// The supplementary groups.
    pub groups: Vec<Gid>,
}

/// A thread that connects with the ids of other users. Dropping it ends the thread.
pub struct ConnectAs {
    jobs: Mutex<mpsc::Sender<Job>>,
}

struct Job {
    socket: OwnedFd,
    to: SocketAddr,
    ids: Ids,
    reply: mpsc::Sender<io::Result<OwnedFd>>,
}

impl ConnectAs {
    /// Starts the thread.
    ///
    /// # Errors
    /// PermissionDenied where the process has no CAP_SETUID and CAP_SETGID; what capget(2) and starting a thread say.
    pub fn start() -> io::Result<Self> {
        if !sys::may_set_ids()? {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let (jobs, received) = mpsc::channel();
        thread::Builder::new().name("connect-as".to_owned()).spawn(move || serve(&received))?;
        Ok(Self { jobs: Mutex::new(jobs) })
    }

    /// Connects this AF_UNIX stream socket, which must be non-blocking. It waits for the thread, which never waits for the
    /// service.
    ///
    /// # Errors
    /// What connect(2), setgroups(2), setresgid(2) and setresuid(2) say. InvalidInput for ids that stand for ids
    /// unknown in this user namespace.
    pub fn connect(&self, socket: OwnedFd, to: &SocketAddr, ids: Ids) -> io::Result<OwnedFd> {
        if !ids.uid.is_known() || !ids.gid.is_known() || ids.groups.iter().any(|group| !group.is_known()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (reply, replies) = mpsc::channel();
        let job = Job { socket, to: to.clone(), ids, reply };
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.send(job).map_err(|_| io::ErrorKind::BrokenPipe)?;
        drop(jobs);
        replies.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

impl fmt::Debug for ConnectAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectAs")
    }
}

fn serve(jobs: &mpsc::Receiver<Job>) {
    // If the own groups are not known, they cannot be given back.
    let own = sys::thread_groups().map(|groups| (geteuid().as_raw(), getegid().as_raw(), groups));
    let kept = sys::keep_capabilities();
    for Job { socket, to, ids, reply } in jobs {
        let result = match (&own, &kept) {
            (Ok((uid, gid, groups)), Ok(())) => connect_as(socket, &to, &ids, (*uid, *gid, groups)),
            (Err(error), _) | (_, Err(error)) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        let _ = reply.send(result);
    }
}

/// The thread's own ids are `own`, before and after.
fn connect_as(socket: OwnedFd, to: &SocketAddr, ids: &Ids, own: (u32, u32, &[u32])) -> io::Result<OwnedFd> {
    // Opened anew each time: a service that was restarted has another file at the path.
    let found = to.as_pathname().map(|path| open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())).transpose()?;
    let address = match (&found, to.as_abstract_name()) {
        (Some(file), _) => UnixAddr::new(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str())?,
        (None, Some(name)) => UnixAddr::new_abstract(name)?,
        (None, None) => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let groups: Vec<u32> = ids.groups.iter().map(|group| group.raw()).collect();
    let taken = take(ids.uid.raw(), ids.gid.raw(), &groups);
    let connected = if taken.is_ok() { connect(socket.as_raw_fd(), &address) } else { Ok(()) };
    give_back(own);
    taken?;
    connected?;
    Ok(socket)
}

/// The uid last: it may take the capabilities away that the groups need.
fn take(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    sys::set_thread_groups(groups)?;
    sys::set_thread_gid(gid)?;
    sys::set_thread_uid(uid)
}

fn give_back((uid, gid, groups): (u32, u32, &[u32])) {
    // From root's uid back to another, the kernel clears the effective capabilities.
    let back = sys::set_thread_uid(uid)
        .and_then(|()| sys::raise_set_ids())
        .and_then(|()| sys::set_thread_gid(gid))
        .and_then(|()| sys::set_thread_groups(groups));
    if back.is_err() {
        abort();
    }
}
