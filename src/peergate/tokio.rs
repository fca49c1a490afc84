//! A service on tokio's runtime (feature `tokio`).
//!
//! ```no_run
//! use std::io;
//!
//! use peergate::tokio::Handle;
//! use peergate::{Error, Service};
//! use tokio::io::AsyncWriteExt;
//!
//! fn main() -> Result<(), Error> {
//!     Service::from_systemd("hello").policy_file("/etc/hello.toml").block_on(serve)
//! }
//!
//! async fn serve(gate: Handle<()>) -> io::Result<()> {
//!     loop {
//!         let mut connection = tokio::select! {
//!             connection = gate.accept() => connection,
//!             () = gate.stopping() => return Ok(()),
//!         };
//!         tokio::spawn(async move { connection.write_all(b"hello\n").await });
//!     }
//! }
//! ```
//!
//! The gate takes its turns in a task of the runtime. Signals, reload and watchdog are heard on a thread of their own: a
//! runtime that is kept from running its tasks gets no WATCHDOG=1, and the service manager starts the service again.
//!
//! [`Service`] has blocked SIGTERM, SIGINT, SIGHUP and SIGCONT for all threads: `tokio::signal` does not hear them. Wait for
//! [`Handle::stopping`] instead.

use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use crate::audit::Severity;
use crate::gate::Admission;
use crate::permits::Terms;
use crate::service::{Attendant, Core, Error, Service};
use crate::session::{Link, Place, Session, Socket};

/// How long tasks that cannot be interrupted may keep the runtime from ending.
const LAST_TASKS: Duration = Duration::from_secs(1);

impl<T: Terms> Service<T> {
    /// Serves on a runtime of its own, with a thread for each processor, until `main` returns. It is to return soon after
    /// [`Handle::stopping`]: what lives after five seconds reads its end, and after ten it is cut off.
    ///
    /// # Errors
    /// What keeps the service from starting, as a sentence; the error of `main`.
    pub fn block_on<F, R, E>(self, main: F) -> Result<(), Error>
    where
        F: FnOnce(Handle<T>) -> R,
        R: Future<Output = Result<(), E>>,
        E: fmt::Display,
    {
        let opened = self.open()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Error::new("starting the runtime", error))?;
        serve(opened, runtime, main)
    }

    /// As [`block_on`](Self::block_on), on a runtime that the caller has made. Make it after the [`Service`], so that its
    /// threads leave the signals to it.
    ///
    /// # Errors
    /// As [`block_on`](Self::block_on).
    pub fn block_on_runtime<F, R, E>(self, runtime: Runtime, main: F) -> Result<(), Error>
    where
        F: FnOnce(Handle<T>) -> R,
        R: Future<Output = Result<(), E>>,
        E: fmt::Display,
    {
        serve(self.open()?, runtime, main)
    }
}

fn serve<T, F, R, E>(opened: crate::service::Opened<T>, runtime: Runtime, main: F) -> Result<(), Error>
where
    T: Terms,
    F: FnOnce(Handle<T>) -> R,
    R: Future<Output = Result<(), E>>,
    E: fmt::Display,
{
    let (core, journal, plan) = Core::open(opened)?;
    let queue = Arc::new(Queue { admitted: Mutex::default(), more: Notify::new() });
    let handle = Handle { core: Arc::clone(&core), queue: Arc::clone(&queue) };
    let is_done = Arc::new(AtomicBool::new(false));
    let mut attendant = Attendant::new(&core, plan, journal);
    let attend = {
        let (core, queue, is_done) = (Arc::clone(&core), Arc::clone(&queue), Arc::clone(&is_done));
        move || {
            let is_done = || is_done.load(Ordering::Acquire);
            attendant.attend(is_done);
            attendant.begin_end();
            let mut admitted = Vec::new();
            core.stop_accepting(&mut admitted);
            queue.push(admitted);
            core.stopping.give();
            attendant.wait_until(is_done);
            attendant
        }
    };
    let attending = thread::Builder::new().name("service".to_owned()).spawn(attend);
    let attending = attending.map_err(|error| Error::new("starting the service's thread", error))?;
    runtime.spawn(turn(Arc::clone(&core), queue));
    let ended = {
        // Also where `main` panics: the attendant would keep the process.
        let _done = Done { is_done: &is_done, core: &core };
        runtime.block_on(main(handle))
    };
    // The tasks' connections are closed in order, by the gate.
    runtime.shutdown_timeout(LAST_TASKS);
    if let Ok(attendant) = attending.join() {
        attendant.end();
    }
    ended.map_err(|error| Error::new("the service ended", error))
}

