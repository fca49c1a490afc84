//! Socket activation: the descriptors that systemd passed become listeners and stored descriptors, each checked. Sole user
//! of LISTEN_FDS and its companions (sd_listen_fds(3)), and of listenfd.
//!
//! Call [`adopt`] before the process has a second thread, because it changes the environment. Without systemd, [`bind`]
//! makes a listener.

mod bind;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use listenfd::ListenFd;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, UnixAddr, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};

use crate::fd_passing::{self, Stream};
use crate::sys;

/// More descriptors than systemd ever passes. A larger number is a mistake.
const MOST_DESCRIPTORS: usize = 1 << 20;

/// The longest path in `sockaddr_un`: 108 bytes less the closing NUL, unix(7).
const LONGEST_PATH: usize = 107;

/// A listening AF_UNIX stream socket, non-blocking and close-on-exec.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: Arc<str>,
    /// The file that [`bind`] made, removed when the listener is dropped.
    bound: Option<bind::Bound>,
}

impl Listener {
    /// The address for clients: a path, or `@name` in the abstract namespace.
    pub fn address(&self) -> &Arc<str> {
        &self.address
    }

    /// Whether [`bind`] made it: then no other process goes on with its backlog.
    pub(crate) fn is_ours(&self) -> bool {
        self.bound.is_some()
    }

    /// The same socket as the standard library's type, non-blocking. Keep the listener: when it is dropped, the file that
    /// [`bind`] made is removed.
    ///
    /// # Errors
    /// What fcntl(2) reports when it duplicates the descriptor.
    pub fn to_std(&self) -> io::Result<UnixListener> {
        self.fd.try_clone().map(UnixListener::from)
    }

    /// The next connection in the backlog, non-blocking and close-on-exec. For a service without a [`Gate`](crate::Gate).
    ///
    /// # Errors
    /// What accept(2) reports; EAGAIN if the backlog is empty.
    pub fn accept(&self) -> io::Result<Stream> {
        sys::accept(self.as_fd()).map(Stream::accepted)
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    /// Removes the file that [`bind`] made, unless another file has taken its place. A listener from systemd is only closed.
    fn drop(&mut self) {
        let Some(bound) = &self.bound else { return };
        bound.remove();
        // The kernel would close connections in the backlog, and the descriptors sent on them, in this thread. `Stream` leaves
        // that to another one.
        while self.accept().is_ok() {}
    }
}

/// What the service manager passed.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Passed {
    /// The sockets to serve, in the order given.
    pub listeners: Vec<Listener>,
    /// Descriptors that an earlier process of this service put into the store, by name.
    pub kept: Vec<(String, OwnedFd)>,
    /// Why LISTEN_FDS was set but is not for this process, for a message.
    pub ignored: Option<String>,
}

/// Why the descriptors passed cannot be served.
#[derive(Debug)]
#[non_exhaustive]
pub enum Refused {
    /// LISTEN_FDS is no number of descriptors.
    Count(String),
    /// Descriptors of the wrong type: the number, the name, and what it is instead.
    Descriptors(Vec<(i32, String, String)>),
    /// A system call on a passed descriptor failed.
    System(io::Error),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(found) => write!(f, "LISTEN_FDS={found} is not a number of descriptors"),
            Self::Descriptors(wrong) => {
                for (i, (fd, name, what)) in wrong.iter().enumerate() {
                    let separator = if i == 0 { "" } else { "\n" };
                    write!(
                        f,
                        "{separator}fd {fd} ({name}) is {what}; expected a listening AF_UNIX stream socket \
                         (ListenStream=PATH with Accept=no)"
                    )?;
                }
                Ok(())
            }
            Self::System(error) => write!(f, "preparing a passed socket: {error}"),
        }
    }
}

impl std::error::Error for Refused {}

