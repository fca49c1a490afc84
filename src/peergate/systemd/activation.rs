//! Sole owner of LISTEN_*: what systemd passed becomes listeners and kept descriptors, each checked.
//!
//! The protocol is sd_listen_fds(3)'s. Call [`adopt`] before the process has a second thread: the
//! environment is read and cleared here. Where there is no systemd, [`bind`] makes a listener.

mod bind;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use listenfd::ListenFd;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, UnixAddr, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};

use crate::fd_passing::{self, Stream};
use crate::sys;

/// More descriptors than systemd would ever pass; a number above it is a mistake, not a request.
const MOST_DESCRIPTORS: usize = 1 << 20;

/// What a path in `sockaddr_un` may hold, unix(7): 108 bytes less the closing NUL.
const LONGEST_PATH: usize = 107;

/// A listening AF_UNIX stream socket, non-blocking and close-on-exec.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: Arc<str>,
    /// The file that [`bind`] made, to be removed with the listener.
    bound: Option<bind::Bound>,
}

impl Listener {
    /// Where clients find it: a path, or `@name` in the abstract namespace.
    pub fn address(&self) -> &Arc<str> {
        &self.address
    }

    /// The same socket as the standard library's type, for a runtime that wants it; non-blocking already. Keep
    /// the listener: with it goes the file that [`bind`] made.
    ///
    /// # Errors
    /// What duplicating the descriptor says, fcntl(2).
    pub fn to_std(&self) -> io::Result<UnixListener> {
        self.fd.try_clone().map(UnixListener::from)
    }

    /// The next one who waits to be let in; non-blocking, close-on-exec. For whoever has no [`Door`](crate::Door).
    ///
    /// # Errors
    /// What accept(2) says; EAGAIN where nobody waits.
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
    /// Removes the file that [`bind`] made, unless somebody has put another in its place.
    /// An inherited listener is only closed: the socket is systemd's.
    fn drop(&mut self) {
        let Some(bound) = &self.bound else { return };
        bound.remove();
        // Who still waits is closed with the socket, and what they have sent along with them; here that keeps nobody.
        while self.accept().is_ok() {}
    }
}

/// What the service manager passed.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Passed {
    /// The sockets to serve, in the order given.
    pub listeners: Vec<Listener>,
    /// Descriptors that an earlier process of this service put into the manager's store, by name.
    pub kept: Vec<(String, OwnedFd)>,
    /// Why LISTEN_* was there but is none of our business, for a log or an error message.
    pub ignored: Option<String>,
}

/// Why what was passed cannot be served.
#[derive(Debug)]
#[non_exhaustive]
pub enum Refused {
    /// LISTEN_FDS makes no sense.
    Count(String),
    /// Some descriptors are not what they should be: number, name, what it is instead.
    Descriptors(Vec<(i32, String, String)>),
    /// The kernel refused to prepare a descriptor.
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

/// Adopts what the service manager passed to this very process, and clears LISTEN_PID and LISTEN_FDS.
///
/// `is_kept` tells by its name whether a descriptor is one that this service stored itself
/// (`FDSTORE=1`, `FDNAME=`); such are handed back unexamined, unless they are what is served: a socket
/// unit may call its socket as it likes (`FileDescriptorName=`). Every other must be a listening
/// AF_UNIX stream socket. Who connects to it from now on can send no descriptors (Linux 6.16; see
/// [`fd_passing`]).
///
/// # Errors
/// [`Refused`] names each descriptor that is something else, and what it is.
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
            // Beyond the last open one every number is wrong; one of them says it all.
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

/// What the environment says, read but not yet believed.
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

impl Declared {
    fn from_env() -> Result<Option<Self>, Ignored> {
        let text = |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self::parse(text("LISTEN_FDS"), text("LISTEN_PID"), text("LISTEN_FDNAMES"), std::process::id())
    }

