//! A connection in the hands of one thread, which may wait for it: [`Connection`].

use std::fmt;
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::clock::{later, poll_timeout};
use crate::permits::Terms;
use crate::session::{Link, Session};

/// How much is read at once for [`BufRead`].
const CHUNK: usize = 8 * 1024;

/// An admitted connection that one thread serves: reading and writing wait, as with a
/// [`UnixStream`](std::os::unix::net::UnixStream). Made by [`Service::serve_threads`](crate::Service::serve_threads).
///
/// - It never takes descriptors from the peer: a read fails with [`InvalidData`](ErrorKind::InvalidData), and the connection
///   is revoked.
/// - When a reload revokes it, or the service stops, a read returns 0 as at the end of file. What was written before is sent.
/// - Dropped, it is closed in order: the peer gets what was written and an end of file, not a reset. The peer of a revoked
///   connection gets the message for a denied one.
///
/// It is a [`BufRead`]. **Do not wrap it in a `BufReader`**, which would lose what it holds at a restart. There is no
/// `try_clone`: two readers would have to agree on what each has seen. Several threads may write, through `&Connection`.
pub struct Connection<T: Terms> {
    link: Arc<Link<T>>,
    /// Received and not consumed, from `consumed` on.
    buffer: Vec<u8>,
    consumed: usize,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

impl<T: Terms> Connection<T> {
    pub(crate) fn new(link: Arc<Link<T>>, buffer: Vec<u8>) -> Self {
        Self { link, buffer, consumed: 0, read_timeout: None, write_timeout: None }
    }

    /// The peer, the rule that admits it, whether it is revoked.
    pub fn session(&self) -> &Session<T> {
        self.link.session()
    }

    /// How long a read may wait; `None`: without end. After it the error is [`TimedOut`](ErrorKind::TimedOut).
    pub fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.read_timeout = timeout;
    }

    /// How long a write may wait for a peer that does not read; `None`: without end. After it the error is
    /// [`TimedOut`](ErrorKind::TimedOut).
    pub fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.write_timeout = timeout;
    }

    /// Ends one direction or both. The message to the peer of a revoked connection is not lost by it.
    ///
    /// # Errors
    /// What shutdown(2) reports.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.link.shutdown(how)
    }

    /// Whether the last read returned 0 because the service restarts: the next process goes on with the connection. Otherwise
    /// it was the end.
    #[cfg(feature = "restart")]
    pub fn goes_on(&self) -> bool {
        self.link.is_left()
    }

    #[cfg(feature = "restart")]
    pub(crate) fn into_parts(self) -> (Arc<Link<T>>, Vec<u8>) {
        let Self { link, mut buffer, consumed, .. } = self;
        buffer.drain(..consumed);
        (link, buffer)
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let until = self.read_timeout.map(|span| later(Instant::now(), span));
        loop {
            if self.link.leave() {
                return Ok(0);
            }
            match self.link.read_now(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.link.live().is_ending() {
                        return Ok(0);
                    }
                    let live = self.link.live();
                    self.wait(PollFlags::POLLIN, Some(live.leaving()), until)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn wait(&self, what: PollFlags, also: Option<BorrowedFd<'_>>, until: Option<Instant>) -> io::Result<()> {
        let socket = PollFd::new(self.link.socket().as_fd(), what);
        let woken = match also {
            Some(also) => poll(&mut [socket, PollFd::new(also, PollFlags::POLLIN)], poll_timeout(until)),
            None => poll(&mut [socket], poll_timeout(until)),
        };
        match woken {
            Ok(0) if until.is_some_and(|until| until <= Instant::now()) => Err(ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl<T: Terms> Read for Connection<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.consumed < self.buffer.len() {
            let count = (&self.buffer[self.consumed..]).read(buffer)?;
            self.consume(count);
            return Ok(count);
        }
        self.receive(buffer)
    }
}

impl<T: Terms> BufRead for Connection<T> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.consumed >= self.buffer.len() {
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.resize(CHUNK, 0);
            let received = self.receive(&mut buffer);
            buffer.truncate(*received.as_ref().unwrap_or(&0));
            (self.buffer, self.consumed) = (buffer, 0);
            received?;
        }
        Ok(&self.buffer[self.consumed..])
    }

    fn consume(&mut self, count: usize) {
        self.consumed = (self.consumed + count).min(self.buffer.len());
    }
}

impl<T: Terms> Write for &Connection<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let until = self.write_timeout.map(|span| later(Instant::now(), span));
        loop {
            match self.link.write_now(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::POLLOUT, None, until)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<T: Terms> Write for Connection<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// To wait for it together with others. Read it only through this type.
impl<T: Terms> AsFd for Connection<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.socket().as_fd()
    }
}

impl<T: Terms> fmt::Debug for Connection<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("session", self.session()).finish_non_exhaustive()
    }
}
