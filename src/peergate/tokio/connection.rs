//! A connection in the hands of a task: [`Connection`].

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

use crate::permits::Terms;
use crate::session::{Link, Session, Socket};

/// How much is read at once for [`AsyncBufRead`].
const CHUNK: usize = 8 * 1024;

/// An admitted connection that a task serves.
///
/// - It never takes descriptors from the peer: a read fails with [`InvalidData`](ErrorKind::InvalidData), and the connection
///   is revoked.
/// - When a reload revokes it, it reads as at its end. Its answers can still be written, for five seconds. Wait for
///   [`Session::revoked`] where an answer may take longer.
/// - Dropped, it is closed in order: the peer gets what was written and an end of file, not a reset. The peer of a revoked
///   connection gets the message for a denied one, also where the connection was shut down before.
///
/// It is an [`AsyncBufRead`]: with `hand_over`, do not wrap it in a `BufReader`, which would lose what it holds at a restart.
pub struct Connection<T: Terms> {
    link: Arc<Link<T>>,
    /// No descriptors can come: there is no need to look before a read.
    is_plain: bool,
    /// Nothing was read yet, nothing was written. A peer has often sent something by the time it is accepted, and takes
    /// something always. So the first time it is tried, before the runtime has told: that saves waiting for the runtime.
    is_unread: bool,
    is_unwritten: bool,
    /// The task that the session's end wakes.
    waiting: Option<Waker>,
    /// Received and not consumed, from `consumed` on.
    buffer: Vec<u8>,
    consumed: usize,
}

impl<T: Terms> Connection<T> {
    pub(super) fn new(link: Arc<Link<T>>) -> Self {
        let (is_plain, waiting) = (link.reads_plainly(), None);
        Self { link, is_plain, is_unread: true, is_unwritten: true, waiting, buffer: Vec::new(), consumed: 0 }
    }

    /// What was received by the process before, and not consumed.
    #[cfg(feature = "restart")]
    pub(super) fn hold(&mut self, received: Vec<u8>) {
        (self.buffer, self.consumed) = (received, 0);
    }

    #[cfg(feature = "restart")]
    pub(super) fn into_parts(self) -> (Arc<Link<T>>, Vec<u8>) {
        let Self { link, mut buffer, consumed, .. } = self;
        buffer.drain(..consumed);
        (link, buffer)
    }

    /// Whether the last read returned 0 because the service restarts: the next process goes on with the connection. Otherwise
    /// it was the end.
    #[cfg(feature = "restart")]
    pub fn goes_on(&self) -> bool {
        self.link.is_left()
    }

    /// The peer, the rule that admits it, whether it is revoked.
    pub fn session(&self) -> &Session<T> {
        self.link.session()
    }

    fn socket(&self) -> io::Result<&UnixStream> {
        match self.link.socket() {
            Socket::Tokio(socket) => Ok(socket),
            Socket::Plain(_) => Err(ErrorKind::NotConnected.into()),
        }
    }
}

/// Reads what has come. A read that does not fill the buffer has emptied the queue, where no descriptors are possible: the
/// runtime is told that the socket is not ready any more, as its own types do, which saves the next read a call in vain.
fn try_read<T: Terms>(
    link: &Link<T>,
    socket: &UnixStream,
    is_plain: &mut bool,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let mut partly = None;
    let read = socket.try_io(Interest::READABLE, || {
        let count = link.read_now(buffer)?;
        if *is_plain && 0 < count && count < buffer.len() {
            partly = Some(count);
            return Err(ErrorKind::WouldBlock.into());
        }
        Ok(count)
    });
    if !*is_plain {
        *is_plain = link.reads_plainly();
    }
    partly.map_or(read, Ok)
}

impl<T: Terms> Connection<T> {
    /// Reads from the socket.
    fn poll_receive(&mut self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { link, is_plain, is_unread, waiting, .. } = self;
        let Socket::Tokio(socket) = link.socket() else { return Poll::Ready(Err(ErrorKind::NotConnected.into())) };
        loop {
            if link.leave() {
                return Poll::Ready(Ok(0));
            }
            let result = if std::mem::take(is_unread) {
                link.read_now(buffer)
            } else {
                match socket.poll_read_ready(context) {
                    Poll::Ready(ready) => ready?,
                    Poll::Pending if is_ended(link.session(), waiting, context) => {
                        // It may be ended because it is to be left.
                        link.leave();
                        return Poll::Ready(Ok(0));
                    }
                    Poll::Pending => return Poll::Pending,
                }
                try_read(link, socket, is_plain, buffer)
            };
            match result {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

impl<T: Terms> AsyncRead for Connection<T> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let held = &this.buffer[this.consumed..];
        if !held.is_empty() {
            let count = held.len().min(buffer.remaining());
            buffer.put_slice(&held[..count]);
            this.consumed += count;
            return Poll::Ready(Ok(()));
        }
        let count = ready!(this.poll_receive(context, buffer.initialize_unfilled()))?;
        buffer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: Terms> AsyncBufRead for Connection<T> {
    fn poll_fill_buf(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.consumed >= this.buffer.len() {
            let mut buffer = std::mem::take(&mut this.buffer);
            buffer.resize(CHUNK, 0);
            let received = this.poll_receive(context, &mut buffer);
            let count = if let Poll::Ready(Ok(count)) = received { count } else { 0 };
            buffer.truncate(count);
            (this.buffer, this.consumed) = (buffer, 0);
            ready!(received)?;
        }
        Poll::Ready(Ok(&this.buffer[this.consumed..]))
    }

    fn consume(self: Pin<&mut Self>, count: usize) {
        let this = self.get_mut();
        this.consumed = (this.consumed + count).min(this.buffer.len());
    }
}

/// Whether nothing more is read. If not, the task is woken when that changes.
fn is_ended<T>(session: &Session<T>, waiting: &mut Option<Waker>, context: &mut Context<'_>) -> bool {
    if waiting.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
        return session.is_ended();
    }
    *waiting = Some(context.waker().clone());
    session.poll_ended(context).is_ready()
}

impl<T: Terms> AsyncWrite for Connection<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let is_first = std::mem::take(&mut this.is_unwritten);
        let socket = this.socket()?;
        let mut result = if is_first { this.link.write_now(bytes) } else { Err(ErrorKind::WouldBlock.into()) };
        loop {
            match result {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
            ready!(socket.poll_write_ready(context))?;
            result = socket.try_io(Interest::WRITABLE, || this.link.write_now(bytes));
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let socket = self.socket()?;
        loop {
            ready!(socket.poll_write_ready(context))?;
            match socket.try_write_vectored(parts) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.link.shutdown(Shutdown::Write))
    }
}

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
