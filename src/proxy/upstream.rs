//! The service behind the gate: its address, and connecting to it.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use peergate::fd_passing;

/// Bytes that fit into an address (unix(7)): a path with the NUL after it, or a name with the NUL before it.
const LONGEST: usize = 107;

/// Where a service listens.
#[derive(Clone, PartialEq, Eq)]
pub struct Upstream {
    text: Arc<str>,
    address: UnixAddr,
}

impl Upstream {
    /// Of an absolute path, or of `@name` in the abstract namespace. `None` where it is neither, or too long.
    pub fn parse(text: &str) -> Option<Self> {
        let address = match text.strip_prefix('@') {
            Some(name) if !name.is_empty() && name.len() <= LONGEST => UnixAddr::new_abstract(name.as_bytes()),
            None if text.starts_with('/') && text.len() <= LONGEST => UnixAddr::new(Path::new(text)),
            _ => return None,
        };
        Some(Self { text: text.into(), address: address.ok()? })
    }

    /// As the configuration has it.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// The path, unless it is an abstract name.
    pub fn path(&self) -> Option<&Path> {
        self.address.path()
    }

    /// As the standard library has addresses.
    ///
    /// # Errors
    /// None, for an address that was parsed.
    pub fn to_std(&self) -> io::Result<SocketAddr> {
        match self.address.as_abstract() {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(&*self.text),
        }
    }

    /// Connects a socket to it. Never waits.
    ///
    /// # Errors
    /// What connect(2) says.
    pub fn connect(&self, socket: OwnedFd) -> Result<OwnedFd, Errno> {
        connect(socket.as_raw_fd(), &self.address)?;
        Ok(socket)
    }
}

/// A socket to connect, non-blocking and close-on-exec. Unless `passes`, the kernel refuses descriptors from the service: refused
/// before there is a connection, none can lie in it, and no read has to look for some.
///
/// # Errors
/// What socket(2) says.
pub fn new_socket(passes: bool) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    if !passes {
        fd_passing::refuse(&socket);
    }
    Ok(socket)
}

/// Whether a service that cannot be reached for this reason may be reachable soon: it is not started yet, is being restarted,
/// or has more connections to accept than its backlog holds.
pub fn is_temporary(error: Errno) -> bool {
    matches!(
        error,
        Errno::EAGAIN
            | Errno::ECONNREFUSED
            | Errno::ENOENT
            | Errno::EINTR
            | Errno::EMFILE
            | Errno::ENFILE
            | Errno::ENOBUFS
            | Errno::ENOMEM
    )
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upstream({:?})", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself_is_waited_for_and_nothing_else() {
        let waited_for = ["EAGAIN", "ECONNREFUSED", "ENOENT", "EINTR", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"];
        let found: Vec<_> = (1..134)
            .map(Errno::from_raw)
            .filter(|error| is_temporary(*error))
            .map(|error| format!("{error:?}"))
            .collect();
        let mut expected = waited_for.map(str::to_owned);
        expected.sort_by_key(|name| found.iter().position(|one| one == name));
        assert_eq!(found, expected);
    }
}
