//! The service manager's file descriptor store.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

use super::notify::{Notifier, NotifyState, message};
use super::outlet::Outlet;
use crate::clock::{later, poll_timeout};

/// The service manager's store for descriptors that outlive this process (FDSTORE=1 in sd_notify(3),
/// FileDescriptorStoreMax= in systemd.service(5)).
#[derive(Clone, Debug)]
pub struct Store {
    /// The manager has no store, or has said that it takes nothing.
    is_closed: bool,
    /// The manager has said how much it takes.
    says_capacity: bool,
    outlet: Option<Outlet>,
}

/// How many milliseconds the manager may take to close a descriptor that it does not keep, after it has closed the one of
/// the barrier. Before systemd 254 it has closed it by then; later versions have a process for each, and begin with the
/// earlier one. Every restart takes so long.
const CLOSED_WITHIN: u8 = 5;

impl Store {
    /// The store of the manager at `$NOTIFY_SOCKET`. `$FDSTORE` says how many descriptors it takes (systemd 254).
    pub fn from_env() -> Self {
        let said = std::env::var("FDSTORE").ok().and_then(|number| number.parse::<usize>().ok());
        // No service manager with a store has its socket in the abstract namespace.
        let is_abstract =
            std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| path.as_encoded_bytes().starts_with(b"@"));
        let outlet = Notifier::from_env().outlet;
        Self { is_closed: is_abstract || said == Some(0), says_capacity: said.is_some(), outlet }
    }

    /// Whether there is a service manager that may keep a descriptor.
    pub fn is_present(&self) -> bool {
        self.outlet.is_some() && !self.is_closed
    }

    /// Puts one descriptor into the store under `name` and waits until the manager has processed it. The manager does not
    /// watch it: it keeps a socket whose other end is closed (`FDPOLL=0`, systemd 246). Also tried if the manager does not
    /// say how much it takes (before systemd 254).
    ///
    /// # Errors
    /// NotConnected if there is no store; TimedOut after `patience`; what sendmsg(2) reports.
    pub(crate) fn put_unwatched(&self, name: &str, fd: BorrowedFd<'_>, patience: Duration) -> io::Result<()> {
        let until = later(Instant::now(), patience);
        let outlet = self.outlet.as_ref().filter(|_| !self.is_closed).ok_or(io::ErrorKind::NotConnected)?;
        let state = [NotifyState::FdStore, NotifyState::Custom("FDPOLL=0"), NotifyState::FdName(name)];
        outlet.send_with(&message(&state), &[fd], patience)?;
        barrier(outlet, until)
    }

    /// How many milliseconds after a barrier the manager may still close a descriptor that it does not keep. A manager that
    /// has said that it has room keeps it.
    pub(crate) fn closes_within(&self) -> u8 {
        if self.says_capacity { 0 } else { CLOSED_WITHIN }
    }

    #[cfg(test)]
    pub(crate) fn at(address: &std::path::Path) -> Self {
        Self { is_closed: false, says_capacity: false, outlet: Outlet::to(address.as_os_str()) }
    }

    /// Removes all descriptors of this name from the store, also the ones of an earlier process. If the manager does not read
    /// at the moment, the message is sent later.
    pub fn forget(&self, name: &str) {
        if let Some(outlet) = &self.outlet {
            let message = message(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
            outlet.send(message.clone(), message);
        }
    }
}

fn barrier(outlet: &Outlet, until: Instant) -> io::Result<()> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let left = until.saturating_duration_since(Instant::now());
    outlet.send_with(&message(&[NotifyState::Custom("BARRIER=1")]), &[theirs.as_fd()], left)?;
    drop(theirs);
    match poll(&mut [PollFd::new(ours.as_fd(), PollFlags::empty())], poll_timeout(Some(until)))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}
