//! One thread wakes another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Tells one thread that others have done something worth a look, at most once until it has looked:
/// threads that are busy pay for one atomic read, and a service that is idle wakes nobody.
#[derive(Debug)]
pub struct Wakeup {
    awaited: AtomicBool,
    event: EventFd,
}

impl Wakeup {
    /// Nothing has happened yet, and nobody waits.
    ///
    /// # Errors
    /// What eventfd(2) says.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { awaited: AtomicBool::new(false), event })
    }

    /// Something happened.
    pub fn notify(&self) {
        if self.awaited.load(Ordering::SeqCst) && self.awaited.swap(false, Ordering::SeqCst) {
            let _ = self.event.write(1);
        }
    }

    /// Asks for the next notification to make the descriptor readable. Look once more after this call: what
    /// happened before it does not.
    pub fn arm(&self) {
        self.awaited.store(true, Ordering::SeqCst);
    }

    /// Makes the descriptor unreadable again, until the first notification after the next [`arm`](Self::arm).
    pub fn clear(&self) {
        let _ = self.event.read();
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
