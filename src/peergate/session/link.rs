//! The socket of a live connection. The thread or task that serves it holds it, and the list of live connections knows
//! it. When it is dropped the connection is closed: the end is recorded, the place in the limits is free again, and the peer
//! gets an end of file, never a reset.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
#[cfg(feature = "tokio")]
use std::thread;

use nix::sys::socket::{MsgFlags, send, shutdown};

use super::{Live, Session, lock};
use crate::audit::{Event, Reason};
#[cfg(feature = "tokio")]
use crate::audit::{Record, Severity};
use crate::fd_passing::{Guard, Stream};
use crate::permits::{Permit, Terms};

/// A connected socket, non-blocking, as its reader waits for it.
pub(crate) enum Socket {
    /// By poll(2).
    Plain(OwnedFd),
    /// By tokio's runtime.
    #[cfg(feature = "tokio")]
    Tokio(tokio::net::UnixStream),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Plain(fd) => fd.as_fd(),
            #[cfg(feature = "tokio")]
            Self::Tokio(socket) => socket.as_fd(),
        }
    }
}

impl Socket {
    /// `None` where the runtime does not give it back. It is closed then.
    fn into_fd(self) -> Option<OwnedFd> {
        match self {
            Self::Plain(fd) => Some(fd),
            #[cfg(feature = "tokio")]
            Self::Tokio(socket) => socket.into_std().ok().map(OwnedFd::from),
        }
    }
}

/// The socket of a session.
pub(crate) struct Link<T: Terms> {
    /// `None` only while it is dropped, and after it has been left to the next process.
    socket: Option<Socket>,
    guard: Mutex<Guard>,
    session: Session<T>,
    permit: Option<Permit>,
    live: Arc<Live<T>>,
    received: AtomicU64,
    /// The peer's end of file was read.
    is_at_end: AtomicBool,
    /// The reader was told that the service stops, and that the next process goes on.
    is_left: AtomicBool,
    /// Another process may hold the socket: closing ours does not end the connection.
    is_shared: bool,
}

impl<T: Terms> Link<T> {
    pub(super) fn new(
        (socket, guard): (Socket, Guard),
        session: Session<T>,
        permit: Permit,
        live: &Arc<Live<T>>,
        is_shared: bool,
    ) -> Self {
        Self {
            socket: Some(socket),
            guard: Mutex::new(guard),
            session,
            permit: Some(permit),
            live: Arc::clone(live),
            received: AtomicU64::new(0),
            is_at_end: AtomicBool::new(false),
            is_left: AtomicBool::new(false),
            is_shared,
        }
    }

    pub(crate) fn session(&self) -> &Session<T> {
        &self.session
    }

    pub(crate) fn live(&self) -> &Live<T> {
        &self.live
    }

    pub(crate) fn socket(&self) -> &Socket {
        match &self.socket {
            Some(socket) => socket,
            None => unreachable!("only `drop` takes it, and the link ends with that"),
        }
    }

