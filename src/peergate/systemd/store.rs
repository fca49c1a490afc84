//! The service manager's descriptor store.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::notify::{Notifier, NotifyState, message};
use super::outlet::Outlet;
use crate::clock::{later, poll_timeout};

/// The service manager's store for descriptors that are to outlive this process (FDSTORE=1 in
/// sd_notify(3), FileDescriptorStoreMax= in systemd.service(5)).
#[derive(Clone, Debug)]
pub struct Store {
    capacity: usize,
    outlet: Option<Outlet>,
}

/// How long a manager that does not read may keep a message of the store waiting.
const TAKEN_WITHIN: Duration = Duration::from_secs(20);

/// How many milliseconds the manager may take to close what it has decided to close. It holds up every restart.
const CLOSED_WITHIN: u8 = 20;

/// What sendmsg(2) takes at once: SCM_MAX_FD is 253.
const MOST_AT_ONCE: usize = 250;

impl Store {
    /// How many descriptors the store takes: `$FDSTORE` (systemd 254), else the variable named by
    /// `fallback`, for older systemds. Zero where there is neither or no service manager.
    pub fn from_env(fallback: &str) -> Self {
        let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
        // No service manager with a store has its socket in the abstract namespace.
        let is_abstract =
            std::env::var_os("NOTIFY_SOCKET").is_some_and(|path| path.as_encoded_bytes().starts_with(b"@"));
        let outlet = Notifier::from_env().outlet;
        let present = outlet.is_some() && !is_abstract;
        let capacity = number("FDSTORE").or_else(|| number(fallback)).filter(|_| present).unwrap_or(0);
        Self { capacity, outlet }
    }

    /// How many descriptors it takes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Puts `fds` into the store under one name. Returns before the manager has them: see [`settle`](Self::settle).
    ///
    /// # Errors
    /// NotConnected where there is no store; TimedOut where the manager does not read for 20 seconds; what sending says.
    /// Some of them may have been stored by then.
    pub fn put(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let message = message(&[NotifyState::FdStore, NotifyState::FdName(name)]);
        let outlet = self.outlet()?;
        fds.chunks(MOST_AT_ONCE).try_for_each(|batch| outlet.send_with(&message, batch, TAKEN_WITHIN))
    }

    fn outlet(&self) -> io::Result<&Outlet> {
        self.outlet.as_ref().filter(|_| self.capacity > 0).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Takes everything stored under `name` out of the store again: also what an earlier process put there, whatever
    /// this one was told of the capacity. A manager that does not read at the moment is told later.
    pub fn forget(&self, name: &str) {
        if let Some(outlet) = &self.outlet {
            let message = message(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
            outlet.send(message.clone(), message);
        }
    }

    /// Whether the manager holds everything that was [`put`](Self::put) so far. It tells nobody what finds no room, and
    /// closes it: so one more descriptor is put, under `name`, whose other end tells whether it is still open, and is
    /// forgotten again. To be asked last; `name` is to be of no other use.
    ///
    /// # Errors
    /// TimedOut when the manager has not come to it within `patience`; what making a pipe or sending says.
    pub fn holds_all(&self, name: &str, patience: Duration) -> io::Result<bool> {
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        self.put(name, &[theirs.as_fd()])?;
        drop(theirs);
        self.settle(patience)?;
        // The manager leaves closing to a process of its own (systemd 254), which has been started by now.
        let mut question = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        let is_closed = poll(&mut question, PollTimeout::from(CLOSED_WITHIN))? > 0;
        self.forget(name);
        Ok(!is_closed)
    }

    /// Waits until the manager has dealt with everything sent so far (`BARRIER=1`, systemd 246): it
    /// closes its end of a pipe when it comes to it.
    ///
    /// # Errors
    /// TimedOut when it has not within `patience`; NotConnected where there is no store; what making the pipe or sending
    /// says.
    pub fn settle(&self, patience: Duration) -> io::Result<()> {
        let outlet = self.outlet()?;
        let until = later(Instant::now(), patience);
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        outlet.send_with(&message(&[NotifyState::Custom("BARRIER=1")]), &[theirs.as_fd()], patience)?;
        drop(theirs);
        let mut question = [PollFd::new(ours.as_fd(), PollFlags::empty())];
        match poll(&mut question, poll_timeout(Some(until)))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_for_stored_where_there_is_no_store() {
        let (store, (ours, _theirs)) =
            (Store { capacity: 0, outlet: None }, std::os::unix::net::UnixDatagram::pair().unwrap());
        assert_eq!(store.put("x", &[ours.as_fd()]).unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert_eq!(store.settle(Duration::ZERO).unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