struct Done<'a, T: Terms> {
    is_done: &'a AtomicBool,
    core: &'a Core<T>,
}

impl<T: Terms> Drop for Done<'_, T> {
    fn drop(&mut self) {
        self.is_done.store(true, Ordering::Release);
        self.core.wakeup.notify();
    }
}

/// Connections that the gate has admitted and that nothing serves yet. There are never more than the limits allow.
struct Queue<T> {
    admitted: Mutex<std::collections::VecDeque<Admission<T>>>,
    more: Notify,
}

impl<T> Queue<T> {
    fn push(&self, admitted: impl IntoIterator<Item = Admission<T>>) {
        let mut queue = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        for admission in admitted {
            queue.push_back(admission);
            self.more.notify_one();
        }
    }

    fn pop(&self) -> Option<Admission<T>> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// Gives the gate its turns.
async fn turn<T: Terms>(core: Arc<Core<T>>, queue: Arc<Queue<T>>) {
    let watched = core.epoll().try_clone().and_then(watched);
    let epoll = match watched {
        Ok(epoll) => epoll,
        Err(error) => return core.note(Severity::Error, format!("the runtime does not take the gate: {error}")),
    };
    let mut admitted = Vec::new();
    let mut ready: Option<AsyncFdReadyGuard<'_, OwnedFd>> = None;
    while let Some(due) = core.turn(&mut admitted) {
        queue.push(admitted.drain(..));
        // The runtime tells of changes only, and a turn is bounded: there may be more to do.
        if is_readable(epoll.get_ref().as_fd()) {
            tokio::task::yield_now().await;
            continue;
        }
        // What has changed since this readiness was seen makes the descriptor ready again.
        ready.take().as_mut().map(AsyncFdReadyGuard::clear_ready);
        ready = match due {
            Some(due) => timeout_at(due.into(), epoll.readable()).await.ok().and_then(Result::ok),
            None => epoll.readable().await.ok(),
        };
    }
}

/// tokio asks for a promise, which only unsafe code can give, that the descriptor stays the same for as long as its owner
/// lives. That is so for `OwnedFd`. This is the call from before that promise.
#[allow(deprecated)]
fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// The running service, for the tasks that serve. Cheap to clone.
pub struct Handle<T: Terms> {
    core: Arc<Core<T>>,
    queue: Arc<Queue<T>>,
}

impl<T: Terms> Handle<T> {
    /// The next admitted connection. If the future is dropped before it is ready, no connection is lost. Once the service
    /// stops and all admitted connections have been taken, it never ends: wait for [`stopping`](Self::stopping) too.
    pub async fn accept(&self) -> Connection<T> {
        loop {
            let Some(admission) = self.queue.pop() else {
                self.queue.more.notified().await;
                continue;
            };
            let number = admission.connection;
            match self.core.live.enter(admission, false, registered) {
                Ok(Some(link)) => return Connection { link, is_plain: false },
                Ok(None) => {}
                Err(error) => {
                    self.core.note(Severity::Error, format!("the runtime does not take connection {number}: {error}"))
                }
            }
        }
    }

    /// Gives connections one after the other, for a server that takes a listener.
    pub fn listener(&self) -> Listener<T> {
        Listener(self.clone())
    }

    /// Ready when the service stops: no connection is accepted any more, and what is under way is to end.
    pub fn stopping(&self) -> Stopping<T> {
        Stopping { core: Arc::clone(&self.core), place: Place::new() }
    }

    /// How many connections are admitted.
    pub fn connections(&self) -> usize {
        self.core.permits.total()
    }
}

fn registered(fd: OwnedFd) -> io::Result<Socket> {
    UnixStream::from_std(std::os::unix::net::UnixStream::from(fd)).map(Socket::Tokio)
}

impl<T: Terms> Clone for Handle<T> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core), queue: Arc::clone(&self.queue) }
    }
}

impl<T: Terms> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("live", &self.core.live).finish_non_exhaustive()
    }
}

/// Admitted connections, one after the other: [`Handle::listener`].
pub struct Listener<T: Terms>(Handle<T>);

impl<T: Terms> Listener<T> {
    /// As [`Handle::accept`].
    pub async fn accept(&self) -> Connection<T> {
        self.0.accept().await
    }
}

impl<T: Terms> fmt::Debug for Listener<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listener").field(&self.0).finish()
    }
}

/// Ready when the service stops: [`Handle::stopping`].
#[must_use = "a future does nothing until it is awaited"]
pub struct Stopping<T: Terms> {
    core: Arc<Core<T>>,
    place: Place,
}

