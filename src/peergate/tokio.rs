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
//! In Cargo.toml it has `tokio = { version = "1", features = ["io-util", "macros"] }` beside
//! `peergate = { version = "0.1", features = ["tokio"] }`.
//!
//! The gate takes its turns in a task of the runtime. Signals, reload and watchdog are heard on a thread of their own: a
//! runtime that is kept from running its tasks gets no WATCHDOG=1, and the service manager starts the service again.
//!
//! At a stop, what the gate has admitted is accepted first; then [`Handle::stopping`] is ready. With the feature `restart`,
//! `hand_over` gives the live connections to the next process (`HandOver::block_on`).
//!
//! [`Service`] has blocked SIGTERM, SIGINT, SIGHUP and SIGCONT for all threads: `tokio::signal` does not hear them. Wait for
//! [`Handle::stopping`] instead.

mod connection;
#[cfg(feature = "restart")]
mod restart;
mod turn;

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use crate::audit::Severity;
use crate::gate::Admission;
use crate::permits::Terms;
use crate::service::{Attendant, Core, Error, Opened, Service};
use crate::session::{Place, Socket};

pub use self::connection::Connection;
#[cfg(feature = "restart")]
pub use self::restart::{Carried, Carrier};

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
        let (ended, attendant) = run(self.open()?, runtime()?, false, main)?;
        attendant.end();
        ended.map_err(ended_by)
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
        let (ended, attendant) = run(self.open()?, runtime, false, main)?;
        attendant.end();
        ended.map_err(ended_by)
    }
}

/// With a thread for each processor.
fn runtime() -> Result<Runtime, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Error::new("starting the runtime", error))
}

fn ended_by(error: impl fmt::Display) -> Error {
    Error::new("the service ended", error)
}

/// Serves until `main` returns. What is left to do then is the attendant's. With `is_carrying`, live connections are left to
/// the next process if one follows.
fn run<T, F, R, E>(
    opened: Opened<T>,
    runtime: Runtime,
    is_carrying: bool,
    main: F,
) -> Result<(Result<(), E>, Attendant<T>), Error>
where
    T: Terms,
    F: FnOnce(Handle<T>) -> R,
    R: Future<Output = Result<(), E>>,
{
    let (core, journal, plan) = Core::open(opened)?;
    let queue = Arc::new(Queue::default());
    let handle = Handle { core: Arc::clone(&core), queue: Arc::clone(&queue) };
    let is_done = Arc::new(AtomicBool::new(false));
    let mut attendant = Attendant::new(&core, plan, journal);
    // Before the gate's first turn: what an earlier process left comes first.
    let main = main(handle);
    let attend = {
        let (core, queue, is_done) = (Arc::clone(&core), Arc::clone(&queue), Arc::clone(&is_done));
        move || {
            let is_done = || is_done.load(Ordering::Acquire);
            let ending = attendant.attend(is_done);
            attendant.begin_end();
            if is_carrying {
                attendant.leave_or_end_all(ending);
            }
            let mut admitted = Vec::new();
            core.stop_accepting(&mut admitted);
            queue.push(admitted);
            queue.is_last.store(true, Ordering::Release);
            // A connection that the gate has admitted is served, like one that was taken before.
            attendant.wait_a_while(|| queue.is_empty() || is_done());
            core.stopping.give();
            attendant.wait_until(is_done);
            attendant
        }
    };
    let attending = thread::Builder::new().name("service".to_owned()).spawn(attend);
    let attending = attending.map_err(|error| Error::new("starting the service's thread", error))?;
    runtime.spawn(turn::turn(Arc::clone(&core), Arc::clone(&queue)));
    let ended = {
        // Also where `main` panics: the attendant would keep the process.
        let _done = Done { is_done: &is_done, core: &core };
        runtime.block_on(main)
    };
    // The tasks' connections are closed in order, by the gate.
    runtime.shutdown_timeout(LAST_TASKS);
    while let Some(admission) = queue.pop() {
        core.close_in_order(admission.socket);
    }
    let attendant = attending.join().map_err(|_| Error::new("the service's thread", "it panicked"))?;
    Ok((ended, attendant))
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
    admitted: Mutex<VecDeque<Admission<T>>>,
    more: Notify,
    /// How many connections of the process before nothing serves yet. They wait elsewhere (`tokio/restart.rs`).
    inherited: AtomicUsize,
    /// None comes after those that are in here.
    is_last: AtomicBool,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let (inherited, is_last) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { admitted: Mutex::default(), more: Notify::new(), inherited, is_last }
    }
}

impl<T> Queue<T> {
    fn push(&self, admitted: impl IntoIterator<Item = Admission<T>>) {
        let mut queue = self.lock();
        for admission in admitted {
            queue.push_back(admission);
            self.more.notify_one();
        }
    }

    fn pop(&self) -> Option<Admission<T>> {
        self.lock().pop_front()
    }

    /// Whether each connection has been taken.
    fn is_empty(&self) -> bool {
        self.inherited.load(Ordering::Acquire) == 0 && self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Admission<T>>> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
            match self.try_accept() {
                Some(connection) => return connection,
                None => self.queue.more.notified().await,
            }
        }
    }

    /// `None` where no connection waits.
    fn try_accept(&self) -> Option<Connection<T>> {
        loop {
            if let Some(connection) = self.enter(self.queue.pop()?, false) {
                return Some(connection);
            }
        }
    }

    /// `None` where a reload has revoked it meanwhile, or the runtime does not take it.
    fn enter(&self, admission: Admission<T>, is_shared: bool) -> Option<Connection<T>> {
        if self.queue.is_last.load(Ordering::Acquire) {
            // The attendant waits until every connection is taken.
            self.core.wakeup.notify();
        }
        let number = admission.connection;
        match self.core.live.enter(admission, is_shared, registered) {
            Ok(link) => link.map(Connection::new),
            Err(error) => {
                let text = format!("the runtime does not take connection {number}: {error}");
                self.core.note(Severity::Error, text);
                None
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
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
