//! The service manager's file descriptor store.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::notify::{Notifier, NotifyState, message};
use super::outlet::Outlet;
use crate::clock::{later, poll_timeout};

/// The service manager's store for descriptors that outlive this process (FDSTORE=1 in sd_notify(3),
/// FileDescriptorStoreMax= in systemd.service(5)).
#[derive(Clone, Debug)]
pub struct Store {
    capacity: usize,
    /// The manager has no store, or has said that it takes nothing.
    is_closed: bool,
    /// The manager has said how much it takes.
    says_capacity: bool,
    outlet: Option<Outlet>,
}

/// How long a message to the store may wait for a manager that does not read.
const TAKEN_WITHIN: Duration = Duration::from_secs(20);

/// How many milliseconds the manager may take to close a descriptor that it does not keep. Every restart takes so long.
const CLOSED_WITHIN: u8 = 20;

/// How many descriptors one message carries; sendmsg(2) takes 253 (SCM_MAX_FD).
const MOST_AT_ONCE: usize = 250;

impl Store {
    /// Reads the capacity from `$FDSTORE` (systemd 254), else from the variable named by `fallback`, for older systemds.
    /// It is zero without these, and without a service manager.
    pub fn from_env(fallback: &str) -> Self {
        let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
        // No service manager with a store has its socket in the abstract namespace.
        let is_abstract =
            std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| path.as_encoded_bytes().starts_with(b"@"));
        let outlet = Notifier::from_env().outlet;
        let present = outlet.is_some() && !is_abstract;
        let said = number("FDSTORE");
        let capacity = said.or_else(|| number(fallback)).filter(|_| present).unwrap_or(0);
        Self { capacity, is_closed: is_abstract || said == Some(0), says_capacity: said.is_some(), outlet }
    }

    /// Whether there is a service manager that may keep a descriptor.
    pub fn is_present(&self) -> bool {
        self.outlet.is_some() && !self.is_closed
    }

    /// How many descriptors it takes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Puts `fds` into the store under one name. The manager receives them later: see [`settle`](Self::settle).
    ///
    /// # Errors
    /// NotConnected if there is no store; TimedOut if the manager does not read for 20 seconds; what sendmsg(2) reports.
    /// Some of `fds` may be stored all the same.
    pub fn put(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let message = message(&[NotifyState::FdStore, NotifyState::FdName(name)]);
        let outlet = self.outlet()?;
        fds.chunks(MOST_AT_ONCE).try_for_each(|batch| outlet.send_with(&message, batch, TAKEN_WITHIN))
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
        Self { capacity: 0, is_closed: false, says_capacity: false, outlet: Outlet::to(address.as_os_str()) }
    }

    fn outlet(&self) -> io::Result<&Outlet> {
        self.outlet.as_ref().filter(|_| self.capacity > 0).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Removes all descriptors of this name from the store, also the ones of an earlier process. If the manager does not read
    /// at the moment, the message is sent later.
    pub fn forget(&self, name: &str) {
        if let Some(outlet) = &self.outlet {
            let message = message(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
            outlet.send(message.clone(), message);
        }
    }

    /// Whether the manager holds every descriptor that was [`put`](Self::put) so far.
    ///
    /// The manager closes a descriptor that finds no room, without a message. So one end of a pipe is put into the store
    /// last, under `name`, and removed again: if the manager has closed it, the other end hangs up. `name` must have no
    /// other use.
    ///
    /// # Errors
    /// TimedOut if the manager does not answer within `patience`; what pipe(2) or sendmsg(2) reports.
    pub fn holds_all(&self, name: &str, patience: Duration) -> io::Result<bool> {
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        self.put(name, &[theirs.as_fd()])?;
        drop(theirs);
        self.settle(patience)?;
        // systemd 254 closes in a process of its own, which has been started by now.
        let mut question = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        let is_closed = poll(&mut question, PollTimeout::from(CLOSED_WITHIN))? > 0;
        self.forget(name);
        Ok(!is_closed)
    }

    /// Waits until the manager has processed all messages sent so far (`BARRIER=1`, systemd 246). The manager then closes
    /// the end of a pipe that comes with this message.
    ///
    /// # Errors
    /// TimedOut after `patience`; NotConnected if there is no store; what pipe(2) or sendmsg(2) reports.
    pub fn settle(&self, patience: Duration) -> io::Result<()> {
        barrier(self.outlet()?, later(Instant::now(), patience))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_store_no_descriptor_counts_as_stored() {
        let (store, (ours, _theirs)) = (
            Store { capacity: 0, is_closed: false, says_capacity: false, outlet: None },
            std::os::unix::net::UnixDatagram::pair().unwrap(),
        );
        assert_eq!(store.put("x", &[ours.as_fd()]).unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert_eq!(store.settle(Duration::ZERO).unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