impl<T: Terms> Future for Stopping<T> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.core.stopping.poll(self.place, context)
    }
}

impl<T: Terms> Drop for Stopping<T> {
    fn drop(&mut self) {
        self.core.stopping.leave(self.place);
    }
}

impl<T: Terms> fmt::Debug for Stopping<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stopping")
    }
}

/// An admitted connection that a task serves.
///
/// - It never takes descriptors from the peer: a read fails with [`InvalidData`](ErrorKind::InvalidData), and the connection
///   is revoked.
/// - When a reload revokes it, it reads as at its end. Its answers can still be written, for five seconds. Wait for
///   [`Session::revoked`] where an answer may take longer.
/// - Dropped, it is closed in order: the peer gets what was written and an end of file, not a reset. The peer of a revoked
///   connection gets the message for a denied one, also where the connection was shut down before.
pub struct Connection<T: Terms> {
    link: Arc<Link<T>>,
    /// No descriptors can come: there is no need to look before a read.
    is_plain: bool,
}

impl<T: Terms> Connection<T> {
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

impl<T: Terms> AsyncRead for Connection<T> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { link, is_plain } = self.get_mut();
        let Socket::Tokio(socket) = link.socket() else { return Poll::Ready(Err(ErrorKind::NotConnected.into())) };
        loop {
            match socket.poll_read_ready(context) {
                Poll::Ready(ready) => ready?,
                Poll::Pending if link.session().poll_ended(context).is_ready() => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
            match try_read(link, socket, is_plain, buffer.initialize_unfilled()) {
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl<T: Terms> AsyncWrite for Connection<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let socket = self.socket()?;
        loop {
            ready!(socket.poll_write_ready(context))?;
            match socket.try_io(Interest::WRITABLE, || self.link.write_now(bytes)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::path::PathBuf;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinSet;

    use super::*;
    use crate::policy::Policy;
    use crate::{Uid, activation};

    /// A service at a path of this name, without systemd, that ends when `main` returns.
    fn serve<R: Future<Output = Result<(), Error>>>(name: &str, main: impl FnOnce(Handle<()>, PathBuf) -> R) {
        let path = std::env::temp_dir().join(format!("tokio-test-{name}-{}.sock", std::process::id()));
        let service = Service::from_systemd(name).listener(activation::bind(&path).unwrap());
        let service = service.policy(Policy::owner_only(Uid::effective()));
        // What is lost would be waited for without end.
        let in_time = async |gate| tokio::time::timeout(Duration::from_secs(60), main(gate, path)).await.unwrap();
        service.block_on(in_time).unwrap();
    }

    fn connect(path: &PathBuf) -> std::os::unix::net::UnixStream {
        let client = std::os::unix::net::UnixStream::connect(path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client
    }

    #[test]
    fn an_accept_that_is_dropped_loses_no_connection() {
        serve("cancel", async |gate, path| {
            let mut clients = JoinSet::new();
            for number in 0..50 {
                let path = path.clone();
                clients.spawn_blocking(move || {
                    let (mut client, mut answer) = (connect(&path), String::new());
                    client.write_all(format!("{number}").as_bytes()).unwrap();
                    client.shutdown(Shutdown::Write).unwrap();
                    client.read_to_string(&mut answer).unwrap();
                    assert_eq!(answer, number.to_string());
                });
            }
            let mut served = 0;
            while served < 50 {
                // Most accepts are dropped before they are ready.
                let mut connection = tokio::select! {
                    connection = gate.accept() => connection,
                    () = tokio::task::yield_now() => continue,
                };
                served += 1;
                tokio::spawn(async move {
                    let mut text = Vec::new();
                    connection.read_to_end(&mut text).await.unwrap();
                    connection.write_all(&text).await.unwrap();
                });
            }
            while let Some(client) = clients.join_next().await {
                client.unwrap();
            }
            Ok(())
        });
    }

    #[test]
    fn connections_of_a_runtime_that_ends_are_closed_in_order() {
        let mut clients = Vec::new();
        serve("ends", async |gate, path| {
            for _ in 0..10 {
                let mut client = connect(&path);
                // It is never read: closing the socket alone would reset the connection.
                client.write_all(b"unread").unwrap();
                clients.push(client);
                let mut connection = gate.accept().await;
                connection.write_all(b"hello").await.unwrap();
                tokio::spawn(async move {
                    connection.session().revoked().await;
                    drop(connection);
                });
            }
            assert_eq!(gate.connections(), 10);
            Ok(())
        });
        for mut client in clients {
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        }
    }
}
