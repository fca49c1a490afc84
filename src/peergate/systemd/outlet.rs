//! Datagrams to the service manager, sent without waiting for it.
//!
//! The manager, or whatever owns NOTIFY_SOCKET, may not read for a while. Its queue is full then (net.unix.max_dgram_qlen
//! datagrams), and a blocking send would keep the calling thread from hearing signals. So every send has MSG_DONTWAIT.
//! A message that must arrive is kept, and a thread tries it again until it is taken, or the process ends. The number
//! of messages kept is bounded: a later message takes the place of an earlier one of the same kind.
//!
//! The kernel takes no descriptors while processes of this user have more in flight than RLIMIT_NOFILE (ETOOMANYREFS,
//! unix(7)). Another process may receive them at any moment: [`InFlight`].

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

/// How soon a kept message is tried again: at first, and at last.
const SOON: Duration = Duration::from_millis(10);
const LATE: Duration = Duration::from_millis(500);

/// How long descriptors of other processes may be in flight, in all.
const IN_FLIGHT: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How long descriptors of other processes have been waited for.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    waited: Duration,
}

impl InFlight {
    /// Sends again where the kernel takes no more descriptors, until two seconds have been waited in all.
    pub(crate) fn wait_while_full<T>(&mut self, mut send: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
        loop {
            match send() {
                Err(Errno::ETOOMANYREFS) if self.waited < IN_FLIGHT => {
                    thread::sleep(LOOK_AGAIN);
                    self.waited += LOOK_AGAIN;
                }
                other => return other,
            }
        }
    }
}

/// Clones share the socket and the messages kept.
#[derive(Clone, Debug)]
pub(super) struct Outlet(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Open from the start: the watchdog must be fed when there are no descriptors left.
    socket: UnixDatagram,
    manager: UnixAddr,
    kept: Mutex<Kept>,
}

/// Messages that were not taken, oldest first, each with its kind.
#[derive(Debug, Default)]
struct Kept {
    messages: VecDeque<(String, String)>,
    has_thread: bool,
}

impl Outlet {
    /// To the socket of this address, in the form of NOTIFY_SOCKET; `None` if that is no address.
    pub(super) fn to(address: &OsStr) -> Option<Self> {
        let manager = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => UnixAddr::new_abstract(name),
            None => UnixAddr::new(address),
        };
        let (socket, manager) = (UnixDatagram::unbound().ok()?, manager.ok()?);
        Some(Self(Arc::new(Inner { socket, manager, kept: Mutex::default() })))
    }

    /// Sends a message that need not arrive, because the next one replaces it. Whether it was taken.
    pub(super) fn try_send(&self, message: &str) -> bool {
        self.0.send(message, &[]).is_ok()
    }

    /// Sends a message, now or later. An error means that there is no manager left, and ends here.
    pub(super) fn send(&self, kind: String, message: String) {
        let mut kept = self.0.lock();
        self.0.send_kept(&mut kept);
        if kept.messages.is_empty() && self.0.send(&message, &[]) != Err(Errno::EAGAIN) {
            return;
        }
        kept.messages.retain(|(earlier, _)| *earlier != kind);
        kept.messages.push_back((kind, message));
        if !kept.has_thread {
            let inner = Arc::clone(&self.0);
            // Without a thread it is sent with the next message.
            let thread = thread::Builder::new().name("notify".to_owned()).spawn(move || inner.send_later());
            kept.has_thread = thread.is_ok();
        }
    }

    /// Sends a message with descriptors, after the messages kept.
    ///
    /// # Errors
    /// TimedOut if it is not taken within `patience`; what sendmsg(2) reports.
    pub(super) fn send_with(&self, message: &str, fds: &[BorrowedFd<'_>], patience: Duration) -> io::Result<()> {
        let until = Instant::now() + patience;
        let mut in_flight = InFlight::default();
        loop {
            let mut kept = self.0.lock();
            self.0.send_kept(&mut kept);
            if kept.messages.is_empty() {
                match in_flight.wait_while_full(|| self.0.send(message, fds)) {
                    Err(Errno::EAGAIN) => {}
                    other => return other.map_err(io::Error::from),
                }
            }
            drop(kept);
            if Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(SOON);
        }
    }
}

impl Inner {
    fn send(&self, message: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let parts = [IoSlice::new(message.as_bytes())];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg(self.socket.as_raw_fd(), &parts, rights, flags, Some(&self.manager)) {
                Err(Errno::EINTR) => {}
                other => return other.map(drop),
            }
        }
    }

    /// Sends the messages kept, until one is not taken.
    fn send_kept(&self, kept: &mut Kept) {
        while let Some((_, message)) = kept.messages.front() {
            if self.send(message, &[]) == Err(Errno::EAGAIN) {
                return;
            }
            kept.messages.pop_front();
        }
    }

    fn send_later(&self) {
        let mut pause = SOON;
        loop {
            thread::sleep(pause);
            pause = (pause * 2).min(LATE);
            let mut kept = self.lock();
            self.send_kept(&mut kept);
            if kept.messages.is_empty() {
                kept.has_thread = false;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