/// Takes over the descriptors that the service manager passed to this process, and clears LISTEN_PID and LISTEN_FDS.
///
/// A listening AF_UNIX stream socket is served, whatever its name: a socket unit may give it any
/// (`FileDescriptorName=`). Another descriptor is returned unchecked if `is_kept` says of its name that the service has
/// stored it (`FDSTORE=1`, `FDNAME=`), and is an error if not. From now on a peer cannot send descriptors when it connects
/// to the listeners (Linux 6.16; see [`fd_passing`]).
///
/// # Errors
/// [`Refused`] names each descriptor of the wrong type.
pub fn adopt(is_kept: impl Fn(&str) -> bool) -> Result<Passed, Refused> {
    let declared = match Declared::from_env() {
        Ok(Some(declared)) => declared,
        Ok(None) => return Ok(Passed::default()),
        Err(Ignored::Reason(reason)) => return Ok(Passed { ignored: Some(reason), ..Passed::default() }),
        Err(Ignored::Refused(refused)) => return Err(refused),
    };
    let mut fds = ListenFd::from_env();
    let mut passed = Passed::default();
    let mut wrong = Vec::new();
    for index in 0..declared.count {
        let name = declared.names.get(index).cloned().unwrap_or_else(|| "unknown".to_owned());
        let Ok(Some(number)) = fds.take_raw_fd(index) else { break };
        let fd = match sys::adopt_fd(number) {
            Ok(fd) => fd,
            // All numbers after it are not open either: one message is enough.
            Err(_) => {
                wrong.push((number, name, "not open".to_owned()));
                break;
            }
        };
        match describe(&fd) {
            PassedKind::Listener => passed.listeners.push(inherit(fd).map_err(Refused::System)?),
            PassedKind::Other(_) if is_kept(&name) => passed.kept.push((name, fd)),
            PassedKind::Other(what) => wrong.push((number, name, what)),
        }
    }
    if wrong.is_empty() { Ok(passed) } else { Err(Refused::Descriptors(wrong)) }
}

/// The content of LISTEN_FDS and LISTEN_FDNAMES, before the descriptors are checked.
#[derive(Debug, PartialEq, Eq)]
struct Declared {
    count: usize,
    names: Vec<String>,
}

#[derive(Debug)]
enum Ignored {
    Reason(String),
    Refused(Refused),
}

/// An environment variable, if it is set.
type Variable = Option<String>;

impl Declared {
    fn from_env() -> Result<Option<Self>, Ignored> {
        let text = |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self::parse(text("LISTEN_FDS"), text("LISTEN_PID"), text("LISTEN_FDNAMES"), std::process::id())
    }

    /// As sd_listen_fds(3), and stricter than listenfd: LISTEN_PID must be set, to this process.
    fn parse(fds: Variable, pid: Variable, names: Variable, me: u32) -> Result<Option<Self>, Ignored> {
        let Some(fds) = fds else { return Ok(None) };
        let ignored = |why: String| Err(Ignored::Reason(why));
        match pid.as_deref() {
            None | Some("") => return ignored("LISTEN_FDS is set but LISTEN_PID is not: ignored".to_owned()),
            Some(pid) if pid.parse() != Ok(me) => {
                return ignored(format!("LISTEN_PID={pid} is not this process ({me}): LISTEN_FDS ignored"));
            }
            Some(_) => {}
        }
        let count = match fds.parse::<usize>() {
            Ok(count) if count <= MOST_DESCRIPTORS => count,
            _ => return Err(Ignored::Refused(Refused::Count(fds))),
        };
        let names: Vec<String> = names.map(|names| names.split(':').map(str::to_owned).collect()).unwrap_or_default();
        // With another number of names it is not known which descriptor a name belongs to.
        let names = if names.len() == count { names } else { Vec::new() };
        Ok(Some(Self { count, names }))
    }
}

/// How many descriptors LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES declare to process `me`, and their names if there is
/// one for each; or why they are ignored. Public only for the fuzz target.
#[doc(hidden)]
pub fn declared(
    fds: Variable,
    pid: Variable,
    names: Variable,
    me: u32,
) -> Result<Option<(usize, Vec<String>)>, String> {
    match Declared::parse(fds, pid, names, me) {
        Ok(declared) => Ok(declared.map(|declared| (declared.count, declared.names))),
        Err(Ignored::Reason(reason)) => Err(reason),
        Err(Ignored::Refused(refused)) => Err(refused.to_string()),
    }
}

/// The type of a passed descriptor.
#[derive(Debug, PartialEq, Eq)]
enum PassedKind {
    Listener,
    Other(String),
}

fn describe(fd: &OwnedFd) -> PassedKind {
    let other = |what: &str| PassedKind::Other(what.to_owned());
    let Ok(stat) = fstat(fd) else { return other("unreadable") };
    let format = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if format != SFlag::S_IFSOCK {
        return other(match format {
            SFlag::S_IFREG => "a regular file",
            SFlag::S_IFDIR => "a directory",
            SFlag::S_IFIFO => "a pipe or FIFO",
            SFlag::S_IFCHR => "a character device",
            _ => "no socket",
        });
    }
    let family = match getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|address| address.family()) {
        Some(AddressFamily::Unix) => "AF_UNIX",
        Some(AddressFamily::Inet) => "AF_INET",
        Some(AddressFamily::Inet6) => "AF_INET6",
        Some(AddressFamily::Netlink) => "AF_NETLINK",
        Some(AddressFamily::Vsock) => "AF_VSOCK",
        _ => "other-family",
    };
    let kind = match getsockopt(fd, sockopt::SockType) {
        Ok(SockType::Stream) => "stream",
        Ok(SockType::Datagram) => "datagram",
        Ok(SockType::SeqPacket) => "sequential-packet",
        _ => "other-type",
    };
    let listening = getsockopt(fd, sockopt::AcceptConn).unwrap_or(false);
    match (family, kind, listening) {
        ("AF_UNIX", "stream", true) => PassedKind::Listener,
        ("AF_UNIX", "stream", false) => other("an AF_UNIX stream socket that does not listen (Accept=yes?)"),
        (_, _, true) => PassedKind::Other(format!("a listening {family} {kind} socket")),
        (_, _, false) => PassedKind::Other(format!("an {family} {kind} socket")),
    }
}