    /// sd_listen_fds(3), stricter than listenfd: without a LISTEN_PID that is ours, nothing is ours.
    fn parse(
        fds: Option<String>,
        pid: Option<String>,
        names: Option<String>,
        me: u32,
    ) -> Result<Option<Self>, Ignored> {
        let Some(fds) = fds else { return Ok(None) };
        match pid.as_deref() {
            None | Some("") => {
                return Err(Ignored::Reason("LISTEN_FDS is set but LISTEN_PID is not: ignored".to_owned()));
            }
            Some(pid) if pid.parse() != Ok(me) => {
                return Err(Ignored::Reason(format!(
                    "LISTEN_PID={pid} is not this process ({me}): LISTEN_FDS ignored"
                )));
            }
            Some(_) => {}
        }
        let count = match fds.parse::<usize>() {
            Ok(count) if count <= MOST_DESCRIPTORS => count,
            _ => return Err(Ignored::Refused(Refused::Count(fds))),
        };
        let names: Vec<String> = names.map(|names| names.split(':').map(str::to_owned).collect()).unwrap_or_default();
        // As many names as descriptors, or none can be trusted to belong to its neighbour.
        let names = if names.len() == count { names } else { Vec::new() };
        Ok(Some(Self { count, names }))
    }
}

/// How many descriptors LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES declare to process `me`, and their names if there is
/// one for each; or why they are not heeded. Public for the fuzz target alone.
#[doc(hidden)]
pub fn declared(
    fds: Option<String>,
    pid: Option<String>,
    names: Option<String>,
    me: u32,
) -> Result<Option<(usize, Vec<String>)>, String> {
    match Declared::parse(fds, pid, names, me) {
        Ok(declared) => Ok(declared.map(|declared| (declared.count, declared.names))),
        Err(Ignored::Reason(reason)) => Err(reason),
        Err(Ignored::Refused(refused)) => Err(refused.to_string()),
    }
}

/// What a passed descriptor is.
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
    let family = match getsockname::<SockaddrStorage>(fd.as_raw_fd()) {
        Ok(address) => address.family(),
        Err(_) => None,
    };
    let family = match family {
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
    set_nonblocking(&fd)?;
    fd_passing::refuse_from_all(&fd);
    let address = address_of(&fd)?;
    Ok(Listener { fd, address, bound: None })
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// The address an AF_UNIX socket is bound to, or was accepted at: a path, or `@name` in the abstract
/// namespace.
///
/// # Errors
/// What getsockname(2) says.
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
    /// Somebody answers there.
    InUse(PathBuf),
    /// Something that is not a stale socket is in the way.
    Occupied(PathBuf, &'static str),
    /// The system refused.
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
            Self::InUse(path) => write!(f, "{}: somebody listens there already", path.display()),
            Self::Occupied(path, what) => {
                write!(f, "{}: there is {what}; expected nothing, or a socket nobody listens on", path.display())
            }
            Self::System(path, error) => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for BindError {}

/// Binds and listens at `path`, open to every local user (mode 0666): the policy decides who may stay.
/// The file is removed when the listener is dropped. Who connects can send no descriptors, as with [`adopt`].
///
/// A stale socket there is replaced; one on which somebody still listens is left alone. The umask is changed for a moment:
/// call this before another thread makes files.
///
/// # Errors
/// [`BindError`] says what is in the way.
pub fn bind(path: &Path) -> Result<Listener, BindError> {
    bind::listener(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixStream;

    fn parse(fds: &str, pid: Option<&str>, names: Option<&str>) -> Result<Option<Declared>, Ignored> {
        Declared::parse(Some(fds.into()), pid.map(Into::into), names.map(Into::into), 42)
    }

    fn directory(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("activation-test-{name}-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        directory
    }

    /// A connect(2) that waits for room in the queue would hold up the start.
    #[test]
    fn a_service_whose_queue_is_full_is_in_use() {
        let directory = directory("full");
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
