//! One thread wakes another.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Wakes one thread that waits in poll(2) when other threads have news for it. While it does not wait, a notification
/// costs one atomic read. Between two calls of [`arm`](Self::arm) it wakes at most once.
#[derive(Debug)]
pub struct Wakeup {
    awaited: AtomicBool,
    event: EventFd,
}

impl Wakeup {
    /// No thread waits yet.
    ///
    /// # Errors
    /// What eventfd(2) reports.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { awaited: AtomicBool::new(false), event })
    }

    /// There is news for the thread.
    pub fn notify(&self) {
        if self.awaited.load(Ordering::SeqCst) && self.awaited.swap(false, Ordering::SeqCst) {
            let _ = self.event.write(1);
        }
    }

    /// Lets the next notification make the descriptor readable. An earlier one does not: look for news once more after
    /// this call.
    pub fn arm(&self) {
        self.awaited.store(true, Ordering::SeqCst);
    }

    /// Makes the descriptor unreadable, until the first notification after the next [`arm`](Self::arm).
    pub fn clear(&self) {
        let _ = self.event.read();
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