    /// Reads without waiting. A revoked connection is at its end.
    pub(crate) fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.session.is_revoked() {
            return Ok(0);
        }
        let result = lock(&self.guard).read_now(self.socket().as_fd(), buffer);
        match &result {
            Ok(0) if !buffer.is_empty() => self.is_at_end.store(true, Ordering::Relaxed),
            Ok(count) => _ = self.received.fetch_add(*count as u64, Ordering::Relaxed),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                let text = "it sent file descriptors, which are not taken".to_owned();
                self.session.revoke(Reason::Sender, self.session.rule().name().as_str(), text);
            }
            Err(_) => {}
        }
        result
    }

    /// Whether nothing that comes from now on can carry descriptors, so that a read never has to look before.
    #[cfg(feature = "tokio")]
    pub(crate) fn reads_plainly(&self) -> bool {
        !lock(&self.guard).may_linger()
    }

    pub(crate) fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        Ok(send(self.socket().as_fd().as_raw_fd(), bytes, flags)?)
    }

    /// Ends a direction. The writing direction of a revoked connection stays open until it is dropped, because the message
    /// that tells the peer is sent then. A connection that its reader was told to leave stays as it is for the next process:
    /// much code ends its direction after a read of 0.
    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if self.is_left() {
            return Ok(());
        }
        let how = match (how, self.session.is_revoked()) {
            (Shutdown::Write, true) => return Ok(()),
            (Shutdown::Both, true) | (Shutdown::Read, _) => nix::sys::socket::Shutdown::Read,
            (Shutdown::Write, false) => nix::sys::socket::Shutdown::Write,
            (Shutdown::Both, false) => nix::sys::socket::Shutdown::Both,
        };
        Ok(shutdown(self.socket().as_fd().as_raw_fd(), how)?)
    }

    /// Wakes a thread that waits to read: what has come can be read, then comes the end.
    pub(super) fn end_reading(&self) {
        self.session.0.ended.give();
        match self.socket() {
            Socket::Plain(fd) => _ = shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Read),
            // The notice wakes its task.
            #[cfg(feature = "tokio")]
            Socket::Tokio(_) => {}
        }
    }

    /// Wakes a task that waits to read.
    #[cfg(any(feature = "restart", feature = "tokio"))]
    pub(super) fn wake_reader(&self) {
        self.session.0.ended.give();
    }

    /// Ends both directions: the peer gets no more, and a thread that waits to write goes on.
    pub(super) fn cut(&self) {
        self.session.0.ended.give();
        let _ = shutdown(self.socket().as_fd().as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }

    /// The reader is to leave the connection to the next process. False where there is nothing to leave.
    pub(crate) fn leave(&self) -> bool {
        let goes_on = self.live.is_leaving() && !self.session.is_revoked() && !self.is_at_end.load(Ordering::Relaxed);
        if goes_on {
            self.is_left.store(true, Ordering::Relaxed);
        }
        goes_on
    }

    /// Whether the reader was told to leave the connection to the next process.
    pub(crate) fn is_left(&self) -> bool {
        self.is_left.load(Ordering::Relaxed) && !self.session.is_revoked()
    }

    /// Gives the socket away: from now on it is the next process's. Only then the connection is no longer among the live ones.
    #[cfg(feature = "restart")]
    pub(crate) fn leave_socket(mut self, take: impl FnOnce(OwnedFd)) {
        if let Some(fd) = self.socket.take().and_then(Socket::into_fd) {
            take(fd);
        }
    }

    fn record_end(&self) {
        if self.session.0.audit.writes_connections() {
            let rule = self.session.rule();
            let mut record = self.session.record(Event::Closed, None, rule.name().as_str());
            record.duration = Some(self.session.0.began.elapsed());
            record.bytes = Some(self.received.load(Ordering::Relaxed));
            self.session.0.audit.write(record);
        }
    }

    /// Lingering close. Where the peer has closed already, nothing is left to wait for.
    fn close(&self, socket: OwnedFd, guard: Guard) {
        let mut stream = Stream::from_parts(socket, guard);
        if self.session.is_revoked() {
            return self.live.closer().close_denied(stream);
        }
        if self.is_at_end.load(Ordering::Relaxed) {
            if self.is_shared {
                let _ = stream.shutdown(Shutdown::Both);
            }
            return;
        }
        let is_open = stream.shutdown(Shutdown::Write).is_ok();
        let is_at_end = match stream.read_now(&mut [0; 512]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        };
        if is_open && !is_at_end {
            self.live.close_later(stream);
        } else if self.is_shared {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl<T: Terms> Drop for Link<T> {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take() {
            #[cfg(feature = "tokio")]
            if thread::panicking() && matches!(socket, Socket::Tokio(_)) {
                // The runtime catches it and records nothing. The panic of a thread is recorded elsewhere, with its message.
                let text = format!("the service panicked: connection {}", self.session.connection());
                self.session.0.audit.write(Record::note(Severity::Error, text));
            }
            self.record_end();
            // Given back before the peer can know that the connection is over, and connect again.
            self.permit = None;
            let guard = *lock(&self.guard);
            if let Some(fd) = socket.into_fd() {
                self.close(fd, guard);
            }
        }
        self.live.forget(self.session.connection());
    }
}