fn inherit(fd: OwnedFd) -> io::Result<Listener> {
    let socket = UnixListener::from(fd);
    socket.set_nonblocking(true)?;
    let fd = OwnedFd::from(socket);
    fd_passing::refuse(&fd);
    let address = address_of(&fd)?;
    Ok(Listener { fd, address, bound: None })
}

/// The address an AF_UNIX socket is bound to, or was accepted at: a path, or `@name` in the abstract namespace.
///
/// # Errors
/// What getsockname(2) reports.
pub fn address_of(socket: &impl AsFd) -> io::Result<Arc<str>> {
    let address: UnixAddr = getsockname(socket.as_fd().as_raw_fd())?;
    Ok(match (address.path(), address.as_abstract()) {
        (Some(path), _) => path.to_string_lossy().into(),
        (None, Some(name)) => format!("@{}", String::from_utf8_lossy(name)).into(),
        (None, None) => "unnamed".into(),
    })
}

/// Why [`bind`] could not make a listener.
#[derive(Debug)]
#[non_exhaustive]
pub enum BindError {
    /// The path does not fit into a socket address; its length in bytes.
    TooLong(PathBuf, usize),
    /// Another service listens there.
    InUse(PathBuf),
    /// A file that is not a stale socket is there.
    Occupied(PathBuf, &'static str),
    /// A system call failed.
    System(PathBuf, io::Error),
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(path, length) => write!(
                f,
                "{}: a socket path of {length} bytes; expected at most {LONGEST_PATH} (unix(7))",
                path.display()
            ),
            Self::InUse(path) => write!(f, "{}: another process listens there already", path.display()),
            Self::Occupied(path, what) => {
                write!(
                    f,
                    "{}: there is {what}; expected nothing, or a socket on which no process listens",
                    path.display()
                )
            }
            Self::System(path, error) => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for BindError {}

/// Binds and listens at `path`, open to every local user (mode 0666), because the policy decides. The file is removed when
/// the listener is dropped. A peer cannot send descriptors when it connects, as with [`adopt`].
///
/// A stale socket is replaced, and a socket that is in use stays. The umask is changed for a moment: call this before
/// another thread creates files.
///
/// # Errors
/// [`BindError`] says why not.
pub fn bind(path: impl AsRef<Path>) -> Result<Listener, BindError> {
    bind::listener(path.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixStream;

    fn parse(fds: &str, pid: Option<&str>, names: Option<&str>) -> Result<Option<Declared>, Ignored> {
        Declared::parse(Some(fds.into()), pid.map(Into::into), names.map(Into::into), 42)
    }

    fn directory() -> PathBuf {
        nix::unistd::mkdtemp(&std::env::temp_dir().join("activation-test-XXXXXX")).unwrap()
    }

    /// A connect(2) that waits for room in the backlog would delay the start.
    #[test]
    fn a_service_whose_queue_is_full_is_in_use() {
        let directory = directory();
        let path = directory.join("socket");
        let listener = bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        assert!(matches!(bind(&path), Err(BindError::InUse(in_use)) if in_use == path));
        drop(listener);
        fs::remove_dir(directory).unwrap();
    }

    #[test]
    fn descriptors_of_another_process_are_ignored_with_the_reason() {
        for pid in [Some("43"), Some("x"), Some(""), Some("042x"), None] {
            assert!(matches!(parse("1", pid, None), Err(Ignored::Reason(_))), "{pid:?}");
        }
    }

    #[test]
    fn an_impossible_count_is_refused() {
        for count in ["-1", "x", "", "1048577", "99999999999999999999"] {
            assert!(matches!(parse(count, Some("42"), None), Err(Ignored::Refused(Refused::Count(_)))), "{count}");
        }
    }

    #[test]
    fn names_count_only_when_there_is_one_for_each() {
        let names = |text| parse("2", Some("42"), Some(text)).unwrap().unwrap().names;
        assert_eq!(names("a:b"), ["a", "b"]);
        assert!(names("a").is_empty());
        assert!(names("a:b:c").is_empty());
    }
}
