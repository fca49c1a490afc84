//! File descriptors held open only to be closed when the process has no others left.
//!
//! Asking the kernel about a peer takes descriptors: the accepted socket, a pidfd, one file below /proc at a time. A process
//! at its limit (RLIMIT_NOFILE, getrlimit(2)) could neither accept a connection, so that the listener would stay readable
//! and the gate would spin, nor judge a live connection again after a reload. So some descriptors are reserved. They are
//! closed for the length of one question and opened again.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Enough to accept a connection and to judge it, and enough to leave connections to the next process once no more are
/// accepted.
const SIZE: usize = 4;

/// The reserve of one gate, shared by every thread that judges for it.
pub(super) struct Reserve(Mutex<Spare>);

struct Spare {
    fds: Vec<OwnedFd>,
    size: usize,
}

/// The reserve in the hands of one thread. No other thread of the gate accepts meanwhile: an accepted connection would take
/// a descriptor that was freed for a question.
pub(super) struct Held<'a>(MutexGuard<'a, Spare>);

impl Reserve {
    /// A full one.
    pub(super) fn new() -> io::Result<Self> {
        let reserve = Self(Mutex::new(Spare { fds: Vec::new(), size: SIZE }));
        reserve.hold().refill()?;
        Ok(reserve)
    }

    pub(super) fn hold(&self) -> Held<'_> {
        Held(self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// `None` while another thread holds it.
    pub(super) fn try_hold(&self) -> Option<Held<'_>> {
        match self.0.try_lock() {
            Ok(spare) => Some(Held(spare)),
            Err(TryLockError::Poisoned(spare)) => Some(Held(spare.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Held<'_> {
    /// Closes the reserved descriptors. False where there were none.
    pub(super) fn free(&mut self) -> bool {
        let some = !self.0.fds.is_empty();
        self.0.fds.clear();
        some
    }

    /// Opens as many as are missing.
    pub(super) fn refill(&mut self) -> io::Result<()> {
        while self.0.fds.len() < self.0.size {
            self.0.fds.push(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?.into());
        }
        Ok(())
    }

    /// Closes them for good: what follows the last accept needs descriptors too.
    pub(super) fn give_up(&mut self) {
        self.0.size = 0;
        self.0.fds.clear();
    }
}
